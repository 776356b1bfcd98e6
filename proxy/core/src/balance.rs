//! Balancing: which endpoint gets a request. The state of an endpoint is atomics that all workers share; a set of
//! endpoints is immutable and swapped whole.

mod ewma;
mod pick;

pub use pick::pick;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering::Relaxed};
use std::time::Instant;

use crate::outlier::{Health, State};
use crate::spiffe::SpiffeId;
use ewma::PeakEwma;

/// What is known of an endpoint from discovery.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointInfo {
    /// `<namespace>/<workload>`: stable over address changes
    pub id: Arc<str>,
    /// What is dialled
    pub address: SocketAddr,
    /// Application port, for the SNI
    pub app_port: u16,
    /// The identity its peer must prove; `None`: no mesh proxy there, plaintext
    pub identity: Option<SpiffeId>,
    /// Version label; may be empty
    pub version: Arc<str>,
    /// Share among its siblings
    pub weight: u32,
    /// Region; may be empty
    pub region: Arc<str>,
    /// Zone; may be empty
    pub zone: Arc<str>,
}

/// An endpoint: what discovery says, and what is measured here.
#[derive(Debug)]
pub struct Endpoint {
    /// From discovery
    pub info: EndpointInfo,
    /// Outlives a change of `info` that leaves the address alone
    live: Arc<Live>,
}

#[derive(Debug)]
struct Live {
    in_flight: AtomicU32,
    ewma: PeakEwma,
    health: Health,
}

impl Endpoint {
    fn new(info: EndpointInfo, now: Instant) -> Self {
        let live = Live { in_flight: AtomicU32::new(0), ewma: PeakEwma::new(now), health: Health::new(now) };
        Self { info, live: Arc::new(live) }
    }

    /// Attempts that have not ended.
    pub fn in_flight(&self) -> u32 {
        self.live.in_flight.load(Relaxed)
    }

    /// Peak EWMA of the time to response headers, in microseconds.
    pub fn latency(&self, now: Instant) -> f32 {
        self.live.ewma.get(now)
    }

    /// Whether it is ejected.
    pub fn state(&self, now: Instant) -> State {
        self.live.health.state(now)
    }

    /// Whether both are the same endpoint at the same address, whatever else discovery says of it now.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.live, &other.live)
    }

    pub(crate) fn health(&self) -> &Health {
        &self.live.health
    }
}

/// All endpoints of a cluster at one time.
#[derive(Debug, Default)]
pub struct EndpointSet {
    endpoints: Vec<Arc<Endpoint>>,
    /// Running sums of the weights; empty where all are equal.
    sums: Vec<u64>,
    /// How RoundRobin goes through `sums`.
    step: u64,
    /// Position of RoundRobin.
    turn: AtomicUsize,
}

impl EndpointSet {
    /// The set after a change: what is measured of an endpoint is kept as long as its id and address stay.
    #[must_use]
    pub fn update(&self, infos: impl IntoIterator<Item = EndpointInfo>, now: Instant) -> Self {
        let known: std::collections::HashMap<(&str, SocketAddr), &Arc<Endpoint>> =
            self.endpoints.iter().map(|one| ((&*one.info.id, one.info.address), one)).collect();
        let endpoints = infos.into_iter().map(|info| {
            let same = known.get(&(info.id.as_ref(), info.address)).map(|same| Arc::clone(same));
            match same {
                Some(same) if same.info == info => same,
                Some(same) => Arc::new(Endpoint { info, live: Arc::clone(&same.live) }),
                None => Arc::new(Endpoint::new(info, now)),
            }
        });
        Self::of(endpoints.collect(), self.turn.load(Relaxed))
    }

    fn of(endpoints: Vec<Arc<Endpoint>>, turn: usize) -> Self {
        let mut sum = 0;
        let mut sums: Vec<u64> = Vec::with_capacity(endpoints.len());
        for endpoint in &endpoints {
            sum += u64::from(endpoint.info.weight);
            sums.push(sum);
        }
        let equal = endpoints.windows(2).all(|two| two[0].info.weight == two[1].info.weight);
        let sums = if equal { Vec::new() } else { sums };
        Self { endpoints, sums, step: if equal { 1 } else { pick::step(sum) }, turn: AtomicUsize::new(turn) }
    }

    /// In the order of discovery.
    pub fn endpoints(&self) -> &[Arc<Endpoint>] {
        &self.endpoints
    }

    /// No endpoint: the backend is not ready.
    pub fn is_empty(&self) -> bool {
        self.endpoints.is_empty()
    }
}

/// An attempt on an endpoint. It counts as in flight until this is dropped, which is at the end of the body; a
/// half-open endpoint's permit comes back at the same time.
#[derive(Debug)]
pub struct Guard {
    endpoint: Arc<Endpoint>,
    started: Instant,
    probe: bool,
    measured: bool,
}

impl Guard {
    fn new(endpoint: &Arc<Endpoint>, probe: bool, now: Instant) -> Self {
        endpoint.live.in_flight.fetch_add(1, Relaxed);
        Self { endpoint: Arc::clone(endpoint), started: now, probe, measured: false }
    }

    /// The endpoint.
    pub fn endpoint(&self) -> &Arc<Endpoint> {
        &self.endpoint
    }

    /// Whether this is the one request that decides whether the endpoint comes back.
    pub fn is_probe(&self) -> bool {
        self.probe
    }

    /// Response headers arrived (WebSocket and TCP: the connection stands): this is the latency that counts.
    pub fn answered(&mut self, now: Instant) {
        if !self.measured {
            self.measured = true;
            self.endpoint.live.ewma.record(now.saturating_duration_since(self.started), now);
        }
    }

    /// The attempt timed out, failed or was cancelled before response headers. It took at least this long, so a hung
    /// endpoint never looks good, nor does one that fails fast look better than it did.
    pub fn abandoned(&mut self, now: Instant) {
        if !self.measured {
            self.measured = true;
            self.endpoint.live.ewma.at_least(now.saturating_duration_since(self.started), now);
        }
    }

    /// How the endpoint does is known and recorded, though the attempt goes on (WebSocket, TCP): a half-open endpoint's
    /// permit comes back now.
    pub fn settled(&mut self) {
        if std::mem::take(&mut self.probe) {
            self.endpoint.live.health.probe_done();
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.endpoint.live.in_flight.fetch_sub(1, Relaxed);
        self.settled();
    }
}

#[cfg(test)]
mod tests;
