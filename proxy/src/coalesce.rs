//! One write for all that a connection's task has to say in one poll.
//!
//! h2 flushes after every DATA frame that is not small, so that a connection with many streams makes a system call, and a
//! TLS record, for each of them. Here its bytes are staged, and leave when the task that drives the connection has been
//! polled: [`Flusher::around`] that task is what sends them.

use std::cell::{Cell, RefCell};
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::io::Io;

/// Bytes staged before they are written even so: two records of TLS.
const MOST: usize = 32 * 1024;
/// Buffers that a worker keeps for whoever stages next.
const SPARE: usize = 4;

thread_local! {
    /// A connection has a buffer only while something is staged.
    static BUFFERS: Cell<Vec<Vec<u8>>> = const { Cell::new(Vec::new()) };
}

/// A connection whose writes are staged. Reads pass.
#[derive(Debug)]
pub(crate) struct Coalesced(Rc<RefCell<Staged>>);

/// Sends what a [`Coalesced`] has staged.
#[derive(Debug, Clone)]
pub(crate) struct Flusher(Rc<RefCell<Staged>>);

#[derive(Debug)]
struct Staged {
    io: Io,
    bytes: Vec<u8>,
    /// Of `bytes`: written already
    written: usize,
    /// The stream below has taken bytes since it was last flushed.
    unflushed: bool,
    /// Writing failed between two polls of the connection: it learns so from its next read or write.
    failed: Option<io::Error>,
}

/// Stages the writes on `io` until the flusher sends them.
pub(crate) fn coalesce(io: Io) -> (Coalesced, Flusher) {
    let staged = Staged { io, bytes: Vec::new(), written: 0, unflushed: false, failed: None };
    let staged = Rc::new(RefCell::new(staged));
    (Coalesced(staged.clone()), Flusher(staged))
}

impl Flusher {
    /// Polls the connection's task, and after each poll sends what it staged. No other task may poll the connection: the one
    /// that does is woken when the socket takes more.
    pub(crate) async fn around<F: Future>(self, connection: F) -> F::Output {
        let mut connection = std::pin::pin!(connection);
        std::future::poll_fn(|cx| {
            let polled = connection.as_mut().poll(cx);
            let mut staged = self.0.borrow_mut();
            if staged.failed.is_none()
                && let Poll::Ready(Err(error)) = staged.poll_flush(cx)
            {
                staged.failed = Some(error);
                cx.waker().wake_by_ref();
            }
            polled
        })
        .await
    }
}

impl Staged {
    fn failure(&mut self) -> io::Result<()> {
        self.failed.take().map_or(Ok(()), Err)
    }

    fn stage(&mut self, bytes: &[u8]) {
        if self.bytes.capacity() == 0 {
            let spare = BUFFERS.with(|buffers| {
                let mut all = buffers.take();
                let spare = all.pop();
                buffers.set(all);
                spare
            });
            self.bytes = spare.unwrap_or_else(|| Vec::with_capacity(MOST));
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// Writes what is staged, and gives the buffer back.
    fn poll_write_out(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.written < self.bytes.len() {
            let n = ready!(Pin::new(&mut self.io).poll_write(cx, &self.bytes[self.written..]))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written += n;
            self.unflushed = true;
        }
        if self.bytes.capacity() > 0 {
            let mut buffer = std::mem::take(&mut self.bytes);
            buffer.clear();
            self.written = 0;
            BUFFERS.with(|buffers| {
                let mut all = buffers.take();
                if all.len() < SPARE {
                    all.push(buffer);
                }
                buffers.set(all);
            });
        }
        Poll::Ready(Ok(()))
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_write_out(cx))?;
        if self.unflushed {
            ready!(Pin::new(&mut self.io).poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        self.failure()?;
        let wanted: usize = bufs.iter().map(|buf| buf.len()).sum();
        if self.bytes.len() + wanted <= MOST {
            bufs.iter().for_each(|buf| self.stage(buf));
            return Poll::Ready(Ok(wanted));
        }
        ready!(self.poll_write_out(cx))?;
        if wanted <= MOST {
            bufs.iter().for_each(|buf| self.stage(buf));
            return Poll::Ready(Ok(wanted));
        }
        let n = ready!(Pin::new(&mut self.io).poll_write_vectored(cx, bufs))?;
        self.unflushed = true;
        Poll::Ready(Ok(n))
    }
}

impl AsyncRead for Coalesced {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut staged = self.0.borrow_mut();
        staged.failure()?;
        Pin::new(&mut staged.io).poll_read(cx, buf)
    }
}

impl AsyncWrite for Coalesced {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.0.borrow_mut().poll_write(cx, &[io::IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.0.borrow_mut().poll_write(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Nothing yet: the flusher does it.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut staged = self.0.borrow_mut();
        ready!(staged.poll_flush(cx))?;
        Pin::new(&mut staged.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;
    use crate::testing::{listen, run, within};

    async fn pair() -> (TcpStream, TcpStream) {
        let (listener, address) = listen().await;
        let client = TcpStream::connect(address).await.unwrap();
        (client, listener.accept().await.unwrap().0)
    }

    #[test]
    fn what_one_poll_writes_leaves_together_after_it() {
        run(async {
            let (mut far, near) = pair().await;
            let (mut io, flusher) = coalesce(near.into());
            let mut nothing = [0; 1];
            let driven = flusher.around(async {
                for _ in 0..3 {
                    io.write_all(b"frame ").await.unwrap();
                    io.flush().await.unwrap();
                }
                assert_eq!(far.try_read(&mut nothing).unwrap_err().kind(), io::ErrorKind::WouldBlock);
                tokio::task::yield_now().await;
                let mut bytes = [0; 18];
                within(far.read_exact(&mut bytes)).await.unwrap();
                assert_eq!(&bytes, b"frame frame frame ");
            });
            driven.await;
        });
    }

    #[test]
    fn more_than_the_socket_takes_arrives_whole_and_in_order() {
        run(async {
            let (mut far, near) = pair().await;
            let (mut io, flusher) = coalesce(near.into());
            let sent: Vec<u8> = (0..4_000_000_u32).map(|n| u8::try_from(n % 251).unwrap()).collect();
            let expected = sent.clone();
            tokio::task::spawn_local(flusher.around(async move {
                for chunk in sent.chunks(9_999) {
                    io.write_all(chunk).await.unwrap();
                }
                io.shutdown().await.unwrap();
            }));
            let mut got = Vec::new();
            within(far.read_to_end(&mut got)).await.unwrap();
            assert!(got == expected, "{} of {} bytes", got.len(), expected.len());
        });
    }

    #[test]
    fn a_write_that_fails_between_polls_ends_the_next_read() {
        run(async {
            let (far, near) = pair().await;
            let (mut io, flusher) = coalesce(near.into());
            socket2::SockRef::from(&far).set_linger(Some(std::time::Duration::ZERO)).unwrap();
            drop(far);
            let driven = flusher.around(async {
                let mut bytes = [0; 1];
                loop {
                    io.write_all(b"to nobody").await?;
                    tokio::task::yield_now().await;
                    io.read_exact(&mut bytes).await?;
                }
            });
            let ended: io::Result<()> = within(driven).await;
            ended.unwrap_err();
        });
    }
}
