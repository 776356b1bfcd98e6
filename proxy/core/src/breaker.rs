//! Circuit breaker: how many connections, waiting requests, concurrent requests and retries a cluster may have. The
//! counts are shared by all workers; the limits come with each call, so that a new policy holds at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use crate::link::Limits;
use crate::reason::Reason;

/// Counts of one cluster.
#[derive(Debug, Default)]
pub struct Breaker {
    counts: [AtomicU32; 4],
    /// Workers that wait for a connection which the limit denies them.
    wanted: AtomicU32,
}

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Open connections
    Connection = 0,
    /// Requests that wait for a connection
    Pending = 1,
    /// Concurrent requests
    Request = 2,
    /// Concurrent retries
    Retry = 3,
}

/// One unit of a limit; given back on drop.
#[derive(Debug)]
pub struct Permit {
    breaker: Arc<Breaker>,
    kind: Kind,
}

/// While it lives, workers with idle connections of the cluster are asked to close one.
#[derive(Debug)]
pub struct Wanted(Arc<Breaker>);

impl Breaker {
    /// How many of a kind there are.
    pub fn count(&self, kind: Kind) -> u32 {
        self.counts[kind as usize].load(Relaxed)
    }

    /// Permit for a request.
    ///
    /// # Errors
    /// [`Reason::OverflowRequests`] at the limit.
    pub fn request(self: &Arc<Self>, limits: &Limits) -> Result<Permit, Reason> {
        self.take(Kind::Request, limits.requests).ok_or(Reason::OverflowRequests)
    }

    /// Permit for waiting for a connection.
    ///
    /// # Errors
    /// [`Reason::OverflowPending`] at the limit.
    pub fn pending(self: &Arc<Self>, limits: &Limits) -> Result<Permit, Reason> {
        self.take(Kind::Pending, limits.pending).ok_or(Reason::OverflowPending)
    }

    /// Permit for a retry, or `None` at the limit.
    pub fn retry(self: &Arc<Self>, limits: &Limits) -> Option<Permit> {
        self.take(Kind::Retry, limits.retries)
    }

    /// Permit for a connection. `own` is how many this worker has to the endpoint: the first is always permitted, so
    /// that a limit which other workers use up starves none.
    ///
    /// # Errors
    /// [`Reason::OverflowConnections`] at the limit.
    pub fn connection(self: &Arc<Self>, limits: &Limits, own: usize) -> Result<Permit, Reason> {
        let limit = if own == 0 { u32::MAX } else { limits.connections };
        self.take(Kind::Connection, limit).ok_or(Reason::OverflowConnections)
    }

    /// Says, until the result is dropped, that a worker at the limit waits for a connection.
    pub fn want(self: &Arc<Self>) -> Wanted {
        self.wanted.fetch_add(1, Relaxed);
        Wanted(Arc::clone(self))
    }

    /// Whether idle connections should be closed for the sake of another worker.
    pub fn is_wanted(&self) -> bool {
        self.wanted.load(Relaxed) > 0
    }

    fn take(self: &Arc<Self>, kind: Kind, limit: u32) -> Option<Permit> {
        let count = &self.counts[kind as usize];
        // Adding first costs one instruction without contention; a comparison loop would cost retries under it.
        if count.fetch_add(1, Relaxed) >= limit {
            count.fetch_sub(1, Relaxed);
            return None;
        }
        Some(Permit { breaker: Arc::clone(self), kind })
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.breaker.counts[self.kind as usize].fetch_sub(1, Relaxed);
    }
}

impl Drop for Wanted {
    fn drop(&mut self) {
        self.0.wanted.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { connections: 1, pending: 1, requests: 2, retries: 0 };

    #[test]
    fn a_permit_comes_back_on_drop() {
        let breaker = Arc::new(Breaker::default());
        let first = breaker.request(&LIMITS).unwrap();
        let second = breaker.request(&LIMITS).unwrap();
        assert_eq!(breaker.request(&LIMITS).unwrap_err(), Reason::OverflowRequests);
        assert_eq!(breaker.count(Kind::Request), 2);
        drop(first);
        let third = breaker.request(&LIMITS).unwrap();
        drop((second, third));
        assert_eq!(breaker.count(Kind::Request), 0);
        let _waiting = breaker.pending(&LIMITS).unwrap();
        assert_eq!(breaker.pending(&LIMITS).unwrap_err(), Reason::OverflowPending);
        assert!(breaker.retry(&LIMITS).is_none());
    }

    #[test]
    fn each_worker_may_open_its_first_connection_above_the_limit() {
        let breaker = Arc::new(Breaker::default());
        let _one_worker = breaker.connection(&LIMITS, 0).unwrap();
        assert_eq!(breaker.connection(&LIMITS, 1).unwrap_err(), Reason::OverflowConnections);
        let _other_worker = breaker.connection(&LIMITS, 0).unwrap();
        assert_eq!(breaker.count(Kind::Connection), 2);
    }

    #[test]
    fn a_waiting_worker_is_seen_by_the_others() {
        let breaker = Arc::new(Breaker::default());
        let waiting = breaker.want();
        assert!(breaker.is_wanted());
        drop(waiting);
        assert!(!breaker.is_wanted());
    }
}
