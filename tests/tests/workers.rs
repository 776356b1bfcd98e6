//! How the workers of one proxy share what there is to do: by counts of `/stats`, with connections that stay.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use outrigger_e2e::{Backend, H2, Local, LocalProxy, Raw, until};

/// Requests on each connection that count.
const REQUESTS: u64 = 6;

fn start(app: &Backend) -> (Local, LocalProxy) {
    let port = app.address().port();
    let local = Local::new(&format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: app, namespace: demo}}\n\
         spec: {{ports: [{{name: http, port: 80, targetPort: {port}}}]}}\n---\n\
         apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\n\
         metadata: {{name: app, namespace: demo, labels: {{kubernetes.io/service-name: app}}}}\n\
         ports: [{{name: http, port: {port}}}]\nendpoints: [{{addresses: [127.0.0.1]}}]\n"
    ));
    let proxy = local.proxy("web").flag("--workers", &2).start().ready();
    (local, proxy)
}

fn workers(proxy: &LocalProxy, of: &str) -> Vec<u64> {
    let stats = proxy.admin("/stats").json();
    stats["workers"].as_array().unwrap().iter().map(|worker| worker[of].as_u64().unwrap()).collect()
}

/// Opens so many connections, which make requests in turn, and looks at who served them.
fn shared<C>(connections: usize, mut connect: impl FnMut(&LocalProxy) -> C, mut request: impl FnMut(&mut C)) {
    let app = Backend::http([127, 0, 0, 1].into(), "v1");
    let (_local, proxy) = start(&app);
    until("nobody else is connected", || (workers(&proxy, "outbound") == [0, 0]).then_some(()));
    let mut open: Vec<C> = (0..connections).map(|_| connect(&proxy)).collect();
    open.iter_mut().for_each(&mut request);
    let held = workers(&proxy, "outbound");
    assert_eq!(held.iter().sum::<u64>(), connections as u64);
    if connections == 4 {
        assert_eq!(held, [2, 2]);
    }
    let before = workers(&proxy, "requests");
    for _ in 0..REQUESTS {
        open.iter_mut().for_each(&mut request);
    }
    let made: Vec<u64> = workers(&proxy, "requests").iter().zip(before).map(|(now, before)| now - before).collect();
    let all = connections as u64 * REQUESTS;
    assert_eq!(made.iter().sum::<u64>(), all);
    let most = made.iter().max().unwrap();
    // 1.25 of the fair share, which is a half.
    assert!(most * 2 * 4 <= all * 5, "{made:?} of {all}");
}

fn http1(connections: usize) {
    let connect = |proxy: &LocalProxy| Raw::connect(proxy.outbound());
    shared(connections, connect, |client| {
        client.send("GET / HTTP/1.1\r\nHost: app\r\n\r\n");
        let (head, _) = client.message();
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    });
}

fn http2(connections: usize) {
    let connect = |proxy: &LocalProxy| H2::connect(proxy.outbound(), 1 << 20);
    shared(connections, connect, |client| {
        let stream = client.request("GET", "app", "/", true);
        assert!(client.ended(stream));
    });
}

#[test]
fn four_connections_are_two_and_two() {
    http1(4);
    http2(4);
}

#[test]
fn eight_connections_are_shared() {
    http1(8);
    http2(8);
}

#[test]
fn sixty_four_connections_are_shared() {
    http1(64);
    http2(64);
}
