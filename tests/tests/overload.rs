//! A proxy that has more requests than it may have in flight: it refuses the others with a reason, answers what it has let in, and
//! who looks after it. Counts only; how much it still gets done is measured by `make bench` (scenario `overload`).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use outrigger_e2e::{Backend, Local, Raw, Recorded, Reply, header, until};

/// Requests that the proxy may have in flight.
const ADMITTED: usize = 50;
/// Clients that want more than that, and how often each asks.
const CLIENTS: usize = 400;
const ROUNDS: usize = 3;
/// What they may cost beside those that are let in, bytes.
const MEMORY: u64 = 16 << 20;

fn ask(client: &mut Raw, path: &str) {
    client.send(format!("GET {path} HTTP/1.1\r\nHost: app\r\n\r\n"));
}

#[test]
fn what_is_let_in_is_answered_and_the_others_are_told_why() {
    let gate = Arc::new(AtomicBool::new(false));
    let open = gate.clone();
    let app = Backend::http_with([127, 0, 0, 1].into(), "v1", move |request: &Recorded| {
        if request.path == "/slow" {
            until("the gate opens", || open.load(Ordering::SeqCst).then_some(()));
        }
        Reply::Answer { status: 200, headers: Vec::new(), body: b"whole".to_vec() }
    });
    let port = app.address().port();
    let local = Local::new(&format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: app, namespace: demo}}\n\
         spec: {{ports: [{{name: http, port: 80, targetPort: {port}}}]}}\n---\n\
         apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\n\
         metadata: {{name: app, namespace: demo, labels: {{kubernetes.io/service-name: app}}}}\n\
         ports: [{{name: http, port: {port}}}]\nendpoints: [{{addresses: [127.0.0.1]}}]\n"
    ));
    let proxy = local.proxy("web").flag("--workers", &1).flag("--max-requests", &ADMITTED).start().ready();
    let worker = |of: &str| proxy.admin("/stats").json()["workers"][0][of].as_u64().unwrap();

    let mut admitted: Vec<Raw> = (0..ADMITTED).map(|_| Raw::connect(proxy.outbound())).collect();
    admitted.iter_mut().for_each(|client| ask(client, "/slow"));
    until("as many as may are in flight", || (worker("running") == ADMITTED as u64).then_some(()));

    let before = proxy.process.anonymous_memory();
    let mut others: Vec<Raw> = (0..CLIENTS).map(|_| Raw::connect(proxy.outbound())).collect();
    for round in 0..ROUNDS {
        others.iter_mut().for_each(|client| ask(client, "/"));
        assert_eq!(proxy.admin("/ready").status, 200);
        for client in &mut others {
            let (head, _) = client.message();
            assert!(head.starts_with("HTTP/1.1 503 "), "round {round}: {head}");
            assert_eq!(header(&head, "x-outrigger-reason"), Some("overloaded"), "{head}");
            assert_eq!(header(&head, "retry-after"), Some("1"), "{head}");
        }
    }
    let refused = (CLIENTS * ROUNDS) as u64;
    assert_eq!(worker("refused"), refused);
    let counted = proxy.metrics().sum("outrigger_requests_total", &[("code", "503"), ("reason", "overloaded")]);
    assert!((counted - refused as f64).abs() < 0.5, "{counted} of {refused}");
    let grown = proxy.process.anonymous_memory().saturating_sub(before);
    assert!(grown < MEMORY, "{CLIENTS} refused clients cost {grown} bytes");
    assert_eq!(app.requests().iter().filter(|request| request.path == "/").count(), 0, "a refused request was sent on");

    gate.store(true, Ordering::SeqCst);
    for client in &mut admitted {
        let (head, body) = client.message();
        assert!(head.starts_with("HTTP/1.1 200 ") && body == b"whole", "{head}");
    }
    // Whoever was refused is served on the same connection, once there is room.
    for client in &mut others {
        ask(client, "/");
        let (head, _) = client.message();
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    }
    assert_eq!(worker("refused"), refused);
}
