//! What a client speaks, from its first bytes.

mod hello;
pub mod sni;

pub use hello::Hello;

/// What is known after some bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// Not enough yet
    More,
    /// This
    Found(Detected),
}

/// What a client speaks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Detected {
    /// HTTP/1.0 or 1.1
    Http1,
    /// HTTP/2 with prior knowledge
    Http2,
    /// TLS, with what its ClientHello says
    Tls(Hello),
    /// Anything else
    Opaque,
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Methods of RFC 9110 and PATCH: after one of these and a target's first byte nothing else is likely.
const METHODS: [&[u8]; 9] = [b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"CONNECT", b"OPTIONS", b"TRACE", b"PATCH"];
/// Longest method, and longest first line, that is waited for. Bytes.
const MAX_METHOD: usize = 32;
const MAX_LINE: usize = 8 * 1024;

/// Judges all bytes received so far. It asks for more at most until 16 KiB are there.
pub fn detect(bytes: &[u8]) -> Progress {
    match bytes.first() {
        None => Progress::More,
        Some(0x16) if bytes.get(1).is_none_or(|major| *major == 3) => match hello::parse(bytes) {
            hello::Parsed::More => Progress::More,
            hello::Parsed::Hello(hello) => Progress::Found(Detected::Tls(hello)),
            hello::Parsed::No => Progress::Found(Detected::Opaque),
        },
        Some(_) if PREFACE.starts_with(&bytes[..bytes.len().min(PREFACE.len())]) => {
            if bytes.len() >= PREFACE.len() {
                Progress::Found(Detected::Http2)
            } else {
                Progress::More
            }
        }
        Some(_) => http1(bytes),
    }
}

fn http1(bytes: &[u8]) -> Progress {
    // Servers skip empty lines before a request line (RFC 9112 2.2).
    let blank = bytes.iter().take_while(|b| matches!(b, b'\r' | b'\n')).count();
    let line = &bytes[blank..];
    if blank > 8 {
        return Progress::Found(Detected::Opaque);
    }
    let method = line.iter().take_while(|b| is_token(**b)).count();
    if method > MAX_METHOD {
        return Progress::Found(Detected::Opaque);
    }
    let (method, rest) = line.split_at(method);
    let target = match rest {
        [] | [b' '] => return Progress::More,
        [b' ', target, ..] if !method.is_empty() => *target,
        _ => return Progress::Found(Detected::Opaque),
    };
    let known = METHODS.contains(&method);
    let plausible = match target {
        b'/' | b'*' => true,
        // Absolute form, or the authority of CONNECT.
        _ => known && (target.is_ascii_alphanumeric() || target == b'['),
    };
    if !plausible {
        return Progress::Found(Detected::Opaque);
    }
    if known && matches!(target, b'/' | b'*') {
        return Progress::Found(Detected::Http1);
    }
    match line.iter().position(|b| *b == b'\n') {
        Some(end) if ends_with_version(&line[..end]) => Progress::Found(Detected::Http1),
        None if line.len() < MAX_LINE => Progress::More,
        _ => Progress::Found(Detected::Opaque),
    }
}

fn is_token(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b)
}

fn ends_with_version(line: &[u8]) -> bool {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    line.ends_with(b" HTTP/1.1") || line.ends_with(b" HTTP/1.0")
}

#[cfg(test)]
mod tests;
