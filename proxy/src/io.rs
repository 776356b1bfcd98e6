//! One type for every stream the data path reads and writes, so that hyper's code exists once and not per transport.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use crate::tls::{Accepted, Dialled};

/// A connection to a client or to an endpoint.
#[derive(Debug)]
pub struct Io {
    transport: Transport,
    /// Bytes that were read before the protocol was known; given out first.
    prefix: Bytes,
}

/// How the bytes travel.
#[derive(Debug)]
pub enum Transport {
    /// Plaintext
    Plain(TcpStream),
    /// Mesh mTLS of a client that called
    Accepted(Box<Accepted<TcpStream>>),
    /// Mesh mTLS of an endpoint that was dialled
    Dialled(Box<Dialled<TcpStream>>),
}

impl Io {
    /// A stream some of whose first bytes were read already.
    pub fn with_prefix(transport: impl Into<Transport>, prefix: Bytes) -> Self {
        Self { transport: transport.into(), prefix }
    }

    /// Gives bytes back that were read too far.
    #[must_use]
    pub fn unread(mut self, bytes: Bytes) -> Self {
        self.prefix = if self.prefix.is_empty() { bytes } else { [bytes, self.prefix].concat().into() };
        self
    }

    /// Whether bytes wait that were read too far.
    pub fn has_unread(&self) -> bool {
        !self.prefix.is_empty()
    }

    /// The socket below.
    pub fn socket(&self) -> &TcpStream {
        match &self.transport {
            Transport::Plain(stream) => stream,
            Transport::Accepted(stream) => stream.get_ref().0,
            Transport::Dialled(stream) => stream.get_ref().0,
        }
    }

    /// The socket itself where nothing stands between it and the bytes: plaintext, and nothing read ahead.
    pub fn is_plain(&self) -> bool {
        self.prefix.is_empty() && self.is_plaintext()
    }

    /// Whether what is written to the socket is what the other side reads.
    pub fn is_plaintext(&self) -> bool {
        matches!(self.transport, Transport::Plain(_))
    }

    /// The address of the other side.
    ///
    /// # Errors
    /// When the socket is no longer connected.
    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        self.socket().peer_addr()
    }
}

impl From<TcpStream> for Transport {
    fn from(stream: TcpStream) -> Self {
        Self::Plain(stream)
    }
}

impl From<Accepted<TcpStream>> for Transport {
    fn from(stream: Accepted<TcpStream>) -> Self {
        Self::Accepted(Box::new(stream))
    }
}

impl From<Dialled<TcpStream>> for Transport {
    fn from(stream: Dialled<TcpStream>) -> Self {
        Self::Dialled(Box::new(stream))
    }
}

impl<T: Into<Transport>> From<T> for Io {
    fn from(transport: T) -> Self {
        Self { transport: transport.into(), prefix: Bytes::new() }
    }
}

/// Calls a method of the stream below, whatever it is.
macro_rules! below {
    ($self:ident, $method:ident $(, $arg:expr)*) => {
        match &mut $self.get_mut().transport {
            Transport::Plain(stream) => Pin::new(stream).$method($($arg),*),
            Transport::Accepted(stream) => Pin::new(stream.as_mut()).$method($($arg),*),
            Transport::Dialled(stream) => Pin::new(stream.as_mut()).$method($($arg),*),
        }
    };
}

impl AsyncRead for Io {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if !self.prefix.is_empty() {
            let n = self.prefix.len().min(buf.remaining());
            buf.put_slice(&self.prefix[..n]);
            self.prefix.advance(n);
            return Poll::Ready(Ok(()));
        }
        below!(self, poll_read, cx, buf)
    }
}

impl AsyncWrite for Io {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        below!(self, poll_write, cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        below!(self, poll_write_vectored, cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        match &self.transport {
            Transport::Plain(stream) => stream.is_write_vectored(),
            Transport::Accepted(stream) => stream.is_write_vectored(),
            Transport::Dialled(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        below!(self, poll_flush, cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        below!(self, poll_shutdown, cx)
    }
}
