//! Fields that may be written in more than one way. Visitors rather than untagged enums, so that an error names the field.

use std::fmt;

use serde::de::value::MapAccessDeserializer;
use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use super::model::{Chunk, ExpectRequest, ExpectUpstream};

/// A text as it is, anything else as JSON.
pub(super) fn text_or_json<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    Ok(match Value::deserialize(from)? {
        Value::Null => String::new(),
        Value::String(text) => text,
        other => other.to_string(),
    })
}

/// `name: value` lines. In YAML a line without quotes is a mapping of one pair, which is as good; so is one mapping for all. A value of
/// several is a list, and none is the name alone.
pub(super) fn fields<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
    let wrong = || de::Error::custom("expected `name: value` lines, or a mapping of names to values");
    let mut lines = Vec::new();
    match serde_json::Value::deserialize(from)? {
        Value::Null => {}
        Value::Object(map) => pairs(&map, &mut lines).ok_or_else(wrong)?,
        Value::Array(items) => {
            for item in items {
                match item {
                    Value::String(line) => lines.push(line),
                    Value::Object(map) => pairs(&map, &mut lines).ok_or_else(wrong)?,
                    _ => return Err(wrong()),
                }
            }
        }
        _ => return Err(wrong()),
    }
    Ok(lines)
}

fn pairs(map: &serde_json::Map<String, Value>, lines: &mut Vec<String>) -> Option<()> {
    for (name, value) in map {
        match value {
            Value::Null => lines.push(name.clone()),
            Value::Array(values) => {
                for value in values {
                    lines.push(format!("{name}: {}", scalar(value)?));
                }
            }
            one => lines.push(format!("{name}: {}", scalar(one)?)),
        }
    }
    Some(())
}

fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(_) | Value::Bool(_) => Some(value.to_string()),
        _ => None,
    }
}

/// A list of chunks, or a body of one.
pub(super) fn chunks<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Chunk>, D::Error> {
    struct Any;
    impl<'de> Visitor<'de> for Any {
        type Value = Vec<Chunk>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a text, or a list of chunks")
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<Vec<Chunk>, E> {
            Ok(vec![Chunk::Text(text.to_owned())])
        }

        fn visit_seq<S: SeqAccess<'de>>(self, mut items: S) -> Result<Vec<Chunk>, S::Error> {
            let mut chunks = Vec::new();
            while let Some(chunk) = items.next_element()? {
                chunks.push(chunk);
            }
            Ok(chunks)
        }

        fn visit_map<M: MapAccess<'de>>(self, map: M) -> Result<Vec<Chunk>, M::Error> {
            Chunk::deserialize(MapAccessDeserializer::new(map)).map(|chunk| vec![chunk])
        }
    }
    from.deserialize_any(Any)
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Made {
    repeat: Option<String>,
    times: Option<usize>,
    #[serde(default, deserialize_with = "digits")]
    hex: Option<String>,
}

/// Hexadecimal digits; without quotes YAML may take them for a number.
fn digits<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    match Value::deserialize(from)? {
        Value::String(digits) => Ok(Some(digits)),
        _ => Err(de::Error::custom("expected hexadecimal digits; put them in quotes, as \"16 03 01\"")),
    }
}

impl Made {
    const FORMS: &str = "{repeat: TEXT, times: NUMBER} or {hex: BYTES}";

    fn chunk<E: de::Error>(self) -> Result<Chunk, E> {
        match self {
            Self { repeat: Some(repeat), times: Some(times), hex: None } => Ok(Chunk::Repeat { repeat, times }),
            Self { repeat: None, times: None, hex: Some(digits) } => {
                let bare: String = digits.split_whitespace().collect();
                let wrong = |error| E::custom(format!("{digits:?} are no bytes in hexadecimal: {error}"));
                hex::decode(bare).map(Chunk::Bytes).map_err(wrong)
            }
            _ => Err(E::custom(format!("expected {}", Self::FORMS))),
        }
    }
}

impl<'de> Deserialize<'de> for Chunk {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = Chunk;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a text, or {}", Made::FORMS)
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Chunk, E> {
                Ok(Chunk::Text(text.to_owned()))
            }

            fn visit_map<M: MapAccess<'de>>(self, map: M) -> Result<Chunk, M::Error> {
                Made::deserialize(MapAccessDeserializer::new(map))?.chunk()
            }
        }
        from.deserialize_any(Either)
    }
}

impl<'de> Deserialize<'de> for ExpectUpstream {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = ExpectUpstream;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("true or false (whether a request came), or what it had")
            }

            fn visit_bool<E: de::Error>(self, came: bool) -> Result<ExpectUpstream, E> {
                Ok(ExpectUpstream::Came(came))
            }

            fn visit_map<M: MapAccess<'de>>(self, map: M) -> Result<ExpectUpstream, M::Error> {
                ExpectRequest::deserialize(MapAccessDeserializer::new(map)).map(ExpectUpstream::Request)
            }
        }
        from.deserialize_any(Either)
    }
}
