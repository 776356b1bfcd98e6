//! Attempts: an endpoint is picked, a connection had, the request sent; where that fails, the plan decides on another.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ::http::{HeaderMap, Response, Version, response};
use hyper::upgrade::OnUpgrade;
use outrigger_core::balance::{Endpoint, Guard, pick};
use outrigger_core::breaker::Permit;
use outrigger_core::link::{Backend, Protocol, Rule, Weighted};
use outrigger_core::outlier::Outcome;
use outrigger_core::reason::Reason;
use outrigger_core::retry::{self, Decision, Plan};
use outrigger_core::route;

use super::exchange::{Answer, Exchange, Failure};
use super::request::{self as outgoing, Outgoing};
use super::respond;
use crate::io::Io;
use crate::metrics::{Known, Metric};
use crate::state::WorkerLoad;
use crate::tls::Peer;
use crate::upstream::http1::Failed as Unanswered;
use crate::upstream::{Cluster, ConnectError, Lease, Received, Security, SendError, Target, Wire, WireError};
use crate::worker::Worker;

/// The last attempt of an exchange, held until its response's body ends.
#[derive(Debug)]
pub(super) struct Attempt {
    /// Routed requests: the endpoint, and who is told how it did
    chosen: Option<Chosen>,
    lease: Option<Lease>,
    /// The response came from a proxy of the mesh
    trusted: bool,
    /// What the response's head says of the endpoint; trailers may say worse
    outcome: Outcome,
    /// How it ended has been told
    told: bool,
    /// When the whole request has to be over
    pub(super) deadline: Option<Instant>,
    /// The client's side of an upgrade
    pub(super) upgrade: Option<OnUpgrade>,
}

#[derive(Debug)]
struct Chosen {
    guard: Guard,
    call: Rc<Call>,
    worker: Rc<Worker>,
    _request: Option<Permit>,
    _retry: Option<Permit>,
}

/// Where a request was routed.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) backend: Arc<Backend>,
    pub(super) cluster: Arc<Cluster>,
    pub(super) rule: Arc<Rule>,
    /// Which of the rule's shares
    pub(super) share: usize,
    pub(super) service: Arc<str>,
}

impl Call {
    fn target(&self, endpoint: &Arc<Endpoint>, client: Version) -> Target {
        // Between sidecars the client's version stays; the far one knows what its application speaks.
        let protocol = if endpoint.info.identity.is_some() { Protocol::Detect } else { self.backend.protocol };
        Target::endpoint(endpoint, &self.backend, &self.cluster, outgoing::wire(protocol, client))
    }

    pub(super) fn share(&self) -> Option<&Weighted> {
        self.rule.backends.get(self.share)
    }

    fn record(&self, worker: &WorkerLoad, guard: &Guard, outcome: Outcome, now: Instant) {
        worker.judged.count();
        let set = self.cluster.endpoints();
        let policy = &self.backend.policy.outlier;
        if let Some(time) = self.cluster.outlier.record(policy, &set, guard, outcome, now) {
            let endpoint = &guard.endpoint().info;
            tracing::info!(backend = %self.cluster.key, endpoint = %endpoint.id, ?time, "endpoint ejected");
        }
    }
}

impl Attempt {
    /// Whether what the response says of the mesh is believed.
    pub(super) fn trusted(&self) -> bool {
        self.trusted
    }

    /// The endpoint's proxy had no time for the request, or no room.
    pub(super) fn overloaded(&self, response: &Response<Received>) -> bool {
        // Neutral is only what a proxy refused.
        self.outcome == Outcome::Neutral
            && response.headers().get(&respond::REASON).is_some_and(|reason| reason == Reason::Overloaded.code())
    }

    /// Applies the route's response modifiers.
    pub(super) fn modify(&self, head: &mut response::Parts) {
        let Some(chosen) = self.chosen.as_ref().filter(|chosen| !chosen.call.rule.simple) else { return };
        if let Some(share) = chosen.call.share() {
            route::modify_response(&share.filters, head);
        }
        route::modify_response(&chosen.call.rule.filters, head);
    }

    /// The response's body ended well, at `now`.
    pub(super) fn succeeded(mut self, trailers: Option<&HeaderMap>, now: Instant) {
        let unavailable = trailers.and_then(respond::grpc_status).is_some_and(grpc_failure);
        self.report(if unavailable { Outcome::Failure } else { self.outcome }, now);
        if let Some(lease) = self.lease.take() {
            lease.give_back(now);
        }
    }

    /// The endpoint broke the response off.
    pub(super) fn failed(mut self) {
        self.report(Outcome::Failure, Instant::now());
    }

    /// An upgrade: the endpoint answered, which is all that counts of it.
    pub(super) fn connected(&mut self) {
        self.report(Outcome::Success, Instant::now());
        if let Some(chosen) = &mut self.chosen {
            chosen.guard.settled();
        }
    }

    /// The endpoint's side of an upgrade.
    pub(super) fn switch(&mut self) -> Option<Io> {
        self.lease.as_mut()?.switch()
    }

    /// Who proved to be at the other end of an upgraded connection.
    pub(super) fn peer(&self) -> Option<&Peer> {
        self.lease.as_ref()?.peer()
    }

    fn report(&mut self, outcome: Outcome, now: Instant) {
        self.told = true;
        let Some(chosen) = &self.chosen else { return };
        chosen.call.record(&chosen.worker.load, &chosen.guard, outcome, now);
        let word = match outcome {
            Outcome::Success => "success",
            Outcome::Failure => "failure",
            Outcome::Neutral if self.outcome == Outcome::Neutral => "refused",
            Outcome::Neutral => "cancelled",
        };
        chosen.worker.metrics.add_known(Metric::Attempts, [Known::Shared(&chosen.call.service), Known::Word(word)], 1);
    }
}

impl Drop for Attempt {
    /// The client went away before the end, or nobody wanted it: that says nothing about the endpoint.
    fn drop(&mut self) {
        if !self.told {
            self.report(Outcome::Neutral, Instant::now());
        }
    }
}

/// Unknown, internal, unavailable and data loss: failures of the server as 5xx are.
fn grpc_failure(status: u32) -> bool {
    matches!(status, 2 | 13 | 14 | 15)
}

/// Why one attempt came to nothing.
struct Failed {
    kind: retry::Failure,
    answer: Failure,
}

impl Failed {
    fn connect(error: &ConnectError) -> Self {
        let overflow =
            matches!(error.reason, Reason::OverflowPending | Reason::OverflowRequests | Reason::OverflowConnections);
        let kind = match error.reason {
            _ if overflow => retry::Failure::Overflow,
            Reason::IdentityUnavailable => retry::Failure::Own,
            _ => retry::Failure::Connect,
        };
        Self { kind, answer: Failure::new(error.reason, &*error.detail) }
    }

    /// `unsent`: nothing of it went out.
    fn sent(unsent: bool, error: &WireError) -> Self {
        let kind = match error {
            _ if unsent || unprocessed(error) => retry::Failure::Unprocessed,
            WireError::Http1(error) if error.is_of_the_request() => retry::Failure::Own,
            _ => retry::Failure::Reset,
        };
        let parsed = matches!(error, WireError::Http1(error) if error.is_protocol());
        let reason = if parsed { Reason::UpstreamProtocol } else { Reason::UpstreamReset };
        Self { kind, answer: Failure::new(reason, describe(error)) }
    }

    fn timeout(reason: Reason) -> Self {
        Self { kind: retry::Failure::PerTryTimeout, answer: reason.into() }
    }
}

/// The peer says that it did nothing with the stream.
fn unprocessed(error: &WireError) -> bool {
    let WireError::Http2(error) = error else { return false };
    error.reason() == Some(h2::Reason::REFUSED_STREAM)
        || (error.is_go_away() && error.is_remote() && error.reason() == Some(h2::Reason::NO_ERROR))
}

fn describe(error: &WireError) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

type Responded = (Response<Received>, Lease);

/// Sends a request to one place, without retries: the own application, an instance hit by its address, or the outside.
pub(super) async fn direct(x: &mut Exchange, target: &Target, out: &mut Outgoing) -> Result<Answer, Failure> {
    let trusted = matches!(target.security, Security::Mtls { .. });
    x.upstream = Some(target.address);
    x.uploaded.clone_from(&out.sent);
    // Over HTTP/2 a peer may say that it did nothing with a request that it has: only there is it needed again.
    out.once = target.wire == Wire::Http1;
    let worker = x.connection.worker.clone();
    // Connections that were idle too long hand the request back; a new one does not.
    for _ in 0..=STALE {
        x.attempts += 1;
        match send(&worker, target, out).await {
            Ok((response, lease)) => {
                let (lease, upgrade) = (Some(lease), out.upgrade.take());
                let outcome = Outcome::Success;
                let attempt = Attempt { chosen: None, lease, trusted, outcome, told: false, deadline: None, upgrade };
                return Ok(Answer::Upstream(response, Box::new(attempt)));
            }
            Err(Failed { kind: retry::Failure::Unprocessed, .. }) if out.replayable() => {}
            Err(failed) => return Err(failed.answer),
        }
    }
    Err(Reason::UpstreamReset.into())
}

/// How many connections that turn out to be closed are tried before giving up.
const STALE: u32 = 2;

async fn send(worker: &Worker, target: &Target, out: &mut Outgoing) -> Result<Responded, Failed> {
    if target.wire == Wire::Http2 && out.upgrade.is_some() {
        let answer = Failure::new(Reason::UpgradeRefused, "the endpoint speaks HTTP/2, which has no Upgrade");
        return Err(Failed { kind: retry::Failure::Own, answer });
    }
    let mut lease = worker.pools.checkout(target).await.map_err(|error| Failed::connect(&error))?;
    let Some(body) = out.attempt() else {
        return Err(Failed { kind: retry::Failure::Reset, answer: Reason::UpstreamReset.into() });
    };
    let sent = match target.wire {
        Wire::Http1 | Wire::Tcp => match lease.send_http1(&out.http1(), body).await {
            Ok(response) => Ok(response),
            Err(Unanswered { unsent, error }) => {
                let back = unsent.is_some();
                if let Some(body) = unsent {
                    out.body.take_back(body);
                }
                Err(Failed::sent(back, &error.into()))
            }
        },
        Wire::Http2 => match lease.send_http2(out.http2(body)).await {
            Ok(response) => Ok(response),
            Err(SendError { unsent, error }) => {
                let back = unsent.is_some();
                if let Some(request) = unsent {
                    out.take_back(request);
                }
                Err(Failed::sent(back, &error))
            }
        },
    };
    sent.map(|response| (response, lease))
}

/// Sends a routed request, as often as its plan allows.
pub(super) async fn routed(x: &mut Exchange, call: Rc<Call>, out: &mut Outgoing) -> Result<Answer, Failure> {
    x.uploaded.clone_from(&out.sent);
    let mut run = Run::new(x, call, out)?;
    loop {
        let target = run.pick(x)?;
        let result = run.once(&target).await;
        match run.judge(x, result) {
            Next::Done(answer) => return answer,
            Next::Again(wait) => tokio::time::sleep(wait).await,
        }
    }
}

/// All attempts of one request.
struct Run<'a> {
    worker: Rc<Worker>,
    call: Rc<Call>,
    out: &'a mut Outgoing,
    plan: Plan,
    deadline: Option<Instant>,
    tried: Vec<Arc<Endpoint>>,
    request: Option<Permit>,
    retry: Option<Permit>,
    /// Of the attempt that is waited for
    guard: Option<Guard>,
}

impl Drop for Run<'_> {
    /// The client gave up first: that took at least as long, and says nothing else of the endpoint.
    fn drop(&mut self) {
        let Some(mut guard) = self.guard.take() else { return };
        let now = Instant::now();
        guard.abandoned(now);
        self.call.record(&self.worker.load, &guard, Outcome::Neutral, now);
        self.count("cancelled");
    }
}

enum Next {
    Done(Result<Answer, Failure>),
    Again(Duration),
}

impl<'a> Run<'a> {
    fn new(x: &Exchange, call: Rc<Call>, out: &'a mut Outgoing) -> Result<Self, Failure> {
        let request = Some(call.cluster.breaker.request(&call.backend.policy.limits)?);
        call.cluster.budget(&call.backend.policy.budget).deposit(&call.backend.policy.budget);
        let policy = &call.rule.policy;
        let deadline = policy.request_timeout.map(|timeout| x.start + timeout);
        let idempotent = retry::idempotent(&out.head.method, &out.head.headers);
        out.once = policy.retries.attempts == 0;
        out.body.prepare(idempotent && !out.once);
        let worker = x.connection.worker.clone();
        let plan = Plan::new(idempotent, deadline);
        Ok(Self { worker, call, out, plan, deadline, tried: Vec::new(), request, retry: None, guard: None })
    }

    /// Where the next attempt goes.
    fn pick(&mut self, x: &mut Exchange) -> Result<Target, Failure> {
        let set = self.call.cluster.endpoints();
        let algorithm = self.call.backend.policy.algorithm;
        let picked = pick(&set, algorithm, &self.tried, Instant::now(), &mut self.worker.rng.borrow_mut());
        let guard = picked.ok_or_else(|| Failure::new(Reason::NoEndpoints, self.call.cluster.key.to_string()))?;
        let info = &guard.endpoint().info;
        x.attempts += 1;
        x.upstream = Some(info.address);
        x.endpoint_version = info.version.clone();
        let target = self.call.target(guard.endpoint(), self.out.head.version);
        self.guard = Some(guard);
        Ok(target)
    }

    async fn once(&mut self, target: &Target) -> Result<Responded, Failed> {
        let per_try = self.call.rule.policy.per_try_timeout.map(|timeout| Instant::now() + timeout);
        let limit = match (self.deadline, per_try) {
            (Some(deadline), Some(per_try)) if per_try < deadline => Some((per_try, Reason::PerTryTimeout)),
            (Some(deadline), _) => Some((deadline, Reason::RequestTimeout)),
            (None, Some(per_try)) => Some((per_try, Reason::PerTryTimeout)),
            (None, None) => None,
        };
        // Pinned once: moved into the timeout, it would be in every exchange's future twice.
        let sending = std::pin::pin!(send(&self.worker, target, self.out));
        match limit {
            None => sending.await,
            Some((limit, reason)) => {
                let sent = tokio::time::timeout_at(limit.into(), sending).await;
                sent.unwrap_or_else(|_| Err(Failed::timeout(reason)))
            }
        }
    }

    /// What one attempt means: for the endpoint, and for the request.
    fn judge(&mut self, x: &Exchange, result: Result<Responded, Failed>) -> Next {
        let Some(mut guard) = self.guard.take() else { return Next::Done(Err(Reason::NoEndpoints.into())) };
        let now = Instant::now();
        let trusted = guard.endpoint().info.identity.is_some();
        let failure = match &result {
            Ok((response, _)) => {
                guard.answered(now);
                answered(x, response, trusted)
            }
            Err(failed) => {
                guard.abandoned(now);
                failed.kind
            }
        };
        let outcome = blame(failure);
        if let Some((wait, permit)) = self.again(failure, now) {
            self.call.record(&self.worker.load, &guard, outcome, now);
            self.count("retried");
            self.tried.push(guard.endpoint().clone());
            self.retry = Some(permit);
            return Next::Again(wait);
        }
        Next::Done(match result {
            Ok((response, lease)) => {
                let (request, retry) = (self.request.take(), self.retry.take());
                let (call, worker) = (self.call.clone(), self.worker.clone());
                let chosen = Chosen { guard, call, worker, _request: request, _retry: retry };
                let upgrade = self.out.upgrade.take();
                let (chosen, lease, deadline) = (Some(chosen), Some(lease), self.deadline);
                let attempt = Attempt { chosen, lease, trusted, outcome, told: false, deadline, upgrade };
                Ok(Answer::Upstream(response, Box::new(attempt)))
            }
            Err(failed) => {
                self.call.record(&self.worker.load, &guard, outcome, now);
                self.count(failed.answer.reason.code());
                Err(failed.answer)
            }
        })
    }

    fn again(&mut self, failure: retry::Failure, now: Instant) -> Option<(Duration, Permit)> {
        let (call, policy) = (&self.call, &self.call.backend.policy);
        let replayable = self.out.replayable();
        let budget = (call.cluster.budget(&policy.budget), &policy.budget);
        let rng = &mut self.worker.rng.borrow_mut();
        match self.plan.next(&call.rule.policy.retries, failure, replayable, budget, now, rng) {
            Decision::Retry(wait) => call.cluster.breaker.retry(&policy.limits).map(|permit| (wait, permit)),
            Decision::GiveUp(_) => None,
        }
    }

    fn count(&self, outcome: &'static str) {
        self.worker.metrics.add_known(Metric::Attempts, [Known::Shared(&self.call.service), Known::Word(outcome)], 1);
    }
}

/// A response as the plan sees it.
fn answered(x: &Exchange, response: &Response<Received>, trusted: bool) -> retry::Failure {
    let headers = response.headers();
    retry::Failure::Response {
        status: response.status().as_u16(),
        grpc: if x.grpc { respond::grpc_status(headers) } else { None },
        reason: headers.get(&respond::REASON).filter(|_| trusted).and_then(retry::peer_reason),
    }
}

/// What an attempt says about its endpoint.
fn blame(failure: retry::Failure) -> Outcome {
    let failed = match failure {
        retry::Failure::Connect | retry::Failure::Reset | retry::Failure::PerTryTimeout => true,
        retry::Failure::Unprocessed | retry::Failure::Overflow | retry::Failure::Own => return Outcome::Neutral,
        // The far proxy sheds load: ejecting its endpoint would push that load onto the others.
        retry::Failure::Response { reason: Some(reason), .. } if retry::overload(reason) => return Outcome::Neutral,
        retry::Failure::Response { status, grpc, .. } => status >= 500 || grpc.is_some_and(grpc_failure),
    };
    if failed { Outcome::Failure } else { Outcome::Success }
}
