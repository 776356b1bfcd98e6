//! HTTP/2 from clients that nobody here wrote: curl and h2load.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use std::net::IpAddr;
use std::process::Command;

use outrigger_e2e::{Backend, Mesh, Proxy, Recorded, Reply, succeed, until};

/// An application that speaks HTTP/1.1 behind a port that is declared so: HTTP/2 ends at its proxy.
fn start(reply: impl Fn(&Recorded) -> Reply + Send + Sync + 'static) -> (Mesh, Backend, Proxy, Proxy) {
    let mesh = Mesh::start(
        "apiVersion: v1\nkind: Service\nmetadata: {name: app, namespace: demo}\n\
         spec: {selector: {app: app}, ports: [{name: http, port: 80, targetPort: http}]}\n",
    );
    let app = Backend::http_with(IpAddr::from([127, 0, 0, 1]), "v1", reply);
    let address = format!("{}/http1", app.address());
    let proxy = mesh.proxy("app-0").labels("app=app").app(&address).start();
    let web = mesh.proxy("web-0").start();
    until("web reaches app", || (web.call("app", "/").send().status == 200).then_some(()));
    (mesh, app, proxy, web)
}

fn answer(body: Vec<u8>) -> Reply {
    Reply::Answer { status: 200, headers: Vec::new(), body }
}

#[test]
fn curl_with_prior_knowledge() {
    let (_mesh, app, _proxy, web) = start(|_| answer(b"ok".to_vec()));
    let response = web.call("app", "/two?q=1").args(["--http2-prior-knowledge", "--data", "body"]).send();
    assert_eq!((response.status, response.version.as_str(), response.body.as_str()), (200, "2", "ok"), "{response:?}");
    let request = app.requests().pop().unwrap();
    assert_eq!((request.path.as_str(), request.header("host")), ("/two?q=1", Some("app")));
    assert_eq!(request.body, b"body");
    // What the mesh says itself, it says in HTTP/2 as well.
    let response = web.call("app:81", "/").arg("--http2-prior-knowledge").send();
    assert_eq!((response.status, response.version.as_str(), response.reason()), (503, "2", Some("unknown-port")));
    let response = web.call("app", "/head").args(["--http2-prior-knowledge", "--head"]).send();
    assert_eq!((response.status, response.header("content-length"), response.exit), (200, Some("2"), 0));
}

#[test]
fn h2load_over_several_connections() {
    let (_mesh, app, proxy, web) = start(|_| answer(vec![b'x'; 1000]));
    let before = app.count();
    let target = format!("--connect-to={}", web.outbound());
    let mut h2load = Command::new("h2load");
    let report = succeed(h2load.args(["-n", "2000", "-c", "4", "-m", "10", &target, "http://app/load"]));
    assert!(report.contains("2000 total, 2000 started, 2000 done, 2000 succeeded, 0 failed"), "{report}");
    assert!(report.contains("2000 2xx"), "{report}");
    assert_eq!(app.count() - before, 2000);
    let tls = proxy.metrics().sum("outrigger_tls_connections_total", &[("direction", "inbound")]);
    assert!((1.0..50.0).contains(&tls), "connections between the proxies are shared: {tls}");
}

#[test]
fn big_bodies_pass_whole_both_ways() {
    const SIZE: usize = 24 << 20;
    let pattern = |size: usize| -> Vec<u8> { (0..=250).cycle().take(size).collect() };
    let (mesh, app, proxy, web) = start(move |request| {
        // Back as it came, so that both directions have flow control to go through.
        answer(request.body.clone())
    });
    let file = mesh.path("body");
    std::fs::write(&file, pattern(SIZE)).unwrap();
    let back = mesh.path("back");
    let response = web
        .call("app", "/big")
        .args(["--http2-prior-knowledge", "--no-include", "--output", back.to_str().unwrap()])
        .args(["--data-binary", &format!("@{}", file.display())])
        .send();
    assert_eq!((response.exit, response.status), (0, 200), "{}", response.error);
    assert!(std::fs::read(&back).unwrap() == pattern(SIZE), "the body came back as it was");
    assert!(app.requests().pop().unwrap().body == pattern(SIZE));
    for proxy in [&web, &proxy] {
        let peak = proxy.process.peak_memory();
        assert!(peak < 200 << 20, "{} had {peak} bytes", proxy.name);
    }
}
