//! The guard around an HTTP/1 connection's bytes: slow heads end in time, and the bare errors that hyper writes by itself
//! say why.
//!
//! hyper answers a head it cannot read before our service is called, with a response that has no reason; and its own
//! timeout for heads also runs while a kept-alive connection is idle. Both are done here instead, where bytes pass anyway.
//! The guard also knows what hyper does not tell: whether anything is left to read or to write.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use outrigger_core::reason::Reason;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

use super::respond;
use crate::io::Io;

const IDLE: u8 = 0;
const HEAD: u8 = 1;
const EXCHANGE: u8 = 2;

/// The last read found nothing: no byte is left in the socket or in the TLS state.
const DRAINED: u8 = 1;
/// hyper's buffer and ours are written out.
const FLUSHED: u8 = 2;
/// hyper ends the connection, or the client did.
const ENDING: u8 = 4;

/// Where the connection is between two requests; shared by the guard and the service.
#[derive(Debug, Clone, Default)]
pub(crate) struct Phase(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    phase: AtomicU8,
    /// The head that is being read states its length twice.
    ambiguous: AtomicBool,
    /// What the last polls found: [`DRAINED`], [`FLUSHED`], [`ENDING`].
    found: AtomicU8,
    /// hyper's end is not the connection's: it is to be parked.
    detached: AtomicBool,
}

impl Phase {
    /// A request's head is complete; until the mark is dropped an exchange runs.
    pub(crate) fn exchange(&self) -> Mark {
        self.set(EXCHANGE);
        Mark(self.clone())
    }

    /// Whether the head that was read last had both Content-Length and Transfer-Encoding, which hyper does not tell.
    pub(crate) fn take_ambiguous(&self) -> bool {
        self.0.ambiguous.load(Ordering::Relaxed) && self.0.ambiguous.swap(false, Ordering::Relaxed)
    }

    /// Forgets what polls found: asked of the next one.
    pub(crate) fn probe(&self) {
        let ending = self.0.found.load(Ordering::Relaxed) & ENDING;
        self.0.found.store(ending, Ordering::Relaxed);
    }

    /// Whether since [`Self::probe`] hyper read to the end, wrote everything, and no exchange runs or begins.
    pub(crate) fn is_quiet(&self) -> bool {
        self.get() == IDLE && self.0.found.load(Ordering::Relaxed) == DRAINED | FLUSHED
    }

    /// While detached, hyper's end of the connection leaves the socket open.
    pub(crate) fn detach(&self, detached: bool) {
        self.0.detached.store(detached, Ordering::Relaxed);
    }

    fn get(&self) -> u8 {
        self.0.phase.load(Ordering::Relaxed)
    }

    fn set(&self, phase: u8) {
        self.0.phase.store(phase, Ordering::Relaxed);
    }

    /// Only the connection's own task writes here: no read-modify-write is needed.
    fn found(&self, what: u8) {
        let found = self.0.found.load(Ordering::Relaxed);
        if found & what == 0 {
            self.0.found.store(found | what, Ordering::Relaxed);
        }
    }
}

/// An exchange runs.
#[derive(Debug)]
pub(crate) struct Mark(Phase);

impl Drop for Mark {
    fn drop(&mut self) {
        self.0.set(IDLE);
    }
}

/// A client's HTTP/1 connection.
#[derive(Debug)]
pub(crate) struct Guarded {
    io: Io,
    phase: Phase,
    /// From the first byte of a head to its last
    limit: Duration,
    /// Runs from where a head first made us wait.
    timer: Option<Pin<Box<Sleep>>>,
    /// Ours, written in place of hyper's bare error.
    instead: Bytes,
    expired: bool,
}

impl Guarded {
    pub(crate) fn new(io: Io, phase: Phase, limit: Duration) -> Self {
        phase.set(IDLE);
        Self { io, phase, limit, timer: None, instead: Bytes::new(), expired: false }
    }

    /// The connection, after hyper.
    pub(crate) fn into_io(self) -> Io {
        self.io
    }

    /// Nothing arrived: ready when a head has taken too long.
    fn poll_expired(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.phase.get() != HEAD {
            self.timer = None;
            return Poll::Pending;
        }
        let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep(self.limit)));
        timer.as_mut().poll(cx)
    }

    fn poll_instead(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.instead.is_empty() {
            let n = ready!(Pin::new(&mut self.io).poll_write(cx, &self.instead))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.instead.advance(n);
        }
        Poll::Ready(Ok(()))
    }

    /// Takes hyper's own error response out of the stream and puts one with a reason in its place.
    fn replaces(&mut self, bytes: &[u8]) -> bool {
        // An application may answer as barely: by then the head that it answers is no longer being read.
        let Some(reason) = (self.phase.get() == HEAD).then(|| bare_error(bytes)).flatten() else { return false };
        self.instead = raw(reason);
        true
    }
}

/// The reason for a response that hyper made of a parse error: recognised by being bare.
fn bare_error(bytes: &[u8]) -> Option<Reason> {
    let text = std::str::from_utf8(bytes).ok()?;
    let status = text.strip_prefix("HTTP/1.1 ").or_else(|| text.strip_prefix("HTTP/1.0 "))?.get(..3)?;
    let bare = text.len() < 200 && text.ends_with("\r\n\r\n") && text.contains("content-length: 0\r\n");
    let reason = match status {
        "400" => Reason::BadRequest,
        "414" | "431" => Reason::HeadersTooLarge,
        _ => return None,
    };
    bare.then_some(reason)
}

/// A chunked request that states a length as well: hyper goes by its chunks, hides the length and closes afterwards (RFC 9112
/// 6.3). A head that arrives in pieces may go unnoticed: this is for a counter.
fn ambiguous(bytes: &[u8]) -> bool {
    // Hardly any head has it: one quick search says so.
    if memchr::memmem::find(bytes, b"hunked").is_none() {
        return false;
    }
    let lines = || bytes.split(|byte| *byte == b'\n').take_while(|line| !line.trim_ascii().is_empty());
    let has =
        |name: &[u8]| lines().any(|line| line.get(..name.len()).is_some_and(|start| start.eq_ignore_ascii_case(name)));
    has(b"transfer-encoding:") && has(b"content-length:")
}

/// A whole response, as bytes.
fn raw(reason: Reason) -> Bytes {
    let (status, body) = (reason.status(), respond::text(reason, ""));
    format!(
        "HTTP/1.1 {} {}\r\nconnection: close\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: {}\r\n{}: {}\r\n\r\n{body}",
        status.as_u16(),
        status.canonical_reason().unwrap_or_default(),
        body.len(),
        respond::REASON,
        reason.code(),
    )
    .into()
}

impl AsyncRead for Guarded {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.expired {
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        if Pin::new(&mut self.io).poll_read(cx, buf)?.is_ready() {
            let read = &buf.filled()[before..];
            let phase = self.phase.get();
            if read.is_empty() {
                self.phase.found(ENDING);
            } else if phase == IDLE {
                self.phase.set(HEAD);
                self.timer = None;
            }
            if phase != EXCHANGE && ambiguous(read) {
                self.phase.0.ambiguous.store(true, Ordering::Relaxed);
            }
            return Poll::Ready(Ok(()));
        }
        self.phase.found(DRAINED);
        ready!(self.poll_expired(cx));
        self.expired = true;
        self.phase.found(ENDING);
        self.instead = raw(Reason::HeadTimeout);
        // Best effort: a client that does not read cannot keep the connection open.
        let _ = self.poll_instead(cx).is_ready() && Pin::new(&mut self.io).poll_flush(cx).is_ready();
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Guarded {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.poll_instead(cx))?;
        if self.replaces(buf) {
            return Poll::Ready(Ok(buf.len()));
        }
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_instead(cx))?;
        if let [buf] = bufs
            && self.replaces(buf)
        {
            return Poll::Ready(Ok(buf.len()));
        }
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_instead(cx))?;
        ready!(Pin::new(&mut self.io).poll_flush(cx))?;
        self.phase.found(FLUSHED);
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.phase.0.detached.load(Ordering::Relaxed) {
            return Poll::Ready(Ok(()));
        }
        self.phase.found(ENDING);
        ready!(self.poll_instead(cx))?;
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use ::http::{Request, Response};
    use hyper::service::service_fn;
    use hyper_util::rt::TokioIo;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;
    use crate::testing::{listen, read_message, run, within};

    /// A server whose exchanges take longer than a head may.
    async fn server(limit: Duration) -> TcpStream {
        let (listener, address) = listen().await;
        tokio::task::spawn_local(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let phase = Phase::default();
            let io = TokioIo::new(Guarded::new(stream.into(), phase.clone(), limit));
            let service = service_fn(move |_: Request<hyper::body::Incoming>| {
                let mark = phase.exchange();
                async move {
                    tokio::time::sleep(limit * 3).await;
                    drop(mark);
                    Ok::<_, Infallible>(Response::new(String::from("late")))
                }
            });
            let serving =
                hyper::server::conn::http1::Builder::new().header_read_timeout(None).serve_connection(io, service);
            serving.await.unwrap_or_default();
        });
        TcpStream::connect(address).await.unwrap()
    }

    async fn rest(mut stream: TcpStream) -> String {
        let mut text = String::new();
        within(stream.read_to_string(&mut text)).await.unwrap();
        text
    }

    #[test]
    fn a_slow_head_is_told_so() {
        run(async {
            let mut stream = server(Duration::from_millis(20)).await;
            stream.write_all(b"GET / HTTP/1.1\r\nhost: rev").await.unwrap();
            let response = rest(stream).await;
            assert!(response.starts_with("HTTP/1.1 408 "), "{response}");
            assert!(response.contains("x-outrigger-reason: head-timeout\r\n"), "{response}");
        });
    }

    #[test]
    fn an_exchange_may_take_longer_than_a_head() {
        run(async {
            let mut stream = server(Duration::from_millis(20)).await;
            stream.write_all(b"GET / HTTP/1.1\r\nhost: reviews\r\n\r\n").await.unwrap();
            let response = within(read_message(&mut stream)).await.unwrap();
            assert!(response.starts_with("HTTP/1.1 200 ") && response.contains("late"), "{response}");
        });
    }
}
