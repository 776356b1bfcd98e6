//! When an attempt is repeated, when it is not, and what attempts say of their endpoint.

use std::time::Instant;

use bytes::Bytes;
use http_body_util::BodyExt;
use outrigger_core::outlier::State;

use super::h2::{call, connect, read_frame, write_frame};
use super::*;
use crate::metrics::Metric;

/// A client's proxy in front of one plaintext endpoint.
pub(super) async fn direct(
    app: std::net::SocketAddr,
    version: Version,
    policy: wire::RoutePolicy,
) -> (TestProxy, std::net::SocketAddr) {
    let mut client = TestProxy::new("web");
    client.service(&service("reviews", policy));
    client.endpoints("demo/reviews:80", vec![endpoint("one", app, None)]);
    let outbound = client.serve_outbound(Some(version), None).await;
    (client, outbound)
}

/// An HTTP/2 server that treats its n-th stream (from 0) as `answer` does.
pub(super) async fn streams(
    answer: impl Fn(u32, ::h2::server::SendResponse<Bytes>) + Clone + 'static,
) -> std::net::SocketAddr {
    let (listener, address) = listen().await;
    let count = Rc::new(Cell::new(0));
    tokio::task::spawn_local(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (answer, count) = (answer.clone(), count.clone());
            tokio::task::spawn_local(async move {
                let mut connection = ::h2::server::handshake(stream).await.unwrap();
                while let Some(Ok((_request, respond))) = connection.accept().await {
                    answer(count.replace(count.get() + 1), respond);
                }
            });
        }
    });
    address
}

fn reply(mut respond: ::h2::server::SendResponse<Bytes>, grpc_status: &'static str) {
    let response = ::http::Response::builder()
        .header("content-type", "application/grpc")
        .header("grpc-status", grpc_status)
        .body(())
        .unwrap();
    respond.send_response(response, true).unwrap();
}

#[test]
fn a_grpc_status_is_retried_where_that_is_safe() {
    run(async {
        let app = streams(|n, respond| reply(respond, if n == 0 { "14" } else { "0" })).await;
        let (client, outbound) = direct(app, Version::Http2, retries()).await;
        let mut sender = connect(outbound).await;
        let mut request = call("reviews", "");
        // gRPC is POST: only the caller can say that a repetition is harmless.
        request.headers_mut().insert("idempotency-key", "1".parse().unwrap());
        let response = within(sender.send_request(request)).await.unwrap();
        assert_eq!(response.headers()["grpc-status"], "0");
        assert_eq!(client.total(Metric::Attempts, &["demo/reviews", "retried"]), 1);
    });
    run(async {
        let app = streams(|_, respond| reply(respond, "14")).await;
        let (client, outbound) = direct(app, Version::Http2, retries()).await;
        let mut sender = connect(outbound).await;
        let response = within(sender.send_request(call("reviews", "x"))).await.unwrap();
        assert_eq!(response.headers()["grpc-status"], "14");
        assert_eq!(client.total(Metric::Attempts, &["demo/reviews", "retried"]), 0);
    });
}

#[test]
fn a_refused_stream_is_repeated_whatever_the_method() {
    run(async {
        let app = streams(|n, mut respond| match n {
            0 => respond.send_reset(::h2::Reason::REFUSED_STREAM),
            _ => reply(respond, "0"),
        })
        .await;
        let (client, outbound) = direct(app, Version::Http2, retries()).await;
        let mut sender = connect(outbound).await;
        let response = within(sender.send_request(call("reviews", ""))).await.unwrap();
        assert_eq!(response.headers()["grpc-status"], "0");
        assert_eq!(client.total(Metric::Attempts, &["demo/reviews", "retried"]), 1);
    });
}

#[test]
fn any_other_reset_is_not_repeated_for_post() {
    run(async {
        let app = streams(|n, mut respond| match n {
            0 => respond.send_reset(::h2::Reason::INTERNAL_ERROR),
            _ => reply(respond, "0"),
        })
        .await;
        let (_client, outbound) = direct(app, Version::Http2, retries()).await;
        let mut sender = connect(outbound).await;
        let response = within(sender.send_request(call("reviews", ""))).await.unwrap();
        assert_eq!(response.headers()["x-outrigger-reason"], "upstream-reset");
    });
}

#[test]
fn a_stream_above_a_goaway_is_repeated_on_a_new_connection() {
    run(async {
        let (listener, app) = listen().await;
        tokio::task::spawn_local(async move {
            let (mut going, _) = listener.accept().await.unwrap();
            let mut preface = [0; 24];
            going.read_exact(&mut preface).await.unwrap();
            write_frame(&mut going, 4, 0, &[]).await;
            while read_frame(&mut going).await.unwrap().0 != 1 {}
            // Last stream 0, no error: nothing was done with stream 1.
            write_frame(&mut going, 7, 0, &[0; 8]).await;
            let (stream, _) = listener.accept().await.unwrap();
            let mut connection = ::h2::server::handshake(stream).await.unwrap();
            while let Some(Ok((_, respond))) = connection.accept().await {
                reply(respond, "0");
            }
            drop(going);
        });
        let (client, outbound) = direct(app, Version::Http2, retries()).await;
        let mut sender = connect(outbound).await;
        let response = within(sender.send_request(call("reviews", ""))).await.unwrap();
        assert_eq!(response.headers()["grpc-status"], "0");
        assert_eq!(client.total(Metric::Attempts, &["demo/reviews", "retried"]), 1);
    });
}

#[test]
fn a_body_above_the_replay_buffer_is_sent_once() {
    run(async {
        for (method, size, attempts) in [("PUT", 60 * 1024, 3), ("PUT", 100 * 1024, 1), ("POST", 1024, 1)] {
            let bodies = Rc::new(RefCell::new(Vec::new()));
            let seen = bodies.clone();
            let app = app(move |request| {
                seen.borrow_mut().push(request.split_once("\r\n\r\n").unwrap().1.len());
                "HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n".into()
            })
            .await;
            let (client, outbound) = direct(app, Version::Http1, retries()).await;
            let head = format!("{method} / HTTP/1.1\r\nhost: reviews\r\ncontent-length: {size}\r\n\r\n");
            let response = exchange(outbound, &(head + &"x".repeat(size))).await;
            assert!(response.starts_with("HTTP/1.1 503 "), "{response}");
            assert_eq!(*bodies.borrow(), vec![size; attempts]);
            // As often as it went out: what the client sent.
            assert_eq!(client.logged("outbound")["sent"], size);
        }
    });
}

#[test]
fn the_requests_timeout_holds_for_the_body_too() {
    run(async {
        let (listener, app) = listen().await;
        let policy = wire::RoutePolicy { request_timeout_ms: 300, ..retries() };
        let (client, outbound) = direct(app, Version::Http1, policy).await;
        let mut stream = TcpStream::connect(outbound).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nhost: reviews\r\n\r\n").await.unwrap();
        let (mut server, _) = within(listener.accept()).await.unwrap();
        read_message(&mut server).await.unwrap();
        server.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf ").await.unwrap();
        let mut response = Vec::new();
        let _ = within(stream.read_to_end(&mut response)).await;
        assert!(response.ends_with(b"half "), "{}", String::from_utf8_lossy(&response));
        let line = client.logged("outbound");
        assert_eq!((&line["reason"], &line["status"]), (&"request-timeout".into(), &200.into()));
    });
}

/// A service whose one endpoint is ejected by its first failure, for a millisecond.
fn fragile() -> wire::Service {
    let mut fragile = service("reviews", wire::RoutePolicy::default());
    fragile.backends[0].policy.as_mut().unwrap().outlier = Some(wire::Outlier {
        consecutive_failures: 1,
        base_ejection_ms: 1,
        max_ejection_ms: 1,
        max_ejected_percent: 100,
    });
    fragile
}

fn state(client: &TestProxy) -> State {
    client.worker.proxy.clusters.get("demo/reviews:80").endpoints().endpoints()[0].state(Instant::now())
}

#[test]
fn a_long_lived_upgrade_is_a_finished_probe() {
    run(async {
        let app = app(|request| match request.contains("upgrade: websocket") {
            true => "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n".into(),
            false => "HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n".into(),
        })
        .await;
        let mut client = TestProxy::new("web");
        client.service(&fragile());
        client.endpoints("demo/reviews:80", vec![endpoint("one", app, None)]);
        let outbound = client.serve_outbound(Some(Version::Http1), None).await;
        let mut open = Vec::new();
        // The second time shows that the first upgrade, which is still open, gave its permit back.
        for _ in 0..2 {
            assert!(get(outbound, "reviews", "/").await.starts_with("HTTP/1.1 500 "));
            until("the ejection is over", || state(&client) == State::HalfOpen).await;
            let mut stream = TcpStream::connect(outbound).await.unwrap();
            let head = "GET / HTTP/1.1\r\nhost: reviews\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n";
            stream.write_all(head.as_bytes()).await.unwrap();
            let response = within(read_message(&mut stream)).await.unwrap();
            assert!(response.starts_with("HTTP/1.1 101 "), "{response}");
            until("the endpoint is back", || state(&client) == State::Healthy).await;
            open.push(stream);
        }
    });
}

#[test]
fn a_proxy_that_sheds_load_is_not_ejected() {
    run(async {
        for (reason, ejected) in [("overflow-requests", false), ("overloaded", false), ("connect-failure", true)] {
            let server = TestProxy::new("reviews");
            let identity = server.worker.proxy.identity.required().unwrap();
            let (listener, address) = listen().await;
            tokio::task::spawn_local(async move {
                let (stream, _) = listener.accept().await.unwrap();
                let (mut stream, _peer) = crate::tls::accept(stream, &identity, HANG).await.unwrap();
                read_message(&mut stream).await.unwrap();
                let response = format!("HTTP/1.1 503 No\r\nx-outrigger-reason: {reason}\r\ncontent-length: 0\r\n\r\n");
                stream.write_all(response.as_bytes()).await.unwrap();
                stream.flush().await.unwrap();
                let _ = stream.read_u8().await;
            });
            let mut client = TestProxy::new("web");
            client.service(&fragile());
            client.endpoints("demo/reviews:80", vec![endpoint("one", address, Some("reviews"))]);
            let outbound = client.serve_outbound(Some(Version::Http1), None).await;
            let response = get(outbound, "reviews", "/").await;
            assert!(response.contains(&format!("x-outrigger-reason: {reason}")), "{response}");
            assert_eq!(state(&client) != State::Healthy, ejected, "{reason}");
        }
    });
}

#[test]
fn trailers_with_a_failure_count_against_the_endpoint() {
    run(async {
        let app = super::h2::grpc_app("14").await;
        let mut client = TestProxy::new("web");
        client.service(&fragile());
        client.endpoints("demo/reviews:80", vec![endpoint("one", app, None)]);
        let outbound = client.serve_outbound(Some(Version::Http2), None).await;
        let mut sender = connect(outbound).await;
        let response = within(sender.send_request(call("reviews", "x"))).await.unwrap();
        within(response.into_body().collect()).await.unwrap();
        until("it is ejected", || state(&client) != State::Healthy).await;
    });
}

#[test]
fn what_a_client_gave_up_took_at_least_as_long() {
    run(async {
        let (client, outbound) = direct(hung().await, Version::Http1, retries()).await;
        let mut stream = TcpStream::connect(outbound).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nhost: reviews\r\n\r\n").await.unwrap();
        until("it is under way", || client.worker.load.running() == 1).await;
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        drop(stream);
        until("it is given up", || client.total(Metric::Attempts, &["demo/reviews", "cancelled"]) == 1).await;
        let set = client.worker.proxy.clusters.get("demo/reviews:80").endpoints();
        assert!(set.endpoints()[0].latency(Instant::now()) > 40_000.0, "a hung endpoint never looks good");
    });
}

#[test]
fn what_is_not_the_endpoints_doing_does_not_eject_it() {
    // A client that breaks its upload off.
    run(async {
        let mut client = TestProxy::new("web");
        client.service(&fragile());
        client.endpoints("demo/reviews:80", vec![endpoint("one", hung().await, None)]);
        let outbound = client.serve_outbound(Some(Version::Http1), None).await;
        let mut stream = TcpStream::connect(outbound).await.unwrap();
        stream.write_all(b"POST / HTTP/1.1\r\nhost: reviews\r\ncontent-length: 100\r\n\r\nhalf").await.unwrap();
        until("it is under way", || client.worker.load.running() == 1).await;
        drop(stream);
        until("it is over", || client.worker.load.running() == 0).await;
        assert_eq!(state(&client), State::Healthy);
    });
    // One that asks for what the endpoint's protocol has not.
    run(async {
        let app = streams(|_, respond| reply(respond, "0")).await;
        let mut client = TestProxy::new("web");
        let mut fragile = fragile();
        fragile.backends[0].protocol = wire::Protocol::Http2.into();
        client.service(&fragile);
        client.endpoints("demo/reviews:80", vec![endpoint("one", app, None)]);
        let outbound = client.serve_outbound(Some(Version::Http1), None).await;
        let websocket = "GET /chat HTTP/1.1\r\nhost: reviews\r\nupgrade: websocket\r\nconnection: Upgrade\r\n\r\n";
        let response = exchange(outbound, websocket).await;
        assert!(response.contains("x-outrigger-reason: upgrade-refused\r\n"), "{response}");
        assert_eq!(state(&client), State::Healthy);
    });
}

#[test]
fn a_stream_that_is_reset_before_its_end_is_not_passed_off_as_whole() {
    run(async {
        let (sending, mut receiving) = tokio::sync::mpsc::unbounded_channel();
        let app = streams(move |_, mut respond| {
            let mut body = respond.send_response(::http::Response::new(()), false).unwrap();
            body.send_data(Bytes::from_static(b"half"), false).unwrap();
            sending.send(body).unwrap();
        })
        .await;
        let (client, outbound) = direct(app, Version::Http2, wire::RoutePolicy::default()).await;
        let mut sender = connect(outbound).await;
        let mut body = within(sender.send_request(call("reviews", ""))).await.unwrap().into_body();
        assert_eq!(within(body.frame()).await.unwrap().unwrap().into_data().unwrap(), "half");
        receiving.recv().await.unwrap().send_reset(::h2::Reason::NO_ERROR);
        assert!(within(body.frame()).await.unwrap().is_err());
        until("it counts", || client.total(Metric::Attempts, &["demo/reviews", "failure"]) == 1).await;
    });
}
