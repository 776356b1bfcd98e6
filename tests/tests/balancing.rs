//! Which endpoint gets a request: asked by h2load, counted by the applications.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use std::process::Command;
use std::thread;
use std::time::Duration;

use outrigger_e2e::{Backend, Mesh, Reply, succeed, until};

const APP: &str = "
apiVersion: v1
kind: Service
metadata: {name: app, namespace: demo}
spec:
  selector: {app: app}
  ports: [{name: http, port: 80, targetPort: http}]
";

fn balanced_by(algorithm: &str) -> String {
    format!(
        "{APP}---\napiVersion: outrigger.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: app, namespace: demo}}\n\
         spec: {{targetRefs: [{{group: '', kind: Service, name: app}}], loadBalancer: {{algorithm: {algorithm}}}}}\n"
    )
}

fn answer() -> Reply {
    Reply::Answer { status: 200, headers: Vec::new(), body: b"ok".to_vec() }
}

/// Requests that a quick and a slow instance of the service received of 300.
fn shares(algorithm: &str) -> (usize, usize) {
    let mesh = Mesh::start(&balanced_by(algorithm));
    let quick = Backend::http_with([127, 0, 0, 1].into(), "quick", |_| answer());
    let slow = Backend::http_with([127, 0, 0, 1].into(), "slow", |_| {
        thread::sleep(Duration::from_millis(40));
        answer()
    });
    let _quick = mesh.proxy("quick-0").labels("app=app").app(&quick.address()).start();
    let _slow = mesh.proxy("slow-0").labels("app=app").app(&slow.address()).start();
    let client = mesh.proxy("client-0").start();
    until("both instances are used", || {
        assert_eq!(client.call("app", "/").send().reason().filter(|reason| *reason != "no-endpoints"), None);
        (quick.count() > 0 && slow.count() > 0).then_some(())
    });
    let before = (quick.count(), slow.count());
    let mut load = Command::new("h2load");
    load.args(["--h1", "-n300", "-c6", "-H", ":authority: app", &client.url("/")]);
    let said = succeed(&mut load);
    assert!(said.contains("300 succeeded, 0 failed"), "{said}");
    (quick.count() - before.0, slow.count() - before.1)
}

#[test]
fn a_slow_instance_gets_less_by_peak_ewma_and_its_turn_by_round_robin() {
    let (quick, slow) = shares("PeakEwma");
    assert_eq!(quick + slow, 300);
    assert!(slow < 60, "the slow instance got {slow} of 300");
    let (quick, slow) = shares("RoundRobin");
    assert!(quick.abs_diff(slow) <= 30, "round robin: {quick} and {slow}");
}
