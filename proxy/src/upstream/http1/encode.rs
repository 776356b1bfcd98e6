//! Requests as bytes: the head, and how its body is framed.

use ::http::header::{CONNECTION, CONTENT_LENGTH, HOST, TE, TRAILER, TRANSFER_ENCODING, UPGRADE};
use ::http::uri::Authority;
use ::http::{HeaderMap, HeaderName, HeaderValue, Method, Uri, header};

use super::Error;

/// A normalised request's head. What belongs to this hop alone is written by us, whatever the headers say of it.
#[derive(Debug, Clone, Copy)]
pub struct Head<'a> {
    /// Method
    pub method: &'a Method,
    /// Path and query; the authority only where there is no `Host`
    pub uri: &'a Uri,
    /// Headers
    pub headers: &'a HeaderMap,
    /// It asks for a websocket
    pub upgrade: bool,
    /// Trailers are taken
    pub trailers: bool,
}

/// What is left to say of a request's body.
#[derive(Debug)]
pub(super) enum Encoder {
    /// Bytes that are owed
    Length(u64),
    /// Chunks, then those of these trailers that there are
    Chunked(Vec<HeaderName>),
    /// Everything was said
    Done,
}

impl Encoder {
    /// The framing of a body: what the head states, else what is known, else chunks. `empty`: there is no body.
    fn of(head: &Head<'_>, empty: bool, known: Option<u64>) -> Self {
        if empty {
            return Self::Done;
        }
        match content_length(head.headers).or(known) {
            Some(0) => Self::Done,
            Some(length) => Self::Length(length),
            None => Self::Chunked(announced(head.headers)),
        }
    }

    /// The body's next bytes, which are not empty: what comes before them is appended to `out`, what comes after them is returned.
    ///
    /// # Errors
    /// There are more than the head stated, or with `last` fewer.
    pub(super) fn data(&mut self, len: usize, last: bool, out: &mut Vec<u8>) -> Result<&'static [u8], Error> {
        match self {
            Self::Length(left) => {
                *left = left.checked_sub(len as u64).ok_or(Error::Length)?;
                match (*left, last) {
                    (0, _) => *self = Self::Done,
                    (_, true) => return Err(Error::Length),
                    (_, false) => {}
                }
                Ok(b"")
            }
            Self::Chunked(_) => {
                chunk_size(len, out);
                if last {
                    *self = Self::Done;
                    return Ok(b"\r\n0\r\n\r\n");
                }
                Ok(b"\r\n")
            }
            Self::Done => Err(Error::Length),
        }
    }

    /// The body's end, after which there is nothing more.
    ///
    /// # Errors
    /// There was less than the head stated.
    pub(super) fn end(&mut self, trailers: Option<&HeaderMap>, out: &mut Vec<u8>) -> Result<(), Error> {
        match self {
            Self::Done => {}
            Self::Length(_) => return Err(Error::Length),
            Self::Chunked(announced) => {
                out.extend_from_slice(b"0\r\n");
                for (name, value) in trailers.into_iter().flatten() {
                    if announced.contains(name) {
                        field(name.as_str(), value.as_bytes(), out);
                    }
                }
                out.extend_from_slice(b"\r\n");
            }
        }
        *self = Self::Done;
        Ok(())
    }

    pub(super) fn is_done(&self) -> bool {
        matches!(self, Self::Done)
    }
}

/// Appends a request's head to `out`, and says how its body follows.
pub(super) fn head(head: &Head<'_>, empty: bool, known: Option<u64>, out: &mut Vec<u8>) -> Encoder {
    let encoder = Encoder::of(head, empty, known);
    out.extend_from_slice(head.method.as_str().as_bytes());
    out.push(b' ');
    target(head.uri, out);
    out.extend_from_slice(b" HTTP/1.1\r\n");
    host(head, out);
    let mut stated = false;
    for (name, value) in head.headers {
        if *name == CONTENT_LENGTH {
            stated = true;
        } else if !is_ours(name) {
            field(name.as_str(), value.as_bytes(), out);
        }
    }
    match &encoder {
        Encoder::Length(length) => {
            out.extend_from_slice(b"content-length: ");
            decimal(*length, out);
            out.extend_from_slice(b"\r\n");
        }
        Encoder::Chunked(_) => out.extend_from_slice(b"transfer-encoding: chunked\r\n"),
        // RFC 9110, 8.6: some servers refuse these without a length.
        Encoder::Done if stated || matches!(*head.method, Method::POST | Method::PUT | Method::PATCH) => {
            out.extend_from_slice(b"content-length: 0\r\n");
        }
        Encoder::Done => {}
    }
    if head.upgrade {
        out.extend_from_slice(b"connection: upgrade\r\nupgrade: websocket\r\n");
    } else if head.trailers {
        out.extend_from_slice(b"connection: te\r\n");
    }
    if head.trailers {
        out.extend_from_slice(b"te: trailers\r\n");
    }
    out.extend_from_slice(b"\r\n");
    encoder
}

/// Headers of one hop, and `Host`, which comes first.
fn is_ours(name: &HeaderName) -> bool {
    *name == HOST || *name == CONNECTION || *name == TRANSFER_ENCODING || *name == TE || *name == UPGRADE
}

fn target(uri: &Uri, out: &mut Vec<u8>) {
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    // `?query` alone is a URI, but no request target.
    if !path.starts_with(['/', '*']) {
        out.push(b'/');
    }
    out.extend_from_slice(path.as_bytes());
}

fn host(head: &Head<'_>, out: &mut Vec<u8>) {
    // As a rule it is the first one, and then needs no search.
    let first = head.headers.iter().next().filter(|(name, _)| **name == HOST).map(|(_, value)| value);
    let host = first.or_else(|| head.headers.get(HOST)).map(HeaderValue::as_bytes);
    if let Some(host) = host.or_else(|| head.uri.authority().map(Authority::as_str).map(str::as_bytes)) {
        field("host", host, out);
    }
}

fn field(name: &str, value: &[u8], out: &mut Vec<u8>) {
    out.reserve(name.len() + value.len() + 4);
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

fn decimal(mut number: u64, out: &mut Vec<u8>) {
    let mut digits = [0; 20];
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b"0123456789"[(number % 10) as usize];
        number /= 10;
        if number == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[at..]);
}

fn chunk_size(len: usize, out: &mut Vec<u8>) {
    let digits = (usize::BITS - len.leading_zeros()).div_ceil(4).max(1);
    for digit in (0..digits).rev() {
        out.push(b"0123456789ABCDEF"[(len >> (4 * digit)) & 15]);
    }
    out.extend_from_slice(b"\r\n");
}

/// The one length that all `Content-Length` headers state. `None`: there is none, or they cannot be read.
pub(super) fn content_length(headers: &HeaderMap) -> Option<u64> {
    let mut length = None;
    for value in headers.get_all(CONTENT_LENGTH) {
        for one in value.as_bytes().split(|byte| *byte == b',') {
            let one = digits(one.trim_ascii())?;
            if *length.get_or_insert(one) != one {
                return None;
            }
        }
    }
    length
}

/// A number in digits alone: no sign, no space.
fn digits(text: &[u8]) -> Option<u64> {
    let digit = |number: u64, byte: &u8| {
        let digit = byte.is_ascii_digit().then(|| u64::from(byte - b'0'))?;
        number.checked_mul(10)?.checked_add(digit)
    };
    (!text.is_empty()).then(|| text.iter().try_fold(0, digit))?
}

/// Trailers that the head names, without those that must not be trailers (RFC 9110, 6.5.1).
fn announced(headers: &HeaderMap) -> Vec<HeaderName> {
    let values = headers.get_all(TRAILER).iter().filter_map(|value| value.to_str().ok());
    let names = values.flat_map(|value| value.split(',')).filter_map(|name| name.trim().parse().ok());
    names.filter(|name| !is_forbidden(name)).collect()
}

fn is_forbidden(name: &HeaderName) -> bool {
    is_ours(name)
        || [
            header::AUTHORIZATION,
            header::CACHE_CONTROL,
            header::CONTENT_ENCODING,
            header::CONTENT_LENGTH,
            header::CONTENT_RANGE,
            header::CONTENT_TYPE,
            header::MAX_FORWARDS,
            header::SET_COOKIE,
            header::TRAILER,
        ]
        .contains(name)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn headers(fields: &[(&'static str, &str)]) -> HeaderMap {
        let fields = fields.iter().map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap()));
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(name, value);
        }
        headers
    }

    fn written(
        method: &Method,
        uri: &'static str,
        headers: &HeaderMap,
        empty: bool,
        known: Option<u64>,
    ) -> (String, Encoder) {
        let uri = Uri::from_static(uri);
        let mut out = Vec::new();
        let made = Head { method, uri: &uri, headers, upgrade: false, trailers: false };
        let encoder = head(&made, empty, known, &mut out);
        (String::from_utf8(out).unwrap(), encoder)
    }

    #[test]
    fn a_head_begins_with_its_host_and_has_no_header_of_another_hop() {
        let headers =
            headers(&[("x-a", "1"), ("connection", "x-a"), ("te", "gzip"), ("host", "reviews"), ("x-a", "2")]);
        let (head, _) = written(&Method::GET, "/a?b", &headers, true, Some(0));
        assert_eq!(head, "GET /a?b HTTP/1.1\r\nhost: reviews\r\nx-a: 1\r\nx-a: 2\r\n\r\n");
    }

    #[test]
    fn a_target_is_never_empty_and_an_authority_is_a_host() {
        let none = HeaderMap::new();
        for (uri, target, host) in [
            ("http://reviews", "/", "host: reviews\r\n"),
            ("http://reviews:80?q", "/?q", "host: reviews:80\r\n"),
            ("*", "*", ""),
        ] {
            assert_eq!(written(&Method::GET, uri, &none, true, None).0, format!("GET {target} HTTP/1.1\r\n{host}\r\n"));
        }
    }

    #[test]
    fn every_body_has_one_framing() {
        let framing = |method: Method, fields: &[(&'static str, &str)], empty, known| {
            let (head, encoder) = written(&method, "/", &headers(fields), empty, known);
            let lines: Vec<_> = head.lines().skip(1).filter(|line| !line.is_empty()).map(str::to_owned).collect();
            (lines.join("|"), encoder.is_done())
        };
        let line = |line: &str, done| (line.to_owned(), done);
        assert_eq!(framing(Method::GET, &[], true, Some(0)), line("", true));
        assert_eq!(framing(Method::POST, &[], true, Some(0)), line("content-length: 0", true));
        assert_eq!(framing(Method::DELETE, &[("content-length", "0")], true, Some(0)), line("content-length: 0", true));
        assert_eq!(framing(Method::GET, &[], false, None), line("transfer-encoding: chunked", false));
        assert_eq!(framing(Method::GET, &[], false, Some(7)), line("content-length: 7", false));
        assert_eq!(framing(Method::PUT, &[("content-length", "5")], false, None), line("content-length: 5", false));
        // What filters may write: a body that is gone, another framing, nonsense.
        assert_eq!(framing(Method::PUT, &[("content-length", "5")], true, None), line("content-length: 0", true));
        let both = [("transfer-encoding", "gzip"), ("content-length", "5")];
        assert_eq!(framing(Method::PUT, &both, false, None), line("content-length: 5", false));
        let two = [("content-length", "5"), ("content-length", "6")];
        assert_eq!(framing(Method::PUT, &two, false, None), line("transfer-encoding: chunked", false));
        assert_eq!(framing(Method::PUT, &[("content-length", "+5")], false, Some(3)), line("content-length: 3", false));
    }

    #[test]
    fn an_upgrade_and_trailers_are_asked_for() {
        let (uri, headers) = (Uri::from_static("/"), HeaderMap::new());
        let mut out = Vec::new();
        head(
            &Head { method: &Method::GET, uri: &uri, headers: &headers, upgrade: true, trailers: true },
            true,
            None,
            &mut out,
        );
        assert_eq!(out, b"GET / HTTP/1.1\r\nconnection: upgrade\r\nupgrade: websocket\r\nte: trailers\r\n\r\n");
    }

    #[test]
    fn only_announced_trailers_are_sent() {
        let names = headers(&[("trailer", "x-sum, content-length, Host")]);
        let (_, mut encoder) = written(&Method::POST, "/", &names, false, None);
        let trailers = headers(&[("x-sum", "1"), ("x-other", "2"), ("content-length", "3"), ("host", "4")]);
        let mut out = Vec::new();
        encoder.end(Some(&trailers), &mut out).unwrap();
        assert_eq!(out, b"0\r\nx-sum: 1\r\n\r\n");
        assert!(encoder.is_done());
    }

    #[test]
    fn a_body_of_another_length_is_an_error() {
        let mut out = Vec::new();
        let mut encoder = Encoder::Length(3);
        assert!(encoder.data(4, false, &mut out).is_err());
        assert!(Encoder::Length(3).data(2, true, &mut out).is_err());
        assert!(Encoder::Length(3).end(None, &mut out).is_err());
        assert!(Encoder::Done.data(1, false, &mut out).is_err());
        let mut encoder = Encoder::Length(3);
        assert_eq!(encoder.data(2, false, &mut out).unwrap(), b"");
        assert_eq!(encoder.data(1, false, &mut out).unwrap(), b"");
        assert!(encoder.is_done() && out.is_empty());
    }

    proptest! {
        #[test]
        fn numbers_are_written_as_everybody_reads_them(number: u64, len in 1_usize..usize::MAX) {
            let mut out = Vec::new();
            decimal(number, &mut out);
            prop_assert_eq!(&out, &number.to_string().into_bytes());
            prop_assert_eq!(digits(&out), Some(number));
            out.clear();
            chunk_size(len, &mut out);
            prop_assert_eq!(out, format!("{len:X}\r\n").into_bytes());
        }

        /// Whatever the headers, a head is one head: its lines are those that were meant.
        #[test]
        fn a_head_has_one_end(values in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..20), 0..8)) {
            let mut map = HeaderMap::new();
            for value in values {
                if let Ok(value) = HeaderValue::from_bytes(&value) {
                    map.append("x-any", value);
                }
            }
            let mut out = Vec::new();
            let uri = Uri::from_static("/");
            head(&Head { method: &Method::GET, uri: &uri, headers: &map, upgrade: false, trailers: false }, true, None, &mut out);
            let mut fields = [httparse::EMPTY_HEADER; 16];
            let mut request = httparse::Request::new(&mut fields);
            prop_assert_eq!(request.parse(&out).unwrap(), httparse::Status::Complete(out.len()));
            prop_assert_eq!(request.headers.len(), map.len());
        }
    }
}
