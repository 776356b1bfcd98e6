//! Bytes on their way through a filter.

use bytes::{Bytes, BytesMut};

/// Body bytes at one filter: one chunk, untouched where the filter only looks at it, or what was gathered while it pauses.
#[derive(Debug, Default)]
pub enum Buffer {
    /// None
    #[default]
    Empty,
    /// As they came
    Chunk(Bytes),
    /// Of several chunks, or written to
    Gathered(BytesMut),
}

impl Buffer {
    /// Bytes held.
    pub fn len(&self) -> usize {
        self.as_slice().len()
    }

    /// True: it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.as_slice().is_empty()
    }

    /// All of it.
    pub fn as_slice(&self) -> &[u8] {
        match self {
            Self::Empty => &[],
            Self::Chunk(bytes) => bytes,
            Self::Gathered(bytes) => bytes,
        }
    }

    /// Appends; nothing is copied into an empty buffer.
    pub fn push(&mut self, bytes: Bytes) {
        if bytes.is_empty() {
            return;
        }
        if self.is_empty() {
            *self = Self::Chunk(bytes);
        } else {
            self.gather(|gathered| gathered.extend_from_slice(&bytes));
        }
    }

    /// Replaces `len` bytes from `start` on. What lies past the end is cut: past it, the new bytes are appended.
    pub fn splice(&mut self, start: usize, len: usize, with: &[u8]) {
        let size = self.len();
        let start = start.min(size);
        let end = start.saturating_add(len).min(size);
        if start == 0 && end == size {
            *self = Self::Chunk(Bytes::copy_from_slice(with));
            return;
        }
        self.gather(|bytes| {
            let rest = bytes.split_off(start);
            bytes.reserve(with.len() + rest.len());
            bytes.extend_from_slice(with);
            bytes.extend_from_slice(rest.get(end - start..).unwrap_or_default());
        });
    }

    /// Takes everything out.
    pub fn take(&mut self) -> Bytes {
        match std::mem::take(self) {
            Self::Empty => Bytes::new(),
            Self::Chunk(bytes) => bytes,
            Self::Gathered(bytes) => bytes.freeze(),
        }
    }

    fn gather(&mut self, f: impl FnOnce(&mut BytesMut)) {
        let mut gathered = match std::mem::take(self) {
            Self::Empty => BytesMut::new(),
            Self::Chunk(bytes) => bytes.try_into_mut().unwrap_or_else(|bytes| BytesMut::from(&bytes[..])),
            Self::Gathered(bytes) => bytes,
        };
        f(&mut gathered);
        *self = Self::Gathered(gathered);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spliced(start: usize, len: usize, with: &str) -> String {
        let mut buffer = Buffer::default();
        buffer.push(Bytes::from_static(b"abc"));
        buffer.push(Bytes::from_static(b"def"));
        buffer.splice(start, len, with.as_bytes());
        String::from_utf8(buffer.take().to_vec()).unwrap()
    }

    #[test]
    fn c36_prepend_append_replace_and_inject() {
        assert_eq!(spliced(0, 0, "12"), "12abcdef");
        assert_eq!(spliced(0xffff_ffff, 0, "12"), "abcdef12");
        assert_eq!(spliced(6, 9, "12"), "abcdef12");
        assert_eq!(spliced(0, 6, "12"), "12");
        assert_eq!(spliced(0, 99, ""), "");
        assert_eq!(spliced(0, 2, "1"), "1cdef");
        assert_eq!(spliced(3, 0, "12"), "abc12def");
        assert_eq!(spliced(3, 2, "1"), "abc1f");
    }

    #[test]
    fn one_chunk_is_not_copied() {
        let chunk = Bytes::from(vec![1, 2, 3]);
        let mut buffer = Buffer::default();
        buffer.push(chunk.clone());
        assert_eq!(buffer.take().as_ptr(), chunk.as_ptr());
    }
}
