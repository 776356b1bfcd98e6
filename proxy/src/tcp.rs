//! Opaque streams: where they go, and whether they may. Their bytes are [`crate::copy`]'s.

pub(crate) mod filtered;

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use outrigger_core::authz;
use outrigger_core::balance::{Guard, pick};
use outrigger_core::breaker::Permit;
use outrigger_core::first::Speaker;
use outrigger_core::key::Key;
use outrigger_core::link::{AccessLog, Backend, MtlsMode, OutboundTraffic};
use outrigger_core::outlier::Outcome;
use outrigger_core::reason::Reason;

use self::filtered::{Facts, Filtered};
use crate::copy::{Passed, Relay};
use crate::filter::{Chain, StreamInfo};
use crate::io::Io;
use crate::listen::{Inbound, Outbound};
use crate::log::Entry;
use crate::metrics::Metric;
use crate::snapshot;
use crate::state::Busy;
use crate::tls::{self, Peer};
use crate::upstream::{self, Cluster, Label, Link, Opened, Target, Wire};
use crate::worker::Worker;

/// Without a byte in either direction.
pub(crate) const IDLE: Duration = Duration::from_secs(3600);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Destinations outside the mesh may be far away.
const OUTSIDE_CONNECT: Duration = Duration::from_secs(10);
/// Endpoints that are tried before giving up: nothing was sent to any of them.
const ATTEMPTS: usize = 3;

/// Carries an opaque stream of the own application to where it meant to go.
pub async fn serve_outbound(mut io: Io, info: Outbound, worker: Rc<Worker>) {
    let mut stream = Stream::new(&worker, "outbound", (info.client, info.destination), None);
    let placed = match info.destination {
        Some(destination) => place(&mut stream, &mut io, &worker, destination).await,
        None => Err(Some(Reason::UnknownService)),
    };
    let learn = |speaker| {
        if let Some(destination) = info.destination {
            let mut first = worker.server_first.borrow_mut();
            first.heard(destination, speaker, std::time::Instant::now());
            worker.load.server_first.store(first.remembered(), Ordering::Relaxed);
        }
    };
    stream.carry(io, placed, learn).await;
}

/// Carries an opaque stream of a caller to the own application, if it may.
pub async fn serve_inbound(mut io: Io, info: Inbound, worker: Rc<Worker>) {
    let addresses = (info.client, Some(info.app.address));
    let mut stream = Stream::new(&worker, "inbound", addresses, info.peer.clone());
    let placed = place_inbound(&mut stream, &mut io, &worker, &info).await;
    stream.carry(io, placed, |_| {}).await;
}

/// One stream: counted and logged when it is dropped.
struct Stream<'a> {
    worker: &'a Rc<Worker>,
    way: &'static str,
    client: SocketAddr,
    /// Where it meant to go
    destination: Option<SocketAddr>,
    peer: Option<Arc<Peer>>,
    filtered: Option<Filtered>,
    service: Arc<str>,
    version: Arc<str>,
    upstream: Option<SocketAddr>,
    start: std::time::Instant,
    attempts: u32,
    reason: Option<Reason>,
    detail: String,
    passed: Passed,
    access_log: AccessLog,
    _busy: Busy,
}

/// A connection to the server, and what is held while it lasts.
type Placed = (Opened, Option<Guard>);

async fn place_inbound(
    stream: &mut Stream<'_>,
    client: &mut Io,
    worker: &Worker,
    info: &Inbound,
) -> Result<Placed, Option<Reason>> {
    let snapshot = worker.snapshot();
    let (target, filters) = admit(stream, worker, info, &snapshot)?;
    stream.enter(client, &snapshot, &filters).await?;
    Ok((stream.open(&target, None).await?, None))
}

/// Whether a caller may reach the application, where that is, and the filters on the way.
fn admit(
    stream: &mut Stream<'_>,
    worker: &Worker,
    info: &Inbound,
    snapshot: &snapshot::Snapshot,
) -> Result<(Target, Arc<[String]>), Reason> {
    stream.pin(snapshot);
    let inbound = snapshot.inbound.as_ref().ok_or(Reason::DiscoveryUnavailable)?;
    let port = inbound.port(info.app.address.port()).ok_or(Reason::UnknownPort)?;
    stream.service = match port.services.first() {
        Some(service) => service.clone(),
        None => worker.labels.workload.clone(),
    };
    stream.version = worker.labels.version.clone();
    if port.mtls == MtlsMode::Strict && info.peer.is_none() {
        return Err(Reason::MtlsRequired);
    }
    let connection = authz::Connection { peer: info.identity(), ip: info.client.ip(), port: port.port };
    let verdict = port.authorization.decide_connection(&connection);
    let decision = if verdict.outcome.is_ok() { "allow" } else { "deny" };
    worker.metrics.add(Metric::Authorization, &[decision, verdict.rule.unwrap_or("default")], 1);
    verdict.outcome?;
    let target = Target::plain(info.app.address, Wire::Tcp, CONNECT_TIMEOUT, IDLE, Label::inbound(&stream.service));
    Ok((target, port.stream_filters.clone()))
}

/// Connects to what the application meant.
async fn place(
    stream: &mut Stream<'_>,
    client: &mut Io,
    worker: &Rc<Worker>,
    destination: SocketAddr,
) -> Result<Placed, Option<Reason>> {
    let (snapshot, target) = worker.find(&Key::Ip(destination)).await?;
    stream.pin(&snapshot);
    let target = match target {
        snapshot::Target::Service(service) => {
            stream.service = service.label.clone();
            let port = service.port(Some(destination.port())).ok_or(Reason::UnknownPort)?;
            stream.enter(client, &snapshot, &port.stream_filters).await?;
            let share = port.implicit.backends.first().ok_or(Reason::NoBackend)?;
            let backend = share.backend.as_ref().map_err(|_| Reason::NoBackend)?;
            return Ok(routed(stream, worker, backend).await?);
        }
        snapshot::Target::Workload(workload) => {
            stream.service = workload.endpoint.id.clone();
            stream.version = workload.endpoint.version.clone();
            Target::workload(&workload, |_| Wire::Tcp)
        }
        snapshot::Target::Absent => {
            if snapshot.mesh.as_ref().is_some_and(|mesh| mesh.outbound == OutboundTraffic::RegistryOnly) {
                return Err(Some(Reason::UnknownService));
            }
            stream.service = worker.labels.outside.clone();
            Target::plain(destination, Wire::Tcp, OUTSIDE_CONNECT, IDLE, Label::outbound(&stream.service))
        }
    };
    Ok((stream.open(&target, None).await?, None))
}

/// Connects to an endpoint of a backend; to another where one does not answer.
async fn routed(stream: &mut Stream<'_>, worker: &Rc<Worker>, backend: &Arc<Backend>) -> Result<Placed, Reason> {
    let cluster = worker.proxy.clusters.get(&backend.key);
    let mut tried = Vec::new();
    let mut last = Reason::NoEndpoints;
    for _ in 0..ATTEMPTS {
        let now = std::time::Instant::now();
        let set = cluster.endpoints();
        let picked = pick(&set, backend.policy.algorithm, &tried, now, &mut worker.rng.borrow_mut());
        drop(set);
        let Some(mut guard) = picked.filter(|guard| !tried.iter().any(|tried| tried.is_same(guard.endpoint()))) else {
            return Err(last);
        };
        let target = Target::endpoint(guard.endpoint(), backend, &cluster, Wire::Tcp);
        stream.version = guard.endpoint().info.version.clone();
        // A stream keeps its connection to itself, so there is none to wait for; and the exception by which every worker
        // may have one connection is for those that are shared.
        let permit = target.connection(1).ok_or(Reason::OverflowConnections)?;
        let opened = stream.open(&target, permit).await;
        let now = std::time::Instant::now();
        match opened {
            Ok(opened) => {
                guard.answered(now);
                report(worker, &cluster, backend, &guard, Outcome::Success);
                // How long the stream lasts says nothing of the endpoint.
                guard.settled();
                return Ok((opened, Some(guard)));
            }
            Err(reason) => {
                guard.abandoned(now);
                report(worker, &cluster, backend, &guard, Outcome::Failure);
                tried.push(guard.endpoint().clone());
                last = reason;
            }
        }
    }
    Err(last)
}

fn report(worker: &Worker, cluster: &Cluster, backend: &Backend, guard: &Guard, outcome: Outcome) {
    worker.load.judged.count();
    let set = cluster.endpoints();
    cluster.outlier.record(&backend.policy.outlier, &set, guard, outcome, std::time::Instant::now());
}

impl<'a> Stream<'a> {
    fn new(
        worker: &'a Rc<Worker>,
        way: &'static str,
        (client, destination): (SocketAddr, Option<SocketAddr>),
        peer: Option<Arc<Peer>>,
    ) -> Self {
        Self {
            worker,
            way,
            client,
            destination,
            peer,
            filtered: None,
            service: worker.labels.unknown.clone(),
            version: worker.labels.unknown.clone(),
            upstream: None,
            start: std::time::Instant::now(),
            attempts: 0,
            reason: None,
            detail: String::new(),
            passed: Passed::default(),
            access_log: AccessLog::Errors,
            _busy: Busy::stream(&worker.load, way == "inbound"),
        }
    }

    fn pin(&mut self, snapshot: &snapshot::Snapshot) {
        self.access_log = snapshot.mesh.as_ref().map_or(AccessLog::Errors, |mesh| mesh.access_log);
    }

    /// Lets the connection through the filters of these keys, as far as it is theirs to let in.
    /// An error without a reason: the client went away.
    async fn enter(
        &mut self,
        client: &mut Io,
        snapshot: &snapshot::Snapshot,
        keys: &[String],
    ) -> Result<(), Option<Reason>> {
        if keys.is_empty() {
            return Ok(());
        }
        let filters = snapshot.filters(keys).map_err(|name| {
            self.detail = format!("filter {name} is not ready");
            Reason::FilterFailed
        })?;
        let addresses = (self.client, self.destination);
        let facts = Facts::new(self.worker, self.way == "inbound", addresses, self.peer.clone());
        let mut info = StreamInfo::new(Rc::new(facts), self.start);
        info.service = Some(self.service.clone());
        let filtered = self.filtered.insert(Filtered::new(Chain::tcp(filters, info)));
        Box::pin(filtered.admit(client, IDLE)).await.map_err(|(reason, detail)| {
            self.detail = detail;
            reason
        })
    }

    async fn open(&mut self, target: &Target, permit: Option<Permit>) -> Result<Opened, Reason> {
        self.attempts += 1;
        self.upstream = Some(target.address);
        let opened = upstream::open(target, permit, &self.worker.proxy, &self.worker.metrics).await;
        opened.map_err(|error| {
            self.detail = error.detail.to_string();
            error.reason
        })
    }

    /// Relays until the end; `heard` is told once who spoke first.
    async fn carry(&mut self, client: Io, placed: Result<Placed, Option<Reason>>, heard: impl FnMut(Speaker) + Unpin) {
        let (server, guard) = match placed {
            Ok(placed) => placed,
            Err(reason) => {
                self.reason = reason;
                return;
            }
        };
        let Opened { io: server, link } = server;
        let _open = self.worker.metrics.hold(Metric::TcpOpen, &[self.way]);
        let cut = cut(self.worker, self.peer.as_deref(), &link);
        match &mut self.filtered {
            None => {
                let mut relay = Relay::new(client, server, IDLE, heard);
                tokio::select! {
                    ended = &mut relay => if let Err(error) = ended {
                        self.detail = error.to_string();
                    },
                    reason = cut => self.reason = Some(reason),
                }
                self.passed = relay.passed();
            }
            Some(filtered) => {
                filtered.connected_to(self.upstream);
                tokio::select! {
                    ended = Box::pin(filtered.carry(client, server, IDLE, heard)) => match ended {
                        Ok(None) => {}
                        Ok(Some(stop)) => {
                            let (reason, detail) = filtered::reason(stop);
                            self.reason = Some(reason);
                            self.detail = detail;
                        }
                        Err(error) => self.detail = error.to_string(),
                    },
                    reason = cut => self.reason = Some(reason),
                }
                self.passed = filtered.passed();
            }
        }
        self.filtered = None;
        drop(guard);
    }
}

/// What ends a stream that has not ended by itself.
async fn cut(worker: &Worker, peer: Option<&Peer>, link: &Link) -> Reason {
    let store = &worker.proxy.identity;
    tokio::select! {
        () = worker.drain.cut() => Reason::Draining,
        _why = tls::cut(peer, store) => Reason::PeerIdentity,
        _why = tls::cut(link.peer(), store) => Reason::PeerIdentity,
    }
}

impl Drop for Stream<'_> {
    fn drop(&mut self) {
        let reason = self.reason.map_or("", Reason::code);
        let metrics = &self.worker.metrics;
        metrics.add(Metric::TcpConnections, &[self.way, &self.service, reason], 1);
        for (way, bytes) in [("sent", self.passed.sent), ("received", self.passed.received)] {
            metrics.add(Metric::TcpBytes, &[self.way, &self.service, way], bytes);
        }
        self.worker.load.spliced.add(self.passed.spliced);
        let wanted = match self.access_log {
            AccessLog::Off => false,
            AccessLog::All => true,
            AccessLog::Errors => self.reason.is_some(),
        };
        if wanted {
            let now = std::time::Instant::now();
            let entry = Entry {
                direction: self.way,
                protocol: "tcp",
                reason,
                detail: &self.detail,
                service: &self.service,
                version: &self.version,
                upstream: self.upstream,
                client: Some(self.client),
                peer: self.peer.as_ref().map_or("", |peer| peer.identity.as_str()),
                attempts: self.attempts,
                duration: now.saturating_duration_since(self.start),
                sent: self.passed.sent,
                received: self.passed.received,
                ..Entry::default()
            };
            self.worker.log.write(&entry, now);
        }
    }
}
