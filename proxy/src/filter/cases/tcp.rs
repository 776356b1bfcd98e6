//! A TCP connection through a chain, without sockets: the proxy's own driver between a client and an upstream that a case plays.

#[cfg(test)]
mod tests;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use outrigger_core::reason::Reason;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use super::model::{Chunk, Tcp, TcpState};
use super::observe::SeenTcp;
use crate::filter::{Chain, Filters, StreamInfo};
use crate::tcp::IDLE;
use crate::tcp::filtered::{Filtered, reason};

/// One that began, and may be over.
pub(super) struct Connection {
    chain: Chain,
    client: End,
    upstream: End,
    fate: Rc<Fate>,
    carrying: Option<JoinHandle<()>>,
}

/// What becomes of it.
#[derive(Default)]
struct Fate {
    state: Cell<TcpState>,
    /// Why filters failed
    failure: RefCell<Option<String>>,
    /// Ends it
    cut: Notify,
}

impl Connection {
    /// The client has connected.
    pub(super) fn new(filters: Filters, info: StreamInfo) -> Self {
        let chain = Chain::tcp(filters, info);
        let (client, upstream, fate) = (End::default(), End::default(), Rc::<Fate>::default());
        let carrying = carry(chain.clone(), client.clone(), upstream.clone(), Rc::clone(&fate));
        let carrying = Some(tokio::task::spawn_local(carrying));
        Self { chain, client, upstream, fate, carrying }
    }

    pub(super) fn chain(&self) -> &Chain {
        &self.chain
    }

    /// Has both sides send what a step says; it goes on its way as the proxy reads it.
    pub(super) fn send(&self, tcp: &Tcp) {
        self.client.send(&tcp.client, tcp.client_end);
        self.upstream.send(&tcp.upstream, tcp.upstream_end);
    }

    /// What is seen of it by now; the bytes, since they were taken last.
    pub(super) fn seen(&self) -> SeenTcp {
        let (client, upstream) = (self.client.0.borrow(), self.upstream.0.borrow());
        SeenTcp {
            state: self.fate.state.get(),
            upstream: upstream.came.clone(),
            client: client.came.clone(),
            upstream_end: upstream.told_end,
            client_end: client.told_end,
        }
    }

    /// The same, at the end of a step.
    pub(super) fn take(&self) -> SeenTcp {
        let seen = self.seen();
        for end in [&self.client, &self.upstream] {
            end.0.borrow_mut().came.clear();
        }
        seen
    }

    /// Nothing more happens on it.
    pub(super) fn is_over(&self) -> bool {
        self.carrying.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Why filters failed, once.
    pub(super) fn failure(&self) -> Option<String> {
        self.fate.failure.take()
    }

    /// Cuts it, if it is not over.
    pub(super) async fn cut(&mut self) {
        self.fate.cut.notify_one();
        if let Some(carrying) = self.carrying.take() {
            // One that panics has been told already.
            let _ = carrying.await;
        }
    }
}

/// As the proxy does it: the filters let the client in, the upstream is connected to, bytes are carried until the end.
async fn carry(chain: Chain, mut client: End, upstream: End, fate: Rc<Fate>) {
    let mut filtered = Filtered::new(chain);
    let whole = async {
        let admitted = filtered.admit(&mut client, IDLE).await;
        admitted.map_err(|(reason, detail)| (reason.unwrap_or(Reason::FilterFailed), detail))?;
        fate.state.set(TcpState::Open);
        filtered.connected_to(Some(([127, 0, 0, 1], 8080).into()));
        match filtered.carry(client, upstream, IDLE, |_| {}).await {
            Ok(None) => Ok(()),
            Ok(Some(stop)) => Err(reason(stop)),
            Err(error) => Err((Reason::FilterFailed, error.to_string())),
        }
    };
    tokio::select! {
        ended = Box::pin(whole) => match ended {
            Ok(()) => fate.state.set(TcpState::Ended),
            Err((reason, detail)) => {
                fate.state.set(TcpState::of(reason));
                fate.failure.replace(Some(detail).filter(|_| reason == Reason::FilterFailed));
            }
        },
        () = fate.cut.notified() => {}
    }
}

/// A side of a connection: what it sends is read by the proxy a chunk at a time, what the proxy writes is noted.
#[derive(Clone, Default)]
struct End(Rc<RefCell<Wire>>);

#[derive(Default)]
struct Wire {
    /// Not read yet
    sent: VecDeque<Bytes>,
    /// Nothing follows it
    end: bool,
    reader: Option<Waker>,
    came: Vec<u8>,
    /// The proxy has nothing more to write
    told_end: bool,
}

impl End {
    fn send(&self, chunks: &[Chunk], end: bool) {
        let mut wire = self.0.borrow_mut();
        // One without bytes would be read as the end.
        wire.sent.extend(chunks.iter().map(|chunk| Bytes::from(chunk.bytes())).filter(|bytes| !bytes.is_empty()));
        wire.end |= end;
        if let Some(reader) = wire.reader.take() {
            reader.wake();
        }
    }
}

impl AsyncRead for End {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut wire = self.0.borrow_mut();
        let Some(mut chunk) = wire.sent.pop_front() else {
            if wire.end {
                return Poll::Ready(Ok(()));
            }
            wire.reader = Some(cx.waker().clone());
            return Poll::Pending;
        };
        buf.put_slice(&chunk.split_to(chunk.len().min(buf.remaining())));
        if !chunk.is_empty() {
            wire.sent.push_front(chunk);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for End {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.0.borrow_mut().came.extend_from_slice(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.borrow_mut().told_end = true;
        Poll::Ready(Ok(()))
    }
}
