//! JSON values into typed ones: every error has the field's path, and an unknown field a suggestion.

use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_path_to_error::{Segment, Track};

/// What is wrong with a field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Bad {
    /// Path as `spec.ports[0].name`
    pub(crate) field: String,
    /// And the remedy
    pub(crate) reason: String,
}

impl Bad {
    pub(crate) fn new(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { field: field.into(), reason: reason.into() }
    }

    /// The same, seen from the field around it.
    pub(crate) fn within(mut self, outer: &str) -> Self {
        self.field = join(outer, &self.field);
        self
    }
}

fn join(outer: &str, inner: &str) -> String {
    match (outer, inner) {
        ("", path) | (path, "") => path.to_owned(),
        (outer, inner) if inner.starts_with('[') => format!("{outer}{inner}"),
        (outer, inner) => format!("{outer}.{inner}"),
    }
}

/// Decodes `value`, which stands at `at` in its document. `known` are names to suggest where the type itself does not
/// list them.
pub(crate) fn decode<T: DeserializeOwned>(value: &Value, at: &str, known: &[&str]) -> Result<T, Bad> {
    let mut track = Track::new();
    let mut unknown = None;
    let deserializer = serde_path_to_error::Deserializer::new(value, &mut track);
    let decoded = serde_ignored::deserialize(deserializer, |path| {
        unknown.get_or_insert_with(|| ignored(&path));
    });
    match decoded {
        Err(error) => {
            let error: serde_json::Error = error;
            Err(explain(&track.path(), &error.to_string()).within(at))
        }
        Ok(decoded) => match unknown {
            None => Ok(decoded),
            Some(path) => {
                let last = path.rsplit(['.', '[']).next().unwrap_or_default();
                let reason = suggest(last, known.iter().copied()).map_or_else(
                    || "unknown field".to_owned(),
                    |name| format!("unknown field; did you mean `{name}`?"),
                );
                Err(Bad { field: join(at, &path), reason })
            }
        },
    }
}

/// The nearest of `names`, if it is near enough to have been meant.
pub(crate) fn suggest<'a>(word: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let lower = word.to_ascii_lowercase();
    names
        .map(|name| (strsim::damerau_levenshtein(&lower, &name.to_ascii_lowercase()), name))
        .filter(|(distance, name)| *distance <= 2.max(name.len() / 4) && *distance < name.len())
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, name)| name)
}

fn ignored(path: &serde_ignored::Path<'_>) -> String {
    use serde_ignored::Path;
    match path {
        Path::Root => String::new(),
        Path::Seq { parent, index } => format!("{}[{index}]", ignored(parent)),
        Path::Map { parent, key } => join(&ignored(parent), key),
        Path::Some { parent } | Path::NewtypeStruct { parent } | Path::NewtypeVariant { parent } => ignored(parent),
    }
}

/// Turns serde's message into one for people.
fn explain(path: &serde_path_to_error::Path, message: &str) -> Bad {
    let mut field = String::new();
    for segment in path {
        match segment {
            Segment::Seq { index } => field.push_str(&format!("[{index}]")),
            Segment::Map { key } => field = join(&field, key),
            Segment::Enum { .. } | Segment::Unknown => {}
        }
    }
    explain_at(&field, message)
}

/// The same for a field that is known.
pub(super) fn explain_at(field: &str, message: &str) -> Bad {
    let mut field = field.to_owned();
    let quoted: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    if message.starts_with("unknown field") {
        let (name, known) = quoted.split_first().map_or(("", &[][..]), |(name, known)| (*name, known));
        if field != name && !field.ends_with(&format!(".{name}")) {
            field = join(&field, name);
        }
        let reason = match suggest(name, known.iter().copied()) {
            Some(meant) => format!("unknown field; did you mean `{meant}`?"),
            None => format!("unknown field; known here: {}", known.join(", ")),
        };
        return Bad { field, reason };
    }
    if message.starts_with("unknown variant") {
        let (name, known) = quoted.split_first().map_or(("", &[][..]), |(name, known)| (*name, known));
        let reason = match suggest(name, known.iter().copied()) {
            Some(meant) => format!("`{name}` is not one of {}; did you mean `{meant}`?", known.join(", ")),
            None => format!("`{name}` is not one of {}", known.join(", ")),
        };
        return Bad { field, reason };
    }
    if message.starts_with("missing field") {
        let name = quoted.first().copied().unwrap_or_default();
        return Bad { field: join(&field, name), reason: "missing; it is required".to_owned() };
    }
    Bad { field, reason: message.to_owned() }
}
