//! Everything that the parts of one proxy share.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use outrigger_core::breaker::Kind;

use crate::discovery::Directory;
use crate::drain::Drain;
use crate::flags::{Settings, Source};
use crate::identity::IdentityStore;
use crate::log::AccessLog;
use crate::metrics::{Metric, Metrics};
use crate::upstream::Clusters;

/// One proxy. Shared by all threads; nothing here is locked on a request's way.
#[derive(Debug)]
pub struct Proxy {
    /// The command line
    pub settings: Arc<Settings>,
    /// Configuration
    pub directory: Arc<Directory>,
    /// The own certificate and the trust bundle
    pub identity: Arc<IdentityStore>,
    /// Runtime state of clusters
    pub clusters: Arc<Clusters>,
    /// Counters
    pub metrics: Arc<Metrics>,
    /// Access log
    pub log: AccessLog,
    /// Shutdown
    pub drain: Arc<Drain>,
    /// What each worker does, by its index
    pub workers: Vec<Arc<WorkerLoad>>,
    /// Listeners are bound
    pub bound: Bound,
}

/// Addresses that the listeners have, once they have them (port 0 in tests).
#[derive(Debug, Default)]
pub struct Bound {
    /// All listeners accept
    pub ready: AtomicBool,
    /// Inbound
    pub inbound: std::sync::OnceLock<SocketAddr>,
    /// Outbound
    pub outbound: std::sync::OnceLock<SocketAddr>,
}

/// How much one worker does. Written by that worker; read by the others at accept. Alone in its cache lines (two, which processors
/// fetch together), so that counting never waits for what another worker counts.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct WorkerLoad {
    /// Open inbound connections
    pub inbound: AtomicUsize,
    /// Open outbound connections
    pub outbound: AtomicUsize,
    /// Requests and opaque streams to the application that have not ended
    pub inbound_running: AtomicUsize,
    /// Requests and opaque streams of the application that have not ended
    pub outbound_running: AtomicUsize,
    /// Requests begun, of both directions
    pub requests: AtomicU64,
    /// Opaque streams begun, of both directions
    pub streams: AtomicU64,
    /// Destinations remembered as servers that speak first
    pub server_first: AtomicUsize,
    /// Of the open connections, HTTP/1 ones that wait for a request with what hyper held for them given back
    pub parked: AtomicUsize,
    /// Connections accepted
    pub accepted: AtomicU64,
    /// Of these, handed to a less loaded worker
    pub handed_over: AtomicU64,
    /// Requests to the application whose trace was continued or begun
    pub inbound_traced: Tally,
    /// Requests of the application whose trace was continued or begun
    pub outbound_traced: Tally,
    /// Attempts whose end was told to outlier detection, opaque streams included
    pub judged: Tally,
    /// Bytes of ended opaque streams that went through a pipe (splice(2))
    pub spliced: Tally,
    /// Requests refused because the worker had no time or room for them
    pub refused: Tally,
    /// The share of new requests that is refused now, see [`outrigger_core::shed::WHOLE`]
    pub shed_share: AtomicU32,
}

/// A count that one thread alone writes and others read: no locked instruction is needed.
#[derive(Debug, Default)]
pub struct Tally(AtomicU64);

impl Tally {
    /// One more. Only the thread that owns the count may say so.
    pub fn count(&self) {
        self.add(1);
    }

    /// So many more. Only the thread that owns the count may say so.
    pub fn add(&self, more: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(more), Ordering::Relaxed);
    }

    /// How many so far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl WorkerLoad {
    /// Open connections of both directions.
    pub fn open(&self) -> usize {
        self.inbound.load(Ordering::Relaxed) + self.outbound.load(Ordering::Relaxed)
    }

    /// Requests and opaque streams of both directions that have not ended.
    pub fn running(&self) -> usize {
        self.inbound_running.load(Ordering::Relaxed) + self.outbound_running.load(Ordering::Relaxed)
    }
}

/// A request or opaque stream that runs; has ended when dropped.
#[derive(Debug)]
pub struct Busy {
    load: Arc<WorkerLoad>,
    inbound: bool,
}

impl Busy {
    /// An HTTP request begins.
    pub fn request(load: &Arc<WorkerLoad>, inbound: bool) -> Self {
        load.requests.fetch_add(1, Ordering::Relaxed);
        Self::new(load, inbound)
    }

    /// An opaque stream begins.
    pub fn stream(load: &Arc<WorkerLoad>, inbound: bool) -> Self {
        load.streams.fetch_add(1, Ordering::Relaxed);
        Self::new(load, inbound)
    }

    fn new(load: &Arc<WorkerLoad>, inbound: bool) -> Self {
        let busy = Self { load: load.clone(), inbound };
        busy.of().fetch_add(1, Ordering::Relaxed);
        busy
    }

    fn of(&self) -> &AtomicUsize {
        if self.inbound { &self.load.inbound_running } else { &self.load.outbound_running }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.of().fetch_sub(1, Ordering::Relaxed);
    }
}

/// What is going on in a proxy, over all its workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Activity {
    /// Inbound connections, upgraded ones included
    pub inbound: usize,
    /// Outbound connections, upgraded and idle ones included
    pub outbound: usize,
    /// Outbound requests and opaque streams that have not ended
    pub outbound_running: usize,
    /// Requests and streams so far
    pub begun: u64,
}

impl Proxy {
    /// Whether the proxy is meant to have a certificate.
    pub fn wants_identity(&self) -> bool {
        !matches!(self.settings.source, Source::Directory { identity: None, .. })
    }

    /// `/clusters`: what is known of every cluster, beyond its configuration.
    pub fn clusters_report(&self) -> serde_json::Value {
        let now = Instant::now();
        let clusters = self.clusters.all();
        let rows = clusters.iter().map(|cluster| {
            let endpoints = cluster.endpoints();
            let endpoints = endpoints.endpoints().iter().map(|endpoint| {
                serde_json::json!({
                    "id": endpoint.info.id.to_string(),
                    "address": endpoint.info.address.to_string(),
                    "identity": endpoint.info.identity.as_ref().map(ToString::to_string),
                    "version": endpoint.info.version.to_string(),
                    "inFlight": endpoint.in_flight(),
                    "latencyUs": endpoint.latency(now),
                    "state": format!("{:?}", endpoint.state(now)),
                })
            });
            let count = |kind| cluster.breaker.count(kind);
            serde_json::json!({
                "key": cluster.key.to_string(),
                "connections": count(Kind::Connection),
                "pending": count(Kind::Pending),
                "requests": count(Kind::Request),
                "endpoints": endpoints.collect::<Vec<_>>(),
            })
        });
        serde_json::Value::Array(rows.collect())
    }

    /// What requests have passed through so far, by direction: whoever sends a known number of them sees here that no part
    /// was left out.
    pub fn passed(&self) -> serde_json::Value {
        let sum = |tally: fn(&WorkerLoad) -> &Tally| self.workers.iter().map(|load| tally(load).get()).sum::<u64>();
        let total = |metric, labels: &[&str]| self.metrics.total(metric, labels);
        let way = |name| {
            let ended = total(Metric::Requests, &[name]);
            serde_json::json!({ "ended": ended, "timed": self.metrics.recorded(Metric::Duration, &[name]) })
        };
        let (mut inbound, mut outbound) = (way("inbound"), way("outbound"));
        inbound["traced"] = sum(|load| &load.inbound_traced).into();
        inbound["allowed"] = total(Metric::Authorization, &["allow"]).into();
        inbound["denied"] = total(Metric::Authorization, &["deny"]).into();
        outbound["traced"] = sum(|load| &load.outbound_traced).into();
        outbound["judged"] = sum(|load| &load.judged).into();
        serde_json::json!({ "inbound": inbound, "outbound": outbound })
    }

    /// What is going on now.
    pub fn activity(&self) -> Activity {
        let mut activity = Activity { inbound: 0, outbound: 0, outbound_running: 0, begun: 0 };
        for load in &self.workers {
            activity.inbound += load.inbound.load(Ordering::Relaxed);
            activity.outbound += load.outbound.load(Ordering::Relaxed);
            activity.outbound_running += load.outbound_running.load(Ordering::Relaxed);
            activity.begun += load.requests.load(Ordering::Relaxed) + load.streams.load(Ordering::Relaxed);
        }
        activity
    }
}
