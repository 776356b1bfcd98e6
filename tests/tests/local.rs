//! Local mode: `--config DIR`, no control plane.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use outrigger_e2e::{Address, Authority, Backend, Guest, Local, LocalProxy, Recorded, Reply, until};

/// A Service `reviews` and the workload behind it: its application's port, and where its proxy listens.
fn reviews(port: u16, inbound: SocketAddr) -> String {
    let (at, inbound) = (inbound.ip(), inbound.port());
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: reviews, namespace: demo}}\n\
         spec: {{selector: {{app: reviews}}, ports: [{{name: http, port: 80, targetPort: http}}]}}\n---\n\
         apiVersion: outrigger.dev/v1alpha1\nkind: Workload\n\
         metadata: {{name: reviews-0, namespace: demo, labels: {{app: reviews}}}}\n\
         spec: {{address: {at}, inboundPort: {inbound}, ports: [{{name: http, port: {port}}}], serviceAccount: reviews}}\n---\n\
         apiVersion: outrigger.dev/v1alpha1\nkind: MtlsPolicy\nmetadata: {{name: strict, namespace: demo}}\n\
         spec: {{mode: Strict}}\n"
    )
}

fn told(request: &Recorded) -> Reply {
    let headers = request.header("x-forwarded-client-cert").map(|xfcc| ("x-peer".to_owned(), xfcc.to_owned()));
    Reply::Answer { status: 200, headers: headers.into_iter().collect(), body: b"reviews".to_vec() }
}

/// Two proxies over one directory, each with a certificate from a file, and the application of one of them.
struct Pair {
    web: LocalProxy,
    reviews: LocalProxy,
    application: Backend,
    root: Authority,
    local: Local,
    inbound: SocketAddr,
    _address: Address,
}

impl Pair {
    fn start() -> Self {
        let address = Address::claim();
        let inbound = address.port(15006);
        let application = Backend::http_with([127, 0, 0, 1].into(), "reviews", told);
        let local = Local::new(&reviews(application.address().port(), inbound));
        let root = Authority::root("one");
        local.issue("web", "web", &root, &[&root]);
        local.issue("reviews", "reviews", &root, &[&root]);
        let reviews = local.proxy("reviews-0").flag("--service-account", &"reviews").flag("--labels", &"app=reviews");
        let reviews = reviews.flag("--app", &application.address()).flag("--inbound", &inbound);
        let reviews = reviews.identity("reviews").start().ready();
        let web = local.proxy("web-0").flag("--service-account", &"web").identity("web").start().ready();
        Self { web, reviews, application, root, local, inbound, _address: address }
    }

    /// Whether the proxy of reviews saw this caller proven.
    fn proven(&self, account: &str) -> f64 {
        let peer = format!("spiffe://cluster.local/ns/demo/sa/{account}");
        let labels = [("direction", "inbound"), ("peer", peer.as_str())];
        self.reviews.metrics().sum("outrigger_tls_connections_total", &labels)
    }
}

#[test]
fn two_proxies_speak_mtls_with_identities_from_files() {
    let pair = Pair::start();
    let response = pair.web.call("reviews", "/").send();
    assert_eq!((response.status, response.body.as_str()), (200, "reviews"), "{response:?}");
    let peer = response.header("x-peer").unwrap_or_default();
    assert!(peer.contains("spiffe://cluster.local/ns/demo/sa/web"), "the application is told who calls: {peer}");
    assert!(pair.proven("web") >= 1.0);
    let certificate = pair.web.admin("/certs").body;
    assert!(certificate.contains("spiffe://cluster.local/ns/demo/sa/web"), "{certificate}");
}

#[test]
fn a_changed_file_applies_and_a_bad_one_is_named_while_the_last_good_serves() {
    let pair = Pair::start();
    let route = |header: &str| {
        format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: r, namespace: demo}}\nspec:\n  \
             parentRefs: [{{group: \"\", kind: Service, name: reviews}}]\n  rules:\n  - filters:\n    - {header}\n    \
             backendRefs: [{{name: reviews, port: 80}}]\n"
        )
    };
    let set = |value: &str| {
        route(&format!(
            "{{type: ResponseHeaderModifier, responseHeaderModifier: {{set: [{{name: x-route, value: {value}}}]}}}}"
        ))
    };
    let says = |value: &str| pair.web.call("reviews", "/").send().header("x-route") == Some(value);
    pair.local.write("route.yaml", &set("one"));
    until("the route applies", || says("one").then_some(()));
    pair.local.write("route.yaml", &set("two"));
    until("its change applies", || says("two").then_some(()));

    pair.local.write("route.yaml", &route("{type: Teleport}"));
    let line = until("the bad route is named", || {
        pair.web.process.log().lines().find(|line| line.contains("Teleport")).map(str::to_owned)
    });
    for part in ["route.yaml:8", "HTTPRoute", "demo/r", "spec.rules[0].filters[0].type"] {
        assert!(line.contains(part), "{part}: {line}");
    }
    assert!(says("two"), "the last good version serves");
    // It is alone in that: what is beside it changes.
    pair.local.write("policy.yaml", &authorization("nobody"));
    until("the policy applies", || (pair.web.call("reviews", "/").send().status == 403).then_some(()));
    pair.local.write("policy.yaml", &authorization("web"));
    until("the policy's change applies", || says("two").then_some(()));
}

fn authorization(account: &str) -> String {
    format!(
        "apiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: reviews, namespace: demo}}\n\
         spec:\n  selector: {{matchLabels: {{app: reviews}}}}\n  action: Allow\n  rules:\n  \
         - from: [{{principals: [\"spiffe://cluster.local/ns/demo/sa/{account}\"]}}]\n"
    )
}

#[test]
fn replaced_certificates_are_used_and_no_request_is_lost() {
    let pair = Pair::start();
    let certificate = |proxy: &LocalProxy| proxy.admin("/certs").json().to_string();
    let before = [certificate(&pair.web), certificate(&pair.reviews)];
    let stop = AtomicBool::new(false);
    let failed = thread::scope(|scope| {
        let load = scope.spawn(|| {
            let mut failed = Vec::new();
            while !stop.load(Ordering::SeqCst) {
                let response = pair.web.call("reviews", "/load").send();
                if response.status != 200 {
                    failed.push(response);
                }
            }
            failed
        });
        let swapped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            // Make before break: both roots are trusted before a certificate of the new one is used.
            let new = Authority::root("two");
            let both = [&pair.root, &new];
            pair.local.issue("reviews", "reviews", &pair.root, &both);
            pair.local.issue("web", "web", &pair.root, &both);
            // A certificate is used only with its key, and the roots were there before it.
            until("both have theirs", || (certificate(&pair.web) != before[0]).then_some(()));
            until("both have theirs", || (certificate(&pair.reviews) != before[1]).then_some(()));
            let before = certificate(&pair.web);
            pair.local.issue("web", "web", &new, &both);
            let calls = pair.application.count();
            until("the new certificate is in use", || (certificate(&pair.web) != before).then_some(()));
            until("calls go on", || (pair.application.count() > calls + 20).then_some(()));
        }));
        stop.store(true, Ordering::SeqCst);
        let failed = load.join().unwrap();
        swapped.unwrap();
        failed
    });
    assert!(failed.is_empty(), "{} failed: {:?}", failed.len(), failed.first());

    // What does not belong together is refused, and said.
    std::fs::write(pair.local.path("web.key"), "no key").unwrap();
    until("the bad file is named", || {
        pair.web.process.log().lines().any(|line| line.contains("WARN") && line.contains("web.key")).then_some(())
    });
    assert_eq!(pair.web.call("reviews", "/").send().status, 200);
}

#[test]
fn a_foreign_root_is_refused_on_both_sides() {
    let pair = Pair::start();
    let foreign = Authority::root("foreign");
    // Of the right name, but nobody's here; it trusts reviews' root, so that reviews is the one to refuse.
    pair.local.issue("stranger", "web", &foreign, &[&pair.root]);
    let stranger =
        pair.local.proxy("stranger-0").flag("--service-account", &"web").identity("stranger").start().ready();
    let response = stranger.call("reviews", "/").send();
    assert!([502, 503].contains(&response.status) && response.body.contains("UnknownCA"), "{response:?}");
    assert!(pair.application.requests().is_empty());
    let plain = outrigger_e2e::Curl::get(&format!("http://{}/", pair.inbound)).send();
    assert_ne!(plain.status, 200, "plaintext to a Strict workload: {plain:?}");
    assert!(pair.application.requests().is_empty());
}

#[test]
fn without_an_identity_it_serves_plaintext() {
    let application = Backend::http([127, 0, 0, 1].into(), "app");
    let other = Backend::http([127, 0, 0, 1].into(), "other");
    let slice = |port: u16| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: reviews, namespace: demo}}\n\
             spec: {{selector: {{app: reviews}}, ports: [{{name: http, port: 80, targetPort: http}}]}}\n---\n\
             apiVersion: v1\nkind: Service\nmetadata: {{name: ratings, namespace: demo}}\n\
             spec: {{ports: [{{name: http, port: 80}}]}}\n---\n\
             apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
             metadata: {{name: ratings-1, namespace: demo, labels: {{kubernetes.io/service-name: ratings}}}}\n\
             addressType: IPv4\nports: [{{name: http, port: {port}}}]\nendpoints: [{{addresses: [127.0.0.1]}}]\n"
        )
    };
    let local = Local::new(&slice(other.address().port()));
    let proxy = local.proxy("web-0").flag("--labels", &"app=reviews").flag("--app", &application.address());
    let proxy = proxy.start().ready();
    let backend = |service: &str| proxy.call(service, "/").send().header("x-backend").map(str::to_owned);
    assert_eq!(backend("reviews").as_deref(), Some("app"), "its own application, through its own inbound side");
    assert_eq!(backend("ratings").as_deref(), Some("other"), "an endpoint of a slice");

    let moved = Backend::http([127, 0, 0, 1].into(), "moved");
    local.write("mesh.yaml", &slice(moved.address().port()));
    until("the slice's change applies", || (backend("ratings").as_deref() == Some("moved")).then_some(()));
}

#[test]
fn filters_run_and_are_swapped_in_local_mode_too() {
    let pair = Pair::start();
    let write = |value: &str| {
        Guest::adds("0_2_1", "x-version", value).write(&pair.local.path("config/f.wasm"));
    };
    write("one");
    pair.local.write(
        "filter.yaml",
        "apiVersion: outrigger.dev/v1alpha1\nkind: WasmFilter\nmetadata: {name: f, namespace: demo}\n\
         spec:\n  targetRefs: [{group: \"\", kind: Service, name: reviews}]\n  module: {file: f.wasm}\n",
    );
    let version = |value: &str| (pair.web.call("reviews", "/").send().header("x-version") == Some(value)).then_some(());
    until("the filter serves", || version("one"));
    write("two");
    until("the changed module serves", || version("two"));
    std::fs::write(pair.local.path("config/f.wasm"), "no module").unwrap();
    until("the bad module is named", || pair.reviews.process.log().contains("not a WebAssembly module").then_some(()));
    assert!(version("two").is_some(), "the last good one serves");
}

#[test]
fn modules_on_other_hosts_need_a_control_plane() {
    let pair = Pair::start();
    let digest = "0".repeat(64);
    pair.local.write(
        "filter.yaml",
        &format!(
            "apiVersion: outrigger.dev/v1alpha1\nkind: WasmFilter\nmetadata: {{name: far, namespace: demo}}\n\
             spec:\n  targetRefs: [{{group: \"\", kind: Service, name: reviews}}]\n  \
             module: {{oci: \"registry.example/f@sha256:{digest}\"}}\n"
        ),
    );
    until("it is refused by name", || {
        let log = pair.reviews.process.log();
        (log.contains("spec.module.oci") && log.contains("needs a control plane")).then_some(())
    });
    until("what it guards is closed", || {
        (pair.web.call("reviews", "/").send().reason() == Some("filter-failed")).then_some(())
    });
}

#[test]
fn flags_that_do_not_go_together_are_named() {
    let local = Local::new("");
    let run = |flags: &[&str]| {
        let mut command = Command::new(outrigger_e2e::binary("outrigger-proxy"));
        let output = command.args(flags).output().unwrap();
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let config = local.path("config").display().to_string();
    let said = run(&["--config", &config, "--cert-file", "a.pem"]);
    assert!(said.contains("--key-file"), "{said}");
    let said = run(&["--config", &config, "--control-plane", "https://127.0.0.1:1"]);
    assert!(said.contains("--config") && said.contains("--control-plane"), "{said}");
    let absent = Path::new(&config).join("absent").display().to_string();
    let address = Address::claim();
    let ports = ["--admin", "--inbound", "--outbound", "--health"];
    let ports: Vec<String> = ports
        .iter()
        .zip(1..)
        .flat_map(|(flag, port)| [(*flag).to_owned(), address.port(15000 + port).to_string()])
        .collect();
    let mut flags: Vec<&str> = ports.iter().map(String::as_str).collect();
    flags.extend(["--config", &absent]);
    let said = run(&flags);
    assert!(said.contains(&absent) && said.contains("is not a directory"), "{said}");
}
