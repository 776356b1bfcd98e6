//! Outlier ejection: an endpoint that fails several times in a row is left out for a while, then probed by a single
//! request. The state of each endpoint is atomics that all workers share; the policy comes with each call.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::balance::{EndpointSet, Guard};
use crate::link::OutlierPolicy;

/// How an attempt ended, as far as the endpoint is to blame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// A response that is no failure of the endpoint
    Success,
    /// 5xx, reset, connect failure, timeout
    Failure,
    /// The client went away, or the mesh itself answered: says nothing about the endpoint
    Neutral,
}

/// What an ejected endpoint is ready for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// In use
    Healthy,
    /// Left out
    Ejected,
    /// Its time is over: one probe may go to it
    HalfOpen,
}

/// Per endpoint.
#[derive(Debug)]
pub(crate) struct Health {
    /// Times below are nanoseconds since this.
    base: Instant,
    failures: AtomicU32,
    /// End of the ejection; 0: healthy.
    until: AtomicU64,
    /// Ejections since the last long healthy time.
    ejections: AtomicU32,
    /// When it became healthy again.
    recovered: AtomicU64,
    probing: AtomicBool,
}

impl Health {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            base: now,
            failures: AtomicU32::new(0),
            until: AtomicU64::new(0),
            ejections: AtomicU32::new(0),
            recovered: AtomicU64::new(0),
            probing: AtomicBool::new(false),
        }
    }

    fn nanos(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.base).as_nanos()).unwrap_or(u64::MAX)
    }

    pub(crate) fn state(&self, now: Instant) -> State {
        match self.until.load(Relaxed) {
            0 => State::Healthy,
            until if self.nanos(now) < until => State::Ejected,
            _ => State::HalfOpen,
        }
    }

    /// Not healthy: ejected, or half-open until its probe succeeded.
    pub(crate) fn is_out(&self) -> bool {
        self.until.load(Relaxed) != 0
    }

    /// Takes the one permit of a half-open endpoint.
    pub(crate) fn try_probe(&self) -> bool {
        self.probing.compare_exchange(false, true, Relaxed, Relaxed).is_ok()
    }

    pub(crate) fn probe_done(&self) {
        self.probing.store(false, Relaxed);
    }

    fn recover(&self, now: Instant) {
        self.failures.store(0, Relaxed);
        self.recovered.store(self.nanos(now), Relaxed);
        self.until.store(0, Relaxed);
    }

    /// Returns for how long.
    fn eject(&self, policy: &OutlierPolicy, now: Instant) -> Duration {
        let now = self.nanos(now);
        let healthy = Duration::from_nanos(now.saturating_sub(self.recovered.load(Relaxed)));
        // Doubling is for an endpoint that keeps failing, not for one that failed last week.
        let before = match self.ejections.load(Relaxed) {
            before if self.is_out() || healthy < policy.max_ejection => before,
            _ => 0,
        };
        let time = policy.base_ejection.saturating_mul(1 << before.min(20)).min(policy.max_ejection);
        self.ejections.store(before.saturating_add(1), Relaxed);
        self.failures.store(0, Relaxed);
        let end = now.saturating_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
        self.until.store(end.max(1), Relaxed);
        time
    }
}

/// Per cluster: sees to it that at most the permitted share is ejected.
#[derive(Debug, Default)]
pub struct Outlier {
    /// Held while the ejected are counted. Who does not get it ejects at the next failure instead.
    deciding: AtomicBool,
}

impl Outlier {
    /// Records how an attempt ended. Returns for how long the endpoint was ejected, if it was.
    pub fn record(
        &self,
        policy: &OutlierPolicy,
        set: &EndpointSet,
        guard: &Guard,
        outcome: Outcome,
        now: Instant,
    ) -> Option<Duration> {
        let health = guard.endpoint().health();
        match outcome {
            Outcome::Neutral => None,
            Outcome::Success => {
                // The late success of a request from before the ejection is no probe.
                if guard.is_probe() {
                    health.recover(now);
                } else if health.failures.load(Relaxed) != 0 {
                    health.failures.store(0, Relaxed);
                }
                None
            }
            Outcome::Failure if guard.is_probe() => Some(health.eject(policy, now)),
            Outcome::Failure if health.is_out() || policy.consecutive_failures == 0 => None,
            Outcome::Failure => {
                let failures = health.failures.fetch_add(1, Relaxed).saturating_add(1);
                (failures >= policy.consecutive_failures).then(|| self.try_eject(policy, set, health, now)).flatten()
            }
        }
    }

    fn try_eject(&self, policy: &OutlierPolicy, set: &EndpointSet, health: &Health, now: Instant) -> Option<Duration> {
        use std::sync::atomic::Ordering::{Acquire, Release};
        self.deciding.compare_exchange(false, true, Acquire, Relaxed).ok()?;
        let all = set.endpoints();
        let out = all.iter().filter(|endpoint| endpoint.health().is_out()).count();
        let allowed = (out + 1) as u64 * 100 <= all.len() as u64 * u64::from(policy.max_ejected_percent);
        let time = (allowed && !health.is_out()).then(|| health.eject(policy, now));
        self.deciding.store(false, Release);
        time
    }
}
