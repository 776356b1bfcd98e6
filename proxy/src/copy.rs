//! Bytes both ways between two streams: through one buffer per worker, and where both are sockets in plaintext and there is much of
//! it, through a pipe.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use outrigger_core::first::Speaker;
use outrigger_core::splice::Switch;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep};

use crate::io::Io;
use crate::splice::{Filled, Pipe};

#[cfg(test)]
mod tests;

/// Bytes read at once.
const BUFFER: usize = 64 * 1024;
/// The most that one read of a TLS stream brings.
const RECORD: usize = 16 * 1024;
/// Reads of one direction before the worker's other tasks have their turn.
const TURN: usize = 16;

thread_local! {
    /// One buffer for all connections of a worker: what cannot be written at once is set aside, which is rare.
    static SHARED: RefCell<Box<[u8]>> = RefCell::new(vec![0; BUFFER].into_boxed_slice());
}

/// One of the two streams.
pub trait Side: AsyncRead + AsyncWrite + Unpin {
    /// The socket, where its next bytes are the stream's.
    fn readable_socket(&self) -> Option<&TcpStream> {
        None
    }

    /// The socket, where bytes written to it are the stream's.
    fn writable_socket(&self) -> Option<&TcpStream> {
        None
    }
}

impl Side for Io {
    fn readable_socket(&self) -> Option<&TcpStream> {
        self.is_plain().then(|| self.socket())
    }

    fn writable_socket(&self) -> Option<&TcpStream> {
        self.is_plaintext().then(|| self.socket())
    }
}

impl Side for TokioIo<Upgraded> {}

/// What passed, bytes.
#[derive(Debug, Clone, Copy, Default)]
pub struct Passed {
    /// From the client to the server
    pub sent: u64,
    /// From the server to the client
    pub received: u64,
    /// Of both, what went through a pipe
    pub spliced: u64,
}

/// How a copy ended that did not break.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Both sides have ended
    Both,
    /// Nothing passed for the idle timeout
    Idle,
}

/// Copies until both sides have ended, one has broken, or nothing passed for the idle timeout. The end of one direction is handed
/// on as such (half-close). What passed can be asked for at any time.
#[derive(Debug)]
pub struct Relay<A, B, F> {
    /// Told once who spoke first.
    heard: Option<F>,
    client: A,
    server: B,
    up: Half,
    down: Half,
    idle: Duration,
    timer: Pin<Box<Sleep>>,
    active: Instant,
}

#[derive(Debug, Default)]
struct Half {
    /// Read, but not yet taken by the other side.
    rest: Vec<u8>,
    taken: usize,
    /// As `rest`, within the kernel
    pipe: Option<Pipe>,
    switch: Switch,
    /// What reading ended with, after `rest`
    broken: Option<io::Error>,
    ended: bool,
    closed: bool,
    bytes: u64,
    spliced: u64,
}

impl Half {
    fn poll<R: Side, W: Side>(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut R,
        to: &mut W,
        moved: &mut bool,
    ) -> Poll<io::Result<()>> {
        for _ in 0..TURN {
            ready!(self.poll_held(cx, to, moved))?;
            if let Some(error) = self.broken.take() {
                return Poll::Ready(Err(error));
            }
            if self.ended {
                if !self.closed {
                    ready!(Pin::new(&mut *to).poll_shutdown(cx))?;
                    self.closed = true;
                }
                return Poll::Ready(Ok(()));
            }
            match self.poll_pass(cx, from, to)? {
                Poll::Ready(()) => *moved = true,
                Poll::Pending => {
                    ready!(Pin::new(&mut *to).poll_flush(cx))?;
                    return Poll::Pending;
                }
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Writes what was read before.
    fn poll_held<W: Side>(&mut self, cx: &mut Context<'_>, to: &mut W, moved: &mut bool) -> Poll<io::Result<()>> {
        while let Some(rest) = self.rest.get(self.taken..).filter(|rest| !rest.is_empty()) {
            self.taken += written(ready!(Pin::new(&mut *to).poll_write(cx, rest))?)?;
            *moved = true;
        }
        if self.taken > 0 {
            self.rest = Vec::new();
            self.taken = 0;
        }
        if let (Some(pipe), Some(socket)) = (&mut self.pipe, to.writable_socket()) {
            ready!(pipe.poll_empty(cx, socket, moved))?;
            self.pipe = None;
        }
        Poll::Ready(Ok(()))
    }

    /// Reads once; what it brought is written at once, as far as the other side takes it.
    fn poll_pass<R: Side, W: Side>(&mut self, cx: &mut Context<'_>, from: &mut R, to: &mut W) -> Poll<io::Result<()>> {
        if self.switch.splices()
            && to.writable_socket().is_some()
            && let Some(socket) = from.readable_socket()
            && let Filled::With(pipe, bytes) = ready!(Pipe::poll_fill(cx, socket))?
        {
            // Written by the caller's next round. The empty pipe of an end goes back.
            self.ended = bytes == 0;
            self.pipe = Some(pipe).filter(|_| bytes > 0);
            self.bytes += bytes as u64;
            self.spliced += bytes as u64;
            self.switch.spliced(bytes);
            return Poll::Ready(Ok(()));
        }
        SHARED.with_borrow_mut(|shared| {
            let mut buf = ReadBuf::new(shared);
            let plain = from.readable_socket().is_some();
            ready!(Pin::new(&mut *from).poll_read(cx, &mut buf))?;
            self.ended = buf.filled().is_empty();
            // A TLS stream gives one record at a time: several make one write.
            while !plain && !self.ended && buf.remaining() >= RECORD {
                let before = buf.filled().len();
                match Pin::new(&mut *from).poll_read(cx, &mut buf) {
                    Poll::Ready(Ok(())) => self.ended = buf.filled().len() == before,
                    Poll::Ready(Err(error)) => {
                        self.broken = Some(error);
                        break;
                    }
                    Poll::Pending => break,
                }
            }
            let mut read = buf.filled();
            self.bytes += read.len() as u64;
            self.switch.buffered(read.len(), BUFFER);
            while !read.is_empty() {
                match Pin::new(&mut *to).poll_write(cx, read)? {
                    Poll::Ready(n) => read = read.get(written(n)?..).unwrap_or_default(),
                    Poll::Pending => {
                        self.rest = read.to_vec();
                        break;
                    }
                }
            }
            Poll::Ready(Ok(()))
        })
    }
}

fn written(n: usize) -> io::Result<usize> {
    if n == 0 { Err(io::ErrorKind::WriteZero.into()) } else { Ok(n) }
}

impl<A: Side, B: Side, F: FnMut(Speaker) + Unpin> Relay<A, B, F> {
    /// Between these two; `heard` is told once who spoke first.
    pub fn new(client: A, server: B, idle: Duration, heard: F) -> Self {
        Self {
            heard: Some(heard),
            client,
            server,
            up: Half::default(),
            down: Half::default(),
            idle,
            timer: Box::pin(tokio::time::sleep(idle)),
            active: Instant::now(),
        }
    }
}

impl<A, B, F> Relay<A, B, F> {
    /// What has passed so far.
    pub fn passed(&self) -> Passed {
        Passed { sent: self.up.bytes, received: self.down.bytes, spliced: self.up.spliced + self.down.spliced }
    }
}

impl<A: Side, B: Side, F: FnMut(Speaker) + Unpin> Future for Relay<A, B, F> {
    type Output = io::Result<End>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<End>> {
        let this = self.get_mut();
        let mut moved = false;
        let up = this.up.poll(cx, &mut this.client, &mut this.server, &mut moved)?;
        let down = this.down.poll(cx, &mut this.server, &mut this.client, &mut moved)?;
        if moved && let Some(mut heard) = this.heard.take() {
            // Both at once: the client did not wait for the server.
            heard(if this.up.bytes > 0 { Speaker::Client } else { Speaker::Server });
        }
        if up.is_ready() && down.is_ready() {
            return Poll::Ready(Ok(End::Both));
        }
        if moved {
            this.active = Instant::now();
        }
        while this.timer.as_mut().poll(cx).is_ready() {
            let deadline = this.active + this.idle;
            if Instant::now() >= deadline {
                return Poll::Ready(Ok(End::Idle));
            }
            this.timer.as_mut().reset(deadline);
        }
        Poll::Pending
    }
}
