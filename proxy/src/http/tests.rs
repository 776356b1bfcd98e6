//! Requests through real sockets: from a raw client through one or two proxies to a raw application.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use outrigger_proto::mesh as wire;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::listen::Version;
use crate::testing::*;

/// A client's proxy, the service `reviews`, and the proxy of its one instance, over mTLS.
struct Pair {
    client: TestProxy,
    server: TestProxy,
    outbound: std::net::SocketAddr,
}

async fn pair(app: std::net::SocketAddr, version: Version, port: impl FnOnce(&mut wire::SelfPort)) -> Pair {
    let mut server = TestProxy::new("reviews");
    let mut own = self_port(app, wire::MtlsMode::Strict);
    port(&mut own);
    server.inbound(own);
    let inbound = server.serve_inbound(app, true).await;
    let mut client = TestProxy::new("web");
    client.service(&service("reviews", retries()));
    client.endpoints("demo/reviews:80", vec![endpoint("reviews-0", inbound, Some("reviews"))]);
    let outbound = client.serve_outbound(Some(version), None).await;
    Pair { client, server, outbound }
}

#[test]
fn a_request_reaches_a_plaintext_endpoint_and_connections_are_kept() {
    run(async {
        let connections = Rc::new(RefCell::new(Vec::new()));
        let seen = connections.clone();
        let app = app(move |request| {
            seen.borrow_mut().push(request);
            ok("hello")
        })
        .await;
        let mut client = TestProxy::new("web");
        client.service(&service("reviews", retries()));
        client.endpoints("demo/reviews:80", vec![endpoint("reviews-0", app, None)]);
        let outbound = client.serve_outbound(Some(Version::Http1), None).await;
        let mut stream = TcpStream::connect(outbound).await.unwrap();
        for _ in 0..2 {
            stream.write_all(b"GET /a?b HTTP/1.1\r\nhost: reviews\r\nconnection: keep-alive\r\n\r\n").await.unwrap();
            let response = within(read_message(&mut stream)).await.unwrap();
            assert!(response.starts_with("HTTP/1.1 200 OK\r\n") && response.ends_with("hello"), "{response}");
        }
        let requests = connections.borrow();
        assert!(requests[0].starts_with("GET /a?b HTTP/1.1\r\n"), "{}", requests[0]);
        assert!(requests[0].contains("host: reviews\r\n") && !requests[0].contains("connection:"), "{}", requests[0]);
        assert!(requests[0].contains("traceparent: 00-"), "{}", requests[0]);
        drop(stream);
        let want = "outrigger_requests_total{direction=\"outbound\",service=\"demo/reviews\",version=\"v1\",code=\"200\",reason=\"\"} 2\n";
        assert!(client.metrics().contains(want), "{}", client.metrics());
        let line: serde_json::Value = serde_json::from_slice(&client.log.recv().unwrap()).unwrap();
        assert_eq!(line["service"], "demo/reviews");
        assert_eq!(line["received"], 5);
    });
}

#[test]
fn two_sidecars_speak_mtls_and_the_application_learns_the_peer() {
    run(async {
        let requests = Rc::new(RefCell::new(Vec::new()));
        let seen = requests.clone();
        let app = app(move |request| {
            seen.borrow_mut().push(request);
            ok("secure")
        })
        .await;
        let pair = pair(app, Version::Http1, |_| {}).await;
        let forged =
            "GET / HTTP/1.1\r\nhost: reviews\r\nx-forwarded-client-cert: By=me\r\nx-outrigger-reason: x\r\n\r\n";
        let response = exchange(pair.outbound, forged).await;
        assert!(response.ends_with("secure"), "{response}");
        let requests = requests.borrow();
        let xfcc = format!("x-forwarded-client-cert: By={};URI={}\r\n", spiffe("reviews"), spiffe("web"));
        assert!(requests[0].contains(&xfcc), "{}", requests[0]);
        assert!(!requests[0].contains("By=me") && !requests[0].contains("x-outrigger-reason"), "{}", requests[0]);
        let inbound = pair.server.metrics();
        assert!(inbound.contains("outrigger_requests_total{direction=\"inbound\""), "{inbound}");
    });
}

#[test]
fn a_foreign_identity_is_not_spoken_to() {
    run(async {
        let app = app(|_| ok("never")).await;
        let mut server = TestProxy::new("impostor");
        server.inbound(self_port(app, wire::MtlsMode::Strict));
        let inbound = server.serve_inbound(app, true).await;
        let mut client = TestProxy::new("web");
        client.service(&service("reviews", wire::RoutePolicy::default()));
        client.endpoints("demo/reviews:80", vec![endpoint("reviews-0", inbound, Some("reviews"))]);
        let outbound = client.serve_outbound(Some(Version::Http1), None).await;
        let response = get(outbound, "reviews", "/").await;
        assert!(
            response.starts_with("HTTP/1.1 503") && response.contains("x-outrigger-reason: peer-identity"),
            "{response}"
        );
    });
}

#[test]
fn plaintext_to_a_strict_port_and_undeclared_ports_are_refused() {
    run(async {
        let app = app(|_| ok("never")).await;
        let mut server = TestProxy::new("reviews");
        server.inbound(self_port(app, wire::MtlsMode::Strict));
        let inbound = server.serve_inbound(app, false).await;
        let response = get(inbound, "reviews", "/").await;
        assert!(
            response.starts_with("HTTP/1.1 403") && response.contains("x-outrigger-reason: mtls-required"),
            "{response}"
        );
        let other = server.serve_inbound(closed().await, false).await;
        let response = get(other, "reviews", "/").await;
        assert!(response.contains("x-outrigger-reason: unknown-port"), "{response}");
    });
}

#[test]
fn a_dead_endpoint_is_retried_around() {
    run(async {
        let app = app(|_| ok("alive")).await;
        let mut client = TestProxy::new("web");
        client.service(&service("reviews", retries()));
        let endpoints = vec![endpoint("dead", closed().await, None), endpoint("alive", app, None)];
        client.endpoints("demo/reviews:80", endpoints);
        let outbound = client.serve_outbound(Some(Version::Http1), None).await;
        for _ in 0..20 {
            let request = "POST / HTTP/1.1\r\nhost: reviews\r\ncontent-length: 3\r\n\r\nabc";
            assert!(exchange(outbound, request).await.ends_with("alive"));
        }
        let retried = client.worker.proxy.metrics.total(crate::metrics::Metric::Attempts, &["demo/reviews", "retried"]);
        assert!(retried > 0, "no attempt met the dead endpoint");
    });
}

#[test]
fn a_failing_status_is_retried_for_idempotent_methods_only_with_the_body() {
    run(async {
        let calls = Rc::new(Cell::new(0));
        let bodies = Rc::new(RefCell::new(Vec::new()));
        let (count, seen) = (calls.clone(), bodies.clone());
        let app = app(move |request| {
            count.set(count.get() + 1);
            seen.borrow_mut().push(request.split("\r\n\r\n").nth(1).unwrap_or_default().to_owned());
            if count.get() % 2 == 1 { "HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n".into() } else { ok("second") }
        })
        .await;
        let mut client = TestProxy::new("web");
        client.service(&service("reviews", retries()));
        client.endpoints("demo/reviews:80", vec![endpoint("one", app, None)]);
        let outbound = client.serve_outbound(Some(Version::Http1), None).await;
        let response = exchange(outbound, "PUT / HTTP/1.1\r\nhost: reviews\r\ncontent-length: 4\r\n\r\nbody").await;
        assert!(response.ends_with("second"), "{response}");
        assert_eq!(*bodies.borrow(), ["body", "body"]);
        let response = exchange(outbound, "POST / HTTP/1.1\r\nhost: reviews\r\ncontent-length: 4\r\n\r\nbody").await;
        assert!(response.starts_with("HTTP/1.1 503 "), "{response}");
        assert!(!response.contains("x-outrigger-reason"), "an application's own 503 has no reason: {response}");
        assert_eq!(calls.get(), 3);
    });
}

#[test]
fn every_failure_names_its_reason() {
    run(async {
        let mut client = TestProxy::new("web");
        client.service(&service("empty", retries()));
        let mut routed = service("routed", retries());
        routed.ports[0].routes = Some(wire::HttpRoutes::default());
        client.service(&routed);
        client.service(&service("dead", retries()));
        client.endpoints("demo/dead:80", vec![endpoint("dead", closed().await, None)]);
        client.absent("svc/demo/nowhere");
        let outbound = client.serve_outbound(Some(Version::Http1), None).await;
        for (host, status, reason) in [
            ("empty", 503, "no-endpoints"),
            ("empty:81", 503, "unknown-port"),
            ("routed", 404, "no-route"),
            ("dead", 503, "connect-failure"),
            ("nowhere", 503, "unknown-service"),
        ] {
            let response = get(outbound, host, "/").await;
            assert!(response.starts_with(&format!("HTTP/1.1 {status} ")), "{host}: {response}");
            assert!(response.contains(&format!("x-outrigger-reason: {reason}\r\n")), "{host}: {response}");
        }
        let connect = exchange(outbound, "CONNECT reviews:80 HTTP/1.1\r\nhost: reviews:80\r\n\r\n").await;
        assert!(connect.contains("x-outrigger-reason: connect-method"), "{connect}");
    });
}

#[test]
fn what_hyper_refuses_by_itself_has_a_reason_too() {
    run(async {
        let client = TestProxy::new("web");
        let outbound = client.serve_outbound(Some(Version::Http1), None).await;
        let response = exchange(outbound, "GET / HTTP/1.1\r\nbad header: x\r\n\r\n").await;
        assert!(
            response.starts_with("HTTP/1.1 400 ") && response.contains("x-outrigger-reason: bad-request"),
            "{response}"
        );
        let large = format!("GET / HTTP/1.1\r\nhost: reviews\r\nx: {}\r\n\r\n", "a".repeat(70_000));
        let response = exchange(outbound, &large).await;
        assert!(response.starts_with("HTTP/1.1 431 ") && response.contains("headers-too-large"), "{response}");
    });
}

#[test]
fn chunked_bodies_and_trailers_pass_both_sidecars() {
    run(async {
        let requests = Rc::new(RefCell::new(Vec::new()));
        let seen = requests.clone();
        let app = app(move |request| {
            seen.borrow_mut().push(request);
            "HTTP/1.1 200 OK\r\ntrailer: x-sum\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nx-sum: 1\r\n\r\n"
                .into()
        })
        .await;
        let pair = pair(app, Version::Http1, |_| {}).await;
        let request = "POST / HTTP/1.1\r\nhost: reviews\r\nte: trailers\r\nconnection: te\r\ntrailer: x-req\r\ntransfer-encoding: chunked\r\n\r\n3\r\nxyz\r\n0\r\nx-req: 2\r\n\r\n";
        let response = exchange(pair.outbound, request).await;
        assert!(response.contains("3\r\nabc\r\n") && response.contains("x-sum: 1"), "{response}");
        let request = requests.borrow()[0].clone();
        assert!(
            request.contains("xyz") && request.contains("x-req: 2") && request.contains("te: trailers"),
            "{request}"
        );
    });
}

#[test]
fn a_body_is_asked_for_only_when_the_application_asks() {
    run(async {
        let (listener, app) = listen().await;
        let asked = tokio::task::spawn_local(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await.unwrap();
            let mut body = [0; 4];
            stream.read_exact(&mut body).await.unwrap();
            stream.write_all(ok("thanks").as_bytes()).await.unwrap();
            body
        });
        let pair = pair(app, Version::Http1, |_| {}).await;
        let mut stream = TcpStream::connect(pair.outbound).await.unwrap();
        let head = "POST / HTTP/1.1\r\nhost: reviews\r\nexpect: 100-continue\r\ncontent-length: 4\r\n\r\n";
        stream.write_all(head.as_bytes()).await.unwrap();
        let interim = within(read_message(&mut stream)).await.unwrap();
        assert!(interim.starts_with("HTTP/1.1 100 "), "{interim}");
        stream.write_all(b"body").await.unwrap();
        let response = within(read_message(&mut stream)).await.unwrap();
        assert!(response.ends_with("thanks"), "{response}");
        assert_eq!(&asked.await.unwrap(), b"body");
    });
}

#[test]
fn a_final_status_instead_of_100_asks_for_no_body() {
    run(async {
        let (listener, app) = listen().await;
        tokio::task::spawn_local(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            stream.write_all(b"HTTP/1.1 401 No\r\ncontent-length: 0\r\n\r\n").await.unwrap();
            let _ = stream.read_u8().await;
        });
        let pair = pair(app, Version::Http1, |_| {}).await;
        let mut stream = TcpStream::connect(pair.outbound).await.unwrap();
        let head = "POST / HTTP/1.1\r\nhost: reviews\r\nexpect: 100-continue\r\ncontent-length: 4\r\n\r\n";
        stream.write_all(head.as_bytes()).await.unwrap();
        let response = within(read_message(&mut stream)).await.unwrap();
        assert!(response.starts_with("HTTP/1.1 401 "), "{response}");
    });
}

#[test]
fn head_has_a_length_and_no_body() {
    run(async {
        let app = app(|_| "HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n".into()).await;
        let pair = pair(app, Version::Http1, |_| {}).await;
        let mut stream = TcpStream::connect(pair.outbound).await.unwrap();
        for _ in 0..2 {
            stream.write_all(b"HEAD / HTTP/1.1\r\nhost: reviews\r\n\r\n").await.unwrap();
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(within(stream.read_u8()).await.unwrap());
            }
            let head = String::from_utf8(head).unwrap();
            assert!(head.starts_with("HTTP/1.1 200") && head.contains("content-length: 500"), "{head}");
        }
    });
}

#[test]
fn a_websocket_passes_both_sidecars() {
    run(async {
        let (listener, app) = listen().await;
        tokio::task::spawn_local(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let head = read_message(&mut stream).await.unwrap().to_lowercase();
            assert!(head.contains("upgrade: websocket") && head.contains("connection: upgrade"), "{head}");
            stream
                .write_all(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n")
                .await
                .unwrap();
            let mut bytes = [0; 4];
            stream.read_exact(&mut bytes).await.unwrap();
            stream.write_all(&bytes).await.unwrap();
        });
        let pair = pair(app, Version::Http1, |_| {}).await;
        let mut stream = TcpStream::connect(pair.outbound).await.unwrap();
        let head = "GET /chat HTTP/1.1\r\nhost: reviews\r\nupgrade: websocket\r\nconnection: Upgrade\r\nsec-websocket-key: x\r\n\r\n";
        stream.write_all(head.as_bytes()).await.unwrap();
        let response = within(read_message(&mut stream)).await.unwrap().to_lowercase();
        assert!(response.starts_with("http/1.1 101 ") && response.contains("upgrade: websocket"), "{response}");
        stream.write_all(b"ping").await.unwrap();
        let mut echo = Vec::new();
        within(stream.read_to_end(&mut echo)).await.unwrap();
        assert_eq!(echo, b"ping");
    });
}

#[test]
fn authorization_decides_by_peer_method_and_path() {
    run(async {
        let app = app(|_| ok("in")).await;
        let rule = |principal: &str, paths: &[&str]| wire::AuthorizationRule {
            name: "demo/p/0".into(),
            from: vec![wire::Source { principals: vec![spiffe(principal)], ..wire::Source::default() }],
            to: vec![wire::Operation {
                methods: vec!["GET".into()],
                paths: paths.iter().map(|path| (*path).into()).collect(),
                ..wire::Operation::default()
            }],
            when: Vec::new(),
        };
        let pair = pair(app, Version::Http1, |port| {
            port.authorization = Some(wire::Authorization {
                default_deny: true,
                allow: vec![rule("web", &["/reviews/*"])],
                path_rules: true,
                ..wire::Authorization::default()
            });
        })
        .await;
        assert!(get(pair.outbound, "reviews", "/reviews/1").await.ends_with("in"));
        for path in ["/admin", "/reviews/../admin", "/reviews/%2e%2e/admin"] {
            let response = get(pair.outbound, "reviews", path).await;
            assert!(response.starts_with("HTTP/1.1 403 "), "{path}: {response}");
            assert!(response.contains("x-outrigger-reason: authorization-denied"), "{path}: {response}");
        }
        let response =
            exchange(pair.outbound, "POST /reviews/1 HTTP/1.1\r\nhost: reviews\r\ncontent-length: 0\r\n\r\n").await;
        assert!(response.starts_with("HTTP/1.1 403 "), "{response}");
    });
}

#[test]
fn limits_refuse_with_their_reason() {
    run(async {
        let (listener, app) = listen().await;
        let mut client = TestProxy::new("web");
        let mut limited = service("reviews", retries());
        let policy = limited.backends[0].policy.as_mut().unwrap();
        policy.breaker.as_mut().unwrap().max_requests = 1;
        client.service(&limited);
        client.endpoints("demo/reviews:80", vec![endpoint("one", app, None)]);
        let outbound = client.serve_outbound(Some(Version::Http1), None).await;
        let first = tokio::task::spawn_local(get_owned(outbound));
        let (mut held, _) = within(listener.accept()).await.unwrap();
        let second = get(outbound, "reviews", "/").await;
        assert!(second.contains("x-outrigger-reason: overflow-requests"), "{second}");
        read_message(&mut held).await.unwrap();
        held.write_all(ok("first").as_bytes()).await.unwrap();
        assert!(first.await.unwrap().ends_with("first"));
    });
}

async fn get_owned(to: std::net::SocketAddr) -> String {
    get(to, "reviews", "/").await
}

#[test]
fn timeouts_are_told_apart() {
    run(async {
        let (listener, app) = listen().await;
        tokio::task::spawn_local(async move {
            let mut held = Vec::new();
            while let Ok((stream, _)) = listener.accept().await {
                held.push(stream);
            }
        });
        for (policy, reason) in [
            (wire::RoutePolicy { request_timeout_ms: 50, ..retries() }, "request-timeout"),
            (wire::RoutePolicy { per_try_timeout_ms: 20, request_timeout_ms: 5_000, ..retries() }, "per-try-timeout"),
        ] {
            let mut client = TestProxy::new("web");
            client.service(&service("reviews", policy));
            client.endpoints("demo/reviews:80", vec![endpoint("one", app, None)]);
            let outbound = client.serve_outbound(Some(Version::Http1), None).await;
            let response = get(outbound, "reviews", "/").await;
            assert!(response.starts_with("HTTP/1.1 504 "), "{response}");
            assert!(response.contains(&format!("x-outrigger-reason: {reason}")), "{response}");
        }
    });
}

#[test]
fn with_interception_the_destination_decides() {
    run(async {
        let app = app(|_| ok("outside")).await;
        let mut client = TestProxy::new("web");
        client.absent(&format!("ip/{app}"));
        let outbound = client.serve_outbound(Some(Version::Http1), Some(app)).await;
        assert!(get(outbound, "example.com", "/").await.ends_with("outside"));
        client.mesh(|mesh| mesh.outbound = outrigger_core::link::OutboundTraffic::RegistryOnly);
        let response = get(outbound, "example.com", "/").await;
        assert!(response.contains("x-outrigger-reason: unknown-service"), "{response}");
    });
}

#[test]
fn an_instance_hit_by_its_address_gets_mtls() {
    run(async {
        let app = app(|_| ok("direct")).await;
        let mut server = TestProxy::new("reviews");
        server.inbound(self_port(app, wire::MtlsMode::Strict));
        let inbound = server.serve_inbound(app, true).await;
        let mut client = TestProxy::new("web");
        let address = "10.244.0.9:8080".parse().unwrap();
        client.workload(address, endpoint("reviews-0", inbound, Some("reviews")));
        let outbound = client.serve_outbound(Some(Version::Http1), Some(address)).await;
        assert!(get(outbound, "anything", "/").await.ends_with("direct"));
    });
}

mod counts;
mod endpoints;
mod ends;
mod filtered;
mod h2;
mod idle;
mod limits;
mod retrying;
mod shed;
