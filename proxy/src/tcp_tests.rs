//! Opaque streams over real sockets.

use outrigger_proto::mesh as wire;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::metrics::Metric;
use crate::testing::*;

/// A server that greets first, then echoes until the client's end.
async fn greeter() -> std::net::SocketAddr {
    let (listener, address) = listen().await;
    tokio::task::spawn_local(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::task::spawn_local(async move {
                stream.write_all(b"hi ").await.unwrap();
                let (mut read, mut write) = stream.split();
                tokio::io::copy(&mut read, &mut write).await.unwrap();
                write.shutdown().await.unwrap();
            });
        }
    });
    address
}

#[test]
fn bytes_pass_both_sidecars_with_half_close() {
    run(async {
        let app = greeter().await;
        let mut server = TestProxy::new("db");
        server.inbound(self_port(app, wire::MtlsMode::Strict));
        let inbound = server.serve_inbound(app, true).await;
        let mut client = TestProxy::new("web");
        client.service(&service("db", retries()));
        let endpoints = vec![endpoint("dead", closed().await, Some("db")), endpoint("db-0", inbound, Some("db"))];
        client.endpoints("demo/db:80", endpoints);
        let outbound = client.serve_outbound(None, Some("10.96.0.1:80".parse().unwrap())).await;
        let mut stream = TcpStream::connect(outbound).await.unwrap();
        let mut hello = [0; 3];
        within(stream.read_exact(&mut hello)).await.unwrap();
        assert_eq!(&hello, b"hi ");
        let sent = vec![7; 1_000_000];
        let (mut read, mut write) = stream.into_split();
        let to_send = sent.clone();
        tokio::task::spawn_local(async move {
            write.write_all(&to_send).await.unwrap();
            write.shutdown().await.unwrap();
        });
        let mut echo = Vec::new();
        within(read.read_to_end(&mut echo)).await.unwrap();
        assert!(echo == sent);
        let metrics = &client.worker.proxy.metrics;
        assert_eq!(metrics.total(Metric::TcpBytes, &["outbound", "demo/db", "sent"]), 1_000_000);
        assert_eq!(metrics.total(Metric::TcpBytes, &["outbound", "demo/db", "received"]), 1_000_003);
        let line: serde_json::Value = serde_json::from_slice(&client.log.recv().unwrap()).unwrap();
        assert_eq!((&line["protocol"], &line["service"]), (&"tcp".into(), &"demo/db".into()));
    });
}

#[test]
fn a_denied_stream_reaches_nobody() {
    run(async {
        let (listener, app) = listen().await;
        let mut server = TestProxy::new("db");
        let mut port = self_port(app, wire::MtlsMode::Strict);
        port.authorization = Some(wire::Authorization { default_deny: true, ..wire::Authorization::default() });
        server.inbound(port);
        let inbound = server.serve_inbound(app, true).await;
        let mut client = TestProxy::new("web");
        client.service(&service("db", retries()));
        client.endpoints("demo/db:80", vec![endpoint("db-0", inbound, Some("db"))]);
        let outbound = client.serve_outbound(None, Some("10.96.0.1:80".parse().unwrap())).await;
        let mut stream = TcpStream::connect(outbound).await.unwrap();
        let mut got = Vec::new();
        within(stream.read_to_end(&mut got)).await.unwrap_or_default();
        assert!(got.is_empty());
        assert!(server.metrics().contains("reason=\"authorization-denied\"} 1\n"), "{}", server.metrics());
        let accepted = futures_util::FutureExt::now_or_never(listener.accept());
        assert!(accepted.is_none(), "the application was reached");
    });
}

#[test]
fn streams_count_against_the_connection_limit() {
    run(async {
        let app = greeter().await;
        let mut client = TestProxy::new("web");
        let mut limited = service("db", retries());
        limited.backends[0].policy.as_mut().unwrap().breaker.as_mut().unwrap().max_connections = 1;
        client.service(&limited);
        client.endpoints("demo/db:80", vec![endpoint("db-0", app, None)]);
        let outbound = client.serve_outbound(None, Some("10.96.0.1:80".parse().unwrap())).await;
        let mut first = TcpStream::connect(outbound).await.unwrap();
        let mut hello = [0; 3];
        within(first.read_exact(&mut hello)).await.unwrap();
        assert_eq!(client.total(Metric::UpstreamConnections, &["outbound", "demo/db"]), 1);
        let mut second = TcpStream::connect(outbound).await.unwrap();
        let mut got = Vec::new();
        within(second.read_to_end(&mut got)).await.unwrap();
        assert!(got.is_empty());
        assert_eq!(client.logged("outbound")["reason"], "overflow-connections");
        drop(first);
        until("the first is over", || client.total(Metric::TcpOpen, &["outbound"]) == 0).await;
        let mut third = TcpStream::connect(outbound).await.unwrap();
        within(third.read_exact(&mut hello)).await.unwrap();
    });
}

#[test]
fn a_stream_ends_when_either_side_is_no_longer_trusted() {
    run(async {
        for client_distrusts in [false, true] {
            let app = greeter().await;
            let mut server = TestProxy::new("db");
            server.inbound(self_port(app, wire::MtlsMode::Strict));
            let inbound = server.serve_inbound(app, true).await;
            let mut client = TestProxy::new("web");
            client.service(&service("db", retries()));
            client.endpoints("demo/db:80", vec![endpoint("db-0", inbound, Some("db"))]);
            let outbound = client.serve_outbound(None, Some("10.96.0.1:80".parse().unwrap())).await;
            let mut stream = TcpStream::connect(outbound).await.unwrap();
            let mut hello = [0; 3];
            within(stream.read_exact(&mut hello)).await.unwrap();
            let (judge, way) = if client_distrusts { (&client, "outbound") } else { (&server, "inbound") };
            let bundle = crate::tls::testing::TestCa::new("another mesh").bundle();
            judge.worker.proxy.identity.set_bundle(bundle).unwrap();
            let _ = within(stream.read_to_end(&mut Vec::new())).await;
            until("the stream is over", || judge.total(Metric::TcpOpen, &[way]) == 0).await;
            assert_eq!(judge.logged(way)["reason"], "peer-identity");
        }
    });
}

#[test]
fn what_passed_before_the_cut_is_counted_and_logged() {
    run(async {
        let app = greeter().await;
        let mut client = TestProxy::new("web");
        client.service(&service("db", retries()));
        client.endpoints("demo/db:80", vec![endpoint("db-0", app, None)]);
        let outbound = client.serve_outbound(None, Some("10.96.0.1:80".parse().unwrap())).await;
        let mut stream = TcpStream::connect(outbound).await.unwrap();
        within(stream.read_exact(&mut [0; 3])).await.unwrap();
        client.worker.proxy.drain.advance(crate::drain::Phase::Cut);
        until("the stream is over", || client.total(Metric::TcpOpen, &["outbound"]) == 0).await;
        assert_eq!(client.total(Metric::TcpBytes, &["outbound", "demo/db", "received"]), 3);
        let line = client.logged("outbound");
        assert_eq!((&line["reason"], &line["received"]), (&"draining".into(), &3.into()));
    });
}

#[test]
fn a_long_lived_stream_is_a_finished_probe() {
    run(async {
        let app = greeter().await;
        let mut client = TestProxy::new("web");
        let mut fragile = service("db", retries());
        fragile.backends[0].policy.as_mut().unwrap().outlier = Some(wire::Outlier {
            consecutive_failures: 1,
            base_ejection_ms: 1,
            max_ejection_ms: 1,
            max_ejected_percent: 100,
        });
        client.service(&fragile);
        client.endpoints("demo/db:80", vec![endpoint("db-0", app, None)]);
        let outbound = client.serve_outbound(None, Some("10.96.0.1:80".parse().unwrap())).await;
        let cluster = client.worker.proxy.clusters.get("demo/db:80");
        let backend = outrigger_core::link::service(&fragile).unwrap().backends[0].clone();
        let mut open = Vec::new();
        for _ in 0..2 {
            let mut rng = fastrand::Rng::with_seed(1);
            let set = cluster.endpoints();
            let now = std::time::Instant::now;
            let guard = outrigger_core::balance::pick(&set, backend.policy.algorithm, &[], now(), &mut rng).unwrap();
            let failure = outrigger_core::outlier::Outcome::Failure;
            cluster.outlier.record(&backend.policy.outlier, &set, &guard, failure, now()).unwrap();
            drop(guard);
            let state = || set.endpoints()[0].state(now());
            until("the ejection is over", || state() == outrigger_core::outlier::State::HalfOpen).await;
            let mut stream = TcpStream::connect(outbound).await.unwrap();
            within(stream.read_exact(&mut [0; 3])).await.unwrap();
            assert_eq!(state(), outrigger_core::outlier::State::Healthy);
            open.push(stream);
        }
    });
}
