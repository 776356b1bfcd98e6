//! HTTP/1.1 as bytes: for what clients like curl do not let one see.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};

use crate::HANG;

/// A connection on which bytes are written and expected.
#[derive(Debug)]
pub struct Raw {
    stream: TcpStream,
    unread: Vec<u8>,
}

impl Raw {
    /// Connects.
    #[track_caller]
    pub fn connect(address: SocketAddr) -> Self {
        Self::new(TcpStream::connect(address).unwrap_or_else(|error| panic!("connect to {address}: {error}")))
    }

    /// On a connection made elsewhere, or accepted.
    pub fn new(stream: TcpStream) -> Self {
        stream.set_read_timeout(Some(HANG)).expect("timeout");
        Self { stream, unread: Vec::new() }
    }

    /// The socket.
    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Sends these bytes.
    #[track_caller]
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).expect("write");
    }

    /// Reads up to and with `end`.
    #[track_caller]
    pub fn until(&mut self, end: &str) -> String {
        loop {
            if let Some(at) = self.unread.windows(end.len()).position(|window| window == end.as_bytes()) {
                let rest = self.unread.split_off(at + end.len());
                return lossy(&std::mem::replace(&mut self.unread, rest));
            }
            assert!(self.more(), "ended before {end:?}: {:?}", lossy(&self.unread));
        }
    }

    /// Reads up to and with `end`, unless the connection ends before.
    #[track_caller]
    pub fn try_until(&mut self, end: &str) -> Option<String> {
        while !self.unread.windows(end.len()).any(|window| window == end.as_bytes()) {
            if !self.more() {
                return None;
            }
        }
        Some(self.until(end))
    }

    /// Reads a head, with the empty line.
    #[track_caller]
    pub fn head(&mut self) -> String {
        self.until("\r\n\r\n")
    }

    /// Reads exactly so many bytes.
    #[track_caller]
    pub fn exactly(&mut self, bytes: usize) -> Vec<u8> {
        while self.unread.len() < bytes {
            assert!(self.more(), "ended after {} of {bytes} bytes", self.unread.len());
        }
        let rest = self.unread.split_off(bytes);
        std::mem::replace(&mut self.unread, rest)
    }

    /// Reads exactly so many bytes, unless the connection ends before.
    #[track_caller]
    pub fn try_exactly(&mut self, bytes: usize) -> Option<Vec<u8>> {
        while self.unread.len() < bytes {
            if !self.more() {
                return None;
            }
        }
        Some(self.exactly(bytes))
    }

    /// Reads a head with Content-Length and its body.
    #[track_caller]
    pub fn message(&mut self) -> (String, Vec<u8>) {
        let head = self.head();
        let length = header(&head, "content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
        let body = self.exactly(length);
        (head, body)
    }

    /// Reads to the end of the connection.
    #[track_caller]
    pub fn rest(&mut self) -> String {
        while self.more() {}
        lossy(&std::mem::take(&mut self.unread))
    }

    /// Whether nothing has arrived so far that is not read.
    pub fn is_silent(&mut self) -> bool {
        self.stream.set_nonblocking(true).expect("nonblocking");
        let mut byte = [0];
        let peeked = self.stream.peek(&mut byte);
        self.stream.set_nonblocking(false).expect("blocking");
        self.unread.is_empty() && peeked.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
    }

    #[track_caller]
    fn more(&mut self) -> bool {
        let mut buffer = [0; 16 * 1024];
        match self.stream.read(&mut buffer) {
            Ok(read) => {
                self.unread.extend_from_slice(&buffer[..read]);
                read > 0
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                panic!("nothing arrived for {HANG:?} after {:?}", lossy(&self.unread))
            }
            // Reset: the end as well.
            Err(_) => false,
        }
    }
}

/// The value of a header in a head.
pub fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let mut fields = head.lines().filter_map(|line| line.split_once(':'));
    fields.find(|(of, _)| of.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
