//! What filters change is judged again: by routes, by authorization, by discovery.

use std::rc::Rc;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt};

use super::*;
use crate::metrics::Metric;

/// Two services behind one application that says what it was asked for.
async fn two_services(filter: (&str, &str)) -> (TestProxy, std::net::SocketAddr) {
    let app = app(|request| ok(request.lines().next().unwrap())).await;
    let mut client = TestProxy::new("web");
    client.rewriting_filter("guest", filter.0, filter.1).await;
    let mut reviews = service("reviews", retries());
    reviews.ports[0].filters = vec!["filter/demo/guest".into()];
    reviews.backends.push(backend("ratings"));
    let rule = |name: &str, backend: &str| wire::HttpRule {
        name: name.into(),
        backends: vec![wire::WeightedBackend {
            backend: backend.into(),
            weight: 1,
            ..wire::WeightedBackend::default()
        }],
        ..wire::HttpRule::default()
    };
    let matches = |path: &str, rule| wire::HttpMatch {
        path: Some(wire::http_match::Path::Prefix(path.into())),
        rule,
        ..wire::HttpMatch::default()
    };
    reviews.ports[0].routes = Some(wire::HttpRoutes {
        rules: vec![rule("demo/r/old", "demo/reviews:80"), rule("demo/r/new", "demo/ratings:80")],
        matches: vec![matches("/old", 0), matches("/new", 1)],
    });
    client.service(&reviews);
    client.service(&service("ratings", retries()));
    for name in ["reviews", "ratings"] {
        client.endpoints(&format!("demo/{name}:80"), vec![endpoint(name, app, None)]);
    }
    let outbound = client.serve_outbound(Some(Version::Http1), None).await;
    (client, outbound)
}

#[test]
fn a_new_path_selects_the_route_again() {
    run(async {
        let (client, outbound) = two_services((":path", "/x/../new?q")).await;
        let response = get(outbound, "reviews", "/old").await;
        assert!(
            response.ends_with("GET /x/../new?q HTTP/1.1"),
            "the application gets what the filter wrote: {response}"
        );
        let line = client.logged("outbound");
        assert_eq!(line["route"], "demo/r/new");
        assert_eq!(line["path"], "/old", "the log has what the client sent");
    });
}

#[test]
fn a_new_version_of_a_filter_serves_from_its_snapshot_on() {
    run(async {
        let (mut client, outbound) = two_services((":path", "/new/1")).await;
        for version in ["/new/1", "/new/2"] {
            client.rewriting_filter("guest", ":path", version).await;
            for _ in 0..2 {
                let response = get(outbound, "reviews", "/old").await;
                assert!(response.ends_with(&format!("GET {version} HTTP/1.1")), "{version}: {response}");
            }
        }
    });
}

#[test]
fn a_new_path_that_no_route_has_is_refused() {
    run(async {
        let (_client, outbound) = two_services((":path", "/nowhere")).await;
        let response = get(outbound, "reviews", "/old").await;
        assert!(response.contains("x-outrigger-reason: no-route"), "{response}");
    });
}

#[test]
fn a_new_path_is_normalised_again() {
    run(async {
        let (_client, outbound) = two_services((":path", "/old/%00")).await;
        let response = get(outbound, "reviews", "/old").await;
        assert!(response.contains("x-outrigger-reason: bad-request"), "{response}");
    });
}

#[test]
fn a_new_authority_is_another_destination() {
    run(async {
        let (client, outbound) = two_services((":authority", "ratings")).await;
        let response = get(outbound, "reviews", "/old").await;
        assert!(response.starts_with("HTTP/1.1 200 "), "{response}");
        assert_eq!(client.logged("outbound")["service"], "demo/ratings");
    });
    run(async {
        let (mut client, outbound) = two_services((":authority", "nobody")).await;
        client.absent("svc/demo/nobody");
        let response = get(outbound, "reviews", "/old").await;
        assert!(response.contains("x-outrigger-reason: unknown-service"), "{response}");
    });
}

#[test]
fn inbound_what_a_filter_wrote_is_authorized_again() {
    run(async {
        let app = app(|request| ok(request.lines().next().unwrap())).await;
        for (path, status) in [("/open/2", 200), ("/open/../admin", 403)] {
            let mut server = TestProxy::new("reviews");
            server.rewriting_filter("guest", ":path", path).await;
            let mut port = self_port(app, wire::MtlsMode::Permissive);
            port.filters = vec!["filter/demo/guest".into()];
            let to = wire::Operation { paths: vec!["/open/*".into()], ..wire::Operation::default() };
            let rule = wire::AuthorizationRule { name: "demo/p/0".into(), to: vec![to], ..Default::default() };
            port.authorization = Some(wire::Authorization {
                default_deny: true,
                allow: vec![rule],
                path_rules: true,
                ..wire::Authorization::default()
            });
            server.inbound(port);
            let inbound = server.serve_inbound(app, false).await;
            let response = get(inbound, "reviews", "/open/1").await;
            assert!(response.starts_with(&format!("HTTP/1.1 {status} ")), "{path}: {response}");
        }
    });
}

/// Appends `!` in every body callback, and pauses the request's body until its end.
const APPENDING: &str = r#"(module
    (import "env" "proxy_set_buffer_bytes" (func $set (param i32 i32 i32 i32 i32) (result i32)))
    (memory (export "memory") 1)
    (data (i32.const 1024) "!")
    (func (export "proxy_abi_version_0_2_1"))
    (func (export "malloc") (param i32) (result i32) (i32.const 4096))
    (func (export "proxy_on_request_body") (param i32 i32 i32) (result i32)
        (drop (call $set (i32.const 0) (i32.const -1) (i32.const 0) (i32.const 1024) (i32.const 1)))
        (i32.eqz (local.get 2)))
    (func (export "proxy_on_response_body") (param i32 i32 i32) (result i32)
        (drop (call $set (i32.const 1) (i32.const -1) (i32.const 0) (i32.const 1024) (i32.const 1)))
        (i32.const 0)))"#;

#[test]
fn c32_c34_c38_bodies_that_filters_change_are_framed_anew() {
    run(async {
        let app = app(|request| {
            assert!(request.contains("content-length: 6\r\n") && !request.contains("transfer-encoding"), "{request}");
            assert!(request.ends_with("\r\n\r\nabcd!!"), "{request}");
            ok("pong")
        })
        .await;
        let mut server = TestProxy::new("reviews");
        server.filter("appending", APPENDING).await;
        let mut port = self_port(app, wire::MtlsMode::Permissive);
        port.filters = vec!["filter/demo/appending".into()];
        server.inbound(port);
        let inbound = server.serve_inbound(app, false).await;
        let response = exchange(inbound, "POST / HTTP/1.1\r\nhost: reviews\r\ncontent-length: 4\r\n\r\nabcd").await;
        assert!(response.starts_with("HTTP/1.1 200 "), "{response}");
        // Once for the body, and once for its end.
        assert!(response.ends_with("\r\n\r\npong!!") && response.contains("content-length: 6\r\n"), "{response}");
    });
}

#[test]
fn c32_a_body_that_is_still_on_its_way_loses_its_length() {
    run(async {
        let (listener, app) = listen().await;
        let (mut server, mut port) = (TestProxy::new("reviews"), self_port(app, wire::MtlsMode::Permissive));
        server.filter("appending", APPENDING).await;
        port.filters = vec!["filter/demo/appending".into()];
        server.inbound(port);
        let inbound = server.serve_inbound(app, false).await;
        let mut client = tokio::net::TcpStream::connect(inbound).await.unwrap();
        client.write_all(b"POST / HTTP/1.1\r\nhost: reviews\r\ncontent-length: 4\r\n\r\n").await.unwrap();
        let (mut upstream, _) = within(listener.accept()).await.unwrap();
        let until = async |stream: &mut tokio::net::TcpStream, end: &str| {
            let mut text = String::new();
            while !text.ends_with(end) {
                text.push(char::from(within(stream.read_u8()).await.unwrap()));
            }
            text
        };
        let head = until(&mut upstream, "\r\n\r\n").await;
        assert!(head.contains("transfer-encoding: chunked") && !head.contains("content-length"), "{head}");
        client.write_all(b"abcd").await.unwrap();
        until(&mut upstream, "0\r\n\r\n").await;
        upstream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n").await.unwrap();
        let head = until(&mut client, "\r\n\r\n").await;
        assert!(head.contains("transfer-encoding: chunked") && !head.contains("content-length"), "{head}");
        upstream.write_all(b"pong").await.unwrap();
        let body = until(&mut client, "0\r\n\r\n").await;
        assert!(body.contains("pong"), "{body}");
    });
}

#[test]
fn c49_a_request_that_a_filter_holds_for_ever_ends_with_its_client() {
    run(async {
        let app = app(|_| ok("never")).await;
        let mut server = TestProxy::new("reviews");
        server
            .filter(
                "holding",
                &APPENDING
                    .replace("proxy_on_request_body", "proxy_on_request_headers")
                    .replace("(i32.eqz (local.get 2))", "(i32.const 1)"),
            )
            .await;
        let mut port = self_port(app, wire::MtlsMode::Permissive);
        port.filters = vec!["filter/demo/holding".into()];
        server.inbound(port);
        let inbound = server.serve_inbound(app, false).await;
        let mut stream = tokio::net::TcpStream::connect(inbound).await.unwrap();
        tokio::io::AsyncWriteExt::write_all(&mut stream, b"GET / HTTP/1.1\r\nhost: reviews\r\n\r\n").await.unwrap();
        drop(stream);
        let line = async {
            loop {
                if server.metrics().contains("code=\"0\"") {
                    return;
                }
                tokio::time::sleep(std::time::Duration::from_millis(2)).await;
            }
        };
        within(line).await;
    });
}

/// The service `reviews` at `app` behind one filter, which has timers.
async fn behind(app: std::net::SocketAddr, module: &str) -> (TestProxy, std::net::SocketAddr) {
    let mut client = TestProxy::new("web");
    crate::filter::connect(Some(Rc::new(crate::http::Callouts::new(&client.worker))));
    client.filter("guest", module).await;
    let mut reviews = service("reviews", retries());
    reviews.ports[0].filters = vec!["filter/demo/guest".into()];
    client.service(&reviews);
    client.endpoints("demo/reviews:80", vec![endpoint("one", app, None)]);
    let outbound = client.serve_outbound(Some(Version::Http1), None).await;
    (client, outbound)
}

/// Appends, in every body callback, the status of asking for the response's code: 0 if it is there.
const ASKING: &str = r#"(module
    (import "env" "proxy_get_property" (func $get (param i32 i32 i32 i32) (result i32)))
    (import "env" "proxy_set_buffer_bytes" (func $set (param i32 i32 i32 i32 i32) (result i32)))
    (memory (export "memory") 1)
    (data (i32.const 1024) "response\00code")
    (func (export "proxy_abi_version_0_2_1"))
    (func (export "malloc") (param i32) (result i32) (i32.const 4096))
    (func (export "proxy_on_response_body") (param i32 i32 i32) (result i32)
        (i32.store8 (i32.const 2048)
            (i32.add (i32.const 48) (call $get (i32.const 1024) (i32.const 13) (i32.const 512) (i32.const 516))))
        (drop (call $set (i32.const 1) (i32.const -1) (i32.const 0) (i32.const 2048) (i32.const 1)))
        (i32.const 0)))"#;

#[test]
fn c81_the_response_is_known_while_its_body_passes() {
    run(async {
        for answer in [ok("pong"), "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\npong\r\n0\r\n\r\n".into()]
        {
            let app = app(move |_| answer.clone()).await;
            let (_client, outbound) = behind(app, ASKING).await;
            let response = get(outbound, "reviews", "/").await;
            assert!(response.ends_with("pong00"), "{response}");
        }
    });
}

/// Holds a response from its headers on until the second tick after them.
const WAITING: &str = r#"(module
    (import "env" "proxy_set_tick_period_milliseconds" (func $tick (param i32) (result i32)))
    (import "env" "proxy_set_effective_context" (func $select (param i32) (result i32)))
    (import "env" "proxy_continue_stream" (func $resume (param i32) (result i32)))
    (memory (export "memory") 1)
    (global $context (mut i32) (i32.const 0))
    (global $left (mut i32) (i32.const 0))
    (func (export "proxy_abi_version_0_2_1"))
    (func (export "malloc") (param i32) (result i32) (i32.const 4096))
    (func (export "proxy_on_vm_start") (param i32 i32) (result i32) (drop (call $tick (i32.const 50))) (i32.const 1))
    (func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32)
        (global.set $context (local.get 0))
        (global.set $left (i32.const 2))
        (i32.const 1))
    (func (export "proxy_on_response_body") (param i32 i32 i32) (result i32) (i32.const 0))
    (func (export "proxy_on_tick") (param i32)
        (global.set $left (i32.sub (global.get $left) (i32.const 1)))
        (if (i32.eqz (global.get $left)) (then
            (drop (call $select (global.get $context)))
            (drop (call $resume (i32.const 1)))))))"#;

#[test]
fn a_response_that_a_filter_holds_is_the_endpoints_success_and_takes_as_long_as_it_is_held() {
    run(async {
        for answer in [ok("pong"), "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\npong\r\n0\r\n\r\n".into()]
        {
            let app = app(move |_| answer.clone()).await;
            let (client, outbound) = behind(app, WAITING).await;
            for _ in 0..2 {
                let response = get(outbound, "reviews", "/").await;
                assert!(response.ends_with("\r\n\r\npong"), "{response}");
                assert!(client.logged("outbound")["duration_ms"].as_f64().unwrap() >= 50.0);
            }
            assert_eq!(client.total(Metric::Attempts, &["demo/reviews", "success"]), 2);
            let connects = client.total(Metric::UpstreamConnects, &["demo/reviews", "success"]);
            assert_eq!(connects, 1, "what has been read to its end is used again");
        }
    });
}

#[test]
fn a_response_that_breaks_off_while_a_filter_holds_it_is_the_endpoints_failure() {
    run(async {
        let (listener, app) = listen().await;
        tokio::task::spawn_local(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            read_message(&mut stream).await.unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf").await.unwrap();
        });
        let (client, outbound) = behind(app, WAITING).await;
        let response = get(outbound, "reviews", "/").await;
        assert!(response.starts_with("HTTP/1.1 502 "), "{response}");
        assert!(response.contains("x-outrigger-reason: upstream-reset\r\n"), "{response}");
        assert_eq!(client.total(Metric::Attempts, &["demo/reviews", "failure"]), 1);
    });
}

#[test]
fn an_attempt_whose_client_goes_while_a_filter_holds_the_response_is_cancelled() {
    run(async {
        let (listener, app) = listen().await;
        let (client, outbound) = behind(app, &CROSSING.replace("HOLDS", "1")).await;
        let mut stream = tokio::net::TcpStream::connect(outbound).await.unwrap();
        tokio::io::AsyncWriteExt::write_all(&mut stream, b"GET / HTTP/1.1\r\nhost: reviews\r\n\r\n").await.unwrap();
        let (mut endpoint, _) = within(listener.accept()).await.unwrap();
        read_message(&mut endpoint).await.unwrap();
        let plugin = client.worker.snapshot().filters["filter/demo/guest"].plugin.clone().unwrap();
        let begun = plugin.calls();
        endpoint.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf").await.unwrap();
        until("the filter has it", || plugin.calls() > begun).await;
        drop(stream);
        let cancelled = || client.total(Metric::Attempts, &["demo/reviews", "cancelled"]);
        until("the attempt is told", || cancelled() == 1).await;
    });
}

/// Pauses the response's headers until the request has ended; an `x` in the request's body traps.
const CROSSING: &str = r#"(module
    (import "env" "proxy_get_buffer_bytes" (func $get (param i32 i32 i32 i32 i32) (result i32)))
    (import "env" "proxy_continue_stream" (func $resume (param i32) (result i32)))
    (memory (export "memory") 1)
    (func (export "proxy_abi_version_0_2_1"))
    (func (export "malloc") (param i32) (result i32) (i32.const 4096))
    (func (export "proxy_on_request_body") (param i32 i32 i32) (result i32)
        (drop (call $get (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 16) (i32.const 20)))
        (if (i32.and (i32.gt_u (local.get 1) (i32.const 0)) (i32.eq (i32.load8_u (i32.const 4096)) (i32.const 120)))
            (then unreachable))
        (if (local.get 2) (then (drop (call $resume (i32.const 1)))))
        (i32.const 0))
    (func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32) (i32.const HOLDS)))"#;

/// An application that answers as soon as it has a request's head, and its connection.
async fn early(answer: &'static [u8]) -> (std::net::SocketAddr, tokio::task::JoinHandle<tokio::net::TcpStream>) {
    let (listener, app) = listen().await;
    let task = tokio::task::spawn_local(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            head.push(char::from(stream.read_u8().await.unwrap()));
        }
        stream.write_all(answer).await.unwrap();
        stream
    });
    (app, task)
}

const UPLOAD: &[u8] = b"POST / HTTP/1.1\r\nhost: reviews\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n";

#[test]
fn a_response_that_is_resumed_by_the_end_of_the_request_leaves() {
    run(async {
        let (app, early) = early(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n").await;
        let (_client, outbound) = behind(app, &CROSSING.replace("HOLDS", "1")).await;
        let mut client = tokio::net::TcpStream::connect(outbound).await.unwrap();
        client.write_all(UPLOAD).await.unwrap();
        let _upstream = within(early).await.unwrap();
        // The head waits in the filter by now, and nobody polls for it.
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        client.write_all(b"0\r\n\r\n").await.unwrap();
        let mut status = [0; 12];
        within(client.read_exact(&mut status)).await.unwrap();
        assert_eq!(&status, b"HTTP/1.1 200");
    });
}

#[test]
fn c61_a_trap_in_the_request_behind_the_responses_head_resets_the_stream() {
    run(async {
        let (app, early) = early(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n").await;
        let (client, outbound) = behind(app, &CROSSING.replace("HOLDS", "0")).await;
        let mut stream = tokio::net::TcpStream::connect(outbound).await.unwrap();
        stream.write_all(UPLOAD).await.unwrap();
        let _upstream = within(early).await.unwrap();
        let mut status = [0; 12];
        within(stream.read_exact(&mut status)).await.unwrap();
        assert_eq!(&status, b"HTTP/1.1 200");
        stream.write_all(b"1\r\nx\r\n").await.unwrap();
        let mut rest = Vec::new();
        let _ = within(stream.read_to_end(&mut rest)).await;
        assert!(rest.ends_with(b"\r\n\r\n"), "nothing but the head: {}", String::from_utf8_lossy(&rest));
        client.logged("outbound");
    });
}

#[test]
fn a_filter_that_answers_in_the_poll_that_brings_the_endpoints_head_is_heard() {
    run(async {
        let chain = crate::filter::Chain::of(crate::filter::Filters::default(), crate::filter::StreamInfo::default());
        let stopping = chain.clone();
        let answer = std::pin::pin!(async move {
            stopping.stop_again(crate::filter::Stop::Local);
            Err(outrigger_core::reason::Reason::UpstreamReset.into())
        });
        let answer = crate::http::filtered::unless_stopped(Some(chain), answer).await;
        assert!(matches!(answer, Ok(crate::http::exchange::Answer::Filters)));
    });
}

#[test]
fn a_client_that_expects_a_word_is_told_to_go_on_by_nobody_while_a_filter_waits() {
    run(async {
        let app = app(|_| ok("never")).await;
        let holding = APPENDING
            .replace("proxy_on_request_body", "proxy_on_request_headers")
            .replace("(i32.eqz (local.get 2))", "(i32.const 1)");
        let (_client, outbound) = behind(app, &holding).await;
        let mut stream = tokio::net::TcpStream::connect(outbound).await.unwrap();
        let head = b"POST / HTTP/1.1\r\nhost: reviews\r\nexpect: 100-continue\r\ncontent-length: 4\r\n\r\n";
        stream.write_all(head).await.unwrap();
        let word = tokio::time::timeout(std::time::Duration::from_millis(100), stream.read_u8()).await;
        assert!(word.is_err(), "{word:?}");
    });
}

/// Says in a header of the response which path the request had when it left the filters.
const REMEMBERING: &str = r#"(module
    (import "env" "proxy_get_property" (func $get (param i32 i32 i32 i32) (result i32)))
    (import "env" "proxy_add_header_map_value" (func $add (param i32 i32 i32 i32 i32) (result i32)))
    (memory (export "memory") 1)
    (data (i32.const 1024) "request\00path")
    (data (i32.const 1040) "x-path")
    (func (export "proxy_abi_version_0_2_1"))
    (func (export "malloc") (param i32) (result i32) (i32.const 4096))
    (func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32)
        (drop (call $get (i32.const 1024) (i32.const 12) (i32.const 512) (i32.const 516)))
        (drop (call $add (i32.const 2) (i32.const 1040) (i32.const 6)
            (i32.load (i32.const 512)) (i32.load (i32.const 516))))
        (i32.const 0)))"#;

#[test]
fn what_a_route_makes_of_a_request_is_not_what_its_filters_remember() {
    run(async {
        let app = app(|request| ok(request.lines().next().unwrap())).await;
        let mut client = TestProxy::new("web");
        client.filter("guest", REMEMBERING).await;
        let mut reviews = service("reviews", retries());
        reviews.ports[0].filters = vec!["filter/demo/guest".into()];
        let path = wire::PathModifier { path: Some(wire::path_modifier::Path::Full("/sent".into())) };
        let rewrite = wire::Rewrite { path: Some(path), ..wire::Rewrite::default() };
        let rewrite = wire::RouteFilter { filter: Some(wire::route_filter::Filter::Rewrite(rewrite)) };
        reviews.ports[0].routes = Some(wire::HttpRoutes {
            rules: vec![wire::HttpRule {
                name: "demo/r/0".into(),
                backends: vec![wire::WeightedBackend {
                    backend: "demo/reviews:80".into(),
                    weight: 1,
                    ..wire::WeightedBackend::default()
                }],
                filters: vec![rewrite],
                ..wire::HttpRule::default()
            }],
            matches: vec![wire::HttpMatch::default()],
        });
        client.service(&reviews);
        client.endpoints("demo/reviews:80", vec![endpoint("one", app, None)]);
        let outbound = client.serve_outbound(Some(Version::Http1), None).await;
        let response = get(outbound, "reviews", "/asked?for").await;
        assert!(response.contains("\r\nx-path: /asked?for\r\n"), "{response}");
        assert!(response.ends_with("GET /sent?for HTTP/1.1"), "{response}");
    });
}
