//! The rules and what they match: no host call here.

use std::borrow::Cow;
use std::fmt;

use percent_encoding::percent_decode;
use regex_lite::{Regex, RegexBuilder};
use serde::Deserialize;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Written {
    #[serde(default)]
    rules: Vec<WrittenRule>,
    /// Bytes of a body that are looked at
    #[serde(default = "body")]
    body: usize,
    #[serde(default = "forbidden")]
    status: u32,
}

fn body() -> usize {
    16 * 1024
}

fn forbidden() -> u32 {
    403
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenRule {
    id: String,
    r#in: Vec<String>,
    pattern: String,
    #[serde(default)]
    action: Verb,
}

/// What becomes of a request that matches.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Verb {
    #[default]
    Deny,
    Log,
}

/// Where a rule looks.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Path,
    Query,
    /// Lower case
    Header(String),
    Body,
}

impl Place {
    fn named(name: &str) -> Option<Self> {
        Some(match name {
            "path" => Self::Path,
            "query" => Self::Query,
            "body" => Self::Body,
            _ => Self::Header(name.strip_prefix("header:").filter(|name| !name.is_empty())?.to_ascii_lowercase()),
        })
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path => f.write_str("the path"),
            Self::Query => f.write_str("the query"),
            Self::Header(name) => write!(f, "header {name}"),
            Self::Body => f.write_str("the body"),
        }
    }
}

#[derive(Debug)]
pub(crate) struct Rule {
    pub(crate) id: String,
    pub(crate) verb: Verb,
    pub(crate) metric: Option<u32>,
    places: Vec<Place>,
    pattern: Regex,
}

#[derive(Debug, Default)]
pub(crate) struct Firewall {
    rules: Vec<Rule>,
    /// Bytes of a body that are looked at
    pub(crate) body: usize,
    pub(crate) status: u32,
}

impl Firewall {
    /// # Errors
    /// What cannot be used, by rule and field.
    pub(crate) fn new(written: Written, mut metric: impl FnMut(&str) -> Option<u32>) -> Result<Self, String> {
        let mut rules = Vec::new();
        for rule in written.rules {
            let id = rule.id;
            if id.is_empty() || !id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-') {
                return Err(format!("rules: id `{id}`: letters, digits, `_` and `-` only"));
            }
            let places = rule.r#in.iter().map(|name| {
                Place::named(name)
                    .ok_or_else(|| format!("rule {id}: in: `{name}` is none of path, query, header:NAME, body"))
            });
            let places = places.collect::<Result<Vec<_>, _>>()?;
            // Patterns come from the configuration, but a slip in one should not eat the memory of the instance.
            let pattern = RegexBuilder::new(&rule.pattern).size_limit(1 << 20).build();
            let pattern = pattern.map_err(|error| format!("rule {id}: pattern: {error}"))?;
            let metric = metric(&format!("waf_lite_matches_{}", id.replace('-', "_")));
            rules.push(Rule { id, verb: rule.action, metric, places, pattern });
        }
        if !(400..=599).contains(&written.status) {
            return Err(format!("status: {} is not from 400 to 599", written.status));
        }
        Ok(Self { rules, body: written.body, status: written.status })
    }

    pub(crate) fn looks_at_bodies(&self) -> bool {
        self.rules.iter().any(|rule| rule.places.contains(&Place::Body))
    }

    /// The rules that match, in the order written.
    pub(crate) fn matches<'a>(&'a self, place: &'a Place, text: &[u8]) -> impl Iterator<Item = &'a Rule> {
        let looked = self.rules.iter().any(|rule| rule.places.contains(place));
        let text = if looked { decoded(text, *place == Place::Query) } else { Vec::new() };
        let found =
            move |rule: &&Rule| rule.places.contains(place) && text.iter().any(|form| rule.pattern.is_match(form));
        self.rules.iter().filter(found)
    }
}

/// A text as sent, decoded once, and decoded twice.
fn decoded(text: &[u8], query: bool) -> Vec<String> {
    let once = decode(text, query);
    let twice = decode(once.as_bytes(), query);
    let mut forms = vec![String::from_utf8_lossy(text).into_owned(), once, twice];
    forms.dedup();
    forms
}

fn decode(text: &[u8], query: bool) -> String {
    let spaced: Cow<'_, [u8]> = if query {
        text.iter().map(|&byte| if byte == b'+' { b' ' } else { byte }).collect::<Vec<_>>().into()
    } else {
        text.into()
    };
    percent_decode(&spaced).decode_utf8_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn firewall(pattern: &str, place: &str) -> Firewall {
        let rule =
            WrittenRule { id: "r".into(), r#in: vec![place.into()], pattern: pattern.into(), action: Verb::Deny };
        Firewall::new(Written { rules: vec![rule], body: 10, status: 403 }, |_| None).unwrap()
    }

    fn hits(firewall: &Firewall, place: Place, text: &str) -> bool {
        firewall.matches(&place, text.as_bytes()).next().is_some()
    }

    #[test]
    fn escapes_do_not_hide_a_match() {
        let firewall = firewall(r"\.\./", "path");
        for path in ["/a/../b", "/a/%2e%2e/b", "/a/%252e%252e%252fb"] {
            assert!(hits(&firewall, Place::Path, path), "{path}");
        }
        assert!(!hits(&firewall, Place::Path, "/a/..b"));
        assert!(!hits(&firewall, Place::Query, "/a/../b"), "another place");
    }

    #[test]
    fn a_plus_is_a_space_in_queries() {
        assert!(hits(&firewall(r"(?i)union\s+select", "query"), Place::Query, "q=1+UNION+%53elect"));
    }

    #[test]
    fn bad_rules_are_named() {
        let rule = |place: &str, pattern: &str| WrittenRule {
            id: "r".into(),
            r#in: vec![place.into()],
            pattern: pattern.into(),
            action: Verb::Deny,
        };
        let refused = |rule| Firewall::new(Written { rules: vec![rule], body: 1, status: 403 }, |_| None).unwrap_err();
        assert!(refused(rule("cookie", "x")).contains("rule r: in: `cookie`"));
        assert!(refused(rule("path", "(")).contains("rule r: pattern"));
    }
}
