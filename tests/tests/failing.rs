//! Timeouts, retries, limits and ejection: what the caller gets, and how often the application was asked.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use outrigger_e2e::{Backend, Curl, Recorded, Reply, Response, Shop, until};

fn policy(spec: &str) -> String {
    // On the Services that routes and callers name.
    let targets =
        ["reviews", "reviews-v1", "reviews-v2"].map(|name| format!("{{group: '', kind: Service, name: {name}}}"));
    format!(
        "apiVersion: outrigger.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: reviews, namespace: demo}}\n\
         spec:\n  targetRefs: [{}]\n{spec}\n",
        targets.join(", ")
    )
}

fn loopback() -> IpAddr {
    [127, 0, 0, 1].into()
}

fn ok() -> Reply {
    Reply::Answer { status: 200, headers: Vec::new(), body: b"ok".to_vec() }
}

fn status(status: u16) -> Reply {
    Reply::Answer { status, headers: Vec::new(), body: Vec::new() }
}

/// A backend whose `reply` is told how often this path was asked for before.
fn counting(name: &str, reply: impl Fn(usize, &Recorded) -> Reply + Send + Sync + 'static) -> Backend {
    let count = AtomicUsize::new(0);
    Backend::http_with(loopback(), name, move |request| {
        if request.path == "/ready" { ok() } else { reply(count.fetch_add(1, Ordering::SeqCst), request) }
    })
}

/// Requests other than those of [`ready`].
fn asked(backend: &Backend) -> usize {
    backend.requests().iter().filter(|request| request.path != "/ready").count()
}

fn ready(shop: &Shop) {
    until("web reaches reviews-v1", || (shop.web.call("reviews-v1", "/ready").send().status == 200).then_some(()));
}

fn told(response: &Response) -> (u16, Option<&str>) {
    (response.status, response.reason())
}

#[test]
fn a_request_that_takes_too_long_is_504() {
    let hang = counting("v1", |_, _| Reply::Hang);
    let shop = Shop::start_with(&policy("  timeouts: {request: 300ms}"), hang, Backend::http(loopback(), "v2"));
    ready(&shop);
    let response = shop.web.call("reviews-v1", "/").send();
    assert_eq!(told(&response), (504, Some("request-timeout")));
}

/// Two backends that share a count: a second attempt goes to the other one.
fn pair(reply: impl Fn(usize, &Recorded) -> Reply + Send + Sync + Clone + 'static) -> [Backend; 2] {
    let count = Arc::new(AtomicUsize::new(0));
    ["v1", "v2"].map(|name| {
        let (count, reply) = (count.clone(), reply.clone());
        Backend::http_with(loopback(), name, move |request| {
            if request.path == "/ready" { ok() } else { reply(count.fetch_add(1, Ordering::SeqCst), request) }
        })
    })
}

/// What both backends were asked with this method.
fn asked_with(shop: &Shop, method: &str) -> Vec<Recorded> {
    let all = shop.v1.requests().into_iter().chain(shop.v2.requests());
    all.filter(|request| request.method == method && request.path != "/ready").collect()
}

fn both_ready(shop: &Shop) {
    until("both are used", || {
        let seen: Vec<_> = (0..10).map(|_| shop.get("/ready").header("x-backend").map(str::to_owned)).collect();
        (seen.contains(&Some("v1".to_owned())) && seen.contains(&Some("v2".to_owned()))).then_some(())
    });
}

#[test]
fn an_attempt_that_takes_too_long_is_tried_again() {
    let [v1, v2] = pair(|before, _| if before == 0 { Reply::Hang } else { ok() });
    let policy = policy("  retries: {attempts: 2, on: [reset, 503, 504], perTryTimeout: 300ms}");
    let shop = Shop::start_with(&policy, v1, v2);
    both_ready(&shop);
    assert_eq!(told(&shop.get("/")), (200, None));
    assert_eq!(asked_with(&shop, "GET").len(), 2);
}

#[test]
fn only_what_is_safe_is_retried_and_bodies_are_sent_again_whole() {
    let [v1, v2] = pair(|before, _| if before % 2 == 0 { status(503) } else { ok() });
    let shop = Shop::start_with("", v1, v2);
    both_ready(&shop);

    // PUT is idempotent: tried again, with its body.
    let response = shop.call("/").args(["--request", "PUT", "--data", "the whole body"]).send();
    assert_eq!(response.status, 200);
    let bodies: Vec<Vec<u8>> = asked_with(&shop, "PUT").into_iter().map(|request| request.body).collect();
    assert_eq!(bodies, [b"the whole body", b"the whole body"]);

    // POST is not: its 503 is the answer.
    let response = shop.call("/").args(["--data", "x"]).send();
    assert_eq!(told(&response), (503, None));
    assert_eq!(asked_with(&shop, "POST").len(), 1);
}

#[test]
fn a_body_beyond_the_replay_bound_is_not_sent_again() {
    let [v1, v2] = pair(|_, _| status(503));
    let shop = Shop::start_with("", v1, v2);
    both_ready(&shop);
    let body = "x".repeat(100_000);
    assert_eq!(shop.call("/").args(["--request", "PUT", "--data", &body]).send().status, 503);
    assert_eq!(asked_with(&shop, "PUT").len(), 1);
}

#[test]
fn retries_end_with_the_budget() {
    let [v1, v2] = pair(|_, _| status(503));
    let tight =
        "  retries: {attempts: 2, budget: {percent: 1, minPerSecond: 1}}\n  outlierDetection: {consecutiveFailures: 0}";
    let shop = Shop::start_with(&policy(tight), v1, v2);
    both_ready(&shop);
    let statuses: Vec<u16> = (0..50).map(|_| shop.get("/").status).collect();
    assert!(statuses.iter().all(|status| *status == 503), "{statuses:?}");
    // Without a budget: 100 at least.
    let attempts = asked_with(&shop, "GET").len();
    assert!((51..80).contains(&attempts), "{attempts} attempts of 50 requests");
}

#[test]
fn more_concurrent_requests_than_allowed_are_refused() {
    let hang = counting("v1", |_, _| Reply::Hang);
    let shop = Shop::start_with(
        &policy("  circuitBreaker: {maxRequests: 3}\n  timeouts: {request: 5s}"),
        hang,
        Backend::http(loopback(), "v2"),
    );
    ready(&shop);
    let url = shop.web.url("/");
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| Curl::get(&url).header("host", "reviews-v1").send());
        }
        until("three requests are held", || (asked(&shop.v1) == 3).then_some(()));
        let response = shop.web.call("reviews-v1", "/").send();
        assert_eq!(told(&response), (503, Some("overflow-requests")));
    });
}

#[test]
fn an_endpoint_that_keeps_failing_is_ejected_and_tried_again_later() {
    let bad = counting("v1", |before, _| if before < 3 { status(500) } else { ok() });
    let shop = Shop::start_with(
        &policy("  outlierDetection: {consecutiveFailures: 3, baseEjection: 2s, maxEjectedPercent: 50}"),
        bad,
        Backend::http(loopback(), "v2"),
    );
    both_ready(&shop);
    until("v1 fails three times", || {
        shop.get("/");
        (asked(&shop.v1) >= 3).then_some(())
    });
    // Ejected: everything is answered by v2.
    let answers: Vec<_> = (0..20).map(|_| shop.get("/").header("x-backend").map(str::to_owned)).collect();
    assert!(answers.iter().all(|backend| backend.as_deref() == Some("v2")), "{answers:?}");
    // And back after its time, since it works again.
    until("v1 is used again", || (shop.get("/").header("x-backend") == Some("v1")).then_some(()));
}

/// The state of each endpoint as web sees it.
fn states(shop: &Shop) -> Vec<String> {
    let clusters = shop.web.admin("/clusters").json();
    let reviews = clusters.as_array().unwrap().iter().find(|cluster| cluster["key"] == "demo/reviews:80").unwrap();
    let endpoints = reviews["endpoints"].as_array().unwrap();
    endpoints.iter().map(|endpoint| endpoint["state"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn at_most_the_permitted_share_is_ejected() {
    let [v1, v2] = pair(|_, _| status(500));
    let shop = Shop::start_with(
        &policy("  outlierDetection: {consecutiveFailures: 2, baseEjection: 60s, maxEjectedPercent: 50}"),
        v1,
        v2,
    );
    both_ready(&shop);
    until("one is ejected", || {
        shop.get("/");
        states(&shop).contains(&"Ejected".to_owned()).then_some(())
    });
    // The other fails as well, and stays: half is the most.
    let before = asked_with(&shop, "GET").len();
    let answers: Vec<_> = (0..20).map(|_| told(&shop.get("/")).0).collect();
    assert_eq!(answers, [500; 20]);
    assert_eq!(asked_with(&shop, "GET").len() - before, 20);
    let mut states = states(&shop);
    states.sort();
    assert_eq!(states, ["Ejected", "Healthy"]);
}

#[test]
fn a_probe_that_fails_ejects_again() {
    let bad = counting("v1", |_, _| status(500));
    let shop = Shop::start_with(
        &policy("  outlierDetection: {consecutiveFailures: 3, baseEjection: 1s, maxEjectedPercent: 50}"),
        bad,
        Backend::http(loopback(), "v2"),
    );
    both_ready(&shop);
    until("v1 is probed, once", || {
        shop.get("/");
        (asked(&shop.v1) > 3).then_some(())
    });
    // One request decided: it is out again, for longer.
    assert_eq!(asked(&shop.v1), 4);
    assert!(states(&shop).contains(&"Ejected".to_owned()), "{:?}", states(&shop));
}

#[test]
fn nobody_there_is_said_with_its_reason() {
    let mut shop = Shop::start("");
    ready(&shop);
    shop.v1.kill();
    // The sidecar is there and its application is not.
    let response =
        until("the failure is seen", || Some(shop.web.call("reviews-v1", "/").send()).filter(|it| it.status != 200));
    assert_eq!(response.status, 503, "{response:?}");
    assert_eq!(response.reason(), Some("connect-failure"));

    shop.proxy1.process.stop();
    let response = until("the endpoint is withdrawn", || {
        Some(shop.web.call("reviews-v1", "/").send()).filter(|response| response.reason() == Some("no-endpoints"))
    });
    assert_eq!(response.status, 503);
}
