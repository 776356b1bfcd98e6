//! What a worker refuses that has more to do than time.

use std::sync::atomic::Ordering;
use std::time::Duration;

use outrigger_core::shed::hold;

use super::*;
use crate::metrics::Metric;
use crate::shed::FEW;

/// A proxy with `reviews`, which answers, and `hung`, which does not; its outbound listener.
async fn proxy() -> (TestProxy, std::net::SocketAddr) {
    let mut client = TestProxy::new("web");
    for (name, app) in [("reviews", app(|_| ok("hello")).await), ("hung", hung().await)] {
        client.service(&service(name, wire::RoutePolicy::default()));
        client.endpoints(&format!("demo/{name}:80"), vec![endpoint(name, app, None)]);
    }
    let outbound = client.serve_outbound(Some(Version::Http1), None).await;
    (client, outbound)
}

/// Puts one request in flight.
async fn occupy_one(outbound: std::net::SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(outbound).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nhost: hung\r\n\r\n").await.unwrap();
    stream
}

/// Puts so many requests in flight, for as long as their connections are kept.
async fn occupy(client: &TestProxy, outbound: std::net::SocketAddr, count: u32) -> Vec<TcpStream> {
    let mut open = Vec::new();
    for _ in 0..count {
        open.push(occupy_one(outbound).await);
    }
    let count = usize::try_from(count).unwrap();
    until("all are in flight", || client.worker.load.running() == count).await;
    open
}

/// One request on a kept connection: its response.
async fn ask(stream: &mut TcpStream) -> String {
    stream.write_all(b"GET / HTTP/1.1\r\nhost: reviews\r\n\r\n").await.unwrap();
    within(read_message(stream)).await.unwrap()
}

fn assert_refused(response: &str) {
    assert!(response.starts_with("HTTP/1.1 503 "), "{response}");
    assert!(response.contains("x-outrigger-reason: overloaded\r\n"), "{response}");
    assert!(response.contains("retry-after: 1\r\n"), "{response}");
}

#[test]
fn a_late_worker_refuses_a_share_until_it_is_in_time_again() {
    run(async {
        let (client, outbound) = proxy().await;
        // Never so few that its lag does not count.
        let open = occupy(&client, outbound, FEW + 1).await;
        let load = client.worker.load.clone();
        let share = || load.shed_share.load(Ordering::Relaxed);
        let hog = tokio::task::spawn_local(async {
            // Takes the worker's time, as too many requests would.
            loop {
                std::thread::sleep(Duration::from_millis(120));
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        });
        let mut stream = TcpStream::connect(outbound).await.unwrap();
        let mut served = 0;
        let refused = loop {
            let response = ask(&mut stream).await;
            if response.starts_with("HTTP/1.1 503 ") {
                break response;
            }
            served += 1;
        };
        assert_refused(&refused);
        assert!(served > 0 && share() > 0, "{served} were served while nothing was known of the lag");
        assert_eq!(load.refused.get(), 1);
        assert_eq!(client.total(Metric::Requests, &["outbound", "", "", "503", "overloaded"]), 1);
        hog.abort();
        until("nothing is refused", || share() == 0).await;
        // On the same connection: a refusal does not end it.
        assert!(ask(&mut stream).await.ends_with("hello"));
        drop(open);
    });
}

#[test]
fn a_worker_with_few_requests_refuses_none_however_late() {
    run(async {
        let (client, outbound) = proxy().await;
        let _open = occupy(&client, outbound, FEW - 1).await;
        client.worker.load.shed_share.store(outrigger_core::shed::WHOLE, Ordering::Relaxed);
        assert!(get(outbound, "reviews", "/").await.ends_with("hello"));
        let _one_more = occupy_one(outbound).await;
        until("it is in flight", || client.worker.load.running() == FEW as usize).await;
        let asked = std::time::Instant::now();
        assert_refused(&get(outbound, "reviews", "/").await);
        assert!(asked.elapsed() >= hold(0), "who is refused at once comes back at once");
    });
}

#[test]
fn a_sidecar_hears_of_its_refusal_at_once_and_has_its_client_wait() {
    run(async {
        let app = app(|_| ok("hello")).await;
        let mut server = TestProxy::new("reviews");
        server.inbound(self_port(app, wire::MtlsMode::Strict));
        (0..FEW).for_each(|_| server.worker.gate.enter());
        server.worker.load.shed_share.store(outrigger_core::shed::WHOLE, Ordering::Relaxed);
        let inbound = server.serve_inbound(app, true).await;
        let mut client = TestProxy::new("web");
        // An attempt has less time than a refusal takes where it waits.
        let per_try_timeout_ms = 200;
        client.service(&service("reviews", wire::RoutePolicy { per_try_timeout_ms, ..retries() }));
        client.endpoints("demo/reviews:80", vec![endpoint("one", inbound, Some("reviews"))]);
        let outbound = client.serve_outbound(Some(Version::Http1), None).await;
        let asked = std::time::Instant::now();
        let mut stream = TcpStream::connect(outbound).await.unwrap();
        let (response, ()) = tokio::join!(ask(&mut stream), async {
            until("the attempt is over", || client.total(Metric::Attempts, &["demo/reviews", "refused"]) == 1).await;
            assert!(client.worker.load.running() == 1, "while its client waits");
        });
        assert_refused(&response);
        assert!(asked.elapsed() >= hold(0), "who is refused at once comes back at once");
        assert_eq!(client.logged("outbound")["attempts"], 1);
        // What was refused is forgotten: the connection is used again.
        server.worker.load.shed_share.store(0, Ordering::Relaxed);
        assert!(ask(&mut stream).await.ends_with("hello"));
        assert_eq!(client.total(Metric::UpstreamConnects, &["demo/reviews", "success"]), 1);
    });
}
