//! What proxies are told, when, and what it means that they acknowledged it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use std::collections::BTreeSet;
use std::net::TcpListener;

use nix::sys::signal::Signal;
use outrigger_e2e::{Backend, Mesh, Process, Proxy, Reply, Shop, python, succeed, until};
use serde_json::Value;

fn service(name: &str, spec: &str) -> String {
    format!("apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: demo}}\nspec: {{{spec}}}\n---\n")
}

fn loopback(name: &str) -> Backend {
    Backend::http([127, 0, 0, 1].into(), name)
}

/// A route of `reviews` in this namespace, to one version.
fn route(version: &str, api: &str, namespace: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/{api}\nkind: HTTPRoute\nmetadata: {{name: reviews, namespace: {namespace}}}\n\
         spec:\n  parentRefs: [{{group: '', kind: Service, name: reviews, namespace: demo}}]\n  rules:\n  \
         - backendRefs: [{{name: reviews-{version}, namespace: demo, port: 80}}]\n---\n"
    )
}

/// The acknowledged and the latest version of a resource at a proxy, as the control plane says.
fn versions(mesh: &Mesh, proxy: &str, resource: &str) -> Option<(Value, Value)> {
    let proxies = mesh.api("/api/v1/proxies");
    let all = proxies.as_array()?.iter();
    let proxy = all.rev().find(|one| one["workload"] == proxy && one["connected"] == true)?;
    let row = proxy["resources"].as_array()?.iter().find(|row| row["name"] == resource)?.clone();
    Some((row["acked"].clone(), row["latest"].clone()))
}

fn destination(proxy: &Proxy, key: &str) -> Value {
    let config = proxy.admin("/config").json();
    let all = config["destinations"].as_array().cloned().unwrap_or_default();
    all.into_iter().find(|one| one["key"] == key).unwrap_or_default()
}

#[test]
fn a_first_use_waits_for_its_answer_but_not_for_ever() {
    let shop = Shop::start("");
    // Nobody has asked for it before: the very first request is held until the answer is there.
    let first = shop.get("/");
    assert_eq!((first.status, first.reason()), (200, None));

    // A control plane that is there, and says nothing.
    shop.mesh.control.process.signal(Signal::SIGSTOP);
    let late = shop.web.call("reviews-v1", "/").send();
    let known = shop.get("/");
    shop.mesh.control.process.signal(Signal::SIGCONT);
    assert_eq!((late.status, late.reason()), (503, Some("discovery-timeout")));
    assert_eq!(known.status, 200, "what is known goes on");
    until("the answer came", || (shop.web.call("reviews-v1", "/").send().status == 200).then_some(()));
}

#[test]
fn what_was_absent_is_pushed_when_it_is_created_and_again_when_it_goes() {
    let mesh = Mesh::start("");
    let application = loopback("late");
    let _late = mesh.proxy("late-0").labels("app=late").app(&application.address()).start();
    let web = mesh.proxy("web-0").start();
    assert_eq!(web.call("late", "/").send().reason(), Some("unknown-service"));
    assert_eq!(destination(&web, "svc/demo/late")["kind"], "absent");

    // No request asks for it meanwhile.
    mesh.write(
        "late.yaml",
        &service("late", "selector: {app: late}, ports: [{name: http, port: 80, targetPort: http}]"),
    );
    until("its creation is pushed", || (destination(&web, "svc/demo/late")["kind"] == "service").then_some(()));
    assert_eq!(web.call("late", "/").send().status, 200);
    mesh.remove("late.yaml");
    until("its removal is pushed", || (destination(&web, "svc/demo/late")["kind"] == "absent").then_some(()));
    assert_eq!(web.call("late", "/").send().reason(), Some("unknown-service"));
}

#[test]
fn what_a_proxy_acknowledged_it_serves() {
    let shop = Shop::start(&route("v1", "v1", "demo"));
    assert_eq!(shop.get("/").header("x-backend"), Some("v1"));
    let resource = "svc/demo/reviews";
    let mut seen = until("the first version is acknowledged", || {
        let (acked, latest) = versions(&shop.mesh, "web-0", resource)?;
        (acked == latest).then_some(acked)
    });
    for turn in 0..8 {
        let version = if turn % 2 == 0 { "v2" } else { "v1" };
        shop.write(&route(version, "v1", "demo"));
        seen = until("the next version is acknowledged", || {
            let (acked, latest) = versions(&shop.mesh, "web-0", resource)?;
            (acked == latest && acked != seen).then_some(acked)
        });
        // Not one request more goes by the old one, on any worker.
        for _ in 0..8 {
            assert_eq!(shop.get("/").header("x-backend"), Some(version), "turn {turn}");
        }
    }
}

#[test]
fn endpoints_come_and_go_without_a_new_version_of_routes() {
    let shop = Shop::start(&route("v1", "v1", "demo"));
    assert_eq!(shop.get("/").status, 200);
    let state = || {
        let (acked, _) = versions(&shop.mesh, "web-0", "svc/demo/reviews").unwrap();
        (shop.web.admin("/config").json()["snapshot"].clone(), acked)
    };
    let endpoints = || {
        let clusters = shop.web.admin("/clusters").json();
        let all = clusters.as_array().unwrap().iter();
        let v1 = all.filter(|one| one["key"] == "demo/reviews-v1:80").filter_map(|one| one["endpoints"].as_array());
        v1.map(Vec::len).sum::<usize>()
    };
    until("the endpoint is there", || (endpoints() == 1).then_some(()));
    until("it is acknowledged", || (state().1 != Value::Null).then_some(()));
    let before = state();

    let more = loopback("more");
    let second =
        shop.mesh.proxy("reviews-v1-1").account("reviews").labels("app=reviews,version=v1").app(&more.address());
    let mut second = second.start();
    until("the second endpoint is there", || (endpoints() == 2).then_some(()));
    until("it is used", || (shop.get("/").header("x-backend") == Some("more")).then_some(()));
    second.process.stop();
    until("it is gone", || (endpoints() == 1).then_some(()));
    assert_eq!(state(), before, "an endpoint's coming compiled the routes anew");
}

#[test]
fn slices_and_workloads_name_endpoints_that_do_not_register() {
    let (slice, plain) = (loopback("slice"), loopback("workload"));
    let mesh = Mesh::start(&format!(
        "{}{}apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{name: db-1, namespace: demo, labels: {{kubernetes.io/service-name: db}}}}\naddressType: IPv4\n\
         ports: [{{name: http, port: {}}}]\nendpoints: [{{addresses: [127.0.0.1]}}]\n---\n\
         apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {{name: old-0, namespace: demo, labels: {{app: old}}}}\n\
         spec: {{address: 127.0.0.1, ports: [{{name: http, port: {}}}]}}\n",
        service("db", "ports: [{name: http, port: 80}]"),
        service("old", "selector: {app: old}, ports: [{name: http, port: 80, targetPort: http}]"),
        slice.address().port(),
        plain.address().port(),
    ));
    let web = mesh.proxy("web-0").start();
    for (service, backend) in [("db", "slice"), ("old", "workload")] {
        let answer = web.call(service, "/").send();
        assert_eq!((answer.status, answer.header("x-backend")), (200, Some(backend)), "{service}: {answer:?}");
    }
}

#[test]
fn a_route_of_v1beta1_counts_and_a_consumers_own_is_for_its_namespace_alone() {
    let shop = Shop::start(&route("v1", "v1beta1", "demo"));
    let consumer = shop.mesh.proxy("consumer-0").namespace("ops").start();
    let backends = |proxy: &Proxy| -> BTreeSet<String> {
        let answers = (0..10).map(|_| proxy.call("reviews.demo", "/").send());
        answers.map(|answer| answer.header("x-backend").unwrap_or("none").to_owned()).collect()
    };
    let only = |version: &str| BTreeSet::from([version.to_owned()]);
    assert_eq!((backends(&shop.web), backends(&consumer)), (only("v1"), only("v1")));

    shop.write(&(route("v1", "v1beta1", "demo") + &route("v2", "v1", "ops")));
    until("the consumer's route applies to it", || (backends(&consumer) == only("v2")).then_some(()));
    assert_eq!(backends(&shop.web), only("v1"));
}

#[test]
fn grpc_routes_match_method_and_metadata() {
    let mesh = Mesh::start("");
    let started = ["a", "b"].map(|name| {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut command = python("grpc_peer.py");
        command.args(["serve", &port.to_string(), "--name", name]);
        let server = Process::serve(&format!("grpc-{name}"), command, &mesh.path(""));
        let app = format!("grpc=127.0.0.1:{port}/h2");
        (
            server,
            mesh.proxy(&format!("echo-{name}-0"))
                .account("echo")
                .labels(&format!("app=echo,side={name}"))
                .app(&app)
                .start(),
        )
    });
    let port = "ports: [{name: grpc, port: 80, targetPort: grpc}]";
    let mut text = service("echo", &format!("selector: {{app: echo}}, {port}"));
    for side in ["a", "b"] {
        text += &service(&format!("echo-{side}"), &format!("selector: {{app: echo, side: {side}}}, {port}"));
    }
    let unary = "method: {service: test.Echo, method: Unary}";
    text += &format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: GRPCRoute\nmetadata: {{name: echo, namespace: demo}}\nspec:\n  \
         parentRefs: [{{group: '', kind: Service, name: echo}}]\n  rules:\n  \
         - matches: [{{{unary}}}]\n    backendRefs: [{{name: echo-a, port: 80}}]\n  \
         - matches: [{{{unary}, headers: [{{name: x-canary, value: 'yes'}}]}}]\n    backendRefs: [{{name: echo-b, port: 80}}]\n"
    );
    mesh.write("echo.yaml", &text);
    let web = mesh.proxy("web-0").start();
    let ask = || -> Value {
        let mut command = python("grpc_peer.py");
        command.args(["call", &web.outbound().to_string(), "echo", "routes"]);
        serde_json::from_str(&succeed(&mut command)).unwrap()
    };
    let got = until("echo answers", || Some(ask()).filter(|got| got["unary"] == "a"));
    assert_eq!(got["canary"], "b", "{got}");
    assert_eq!(got["other"], "UNIMPLEMENTED", "{got}");
    drop(started);
}

#[test]
fn a_policy_of_the_rule_wins_over_the_routes_the_services_and_the_namespaces() {
    let failing = |name: &str| {
        Backend::http_with([127, 0, 0, 1].into(), name, |_| Reply::Answer {
            status: 503,
            headers: Vec::new(),
            body: Vec::new(),
        })
    };
    let shop = Shop::start_with("", failing("v1"), failing("v2"));
    let policy = |name: &str, target: &str, attempts: u32| {
        // Ejected endpoints would hide how often was tried.
        let more = if name == "namespace" { ", outlierDetection: {consecutiveFailures: 100000}" } else { "" };
        format!(
            "apiVersion: outrigger.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: {name}, namespace: demo}}\n\
             spec: {{targetRefs: [{{{target}}}], retries: {{attempts: {attempts}, backoff: {{base: 1ms, max: 2ms}}}}{more}}}\n---\n"
        )
    };
    let route = "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: reviews, namespace: demo}\n\
        spec:\n  parentRefs: [{group: '', kind: Service, name: reviews}]\n  rules:\n  \
        - {name: one, matches: [{path: {value: /one}}], backendRefs: [{name: reviews, port: 80}]}\n  \
        - {name: two, matches: [{path: {value: /two}}], backendRefs: [{name: reviews, port: 80}]}\n---\n";
    let of_route = "group: gateway.networking.k8s.io, kind: HTTPRoute, name: reviews";
    // How often the applications were asked for one request.
    let asked = |path: &str| {
        let before = shop.v1.count() + shop.v2.count();
        assert_eq!(shop.get(path).status, 503);
        shop.v1.count() + shop.v2.count() - before
    };
    let expect = |policies: &str, path: &str, times: usize| {
        shop.write(&format!("{route}{policies}"));
        until(&format!("{path} is tried {times} times"), || (asked(path) == times).then_some(()));
        assert_eq!(asked(path), times);
    };
    let mut policies = policy("namespace", "group: '', kind: Namespace, name: demo", 0);
    expect(&policies, "/one", 1);
    policies += &policy("service", "group: '', kind: Service, name: reviews", 1);
    expect(&policies, "/one", 2);
    policies += &policy("route", of_route, 3);
    expect(&policies, "/one", 4);
    policies += &policy("rule", &format!("{of_route}, sectionName: two"), 0);
    expect(&policies, "/two", 1);
    assert_eq!(asked("/one"), 4);
}
