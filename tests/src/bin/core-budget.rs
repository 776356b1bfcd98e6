//! The decisions on one request, each in a function of its own, called so often: `bench/budget.py` runs this under
//! callgrind and divides each function's instructions by its calls.

#![allow(clippy::unwrap_used)]

use std::hint::black_box;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fastrand::Rng;
use http::{HeaderMap, Request, Response, request, response};
use outrigger_core::authz::{self, Authorization};
use outrigger_core::balance::{EndpointInfo, EndpointSet, Guard, pick};
use outrigger_core::breaker::Breaker;
use outrigger_core::link::{self, Algorithm, Backend, Port, Rule};
use outrigger_core::normalize::{self, Direction, Rules, trace};
use outrigger_core::outlier::{Outcome, Outlier};
use outrigger_core::retry::{self, Decision, Failure, Plan, RetryBudget};
use outrigger_core::route::{Head, Split, select, split};
use outrigger_core::spiffe::SpiffeId;
use outrigger_proto::mesh as wire;

const CALLS: usize = 1_000;
const PEER: &str = "spiffe://cluster.local/ns/demo/sa/web";
/// Among how many rules and routes the last one matches.
const RULES: u32 = 10;

/// The functions that are counted; their names are the budget's keys.
mod counted {
    use super::*;

    #[inline(never)]
    pub(crate) fn normalise_outbound(head: &mut request::Parts) -> bool {
        let rules =
            Rules { direction: Direction::Outbound, path_rules: false, peer: None, xfcc: None, forwarders: &[] };
        normalize::request(head, &rules).is_ok()
    }

    #[inline(never)]
    pub(crate) fn normalise_inbound(head: &mut request::Parts, rules: &Rules<'_>) -> bool {
        normalize::request(head, rules).is_ok()
    }

    #[inline(never)]
    pub(crate) fn normalise_response(head: &mut response::Parts) -> bool {
        normalize::response(head, Direction::Outbound, true).is_ok()
    }

    #[inline(never)]
    pub(crate) fn route(port: &Port, head: &Head<'_>, rng: &mut Rng) -> bool {
        select(port, head).is_some_and(|selected| matches!(split(selected.rule, rng, |_| true), Split::Backend(..)))
    }

    #[inline(never)]
    pub(crate) fn authorise(authorization: &Authorization, request: &authz::Request<'_>) -> bool {
        authorization.decide(request).outcome.is_ok()
    }

    #[inline(never)]
    pub(crate) fn balance(set: &EndpointSet, rng: &mut Rng, now: Instant) -> Option<Guard> {
        let mut guard = pick(set, Algorithm::PeakEwma, &[], now, rng)?;
        guard.answered(now + Duration::from_millis(1));
        Some(guard)
    }

    #[inline(never)]
    pub(crate) fn outlier(state: &Outlier, backend: &Backend, set: &EndpointSet, guard: &Guard, now: Instant) -> bool {
        state.record(&backend.policy.outlier, set, guard, Outcome::Success, now).is_none()
    }

    #[inline(never)]
    pub(crate) fn breaker(breaker: &Arc<Breaker>, backend: &Backend) -> bool {
        breaker.request(&backend.policy.limits).is_ok()
    }

    #[inline(never)]
    pub(crate) fn retry_plan(
        head: &request::Parts,
        rule: &Rule,
        backend: &Backend,
        budget: &RetryBudget,
        now: Instant,
        rng: &mut Rng,
    ) -> bool {
        let policy = &backend.policy.budget;
        budget.deposit(policy);
        let mut plan = Plan::new(retry::idempotent(&head.method, &head.headers), None);
        let fine = Failure::Response { status: 200, grpc: None, reason: None };
        let decision = plan.next(&rule.policy.retries, fine, true, (budget, policy), now, rng);
        matches!(decision, Decision::GiveUp(_))
    }

    #[inline(never)]
    pub(crate) fn trace_begun(headers: &mut HeaderMap, rng: &mut Rng) -> u128 {
        trace::propagate(headers, rng, 0).context.trace
    }

    #[inline(never)]
    pub(crate) fn trace_continued(headers: &mut HeaderMap, rng: &mut Rng) -> bool {
        // Not the same code as above, or the compiler makes one function of both.
        trace::propagate(headers, rng, 0).context.trace != 0
    }
}

fn service() -> link::Service {
    let key = "demo/reviews:80";
    let share = |weight| wire::WeightedBackend { backend: key.into(), weight, ..Default::default() };
    let matching = |rule| {
        let prefix = if rule + 1 == RULES { "/reviews".into() } else { format!("/service-{rule}/v1") };
        wire::HttpMatch { rule, path: Some(wire::http_match::Path::Prefix(prefix)), ..Default::default() }
    };
    let rule =
        |i| wire::HttpRule { name: format!("demo/r/{i}"), backends: vec![share(90), share(10)], ..Default::default() };
    let routes =
        wire::HttpRoutes { matches: (0..RULES).map(matching).collect(), rules: (0..RULES).map(rule).collect() };
    let port = wire::ServicePort { port: 80, backend: key.into(), routes: Some(routes), ..Default::default() };
    let backend = wire::Backend { key: key.into(), port: 80, ..Default::default() };
    link::service(&wire::Service { ports: vec![port], backends: vec![backend], ..Default::default() }).unwrap()
}

fn endpoints(now: Instant) -> EndpointSet {
    let info = |id: u16| EndpointInfo {
        id: id.to_string().into(),
        address: SocketAddr::from(([127, 0, 0, 1], 1 + id)),
        app_port: 80,
        identity: None,
        version: "v1".into(),
        weight: 1,
        region: "".into(),
        zone: "".into(),
    };
    EndpointSet::default().update((0..5).map(info), now)
}

fn authorization() -> Authorization {
    let rule = |i| {
        let (who, path) =
            if i + 1 == RULES { ("web".into(), "/reviews*".into()) } else { (format!("other-{i}"), format!("/{i}*")) };
        wire::AuthorizationRule {
            name: format!("demo/rule-{i}"),
            from: vec![wire::Source { principals: vec![format!("spiffe://*/sa/{who}")], ..Default::default() }],
            to: vec![wire::Operation { paths: vec![path], ..Default::default() }],
            ..Default::default()
        }
    };
    let wire = wire::Authorization { default_deny: true, allow: (0..RULES).map(rule).collect(), ..Default::default() };
    Authorization::link(&wire).unwrap()
}

/// A request as a parser makes it: with room in its header map.
fn head() -> request::Parts {
    let request = Request::get("/reviews/1?a=b").header("host", "reviews").header("user-agent", "curl/8");
    let request = request.header("accept", "*/*").header("connection", "keep-alive");
    let (mut head, ()) = request.body(()).unwrap().into_parts();
    head.headers.reserve(16);
    head
}

fn answer() -> response::Parts {
    let response = Response::builder().header("content-type", "application/json").header("content-length", "1024");
    response.header("connection", "keep-alive").header("server", "app").body(()).unwrap().into_parts().0
}

fn repeat(what: &str, mut work: impl FnMut() -> bool) {
    for _ in 0..CALLS {
        assert!(work(), "{what}");
    }
}

fn main() {
    let (now, mut rng) = (Instant::now(), Rng::with_seed(1));
    let (service, set, authorization) = (service(), endpoints(now), authorization());
    let peer: SpiffeId = PEER.parse().unwrap();
    let xfcc = normalize::xfcc(&peer, &peer);
    let rules = Rules {
        direction: Direction::Inbound,
        path_rules: true,
        peer: Some(&peer),
        xfcc: Some(&xfcc),
        forwarders: &[],
    };
    repeat("normalise_outbound", || counted::normalise_outbound(black_box(&mut head())));
    repeat("normalise_inbound", || counted::normalise_inbound(black_box(&mut head()), &rules));
    repeat("normalise_response", || counted::normalise_response(black_box(&mut answer())));

    let (port, backend) = (&service.ports[0], &*service.backends[0]);
    let sent = head();
    let asked = Head { method: &sent.method, path: sent.uri.path(), query: sent.uri.query(), headers: &sent.headers };
    repeat("route", || counted::route(port, black_box(&asked), &mut rng));
    let (method, headers) = (&sent.method, &sent.headers);
    let request =
        authz::Request { peer: Some(&peer), ip: [127, 0, 0, 1].into(), port: 80, method, path: "/reviews/1", headers };
    repeat("authorise", || counted::authorise(&authorization, black_box(&request)));

    repeat("balance", || counted::balance(black_box(&set), &mut rng, now).is_some());
    let guard = counted::balance(&set, &mut rng, now).unwrap();
    let state = Outlier::default();
    repeat("outlier", || counted::outlier(&state, backend, &set, black_box(&guard), now));
    let breaker = Arc::<Breaker>::default();
    repeat("breaker", || counted::breaker(black_box(&breaker), backend));
    let rule = &**select(port, &asked).unwrap().rule;
    let budget = RetryBudget::new(&backend.policy.budget, now);
    repeat("retry_plan", || counted::retry_plan(black_box(&sent), rule, backend, &budget, now, &mut rng));

    let continued = Request::get("/").header("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
    let (continued, ()) = continued.body(()).unwrap().into_parts();
    repeat("trace_continued", || counted::trace_continued(black_box(&mut continued.headers.clone()), &mut rng));
    repeat("trace_begun", || counted::trace_begun(black_box(&mut head().headers), &mut rng) != 0);
}
