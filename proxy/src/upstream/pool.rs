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
use hyper::client::conn::http1;
use outrigger_core::balance::Endpoint;
use outrigger_core::breaker::Permit;
use tokio::sync::Notify;

use super::Cluster;
use super::connect::{self, ConnectError, Link, Target, Wire};
use super::received::Received;
use super::streams::{self, STREAMS};
use crate::http::RequestBody;
use crate::metrics::Local;
use crate::state::Proxy;
use crate::tls::Peer;

/// Connections that one worker keeps idle per endpoint.
const MAX_IDLE: usize = 256;
/// How often idle connections are looked at.
const SWEEP: Duration = Duration::from_secs(5);

/// All pools of one worker. Clones are handles.
#[derive(Debug, Clone)]
pub struct Pools {
    by_target: Rc<RefCell<ByTarget>>,
    proxy: Arc<Proxy>,
    metrics: Local,
    sweeping: Rc<Cell<bool>>,
}

type ByTarget = HashMap<PoolKey, Rc<Pool>, foldhash::fast::RandomState>;

/// An endpoint by its place in memory (its pool keeps it there), or an address that is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum PoolKey {
    Endpoint(usize, Wire),
    Address(SocketAddr, Wire),
}

impl PoolKey {
    fn of(target: &Target) -> Self {
        match &target.endpoint {
            Some(endpoint) => Self::Endpoint(Arc::as_ptr(endpoint).addr(), target.wire),
            None => Self::Address(target.address, target.wire),
        }
    }
}

/// The connections to one endpoint.
#[derive(Debug, Default)]
struct Pool {
    idle: RefCell<Vec<Idle>>,
    shared: RefCell<Vec<Rc<SharedConnection>>>,
    connecting: RefCell<Option<Connecting>>,
    /// Live HTTP/1 and HTTP/2 connections.
    open: Cell<usize>,
    /// Something was given back, closed, or finished connecting.
    changed: Notify,
    used: Cell<Option<Instant>>,
    /// Used since it was last looked at: a request reads no clock for that.
    touched: Cell<bool>,
    /// Rises when the peer's certificate or its root is no longer good: what is older is not used again.
    generation: Cell<u64>,
    /// How long a connection is kept without a request.
    timeout: Cell<Duration>,
    /// Keeps the endpoint where the pool's key says it is.
    _endpoint: Option<Arc<Endpoint>>,
    cluster: Option<Arc<Cluster>>,
}

type Connecting = Shared<LocalBoxFuture<'static, Result<(), ConnectError>>>;

#[derive(Debug)]
struct Idle {
    sender: http1::SendRequest<RequestBody>,
    /// What the connection holds goes when it ends, not when somebody looks.
    link: Weak<Link>,
    since: Instant,
}

#[derive(Debug)]
struct SharedConnection {
    sender: SendRequest<Bytes>,
    streams: streams::Open,
    since: Cell<Instant>,
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
        Self { by_target: Rc::default(), proxy, metrics, sweeping: Rc::default() }
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
        if !self.sweeping.replace(true) {
            self.keep_swept();
        }
        let mut all = self.by_target.borrow_mut();
        let cluster = || target.limits.as_ref().map(|(cluster, _)| cluster.clone());
        let new = || Rc::new(Pool { _endpoint: target.endpoint.clone(), cluster: cluster(), ..Pool::default() });
        let pool = all.entry(PoolKey::of(target)).or_insert_with(new);
        pool.timeout.set(target.idle);
        pool.clone()
    }

    /// Looks after idle connections, in a task that ends with the worker.
    fn keep_swept(&self) {
        let pools = Rc::downgrade(&self.by_target);
        tokio::task::spawn_local(async move {
            loop {
                tokio::time::sleep(SWEEP).await;
                let Some(pools) = pools.upgrade() else { return };
                sweep(&mut pools.borrow_mut(), Instant::now());
            }
        });
    }

    /// Closes every idle connection.
    pub fn clear(&self) {
        for pool in self.by_target.borrow().values() {
            pool.idle.borrow_mut().clear();
            pool.shared.borrow_mut().retain(|shared| shared.streams.get() > 0);
        }
    }
}

/// Closes connections that were idle too long at `now`, and forgets pools that have none.
fn sweep(pools: &mut ByTarget, now: Instant) {
    pools.retain(|_, pool| {
        if pool.touched.replace(false) {
            pool.used.set(Some(now));
        }
        let old = |since: Instant| now.saturating_duration_since(since) >= pool.timeout.get();
        pool.idle.borrow_mut().retain(|idle| !idle.sender.is_closed() && !old(idle.since));
        let in_use = |shared: &Rc<SharedConnection>| shared.streams.get() > 0 || !old(shared.since.get());
        pool.shared.borrow_mut().retain(|shared| streams::is_open(&shared.sender) && in_use(shared));
        pool.open.get() > 0 || pool.connecting.borrow().is_some() || !pool.used.get().is_none_or(old)
    });
}

impl Pool {
    fn take_idle(self: &Rc<Self>) -> Option<Lease> {
        let mut idle = self.idle.borrow_mut();
        while let Some(Idle { sender, link, .. }) = idle.pop() {
            if sender.is_ready()
                && !sender.is_closed()
                && let Some(link) = link.upgrade()
            {
                return Some(Lease::alone(sender, link, self, true));
            }
        }
        None
    }

    fn take_shared(&self) -> Option<Rc<SharedConnection>> {
        let mut shared = self.shared.borrow_mut();
        shared.retain(|connection| streams::is_open(&connection.sender));
        shared.iter().find(|connection| connection.has_room()).cloned()
    }

    /// Resolves when nothing that this peer proved holds any longer; new requests then get new connections.
    async fn ended(self: Rc<Self>, link: Rc<Link>, proxy: Arc<Proxy>) {
        match link.peer() {
            Some(peer) => peer.ended(&proxy.identity).await,
            None => std::future::pending().await,
        };
        self.generation.set(self.generation.get() + 1);
        self.idle.borrow_mut().clear();
        // Streams that run keep theirs.
        self.shared.borrow_mut().clear();
    }

    fn give_back(&self, sender: http1::SendRequest<RequestBody>, link: &Rc<Link>, generation: u64, now: Instant) {
        if generation != self.generation.get() {
            return;
        }
        // Another worker waits at the limit of connections: what is not needed here is closed.
        let wanted = self.cluster.as_ref().is_some_and(|cluster| cluster.breaker.is_wanted());
        let mut idle = self.idle.borrow_mut();
        if idle.len() < MAX_IDLE && (idle.is_empty() || !wanted) {
            idle.push(Idle { sender, link: Rc::downgrade(link), since: now });
        }
        drop(idle);
        self.changed.notify_one();
    }
}

/// Counts a live connection for as long as its task runs.
struct Open(Rc<Pool>);

impl Open {
    fn new(pool: &Rc<Pool>) -> Self {
        pool.open.set(pool.open.get() + 1);
        Self(pool.clone())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.set(self.0.open.get() - 1);
        self.0.changed.notify_one();
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
            pool.changed.notified().await;
            if let Some(lease) = pool.take_idle() {
                return Ok(lease);
            }
            continue;
        };
        let open = Open::new(&pool);
        let opened = connect::open(target, permit, &pools.proxy, &pools.metrics).await?;
        let link = Rc::new(opened.link);
        let ended = pool.clone().ended(link.clone(), pools.proxy.clone());
        let sender = connect::http1(opened.io, (link.clone(), open), ended).await?;
        return Ok(Lease::alone(sender, link, &pool, false));
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
            pool.changed.notified().await;
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
}

/// An HTTP/1 connection.
#[derive(Debug)]
struct Alone {
    sender: http1::SendRequest<RequestBody>,
    link: Rc<Link>,
    pool: Rc<Pool>,
    generation: u64,
}

/// A request that got no response.
#[derive(Debug)]
pub struct SendError {
    /// The request, where hyper knows that nothing of it was sent
    pub unsent: Option<Request<RequestBody>>,
    /// Why
    pub error: WireError,
}

/// What went wrong on a connection.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// HTTP/1
    #[error(transparent)]
    Http1(#[from] hyper::Error),
    /// HTTP/2
    #[error(transparent)]
    Http2(#[from] h2::Error),
    /// The connection ended before it was used
    #[error("the connection was closed")]
    Closed,
}

impl Lease {
    fn alone(sender: http1::SendRequest<RequestBody>, link: Rc<Link>, pool: &Rc<Pool>, reused: bool) -> Self {
        let alone = Alone { sender, link, pool: pool.clone(), generation: pool.generation.get() };
        Self { kind: Kind::Http1(alone), reused }
    }

    fn shared(connection: Rc<SharedConnection>, pool: &Rc<Pool>, reused: bool) -> Self {
        connection.streams.set(connection.streams.get() + 1);
        Self { kind: Kind::Http2(Stream { connection, pool: pool.clone() }), reused }
    }

    /// Who proved to be at the other end of a connection that was upgraded.
    pub(crate) fn peer(&self) -> Option<&Peer> {
        match &self.kind {
            Kind::Http1(alone) => alone.link.peer(),
            // hyper upgrades HTTP/1 only; shared connections are looked after by their pool.
            Kind::Http2(_) => None,
        }
    }

    /// Sends one request and waits for the head of its response.
    ///
    /// # Errors
    /// When no response came.
    pub async fn send(&mut self, request: Request<RequestBody>) -> Result<Response<Received>, SendError> {
        match &mut self.kind {
            Kind::Http1(alone) => match alone.sender.try_send_request(request).await {
                Ok(response) => Ok(response.map(Received::Http1)),
                Err(mut error) => Err(SendError { unsent: error.take_message(), error: error.into_error().into() }),
            },
            Kind::Http2(stream) => streams::send(&stream.connection.sender, request).await,
        }
    }

    /// The response's body has ended at `now`: the connection may serve another request.
    pub fn give_back(self, now: Instant) {
        let Kind::Http1(Alone { mut sender, link, pool, generation }) = self.kind else { return };
        if sender.is_closed() {
            return;
        }
        if sender.is_ready() {
            return pool.give_back(sender, &link, generation, now);
        }
        // The request's body may still be on its way up.
        tokio::task::spawn_local(async move {
            if sender.ready().await.is_ok() {
                pool.give_back(sender, &link, generation, Instant::now());
            }
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
