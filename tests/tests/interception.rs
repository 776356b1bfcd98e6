//! Transparent interception: three hosts in network namespaces, nftables rules, the proxies as UID 1337.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use std::net::{IpAddr, SocketAddr};

use outrigger_e2e::{Backend, Curl, Host, Lan, Mesh, Proxy, Recorded, Reply, until};

/// A Service with addresses that no host has: only interception can answer.
const REVIEWS: &str = "
apiVersion: v1
kind: Service
metadata: {name: reviews, namespace: demo}
spec:
  clusterIP: 10.96.0.10
  clusterIPs: [10.96.0.10, 'fd96::10']
  selector: {app: reviews}
  ports: [{name: http, port: 80, targetPort: http}]
";
const PORT: u16 = 8080;

/// An application on `host` that listens on its address, as one that knows nothing of a mesh does.
fn application(host: &Host, name: &'static str) -> Backend {
    let reply = move |request: &Recorded| Reply::Answer {
        status: 200,
        headers: Vec::new(),
        body: format!("{name} {} {}", request.method, request.path).into_bytes(),
    };
    Backend::on(host.listen(SocketAddr::new(IpAddr::from([0; 16]), PORT)), name, reply)
}

/// Control plane on host 3, web on host 1, reviews on host 2.
struct Shop {
    web: Proxy,
    reviews: Proxy,
    application: Backend,
    _mesh: Mesh,
    lan: Lan,
}

fn shop() -> Shop {
    let lan = Lan::new(3);
    let mesh = Mesh::start_on(lan.host(3), REVIEWS);
    let application = application(lan.host(2), "v1");
    let app = format!("127.0.0.1:{PORT}");
    let reviews = mesh.proxy("reviews-0").labels("app=reviews").app(&app).on(lan.host(2)).start();
    let web = mesh.proxy("web-0").on(lan.host(1)).start();
    for proxy in [&reviews, &web] {
        proxy.intercept();
    }
    Shop { web, reviews, application, _mesh: mesh, lan }
}

#[test]
fn curl_is_carried_over_mtls_between_hosts() {
    let shop = shop();
    let response = until("curl reaches the service's address", || {
        let response = Curl::from(shop.lan.host(1), "http://10.96.0.10/product").send();
        (response.status == 200).then_some(response)
    });

    assert_eq!(response.body, "v1 GET /product");
    let peers = shop.reviews.metrics().by("outrigger_tls_connections_total", "peer");
    assert!(peers.get("spiffe://cluster.local/ns/demo/sa/web").is_some_and(|count| *count >= 1.0), "{peers:?}");
    // Host 3 has no proxy: what it sends is plaintext, redirected on arrival, and known as such.
    let plain = Curl::from(shop.lan.host(3), &format!("http://{}:{PORT}/plain", shop.lan.host(2).ip())).send();
    assert_eq!((plain.status, plain.body.as_str()), (200, "v1 GET /plain"));
    let arrived = shop.application.requests().pop().expect("a request");
    assert_eq!(arrived.header("x-forwarded-client-cert"), None);
}

#[test]
fn ipv6_is_carried_too() {
    let shop = shop();
    let response = until("curl reaches the service's IPv6 address", || {
        let response = Curl::from(shop.lan.host(1), "http://[fd96::10]/six").send();
        (response.status == 200).then_some(response)
    });
    assert_eq!(response.body, "v1 GET /six");
    let plain = Curl::from(shop.lan.host(3), &format!("http://[{}]:{PORT}/plain", shop.lan.host(2).ip6())).send();
    assert_eq!((plain.status, plain.body.as_str()), (200, "v1 GET /plain"));
}

#[test]
fn the_proxys_own_connections_do_not_come_back() {
    let shop = shop();
    until("curl reaches the service's address", || {
        (Curl::from(shop.lan.host(1), "http://10.96.0.10/").send().status == 200).then_some(())
    });
    let before = shop.web.metrics().sum("outrigger_requests_total", &[("direction", "outbound")]);
    for _ in 0..10 {
        assert_eq!(Curl::from(shop.lan.host(1), "http://10.96.0.10/").send().status, 200);
    }
    let after = shop.web.metrics().sum("outrigger_requests_total", &[("direction", "outbound")]);
    assert!((after - before - 10.0).abs() < f64::EPSILON, "one per request: {before} → {after}");
    // The outbound listener is no way in: who dials it from outside is told so, or cut.
    let response = Curl::from(shop.lan.host(3), &format!("http://{}:15001/", shop.lan.host(2).ip())).send();
    assert_ne!(response.status, 200, "{response:?}");
}

#[test]
fn the_proxys_own_ports_are_no_way_in() {
    let shop = shop();
    let ip = shop.lan.host(2).ip();
    let get = |port: u16| Curl::from(shop.lan.host(3), &format!("http://{ip}:{port}/own")).send();
    until("the application is reached by its own port", || (get(PORT).status == 200).then_some(()));
    let before = shop.application.count();
    for port in [15001, 15006, 15000] {
        let response = get(port);
        assert_eq!(response.status, 0, "{port}: {response:?}");
    }
    assert_eq!(shop.application.count(), before);
    // From within the mesh it is the same: 15006 is no port of the application.
    let inside = Curl::from(shop.lan.host(1), &format!("http://{ip}:15006/own")).send();
    assert_ne!(inside.status, 200, "{inside:?}");
    assert_eq!(shop.application.count(), before);
    // Health is for probes, and is not redirected.
    assert_eq!(Curl::from(shop.lan.host(3), &format!("http://{ip}:15020/ready")).send().status, 200);
}
