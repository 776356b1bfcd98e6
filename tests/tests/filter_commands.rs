//! `outrigger filter push`, `attach`, `status`, `detach`, against a mesh.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use std::process::Output;

use outrigger_e2e::{Backend, Guest, Mesh, Proxy, until};
use serde_json::Value;

const SERVICES: &str = "
apiVersion: v1
kind: Service
metadata: {name: reviews, namespace: demo}
spec: {selector: {app: reviews}, ports: [{name: http, port: 80, targetPort: http}]}
---
apiVersion: outrigger.dev/v1alpha1
kind: WasmFilter
metadata: {name: configured, namespace: elsewhere}
spec:
  targetRefs: [{group: \"\", kind: Service, name: nobody}]
  module: {file: configured.wasm}
";

struct Commanded {
    web: Proxy,
    _reviews: Proxy,
    _application: Backend,
    mesh: Mesh,
}

impl Commanded {
    fn start() -> Self {
        let mesh = Mesh::start_with(SERVICES, &["--lease", "1s"]);
        Guest::adds("0_2_1", "x-configured", "1").write(&mesh.path("config/configured.wasm"));
        let application = Backend::http([127, 0, 0, 1].into(), "v1");
        let reviews = mesh.proxy("reviews-0").labels("app=reviews").app(&application.address()).start();
        let web = mesh.proxy("web-0").start();
        let this = Self { web, _reviews: reviews, _application: application, mesh };
        until("web reaches reviews", || (this.get().status == 200).then_some(()));
        this
    }

    fn get(&self) -> outrigger_e2e::Response {
        self.web.call("reviews", "/").send()
    }

    /// `outrigger filter …` with the administrator's token.
    fn filter(&self, args: &[&str]) -> Output {
        let state = self.mesh.path("control").display().to_string();
        let admin = ["--state", &state];
        let admin = if args[0] == "status" { &admin[..0] } else { &admin[..] };
        self.mesh.outrigger(&[&["filter"], args, admin].concat())
    }

    /// Writes a guest; the file's path.
    fn module(&self, name: &str, guest: &Guest) -> String {
        let path = self.mesh.path(name);
        guest.write(&path);
        path.display().to_string()
    }

    fn attach(&self, more: &[&str]) -> Output {
        let args = ["attach", "tag", "-n", "demo", "--to", "service/reviews"];
        self.filter(&[&args, more].concat())
    }
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn a_filter_is_pushed_attached_updated_and_detached() {
    let mesh = Commanded::start();
    let file = mesh.module("one.wasm", &Guest::adds("0_2_1", "x-tag", "one"));
    let pushed = mesh.filter(&["push", &file]);
    assert!(pushed.status.success(), "{pushed:?}");
    let digest = text(&pushed.stdout).trim().to_owned();
    assert_eq!(digest.len(), 64);

    let attached = mesh.attach(&["--module", &digest]);
    assert!(attached.status.success(), "{attached:?}");
    assert!(text(&attached.stdout).contains("demo/reviews-0"), "{attached:?}");
    // Attached means serving: nothing is waited for.
    assert_eq!(mesh.get().header("x-tag"), Some("one"));

    let other = mesh.module("two.wasm", &Guest::adds("0_2_1", "x-tag", "two"));
    assert!(mesh.attach(&["--module", &other]).status.success());
    assert_eq!(mesh.get().header("x-tag"), Some("two"));
    let status = text(&mesh.filter(&["status", "tag"]).stdout).to_owned();
    assert!(status.contains("demo/tag") && status.contains("applied"), "{status}");

    let detached = mesh.filter(&["detach", "tag", "-n", "demo"]);
    assert!(detached.status.success(), "{detached:?}");
    until("the filter is gone", || mesh.get().header("x-tag").is_none().then_some(()));
    let again = mesh.filter(&["detach", "tag", "-n", "demo"]);
    assert!(text(&again.stderr).contains("there is no WasmFilter demo/tag"), "{again:?}");
}

#[test]
fn an_attached_filter_outlives_the_control_plane() {
    let mut mesh = Commanded::start();
    let file = mesh.module("one.wasm", &Guest::adds("0_2_1", "x-tag", "one"));
    assert!(mesh.attach(&["--module", &file]).status.success());
    mesh.mesh.control.restart();
    until("the filter is listed", || {
        let rows = mesh.mesh.api("/api/v1/filters");
        rows.as_array()?.iter().any(|row| row["name"] == "tag" && row["usable"] == true).then_some(())
    });
    assert_eq!(mesh.get().header("x-tag"), Some("one"));
}

#[test]
fn what_cannot_be_attached_is_refused_with_the_remedy() {
    let mesh = Commanded::start();
    let text_file = mesh.mesh.path("no.wasm");
    std::fs::write(&text_file, "no module").unwrap();
    let refused = mesh.filter(&["push", &text_file.display().to_string()]);
    assert!(!refused.status.success() && text(&refused.stderr).contains("no WebAssembly module"), "{refused:?}");

    let unknown = "0".repeat(64);
    let refused = mesh.attach(&["--module", &unknown]);
    assert!(text(&refused.stderr).contains("push it first"), "{refused:?}");

    let file = mesh.module("one.wasm", &Guest::adds("0_2_1", "x-tag", "one"));
    let refused = mesh.attach(&["--module", &file, "--limit", "memory=1"]);
    assert!(text(&refused.stderr).contains("spec.limits.memory"), "{refused:?}");

    let args = ["attach", "configured", "-n", "elsewhere", "--to", "service/nobody", "--module", &file];
    let refused = mesh.filter(&args);
    assert!(text(&refused.stderr).contains("change it there"), "{refused:?}");

    let without = mesh.mesh.outrigger(&["filter", "push", &file, "--admin-token-file", "/dev/null"]);
    assert!(text(&without.stderr).contains("administrator's token"), "{without:?}");
}

#[test]
fn a_module_that_proxies_refuse_is_named_with_the_reason() {
    let mesh = Commanded::start();
    let good = mesh.module("one.wasm", &Guest::adds("0_2_1", "x-tag", "one"));
    assert!(mesh.attach(&["--module", &good]).status.success());
    let bad = mesh.module("bad.wasm", &Guest::new("0_3_0"));
    let refused = mesh.attach(&["--module", &bad]);
    assert!(!refused.status.success(), "{refused:?}");
    assert!(text(&refused.stdout).contains("refused") && text(&refused.stdout).contains("0_3_0"), "{refused:?}");
    assert_eq!(mesh.get().header("x-tag"), Some("one"), "the version before serves on");
}

#[test]
fn traps_are_reported_to_the_control_plane() {
    let mesh = Commanded::start();
    let guest = mesh.module("trap.wasm", &Guest::new("0_2_1").on_headers("request", "unreachable"));
    assert!(mesh.attach(&["--module", &guest, "--failure-policy", "FailOpen"]).status.success());
    for _ in 0..5 {
        mesh.get();
    }
    let row: Value = until("the proxy told of its filter's failures", || {
        let rows = mesh.mesh.api("/api/v1/filters");
        let row = rows.as_array()?.iter().find(|row| row["name"] == "tag")?.clone();
        (row["proxies"][0]["report"]["health"] == "backing-off").then_some(row)
    });
    let report = &row["proxies"][0]["report"];
    assert!(report["failures"].as_u64() >= Some(3), "{row}");
    assert!(report["lastError"].as_str().unwrap().contains("unreachable"), "{row}");
    let status = mesh.filter(&["status", "tag"]);
    assert!(!status.status.success());
    let table = text(&status.stdout);
    assert!(table.contains("backing-off") && table.contains("last failures"), "{table}");
}
