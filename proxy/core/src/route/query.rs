//! Query parameters: percent-decoded, `+` a space, and only the first of several with one name counts.

use std::borrow::Cow;

use super::value_holds;
use crate::link::ValueMatch;

/// Whether all conditions hold.
pub(super) fn holds(wants: &[ValueMatch<Box<str>>], query: &str) -> bool {
    wants.iter().all(|want| {
        let mut pairs = query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
        let first = pairs.find(|(name, _)| decode(name).is_some_and(|name| name == *want.name));
        first.and_then(|(_, value)| decode(value)).is_some_and(|value| value_holds(&want.value, &value))
    })
}

/// `None`: not UTF-8, which equals no value.
fn decode(text: &str) -> Option<Cow<'_, str>> {
    if !text.bytes().any(|b| matches!(b, b'%' | b'+')) {
        return Some(Cow::Borrowed(text));
    }
    let spaced = text.replace('+', " ");
    let decoded = percent_encoding::percent_decode_str(&spaced).decode_utf8().ok()?;
    Some(Cow::Owned(decoded.into_owned()))
}
