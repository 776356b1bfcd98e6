//! The control plane as grpcio sees it, with Envoy's own message classes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use std::time::{Duration, Instant};

use outrigger_e2e::{Mesh, Python, until};

fn services(names: &[&str]) -> String {
    let service = |name: &&str| {
        let address = if *name == "a" { "clusterIP: 10.96.0.10, " } else { "" };
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: demo}}\n\
             spec: {{{address}selector: {{app: {name}}}, ports: [{{name: http, port: 80}}]}}\n---\n"
        )
    };
    names.iter().map(service).collect()
}

fn delta(mesh: &Mesh, what: &str) -> serde_json::Value {
    let path = |name: &str| mesh.path(name).to_str().unwrap().to_owned();
    let (address, ca, config, save) =
        (mesh.control.grpc().to_string(), path("control/root.pem"), path("config"), path("saved.json"));
    let token = mesh.token("demo", "probe", "");
    let flags = ["--address", &address, "--ca", &ca, "--token", &token, "--namespace", "demo", "--account", "probe"];
    let more = ["--workload", "probe-0", "--config", &config, "--save", &save];
    Python::script("delta.py", &[&[what], &flags[..], &more].concat()).json()
}

#[test]
fn envoys_client_subscribes_refuses_one_of_three_and_sees_every_change() {
    let mesh = Mesh::start(&services(&["a", "b", "c"]));
    let seen = delta(&mesh, "first");
    assert_eq!(seen["versions"].as_object().unwrap().len(), 3);
}

#[test]
fn a_reconnect_with_versions_resends_nothing_also_after_a_restart() {
    let mut mesh = Mesh::start(&services(&["a", "b", "c"]));
    let first = delta(&mesh, "first")["bytes"].as_u64().unwrap();
    let again = delta(&mesh, "reconnect")["bytes"].as_u64().unwrap();
    mesh.control.restart();
    let restarted = delta(&mesh, "reconnect")["bytes"].as_u64().unwrap();
    assert_eq!(again, restarted);
    assert!(restarted < first / 4, "{restarted} of {first} bytes");
}

#[test]
fn what_was_not_granted_is_refused_logged_and_listed() {
    let mesh = Mesh::start(&services(&["a", "b"]));
    let state = mesh.path("control");
    let make = |account: &str, labels: &str, more: &[&str]| {
        let scope = ["token", "create", "--namespace", "demo", "--service-account", account, "--labels", labels];
        let made = mesh.outrigger(&[&scope[..], &["--state", state.to_str().unwrap()], more].concat());
        assert!(made.status.success(), "{made:?}");
        String::from_utf8(made.stdout).unwrap().trim().to_owned()
    };
    let expired = make("a", "app=a", &["--ttl", "1s"]);
    let made = Instant::now();
    let tokens = [
        format!("a={}", make("a", "app=a", &["--single-use"])),
        format!("a2={}", make("a", "app=a", &[])),
        format!("b={}", make("b", "", &[])),
        format!("expired={expired}"),
    ];
    until("the token has expired", || (made.elapsed() > Duration::from_secs(2)).then_some(()));

    let (address, ca) = (mesh.control.grpc().to_string(), mesh.path("control/root.pem"));
    let mut args = vec!["--address", &address, "--ca", ca.to_str().unwrap()];
    args.extend(tokens.iter().flat_map(|token| ["--token", token.as_str()]));
    let got = Python::script("refusals.py", &args).json();

    for case in ["first-use", "renewal", "register", "withdraw"] {
        assert_eq!(got[case]["status"], "accepted", "{case}: {}", got[case]);
    }
    assert_eq!(got["identity"], "spiffe://cluster.local/ns/demo/sa/a", "whatever the CSR asked for");
    let refused = [
        "other-identity",
        "other-namespace",
        "labels-outside",
        "no-credentials",
        "expired",
        "tampered",
        "reused",
        "renewal-other-identity",
        "renewal-other-workload",
        "register-other-workload",
        "register-other-account",
        "register-other-labels",
        "register-as-other",
        "register-without-certificate",
        "withdraw-other",
    ];
    let status = mesh.api("/api/v1/status");
    let listed: Vec<&str> =
        status["refusals"].as_array().unwrap().iter().filter_map(|one| one["reason"].as_str()).collect();
    let log = mesh.control.process.log();
    for case in refused {
        let (status, message) = (got[case]["status"].as_str().unwrap(), got[case]["message"].as_str().unwrap());
        assert!(["PERMISSION_DENIED", "UNAUTHENTICATED"].contains(&status), "{case}: {}", got[case]);
        assert!(
            listed.iter().any(|reason| message.contains(reason) || reason.contains(message)),
            "{case}: {message} not in {listed:?}"
        );
    }
    assert!(log.matches("refused").count() >= refused.len(), "{log}");
}

#[test]
fn the_root_is_made_once_and_its_key_is_private() {
    use std::os::unix::fs::PermissionsExt as _;
    let mut mesh = Mesh::start(&services(&["a"]));
    let root = std::fs::read(mesh.path("control/root.pem")).unwrap();
    let keys: Vec<_> = std::fs::read_dir(mesh.path("control"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| std::fs::read_to_string(path).is_ok_and(|text| text.contains("PRIVATE KEY")))
        .collect();
    assert!(!keys.is_empty());
    for key in keys {
        assert_eq!(std::fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600, "{}", key.display());
    }
    mesh.control.restart();
    assert_eq!(std::fs::read(mesh.path("control/root.pem")).unwrap(), root);
}
