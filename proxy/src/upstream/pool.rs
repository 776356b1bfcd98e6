//! Connections to endpoints, per worker: HTTP/1 ones are lent out one request at a time, the last used first;
//! HTTP/2 ones are shared.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ::http::{Request, Response};
use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::{LocalBoxFuture, Shared};
use h2::client::SendRequest;
use outrigger_core::balance::Endpoint;
use outrigger_core::breaker::Permit;
use outrigger_core::spiffe::SpiffeId;
use tokio::sync::Notify;

use super::Cluster;
use super::connect::{self, ConnectError, Link, Security, Target, Wire};
use super::http1::{self, Connection, Failed, Head};
use super::received::Received;
use super::streams::{self, STREAMS};
use super::sweep::{Sweep, sweep};
use crate::http::RequestBody;
use crate::io::Io;
use crate::metrics::Local;
use crate::state::Proxy;
use crate::tls::Peer;

/// Connections that one worker keeps idle per endpoint: as many as may be open to a backend unless its policy says otherwise. Fewer
/// would have hundreds of concurrent requests connect anew all the time.
const MAX_IDLE: usize = 1024;

/// Between two looks of a request that waits for a connection.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// All pools of one worker. Clones are handles.
#[derive(Debug, Clone)]
pub struct Pools {
    by_target: Rc<RefCell<ByTarget>>,
    proxy: Arc<Proxy>,
    metrics: Local,
    sweep: Rc<Sweep>,
}

pub(super) type ByTarget = HashMap<PoolKey, Rc<Pool>, foldhash::fast::RandomState>;

/// An endpoint by its place in memory (its pool keeps it there), or an address that is none.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum PoolKey {
    Endpoint(usize, Wire),
    /// With the identity that its connections have proved: what an address is may change
    Address(SocketAddr, Wire, Option<SpiffeId>),
}

impl PoolKey {
    fn of(target: &Target) -> Self {
        match &target.endpoint {
            Some(endpoint) => Self::Endpoint(Arc::as_ptr(endpoint).addr(), target.wire),
            None => {
                let identity = match &target.security {
                    Security::Plain => None,
                    Security::Mtls { identity, .. } => Some(identity.clone()),
                };
                Self::Address(target.address, target.wire, identity)
            }
        }
    }
}

/// The connections to one endpoint.
#[derive(Debug, Default)]
pub(super) struct Pool {
    pub(super) idle: RefCell<Vec<Idle>>,
    pub(super) shared: RefCell<Vec<Rc<SharedConnection>>>,
    /// HTTP/1 connections over mTLS, idle or not: the sweep sees to the end of their peers' trust
    pub(super) proven: RefCell<Vec<Weak<Connection>>>,
    pub(super) connecting: RefCell<Option<Connecting>>,
    /// Live HTTP/1 and HTTP/2 connections.
    pub(super) open: Cell<usize>,
    /// Something was given back, closed, or finished connecting.
    changed: Notify,
    pub(super) used: Cell<Option<Instant>>,
    /// Used since it was last looked at: a request reads no clock for that.
    pub(super) touched: Cell<bool>,
    /// Rises when the peer's certificate or its root is no longer good: what is older is not used again.
    generation: Cell<u64>,
    /// How long a connection is kept without a request.
    pub(super) timeout: Cell<Duration>,
    /// Keeps the endpoint where the pool's key says it is.
    _endpoint: Option<Arc<Endpoint>>,
    cluster: Option<Arc<Cluster>>,
}

type Connecting = Shared<LocalBoxFuture<'static, Result<(), ConnectError>>>;

#[derive(Debug)]
pub(super) struct Idle {
    pub(super) connection: Rc<Connection>,
    pub(super) since: Instant,
}

#[derive(Debug)]
pub(super) struct SharedConnection {
    pub(super) sender: SendRequest<Bytes>,
    pub(super) streams: streams::Open,
    pub(super) since: Cell<Instant>,
}

impl SharedConnection {
    fn has_room(&self) -> bool {
        // An endpoint that permits none for now is waited for in h2.
        self.streams.get() < STREAMS.min(self.sender.current_max_send_streams().max(1))
    }
}

impl Pools {
    /// No connections.
    pub fn new(proxy: Arc<Proxy>, metrics: Local) -> Self {
        Self { by_target: Rc::default(), proxy, metrics, sweep: Rc::default() }
    }

    /// A connection to the target, idle or new.
    ///
    /// # Errors
    /// Why none could be had.
    pub async fn checkout(&self, target: &Target) -> Result<Lease, ConnectError> {
        let pool = self.pool(target);
        pool.touched.set(true);
        match target.wire {
            Wire::Http2 => checkout_http2(pool, target, self).await,
            Wire::Http1 | Wire::Tcp => checkout_http1(pool, target, self).await,
        }
    }

    fn pool(&self, target: &Target) -> Rc<Pool> {
        if self.sweep.begin() {
            let store = self.proxy.identity.clone();
            tokio::task::spawn_local(sweep(Rc::downgrade(&self.by_target), self.sweep.clone(), store));
        }
        let mut all = self.by_target.borrow_mut();
        let cluster = || target.limits.as_ref().map(|(cluster, _)| cluster.clone());
        let new = || Rc::new(Pool { _endpoint: target.endpoint.clone(), cluster: cluster(), ..Pool::default() });
        let pool = all.entry(PoolKey::of(target)).or_insert_with(new);
        pool.timeout.set(target.idle);
        pool.clone()
    }

    /// Closes every idle connection.
    pub fn clear(&self) {
        for pool in self.by_target.borrow().values() {
            pool.close_idle();
            pool.shared.borrow_mut().retain(|shared| shared.streams.get() > 0);
        }
    }
}

impl Pool {
    /// Waits until something may be different. What another worker gives back is not told here: so look again now and then.
    async fn change(&self) {
        let _ = tokio::time::timeout(LOOK_AGAIN, self.changed.notified()).await;
    }

    fn take_idle(self: &Rc<Self>) -> Option<Lease> {
        loop {
            let Idle { connection, .. } = self.idle.borrow_mut().pop()?;
            if connection.is_quiet() {
                return Some(Lease::alone(connection, self, true));
            }
        }
    }

    fn close_idle(&self) {
        for Idle { connection, .. } in self.idle.take() {
            connection.close();
        }
    }

    /// Nothing that the peer proved holds any longer: new requests get new connections.
    pub(super) fn distrust(&self) {
        self.generation.set(self.generation.get() + 1);
        self.close_idle();
        // Streams that run keep theirs.
        self.shared.borrow_mut().clear();
    }

    fn take_shared(&self) -> Option<Rc<SharedConnection>> {
        let mut shared = self.shared.borrow_mut();
        shared.retain(|connection| streams::is_open(&connection.sender));
        shared.iter().find(|connection| connection.has_room()).cloned()
    }

    /// Resolves when nothing that this peer proved holds any longer.
    async fn ended(self: Rc<Self>, link: Rc<Link>, proxy: Arc<Proxy>) {
        match link.peer() {
            Some(peer) => peer.ended(&proxy.identity).await,
            None => std::future::pending().await,
        };
        self.distrust();
    }

    fn give_back(&self, connection: Rc<Connection>, generation: u64, now: Instant) {
        if !connection.is_reusable() {
            return;
        }
        if generation != self.generation.get() {
            return connection.close();
        }
        // Another worker waits at the limit of connections: what is not needed here is closed.
        let wanted = self.cluster.as_ref().is_some_and(|cluster| cluster.breaker.is_wanted());
        let mut idle = self.idle.borrow_mut();
        if idle.len() < MAX_IDLE && (idle.is_empty() || !wanted) {
            idle.push(Idle { connection, since: now });
        } else {
            connection.close();
        }
        drop(idle);
        self.changed.notify_one();
    }
}

/// Counts a live connection.
#[derive(Debug)]
pub(super) struct Open(Weak<Pool>);

impl Open {
    fn new(pool: &Rc<Pool>) -> Self {
        pool.open.set(pool.open.get() + 1);
        Self(Rc::downgrade(pool))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        // Idle connections may outlive their pool by a moment: they are in it.
        if let Some(pool) = self.0.upgrade() {
            pool.open.set(pool.open.get() - 1);
            pool.changed.notify_one();
        }
    }
}

async fn checkout_http1(pool: Rc<Pool>, target: &Target, pools: &Pools) -> Result<Lease, ConnectError> {
    if let Some(lease) = pool.take_idle() {
        return Ok(lease);
    }
    let _pending = target.pending()?;
    loop {
        // Each worker may have one connection per endpoint whatever the limit, so that no worker starves another.
        let Some(permit) = target.connection(pool.open.get()) else {
            let _wanted = target.want();
            pool.change().await;
            if let Some(lease) = pool.take_idle() {
                return Ok(lease);
            }
            continue;
        };
        let open = Open::new(&pool);
        // Boxed: a handshake's state is kilobytes, and every request's future would be as large.
        let opened = Box::pin(connect::open(target, permit, &pools.proxy, &pools.metrics)).await?;
        let connection = Rc::new(Connection::new(opened.io, opened.link, open));
        if let Some(peer) = connection.link().peer() {
            pool.proven.borrow_mut().push(Rc::downgrade(&connection));
            pools.sweep.due(peer.deadline());
        }
        return Ok(Lease::alone(connection, &pool, false));
    }
}

async fn checkout_http2(pool: Rc<Pool>, target: &Target, pools: &Pools) -> Result<Lease, ConnectError> {
    if let Some(connection) = pool.take_shared() {
        return Ok(Lease::shared(connection, &pool, true));
    }
    let _pending = target.pending()?;
    loop {
        if let Some(connection) = pool.take_shared() {
            return Ok(Lease::shared(connection, &pool, false));
        }
        let running = pool.connecting.borrow().clone();
        if let Some(connecting) = running {
            connecting.await?;
            continue;
        }
        let Some(permit) = target.connection(pool.open.get()) else {
            let _wanted = target.want();
            pool.change().await;
            continue;
        };
        // A task of its own: the requests that wait share its outcome, and none of them takes it away by leaving.
        let task = connect_shared(pool.clone(), target.clone(), pools.clone(), permit);
        let connecting = task.boxed_local().shared();
        *pool.connecting.borrow_mut() = Some(connecting.clone());
        tokio::task::spawn_local(connecting);
    }
}

async fn connect_shared(
    pool: Rc<Pool>,
    target: Target,
    pools: Pools,
    permit: Option<Permit>,
) -> Result<(), ConnectError> {
    let open = Open::new(&pool);
    let streams = streams::Open::default();
    let result = match connect::open(&target, permit, &pools.proxy, &pools.metrics).await {
        Ok(opened) => {
            let link = Rc::new(opened.link);
            let ended = pool.clone().ended(link.clone(), pools.proxy.clone());
            streams::start(opened.io, (link, open), streams.clone(), ended).await
        }
        Err(error) => Err(error),
    };
    *pool.connecting.borrow_mut() = None;
    let sender = result?;
    let connection = SharedConnection { sender, streams, since: Cell::new(Instant::now()) };
    pool.shared.borrow_mut().push(Rc::new(connection));
    // There is room for many of those that wait, not for one only.
    pool.changed.notify_waiters();
    Ok(())
}

/// A connection lent for one request. Dropping it ends the exchange on it: an HTTP/1 connection is closed.
#[derive(Debug)]
pub struct Lease {
    kind: Kind,
    /// The connection was used before: a reset before the response may only mean that it was idle too long.
    pub reused: bool,
}

#[derive(Debug)]
enum Kind {
    Http1(Alone),
    Http2(Stream),
    /// The connection speaks something else now: what it holds
    Switched(Link),
    /// It was given away
    Gone,
}

/// An HTTP/1 connection.
#[derive(Debug)]
struct Alone {
    connection: Rc<Connection>,
    pool: Rc<Pool>,
    generation: u64,
}

/// A request that got no response.
#[derive(Debug)]
pub struct SendError {
    /// The request, where nothing of it was sent
    pub unsent: Option<Request<RequestBody>>,
    /// Why
    pub error: WireError,
}

/// What went wrong on a connection.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// HTTP/1
    #[error(transparent)]
    Http1(#[from] http1::Error),
    /// HTTP/2
    #[error(transparent)]
    Http2(#[from] h2::Error),
    /// The connection ended before it was used
    #[error("the connection was closed")]
    Closed,
}

impl Lease {
    fn alone(connection: Rc<Connection>, pool: &Rc<Pool>, reused: bool) -> Self {
        let alone = Alone { connection, pool: pool.clone(), generation: pool.generation.get() };
        Self { kind: Kind::Http1(alone), reused }
    }

    fn shared(connection: Rc<SharedConnection>, pool: &Rc<Pool>, reused: bool) -> Self {
        connection.streams.set(connection.streams.get() + 1);
        Self { kind: Kind::Http2(Stream { connection, pool: pool.clone() }), reused }
    }

    /// Who proved to be at the other end of a connection that was upgraded.
    pub(crate) fn peer(&self) -> Option<&Peer> {
        match &self.kind {
            Kind::Switched(link) => link.peer(),
            // Others are looked after by their pool.
            Kind::Http1(_) | Kind::Http2(_) | Kind::Gone => None,
        }
    }

    /// Sends one request over HTTP/1 and waits for the head of its response.
    ///
    /// # Errors
    /// When no response came.
    pub async fn send_http1(&mut self, head: &Head<'_>, body: RequestBody) -> Result<Response<Received>, Failed> {
        let Kind::Http1(alone) = &self.kind else {
            return Err(Failed { unsent: Some(body), error: http1::Error::Closed });
        };
        Ok(http1::send(&alone.connection, head, body).await?.map(Received::Http1))
    }

    /// The same over HTTP/2.
    ///
    /// # Errors
    /// When no response came.
    pub async fn send_http2(&mut self, request: Request<RequestBody>) -> Result<Response<Received>, SendError> {
        match &self.kind {
            Kind::Http2(stream) => streams::send(&stream.connection.sender, request).await,
            _ => Err(SendError { unsent: Some(request), error: WireError::Closed }),
        }
    }

    /// The bytes of a connection whose endpoint has switched protocols. `None`: they are not this exchange's alone.
    pub(crate) fn switch(&mut self) -> Option<Io> {
        let Kind::Http1(Alone { connection, .. }) = std::mem::replace(&mut self.kind, Kind::Gone) else { return None };
        let (io, link) = Rc::into_inner(connection)?.into_io();
        self.kind = Kind::Switched(link);
        Some(io)
    }

    /// The response's body has ended at `now`: the connection may serve another request.
    pub fn give_back(self, now: Instant) {
        let Kind::Http1(Alone { connection, pool, generation }) = self.kind else { return };
        let Some(upload) = connection.take_upload() else {
            return pool.give_back(connection, generation, now);
        };
        // The request's body is still on its way up.
        tokio::task::spawn_local(async move {
            upload.finished().await;
            pool.give_back(connection, generation, Instant::now());
        });
    }
}

/// One stream of a shared connection, until it is dropped.
#[derive(Debug)]
struct Stream {
    connection: Rc<SharedConnection>,
    pool: Rc<Pool>,
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.connection.streams.set(self.connection.streams.get() - 1);
        self.connection.since.set(Instant::now());
        self.pool.changed.notify_one();
    }
}
