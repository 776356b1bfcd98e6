//! WASM filters through the control plane, seen by curl, h2load and the application.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use std::fs;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use outrigger_e2e::{Backend, Guest, Mesh, Proxy, example_filter, until};
use serde_json::Value;

const SERVICES: &str = "
apiVersion: v1
kind: Service
metadata: {name: reviews, namespace: demo}
spec: {selector: {app: reviews}, ports: [{name: http, port: 80, targetPort: http}]}
";

/// One service with filters, and a caller.
struct Filtered {
    web: Proxy,
    reviews: Proxy,
    application: Backend,
    mesh: Mesh,
}

impl Filtered {
    fn start() -> Self {
        let mesh = Mesh::start(SERVICES);
        let application = Backend::http([127, 0, 0, 1].into(), "v1");
        let reviews = mesh.proxy("reviews-0").labels("app=reviews").app(&application.address());
        let reviews = reviews.flag("--workers", "2").start();
        let web = mesh.proxy("web-0").start();
        let this = Self { web, reviews, application, mesh };
        until("web reaches reviews", || (this.get("/ready").status == 200).then_some(()));
        this
    }

    fn get(&self, path: &str) -> outrigger_e2e::Response {
        self.web.call("reviews", path).send()
    }

    /// What the application received with this path, last of all.
    fn received(&self, path: &str) -> outrigger_e2e::Recorded {
        let all = self.application.requests();
        all.iter().rfind(|request| request.path == path).unwrap_or_else(|| panic!("no {path} in {all:?}")).clone()
    }

    fn module(&self, name: &str, guest: &Guest) -> String {
        guest.write(&self.mesh.path("config").join(name))
    }

    /// Writes filters on `reviews`: name and the rest of the spec.
    fn filters(&self, filters: &[(&str, &str)]) {
        let yaml = |(name, spec): &(&str, &str)| {
            format!(
                "apiVersion: outrigger.dev/v1alpha1\nkind: WasmFilter\nmetadata: {{name: {name}, namespace: demo}}\n\
                 spec:\n  targetRefs: [{{group: \"\", kind: Service, name: reviews}}]\n{}\n---\n",
                spec.lines().map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n")
            )
        };
        self.mesh.write("filters.yaml", &filters.iter().map(yaml).collect::<String>());
    }

    /// The row of a filter in `/filters` of the application's proxy.
    fn row(&self, name: &str) -> Option<Value> {
        let rows = self.reviews.admin("/filters").json();
        rows.as_array()?.iter().find(|row| row["name"] == name).cloned()
    }

    /// Waits until the application's proxy runs this filter, in this version if one is given.
    #[track_caller]
    fn serving(&self, name: &str, sha256: &str) -> Value {
        until(&format!("{name} serves"), || {
            self.row(name)
                .filter(|row| row["sha256"].as_str().is_some_and(|is| is.starts_with(sha256)))
                .filter(|row| row["health"] == "running" && row["instances"] == 2)
        })
    }

    /// Waits until `outrigger status` says all of this.
    #[track_caller]
    fn status_says(&self, parts: &[&str]) {
        until(&format!("`outrigger status` says {parts:?}"), || {
            let table = String::from_utf8(self.mesh.outrigger(&["status"]).stdout).unwrap();
            parts.iter().all(|part| table.contains(part)).then_some(())
        });
    }
}

const POLICY: &str = "module: {file: policy.wasm}\nconfiguration:\n  request: {x-from-filter: one}\n  \
    response: {x-demo-filter: one}\n  refuse: {header: x-refuse, status: 418, body: no tea}\n";

#[test]
fn the_rust_example_sets_headers_and_answers_by_its_configuration() {
    let mesh = Filtered::start();
    fs::copy(example_filter("header-policy"), mesh.mesh.path("config/policy.wasm")).unwrap();
    mesh.filters(&[("policy", POLICY)]);
    mesh.serving("policy", "");

    let response = mesh.get("/one");
    assert_eq!((response.status, response.header("x-demo-filter")), (200, Some("one")), "{response:?}");
    assert_eq!(mesh.received("/one").header("x-from-filter"), Some("one"));
    let refused = mesh.web.call("reviews", "/refused").header("x-refuse", "1").send();
    assert_eq!((refused.status, refused.body.as_str()), (418, "no tea"), "{refused:?}");
    assert_eq!(refused.reason(), Some("filter-response"));
    assert_eq!(refused.header("x-demo-filter"), Some("one"), "response filters see it too");
    assert!(mesh.application.requests().iter().all(|request| request.path != "/refused"));

    mesh.filters(&[("policy", &POLICY.replace("one", "two"))]);
    until("the new configuration applies", || (mesh.get("/two").header("x-demo-filter") == Some("two")).then_some(()));
    assert_eq!(mesh.received("/two").header("x-from-filter"), Some("two"));

    mesh.filters(&[]);
    until("it is gone", || mesh.get("/none").header("x-demo-filter").is_none().then_some(()));
    assert!(mesh.row("policy").is_none());
}

#[test]
fn an_outbound_filter_acts_at_the_caller() {
    let mesh = Filtered::start();
    fs::copy(example_filter("header-policy"), mesh.mesh.path("config/policy.wasm")).unwrap();
    mesh.filters(&[("policy", &format!("direction: Outbound\n{POLICY}"))]);
    until("it serves", || (mesh.get("/one").header("x-demo-filter") == Some("one")).then_some(()));

    assert_eq!(mesh.received("/one").header("x-from-filter"), Some("one"));
    let calls = mesh.reviews.metrics().sum("outrigger_requests_total", &[("direction", "inbound")]);
    let refused = mesh.web.call("reviews", "/refused").header("x-refuse", "1").send();
    assert_eq!((refused.status, refused.reason()), (418, Some("filter-response")), "{refused:?}");
    let after = mesh.reviews.metrics().sum("outrigger_requests_total", &[("direction", "inbound")]);
    assert!((calls - after).abs() < f64::EPSILON, "it never left the caller's proxy");
    assert!(mesh.row("policy").is_none(), "the other side does not even know it");
}

#[test]
fn a_rules_filters_run_for_its_requests_only_among_those_of_the_service() {
    let mesh = Filtered::start();
    for name in ["service", "rule", "named"] {
        mesh.module(&format!("{name}.wasm"), &Guest::adds("0_2_1", "x-passed", name));
    }
    let route = "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: reviews, namespace: demo}\nspec:\n  \
                 parentRefs: [{group: \"\", kind: Service, name: reviews}]\n  rules:\n  \
                 - {name: canary, matches: [{path: {type: PathPrefix, value: /canary}}], backendRefs: [{name: reviews, port: 80}],\n     \
                 filters: [{type: ExtensionRef, extensionRef: {group: outrigger.dev, kind: WasmFilter, name: named}}]}\n  \
                 - {name: rest, backendRefs: [{name: reviews, port: 80}]}\n";
    let filter = |name: &str, spec: &str| {
        format!(
            "---\napiVersion: outrigger.dev/v1alpha1\nkind: WasmFilter\nmetadata: {{name: {name}, namespace: demo}}\n\
             spec: {{module: {{file: {name}.wasm}}, {spec}}}\n"
        )
    };
    let targets =
        "targetRefs: [{group: gateway.networking.k8s.io, kind: HTTPRoute, name: reviews, sectionName: canary}]";
    let service = "direction: Outbound, order: 5, targetRefs: [{group: '', kind: Service, name: reviews}]";
    let yaml = [
        route.to_owned(),
        filter("service", service),
        filter("rule", &format!("order: 9, {targets}")),
        filter("named", "order: 1"),
    ];
    mesh.mesh.write("routed.yaml", &yaml.concat());
    let passed = |path: &str| {
        let response = mesh.get(path);
        let values = response.headers.iter().filter(|(name, _)| name == "x-passed");
        values.map(|(_, value)| value.clone()).collect::<Vec<_>>()
    };
    // Last in the request's order is first in the response's.
    until("all of them serve", || (passed("/canary/x") == ["rule", "service", "named"]).then_some(()));
    assert_eq!(passed("/other"), ["service"]);

    let gone = yaml[..3].concat();
    mesh.mesh.write("routed.yaml", &gone);
    until("a filter that is named and not there fails the rule's requests", || {
        (mesh.get("/canary/x").reason() == Some("filter-failed")).then_some(())
    });
    assert_eq!(passed("/other"), ["service"], "and no others");
}

#[test]
fn filters_of_both_abis_run_in_order_and_back() {
    let mesh = Filtered::start();
    mesh.module("a.wasm", &Guest::adds("0_2_0", "x-order", "first"));
    mesh.module("b.wasm", &Guest::adds("0_2_1", "x-order", "second").import("get_log_level", 1));
    // The names sort the other way round.
    mesh.filters(&[("z", "order: 1\nmodule: {file: a.wasm}"), ("y", "order: 2\nmodule: {file: b.wasm}")]);
    mesh.serving("y", "");
    mesh.serving("z", "");

    let response = mesh.get("/order");
    let values = |headers: &[(String, String)]| -> Vec<String> {
        headers.iter().filter(|(name, _)| name == "x-order").map(|(_, value)| value.clone()).collect()
    };
    assert_eq!(values(&mesh.received("/order").headers), ["first", "second"]);
    assert_eq!(values(&response.headers), ["second", "first"]);
}

#[test]
fn a_refused_module_leaves_the_old_one_serving_and_is_named() {
    let mesh = Filtered::start();
    let good = mesh.module("f.wasm", &Guest::adds("0_2_0", "x-version", "1"));
    mesh.filters(&[("f", "module: {file: f.wasm}")]);
    mesh.serving("f", &good);

    // A function of 0.2.1 only.
    mesh.module("f.wasm", &Guest::adds("0_2_0", "x-version", "2").import("get_log_level", 1));
    mesh.status_says(&["reviews-0", "filter/demo/f", "proxy_get_log_level"]);
    assert_eq!(mesh.get("/").header("x-version"), Some("1"));
    let row = mesh.row("f").unwrap();
    assert_eq!(row["sha256"], good.as_str());
    assert!(row["refused"].as_str().unwrap().contains("proxy_get_log_level"), "{row}");
    let refused = mesh.reviews.metrics().sum("outrigger_filter_refused", &[("filter", "demo/f")]);
    assert!((refused - 1.0).abs() < f64::EPSILON);

    // Its configuration is refused by the guest itself, after an endless loop was.
    let looping = "(func (export \"proxy_on_configure\") (param i32 i32) (result i32) (loop $l (br $l)) (i32.const 1))";
    mesh.module("f.wasm", &Guest::adds("0_2_1", "x-version", "2").field(looping));
    mesh.status_says(&["filter/demo/f", "proxy_on_configure"]);
    assert_eq!(mesh.get("/").header("x-version"), Some("1"));

    let new = mesh.module("f.wasm", &Guest::adds("0_2_1", "x-version", "3"));
    let row = mesh.serving("f", &new);
    assert_eq!(row["refused"], Value::Null);
    assert_eq!(mesh.get("/").header("x-version"), Some("3"));
}

#[test]
fn a_filter_whose_first_version_is_refused_is_listed_and_goes_by_its_policy() {
    let mesh = Filtered::start();
    fs::write(mesh.mesh.path("config/bad.wasm"), "no module").unwrap();
    mesh.filters(&[("bad", "module: {file: bad.wasm}")]);
    until("it is refused", || (mesh.row("bad")?["health"] == "refused").then_some(()));
    let response = mesh.get("/");
    assert_eq!((response.status, response.reason()), (503, Some("filter-failed")), "{response:?}");

    mesh.filters(&[("bad", "module: {file: bad.wasm}\nfailurePolicy: FailOpen")]);
    until("it is left out", || (mesh.get("/").status == 200).then_some(()));
    mesh.filters(&[]);
    until("it is gone", || mesh.row("bad").is_none().then_some(()));
}

#[test]
fn a_filter_without_its_module_goes_by_its_policy() {
    let mesh = Filtered::start();
    mesh.filters(&[("absent", "module: {file: absent.wasm}")]);
    until("what it guards is closed", || {
        let response = mesh.get("/");
        (response.status == 503 && response.reason() == Some("filter-failed")).then_some(())
    });
    mesh.status_says(&["absent", "spec.module.file", "absent.wasm"]);
    let filters = mesh.mesh.api("/api/v1/filters");
    assert_eq!(filters[0]["usable"], false, "{filters}");

    mesh.filters(&[("absent", "module: {file: absent.wasm}\nfailurePolicy: FailOpen")]);
    until("it is left out", || (mesh.get("/").status == 200).then_some(()));

    // It arrives.
    mesh.module("absent.wasm", &Guest::adds("0_2_1", "x-here", "yes"));
    until("it serves", || (mesh.get("/").header("x-here") == Some("yes")).then_some(()));
}

#[test]
fn a_pinned_module_is_no_other_module() {
    let mesh = Filtered::start();
    let one = mesh.module("f.wasm", &Guest::adds("0_2_1", "x-version", "1"));
    mesh.filters(&[("f", &format!("module: {{file: f.wasm, sha256: {one}}}"))]);
    mesh.serving("f", &one);

    // The file changes, the pin does not: what is pinned serves on.
    let two = mesh.module("f.wasm", &Guest::adds("0_2_1", "x-version", "2"));
    mesh.filters(&[("f", &format!("module: {{file: f.wasm, sha256: {one}}}\norder: 7"))]);
    until("the change is in", || (mesh.mesh.api("/api/v1/filters")[0]["order"] == 7).then_some(()));
    mesh.serving("f", &one);
    assert_eq!(mesh.get("/").header("x-version"), Some("1"));

    // A pin that fits nothing is refused by name.
    let other = two.chars().rev().collect::<String>();
    mesh.filters(&[("g", &format!("module: {{file: f.wasm, sha256: {other}}}"))]);
    mesh.status_says(&["spec.module.sha256", &two]);
    mesh.filters(&[("f", &format!("module: {{file: f.wasm, sha256: {two}}}"))]);
    mesh.serving("f", &two);
    until("version 2", || (mesh.get("/").header("x-version") == Some("2")).then_some(()));
}

#[test]
fn modules_come_by_digest_over_the_connection_that_is_there() {
    let mesh = Filtered::start();
    let connections = || {
        let grpc = mesh.mesh.control.grpc();
        let mut ss = Command::new("ss");
        let listed = ss.args(["-Htan", "dst", &grpc.ip().to_string(), "and", "dport", "=", "15012"]).output();
        let listed = listed.expect("run ss");
        assert!(listed.status.success(), "{listed:?}");
        let text = String::from_utf8(listed.stdout).unwrap();
        let mut local: Vec<String> =
            text.lines().filter_map(|line| line.split_whitespace().nth(3).map(str::to_owned)).collect();
        local.sort();
        local
    };
    let before = connections();
    assert!(before.len() >= 2, "one of each proxy: {before:?}");
    let sent = mesh.module("f.wasm", &Guest::adds("0_2_1", "x-version", "1"));
    mesh.filters(&[("f", "module: {file: f.wasm}")]);
    mesh.serving("f", &sent);
    let after = connections();
    // Older ones may have left TIME-WAIT meanwhile; there is no new one.
    assert!(after.iter().all(|connection| before.contains(connection)), "{before:?} {after:?}");
    assert_eq!(mesh.get("/").header("x-version"), Some("1"));
}

#[test]
fn guests_log_under_their_name() {
    let mesh = Filtered::start();
    let mut guest = Guest::new("0_2_1");
    let (warn, debug) = (guest.text("something\nodd"), guest.text("a detail"));
    let body = format!("(drop (call $log (i32.const 3) {warn})) (drop (call $log (i32.const 1) {debug}))");
    mesh.module("f.wasm", &guest.on_headers("request", &body));
    mesh.filters(&[("talkative", "module: {file: f.wasm}")]);
    mesh.serving("talkative", "");
    mesh.get("/");
    let line = until("the line is logged", || {
        mesh.reviews.process.log().lines().find(|line| line.contains("something")).map(str::to_owned)
    });
    assert!(line.contains("WARN") && line.contains("demo/talkative") && line.contains("odd"), "one line: {line}");
    assert!(!mesh.reviews.process.log().contains("a detail"), "debug is not logged at info");
}

#[test]
fn guests_read_properties_of_the_exchange() {
    let mesh = Filtered::start();
    let mut guest = Guest::new("0_2_1");
    let properties = [
        ("x-path", "request\0path"),
        ("x-method", "request\0method"),
        ("x-peer", "connection\0uri_san_peer_certificate"),
        ("x-own", "connection\0uri_san_local_certificate"),
        ("x-plugin", "plugin_name"),
        ("x-node", "node\0id"),
        ("x-none", "no\0such"),
    ];
    let body: String = properties
        .iter()
        .map(|(header, path)| {
            let (header, path) = (guest.text(header), guest.text(path));
            format!(
                "(if (i32.eqz (call $get_property {path} (i32.const 16) (i32.const 20))) (then (drop (call \
                 $add_header_map_value (i32.const 0) {header} (i32.load (i32.const 16)) (i32.load (i32.const 20))))))"
            )
        })
        .collect();
    mesh.module("f.wasm", &guest.on_headers("request", &body));
    mesh.filters(&[("curious", "module: {file: f.wasm}")]);
    mesh.serving("curious", "");
    assert_eq!(mesh.get("/a/b?c=d").status, 200);

    let received = mesh.received("/a/b?c=d");
    assert_eq!(received.header("x-path"), Some("/a/b?c=d"));
    assert_eq!(received.header("x-method"), Some("GET"));
    assert_eq!(received.header("x-peer"), Some("spiffe://cluster.local/ns/demo/sa/web"));
    assert_eq!(received.header("x-own"), Some("spiffe://cluster.local/ns/demo/sa/reviews"));
    assert_eq!(received.header("x-plugin"), Some("demo/curious"));
    assert_eq!(received.header("x-node"), Some("demo/reviews-0"));
    assert_eq!(received.header("x-none"), None);
}

#[test]
fn a_method_that_a_filter_changed_is_framed_as_such() {
    let mesh = Filtered::start();
    let mut guest = Guest::new("0_2_1");
    let (method, put) = (guest.text(":method"), guest.text("PUT"));
    let body = format!("(drop (call $replace_header_map_value (i32.const 0) {method} {put}))");
    mesh.module("f.wasm", &guest.on_headers("request", &body));
    mesh.filters(&[("puts", "module: {file: f.wasm}")]);
    mesh.serving("puts", "");
    assert_eq!(mesh.get("/put").status, 200);
    let received = mesh.received("/put");
    assert_eq!((received.method.as_str(), received.header("content-length")), ("PUT", Some("0")));
}

/// A guest that does what the first letter of `x-fault` says: t(rap), l(oop), g(row by 16 MiB, or else trap).
fn faulty() -> Guest {
    let mut guest = Guest::adds("0_2_1", "x-filter", "was here");
    let fault = guest.text("x-fault");
    // Before the header is added, so that nothing of the request was changed when it fails.
    let check = format!(
        "(func $fault (local $c i32)
           (if (call $get_header_map_value (i32.const 0) {fault} (i32.const 16) (i32.const 20)) (then (return)))
           (local.set $c (i32.load8_u (i32.load (i32.const 16))))
           (if (i32.eq (local.get $c) (i32.const 116)) (then unreachable))
           (if (i32.eq (local.get $c) (i32.const 108)) (then (loop $l (br $l))))
           (if (i32.eq (local.get $c) (i32.const 103))
             (then (if (i32.eq (memory.grow (i32.const 256)) (i32.const -1)) (then unreachable)))))"
    );
    guest.field(&check).before("request", "(call $fault)")
}

fn fault(mesh: &Filtered, what: &str) -> outrigger_e2e::Response {
    mesh.web.call("reviews", &format!("/{what}")).header("x-fault", what).send()
}

#[test]
fn a_trap_costs_its_request_or_nothing() {
    let mesh = Filtered::start();
    mesh.module("f.wasm", &faulty());
    mesh.filters(&[("f", "module: {file: f.wasm}")]);
    mesh.serving("f", "");
    let response = fault(&mesh, "trap");
    assert_eq!((response.status, response.reason()), (503, Some("filter-failed")), "{response:?}");
    assert!(mesh.application.requests().iter().all(|request| request.path != "/trap"));
    let response = mesh.get("/next");
    assert_eq!((response.status, response.header("x-filter")), (200, Some("was here")), "a new instance serves");
    let row = mesh.row("f").unwrap();
    assert!(row["last_error"].as_str().unwrap().contains("unreachable"), "{row}");
    assert_eq!(row["failures"], 1, "the caller did not send it again: {row}");

    mesh.filters(&[("f", "module: {file: f.wasm}\nfailurePolicy: FailOpen")]);
    until("it fails open", || (fault(&mesh, "trap").status == 200).then_some(()));
    let received = mesh.received("/trap");
    assert_eq!(received.header("x-filter"), None, "it went on without the filter");
}

#[test]
fn an_endless_loop_is_stopped_and_others_are_served() {
    let mesh = Filtered::start();
    mesh.module("f.wasm", &faulty());
    mesh.filters(&[("f", "module: {file: f.wasm}\nlimits: {callTime: 20ms}\nfailurePolicy: FailOpen")]);
    mesh.serving("f", "");
    let stop = AtomicBool::new(false);
    let others = thread::scope(|scope| {
        let others = scope.spawn(|| loaded(&mesh, &stop));
        let looped = fault(&mesh, "loop");
        stop.store(true, Ordering::SeqCst);
        assert_eq!(looped.status, 200, "{looped:?}");
        others.join().unwrap()
    });
    assert_eq!(others, Vec::<String>::new());
    let row = mesh.row("f").unwrap();
    assert_eq!((&row["timeouts"], &row["failures"]), (&1.into(), &1.into()), "{row}");

    mesh.filters(&[("f", "module: {file: f.wasm}\nlimits: {callTime: 20ms}")]);
    until("it fails closed", || {
        let response = fault(&mesh, "loop");
        (response.status == 503 && response.reason() == Some("filter-failed")).then_some(())
    });
}

#[test]
fn memory_is_limited() {
    let mesh = Filtered::start();
    mesh.module("f.wasm", &faulty());
    mesh.filters(&[("f", "module: {file: f.wasm}\nlimits: {memory: 8Mi}")]);
    mesh.serving("f", "");
    let response = fault(&mesh, "grow");
    assert_eq!((response.status, response.reason()), (503, Some("filter-failed")), "{response:?}");
    mesh.filters(&[("f", "module: {file: f.wasm}\nlimits: {memory: 32Mi}")]);
    until("more memory is allowed", || (fault(&mesh, "grow").status == 200).then_some(()));
    let bytes = mesh.reviews.metrics().sum("outrigger_filter_memory_bytes", &[("filter", "demo/f")]);
    assert!(bytes > 16.0 * 1024.0 * 1024.0, "{bytes}");
}

/// Holds the bodies of one side for ever.
fn holds(side: &str) -> Guest {
    let callback = format!("proxy_on_{side}_body");
    Guest::new("0_2_1").field(&format!("(func (export \"{callback}\") (param i32 i32 i32) (result i32) (i32.const 1))"))
}

#[test]
fn what_a_filter_holds_is_limited() {
    let mesh = Filtered::start();
    mesh.module("f.wasm", &holds("request"));
    mesh.filters(&[("f", "module: {file: f.wasm}\nlimits: {body: 1Ki}")]);
    mesh.serving("f", "");
    let body = "x".repeat(4096);
    let post = || mesh.web.call("reviews", "/held").args(["--data", &body]).send();
    let response = post();
    assert_eq!((response.status, response.reason()), (413, Some("filter-request-too-large")), "{response:?}");
    assert!(mesh.application.requests().iter().all(|request| request.path != "/held"));

    // The response's head is held by the filter behind, so that there is still something to say.
    mesh.module("f.wasm", &holds("response"));
    let head = "(func (export \"proxy_on_response_headers\") (param i32 i32 i32) (result i32) (i32.const 1))";
    mesh.module("g.wasm", &Guest::new("0_2_1").field(head));
    let held = "module: {file: f.wasm}\norder: 2\nlimits: {body: 16}";
    mesh.filters(&[("f", held), ("g", "module: {file: g.wasm}\norder: 1")]);
    mesh.serving("g", "");
    let response = until("the other filters serve", || Some(post()).filter(|response| response.status != 413));
    assert_eq!((response.status, response.reason()), (500, Some("filter-response-too-large")), "{response:?}");
}

#[test]
fn a_filter_that_keeps_failing_waits_is_reported_and_recovers() {
    let mesh = Filtered::start();
    mesh.module("f.wasm", &faulty());
    mesh.filters(&[("f", "module: {file: f.wasm}\nrestart: {backoff: 500ms, max: 500ms}")]);
    mesh.serving("f", "");
    let row = until("it waits", || {
        let response = fault(&mesh, "trap");
        assert_eq!(response.reason(), Some("filter-failed"), "{response:?}");
        mesh.row("f").filter(|row| row["health"] == "quarantined")
    });
    assert!(row["failures"].as_u64().unwrap() >= 3, "{row}");
    let metrics = mesh.reviews.metrics();
    assert!(metrics.sum("outrigger_filter_failures_total", &[("filter", "demo/f")]) >= 3.0);
    assert!(metrics.by("outrigger_filter_health", "state").contains_key("quarantined"));
    let log = mesh.reviews.process.log();
    assert!(log.contains("a filter's instance failed") && log.contains("next=\"in 500ms\""), "{log}");

    // A worker without an instance starts one when its time has come.
    until("it serves again, on both workers", || {
        assert!([200, 503].contains(&mesh.get("/").status));
        mesh.row("f").filter(|row| row["health"] == "running" && row["instances"] == 2)
    });
    assert_eq!(mesh.get("/").header("x-filter"), Some("was here"));
}

/// Runs h2load until told to stop; what failed.
fn loaded(mesh: &Filtered, stop: &AtomicBool) -> Vec<String> {
    let mut failed = Vec::new();
    while !stop.load(Ordering::SeqCst) {
        let url = mesh.web.url("/load");
        let args = ["--h1", "-n", "600", "-c", "6", "-t", "1", "-H", ":authority: reviews", &url];
        let output = Command::new("h2load").args(args).output().expect("run h2load");
        let said = String::from_utf8(output.stdout).unwrap();
        if !said.contains("600 succeeded, 0 failed, 0 errored, 0 timeout") {
            failed.push(said);
        }
    }
    failed
}

/// One that says its version, and when an instance of it ends.
fn version(number: &str) -> Guest {
    let mut guest = Guest::adds("0_2_1", "x-version", number);
    let end = guest.text(&format!("end of {number}"));
    let body = format!("(if (i32.eq (local.get 0) (i32.const 1)) (then (drop (call $log (i32.const 2) {end}))))");
    guest.field(&format!("(func (export \"proxy_on_delete\") (param i32) {body})"))
}

#[test]
fn a_changed_module_is_swapped_in_under_load_and_no_request_is_lost() {
    let mesh = Filtered::start();
    mesh.module("f.wasm", &version("v0"));
    mesh.filters(&[("f", "module: {file: f.wasm}")]);
    mesh.serving("f", "");
    let stop = AtomicBool::new(false);
    let failed = thread::scope(|scope| {
        let load = scope.spawn(|| loaded(&mesh, &stop));
        let swapped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for number in ["v1", "v2", "v3"] {
                mesh.module("f.wasm", &version(number));
                until("requests go through the new version", || {
                    let all = mesh.application.requests();
                    (all.last()?.header("x-version") == Some(number)).then_some(())
                });
            }
        }));
        stop.store(true, Ordering::SeqCst);
        let failed = load.join().unwrap();
        swapped.unwrap();
        failed
    });
    assert_eq!(failed, Vec::<String>::new());
    let lacking = mesh.application.requests().into_iter().filter(|request| request.path == "/load");
    assert_eq!(lacking.filter(|request| request.header("x-version").is_none()).count(), 0, "each had the filter");
    // Of each old version the instances of both workers have ended; the one that tried it goes without a word.
    for number in ["v0", "v1", "v2"] {
        until("the old instances end", || {
            (mesh.reviews.process.log().matches(&format!("end of {number}")).count() == 2).then_some(())
        });
    }
}
