//! Limits and times of connections to endpoints.

use super::*;
use crate::metrics::Metric;

/// The service `reviews` with a change to its backend's policy.
fn with(change: impl FnOnce(&mut wire::ClusterPolicy)) -> wire::Service {
    let mut service = service("reviews", wire::RoutePolicy::default());
    change(service.backends[0].policy.as_mut().unwrap());
    service
}

#[test]
fn requests_wait_for_a_connection_only_up_to_the_limit() {
    run(async {
        let (listener, app) = listen().await;
        let mut client = TestProxy::new("web");
        client.service(&with(|policy| {
            let breaker = policy.breaker.as_mut().unwrap();
            (breaker.max_connections, breaker.max_pending_requests) = (1, 1);
        }));
        client.endpoints("demo/reviews:80", vec![endpoint("one", app, None)]);
        let outbound = client.serve_outbound(Some(Version::Http1), None).await;
        let breaker = client.worker.proxy.clusters.get("demo/reviews:80").breaker.clone();
        let count = |kind| breaker.count(kind);
        let first = tokio::task::spawn_local(get_owned(outbound));
        let (mut server, _) = within(listener.accept()).await.unwrap();
        // Its request is here: the first waits for no connection any more.
        read_message(&mut server).await.unwrap();
        let second = tokio::task::spawn_local(get_owned(outbound));
        until("the second waits", || count(outrigger_core::breaker::Kind::Pending) == 1).await;
        let third = get(outbound, "reviews", "/").await;
        assert!(third.contains("x-outrigger-reason: overflow-pending"), "{third}");
        server.write_all(ok("one").as_bytes()).await.unwrap();
        assert!(within(first).await.unwrap().ends_with("one"));
        within(read_message(&mut server)).await.unwrap();
        server.write_all(ok("two").as_bytes()).await.unwrap();
        assert!(within(second).await.unwrap().ends_with("two"));
        assert_eq!(client.total(Metric::UpstreamConnects, &["demo/reviews"]), 1, "both used the one connection");
    });
}

#[test]
fn an_endpoint_that_does_not_shake_hands_is_given_up() {
    run(async {
        let (_silent, address) = listen().await;
        let mut client = TestProxy::new("web");
        client.service(&with(|policy| policy.connect_timeout_ms = 50));
        client.endpoints("demo/reviews:80", vec![endpoint("one", address, Some("reviews"))]);
        let outbound = client.serve_outbound(Some(Version::Http1), None).await;
        let response = get(outbound, "reviews", "/").await;
        assert!(response.contains("x-outrigger-reason: connect-timeout"), "{response}");
        assert_eq!(client.total(Metric::UpstreamConnects, &["demo/reviews", "connect-timeout"]), 1);
    });
}

#[test]
fn an_idle_connection_is_closed_after_its_time() {
    run(async {
        let app = app(|_| ok("hello")).await;
        let mut client = TestProxy::new("web");
        client.service(&with(|policy| policy.idle_timeout_ms = 1));
        client.endpoints("demo/reviews:80", vec![endpoint("one", app, None)]);
        let outbound = client.serve_outbound(Some(Version::Http1), None).await;
        get(outbound, "reviews", "/").await;
        let open = || client.total(Metric::UpstreamConnections, &["outbound", "demo/reviews"]);
        until("the connection is closed", || open() == 0).await;
    });
}
