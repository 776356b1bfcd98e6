//! Finds values in JSON as it streams by: no host call here.
//!
//! What is not JSON passes as it is, except after a key that is to be blanked.

use std::rc::Rc;

/// Longest key that is compared. A longer one is none of the configured.
const LONGEST_KEY: usize = 1024;

/// Which keys, and what their values become.
#[derive(Debug, Default)]
pub(crate) struct Secrets {
    keys: Vec<String>,
    /// A JSON string, with its quotes
    with: Vec<u8>,
}

impl Secrets {
    pub(crate) fn new(keys: Vec<String>, with: &str) -> Self {
        let with = serde_json::Value::from(with).to_string().into_bytes();
        Self { keys, with }
    }

    /// `raw`: with its quotes and escapes.
    fn holds(&self, raw: &[u8]) -> bool {
        serde_json::from_slice::<String>(raw).is_ok_and(|key| self.keys.contains(&key))
    }
}

/// Where in the text the next byte is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    /// Between tokens, or in a number or word
    Plain,
    /// In a string; `escaped`: after a backslash
    String { escaped: bool },
}

/// What of a value that is blanked has been seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Blanking {
    No,
    /// The value is to begin
    Start,
    /// In a number or word
    Scalar,
    /// In a string
    String {
        escaped: bool,
    },
    /// In an object or array, this deep
    Nested {
        depth: u32,
        at: At,
    },
}

/// One body.
#[derive(Debug)]
pub(crate) struct Redactor {
    secrets: Rc<Secrets>,
    at: At,
    blanking: Blanking,
    /// The string that is being read, quotes included. It may be a key: that shows at the colon after it.
    string: Vec<u8>,
}

impl Redactor {
    pub(crate) fn new(secrets: Rc<Secrets>) -> Self {
        Self { secrets, at: At::Plain, blanking: Blanking::No, string: Vec::new() }
    }

    /// The next piece of the body, with what has to be blanked.
    pub(crate) fn feed(&mut self, chunk: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(chunk.len() + self.secrets.with.len());
        for &byte in chunk {
            match self.blanking {
                Blanking::No => self.read(byte, &mut out),
                _ => self.blank(byte, &mut out),
            }
        }
        out
    }

    fn read(&mut self, byte: u8, out: &mut Vec<u8>) {
        out.push(byte);
        match self.at {
            At::String { escaped } => {
                if self.string.len() <= LONGEST_KEY {
                    self.string.push(byte);
                }
                self.at = match byte {
                    b'"' if !escaped => At::Plain,
                    b'\\' if !escaped => At::String { escaped: true },
                    _ => At::String { escaped: false },
                };
            }
            At::Plain => match byte {
                b'"' => {
                    self.string.clear();
                    self.string.push(byte);
                    self.at = At::String { escaped: false };
                }
                // Only a key has a colon after it.
                b':' => {
                    if self.secrets.holds(&self.string) {
                        self.blanking = Blanking::Start;
                    }
                    self.string.clear();
                }
                b' ' | b'\t' | b'\r' | b'\n' => {}
                _ => self.string.clear(),
            },
        }
    }

    fn blank(&mut self, byte: u8, out: &mut Vec<u8>) {
        self.blanking = match self.blanking {
            Blanking::No => Blanking::No,
            Blanking::Start if matches!(byte, b' ' | b'\t' | b'\r' | b'\n') => {
                out.push(byte);
                Blanking::Start
            }
            Blanking::Start => {
                out.extend_from_slice(&self.secrets.with);
                match byte {
                    b'"' => Blanking::String { escaped: false },
                    b'{' | b'[' => Blanking::Nested { depth: 1, at: At::Plain },
                    _ => Blanking::Scalar,
                }
            }
            Blanking::Scalar if matches!(byte, b',' | b'}' | b']' | b' ' | b'\t' | b'\r' | b'\n') => {
                out.push(byte);
                Blanking::No
            }
            Blanking::Scalar => Blanking::Scalar,
            Blanking::String { escaped } => match byte {
                b'"' if !escaped => Blanking::No,
                _ => Blanking::String { escaped: byte == b'\\' && !escaped },
            },
            Blanking::Nested { depth, at } => nested(depth, at, byte),
        };
    }
}

fn nested(depth: u32, at: At, byte: u8) -> Blanking {
    match (at, byte) {
        (At::String { escaped: false }, b'"') => Blanking::Nested { depth, at: At::Plain },
        (At::String { escaped }, _) => {
            Blanking::Nested { depth, at: At::String { escaped: byte == b'\\' && !escaped } }
        }
        (At::Plain, b'"') => Blanking::Nested { depth, at: At::String { escaped: false } },
        (At::Plain, b'{' | b'[') => Blanking::Nested { depth: depth.saturating_add(1), at },
        (At::Plain, b'}' | b']') if depth == 1 => Blanking::No,
        (At::Plain, b'}' | b']') => Blanking::Nested { depth: depth - 1, at },
        (At::Plain, _) => Blanking::Nested { depth, at },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn redact(chunks: &[&str]) -> String {
        let secrets = Secrets::new(vec!["pin".into(), "card".into()], "*");
        let mut redactor = Redactor::new(Rc::new(secrets));
        let bytes = chunks.iter().flat_map(|chunk| redactor.feed(chunk.as_bytes())).collect();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn values_of_every_kind() {
        for value in ["1234", "\"a\\\"b,}\"", "null", "true", "{\"a\": [1, \"}\"]}", "[[], {}]", "-1.5e3"] {
            let text = format!(r#"{{"a": 1, "pin": {value}, "b": "pin"}}"#);
            assert_eq!(redact(&[&text]), r#"{"a": 1, "pin": "*", "b": "pin"}"#, "{value}");
        }
    }

    #[test]
    fn only_keys_count_wherever_they_are() {
        let text = r#"[{"x": ["pin", {"card": 5}], "pin\"": 1, "pinned": 2}, "pin"]"#;
        assert_eq!(redact(&[text]), text.replace("\"card\": 5", "\"card\": \"*\""));
    }

    #[test]
    fn an_escaped_key_is_the_same_key() {
        assert_eq!(redact(&[r#"{"p\u0069n": 1}"#]), r#"{"p\u0069n": "*"}"#);
    }

    #[test]
    fn it_does_not_matter_where_chunks_end() {
        let text = r#"{"a":{"pin" : "12\\","c":[{"card":{"n":"4\"1","x":[1,2]}}]},"pin":7}"#;
        let whole = redact(&[text]);
        assert_eq!(whole, r#"{"a":{"pin" : "*","c":[{"card":"*"}]},"pin":"*"}"#);
        for cut in 0..text.len() {
            assert_eq!(redact(&[&text[..cut], &text[cut..]]), whole, "cut at {cut}");
        }
        let bytes: Vec<&str> = (0..text.len()).map(|at| &text[at..=at]).collect();
        assert_eq!(redact(&bytes), whole);
    }
}
