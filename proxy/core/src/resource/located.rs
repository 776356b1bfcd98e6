//! YAML that is no resource, read with the same care: unknown fields are errors with a suggestion, and every error has its line.

use serde::de::DeserializeOwned;

use super::decode::{self, Bad};
use super::document::{self, Lines};
use super::rejection::Rejection;

/// What a file says, and on which lines.
#[derive(Debug, Clone)]
pub struct Located<T> {
    /// What it says
    pub value: T,
    lines: Lines,
}

impl<T> Located<T> {
    /// Reads a file of one YAML document. `file` is only a name, for what is reported.
    ///
    /// # Errors
    /// The first thing that is wrong: its line, its field, and the remedy.
    pub fn read(file: &str, text: &str) -> Result<Self, Box<Rejection>>
    where
        T: DeserializeOwned,
    {
        let reject = |line, bad: Bad| Box::new(rejection(file, line, bad));
        let documents = document::split(text, 1);
        let [document] = documents.as_slice() else {
            let line = documents.get(1).map_or(1, |second| second.line);
            return Err(reject(line, Bad::new("", format!("one document is expected here, not {}", documents.len()))));
        };
        let (value, lines) = match document::read(document) {
            Ok(Some(read)) => read,
            Ok(None) => return Err(reject(document.line, Bad::new("", "the file says nothing"))),
            Err(error) => return Err(reject(error.line, Bad::new("", error.reason))),
        };
        match decode::decode(&value, "", &[]) {
            Ok(value) => Ok(Self { value, lines }),
            Err(bad) => Err(reject(lines.of(&bad.field), bad)),
        }
    }

    /// The line of a field, as `steps[0].name`, or of the nearest field around it.
    pub fn line(&self, path: &str) -> u32 {
        self.lines.of(path)
    }

    /// Whether a field is written in the file.
    pub fn has(&self, path: &str) -> bool {
        self.lines.has(path)
    }
}

fn rejection(file: &str, line: u32, bad: Bad) -> Rejection {
    Rejection {
        file: file.to_owned(),
        line,
        kind: String::new(),
        namespace: String::new(),
        name: String::new(),
        field: bad.field,
        reason: bad.reason,
        closes: None,
    }
}

/// A message of serde's for people: what is wrong at the field `field`, as in resources.
pub fn explained(file: &str, line: u32, field: &str, message: &str) -> Rejection {
    rejection(file, line, decode::explain_at(field, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Thing {
        name: String,
        #[serde(default)]
        parts: Vec<Thing>,
    }

    #[test]
    fn what_is_wrong_has_its_line_and_a_suggestion() {
        let read = Located::<Thing>::read("f.yaml", "# a\nname: a\nparts:\n- name: b\n- name: c\n").unwrap();
        assert_eq!((read.value.parts[1].name.as_str(), read.line("parts[1].name")), ("c", 5));
        let wrong = |text: &str| Located::<Thing>::read("f.yaml", text).unwrap_err().to_string();
        assert_eq!(
            wrong("name: a\nparts:\n- nane: b\n"),
            "f.yaml:3: parts[0].nane: unknown field; did you mean `name`?"
        );
        assert_eq!(wrong("parts: []\n"), "f.yaml:1: name: missing; it is required");
        assert!(wrong("name: [\n").starts_with("f.yaml:"), "{}", wrong("name: [\n"));
        assert!(wrong("").contains("one document"), "{}", wrong(""));
        assert!(wrong("name: a\n---\nname: b\n").starts_with("f.yaml:3: one document"));
        assert_eq!(
            explained("f.toml", 7, "", "unknown field `nane`, expected `name` or `parts`").to_string(),
            "f.toml:7: nane: unknown field; did you mean `name`?"
        );
    }
}
