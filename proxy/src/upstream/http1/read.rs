//! Responses as their bytes arrive: heads and bodies, without IO.

use std::mem::MaybeUninit;

use ::http::header::{CONNECTION, CONTENT_LENGTH, TRANSFER_ENCODING};
use ::http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, Version};
use bytes::{Buf, Bytes, BytesMut};
use hyper::ext::ReasonPhrase;

use super::Error;
use super::chunked::{Chunked, Step};
use super::encode::content_length;
use super::spare;

/// Header block of a response, bytes; and of its trailers.
pub(super) const MAX_HEAD: usize = 64 * 1024;
/// Its header fields: hyper's own limit.
pub(super) const MAX_FIELDS: usize = 100;
/// Interim responses before the response.
const MAX_INTERIM: u32 = 100;

/// Reads the responses of one connection. What arrives is appended to [`Self::buffer`].
#[derive(Debug)]
pub struct Reader {
    pub(super) buf: BytesMut,
    left: Left,
    /// After this response the connection may serve another
    keep: bool,
    /// The request was `HEAD`
    bodiless: bool,
    /// Bytes of the head in which there is no end
    scanned: usize,
    interim: u32,
}

/// What is left of a response's body.
#[derive(Debug)]
enum Left {
    Nothing,
    Length(u64),
    Chunked(Chunked),
    /// Everything until the end of the connection
    Close,
}

/// A head that arrived.
#[derive(Debug)]
pub enum Arrived {
    /// Something before the response: `100 Continue`
    Interim(StatusCode),
    /// The response; its body follows
    Head(Response<()>),
}

/// What arrived of a body.
#[derive(Debug, PartialEq, Eq)]
pub enum Piece {
    /// Nothing yet: more bytes are needed
    More,
    /// Bytes of it
    Data(Bytes),
    /// Its trailers, and its end
    Trailers(HeaderMap),
    /// Its end
    End,
}

impl Default for Reader {
    fn default() -> Self {
        let (buf, left) = (BytesMut::new(), Left::Nothing);
        Self { buf, left, keep: true, bodiless: false, scanned: 0, interim: 0 }
    }
}

impl Reader {
    /// A request is sent whose response is awaited; `head`: with the method `HEAD`.
    pub fn begin(&mut self, head: bool) {
        // Until its response is complete.
        self.keep = false;
        self.bodiless = head;
        self.scanned = 0;
        self.interim = 0;
    }

    /// Where bytes that arrive are appended.
    pub fn buffer(&mut self) -> &mut BytesMut {
        &mut self.buf
    }

    /// Takes the next head, if it is complete.
    ///
    /// # Errors
    /// It cannot be read, or is above a limit.
    pub fn head(&mut self) -> Result<Option<Arrived>, Error> {
        if self.scanned == 0 {
            // Empty lines before it are passed over, as the parser does.
            let empty = self.buf.iter().take_while(|byte| matches!(byte, b'\r' | b'\n')).count();
            self.buf.advance(empty);
        }
        let Some(end) = head_end(&self.buf, self.scanned) else {
            self.scanned = self.buf.len();
            return if self.scanned < MAX_HEAD { Ok(None) } else { Err(Error::TooLarge) };
        };
        if end > MAX_HEAD {
            return Err(Error::TooLarge);
        }
        self.scanned = 0;
        let head = self.buf.split_to(end).freeze();
        let (response, framing) = parse(&head)?;
        let status = response.status();
        if status.is_informational() && status != StatusCode::SWITCHING_PROTOCOLS {
            self.interim += 1;
            let bounded = self.interim <= MAX_INTERIM;
            return if bounded {
                Ok(Some(Arrived::Interim(status)))
            } else {
                Err(Error::Framing("interim responses without end"))
            };
        }
        self.left = self.length(&response, framing)?;
        self.keep = framing.keep && !matches!(self.left, Left::Close) && status != StatusCode::SWITCHING_PROTOCOLS;
        Ok(Some(Arrived::Head(response)))
    }

    /// How the body ends (RFC 9112, 6.3).
    fn length(&self, response: &Response<()>, framing: Framing) -> Result<Left, Error> {
        if self.bodiless || matches!(response.status().as_u16(), 101 | 204 | 304) {
            return Ok(Left::Nothing);
        }
        if framing.coded {
            if response.version() == Version::HTTP_10 {
                return Err(Error::Framing("HTTP/1.0 has no Transfer-Encoding"));
            }
            // Another coding ends with the connection; whether it is let through is not decided here.
            return Ok(if is_chunked(response.headers()) { Left::Chunked(Chunked::new()) } else { Left::Close });
        }
        if !framing.stated {
            return Ok(Left::Close);
        }
        match content_length(response.headers()) {
            Some(0) => Ok(Left::Nothing),
            // More than can be counted with.
            Some(length) if length > u64::MAX - 2 => Err(Error::TooLarge),
            Some(length) => Ok(Left::Length(length)),
            None => Err(Error::Framing("its Content-Length cannot be read")),
        }
    }

    /// Takes what arrived of the body.
    ///
    /// # Errors
    /// Its coding cannot be read.
    pub fn piece(&mut self) -> Result<Piece, Error> {
        let piece = match &mut self.left {
            Left::Nothing => Piece::End,
            _ if self.buf.is_empty() => Piece::More,
            Left::Length(left) => {
                let take = usize::try_from(*left).map_or(self.buf.len(), |left| left.min(self.buf.len()));
                *left -= take as u64;
                if *left == 0 {
                    self.left = Left::Nothing;
                }
                Piece::Data(self.buf.split_to(take).freeze())
            }
            Left::Close => Piece::Data(self.buf.split().freeze()),
            Left::Chunked(chunked) => match chunked.step(&mut self.buf)? {
                Step::More => Piece::More,
                Step::Data(data) => Piece::Data(data),
                Step::End => Piece::End,
                Step::Trailers(trailers) => Piece::Trailers(trailers),
            },
        };
        if matches!(piece, Piece::End | Piece::Trailers(_)) {
            self.left = Left::Nothing;
        }
        Ok(piece)
    }

    /// Takes a body of known length if all of it has arrived.
    pub(super) fn take_whole(&mut self) -> Option<Bytes> {
        let Left::Length(left) = self.left else { return None };
        let left = usize::try_from(left).ok().filter(|left| *left <= self.buf.len())?;
        self.left = Left::Nothing;
        Some(self.buf.split_to(left).freeze())
    }

    /// The connection has ended, and so may the body.
    ///
    /// # Errors
    /// It was to be longer.
    pub fn closed(&mut self) -> Result<Piece, Error> {
        self.keep = false;
        match std::mem::replace(&mut self.left, Left::Nothing) {
            Left::Nothing | Left::Close => Ok(Piece::End),
            Left::Length(_) | Left::Chunked(_) => Err(Error::Truncated),
        }
    }

    /// The body has ended.
    pub fn is_end(&self) -> bool {
        matches!(self.left, Left::Nothing)
    }

    /// Bytes that the body still has, where that is known.
    pub fn remaining(&self) -> Option<u64> {
        match &self.left {
            Left::Nothing => Some(0),
            Left::Length(left) => Some(*left),
            Left::Chunked(_) | Left::Close => None,
        }
    }

    /// Whether the connection may serve another request: the last response was complete, permits it, and nothing follows it.
    pub fn is_reusable(&self) -> bool {
        self.keep && self.is_end() && self.buf.is_empty()
    }

    /// The connection serves no other request.
    pub(super) fn retire(&mut self) {
        self.keep = false;
    }
}

/// What a head says about what follows it.
#[derive(Debug, Clone, Copy)]
struct Framing {
    /// There is a `Transfer-Encoding`
    coded: bool,
    /// There is a `Content-Length`
    stated: bool,
    /// The connection stays open
    keep: bool,
}

/// A whole head.
fn parse(head: &Bytes) -> Result<(Response<()>, Framing), Error> {
    let mut fields = [const { MaybeUninit::uninit() }; MAX_FIELDS];
    let mut parsed = httparse::Response::new(&mut []);
    let parser = httparse::ParserConfig::default();
    let httparse::Status::Complete(_) = parser.parse_response_with_uninit_headers(&mut parsed, head, &mut fields)?
    else {
        return Err(Error::Framing("its head cannot be read"));
    };
    let status = parsed
        .code
        .and_then(|code| StatusCode::from_u16(code).ok())
        .ok_or(Error::Framing("its status cannot be read"))?;
    let mut response = Response::new(());
    *response.status_mut() = status;
    let version = if parsed.version == Some(1) { Version::HTTP_11 } else { Version::HTTP_10 };
    *response.version_mut() = version;
    let mut framing = Framing { coded: false, stated: false, keep: version == Version::HTTP_11 };
    let mut headers = spare::headers();
    headers.reserve(parsed.headers.len());
    for field in &*parsed.headers {
        let name = HeaderName::from_bytes(field.name.as_bytes());
        let value = HeaderValue::from_maybe_shared(head.slice_ref(field.value));
        let (Ok(name), Ok(value)) = (name, value) else {
            return Err(Error::Framing("its headers cannot be read"));
        };
        if name == CONNECTION {
            framing.keep &= !closes(&value);
        } else if name == TRANSFER_ENCODING {
            framing.coded = true;
        } else if name == CONTENT_LENGTH {
            framing.stated = true;
        }
        headers.append(name, value);
    }
    *response.headers_mut() = headers;
    // hyper writes it to the client as it came.
    if let Some(reason) = parsed.reason.filter(|reason| Some(*reason) != status.canonical_reason())
        && let Ok(reason) = ReasonPhrase::try_from(reason.as_bytes())
    {
        response.extensions_mut().insert(reason);
    }
    Ok((response, framing))
}

fn closes(value: &HeaderValue) -> bool {
    value.as_bytes().split(|byte| *byte == b',').any(|token| token.trim_ascii().eq_ignore_ascii_case(b"close"))
}

/// `chunked` is the last coding.
fn is_chunked(headers: &HeaderMap) -> bool {
    let last = headers.get_all(TRANSFER_ENCODING).iter().next_back();
    let coding = last.and_then(|value| value.as_bytes().rsplit(|byte| *byte == b',').next());
    coding.is_some_and(|coding| coding.trim_ascii().eq_ignore_ascii_case(b"chunked"))
}

/// Where the first empty line ends, after a line. Before `scanned` there was none.
pub(super) fn head_end(bytes: &[u8], scanned: usize) -> Option<usize> {
    let from = scanned.saturating_sub(3);
    let ends = memchr::memchr_iter(b'\n', &bytes[from..]).map(|at| from + at + 1);
    ends.filter_map(|line| match &bytes[line..] {
        [b'\n', ..] => Some(line + 1),
        [b'\r', b'\n', ..] => Some(line + 2),
        _ => None,
    })
    .next()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A head and what is told of its body.
    fn head(text: &str) -> Result<(Response<()>, Reader), Error> {
        let mut reader = Reader::default();
        reader.begin(false);
        reader.buffer().extend_from_slice(text.as_bytes());
        match reader.head()? {
            Some(Arrived::Head(response)) => Ok((response, reader)),
            other => panic!("{other:?}"),
        }
    }

    fn left(text: &str) -> Option<u64> {
        head(text).unwrap().1.remaining()
    }

    #[test]
    fn a_head_is_read_with_its_fields() {
        let text = "\r\nHTTP/1.1 200 Fine\r\nX-A: 1\r\nx-a: \t2 \r\nX-Empty:\r\ncontent-length: 2\r\n\r\nok";
        let (response, mut reader) = head(text).unwrap();
        assert_eq!((response.status(), response.version()), (StatusCode::OK, Version::HTTP_11));
        assert_eq!(response.headers().get_all("x-a").iter().collect::<Vec<_>>(), ["1", "2"]);
        assert_eq!(response.headers()["x-empty"], "");
        assert_eq!(response.extensions().get::<ReasonPhrase>().unwrap().as_bytes(), b"Fine");
        assert_eq!(reader.piece().unwrap(), Piece::Data("ok".into()));
        assert!(reader.is_end() && reader.is_reusable());
        let (response, _) = head("HTTP/1.1 200 OK\n\n").unwrap();
        assert!(response.extensions().is_empty());
    }

    #[test]
    fn framing_follows_rfc_9112() {
        for (fields, remaining) in [
            ("content-length: 5", Some(5)),
            ("content-length: 5\r\nContent-Length: 5", Some(5)),
            ("content-length: 5, 5", Some(5)),
            ("content-length: 0", Some(0)),
            ("transfer-encoding: chunked", None),
            ("transfer-encoding: gzip, Chunked", None),
            // Its chunks count, and the length goes (`normalize::response`).
            ("content-length: 5\r\ntransfer-encoding: chunked", None),
            ("x: y", None),
        ] {
            assert_eq!(left(&format!("HTTP/1.1 200 OK\r\n{fields}\r\n\r\n")), remaining, "{fields}");
        }
        for status in ["101 S", "204 No", "304 Not"] {
            assert_eq!(left(&format!("HTTP/1.1 {status}\r\ncontent-length: 5\r\n\r\n")), Some(0), "{status}");
        }
        for fields in [
            "content-length: 5\r\ncontent-length: 6",
            "content-length: 5, 6",
            "content-length: +5",
            "content-length: 5 5",
            "content-length:",
            "content-length: 99999999999999999999",
            "content-length: 18446744073709551615",
            "x: a\rb",
            "x: a\r\n folded",
            "x : a",
            ": a",
            "x\0: a",
            "x: a\0",
        ] {
            assert!(head(&format!("HTTP/1.1 200 OK\r\n{fields}\r\n\r\n")).is_err(), "{fields:?}");
        }
        for line in [
            "HTTP/1.0 200 OK\r\ntransfer-encoding: chunked",
            "HTTP/2.0 200 OK",
            "HTTP/1.1 20 OK",
            "HTTP/1.1 099 X",
            "ICY 200 OK",
        ] {
            assert!(head(&format!("{line}\r\n\r\n")).is_err(), "{line:?}");
        }
    }

    #[test]
    fn a_response_to_head_has_no_body() {
        let mut reader = Reader::default();
        reader.begin(true);
        reader.buffer().extend_from_slice(b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n");
        assert!(matches!(reader.head().unwrap(), Some(Arrived::Head(_))));
        assert!(reader.is_end() && reader.is_reusable());
    }

    #[test]
    fn a_connection_is_kept_only_where_that_is_safe() {
        for (text, kept) in [
            ("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", true),
            ("HTTP/1.1 204 No\r\nconnection: keep-alive\r\n\r\n", true),
            ("HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: x, Close\r\nconnection: keep-alive\r\n\r\n", false),
            ("HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 0\r\n\r\n", false),
            ("HTTP/1.1 101 Switching Protocols\r\n\r\n", false),
            ("HTTP/1.1 200 OK\r\n\r\n", false),
            // Nobody asked for more.
            ("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\nHTTP/1.1 200 OK\r\n", false),
        ] {
            assert_eq!(head(text).unwrap().1.is_reusable(), kept, "{text}");
        }
        let (_, mut reader) = head("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nab").unwrap();
        reader.piece().unwrap();
        assert!(!reader.is_reusable(), "its body is not complete");
        assert!(matches!(reader.closed(), Err(Error::Truncated)));
        let (_, mut reader) = head("HTTP/1.1 200 OK\r\n\r\nab").unwrap();
        assert_eq!(reader.piece().unwrap(), Piece::Data("ab".into()));
        assert_eq!(reader.closed().unwrap(), Piece::End);
    }

    #[test]
    fn interim_responses_are_told_and_bounded() {
        let mut reader = Reader::default();
        reader.begin(false);
        let interim = b"HTTP/1.1 100 Continue\r\n\r\n";
        reader.buffer().extend_from_slice(&interim.repeat(101));
        for _ in 0..100 {
            assert!(matches!(reader.head().unwrap(), Some(Arrived::Interim(StatusCode::CONTINUE))));
        }
        assert!(reader.head().is_err());
    }

    #[test]
    fn heads_have_limits() {
        let large = |len| format!("HTTP/1.1 200 OK\r\ncontent-length: 0\r\nx: {}\r\n\r\n", "a".repeat(len));
        assert!(head(&large(MAX_HEAD - 100)).is_ok());
        assert!(matches!(head(&large(MAX_HEAD)), Err(Error::TooLarge)));
        let mut reader = Reader::default();
        reader.buffer().extend_from_slice(&large(MAX_HEAD).as_bytes()[..MAX_HEAD]);
        assert!(matches!(reader.head(), Err(Error::TooLarge)), "its end is not waited for");
        let fields = |n| format!("HTTP/1.1 204 No\r\n{}\r\n", "x: y\r\n".repeat(n));
        assert!(head(&fields(MAX_FIELDS)).is_ok() && head(&fields(MAX_FIELDS + 1)).is_err());
    }

    /// What comes of a connection's bytes, in pieces of these sizes.
    fn drive(bytes: &[u8], cuts: &[usize]) -> Result<(Vec<String>, Vec<u8>, usize), String> {
        let mut reader = Reader::default();
        reader.begin(false);
        let (mut heads, mut body, mut trailers, mut answered, mut ended) = (Vec::new(), Vec::new(), 0, false, false);
        let (mut left, mut cuts) = (bytes, cuts.iter().cycle());
        while !left.is_empty() && !ended {
            let (piece, rest) = left.split_at((*cuts.next().unwrap()).min(left.len()));
            left = rest;
            reader.buffer().extend_from_slice(piece);
            loop {
                if !answered {
                    match reader.head().map_err(|error| error.to_string())? {
                        None => break,
                        Some(Arrived::Interim(status)) => heads.push(status.to_string()),
                        Some(Arrived::Head(response)) => {
                            heads.push(format!("{response:?}"));
                            answered = true;
                        }
                    }
                    continue;
                }
                match reader.piece().map_err(|error| error.to_string())? {
                    Piece::More => break,
                    Piece::Data(data) => body.extend_from_slice(&data),
                    Piece::Trailers(map) => (trailers, ended) = (map.len(), true),
                    Piece::End => ended = true,
                }
                if ended {
                    break;
                }
            }
        }
        Ok((heads, body, trailers))
    }

    fn responses() -> impl Strategy<Value = Vec<u8>> {
        let part = prop_oneof![
            Just("HTTP/1.1 100 Continue\r\n\r\n"),
            Just("HTTP/1.1 200 OK\r\n"),
            Just("HTTP/1.0 404 None\n"),
            Just("content-length: 7\r\n"),
            Just("transfer-encoding: chunked\r\n"),
            Just("x-field: value\r\n"),
            Just("\r\n"),
            Just("4\r\nabcd\r\n"),
            Just("0\r\nx-sum: 1\r\n\r\n"),
            Just("0\r\n\r\n"),
            Just("abcdefg"),
            Just("\n"),
        ];
        proptest::collection::vec(part, 0..12).prop_map(|parts| parts.concat().into_bytes())
    }

    proptest! {
        /// However the bytes arrive, they say the same.
        #[test]
        fn cuts_change_nothing(bytes in responses(), cuts in proptest::collection::vec(1_usize..7, 1..20)) {
            prop_assert_eq!(drive(&bytes, &[usize::MAX]), drive(&bytes, &cuts));
        }

        #[test]
        fn nothing_makes_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), cuts in proptest::collection::vec(1_usize..50, 1..9)) {
            let _ = drive(&bytes, &cuts);
            let _ = drive(&[b"HTTP/1.1 200 OK\r\n", bytes.as_slice()].concat(), &cuts);
        }
    }
}
