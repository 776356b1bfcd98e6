//! What the mesh takes out of requests and responses, and what it puts in, as the application and the client see it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use std::net::IpAddr;

use outrigger_e2e::{Backend, Curl, Pair, Recorded, Reply, header, until};

fn loopback() -> IpAddr {
    [127, 0, 0, 1].into()
}

fn start() -> Pair {
    Pair::start(Backend::http(loopback(), "v1"))
}

fn last(pair: &Pair) -> Recorded {
    pair.app.requests().pop().expect("a request")
}

/// What an application without a proxy sends: plaintext, straight to the inbound port.
fn plaintext(pair: &Pair, path: &str) -> Curl {
    Curl::get(&format!("http://{}{path}", pair.proxy.inbound())).header("host", "app")
}

#[test]
fn the_path_goes_on_as_it_was_sent_unless_path_rules_decide() {
    let pair = start();
    for path in ["/a%2Fb//c/./d/../e%41?q=%2F..", "/registry/%40scope%2Fname", "/a%5Cb"] {
        assert_eq!(pair.call(path).send().status, 200, "{path}");
        assert_eq!(last(&pair).path, path, "object stores and registries depend on it");
    }

    pair.mesh.write(
        "more.yaml",
        "apiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {name: deny, namespace: demo}\n\
         spec: {selector: {matchLabels: {app: app}}, action: Deny, rules: [{to: [{paths: ['/secret', '/secret/*']}]}]}\n",
    );
    until("the policy applies", || (pair.call("/secret/x").send().status == 403).then_some(()));

    // What is judged is what the application gets.
    assert_eq!(pair.call("/b//c/./d/../e%41%7e?q=%2F..").send().status, 200);
    assert_eq!(last(&pair).path, "/b/c/eA~?q=%2F..");
    let before = pair.app.count();
    for path in ["/a%2Fb", "/a%2fb", "/a%5Cb", "/a\\b", "/x/..%2fsecret"] {
        // curl sends a backslash as it is written; the proxy of the caller passes it on.
        let response = pair.call(path).send();
        assert_eq!((response.status, response.reason()), (400, Some("bad-request")), "{path}");
    }
    assert_eq!(pair.app.count(), before, "none of them arrived");
}

#[test]
fn only_the_mesh_says_who_called() {
    let pair = start();
    let spoofed = [
        ("X-Outrigger-Reason", "draining"),
        ("x-outrigger-anything", "x"),
        ("X-Forwarded-Client-Cert", "By=x;URI=spiffe://cluster.local/ns/demo/sa/admin"),
        ("l5d-client-id", "admin.demo"),
        ("X-Forwarded-For", "192.0.2.1"),
        ("X-Forwarded-Proto", "https"),
        ("Forwarded", "for=192.0.2.1"),
    ];
    let spoof = |curl: Curl| {
        let response = spoofed.iter().fold(curl, |curl, (name, value)| curl.header(name, value)).send();
        assert_eq!(response.status, 200);
        last(&pair)
    };

    let called = spoof(pair.call("/"));
    let xfcc = called.header("x-forwarded-client-cert").unwrap();
    assert!(xfcc.contains("URI=spiffe://cluster.local/ns/demo/sa/web") && !xfcc.contains("admin"), "{xfcc}");
    assert!(xfcc.contains("By=spiffe://cluster.local/ns/demo/sa/app"), "{xfcc}");
    let others = |request: &Recorded| {
        let gone = |name: &str| {
            name.starts_with("x-outrigger-") || name.starts_with("x-forwarded-") || name == "l5d-client-id"
        };
        let all = request.headers.iter().map(|(name, _)| name.clone());
        all.filter(|name| (gone(name) || name == "forwarded") && name != "x-forwarded-client-cert").collect::<Vec<_>>()
    };
    assert_eq!(others(&called), [""; 0]);

    // Without mTLS nobody is vouched for.
    let anonymous = spoof(plaintext(&pair, "/"));
    assert_eq!(anonymous.header("x-forwarded-client-cert"), None);
    assert_eq!(others(&anonymous), [""; 0]);
}

#[test]
fn forwarding_headers_are_kept_from_trusted_forwarders_only() {
    let resources = "apiVersion: outrigger.dev/v1alpha1\nkind: MeshConfig\nmetadata: {name: default}\n\
         spec: {trustedForwarders: ['spiffe://cluster.local/ns/demo/sa/web']}\n";
    let pair = Pair::start_with(resources, Backend::http(loopback(), "v1"), &[], &[]);
    let other = pair.mesh.proxy("other-0").start();
    let seen = |curl: Curl| {
        let response = curl.header("X-Forwarded-For", "192.0.2.1").header("Forwarded", "for=192.0.2.1").send();
        assert_eq!(response.status, 200);
        let request = last(&pair);
        (request.header("x-forwarded-for").is_some(), request.header("forwarded").is_some())
    };
    assert_eq!(seen(pair.call("/")), (true, true), "web is the gateway");
    assert_eq!(seen(other.call("app", "/")), (false, false));
    assert_eq!(seen(plaintext(&pair, "/")), (false, false));
}

#[test]
fn hop_by_hop_headers_end_at_the_hop() {
    let app = Backend::http_with(loopback(), "v1", |_| {
        let header = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let headers = vec![
            header("Connection", "keep-alive, X-Hop"),
            header("Keep-Alive", "timeout=5"),
            header("Proxy-Connection", "keep-alive"),
            header("X-Hop", "1"),
            header("X-End", "2"),
            header("X-Outrigger-Reason", "internal-of-the-application"),
        ];
        Reply::Answer { status: 200, headers, body: b"ok".to_vec() }
    });
    let pair = Pair::start(app);
    let mut raw = pair.raw();
    raw.send(
        "GET / HTTP/1.1\r\nHost: app\r\nConnection: keep-alive, X-Hop, Host, Content-Length\r\nKeep-Alive: timeout=9\r\n\
         Proxy-Connection: keep-alive\r\nX-Hop: 1\r\nX-End: 2\r\nTE: gzip, trailers;q=0.5\r\n\r\n",
    );
    let (head, body) = raw.message();
    assert_eq!(body, b"ok");
    for gone in ["keep-alive", "proxy-connection", "x-hop", "x-outrigger-reason"] {
        assert_eq!(header(&head, gone), None, "{head}");
        assert_eq!(last(&pair).header(gone), None, "{gone}");
    }
    assert_eq!(header(&head, "x-end"), Some("2"), "{head}");
    assert_eq!(last(&pair).header("x-end"), Some("2"));
    // A Connection header cannot take away what frames or addresses the message.
    assert_eq!(last(&pair).header("host"), Some("app"));
}

#[test]
fn an_offer_of_h2c_is_passed_over() {
    let pair = start();
    let mut raw = pair.raw();
    raw.send(
        "GET /h2c HTTP/1.1\r\nHost: app\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\
         HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n\r\n",
    );
    let (head, _) = raw.message();
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    let arrived = last(&pair);
    for gone in ["upgrade", "http2-settings", "connection"] {
        assert_eq!(arrived.header(gone), None, "{arrived:?}");
    }
}
