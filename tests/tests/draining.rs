//! The order of shutting down, seen from outside.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use outrigger_e2e::{Backend, Curl, Pair, Raw, header, until};

#[test]
fn not_ready_first_then_close_then_the_listener_then_the_end() {
    let (held, release) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let (holding, released) = (held.clone(), release.clone());
    let app = Backend::scripted([127, 0, 0, 1].into(), move |mut raw| {
        while let Some(head) = raw.try_until("\r\n\r\n") {
            if head.starts_with("GET /slow") {
                holding.store(true, Ordering::SeqCst);
                until("it may answer", || released.load(Ordering::SeqCst).then_some(()));
            }
            raw.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
        }
    });
    let mut pair = Pair::start_with("", app, &[], &[("--drain-min", "3s"), ("--drain-max", "25s")]);
    let admin = format!("http://{}:15000", pair.proxy.ip());
    let phase = |pair: &Pair| pair.proxy.admin("/stats").json()["phase"].as_str().map(str::to_owned);
    let plain = |pair: &Pair| Curl::get(&format!("http://{}/", pair.proxy.inbound())).header("host", "app").send();

    let mut slow = Raw::connect(pair.proxy.inbound());
    slow.send("GET /slow HTTP/1.1\r\nHost: app\r\n\r\n");
    let mut idle = Raw::connect(pair.proxy.inbound());
    idle.send("GET / HTTP/1.1\r\nHost: app\r\n\r\n");
    let (head, _) = idle.message();
    assert_eq!(header(&head, "connection"), None, "{head}");
    until("a request is in flight", || held.load(Ordering::SeqCst).then_some(()));

    let response = Curl::get(&format!("{admin}/drain")).args(["--request", "POST"]).send();
    assert_eq!(response.status, 202, "{response:?}");
    let ready = until("not ready", || Some(pair.proxy.admin("/ready")).filter(|response| response.status == 503));
    assert!(ready.body.contains("draining"), "{ready:?}");
    // Withdrawn, while everything that still comes is served.
    until("the registration is withdrawn", || {
        let gone = pair.mesh.api("/api/v1/endpoints").as_array().is_some_and(Vec::is_empty);
        if phase(&pair).as_deref() == Some("not-ready") {
            assert_eq!(plain(&pair).status, 200);
        }
        gone.then_some(())
    });

    until("the listener is closed", || (phase(&pair).as_deref() == Some("stopped")).then_some(()));
    assert_eq!(idle.rest(), "", "an idle connection is closed");
    until("nobody is let in", || TcpStream::connect(pair.proxy.inbound()).is_err().then_some(()));
    assert!(pair.proxy.process.is_running(), "a request is still in flight");

    release.store(true, Ordering::SeqCst);
    let answer = slow.rest();
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("ok"), "{answer}");
    assert_eq!(header(&answer, "connection"), Some("close"), "{answer}");
    let status = pair.proxy.process.ended();
    assert!(status.success(), "{status}");
}
