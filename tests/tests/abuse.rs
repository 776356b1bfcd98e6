//! HTTP/2 as an attacker speaks it, with frames written by hand: it ends within bounds, and others are served.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use outrigger_e2e::{Backend, Mesh, Reply, python, succeed, until};

const SERVICE: &str = "
apiVersion: v1
kind: Service
metadata: {name: reviews, namespace: demo}
spec:
  selector: {app: reviews}
  ports: [{name: http, port: 80, targetPort: http}]
";

/// Bytes that an attack may cost a proxy.
const MEMORY: u64 = 32 << 20;

/// Runs one attack on the outbound listener; returns what the attacker saw, and how many requests the application got.
fn attack(what: &str) -> (serde_json::Value, usize) {
    let mesh = Mesh::start(SERVICE);
    // Answers that would be worth holding back.
    let application = Backend::http_with([127, 0, 0, 1].into(), "v1", |request| {
        let size = if request.path == "/big" { 4 << 20 } else { 2 };
        Reply::Answer { status: 200, headers: Vec::new(), body: vec![b'x'; size] }
    });
    let reviews =
        mesh.proxy("reviews-0").labels("app=reviews").app(&format!("{}/http1", application.address())).start();
    let mut web = mesh.proxy("web-0").start();
    until("web reaches reviews", || (web.call("reviews", "/").send().status == 200).then_some(()));
    let before = application.count();
    let memory = [&web, &reviews].map(|proxy| proxy.process.peak_memory());

    let (ip, port) = (web.ip().to_string(), web.outbound().port().to_string());
    let seen = succeed(python("h2_abuse.py").args([&ip, &port, "reviews", what, "--path", "/big"]));
    let seen = serde_json::from_str(&seen).unwrap();

    let requests = application.count() - before;
    for (proxy, before) in [&web, &reviews].into_iter().zip(memory) {
        let grown = proxy.process.peak_memory().saturating_sub(before);
        assert!(grown < MEMORY, "{} grew by {grown} bytes: {seen}", proxy.name);
    }
    assert!(web.process.is_running());
    assert_eq!(web.call("reviews", "/after").send().status, 200, "others are served: {seen}");
    (seen, requests)
}

#[test]
fn rapid_reset_is_cut_off() {
    let (seen, requests) = attack("rapid-reset");
    assert!(seen["goaway"].is_number() || seen["ended"].is_string(), "{seen}");
    assert!(requests < 5_000, "{requests} of 20,000 reached the application");
}

#[test]
fn a_continuation_flood_is_cut_off() {
    let (seen, requests) = attack("continuation");
    assert!(seen["ended"].is_string(), "{seen}");
    assert_eq!(requests, 0);
}

#[test]
fn a_settings_flood_ends_within_bounds() {
    assert_eq!(attack("settings").1, 0);
}

#[test]
fn zero_windows_hold_only_bounded_data() {
    let (seen, requests) = attack("zero-window");
    assert!(requests <= 100, "{requests}: {seen}");
}

#[test]
fn a_header_block_beyond_the_limit_is_refused() {
    assert_eq!(attack("big-header").1, 0);
}
