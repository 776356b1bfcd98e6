//! Whether another attempt is made: only where that is safe, within a budget, after a jittered wait.

mod budget;

pub use budget::RetryBudget;

use std::time::{Duration, Instant};

use fastrand::Rng;
use http::{HeaderMap, HeaderValue, Method};

use crate::link::{Budget, Retries};
use crate::reason::Reason;

/// How an attempt failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// No connection: refused, timed out, or TLS failed, the peer's identity included
    Connect,
    /// The request was handed back unsent, the stream was refused (REFUSED_STREAM), or it lies above the last
    /// stream of a GOAWAY: the peer says that it did nothing
    Unprocessed,
    /// The connection or stream ended before a response
    Reset,
    /// The per-try timeout passed before a response
    PerTryTimeout,
    /// A response
    Response {
        /// HTTP status
        status: u16,
        /// gRPC status of a response without messages (trailers only)
        grpc: Option<u32>,
        /// What a proxy of the mesh says of it; only from an mTLS peer
        reason: Option<Reason>,
    },
    /// This proxy's own limits refused it
    Overflow,
    /// Not the endpoint's doing: the client broke its body off, this proxy has no certificate, or the endpoint's protocol cannot carry it
    Own,
}

/// What to do after a failed attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Wait this long, then try again, elsewhere if possible
    Retry(Duration),
    /// The failure is the answer
    GiveUp(Why),
}

/// Why there is no further attempt. For metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// The policy does not name this failure
    NotRetriable,
    /// The request may have been carried out, and is not idempotent or cannot be sent again
    Unsafe,
    /// All attempts are used up
    Attempts,
    /// The cluster's retry budget is used up
    Budget,
    /// The request's time would pass
    Deadline,
}

/// The attempts of one request.
#[derive(Debug, Clone)]
pub struct Plan {
    idempotent: bool,
    made: u32,
    deadline: Option<Instant>,
}

impl Plan {
    /// `idempotent`: see [`idempotent`]. `deadline` is the end of the request's timeout.
    pub fn new(idempotent: bool, deadline: Option<Instant>) -> Self {
        Self { idempotent, made: 0, deadline }
    }

    /// Retries so far.
    pub fn retries(&self) -> u32 {
        self.made
    }

    /// Decides on another attempt, and takes it from the budget. `replayable`: the whole body that was sent so far is
    /// at hand.
    pub fn next(
        &mut self,
        policy: &Retries,
        failure: Failure,
        replayable: bool,
        (budget, budget_policy): (&RetryBudget, &Budget),
        now: Instant,
        rng: &mut Rng,
    ) -> Decision {
        if !named(policy, failure) {
            return Decision::GiveUp(Why::NotRetriable);
        }
        // Even what nobody processed cannot be sent again once its body is gone.
        if !replayable || !(self.idempotent || unprocessed(failure)) {
            return Decision::GiveUp(Why::Unsafe);
        }
        if self.made >= policy.attempts {
            return Decision::GiveUp(Why::Attempts);
        }
        let wait = backoff(policy, self.made, rng);
        if self.deadline.is_some_and(|deadline| now + wait >= deadline) {
            return Decision::GiveUp(Why::Deadline);
        }
        if !budget.withdraw(budget_policy, now) {
            return Decision::GiveUp(Why::Budget);
        }
        self.made += 1;
        Decision::Retry(wait)
    }
}

/// Whether repeating a request is harmless: by its method, or because the client says so with an idempotency key.
pub fn idempotent(method: &Method, headers: &HeaderMap) -> bool {
    method.is_idempotent() || headers.contains_key("idempotency-key") || headers.contains_key("x-idempotency-key")
}

/// The reason that an mTLS peer's response carries.
pub fn peer_reason(value: &HeaderValue) -> Option<Reason> {
    Reason::ALL.iter().copied().find(|reason| reason.code().as_bytes() == value.as_bytes())
}

/// The failure is one that the policy names.
fn named(policy: &Retries, failure: Failure) -> bool {
    match failure {
        Failure::Connect => policy.connect_failure,
        Failure::Unprocessed => policy.connect_failure || policy.reset,
        Failure::Reset | Failure::PerTryTimeout => policy.reset,
        Failure::Overflow | Failure::Own => false,
        // A proxy that sheds load is not helped by more of it.
        Failure::Response { reason: Some(reason), .. } if overload(reason) || spreads(reason) => false,
        Failure::Response { status, grpc, reason } => {
            policy.statuses.contains(&status)
                || grpc.is_some_and(|grpc| policy.grpc_statuses.contains(&grpc))
                || (policy.connect_failure && reason.is_some_and(never_reached))
        }
    }
}

/// Nobody acted on the request.
fn unprocessed(failure: Failure) -> bool {
    match failure {
        Failure::Connect | Failure::Unprocessed => true,
        Failure::Response { reason, .. } => reason.is_some_and(never_reached),
        Failure::Reset | Failure::PerTryTimeout | Failure::Overflow | Failure::Own => false,
    }
}

/// A request that broke a filter would break the same filter beside every other endpoint, until all of them wait.
fn spreads(reason: Reason) -> bool {
    reason == Reason::FilterFailed
}

/// A proxy refused for the sake of its own limits: that says nothing about the endpoint.
pub fn overload(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::OverflowPending | Reason::OverflowRequests | Reason::OverflowConnections | Reason::Overloaded
    )
}

/// A peer's proxy answered before its application saw anything, and another endpoint may do better.
fn never_reached(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::ConnectFailure
            | Reason::ConnectTimeout
            | Reason::Draining
            | Reason::IdentityUnavailable
            | Reason::NoEndpoints
            | Reason::UnknownPort
    )
}

/// Full jitter: anything from 0 to a bound that doubles.
fn backoff(policy: &Retries, made: u32, rng: &mut Rng) -> Duration {
    let bound = policy.backoff_base.saturating_mul(1 << made.min(20)).min(policy.backoff_max);
    bound.mul_f64(rng.f64())
}

#[cfg(test)]
mod tests;
