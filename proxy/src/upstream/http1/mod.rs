//! HTTP/1 to endpoints. hyper's client puts a task, a channel and two wake-ups between a request and its connection, and holds
//! 32 KiB for each idle one; here the exchange's own task reads and writes, and an idle connection is its socket.
//!
//! [`Reader`] and the encoder know the protocol and do no IO; [`Connection`] has the bytes; [`send`] sends a request and waits for
//! the head of its response, whose [`Body`] reads what follows. What parses heads is what hyper parses them with.

mod body;
mod chunked;
mod encode;
mod read;
mod send;
mod spare;

pub use body::Body;
pub use encode::Head;
pub use read::{Arrived, Piece, Reader};
pub use send::Failed;
pub(super) use send::send;
pub(crate) use spare::keep_headers;

use std::cell::{Cell, RefCell};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::task::coop;
use tokio::time::Instant;

use self::send::Upload;
use super::connect::Link;
use super::pool::Open;
use crate::io::Io;

/// Any failure of a body.
type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// What went wrong between a request and the end of its response.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The connection ended before the response's head
    #[error("the connection was closed before a response")]
    Closed,
    /// The connection ended within the response's body
    #[error("the connection was closed before the end of the response's body")]
    Truncated,
    /// The connection broke
    #[error("the connection broke")]
    Io(#[from] io::Error),
    /// The response's head, or its trailers, cannot be read
    #[error("the response cannot be read")]
    Parse(#[from] httparse::Error),
    /// The response contradicts itself, or is above a limit
    #[error("the response cannot be read: {0}")]
    Framing(&'static str),
    /// The response's head is larger than 64 KiB
    #[error("the response's head is too large")]
    TooLarge,
    /// The request's body is not as long as its head stated
    #[error("the request's body has another length than its Content-Length")]
    Length,
    /// The request's body broke off
    #[error("the request's body broke off")]
    Body(#[source] BoxError),
}

impl Error {
    /// The request is to blame: its client broke it off, or stated another length.
    pub fn is_of_the_request(&self) -> bool {
        matches!(self, Self::Length | Self::Body(_))
    }

    /// The endpoint answered, but not as HTTP has it.
    pub fn is_protocol(&self) -> bool {
        matches!(self, Self::Parse(_) | Self::Framing(_) | Self::TooLarge)
    }
}

/// A connection to an endpoint; it serves one request at a time.
#[derive(Debug)]
pub(super) struct Connection {
    state: RefCell<State>,
    link: Link,
    /// Until it ends, or speaks something else
    _open: Open,
    /// A request's body that is still on its way while its response is
    upload: RefCell<Option<Upload>>,
    /// What runs on it is cut then: its peer is no longer trusted
    pub(super) cut: Cell<Option<Instant>>,
}

/// A connection's bytes.
#[derive(Debug)]
struct State {
    io: Io,
    reader: Reader,
    /// The last read filled its buffer: more room pays
    full: bool,
}

impl Connection {
    pub(super) fn new(io: Io, link: Link, open: Open) -> Self {
        let state = State { io, reader: Reader::default(), full: false };
        Self { state: RefCell::new(state), link, _open: open, upload: RefCell::default(), cut: Cell::default() }
    }

    pub(super) fn link(&self) -> &Link {
        &self.link
    }

    /// Whether it can take a request: the last response is complete, the endpoint has not closed it and has said nothing unasked.
    pub(super) fn is_quiet(&self) -> bool {
        self.state.borrow_mut().is_quiet()
    }

    /// The last response is complete and lets the connection serve another request.
    pub(super) fn is_reusable(&self) -> bool {
        self.state.borrow().reader.is_reusable()
    }

    /// The request's body, if it is still on its way.
    pub(super) fn take_upload(&self) -> Option<Upload> {
        self.upload.borrow_mut().take().filter(|upload| !upload.is_finished())
    }

    /// Ends an idle connection as the protocol below wants it ended.
    pub(super) fn close(&self) {
        let mut state = self.state.borrow_mut();
        // Whoever is no longer there is not waited for.
        let _ = Pin::new(&mut state.io).poll_shutdown(&mut Context::from_waker(Waker::noop()));
    }

    /// Ends whatever runs on it: that sees the end of the connection.
    pub(super) fn sever(&self) {
        let _ = socket2::SockRef::from(self.state.borrow().io.socket()).shutdown(std::net::Shutdown::Both);
    }

    /// The bytes of a connection that was upgraded, and what it holds.
    pub(super) fn into_io(self) -> (Io, Link) {
        let State { io, mut reader, .. } = self.state.into_inner();
        let read = reader.buffer().split().freeze();
        (if read.is_empty() { io } else { io.unread(read) }, self.link)
    }
}

impl State {
    fn is_quiet(&mut self) -> bool {
        if !self.reader.is_reusable() {
            return false;
        }
        let mut byte = [0];
        if self.io.is_plain() {
            let read = self.io.socket().try_read(&mut byte);
            return read.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock);
        }
        // Records of TLS are no bytes of the endpoint's. A task that has used up its turn is told of none: not so here.
        let mut buf = ReadBuf::new(&mut byte);
        let read = coop::unconstrained(std::future::poll_fn(|cx| {
            Poll::Ready(tokio::io::AsyncRead::poll_read(Pin::new(&mut self.io), cx, &mut buf).is_pending())
        }));
        let read = std::pin::pin!(read).poll(&mut Context::from_waker(Waker::noop()));
        read == Poll::Ready(true)
    }

    /// Reads what there is, and says how much that was; 0 at the end. While nothing comes, nothing is held to read into.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let room = if self.full { spare::READ_MORE } else { spare::READ };
        let buf = self.reader.buffer();
        if buf.is_empty() {
            if !buf.try_reclaim(room) {
                *buf = spare::reading(room);
            }
        } else {
            buf.reserve(room);
        }
        let polled = std::pin::pin!(self.io.read_buf(buf)).poll(cx);
        if polled.is_pending() || matches!(polled, Poll::Ready(Err(_) | Ok(0))) {
            self.release();
        } else {
            self.full = self.reader.buf.len() == self.reader.buf.capacity();
        }
        polled
    }

    /// Gives the buffer back if there is nothing in it.
    fn release(&mut self) {
        if self.reader.buf.is_empty() {
            spare::read(std::mem::take(&mut self.reader.buf));
        }
    }

    /// The next head.
    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<Arrived, Error>> {
        loop {
            if !self.reader.buf.is_empty()
                && let Some(arrived) = self.reader.head()?
            {
                return Poll::Ready(Ok(arrived));
            }
            if ready!(self.poll_fill(cx))? == 0 {
                return Poll::Ready(Err(Error::Closed));
            }
        }
    }

    /// The response's body, if all of it is here.
    fn take_whole(&mut self) -> Option<Bytes> {
        let whole = self.reader.take_whole()?;
        self.release();
        Some(whole)
    }

    /// What is next of the response's body; never [`Piece::More`].
    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<Result<Piece, Error>> {
        loop {
            let piece = self.reader.piece()?;
            if piece == Piece::More {
                if ready!(self.poll_fill(cx))? > 0 {
                    continue;
                }
                return Poll::Ready(self.reader.closed());
            }
            if self.reader.is_end() {
                self.release();
            }
            return Poll::Ready(Ok(piece));
        }
    }
}
