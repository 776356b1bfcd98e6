//! What operators see: access log, traces, metrics and the admin endpoints.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use std::net::IpAddr;

use outrigger_e2e::{Backend, Curl, Pair, Proxy, Response, until};
use serde_json::Value;

fn loopback() -> IpAddr {
    [127, 0, 0, 1].into()
}

fn start() -> Pair {
    let pair = Pair::start(Backend::http(loopback(), "v1"));
    assert_eq!(pair.call("/").send().status, 200);
    pair
}

fn mesh_config(spec: &str) -> String {
    format!("apiVersion: outrigger.dev/v1alpha1\nkind: MeshConfig\nmetadata: {{name: default}}\nspec: {{{spec}}}\n")
}

/// Access log lines about this path.
fn lines(proxy: &Proxy, path: &str) -> Vec<Value> {
    let log = proxy.process.log();
    let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.filter(|line| line["kind"] == "access" && line["path"] == path).collect()
}

#[test]
fn the_access_log_says_what_its_mode_asks_for() {
    let pair = start();
    assert_eq!(pair.call("/status/404").send().status, 404);
    assert_eq!(pair.call("/status/500?token=secret").args(["--data", "x"]).send().status, 500);
    let line = until("the failure is logged", || lines(&pair.web, "/status/500").pop());
    for (field, value) in [
        ("direction", "outbound"),
        ("protocol", "http/1.1"),
        ("method", "POST"),
        ("authority", "app"),
        ("service", "demo/app"),
        ("version", "v1"),
    ] {
        assert_eq!(line[field], value, "{field}: {line}");
    }
    assert_eq!((&line["status"], &line["attempts"]), (&500.into(), &1.into()), "{line}");
    assert!(line["duration_ms"].is_number() && line["upstream"].is_string() && line["client"].is_string(), "{line}");
    assert!(!pair.web.process.log().contains("secret"), "queries may hold secrets");
    // The other side knows who called.
    let inbound = until("the failure is logged there", || lines(&pair.proxy, "/status/500").pop());
    assert_eq!(inbound["peer"], "spiffe://cluster.local/ns/demo/sa/web", "{inbound}");
    assert_eq!(inbound["trace_id"], line["trace_id"], "one trace: {inbound}");
    // By default only errors are.
    assert!(lines(&pair.web, "/status/404").is_empty() && lines(&pair.web, "/").is_empty());
    // A response of the mesh itself says why.
    assert_eq!(pair.web.call("app:81", "/why").send().status, 503);
    let why = until("the refusal is logged", || lines(&pair.web, "/why").pop());
    assert_eq!(why["reason"], "unknown-port", "{why}");

    pair.mesh.write("more.yaml", &mesh_config("accessLog: {mode: All}"));
    until("everything is logged", || {
        assert_eq!(pair.call("/all").send().status, 200);
        lines(&pair.web, "/all").pop()
    });
    pair.mesh.write("more.yaml", &mesh_config("accessLog: {mode: Off}"));
    // What is logged stops. A line may wait a tenth of a second, and fifty calls take longer.
    let mut unlogged = 0;
    until("nothing is logged any more", || {
        let before = lines(&pair.web, "/status/500").len();
        (0..5).for_each(|_| assert_eq!(pair.call("/status/500").args(["--data", "x"]).send().status, 500));
        unlogged = if lines(&pair.web, "/status/500").len() == before { unlogged + 5 } else { 0 };
        (unlogged >= 50).then_some(())
    });
}

#[test]
fn traces_are_continued_and_begun() {
    let pair = start();
    let sent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let traced = |traceparent: &str| {
        let call = pair.call("/").header("traceparent", traceparent).header("tracestate", "vendor=1");
        assert_eq!(call.send().status, 200);
        let request = pair.app.requests().pop().unwrap();
        let parent = request.header("traceparent").unwrap().to_owned();
        (parent, request.header("tracestate").map(str::to_owned))
    };
    let (parent, state) = traced(sent);
    let parts: Vec<&str> = parent.split('-').collect();
    assert_eq!((parts[0], parts[1], parts[3]), ("00", "4bf92f3577b34da6a3ce929d0e0e4736", "01"), "{parent}");
    assert_ne!(parts[2], "00f067aa0ba902b7", "each hop is a span of its own");
    assert_eq!(state.as_deref(), Some("vendor=1"));

    for broken in [
        "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
        "garbage",
        "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    ] {
        let (parent, state) = traced(broken);
        let parts: Vec<&str> = parent.split('-').collect();
        assert_eq!((parts.len(), parts[1].len(), parts[2].len()), (4, 32, 16), "{broken} became {parent}");
        assert!(!broken.contains(parts[1]), "{broken} became {parent}");
        assert_eq!(state, None, "a state without its trace means nothing");
    }
    // And where none is given, one begins.
    assert_eq!(pair.call("/").send().status, 200);
    assert!(pair.app.requests().pop().unwrap().header("traceparent").is_some());
}

/// Labels of web's requests.
fn with_code(code: &str) -> [(&str, &str); 4] {
    [("direction", "outbound"), ("service", "demo/app"), ("version", "v1"), ("code", code)]
}

#[test]
fn metrics_count_what_happened() {
    let pair = start();
    for (path, status) in [("/", 200), ("/status/404", 404), ("/status/404", 404)] {
        assert_eq!(pair.call(path).send().status, status);
    }
    assert_eq!(pair.web.call("app:81", "/").send().status, 503);

    let (web, app) = (pair.web.metrics(), pair.proxy.metrics());
    let count =
        |metrics: &outrigger_e2e::Metrics, name: &str, labels: &[(&str, &str)]| metrics.sum(name, labels).to_string();
    assert_eq!(count(&web, "outrigger_requests_total", &with_code("200")), "2");
    assert_eq!(count(&web, "outrigger_requests_total", &with_code("404")), "2");
    assert_eq!(count(&web, "outrigger_requests_total", &[("code", "503"), ("reason", "unknown-port")]), "1");
    assert_eq!(
        count(&app, "outrigger_requests_total", &[("direction", "inbound"), ("code", "404"), ("version", "v1")]),
        "2"
    );
    for (metrics, direction) in [(&web, "outbound"), (&app, "inbound")] {
        let labels = [("direction", direction), ("version", "v1")];
        assert_eq!(count(metrics, "outrigger_request_duration_seconds_count", &labels), "4");
        let all = [("direction", direction), ("version", "v1"), ("le", "+Inf")];
        assert_eq!(count(metrics, "outrigger_request_duration_seconds_bucket", &all), "4");
        assert!(metrics.sum("outrigger_request_duration_seconds_sum", &labels) > 0.0);
    }
    assert_eq!(count(&web, "outrigger_attempts_total", &[("service", "demo/app"), ("outcome", "success")]), "4");
    let peer = |name: &str| format!("spiffe://cluster.local/ns/demo/sa/{name}");
    assert_eq!(
        count(&web, "outrigger_tls_connections_total", &[("direction", "outbound"), ("peer", &peer("app"))]),
        "1"
    );
    assert_eq!(
        count(&app, "outrigger_tls_connections_total", &[("direction", "inbound"), ("peer", &peer("web"))]),
        "1"
    );
    assert_eq!(count(&web, "outrigger_upstream_connections", &[("service", "demo/app")]), "1");
    assert_eq!(
        count(&web, "outrigger_upstream_connects_total", &[("service", "demo/app"), ("outcome", "success")]),
        "1"
    );
    assert_eq!(
        count(&app, "outrigger_upstream_connects_total", &[("service", "demo/app"), ("outcome", "success")]),
        "1"
    );
    assert_eq!(count(&app, "outrigger_authorization_total", &[("decision", "allow")]), "4");
}

#[test]
fn an_idle_connection_is_closed_after_the_policys_time() {
    let policy = "apiVersion: outrigger.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {name: app, namespace: demo}\n\
         spec: {targetRefs: [{group: '', kind: Service, name: app}], timeouts: {idle: 100ms}}\n";
    let pair = Pair::start_with(policy, Backend::http(loopback(), "v1"), &[], &[]);
    assert_eq!(pair.call("/").send().status, 200);
    let service = [("service", "demo/app")];
    assert!(pair.web.metrics().sum("outrigger_upstream_connects_total", &service) >= 1.0);
    until("it is closed", || (pair.web.metrics().sum("outrigger_upstream_connections", &service) < 0.5).then_some(()));
    assert_eq!(pair.call("/").send().status, 200, "and another is made");
}

fn admin(pair: &Pair, path: &str) -> Curl {
    Curl::get(&format!("http://{}:15000{path}", pair.web.ip()))
}

#[test]
fn admin_endpoints_show_what_the_proxy_does() {
    let pair = start();
    let get = |path: &str| {
        let response = pair.web.admin(path);
        assert_eq!(response.status, 200, "{path}: {response:?}");
        response
    };
    assert_eq!((get("/ready").body.as_str(), get("/live").body.as_str()), ("ready\n", "live\n"));
    let config = get("/config").json();
    assert_eq!(config["workload"], "demo/web-0");
    let destinations = config["destinations"].as_array().unwrap();
    assert!(destinations.iter().any(|it| it["key"] == "svc/demo/app" && it["kind"] == "service"), "{config}");
    assert_eq!(pair.proxy.admin("/config").json()["inbound"][0]["mtls"], "Permissive");
    let clusters = get("/clusters").json();
    assert_eq!(clusters[0]["key"], "demo/app:80", "{clusters}");
    let endpoint = &clusters[0]["endpoints"][0];
    assert_eq!(endpoint["identity"], "spiffe://cluster.local/ns/demo/sa/app", "{clusters}");
    assert_eq!((&endpoint["state"], &endpoint["inFlight"]), (&"Healthy".into(), &0.into()), "{clusters}");
    let certs = get("/certs").json();
    assert_eq!((&certs["identity"], &certs["valid"]), (&"spiffe://cluster.local/ns/demo/sa/web".into(), &true.into()));
    assert_eq!(certs["roots"].as_array().map(Vec::len), Some(1), "{certs}");
    assert!(get("/filters").json().is_array());
    let stats = get("/stats").json();
    assert_eq!((&stats["phase"], &stats["connected"]), (&"serving".into(), &true.into()), "{stats}");
    assert!(get("/metrics").body.contains("outrigger_requests_total"));
    // Every request passed through every part, and was counted there.
    passed_through(&pair.web, "outbound", &["timed", "traced", "judged"]);
    passed_through(&pair.proxy, "inbound", &["timed", "traced", "allowed"]);
    assert_eq!(pair.web.admin("/nothing").status, 404);

    // The health port has what probes and scrapers need, and nothing else.
    let health = |path: &str| Curl::get(&format!("http://{}:15020{path}", pair.web.ip())).send();
    assert_eq!(["/ready", "/live", "/metrics"].map(|path| health(path).status), [200; 3]);
    assert_eq!(["/config", "/certs", "/drain"].map(|path| health(path).status), [404; 3]);
}

fn passed_through(proxy: &Proxy, direction: &str, parts: &[&str]) {
    until("the parts have seen every request", || {
        let stats = proxy.admin("/stats").json();
        let seen = |part: &str| stats["requests"][direction][part].as_u64().unwrap();
        (seen("ended") > 0 && parts.iter().all(|part| seen(part) == seen("ended"))).then_some(())
    });
}

#[test]
fn the_log_level_changes_while_running() {
    let pair = start();
    let put = |query: &str| admin(&pair, &format!("/log{query}")).args(["--request", "PUT"]).send();
    assert!(!pair.web.process.log().contains("DEBUG"));
    assert_eq!(put("?level=debug").status, 200);
    until("debug lines appear", || {
        // A client that breaks off in the middle of a head.
        let mut raw = pair.raw();
        raw.send("GET / HTTP/1.1\r\nHo");
        drop(raw);
        pair.web.process.log().contains("DEBUG").then_some(())
    });
    let bad = put("?level=loud==");
    assert_eq!((bad.status, bad.body.contains("loud")), (400, true), "{bad:?}");
    assert_eq!(put("").status, 400);
    assert_eq!(admin(&pair, "/log?level=debug").send().status, 405, "reading changes nothing");
}

#[test]
fn no_page_in_a_browser_reaches_the_admin_endpoints() {
    let mut pair = start();
    let refused = |response: Response| assert_eq!(response.status, 403, "{response:?}");
    refused(admin(&pair, "/config").header("host", "evil.example").send());
    refused(admin(&pair, "/config").header("origin", "https://evil.example").send());
    let drain = |pair: &Pair| admin(pair, "/drain").args(["--request", "POST"]);
    refused(drain(&pair).header("origin", "http://evil.example").send());
    refused(drain(&pair).header("host", "evil.example:15000").send());
    assert_eq!(admin(&pair, "/drain").send().status, 405, "a link cannot drain");
    assert!(pair.web.process.is_running());
    assert_eq!(pair.web.admin("/ready").status, 200);
}
