//! `outrigger status`: what the control plane could not accept, and what proxies acknowledged.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use outrigger_e2e::{Backend, Mesh, until};

const SERVICE: &str = "
apiVersion: v1
kind: Service
metadata: {name: reviews, namespace: demo}
spec:
  selector: {app: reviews}
  ports: [{name: http, port: 80, targetPort: http}]
";

#[test]
fn a_rejected_resource_is_named_with_file_line_and_field() {
    let mesh = Mesh::start(SERVICE);
    let application = Backend::http([127, 0, 0, 1].into(), "v1");
    let _reviews = mesh.proxy("reviews-0").labels("app=reviews").app(&application.address()).start();
    let web = mesh.proxy("web-0").start();
    until("web reaches reviews", || (web.call("reviews", "/").send().status == 200).then_some(()));

    // Well, and every proxy with what it acknowledged.
    let well = until("everything is acknowledged", || {
        let status = mesh.outrigger(&["status"]);
        status.status.success().then(|| String::from_utf8(status.stdout).unwrap())
    });
    let row = |name: &str| well.lines().find(|line| line.contains(name)).unwrap_or_else(|| panic!("no {name}: {well}"));
    assert!(row("web-0").contains("connected") && row("reviews-0").contains("connected"), "{well}");

    // Then a mistake in a resource that was good.
    mesh.write("mesh.yaml", &SERVICE.replace("port: 80", "port: eighty"));
    let status = until("the rejection is listed", || {
        let status = mesh.outrigger(&["status"]);
        (status.status.code() == Some(1)).then(|| String::from_utf8(status.stdout).unwrap())
    });
    let line = status.lines().find(|line| line.contains("mesh.yaml:7")).unwrap_or_else(|| panic!("{status}"));
    assert!(line.contains("Service demo/reviews") && line.contains("spec.ports[0].port"), "{line}");
    assert!(line.contains("earlier version"), "{line}");
    assert_eq!(web.call("reviews", "/").send().status, 200, "the last good version serves");

    let json: serde_json::Value = serde_json::from_slice(&mesh.outrigger(&["status", "-o", "json"]).stdout).unwrap();
    assert_eq!(json["status"]["rejections"][0]["field"], "spec.ports[0].port");
}
