//! YAML documents: each read by itself, into a JSON value and the line of every field.

use std::collections::HashMap;

use saphyr::{LoadableYamlNode, MarkedYaml, Scalar, YamlData};
use saphyr_parser::{Event, Parser};
use serde_json::{Map, Value};

/// Deepest nesting that is read.
const MAX_DEPTH: usize = 64;

/// One document of a file.
pub(crate) struct Document<'a> {
    /// Line of its first content, counted from 1
    pub(crate) line: u32,
    /// From that line to its end
    pub(crate) text: &'a str,
}

/// Splits at the document markers. They count at the beginning of a line only, and there always, whatever stands around
/// them: so one document's syntax error cannot reach into the next.
pub(crate) fn split(text: &str, first_line: u32) -> Vec<Document<'_>> {
    let mut documents = Vec::new();
    let mut start: Option<(usize, u32)> = None;
    let mut offset = 0;
    for (line, full) in (first_line..).zip(text.split_inclusive('\n')) {
        let bare = full.trim_end();
        if marker(bare) {
            finish(text, start.take(), offset, &mut documents);
            // Content may follow on the marker's own line.
            let rest = bare.get(3..).unwrap_or_default().trim_start();
            if !rest.is_empty() && !rest.starts_with('#') {
                start = Some((offset + bare.len() - rest.len(), line));
            }
        } else if start.is_none() && !bare.is_empty() && !bare.trim_start().starts_with('#') {
            start = Some((offset, line));
        }
        offset += full.len();
    }
    finish(text, start, offset, &mut documents);
    documents
}

fn marker(line: &str) -> bool {
    let rest = line.strip_prefix("---").or_else(|| line.strip_prefix("..."));
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t']))
}

fn finish<'a>(text: &'a str, start: Option<(usize, u32)>, end: usize, documents: &mut Vec<Document<'a>>) {
    if let Some((start, line)) = start
        && let Some(text) = text.get(start..end)
    {
        documents.push(Document { line, text });
    }
}

/// Lines of the fields of one document, by path as `spec.ports[0].name`.
#[derive(Debug, Clone, Default)]
pub(crate) struct Lines {
    first: u32,
    by_path: HashMap<String, u32>,
}

impl Lines {
    /// Only the document's own line is known.
    pub(crate) fn unknown(first: u32) -> Self {
        Self { first, by_path: HashMap::new() }
    }

    /// The field is written.
    pub(crate) fn has(&self, path: &str) -> bool {
        self.by_path.contains_key(path)
    }

    /// The line of a field, or of the nearest field around it.
    pub(crate) fn of(&self, path: &str) -> u32 {
        let mut path = path;
        loop {
            if let Some(line) = self.by_path.get(path) {
                return *line;
            }
            match path.rfind(['.', '[']) {
                Some(end) => path = path.get(..end).unwrap_or_default(),
                None => return self.first,
            }
        }
    }
}

/// Text that is no YAML, or no YAML that could be a resource.
#[derive(Debug)]
pub(crate) struct SyntaxError {
    pub(crate) line: u32,
    pub(crate) reason: String,
}

/// Reads one document; `None` when it is empty.
pub(crate) fn read(document: &Document<'_>) -> Result<Option<(Value, Lines)>, SyntaxError> {
    let before = document.line.saturating_sub(1);
    let absolute = |line: usize| before + u32::try_from(line).unwrap_or(u32::MAX - before).max(1);
    if let Some(line) = too_deep(document.text) {
        let reason = format!("nested deeper than {MAX_DEPTH} levels, which no resource is");
        return Err(SyntaxError { line: absolute(line), reason });
    }
    let nodes = MarkedYaml::load_from_str(document.text)
        .map_err(|error| SyntaxError { line: absolute(error.marker().line()), reason: error.info().to_owned() })?;
    let Some(root) = nodes.first() else { return Ok(None) };
    let mut lines = Lines::unknown(document.line);
    let value = convert(root, &mut String::new(), &mut |path, line| {
        lines.by_path.insert(path.to_owned(), absolute(line));
    })
    .map_err(|(line, reason)| SyntaxError { line: absolute(line), reason: reason.to_owned() })?;
    Ok((!value.is_null()).then_some((value, lines)))
}

/// The line where the nesting exceeds [`MAX_DEPTH`]. What builds, walks and drops a document recurses: without this a
/// file of brackets would overflow the stack. A syntax error is left to the reader proper.
fn too_deep(text: &str) -> Option<usize> {
    let mut depth = 0_usize;
    let mut parser = Parser::new_from_str(text);
    while let Some(Ok((event, span))) = parser.next_event() {
        match event {
            Event::SequenceStart(..) | Event::MappingStart(..) => depth += 1,
            Event::SequenceEnd | Event::MappingEnd => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > MAX_DEPTH {
            return Some(span.start.line());
        }
    }
    None
}

type Wrong = (usize, &'static str);

fn convert(node: &MarkedYaml<'_>, path: &mut String, note: &mut impl FnMut(&str, usize)) -> Result<Value, Wrong> {
    let line = node.span.start.line();
    Ok(match &node.data {
        YamlData::Value(scalar) => match scalar {
            Scalar::Null => Value::Null,
            Scalar::Boolean(value) => Value::Bool(*value),
            Scalar::Integer(value) => Value::from(*value),
            Scalar::FloatingPoint(value) => Value::from(value.into_inner()),
            Scalar::String(value) => Value::String(value.clone().into_owned()),
        },
        YamlData::Sequence(items) => {
            let mut values = Vec::with_capacity(items.len());
            for (index, item) in items.iter().enumerate() {
                let length = path.len();
                path.push_str(&format!("[{index}]"));
                note(path, item.span.start.line());
                values.push(convert(item, path, note)?);
                path.truncate(length);
            }
            Value::Array(values)
        }
        YamlData::Mapping(fields) => {
            let mut map = Map::new();
            for (key, item) in fields {
                let key_line = key.span.start.line();
                let key = match &key.data {
                    YamlData::Value(Scalar::String(text)) => text.clone().into_owned(),
                    YamlData::Value(Scalar::Integer(number)) => number.to_string(),
                    YamlData::Value(Scalar::Boolean(value)) => value.to_string(),
                    _ => return Err((key_line, "a key must be a string")),
                };
                let length = path.len();
                if !path.is_empty() {
                    path.push('.');
                }
                path.push_str(&key);
                note(path, key_line);
                let value = convert(item, path, note)?;
                path.truncate(length);
                map.insert(key, value);
            }
            Value::Object(map)
        }
        YamlData::Tagged(..) => return Err((line, "tags (!…) have no meaning here; remove it")),
        _ => return Err((line, "this value cannot be read")),
    })
}
