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
        // All are being probed: better to ask one of them than nobody.
        .or_else(|| view.one(rng, |_| true).map(|one| Guard::new(&set.endpoints[one], false, now)))
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
        let all = &self.set.endpoints;
        // A half-open endpoint whose probe is under way fits for nothing else, so look again, a few times.
        for _ in 0..SAMPLES {
            let first = self.one(rng, &fits)?;
            let chosen = match self.algorithm {
                Algorithm::RoundRobin | Algorithm::Random => first,
                Algorithm::PeakEwma | Algorithm::LeastRequest => self.better(first, rng, &fits),
            };
            if let Some(guard) = self.take(&all[chosen]) {
                return Some(guard);
            }
        }
        // Scan for one that is not being probed.
        self.scan(rng).filter(|one| fits(&all[*one])).find_map(|one| self.take(&all[one]))
    }

    /// All places, from a random one on.
    fn scan(&self, rng: &mut Rng) -> impl Iterator<Item = usize> + use<> {
        let count = self.set.endpoints.len();
        let start = rng.usize(..count);
        (0..count).map(move |i| (start + i) % count)
    }

    fn take(&self, endpoint: &Arc<Endpoint>) -> Option<Guard> {
        match endpoint.state(self.now) {
            State::HalfOpen => endpoint.health().try_probe().then(|| Guard::new(endpoint, true, self.now)),
            State::Healthy | State::Ejected => Some(Guard::new(endpoint, false, self.now)),
        }
    }

    /// One that fits: by sampling, else by a scan.
    fn one(&self, rng: &mut Rng, fits: impl Fn(&Endpoint) -> bool) -> Option<usize> {
        let all = &self.set.endpoints;
        if all.is_empty() {
            return None;
        }
        let sampled = (0..SAMPLES).map(|_| self.place(rng)).find(|place| fits(&all[*place]));
        sampled.or_else(|| self.scan(rng).find(|place| fits(&all[*place])))
    }

    /// An index, as the algorithm draws it.
    fn place(&self, rng: &mut Rng) -> usize {
        let (count, sums) = (self.set.endpoints.len(), &self.set.sums);
        let total = sums.last().copied().unwrap_or(0);
        match self.algorithm {
            Algorithm::RoundRobin if total == 0 => self.set.turn.fetch_add(1, Relaxed) % count,
            Algorithm::RoundRobin => {
                let turn = self.set.turn.fetch_add(1, Relaxed) as u64;
                at(sums, turn % total * self.set.step % total)
            }
            // Samples are drawn by weight and compared by load alone: with equal loads the shares are the weights.
            _ if total == 0 => rng.usize(..count),
            _ => at(sums, rng.u64(..total)),
        }
    }

    /// The better of `first` and a second sample.
    fn better(&self, first: usize, rng: &mut Rng, fits: impl Fn(&Endpoint) -> bool) -> usize {
        let all = &self.set.endpoints;
        // The one probe goes out as soon as its endpoint is met; if it waited to look better, it might never go.
        if all.len() == 1 || all[first].state(self.now) == State::HalfOpen {
            return first;
        }
        for _ in 0..SAMPLES {
            let second = match self.set.sums.is_empty() {
                true => (first + rng.usize(1..all.len())) % all.len(),
                false => self.place(rng),
            };
            if second != first && fits(&all[second]) {
                let probe = all[second].state(self.now) == State::HalfOpen;
                return if probe || self.load(&all[second]) < self.load(&all[first]) { second } else { first };
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

/// A step through a round of `total` turns that visits each once and spreads those of one endpoint over the round:
/// about the golden ratio, and without a common divisor.
pub(super) fn step(total: u64) -> u64 {
    let gcd = |mut a: u64, mut b: u64| {
        while b != 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    ((total * 618 / 1000).max(1)..).find(|step| gcd(*step, total) == 1).unwrap_or(1)
}
