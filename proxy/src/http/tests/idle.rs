//! Connections without a request: parked, woken, and ended as if they were not.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::*;
use crate::drain::Phase;
use crate::metrics::Metric;
use crate::tls::testing::TestCa;

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: reviews\r\n\r\n";

fn parked(proxy: &TestProxy) -> usize {
    proxy.worker.load.parked.load(Ordering::Relaxed)
}

/// A plaintext connection to a proxy in front of an application, after one request and parked.
async fn kept(proxy: &mut TestProxy) -> TcpStream {
    let app = app(|_| ok("hello")).await;
    proxy.inbound(self_port(app, wire::MtlsMode::Permissive));
    let address = proxy.serve_plaintext(app, Some(Version::Http1)).await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    again(&mut stream).await;
    until("the idle connection is parked", || parked(proxy) == 1).await;
    stream
}

async fn again(stream: &mut TcpStream) {
    stream.write_all(REQUEST).await.unwrap();
    let response = within(read_message(stream)).await.unwrap();
    assert!(response.starts_with("HTTP/1.1 200 ") && response.ends_with("hello"), "{response}");
}

/// The client sees the end of the stream, and nothing before it.
async fn ends(mut stream: TcpStream) {
    let mut rest = Vec::new();
    within(stream.read_to_end(&mut rest)).await.unwrap();
    assert_eq!(rest, b"");
}

#[test]
fn a_parked_connection_serves_on_and_counts_as_open() {
    run(async {
        let mut proxy = TestProxy::new("reviews");
        let mut stream = kept(&mut proxy).await;
        let open = |proxy: &TestProxy| proxy.total(Metric::Connections, &["inbound", "http/1.1"]);
        assert_eq!(open(&proxy), 1);
        for _ in 0..2 {
            again(&mut stream).await;
            until("it is parked again", || parked(&proxy) == 1).await;
        }
        drop(stream);
        until("it ends with its client", || open(&proxy) == 0 && parked(&proxy) == 0).await;
    });
}

#[test]
fn a_parked_connection_takes_a_head_in_pieces_and_pipelined_requests() {
    run(async {
        let mut proxy = TestProxy::new("reviews");
        let mut stream = kept(&mut proxy).await;
        stream.write_all(&REQUEST[..9]).await.unwrap();
        until("a head's first byte wakes it", || parked(&proxy) == 0).await;
        stream.write_all(&REQUEST[9..]).await.unwrap();
        stream.write_all(&REQUEST.repeat(2)).await.unwrap();
        for _ in 0..3 {
            let response = within(read_message(&mut stream)).await.unwrap();
            assert!(response.ends_with("hello"), "{response}");
        }
        until("it is parked again", || parked(&proxy) == 1).await;
    });
}

/// What is left of a pipelined head is in hyper's buffer when the connection falls idle: it is not lost, and not parked.
#[test]
fn half_a_pipelined_head_is_kept() {
    run(async {
        let mut proxy = TestProxy::new("reviews");
        let mut stream = kept(&mut proxy).await;
        let both = [REQUEST, &REQUEST[..9]].concat();
        stream.write_all(&both).await.unwrap();
        within(read_message(&mut stream)).await.unwrap();
        // Two of the sweep's rounds: it would be parked by now.
        tokio::time::sleep(Duration::from_millis(600)).await;
        assert_eq!(parked(&proxy), 0);
        stream.write_all(&REQUEST[9..]).await.unwrap();
        let response = within(read_message(&mut stream)).await.unwrap();
        assert!(response.ends_with("hello"), "{response}");
    });
}

#[test]
fn a_request_whose_body_is_still_coming_is_not_parked_away() {
    run(async {
        let (listener, app) = listen().await;
        // Answers at the head, and lets the body come as it may.
        tokio::task::spawn_local(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::task::spawn_local(async move {
                    let mut bytes = [0; 4096];
                    let _ = stream.read(&mut bytes).await;
                    stream.write_all(ok("early").as_bytes()).await.unwrap();
                    while stream.read(&mut bytes).await.is_ok_and(|n| n > 0) {}
                });
            }
        });
        let mut proxy = TestProxy::new("reviews");
        proxy.inbound(self_port(app, wire::MtlsMode::Permissive));
        let address = proxy.serve_plaintext(app, Some(Version::Http1)).await;
        let mut stream = TcpStream::connect(address).await.unwrap();
        let head = "POST / HTTP/1.1\r\nhost: reviews\r\ncontent-length: 30\r\n\r\n";
        stream.write_all(head.as_bytes()).await.unwrap();
        within(read_message(&mut stream)).await.unwrap();
        tokio::time::sleep(Duration::from_millis(600)).await;
        // The rest of the body looks like a request, and must never be taken for one.
        let _ = stream.write_all(b"GET /x HTTP/1.1\r\nhost: xxx\r\n\r\n").await;
        ends(stream).await;
        let requests = proxy.worker.load.requests.load(Ordering::Relaxed);
        assert_eq!(requests, 1, "a body was taken for a request");
    });
}

#[test]
fn a_parked_connection_ends_when_the_proxy_drains() {
    run(async {
        let mut proxy = TestProxy::new("reviews");
        let stream = kept(&mut proxy).await;
        proxy.worker.proxy.drain.advance(Phase::Closing);
        ends(stream).await;
    });
}

#[test]
fn a_parked_peer_is_woken_over_mtls_and_ends_with_its_trust() {
    run(async {
        let app = app(|_| ok("hello")).await;
        let pair = pair(app, Version::Http1, |_| {}).await;
        for _ in 0..2 {
            assert!(get(pair.outbound, "reviews", "/").await.ends_with("hello"));
            until("the connection between the sidecars is parked", || parked(&pair.server) == 1).await;
        }
        let open = || pair.server.total(Metric::Connections, &["inbound", "http/1.1"]);
        assert_eq!(open(), 1, "it is the same connection");
        pair.server.worker.proxy.identity.set_bundle(TestCa::new("another mesh").bundle()).unwrap();
        until("the parked connection ends", || open() == 0 && parked(&pair.server) == 0).await;
    });
}
