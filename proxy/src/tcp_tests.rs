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
        let line: serde_json::Value = serde_json::from_str(&client.log.recv().unwrap()).unwrap();
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
