//! Everything that the parts of one proxy share.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use outrigger_core::breaker::Kind;

use crate::discovery::Directory;
use crate::drain::Drain;
use crate::flags::{Settings, Source};
use crate::identity::IdentityStore;
use crate::log::AccessLog;
use crate::metrics::Metrics;
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

/// How much one worker does. Written by that worker; read by the others at accept.
#[derive(Debug, Default)]
pub struct WorkerLoad {
    /// Open inbound connections
    pub inbound: AtomicUsize,
    /// Open outbound connections
    pub outbound: AtomicUsize,
    /// Connections accepted
    pub accepted: AtomicU64,
    /// Of these, handed to a less loaded worker
    pub handed_over: AtomicU64,
}

impl WorkerLoad {
    /// Open connections of both directions.
    pub fn open(&self) -> usize {
        self.inbound.load(Ordering::Relaxed) + self.outbound.load(Ordering::Relaxed)
    }
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

    /// Open connections of clients: inbound, outbound.
    pub fn open(&self) -> (usize, usize) {
        let sum =
            |of: fn(&WorkerLoad) -> &AtomicUsize| self.workers.iter().map(|w| of(w).load(Ordering::Relaxed)).sum();
        (sum(|worker| &worker.inbound), sum(|worker| &worker.outbound))
    }
}
