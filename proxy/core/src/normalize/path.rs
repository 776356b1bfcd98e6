//! Canonical paths: one spelling for all that mean the same (RFC 3986 6.2.2), so that a rule cannot be walked around.

use crate::reason::Reason;

/// The canonical form of a path: escapes of unreserved characters decoded, other escapes in upper case, characters that
/// have no place in a path (a `%` that begins no escape among them) escaped, dot segments resolved, `//` merged.
/// `None`: it is canonical already.
///
/// `strict`, where rules on paths select the workload, refuses `%2F`, `%5C` and `\`, on whose meaning servers differ.
///
/// # Errors
/// [`Reason::BadRequest`] for `%00`, and for what `strict` refuses.
pub fn canonical(path: &str, strict: bool) -> Result<Option<String>, Reason> {
    if path == "*" || is_canonical(path.as_bytes()) {
        return Ok(None);
    }
    let spelled = respell(path.as_bytes(), strict)?;
    let resolved = resolve(&spelled);
    Ok((resolved != path).then_some(resolved))
}

/// The common case, in one pass: nothing that would have to be looked at.
fn is_canonical(path: &[u8]) -> bool {
    path.first() == Some(&b'/')
        && path.iter().all(|b| is_path(*b))
        && !path.windows(2).any(|two| matches!(two, b"//" | b"/."))
}

/// Characters that stand for themselves in a path, `/` included and `%` not.
fn is_path(b: u8) -> bool {
    is_unreserved(b) || b"/!$&'()*+,;=:@".contains(&b)
}

fn is_unreserved(b: u8) -> bool {
    b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b'~')
}

fn respell(path: &[u8], strict: bool) -> Result<String, Reason> {
    let mut out = String::with_capacity(path.len() + 8);
    let mut rest = path;
    while let [first, tail @ ..] = rest {
        rest = tail;
        let escaped = match (first, tail) {
            (b'%', [high, low, after @ ..]) => hex(*high).zip(hex(*low)).map(|(high, low)| (high << 4 | low, after)),
            _ => None,
        };
        match escaped {
            Some((0, _)) => return Err(Reason::BadRequest),
            Some((b'/' | b'\\', _)) if strict => return Err(Reason::BadRequest),
            Some((byte, after)) => {
                rest = after;
                if is_unreserved(byte) { out.push(byte.into()) } else { escape(byte, &mut out) }
            }
            None if *first == b'\\' && strict => return Err(Reason::BadRequest),
            None if is_path(*first) => out.push((*first).into()),
            None => escape(*first, &mut out),
        }
    }
    Ok(out)
}

fn hex(b: u8) -> Option<u8> {
    match b {
        b'0'..=b'9' => Some(b - b'0'),
        b'a'..=b'f' => Some(b - b'a' + 10),
        b'A'..=b'F' => Some(b - b'A' + 10),
        _ => None,
    }
}

fn escape(byte: u8, out: &mut String) {
    const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
    out.push('%');
    out.push(DIGITS[usize::from(byte >> 4)].into());
    out.push(DIGITS[usize::from(byte & 15)].into());
}

/// Dot segments and empty segments. A path that ends in one ends in a slash.
fn resolve(path: &str) -> String {
    let mut out = String::with_capacity(path.len() + 1);
    let mut segments = path.split('/').peekable();
    while let Some(segment) = segments.next() {
        match segment {
            "" | "." => {}
            ".." => out.truncate(out.rfind('/').unwrap_or(0)),
            _ => {
                out.push('/');
                out.push_str(segment);
                if segments.peek().is_none() {
                    return out;
                }
            }
        }
    }
    out.push('/');
    out
}
