//! HTTP/2 as frames, written by hand: for clients and servers that do what no library would let them.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use crate::HANG;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// The window of a connection, and of a stream until SETTINGS say otherwise.
const WINDOW: u32 = 65_535;

/// What a frame is. The numbers are RFC 9113's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// DATA
    Data = 0,
    /// HEADERS
    Headers = 1,
    /// RST_STREAM
    Reset = 3,
    /// SETTINGS
    Settings = 4,
    /// PING
    Ping = 6,
    /// GOAWAY
    GoAway = 7,
    /// WINDOW_UPDATE
    Window = 8,
    /// Any other
    Other = 0xff,
}

/// `END_STREAM`; of SETTINGS and PING: `ACK`
pub const END: u8 = 1;
const END_HEADERS: u8 = 4;

/// A frame as it was read.
#[derive(Debug)]
pub struct Frame {
    /// What it is
    pub kind: Kind,
    /// Its flags
    pub flags: u8,
    /// Its stream; 0: the connection
    pub stream: u32,
    /// What it carries
    pub payload: Vec<u8>,
}

/// One side of a connection.
#[derive(Debug)]
pub struct H2 {
    stream: TcpStream,
    next: u32,
}

impl H2 {
    /// A client whose streams have a window of `window` bytes, and whose connection has the largest there is.
    #[track_caller]
    pub fn connect(address: SocketAddr, window: u32) -> Self {
        let stream = TcpStream::connect(address).unwrap_or_else(|error| panic!("connect to {address}: {error}"));
        stream.set_read_timeout(Some(HANG)).expect("timeout");
        // What nobody reads fills this, and then no more comes.
        nix::sys::socket::setsockopt(&stream, nix::sys::socket::sockopt::RcvBuf, &(64 * 1024)).expect("buffer");
        let mut client = Self { stream, next: 1 };
        client.stream.write_all(PREFACE).expect("write");
        let settings = [&4_u16.to_be_bytes()[..], &window.to_be_bytes()].concat();
        client.write(Kind::Settings, 0, 0, &settings);
        client.write(Kind::Window, 0, 0, &(0x7fff_ffff - WINDOW).to_be_bytes());
        client
    }

    /// The server's side of an accepted connection, once the client's preface is read.
    pub fn accept(mut stream: TcpStream) -> Option<Self> {
        let mut preface = [0; PREFACE.len()];
        stream.read_exact(&mut preface).ok()?;
        assert_eq!(preface, PREFACE);
        let mut server = Self { stream, next: 0 };
        server.try_write(Kind::Settings, 0, 0, &[])?;
        Some(server)
    }

    /// The same connection, for another thread.
    pub fn share(&self) -> Self {
        Self { stream: self.stream.try_clone().expect("clone of a socket"), next: self.next }
    }

    /// The stream that the next request will have.
    pub fn next_stream(&self) -> u32 {
        self.next
    }

    /// Closes the connection, also for those who share it.
    pub fn close(&self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }

    /// Sends the head of a request; with `whole` there is no body. Returns its stream.
    #[track_caller]
    pub fn request(&mut self, method: &str, authority: &str, path: &str, whole: bool) -> u32 {
        // Indexed: `:method GET` or `POST`, `:scheme http`; literal without indexing: `:path`, `:authority`.
        let mut block = vec![if method == "GET" { 0x82 } else { 0x83 }, 0x86];
        for (name, value) in [(4, path), (1, authority)] {
            block.extend([name, u8::try_from(value.len()).expect("short")]);
            block.extend(value.as_bytes());
        }
        let stream = self.next;
        self.next += 2;
        self.write(Kind::Headers, END_HEADERS | if whole { END } else { 0 }, stream, &block);
        stream
    }

    /// Answers 200; with `whole` there is no body.
    pub fn respond(&mut self, stream: u32, whole: bool) -> Option<()> {
        self.try_write(Kind::Headers, END_HEADERS | if whole { END } else { 0 }, stream, &[0x88])
    }

    /// Reads until the response on `stream` has ended: whether it was 200. What comes for others is passed over.
    #[track_caller]
    pub fn ended(&mut self, stream: u32) -> bool {
        let mut fine = false;
        loop {
            let frame = self.read().expect("the connection ended");
            if frame.stream != stream {
                continue;
            }
            match frame.kind {
                Kind::Headers => fine |= frame.payload.first() == Some(&0x88),
                Kind::Reset => return false,
                _ => {}
            }
            if matches!(frame.kind, Kind::Headers | Kind::Data) && frame.flags & END != 0 {
                return fine;
            }
        }
    }

    /// The next frame; settings and pings are acknowledged. `None`: the connection is over.
    pub fn read(&mut self) -> Option<Frame> {
        let mut head = [0; 9];
        self.stream.read_exact(&mut head).ok()?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let mut payload = vec![0; length as usize];
        self.stream.read_exact(&mut payload).ok()?;
        let kind = match head[3] {
            0 => Kind::Data,
            1 => Kind::Headers,
            3 => Kind::Reset,
            4 => Kind::Settings,
            6 => Kind::Ping,
            7 => Kind::GoAway,
            8 => Kind::Window,
            _ => Kind::Other,
        };
        let (flags, stream) = (head[4], u32::from_be_bytes([head[5], head[6], head[7], head[8]]) & 0x7fff_ffff);
        if flags & END == 0 {
            match kind {
                Kind::Settings => self.try_write(kind, END, 0, &[])?,
                Kind::Ping => self.try_write(kind, END, 0, &payload)?,
                _ => {}
            }
        }
        Some(Frame { kind, flags, stream, payload })
    }

    /// Sends a frame.
    #[track_caller]
    pub fn write(&mut self, kind: Kind, flags: u8, stream: u32, payload: &[u8]) {
        self.try_write(kind, flags, stream, payload).expect("write");
    }

    /// Sends a frame. `None`: the connection is over.
    pub fn try_write(&mut self, kind: Kind, flags: u8, stream: u32, payload: &[u8]) -> Option<()> {
        let length = u32::try_from(payload.len()).expect("short").to_be_bytes();
        let mut bytes = vec![length[1], length[2], length[3], kind as u8, flags];
        bytes.extend(stream.to_be_bytes());
        bytes.extend(payload);
        self.stream.write_all(&bytes).ok()
    }
}

/// What the other side lets one send.
#[derive(Debug)]
pub struct Windows {
    connection: u32,
    initial: u32,
    streams: HashMap<u32, u32>,
}

impl Default for Windows {
    fn default() -> Self {
        Self { connection: WINDOW, initial: WINDOW, streams: HashMap::new() }
    }
}

impl Windows {
    /// Takes note of a frame that the other side sent.
    pub fn see(&mut self, frame: &Frame) {
        match frame.kind {
            Kind::Settings if frame.flags & END == 0 => {
                for setting in frame.payload.chunks_exact(6).filter(|setting| setting[..2] == [0, 4]) {
                    let initial = u32::from_be_bytes([setting[2], setting[3], setting[4], setting[5]]);
                    self.streams.values_mut().for_each(|window| *window = *window + initial - self.initial);
                    self.initial = initial;
                }
            }
            Kind::Window => {
                let more = u32::from_be_bytes([frame.payload[0], frame.payload[1], frame.payload[2], frame.payload[3]]);
                match frame.stream {
                    0 => self.connection += more,
                    stream => *self.streams.entry(stream).or_insert(self.initial) += more,
                }
            }
            Kind::Reset => drop(self.streams.remove(&frame.stream)),
            _ => {}
        }
    }

    /// How many bytes may be sent on a stream now, at most a frame: they are counted as sent.
    pub fn take(&mut self, stream: u32) -> u32 {
        let window = self.streams.entry(stream).or_insert(self.initial);
        let bytes = (*window).min(self.connection).min(16 * 1024);
        *window -= bytes;
        self.connection -= bytes;
        bytes
    }
}
