//! What is counted of connections, requests and the log.

use super::*;
use crate::metrics::Metric;

#[test]
fn connections_to_endpoints_are_counted() {
    run(async {
        let app = app(|_| ok("hello")).await;
        let Pair { mut client, server, outbound } = pair(app, Version::Http1, |port| {
            port.services = vec!["demo/reviews".into()];
        })
        .await;
        client.service(&service("dead", wire::RoutePolicy::default()));
        client.endpoints("demo/dead:80", vec![endpoint("dead", closed().await, None)]);
        for _ in 0..2 {
            assert!(get(outbound, "reviews", "/").await.ends_with("hello"));
        }
        get(outbound, "dead", "/").await;
        let text = client.metrics();
        let peer = spiffe("reviews");
        for line in [
            "outrigger_upstream_connections{direction=\"outbound\",service=\"demo/reviews\"} 1\n",
            "outrigger_upstream_connects_total{service=\"demo/reviews\",outcome=\"success\"} 1\n",
            "outrigger_upstream_connects_total{service=\"demo/dead\",outcome=\"connect-failure\"} 1\n",
            &format!("outrigger_tls_connections_total{{direction=\"outbound\",peer=\"{peer}\"}} 1\n"),
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
        let line = "outrigger_upstream_connections{direction=\"inbound\",service=\"demo/reviews\"} 1\n";
        assert!(server.metrics().contains(line), "{}", server.metrics());
    });
}

#[test]
fn a_length_beside_chunks_is_counted_and_ends_the_connection() {
    run(async {
        let app = app(|request| ok(if request.contains("abc") { "whole" } else { "cut" })).await;
        let mut client = TestProxy::new("web");
        client.service(&service("reviews", retries()));
        client.endpoints("demo/reviews:80", vec![endpoint("one", app, None)]);
        let outbound = client.serve_outbound(Some(Version::Http1), None).await;
        let chunked = "POST / HTTP/1.1\r\nhost: reviews\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n";
        let ambiguous = chunked.replace("host:", "Content-Length: 1\r\nhost:");
        for (request, count) in [(chunked, 0), (&*ambiguous, 1)] {
            let mut stream = TcpStream::connect(outbound).await.unwrap();
            stream.write_all(request.as_bytes()).await.unwrap();
            let response = within(read_message(&mut stream)).await.unwrap();
            assert!(response.ends_with("whole"), "{response}");
            assert_eq!(response.contains("connection: close"), count == 1, "{response}");
            assert_eq!(client.total(Metric::Ambiguous, &["outbound"]), count);
        }
    });
}

#[test]
fn a_dropped_line_is_counted() {
    run(async {
        let mut client = TestProxy::new("web");
        client.absent("svc/demo/nowhere");
        let outbound = client.serve_outbound(Some(Version::Http1), None).await;
        let TestProxy { worker, log, .. } = client;
        drop(log);
        get(outbound, "nowhere", "/").await;
        let metrics = &worker.proxy.metrics;
        until("the line is counted", || metrics.total(Metric::LogDropped, &[]) == 1).await;
        assert!(metrics.encode().contains("outrigger_log_dropped_total 1\n"));
    });
}
