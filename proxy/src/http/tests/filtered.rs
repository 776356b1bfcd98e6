//! What filters change is judged again: by routes, by authorization, by discovery.

use super::*;

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
