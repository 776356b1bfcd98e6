//! The choice itself. No allocation; two samples as a rule, a scan only where samples do not help.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use fastrand::Rng;

use super::{Endpoint, EndpointSet, Guard};
use crate::link::Algorithm;
use crate::outlier::State;

/// Samples taken before the set is scanned.
const SAMPLES: usize = 4;
/// Load of an endpoint that was never measured but has attempts in flight: worse than any measured one.
const UNKNOWN: f32 = 1e12;

/// Picks an endpoint. In order of preference: one that is in use and was not tried by this request; one that was tried;
/// and, where every endpoint is ejected, any. A half-open endpoint is picked for its one probe.
///
/// `None`: the set is empty.
pub fn pick(
    set: &EndpointSet,
    algorithm: Algorithm,
    tried: &[Arc<Endpoint>],
    now: Instant,
    rng: &mut Rng,
) -> Option<Guard> {
    let fresh = |one: &Endpoint| !tried.iter().any(|tried| tried.is_same(one));
    let view = View { set, algorithm, now };
    view.choose(rng, |one| usable(one, now) && fresh(one))
        .or_else(|| if tried.is_empty() { None } else { view.choose(rng, |one| usable(one, now)) })
        .or_else(|| view.choose(rng, fresh))
        .or_else(|| view.choose(rng, |_| true))
}

fn usable(endpoint: &Endpoint, now: Instant) -> bool {
    endpoint.state(now) != State::Ejected
}

struct View<'a> {
    set: &'a EndpointSet,
    algorithm: Algorithm,
    now: Instant,
}

impl View<'_> {
    fn choose(&self, rng: &mut Rng, fits: impl Fn(&Endpoint) -> bool) -> Option<Guard> {
        // A half-open endpoint whose probe is under way fits for nothing else, so look again, a few times.
        for _ in 0..SAMPLES {
            let first = self.one(rng, &fits)?;
            let chosen = match self.algorithm {
                Algorithm::RoundRobin | Algorithm::Random => first,
                Algorithm::PeakEwma | Algorithm::LeastRequest => self.better(first, rng, &fits),
            };
            if let Some(guard) = self.take(chosen) {
                return Some(guard);
            }
        }
        // Scan for one that is not being probed.
        let all = &self.set.endpoints;
        let start = rng.usize(..all.len());
        (0..all.len()).map(|i| &all[(start + i) % all.len()]).filter(|one| fits(one)).find_map(|one| self.take(one))
    }

    fn take(&self, endpoint: &Arc<Endpoint>) -> Option<Guard> {
        match endpoint.state(self.now) {
            State::HalfOpen => endpoint.health().try_probe().then(|| Guard::new(endpoint, true, self.now)),
            State::Healthy | State::Ejected => Some(Guard::new(endpoint, false, self.now)),
        }
    }

    /// One that fits: by sampling, else by a scan from a random place.
    fn one(&self, rng: &mut Rng, fits: impl Fn(&Endpoint) -> bool) -> Option<&Arc<Endpoint>> {
        let all = &self.set.endpoints;
        if all.is_empty() {
            return None;
        }
        for _ in 0..SAMPLES {
            let one = &all[self.place(rng)];
            if fits(one) {
                return Some(one);
            }
        }
        let start = rng.usize(..all.len());
        (0..all.len()).map(|i| &all[(start + i) % all.len()]).find(|one| fits(one))
    }

    /// An index, as the algorithm draws it.
    fn place(&self, rng: &mut Rng) -> usize {
        let (count, sums) = (self.set.endpoints.len(), &self.set.sums);
        let total = sums.last().copied().unwrap_or(0);
        match self.algorithm {
            Algorithm::RoundRobin if total == 0 => self.set.turn.fetch_add(1, Relaxed) % count,
            Algorithm::RoundRobin => {
                // A step of about the golden ratio spreads an endpoint's turns over the round.
                let turn = self.set.turn.fetch_add(1, Relaxed) as u64;
                let step = coprime(total * 618 / 1000, total);
                at(sums, turn % total * step % total)
            }
            // Samples are drawn by weight and compared by load alone: with equal loads the shares are the weights.
            _ if total == 0 => rng.usize(..count),
            _ => at(sums, rng.u64(..total)),
        }
    }

    fn better<'a>(
        &'a self,
        first: &'a Arc<Endpoint>,
        rng: &mut Rng,
        fits: impl Fn(&Endpoint) -> bool,
    ) -> &'a Arc<Endpoint> {
        // The one probe goes out as soon as its endpoint is met; if it waited to look better, it might never go.
        if first.state(self.now) == State::HalfOpen {
            return first;
        }
        let all = &self.set.endpoints;
        for _ in 0..SAMPLES {
            let second = &all[self.place(rng)];
            if !Arc::ptr_eq(first, second) && fits(second) {
                let probe = second.state(self.now) == State::HalfOpen;
                return if probe || self.load(second) < self.load(first) { second } else { first };
            }
        }
        first
    }

    fn load(&self, endpoint: &Endpoint) -> f32 {
        let in_flight = endpoint.in_flight() as f32;
        match self.algorithm {
            Algorithm::PeakEwma => {
                let latency = endpoint.latency(self.now);
                if latency == 0.0 && in_flight > 0.0 { UNKNOWN + in_flight } else { latency * (in_flight + 1.0) }
            }
            _ => in_flight,
        }
    }
}

fn at(sums: &[u64], point: u64) -> usize {
    sums.partition_point(|sum| *sum <= point)
}

/// The first number from `start` on that shares no divisor with `total`: steps of it visit everything.
fn coprime(start: u64, total: u64) -> u64 {
    let gcd = |mut a: u64, mut b: u64| {
        while b != 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    (start.max(1)..).find(|step| gcd(*step, total) == 1).unwrap_or(1)
}
