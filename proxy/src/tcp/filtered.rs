//! Opaque streams through filters.

#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use outrigger_core::first::Speaker;
use outrigger_core::reason::Reason;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

use crate::copy::Passed;
use crate::filter::{Chain, ConnectionFacts, Flow, Frame, Peer as Who, Stop};
use crate::http::connection_id;
use crate::tls::Peer;
use crate::worker::Worker;

/// Bytes read at once.
const READ: usize = 64 * 1024;

thread_local! {
    /// One buffer for all connections of a worker: filters get copies.
    static SHARED: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ].into_boxed_slice());
}

/// What filters may know of an opaque connection.
#[derive(Debug)]
pub(super) struct Facts {
    pub(super) inbound: bool,
    pub(super) client: SocketAddr,
    pub(super) destination: Option<SocketAddr>,
    pub(super) peer: Option<Arc<Peer>>,
    pub(super) worker: Rc<Worker>,
    id: u64,
}

impl Facts {
    pub(super) fn new(
        worker: &Rc<Worker>,
        inbound: bool,
        (client, destination): (SocketAddr, Option<SocketAddr>),
        peer: Option<Arc<Peer>>,
    ) -> Self {
        Self { inbound, client, destination, peer, worker: worker.clone(), id: connection_id() }
    }
}

impl ConnectionFacts for Facts {
    fn inbound(&self) -> bool {
        self.inbound
    }

    fn source(&self) -> Option<SocketAddr> {
        Some(self.client)
    }

    fn destination(&self) -> Option<SocketAddr> {
        self.destination
    }

    fn peer_identity(&self) -> Option<&str> {
        self.peer.as_ref().map(|peer| peer.identity.as_str())
    }

    fn local_identity(&self) -> Option<String> {
        self.peer.as_ref()?;
        self.worker.proxy.identity.current().map(|identity| identity.spiffe().as_str().to_owned())
    }

    fn server_name(&self) -> Option<&str> {
        None
    }

    fn id(&self) -> u64 {
        self.id
    }

    #[allow(clippy::misnamed_getters, reason = "labels name the workload twice: alone, and with its namespace")]
    fn workload(&self) -> &str {
        &self.worker.labels.name
    }

    fn namespace(&self) -> &str {
        &self.worker.labels.namespace
    }
}

/// The filters of one connection, and how far the client's side has come.
#[derive(Debug)]
pub(crate) struct Filtered {
    chain: Chain,
    up: Half,
    down: Half,
}

#[derive(Debug, Default)]
struct Half {
    /// Out of the chain, but not yet taken by the other side
    rest: Bytes,
    /// Nothing more comes in
    ended: bool,
    /// Nothing more comes out of the chain
    through: bool,
    closed: bool,
    bytes: u64,
}

/// Why filters end a connection.
pub(crate) fn reason(stop: Stop) -> (Reason, String) {
    match stop {
        Stop::Failed(failed) => (Reason::FilterFailed, format!("filter {}: {}", failed.filter, failed.reason)),
        Stop::TooLarge(Flow::Request) => (Reason::FilterRequestTooLarge, String::new()),
        Stop::TooLarge(Flow::Response) => (Reason::FilterResponseTooLarge, String::new()),
        Stop::Reset | Stop::Local => (Reason::FilterResponse, "a filter closed the connection".to_owned()),
    }
}

/// Reads once and gives it to the filters. Ready: something came, the end included.
fn poll_read(
    chain: &Chain,
    flow: Flow,
    half: &mut Half,
    from: &mut (impl AsyncRead + Unpin),
    cx: &mut Context<'_>,
) -> Poll<io::Result<()>> {
    let bytes = SHARED.with_borrow_mut(|shared| {
        let mut buf = ReadBuf::new(shared);
        ready!(Pin::new(from).poll_read(cx, &mut buf))?;
        Poll::Ready(io::Result::Ok(Bytes::copy_from_slice(buf.filled())))
    });
    let bytes = ready!(bytes);
    // A side that breaks is gone as well.
    half.ended = bytes.as_ref().map_or(true, Bytes::is_empty);
    let result = bytes.map(|bytes| {
        half.bytes += bytes.len() as u64;
        chain.data(flow, bytes, half.ended);
    });
    if half.ended && flow == Flow::Response {
        // As Envoy tells it, which does not know who ended it either.
        chain.closed(flow, Who::Unknown);
    }
    Poll::Ready(result)
}

impl Filtered {
    pub(crate) fn new(chain: Chain) -> Self {
        Self { chain, up: Half::default(), down: Half::default() }
    }

    /// Waits until every filter has let the new connection in; meanwhile the client's first bytes gather in them. An error is why not: no
    /// reason where that is the client's doing.
    pub(crate) async fn admit(
        &mut self,
        client: &mut (impl AsyncRead + Unpin),
        idle: Duration,
    ) -> Result<(), (Option<Reason>, String)> {
        self.chain.connected();
        let admitted = std::future::poll_fn(|cx| {
            loop {
                self.chain.settle();
                if let Some(stop) = self.chain.stop() {
                    let (reason, detail) = reason(stop);
                    return Poll::Ready(Err((Some(reason), detail)));
                }
                if self.chain.take_connected() {
                    return Poll::Ready(Ok(()));
                }
                register(&self.chain, cx);
                if self.up.ended || !self.chain.wants(Flow::Request) {
                    return Poll::Pending;
                }
                if let Err(error) = ready!(poll_read(&self.chain, Flow::Request, &mut self.up, client, cx)) {
                    return Poll::Ready(Err((None, format!("the client went away: {error}"))));
                }
            }
        });
        let late = || Err((Some(Reason::FilterFailed), "no filter let the connection in".to_owned()));
        tokio::time::timeout(idle, admitted).await.unwrap_or_else(|_| late())
    }

    /// The endpoint that was chosen.
    pub(crate) fn connected_to(&self, upstream: Option<SocketAddr>) {
        self.chain.info(|info| info.upstream = upstream);
    }

    /// Carries until both sides have ended, one has broken, a filter ends it, or nothing passed for `idle`. `heard` is told once who spoke first.
    pub(crate) async fn carry<A, B>(
        &mut self,
        client: A,
        server: B,
        idle: Duration,
        heard: impl FnMut(Speaker) + Unpin,
    ) -> io::Result<Option<Stop>>
    where
        A: AsyncRead + AsyncWrite + Unpin,
        B: AsyncRead + AsyncWrite + Unpin,
    {
        let timer = Box::pin(tokio::time::sleep(idle));
        let mut carrying =
            Carrying { filtered: self, client, server, idle, timer, active: Instant::now(), heard: Some(heard) };
        std::future::poll_fn(|cx| carrying.poll(cx)).await
    }

    /// What has come from both sides by now.
    pub(super) fn passed(&self) -> Passed {
        Passed { sent: self.up.bytes, received: self.down.bytes, spliced: 0 }
    }
}

impl Drop for Filtered {
    fn drop(&mut self) {
        self.chain.closed(Flow::Request, if self.up.ended { Who::Remote } else { Who::Local });
        self.chain.done();
    }
}

fn register(chain: &Chain, cx: &Context<'_>) {
    chain.register(Flow::Request, cx.waker());
    chain.register(Flow::Response, cx.waker());
    chain.register_stop(cx.waker());
}

struct Carrying<'a, A, B, F> {
    filtered: &'a mut Filtered,
    client: A,
    server: B,
    idle: Duration,
    timer: Pin<Box<Sleep>>,
    active: Instant,
    /// Told once who spoke first
    heard: Option<F>,
}

impl<A, B, F> Carrying<'_, A, B, F>
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
    F: FnMut(Speaker) + Unpin,
{
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Stop>>> {
        let Filtered { chain, up, down } = &mut *self.filtered;
        chain.settle();
        register(chain, cx);
        let mut moved = false;
        let sending = up.poll(chain, Flow::Request, &mut self.client, &mut self.server, cx, &mut moved);
        let receiving = down.poll(chain, Flow::Response, &mut self.server, &mut self.client, cx, &mut moved);
        if moved && let Some(mut heard) = self.heard.take() {
            heard(if up.bytes > 0 { Speaker::Client } else { Speaker::Server });
        }
        if let Some(stop) = chain.stop() {
            // What the filters let go before is the client's; it is not waited for.
            let _ = down.poll_out(chain, Flow::Response, &mut self.client, cx, &mut moved);
            return Poll::Ready(Ok(Some(stop)));
        }
        match (sending, receiving) {
            (Poll::Ready(Err(error)), _) | (_, Poll::Ready(Err(error))) => {
                return Poll::Ready(Err(error));
            }
            (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => return Poll::Ready(Ok(None)),
            _ => {}
        }
        if moved {
            self.active = Instant::now();
        }
        while self.timer.as_mut().poll(cx).is_ready() {
            let deadline = self.active + self.idle;
            if Instant::now() >= deadline {
                return Poll::Ready(Ok(None));
            }
            self.timer.as_mut().reset(deadline);
        }
        Poll::Pending
    }
}

impl Half {
    fn poll<R, W>(
        &mut self,
        chain: &Chain,
        flow: Flow,
        from: &mut R,
        to: &mut W,
        cx: &mut Context<'_>,
        moved: &mut bool,
    ) -> Poll<io::Result<()>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        loop {
            ready!(self.poll_out(chain, flow, to, cx, moved))?;
            if self.closed {
                return Poll::Ready(Ok(()));
            }
            let reading = !self.ended && chain.wants(flow) && !chain.stopped();
            if !reading || poll_read(chain, flow, self, from, cx)?.is_pending() {
                ready!(Pin::new(&mut *to).poll_flush(cx))?;
                return Poll::Pending;
            }
            *moved = true;
        }
    }

    /// Writes what has come out of the chain, its end included. Ready: there is nothing more of it for now.
    fn poll_out<W: AsyncWrite + Unpin>(
        &mut self,
        chain: &Chain,
        flow: Flow,
        to: &mut W,
        cx: &mut Context<'_>,
        moved: &mut bool,
    ) -> Poll<io::Result<()>> {
        loop {
            while !self.rest.is_empty() {
                let n = ready!(Pin::new(&mut *to).poll_write(cx, &self.rest))?;
                self.rest.advance(written(n)?);
                *moved = true;
            }
            if self.through {
                if !self.closed {
                    ready!(Pin::new(&mut *to).poll_shutdown(cx))?;
                    self.closed = true;
                }
                return Poll::Ready(Ok(()));
            }
            match chain.next(flow) {
                Some(Frame::Data(bytes)) => self.rest = bytes,
                Some(Frame::End | Frame::Trailers(_)) => self.through = true,
                None => return Poll::Ready(Ok(())),
            }
        }
    }
}

fn written(n: usize) -> io::Result<usize> {
    if n == 0 { Err(io::ErrorKind::WriteZero.into()) } else { Ok(n) }
}
