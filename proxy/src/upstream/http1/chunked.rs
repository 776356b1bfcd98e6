//! The chunked coding of a response's body (RFC 9112, 7.1), as its bytes arrive.

use ::http::{HeaderMap, HeaderName, HeaderValue};
use bytes::{Buf, Bytes, BytesMut};

use super::Error;
use super::read::{MAX_FIELDS, MAX_HEAD, head_end};

/// Bytes of all extensions of one body, which nobody reads.
const MAX_EXTENSIONS: usize = 16 * 1024;

/// Where in the coding the body is.
#[derive(Debug)]
pub(super) struct Chunked {
    at: At,
    /// Of the chunk whose size was read last
    left: u64,
    extensions: usize,
    /// Bytes of the trailers in which there is no end
    scanned: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    /// Before the first digit
    Start,
    Size,
    /// After the digits only space may come before what ends them
    Space,
    Extension,
    SizeLf,
    Data,
    DataCr,
    DataLf,
    Trailers,
}

/// What comes next of a body.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// More bytes are needed
    More,
    Data(Bytes),
    /// The end
    Trailers(HeaderMap),
    End,
}

impl Chunked {
    pub(super) fn new() -> Self {
        Self { at: At::Start, left: 0, extensions: 0, scanned: 0 }
    }

    /// Takes what is next from `buf`.
    ///
    /// # Errors
    /// This is no chunked body, or it is above a limit.
    pub(super) fn step(&mut self, buf: &mut BytesMut) -> Result<Step, Error> {
        loop {
            match self.at {
                At::Data => {
                    if buf.is_empty() {
                        return Ok(Step::More);
                    }
                    let take = usize::try_from(self.left).map_or(buf.len(), |left| left.min(buf.len()));
                    self.left -= take as u64;
                    if self.left == 0 {
                        self.at = At::DataCr;
                    }
                    return Ok(Step::Data(buf.split_to(take).freeze()));
                }
                At::Trailers => return self.trailers(buf),
                _ => {}
            }
            let mut read = 0;
            while !matches!(self.at, At::Data | At::Trailers) {
                let Some(byte) = buf.get(read) else {
                    buf.clear();
                    return Ok(Step::More);
                };
                self.byte(*byte)?;
                read += 1;
            }
            buf.advance(read);
        }
    }

    /// Of what is around the data.
    fn byte(&mut self, byte: u8) -> Result<(), Error> {
        self.at = match (self.at, byte) {
            (At::Start | At::Size, b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') => {
                let digit = char::from(byte).to_digit(16).unwrap_or_default();
                let longer = self.left.checked_mul(16).and_then(|left| left.checked_add(digit.into()));
                self.left = longer.ok_or(Error::Framing("a chunk's size is too large"))?;
                At::Size
            }
            (At::Size | At::Space, b' ' | b'\t') => At::Space,
            (At::Size | At::Space, b';') => At::Extension,
            (At::Size | At::Space | At::Extension, b'\r') => At::SizeLf,
            (At::Extension, b'\n') => return Err(Error::Framing("a chunk's extension has a bare LF")),
            (At::Extension, _) => {
                self.extensions += 1;
                if self.extensions >= MAX_EXTENSIONS {
                    return Err(Error::Framing("its chunks' extensions are too large"));
                }
                At::Extension
            }
            (At::SizeLf, b'\n') if self.left == 0 => At::Trailers,
            (At::SizeLf, b'\n') => At::Data,
            (At::DataCr, b'\r') => At::DataLf,
            (At::DataLf, b'\n') => At::Start,
            (At::DataCr | At::DataLf, _) => return Err(Error::Framing("a chunk is longer than its size")),
            _ => return Err(Error::Framing("a chunk's size cannot be read")),
        };
        Ok(())
    }

    fn trailers(&mut self, buf: &mut BytesMut) -> Result<Step, Error> {
        match buf.as_ref() {
            [b'\r', b'\n', ..] => {
                buf.advance(2);
                return Ok(Step::End);
            }
            [] | [b'\r'] => return Ok(Step::More),
            [b'\n', ..] => return Err(Error::Framing("its trailers cannot be read")),
            _ => {}
        }
        let Some(end) = head_end(buf, self.scanned) else {
            self.scanned = buf.len();
            let more = buf.len() < MAX_HEAD;
            return if more { Ok(Step::More) } else { Err(Error::Framing("its trailers are too large")) };
        };
        let block = buf.split_to(end).freeze();
        if end > MAX_HEAD || has_bare_lf(&block) {
            return Err(Error::Framing("its trailers cannot be read"));
        }
        let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
        let httparse::Status::Complete((_, fields)) = httparse::parse_headers(&block, &mut fields)? else {
            return Err(Error::Framing("its trailers cannot be read"));
        };
        let mut trailers = HeaderMap::with_capacity(fields.len());
        for field in fields {
            let name = HeaderName::from_bytes(field.name.as_bytes());
            let value = HeaderValue::from_maybe_shared(block.slice_ref(field.value));
            let (Ok(name), Ok(value)) = (name, value) else {
                return Err(Error::Framing("its trailers cannot be read"));
            };
            trailers.append(name, value);
        }
        Ok(Step::Trailers(trailers))
    }
}

/// Some would see the end of the trailers there.
fn has_bare_lf(block: &[u8]) -> bool {
    memchr::memchr_iter(b'\n', block).any(|at| at == 0 || block[at - 1] != b'\r')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A body, its trailers, and what is left after its end; `None`: it has not ended.
    type Decoded = Result<Option<(Vec<u8>, HeaderMap, Vec<u8>)>, Error>;

    /// What arrives in these pieces.
    fn decode<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Decoded {
        let (mut chunked, mut buf, mut body) = (Chunked::new(), BytesMut::new(), Vec::new());
        let mut ended = None;
        for piece in pieces {
            buf.extend_from_slice(piece);
            while ended.is_none() {
                match chunked.step(&mut buf)? {
                    Step::More => break,
                    Step::Data(data) => body.extend_from_slice(&data),
                    Step::Trailers(trailers) => ended = Some(trailers),
                    Step::End => ended = Some(HeaderMap::new()),
                }
            }
        }
        Ok(ended.map(|trailers| (body, trailers, buf.to_vec())))
    }

    fn whole(text: &str) -> Decoded {
        decode([text.as_bytes()])
    }

    #[test]
    fn chunks_extensions_and_trailers_are_read() {
        let text = "5;name=\"a\"\r\nhello\r\n001 \r\n!\r\n0;x\r\nx-sum: 1\r\nX-Sum: 2\r\n\r\nHTTP/1.1";
        let (body, trailers, rest) = whole(text).unwrap().unwrap();
        assert_eq!((body.as_slice(), rest.as_slice()), (b"hello!".as_slice(), b"HTTP/1.1".as_slice()));
        assert_eq!(trailers.get_all("x-sum").iter().collect::<Vec<_>>(), ["1", "2"]);
        assert!(whole("5\r\nhel").unwrap().is_none() && whole("0\r\n").unwrap().is_none());
    }

    #[test]
    fn what_two_readers_could_read_differently_is_refused() {
        let long = format!("0\r\n{}", "x: y\r\n".repeat(20_000));
        let many = format!("0\r\n{}\r\n", "x: y\r\n".repeat(101));
        let extensions = format!("1;{}\r\n", "x".repeat(MAX_EXTENSIONS));
        for text in [
            "\r\n",
            "x\r\n",
            "-1\r\n",
            "+1\r\n",
            "0x1\r\n",
            " 1\r\n",
            "1 1\r\n",
            "1\n",
            "1;a\nb\r\n",
            "1\rx",
            ";\r\n",
            "10000000000000000\r\n",
            "1\r\nab\r\n",
            "1\r\na\n",
            "1\r\na\rx",
            "0\r\nx: 1\n\nFOO\r\n\r\n",
            "0\r\n\n",
            "0\r\nx : 1\r\n\r\n",
            "0\r\nx: 1\r\n folded\r\n\r\n",
            "0\r\nx: a\rb\r\n\r\n",
            &long,
            &many,
            &extensions,
        ] {
            assert!(whole(text).is_err(), "{:?}", text.get(..40).unwrap_or(text));
        }
    }

    proptest! {
        /// What was coded comes out, wherever the bytes were cut.
        #[test]
        fn any_cut_decodes_to_the_same(
            chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..40), 0..8),
            cuts in proptest::collection::vec(1_usize..9, 1..40),
            trailer: bool,
        ) {
            let mut text = Vec::new();
            for chunk in &chunks {
                text.extend_from_slice(format!("{:x};e=1\r\n", chunk.len()).as_bytes());
                text.extend_from_slice(chunk);
                text.extend_from_slice(b"\r\n");
            }
            text.extend_from_slice(if trailer { b"0\r\nx-sum: 1\r\n\r\n" } else { b"0\r\n\r\n" });
            text.extend_from_slice(b"rest");
            let mut pieces = Vec::new();
            let mut left = text.as_slice();
            for cut in cuts.iter().cycle() {
                let (piece, more) = left.split_at((*cut).min(left.len()));
                pieces.push(piece);
                left = more;
                if left.is_empty() {
                    break;
                }
            }
            let (body, trailers, rest) = decode(pieces).unwrap().unwrap();
            prop_assert_eq!(body, chunks.concat());
            prop_assert_eq!(trailers.len(), usize::from(trailer));
            prop_assert_eq!(rest, b"rest");
        }

        #[test]
        fn nothing_makes_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode([bytes.as_slice()]);
        }
    }
}
