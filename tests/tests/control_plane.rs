//! The control plane, asked by grpcio with Envoy's message classes and by curl.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use std::process::Command;

use nix::sys::signal::Signal;
use outrigger_e2e::{Backend, Curl, Mesh, Metrics, Proxy, Recorded, Reply, python, succeed, until};
use serde_json::Value;

/// Services a, b and c; a has a cluster IP.
const THREE: &str = "
apiVersion: v1
kind: Service
metadata: {name: a, namespace: demo}
spec: {clusterIP: 10.96.0.10, selector: {app: a}, ports: [{name: http, port: 80, targetPort: http}]}
---
apiVersion: v1
kind: Service
metadata: {name: b, namespace: demo}
spec: {selector: {app: b}, ports: [{name: http, port: 80, targetPort: http}]}
---
apiVersion: v1
kind: Service
metadata: {name: c, namespace: demo}
spec: {selector: {app: c}, ports: [{name: http, port: 80, targetPort: http}]}
";

fn delta(mesh: &Mesh, what: &str) -> Command {
    let mut command = python("delta.py");
    command.arg(what).args(["--address", &mesh.control.grpc().to_string()]);
    command.arg("--ca").arg(mesh.path("control/root.pem"));
    command.arg("--config").arg(mesh.path("config")).arg("--save").arg(mesh.path("held.json"));
    command.args(["--namespace", "demo", "--account", "client", "--workload", "client-0"]);
    command
}

#[test]
fn a_foreign_client_speaks_the_delta_protocol() {
    let mut mesh = Mesh::start(THREE);
    let token = mesh.token("demo", "client", "");
    // Subscribes, refuses one of three, sees absence, creation, change, removal, an alias; every message is asserted.
    let first: Value = serde_json::from_str(&succeed(delta(&mesh, "first").args(["--token", &token]))).unwrap();
    // A new stream that says what it holds: nothing is sent again.
    let again: Value = serde_json::from_str(&succeed(&mut delta(&mesh, "reconnect"))).unwrap();
    // A restarted control plane has the same versions: still nothing, and no removal.
    mesh.control.restart();
    let restarted: Value = serde_json::from_str(&succeed(&mut delta(&mesh, "reconnect"))).unwrap();

    let bytes = |run: &Value| run["bytes"].as_u64().unwrap();
    assert!(bytes(&first) > 3 * bytes(&again), "{first} {again}");
    assert_eq!(bytes(&again), bytes(&restarted));
}

#[test]
fn a_refused_resource_is_named_with_its_proxy_and_reason() {
    let mesh = Mesh::start(THREE);
    let token = mesh.token("demo", "client", "");
    let mut command = delta(&mesh, "hold");
    let mut client = command.args(["--token", &token]).spawn().unwrap();
    let nack = until("the NACK is listed", || {
        let proxies = mesh.api("/api/v1/proxies").to_string();
        proxies.contains("no thank you").then_some(proxies)
    });
    let table = mesh.outrigger(&["status"]);
    client.kill().unwrap();
    client.wait().unwrap();

    assert!(nack.contains("svc/demo/b") && nack.contains("client-0"), "{nack}");
    let table = String::from_utf8(table.stdout).unwrap();
    assert!(table.contains("svc/demo/b") && table.contains("no thank you"), "{table}");
}

#[test]
fn certificates_are_signed_for_whom_the_caller_is_and_nobody_else() {
    let mesh = Mesh::start(THREE);
    let token = |account: &str, more: &[&str]| {
        let state = mesh.path("control");
        let made = mesh.outrigger(
            &[
                &["token", "create", "--state", state.to_str().unwrap(), "--namespace", "demo", "--service-account"],
                &[account][..],
                more,
            ]
            .concat(),
        );
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        String::from_utf8(made.stdout).unwrap().trim().to_owned()
    };
    let labels = ["--labels", "app=a"];
    let mut ask = python("refusals.py");
    ask.args(["--address", &mesh.control.grpc().to_string()]).arg("--ca").arg(mesh.path("control/root.pem"));
    for (name, token) in [
        ("a", token("a", &[&labels[..], &["--single-use"]].concat())),
        ("a2", token("a", &labels)),
        ("expired", token("a", &[&labels[..], &["--ttl", "1s"]].concat())),
        ("b", token("b", &[])),
    ] {
        ask.arg("--token").arg(format!("{name}={token}"));
    }
    let got: Value = serde_json::from_str(&succeed(&mut ask)).unwrap();

    assert_eq!(got["identity"], "spiffe://cluster.local/ns/demo/sa/a");
    for accepted in ["first-use", "renewal", "register", "withdraw"] {
        assert_eq!(got[accepted]["status"], "accepted", "{accepted}: {got}");
    }
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
        "withdraw-other",
        "register-as-other",
        "register-without-certificate",
    ];
    for case in refused {
        let status = got[case]["status"].as_str().unwrap();
        assert!(["PERMISSION_DENIED", "UNAUTHENTICATED"].contains(&status), "{case}: {}", got[case]);
        assert!(got[case]["message"].as_str().is_some_and(|message| message.len() > 10), "{case}: {}", got[case]);
    }
    // Each is in the log and in the status.
    let status = mesh.api("/api/v1/status");
    let listed = status["refusals"].as_array().unwrap();
    assert!(listed.len() >= refused.len(), "{} of {} refusals are listed: {status}", listed.len(), refused.len());
    let log = mesh.control.process.log();
    assert!(log.matches("refused").count() >= refused.len(), "{log}");
    only_san_is_the_spiffe_id(got["chain"].as_str().unwrap());
    // first-use, renewal, and that of b.
    let metrics = Curl::get(&format!("http://{}/metrics", mesh.control.http())).send().body;
    assert!(Metrics::parse(&metrics).sum("outrigger_control_signatures_total", &[]) >= 3.0, "{metrics}");
}

/// The CSR asked for more; nothing of it may be there.
fn only_san_is_the_spiffe_id(chain: &str) {
    let (_, pem) = x509_parser::pem::parse_x509_pem(chain.as_bytes()).unwrap();
    let certificate = pem.parse_x509().unwrap();
    let names = certificate.subject_alternative_name().unwrap().unwrap();
    let names: Vec<String> = names.value.general_names.iter().map(ToString::to_string).collect();
    assert_eq!(names.len(), 1, "{names:?}");
    assert!(names[0].contains("spiffe://cluster.local/ns/demo/sa/a"), "{names:?}");
    assert!(!certificate.subject().to_string().contains("evil"), "{}", certificate.subject());
}

#[test]
fn a_bad_resource_is_rejected_alone_and_its_last_good_version_serves_on() {
    let mut mesh = Mesh::start(THREE);
    let application = Backend::http([127, 0, 0, 1].into(), "a");
    let _a = mesh.proxy("a-0").labels("app=a").app(&application.address()).start();
    let client = mesh.proxy("client-0").start();
    until("a answers", || (client.call("a", "/").send().status == 200).then_some(()));

    // a is broken, b moves to another port: b's change is applied, a serves as before.
    let broken = THREE.replace("ports: [{name: http, port: 80, targetPort: http}]}\n---\napiVersion: v1\nkind: Service\nmetadata: {name: b", "ports: [{name: http, port: 808080, targetPort: http}]}\n---\napiVersion: v1\nkind: Service\nmetadata: {name: b");
    assert_ne!(broken, THREE);
    mesh.write("mesh.yaml", &broken);
    let rejected = until("the rejection is listed", || {
        mesh.api("/api/v1/status")["rejections"].as_array().and_then(|all| all.first().cloned())
    });
    for (field, value) in [("kind", "Service"), ("namespace", "demo"), ("name", "a")] {
        assert_eq!(rejected[field], value, "{rejected}");
    }
    assert!(rejected["file"].as_str().unwrap().ends_with("mesh.yaml"), "{rejected}");
    assert!(rejected["line"].as_u64().is_some_and(|line| (2..8).contains(&line)), "{rejected}");
    assert!(rejected["field"].as_str().unwrap().contains("ports[0].port"), "{rejected}");
    assert!(mesh.control.process.log().contains("spec.ports[0].port"), "{}", mesh.control.process.log());
    assert_eq!(client.call("a", "/").send().status, 200);

    // And across a restart of the control plane, for a proxy that never knew it.
    mesh.control.restart();
    let late = mesh.proxy("late-0").start();
    until("a late client reaches a", || (late.call("a", "/").send().status == 200).then_some(()));
    // Removed is removed.
    mesh.write("mesh.yaml", &THREE.replace("name: a,", "name: renamed,"));
    until("a is gone", || (client.call("a", "/").send().reason() == Some("unknown-service")).then_some(()));
}

#[test]
fn a_policy_that_contradicts_an_older_one_is_rejected_and_its_last_good_version_serves_on() {
    let mut mesh = Mesh::start(THREE);
    let failing = |_: &Recorded| Reply::Answer { status: 503, headers: Vec::new(), body: Vec::new() };
    let application = Backend::http_with([127, 0, 0, 1].into(), "b", failing);
    let _b = mesh.proxy("b-0").labels("app=b").app(&application.address()).start();
    let policies = |target: &str| {
        let policy = |name: &str, service: &str| {
            format!(
                "apiVersion: outrigger.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: {name}, namespace: demo}}\n\
                 spec: {{targetRefs: [{{group: '', kind: Service, name: {service}}}], retries: {{attempts: 0}}}}\n---\n"
            )
        };
        policy("one", "a") + &policy("two", target)
    };
    // How often the application is asked for one request: without a policy three times.
    let asked = |proxy: &Proxy| {
        let before = application.count();
        assert_eq!(proxy.call("b", "/").send().status, 503);
        application.count() - before
    };
    mesh.write("policies.yaml", &policies("b"));
    let client = mesh.proxy("client-0").start();
    until("the policy applies", || (asked(&client) == 1).then_some(()));

    mesh.write("policies.yaml", &policies("a"));
    let listed = |mesh: &Mesh| {
        let rejected = mesh.api("/api/v1/status")["rejections"].as_array()?.first().cloned()?;
        assert_eq!((&rejected["name"], &rejected["serving"]), (&"two".into(), &"last good".into()), "{rejected}");
        Some(())
    };
    until("the rejection is listed", || listed(&mesh));
    // And across a restart, for a proxy that never knew it.
    mesh.control.restart();
    until("the rejection is listed again", || listed(&mesh));
    let late = mesh.proxy("late-0").start();
    until("b is known", || (late.call("b", "/").send().reason().is_none()).then_some(()));
    assert_eq!((asked(&client), asked(&late)), (1, 1));
}

#[test]
fn kinds_are_skipped_with_a_line_or_refused_with_a_suggestion() {
    let mesh = Mesh::start(THREE);
    mesh.write(
        "more.yaml",
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d, namespace: demo}\n---\n\
         apiVersion: outrigger.dev/v1alpha1\nkind: TraficPolicy\nmetadata: {name: t, namespace: demo}\nspec: {}\n---\n\
         apiVersion: outrigger.dev/v1alpha1\nkind: MtlsPolicy\nmetadata: {name: m, namespace: demo}\nspec: {mod: Strict}\n",
    );
    let status = until("both rejections are listed", || {
        let status = mesh.api("/api/v1/status");
        (status["rejections"].as_array()?.len() == 2).then_some(status)
    });
    let text = status["rejections"].to_string();
    assert!(text.contains("TrafficPolicy"), "the kind that was meant is not suggested: {text}");
    assert!(text.contains("mode"), "the field that was meant is not suggested: {text}");
    assert_eq!(status["skipped"], 1);
    let log = mesh.control.process.log();
    assert_eq!(log.lines().filter(|line| line.contains("Deployment")).count(), 1, "{log}");
}

#[test]
fn an_unreadable_authorization_policy_closes_what_it_selects() {
    let mesh = Mesh::start(THREE);
    let application = Backend::http([127, 0, 0, 1].into(), "app");
    let _a = mesh.proxy("a-0").labels("app=a").app(&application.address()).start();
    let _b = mesh.proxy("b-0").labels("app=b").app(&application.address()).start();
    let client = mesh.proxy("client-0").start();
    let reaches = |service: &str| client.call(service, "/").send();
    until("a and b answer", || (reaches("a").status == 200 && reaches("b").status == 200).then_some(()));

    let policy = |action: &str| {
        format!(
            "apiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: p, namespace: demo}}\n\
             spec: {{selector: {{matchLabels: {{app: a}}}}, action: {action}, rules: [{{from: [{{namespaces: [demo]}}]}}]}}\n"
        )
    };
    mesh.write("policy.yaml", &policy("Alow"));
    let closed = until("a is closed", || {
        let response = reaches("a");
        (response.status == 403).then_some(response)
    });
    assert_eq!(closed.reason(), Some("authorization-unavailable"));
    assert_eq!(reaches("b").status, 200);
    mesh.write("policy.yaml", &policy("Allow"));
    until("a is open again", || (reaches("a").status == 200).then_some(()));
    // With a last good version, that one goes on.
    mesh.write("policy.yaml", &policy("Alow"));
    until("the rejection is listed", || {
        (!mesh.api("/api/v1/status")["rejections"].as_array()?.is_empty()).then_some(())
    });
    assert_eq!(reaches("a").status, 200);
}

#[test]
fn a_proxy_receives_what_its_application_calls_whatever_the_size_of_the_mesh() {
    let received = |services: usize| {
        let mut text = THREE.to_owned();
        for i in 0..services {
            text.push_str(&format!(
                "---\napiVersion: v1\nkind: Service\nmetadata: {{name: s{i}, namespace: other}}\n\
                 spec: {{selector: {{app: s{i}}}, ports: [{{name: http, port: 80, targetPort: 8080}}]}}\n"
            ));
        }
        let mesh = Mesh::start(&text);
        let application = Backend::http([127, 0, 0, 1].into(), "app");
        let _apps: Vec<_> = ["a", "b", "c"]
            .map(|name| {
                mesh.proxy(&format!("{name}-0")).labels(&format!("app={name}")).app(&application.address()).start()
            })
            .into();
        let client = mesh.proxy("client-0").start();
        for name in ["a", "b", "c"] {
            until("the service answers", || (client.call(name, "/").send().status == 200).then_some(()));
        }
        // From the kernel: bytes that the proxy's connections to the control plane received.
        let ss = Command::new("ss").args(["-tnpiHO", "dst", &mesh.control.grpc().to_string()]).output().unwrap();
        let mine = format!("pid={},", client.process.id());
        let text = String::from_utf8(ss.stdout).unwrap();
        let count = |line: &str| -> u64 {
            line.split("bytes_received:")
                .nth(1)
                .and_then(|rest| rest.split(' ').next())
                .map_or(0, |n| n.parse().unwrap())
        };
        let bytes = text.lines().filter(|line| line.contains(&mine)).map(count).sum::<u64>();
        assert!(bytes > 1000, "{text}");
        bytes
    };
    let (small, large) = (received(50), received(5000));
    // Lease renewals and HTTP/2 pings of the time that passed; 4,950 more Services would be hundreds of KiB.
    assert!(large < small + 3000, "{small} bytes with 50 Services, {large} with 5,000");
}

#[test]
fn a_registration_ends_with_its_drain_or_its_lease() {
    let mut mesh = Mesh::start_with(THREE, &["--lease", "2s"]);
    let application = Backend::http([127, 0, 0, 1].into(), "a");
    let mut a = mesh.proxy("a-0").labels("app=a").app(&application.address()).start();
    let registered = |mesh: &Mesh| mesh.api("/api/v1/endpoints").to_string().contains("a-0");
    until("a is registered", || registered(&mesh).then_some(()));

    // A drain withdraws it at once.
    assert!(a.process.stop().success());
    until("a is withdrawn", || (!registered(&mesh)).then_some(()));

    // So does the end of its lease, when it died.
    a.restart();
    until("a is registered", || registered(&mesh).then_some(()));
    a.process.kill();
    until("the lease of a ended", || (!registered(&mesh)).then_some(()));

    // A control plane that restarts withdraws nothing of its own accord: the registration is there at once.
    a.restart();
    until("a is registered", || registered(&mesh).then_some(()));
    a.process.signal(Signal::SIGSTOP);
    mesh.control.restart();
    assert!(registered(&mesh), "a restart withdrew a registration before one lease had passed");
    until("the lease of a, which is paused, ended", || (!registered(&mesh)).then_some(()));
    a.process.signal(Signal::SIGCONT);
    until("a registered again", || registered(&mesh).then_some(()));
}

#[test]
fn the_http_api_shows_everything_and_is_guarded() {
    let mesh = Mesh::start(THREE);
    let application = Backend::http([127, 0, 0, 1].into(), "a");
    let _a = mesh.proxy("a-0").labels("app=a").app(&application.address()).start();
    for (page, shows) in [
        ("status", "trustDomain"),
        ("proxies", "a-0"),
        ("services", "\"a\""),
        ("endpoints", "a-0"),
        ("routes", "["),
        ("certificates", "spiffe://cluster.local/ns/demo/sa/a"),
        ("filters", "["),
    ] {
        let text = mesh.api(&format!("/api/v1/{page}")).to_string();
        assert!(text.contains(shows), "{page}: {text}");
    }
    let url = |path: &str| format!("http://{}{path}", mesh.control.http());
    assert_eq!(Curl::get(&url("/api/v1/status")).header("host", "evil.test").send().status, 403);
    assert_eq!(Curl::get(&url("/api/v1/status")).header("origin", "http://evil.test").send().status, 403);
    let ask = |token: &str| {
        Curl::get(&url("/api/v1/tokens"))
            .args([
                "-X",
                "POST",
                "-H",
                "content-type: application/json",
                "-d",
                r#"{"namespace":"demo","serviceAccount":"a"}"#,
            ])
            .header("authorization", token)
            .send()
            .status
    };
    assert_eq!(ask("Bearer wrong"), 401);
}

#[test]
fn the_token_of_the_first_start_joins_as_anything_unless_switched_off() {
    let mesh = Mesh::start(THREE);
    let token = std::fs::read_to_string(mesh.path("control/join-token")).unwrap();
    let _a = mesh.proxy("a-0").token(token.trim()).start();

    let mesh = Mesh::start_with(THREE, &["--no-bootstrap-token"]);
    assert!(!mesh.path("control/join-token").exists());
}

#[test]
fn files_of_the_state_directory_are_private() {
    use std::os::unix::fs::MetadataExt as _;
    let mesh = Mesh::start(THREE);
    let a = mesh.proxy("a-0").start();
    for (path, what) in [("control/root-key.pem", "the root's key"), ("a-0/state/key.pem", "the workload's key")] {
        let mode = std::fs::metadata(mesh.path(path)).unwrap_or_else(|e| panic!("{path}: {e}")).mode() & 0o777;
        assert_eq!(mode, 0o600, "{what}");
    }
    assert_eq!(std::fs::metadata(mesh.path("a-0/state")).unwrap().mode() & 0o777, 0o700);
    drop(a);
}
