//! Writing into a file of YAML without touching the rest of it, comments included.

use std::fmt::Write as _;

/// A value to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Node {
    /// A string
    Text(String),
    /// A number or a truth value, as written
    Plain(String),
    List(Vec<Node>),
    /// In this order
    Map(Vec<(String, Node)>),
}

impl Node {
    pub(super) fn is_empty(&self) -> bool {
        match self {
            Self::Text(_) | Self::Plain(_) => false,
            Self::List(items) => items.is_empty(),
            Self::Map(fields) => fields.is_empty(),
        }
    }

    /// `key: …` as a block, indented.
    fn block(&self, key: &str, indent: usize, out: &mut String) {
        let _ = write!(out, "{:indent$}{}:", "", scalar(key));
        self.after(indent, out);
    }

    /// What follows the colon or dash of something at this indent.
    fn after(&self, indent: usize, out: &mut String) {
        let deeper = indent + 2;
        match self {
            Self::Text(text) => *out += &format!(" {}\n", scalar(text)),
            Self::Plain(text) => *out += &format!(" {text}\n"),
            Self::List(items) if items.is_empty() => *out += " []\n",
            Self::Map(fields) if fields.is_empty() => *out += " {}\n",
            Self::List(items) => {
                out.push('\n');
                for item in items {
                    let _ = write!(out, "{:deeper$}-", "");
                    match item {
                        Self::Map(fields) if !fields.is_empty() => {
                            let mut inner = String::new();
                            for (key, value) in fields {
                                value.block(key, deeper + 2, &mut inner);
                            }
                            // The first field stands behind the dash.
                            *out += &format!(" {}", inner.trim_start());
                        }
                        other => other.after(deeper, out),
                    }
                }
            }
            Self::Map(fields) => {
                out.push('\n');
                for (key, value) in fields {
                    value.block(key, deeper, out);
                }
            }
        }
    }
}

/// A string as YAML: plain where nothing else could be read in it, else quoted as in JSON, which YAML reads too.
fn scalar(text: &str) -> String {
    let first = text.chars().next().is_some_and(|first| first.is_ascii_alphabetic() || first == '/');
    let plain = |c: char| c.is_ascii_alphanumeric() || "/_-.".contains(c);
    let word =
        ["true", "false", "null", "yes", "no", "on", "off", "y", "n"].contains(&text.to_ascii_lowercase().as_str());
    if first && !word && text.chars().all(plain) {
        return text.to_owned();
    }
    serde_json::Value::from(text).to_string()
}

/// Writes `key: value` into a mapping whose first key is on line `first` (from 1), in the place of what the key has there on line `at`, or at its end.
///
/// # Errors
/// When the mapping is not written as a block.
pub(super) fn put(text: &str, first: u32, at: Option<u32>, key: &str, value: &Node) -> Result<String, String> {
    let lines: Vec<&str> = text.split_inclusive('\n').collect();
    let index = |line: u32| usize::try_from(line).unwrap_or(usize::MAX).saturating_sub(1);
    let flow = || format!("line {first}: it is not written as a block (one key a line), so nothing can be put into it");
    let line = |index: usize| lines.get(index).copied().unwrap_or_default();
    let column = column(line(index(first))).ok_or_else(flow)?;
    let mut block = String::new();
    value.block(key, column, &mut block);
    let (from, to) = match at {
        Some(at) => {
            let from = index(at);
            let rest = line(from).get(column..).unwrap_or_default();
            if !rest.starts_with(&format!("{key}:")) {
                return Err(flow());
            }
            // Behind the dash of a list, where it is the first key.
            if line(from).get(..column).is_some_and(|before| before.contains('-')) {
                block.replace_range(..column, line(from).get(..column).unwrap_or_default());
            }
            (from, end(&lines, from + 1, column + 1))
        }
        None => {
            let to = end(&lines, index(first) + 1, column);
            (to, to)
        }
    };
    let mut out: String = lines.get(..from).unwrap_or_default().concat();
    if !out.is_empty() && !out.ends_with('\n') {
        out.push('\n');
    }
    out += &block;
    out += &lines.get(to..).unwrap_or_default().concat();
    Ok(out)
}

/// The column of the first key of a block: behind the dashes of lists. `None`: that is none.
fn column(line: &str) -> Option<usize> {
    let rest = line.trim_start_matches([' ', '-']);
    let key = rest.split(':').next()?;
    let plain = !key.is_empty() && key.chars().all(|c| c.is_ascii_alphanumeric() || "-_\"'".contains(c));
    (plain && rest.contains(':')).then(|| line.len() - rest.len())
}

/// The first line that is indented less; empty lines and comments before it are its own.
fn end(lines: &[&str], from: usize, column: usize) -> usize {
    let mut end = from;
    for (index, line) in lines.iter().enumerate().skip(from) {
        let bare = line.trim_start();
        let indent = line.len() - bare.len();
        if bare.is_empty() || (bare.starts_with('#') && indent < column) {
            continue;
        }
        if indent < column {
            break;
        }
        end = index + 1;
    }
    end
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Node {
        Node::Text(text.into())
    }

    #[test]
    fn values_are_written_as_blocks() {
        let map = |fields: &[(&str, Node)]| {
            Node::Map(fields.iter().map(|(key, node)| ((*key).into(), node.clone())).collect())
        };
        let node = map(&[
            ("status", Node::Plain("200".into())),
            ("body", text("two\nlines")),
            ("path", text("/a/b")),
            ("word", text("no")),
            ("none", Node::List(vec![])),
            ("log", Node::List(vec![text("info a: b"), map(&[("a", text("x")), ("b", text("z"))])])),
        ]);
        let mut out = String::new();
        node.block("expect", 2, &mut out);
        let expected = "  expect:\n    status: 200\n    body: \"two\\nlines\"\n    path: /a/b\n    word: \"no\"\n    none: []\n    log:\n      \
                        - \"info a: b\"\n      - a: x\n        b: z\n";
        assert_eq!(out, expected);
    }

    #[test]
    fn a_key_is_replaced_or_added_and_the_rest_stays() {
        let file = "# top\ncases:\n- name: a\n  steps:\n  - request: {}   # why\n    expect:\n      log: [x]\n\n  # the second\n  - expect: {}\n    request: {}\n\n- name: b\n";
        let new = Node::Map(vec![("log".into(), Node::List(vec![text("z")]))]);
        let replaced = put(file, 5, Some(6), "expect", &new).unwrap();
        assert_eq!(replaced, file.replace("      log: [x]\n", "      log:\n        - z\n"));
        let replaced = put(file, 10, Some(10), "expect", &new).unwrap();
        assert_eq!(replaced, file.replace("- expect: {}\n", "- expect:\n      log:\n        - z\n"));
        let added = put(file, 3, None, "start", &new).unwrap();
        assert_eq!(
            added,
            file.replace("    request: {}\n\n- name: b", "    request: {}\n  start:\n    log:\n      - z\n\n- name: b")
        );
        let added = put("- request: {}", 1, None, "expect", &new).unwrap();
        assert_eq!(added, "- request: {}\n  expect:\n    log:\n      - z\n");
        assert!(put("- {request: {}}\n", 1, None, "expect", &new).unwrap_err().starts_with("line 1"));
    }
}
