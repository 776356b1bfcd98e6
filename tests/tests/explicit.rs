//! Explicit mode: no interception; the application sends to the outbound port and names the service in Host.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use outrigger_e2e::{Backend, Mesh, until};

/// The shop of these tests: one service with two versions.
const REVIEWS: &str = "
apiVersion: v1
kind: Service
metadata: {name: reviews, namespace: demo}
spec:
  selector: {app: reviews}
  ports: [{name: http, port: 80, targetPort: http}]
";

#[test]
fn curl_reaches_the_application_over_mtls() {
    let mesh = Mesh::start(REVIEWS);
    let application = Backend::http([127, 0, 0, 1].into(), "v1");
    let reviews = mesh.proxy("reviews-0").labels("app=reviews,version=v1").app(&application.address()).start();
    let web = mesh.proxy("web-0").start();

    let response = until("web reaches reviews", || {
        let response = web.call("reviews", "/product?id=1").send();
        (response.status == 200).then_some(response)
    });

    assert_eq!(response.header("x-backend"), Some("v1"));
    assert_eq!(response.json()["path"], "/product?id=1");
    assert_eq!(response.reason(), None);
    // From the receiving side: who called, as its certificate proves it.
    let peers = reviews.metrics().by("outrigger_tls_connections_total", "peer");
    assert!(peers.get("spiffe://cluster.local/ns/demo/sa/web").is_some_and(|count| *count >= 1.0), "{peers:?}");
    let arrived = application.requests().pop().expect("a request");
    let xfcc = arrived.header("x-forwarded-client-cert").expect("XFCC");
    assert!(xfcc.contains("spiffe://cluster.local/ns/demo/sa/web"), "{xfcc}");
}

#[test]
fn every_form_of_the_name_is_the_same_service() {
    let mesh = Mesh::start(REVIEWS);
    let application = Backend::http([127, 0, 0, 1].into(), "v1");
    let _reviews = mesh.proxy("reviews-0").labels("app=reviews").app(&application.address()).start();
    let web = mesh.proxy("web-0").start();
    until("web reaches reviews", || (web.call("reviews", "/").send().status == 200).then_some(()));

    for name in ["reviews", "reviews.demo", "reviews.demo.svc", "reviews.demo.svc.cluster.local", "reviews:80"] {
        let response = web.call(name, "/").send();
        assert_eq!((response.status, response.reason()), (200, None), "{name}");
    }
    let response = web.call("reviews.elsewhere", "/").send();
    assert_eq!((response.status, response.reason()), (503, Some("unknown-service")));
}

#[test]
fn a_weight_change_moves_the_traffic() {
    let route = |v1: u32, v2: u32| {
        let service = |version: &str| {
            format!(
                "
apiVersion: v1
kind: Service
metadata: {{name: reviews-{version}, namespace: demo}}
spec:
  selector: {{app: reviews, version: {version}}}
  ports: [{{name: http, port: 80, targetPort: http}}]
---"
            )
        };
        format!(
            "{}{}
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: reviews, namespace: demo}}
spec:
  parentRefs: [{{group: '', kind: Service, name: reviews}}]
  rules:
  - backendRefs:
    - {{name: reviews-v1, port: 80, weight: {v1}}}
    - {{name: reviews-v2, port: 80, weight: {v2}}}
",
            service("v1"),
            service("v2")
        )
    };
    let mesh = Mesh::start(REVIEWS);
    mesh.write("route.yaml", &route(1, 0));
    let (one, two) = (Backend::http([127, 0, 0, 1].into(), "v1"), Backend::http([127, 0, 0, 1].into(), "v2"));
    let _v1 = mesh.proxy("reviews-1").labels("app=reviews,version=v1").app(&one.address()).start();
    let _v2 = mesh.proxy("reviews-2").labels("app=reviews,version=v2").app(&two.address()).start();
    let web = mesh.proxy("web-0").start();
    let backend = || web.call("reviews", "/").send().header("x-backend").map(str::to_owned);

    until("only v1 answers", || (backend().as_deref() == Some("v1")).then_some(()));
    for _ in 0..20 {
        assert_eq!(backend().as_deref(), Some("v1"));
    }

    mesh.write("route.yaml", &route(0, 1));
    until("v2 answers", || (backend().as_deref() == Some("v2")).then_some(()));
    for _ in 0..20 {
        assert_eq!(backend().as_deref(), Some("v2"));
    }

    mesh.write("route.yaml", &route(1, 1));
    until("both answer", || {
        let seen: std::collections::BTreeSet<_> = (0..10).filter_map(|_| backend()).collect();
        (seen.len() == 2).then_some(())
    });
}
