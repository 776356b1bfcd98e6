//! How connections end: when their peer is no longer trusted, and when the proxy drains.

use std::time::{Duration, SystemTime};

use super::*;
use crate::drain::Phase;
use crate::identity::IdentityStore;
use crate::metrics::Metric;
use crate::tls::testing::TestCa;

/// From now on nobody of the mesh is trusted.
fn distrust(proxy: &TestProxy) {
    proxy.worker.proxy.identity.set_bundle(TestCa::new("another mesh").bundle()).unwrap();
}

/// A certificate that expires soon: its times are whole seconds.
fn short_lived(store: &IdentityStore, account: &str) {
    install(store, account, SystemTime::now() + Duration::from_secs(3));
}

const UPGRADED: &str = "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n";

/// A WebSocket through the pair, established.
async fn websocket(outbound: std::net::SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(outbound).await.unwrap();
    let head = "GET /chat HTTP/1.1\r\nhost: reviews\r\nupgrade: websocket\r\nconnection: Upgrade\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let response = within(read_message(&mut stream)).await.unwrap();
    assert!(response.starts_with("HTTP/1.1 101 "), "{response}");
    stream
}

/// Reads to the end, however it comes.
async fn ends(mut stream: TcpStream) {
    let mut rest = Vec::new();
    let _ = within(stream.read_to_end(&mut rest)).await;
}

#[test]
fn a_kept_connection_ends_when_the_caller_is_no_longer_trusted() {
    run(async {
        let app = app(|_| ok("hello")).await;
        let pair = pair(app, Version::Http1, |_| {}).await;
        assert!(get(pair.outbound, "reviews", "/").await.ends_with("hello"));
        let open = || pair.server.total(Metric::Connections, &["inbound", "http/1.1"]);
        assert_eq!(open(), 1, "the connection between the sidecars is kept");
        distrust(&pair.server);
        until("the caller's connection ends", || open() == 0).await;
    });
}

#[test]
fn connections_end_when_the_peers_certificate_expires() {
    run(async {
        let app = app(|_| ok("hello")).await;
        for expires in ["server", "client"] {
            let pair = pair(app, Version::Http1, |_| {}).await;
            let (store, account) = match expires {
                "server" => (&pair.server.worker.proxy.identity, "reviews"),
                _ => (&pair.client.worker.proxy.identity, "web"),
            };
            short_lived(store, account);
            assert!(get(pair.outbound, "reviews", "/").await.ends_with("hello"));
            let open = || match expires {
                "server" => pair.client.total(Metric::UpstreamConnections, &["outbound", "demo/reviews"]),
                _ => pair.server.total(Metric::Connections, &["inbound", "http/1.1"]),
            };
            assert_eq!(open(), 1, "the connection is kept");
            until("the connection ends with the certificate", || open() == 0).await;
        }
    });
}

#[test]
fn a_running_exchange_has_a_while_and_is_then_cut() {
    run(async {
        for client_distrusts in [false, true] {
            let (listener, app) = listen().await;
            let pair = pair(app, Version::Http1, |_| {}).await;
            // Not idempotent: nothing is tried again.
            let post = "POST / HTTP/1.1\r\nhost: reviews\r\ncontent-length: 0\r\n\r\n";
            let request = tokio::task::spawn_local(exchange(pair.outbound, post));
            let (_silent, _) = within(listener.accept()).await.unwrap();
            distrust(if client_distrusts { &pair.client } else { &pair.server });
            let response = within(request).await.unwrap();
            assert!(response.starts_with("HTTP/1.1 502 "), "{response}");
            assert!(response.contains("x-outrigger-reason: upstream-reset"), "{response}");
        }
    });
}

#[test]
fn a_websocket_ends_when_either_side_is_no_longer_trusted() {
    run(async {
        for client_distrusts in [false, true] {
            let (listener, app) = listen().await;
            let pair = pair(app, Version::Http1, |_| {}).await;
            let upgraded = tokio::task::spawn_local(websocket(pair.outbound));
            let (mut server, _) = within(listener.accept()).await.unwrap();
            read_message(&mut server).await.unwrap();
            server.write_all(UPGRADED.as_bytes()).await.unwrap();
            let stream = within(upgraded).await.unwrap();
            let (judge, way) = if client_distrusts { (&pair.client, "outbound") } else { (&pair.server, "inbound") };
            assert_eq!(judge.total(Metric::Upgrades, &[way]), 1);
            distrust(judge);
            ends(stream).await;
            until("the upgrade is over", || judge.total(Metric::Upgrades, &[way]) == 0).await;
            assert_eq!(judge.logged(way)["reason"], "peer-identity");
        }
    });
}

#[test]
fn draining_says_so_on_http1_connections() {
    run(async {
        let (listener, app) = listen().await;
        let mut server = TestProxy::new("reviews");
        server.inbound(self_port(app, wire::MtlsMode::Permissive));
        let inbound = server.serve_plaintext(app, Some(Version::Http1)).await;
        let request = tokio::task::spawn_local(get_owned(inbound));
        let (mut stream, _) = within(listener.accept()).await.unwrap();
        read_message(&mut stream).await.unwrap();
        server.worker.proxy.drain.advance(Phase::Closing);
        stream.write_all(ok("last").as_bytes()).await.unwrap();
        let response = within(request).await.unwrap();
        assert!(response.contains("connection: close\r\n") && response.ends_with("last"), "{response}");
    });
}

#[test]
fn draining_sends_two_goaways_on_http2_connections() {
    run(async {
        let mut server = TestProxy::new("reviews");
        let app = app(|_| ok("x")).await;
        server.inbound(self_port(app, wire::MtlsMode::Permissive));
        let inbound = server.serve_plaintext(app, Some(Version::Http2)).await;
        let mut stream = TcpStream::connect(inbound).await.unwrap();
        stream.write_all(h2::PREFACE).await.unwrap();
        h2::write_frame(&mut stream, 4, 0, &[]).await;
        // Settings have come: the connection is served.
        while within(h2::read_frame(&mut stream)).await.unwrap().0 != 4 {}
        server.worker.proxy.drain.advance(Phase::Closing);
        let mut last_streams = Vec::new();
        while let Some((kind, flags, payload)) = within(h2::read_frame(&mut stream)).await {
            match kind {
                // The ping between the two: who answers it has seen the first.
                6 if flags == 0 => h2::write_frame(&mut stream, 6, 1, &payload).await,
                7 => last_streams.push(u32::from_be_bytes(payload[..4].try_into().unwrap())),
                _ => {}
            }
        }
        assert_eq!(last_streams, [0x7fff_ffff, 0], "first none is refused, then what was not opened by then");
    });
}

#[test]
fn at_the_maximum_time_upgrades_and_streams_are_cut_with_a_reason() {
    run(async {
        let (listener, app) = listen().await;
        let mut server = TestProxy::new("reviews");
        server.inbound(self_port(app, wire::MtlsMode::Permissive));
        let inbound = server.serve_plaintext(app, Some(Version::Http1)).await;
        let upgraded = tokio::task::spawn_local(websocket(inbound));
        let (mut held, _) = within(listener.accept()).await.unwrap();
        read_message(&mut held).await.unwrap();
        held.write_all(UPGRADED.as_bytes()).await.unwrap();
        let websocket = within(upgraded).await.unwrap();
        let opaque = server.serve_plaintext(app, None).await;
        let opaque = TcpStream::connect(opaque).await.unwrap();
        let _held = within(listener.accept()).await.unwrap();
        until("both are open", || {
            server.total(Metric::Upgrades, &["inbound"]) + server.total(Metric::TcpOpen, &["inbound"]) == 2
        })
        .await;
        let drain = &server.worker.proxy.drain;
        drain.advance(Phase::Stopped);
        let mut byte = [0];
        let still = tokio::time::timeout(Duration::from_millis(50), opaque.peek(&mut byte)).await;
        assert!(still.is_err(), "a stream outlives the listeners");
        drain.advance(Phase::Cut);
        ends(websocket).await;
        ends(opaque).await;
        until("both are over", || {
            server.total(Metric::Upgrades, &["inbound"]) + server.total(Metric::TcpOpen, &["inbound"]) == 0
        })
        .await;
        let reasons = [server.logged("inbound"), server.logged("inbound")].map(|line| line["reason"].clone());
        assert_eq!(reasons, ["draining", "draining"]);
    });
}
