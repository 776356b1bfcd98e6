//! `x-outrigger-reason`: each code, produced from outside. Codes that other files show are listed by the last test.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use std::fs;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::sys::socket::{Backlog, listen};
use outrigger_core::reason::Reason;
use outrigger_e2e::{
    Address, Backend, Curl, Lan, Mesh, Pair, Process, Raw, Reply, Response, binary, header, python, until,
};

fn loopback() -> IpAddr {
    [127, 0, 0, 1].into()
}

fn plain() -> Backend {
    Backend::http(loopback(), "v1")
}

fn answering(reply: Reply) -> Backend {
    Backend::http_with(loopback(), "v1", move |request| {
        if request.path == "/ready" {
            return Reply::Answer { status: 200, headers: Vec::new(), body: Vec::new() };
        }
        reply.clone()
    })
}

fn policy(spec: &str) -> String {
    format!(
        "apiVersion: outrigger.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: app, namespace: demo}}\n\
         spec:\n  targetRefs: [{{group: '', kind: Service, name: app}}]\n{spec}\n"
    )
}

#[track_caller]
fn assert_told(response: &Response, status: u16, reason: &str) {
    assert_eq!((response.status, response.reason()), (status, Some(reason)), "{response:?}");
    // People are told what to do, too.
    assert!(response.body.starts_with(&format!("{reason}: ")), "{response:?}");
}

#[test]
fn head_timeout() {
    let pair = Pair::start_with("", plain(), &[("--header-timeout", "200ms")], &[]);
    let mut raw = pair.raw();
    raw.send("GET / HTTP/1.1\r\nHost: app\r\nX-Slow: ");
    let answer = raw.rest();
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    assert_eq!(header(&answer, "x-outrigger-reason"), Some("head-timeout"));
    assert_eq!(pair.app.count(), 0);

    // A head that is complete in time is not touched, however long its response takes.
    assert_eq!(pair.call("/").send().status, 200);
}

#[test]
fn upgrade_refused() {
    let pair = Pair::start(plain());
    let response = pair.call("/").args(["--http1.1", "-H", "Connection: upgrade", "-H", "Upgrade: irc/6.9"]).send();
    assert_told(&response, 501, "upgrade-refused");
    assert_eq!(pair.app.count(), 0);
}

#[test]
fn identity_unavailable() {
    // Local mode without --cert-file: nothing to prove an identity with, so an endpoint that expects one is not dialled.
    let directory = tempfile::tempdir().unwrap();
    let application = plain();
    let port = application.address().port();
    let resources = "apiVersion: v1\nkind: Service\nmetadata: {name: app, namespace: demo}\n\
         spec: {selector: {app: app}, ports: [{name: http, port: 80, targetPort: http}]}\n---\n\
         apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {name: app-0, namespace: demo, labels: {app: app}}\n\
         spec:\n  address: 127.0.0.1\n  ports: [{name: http, port: PORT, protocol: http1}]\n  serviceAccount: app\n\
         \u{20} identity: spiffe://cluster.local/ns/demo/sa/app\n";
    fs::write(directory.path().join("mesh.yaml"), resources.replace("PORT", &port.to_string())).unwrap();
    let address = Address::claim();
    let mut command = Command::new(binary("outrigger-proxy"));
    command.args(["--name", "web-0", "--namespace", "demo", "--config"]).arg(directory.path());
    for (flag, port) in [("--outbound", 15001), ("--inbound", 15006), ("--admin", 15000), ("--health", 15020)] {
        command.args([flag, &address.port(port).to_string()]);
    }
    let _proxy = Process::start("web", command, directory.path());
    let url = format!("http://{}/", address.port(15001));
    let response = until("the proxy answers", || {
        let response = Curl::get(&url).header("host", "app").send();
        // Before the directory is read nothing is known.
        let unknown = response.reason().is_some_and(|reason| reason.starts_with("discovery-"));
        (response.status != 0 && !unknown).then_some(response)
    });
    assert_told(&response, 503, "identity-unavailable");
    assert_eq!(application.count(), 0);
}

#[test]
fn peer_identity() {
    let mesh = Mesh::start(
        "apiVersion: v1\nkind: Service\nmetadata: {name: app, namespace: demo}\n\
         spec: {selector: {app: app}, ports: [{name: http, port: 80, targetPort: http}]}\n",
    );
    let application = plain();
    // At the address that app registers stands somebody else, with a valid certificate of its own.
    let impostor = mesh.proxy("impostor-0").app(&application.address()).start();
    let advertised = impostor.ip().to_string();
    let _app =
        mesh.proxy("app-0").labels("app=app").flag("--advertise", &advertised).app(&application.address()).start();
    let web = mesh.proxy("web-0").start();
    let response = until("the endpoint is known", || {
        Some(web.call("app", "/").send()).filter(|response| response.reason() != Some("no-endpoints"))
    });
    assert_told(&response, 503, "peer-identity");
    assert!(response.body.contains("sa/app"), "it names who was expected: {response:?}");
    assert_eq!(application.count(), 0);
}

#[test]
fn unknown_port() {
    let pair = Pair::start(plain());
    assert_told(&pair.web.call("app:81", "/").send(), 503, "unknown-port");
}

#[test]
fn discovery_timeout() {
    let pair = Pair::start(plain());
    assert_eq!(pair.call("/").send().status, 200);
    pair.mesh.control.process.signal(Signal::SIGSTOP);
    assert_told(&pair.web.call("never-asked-for", "/").send(), 503, "discovery-timeout");
    assert_eq!(pair.call("/").send().status, 200, "what is known goes on");
    pair.mesh.control.process.signal(Signal::SIGCONT);
    until("the answer comes after all", || {
        (pair.web.call("never-asked-for", "/").send().reason() == Some("unknown-service")).then_some(())
    });
}

#[test]
fn discovery_unavailable() {
    let mut pair = Pair::start(plain());
    assert_eq!(pair.call("/").send().status, 200);
    pair.mesh.control.process.kill();
    until("the proxy has noticed", || (pair.web.admin("/stats").json()["connected"] == false).then_some(()));
    assert_told(&pair.web.call("never-asked-for", "/").send(), 503, "discovery-unavailable");
    assert_eq!(pair.call("/").send().status, 200, "what is known goes on");
}

#[test]
fn connect_timeout() {
    // A queue that is full: the kernel drops what wants to connect, as a dead machine does.
    let listener = TcpListener::bind((loopback(), 0)).unwrap();
    listen(&listener, Backlog::new(0).unwrap()).unwrap();
    let address = listener.local_addr().unwrap();
    let connect = || TcpStream::connect_timeout(&address, Duration::from_millis(200));
    let full: Vec<TcpStream> = std::iter::from_fn(|| connect().ok()).collect();
    assert!(!full.is_empty());

    let mesh = Mesh::start(
        "apiVersion: v1\nkind: Service\nmetadata: {name: app, namespace: demo}\n\
         spec: {selector: {app: app}, ports: [{name: http, port: 80, targetPort: http}]}\n",
    );
    let _app = mesh.proxy("app-0").labels("app=app").app(&address).start();
    let web = mesh.proxy("web-0").start();
    let response = until("the endpoint is known", || {
        Some(web.call("app", "/").send()).filter(|response| response.reason() != Some("no-endpoints"))
    });
    assert_told(&response, 503, "connect-timeout");
}

#[test]
fn upstream_reset() {
    let pair = Pair::start(answering(Reply::Close));
    // POST: not tried again, so what is told is of one attempt.
    assert_told(&pair.call("/").args(["--data", "x"]).send(), 502, "upstream-reset");
    assert_eq!(pair.app.count(), 1);
}

#[test]
fn upstream_protocol() {
    let pair = Pair::start(answering(Reply::Raw(b"SSH-2.0-OpenSSH_9.9\r\n\r\n".to_vec())));
    assert_told(&pair.call("/").send(), 502, "upstream-protocol");
}

#[test]
fn per_try_timeout() {
    let spec = "  retries: {attempts: 0, perTryTimeout: 200ms}\n  timeouts: {request: 20s}";
    let pair = Pair::start_with(&policy(spec), answering(Reply::Hang), &[], &[]);
    until("the policy applies", || (pair.call("/ready").send().status == 200).then_some(()));
    assert_told(&pair.call("/").send(), 504, "per-try-timeout");
}

#[test]
fn overflow_pending() {
    let spec = "  circuitBreaker: {maxConnections: 1, maxPendingRequests: 1}\n  timeouts: {request: 20s}";
    let pair = Pair::start_with(&policy(spec), answering(Reply::Hang), &[], &[]);
    let url = pair.web.url("/");
    thread::scope(|scope| {
        let call = || Curl::get(&url).header("host", "app").args(["--max-time", "10"]).send();
        // One has the connection, and one waits for it.
        scope.spawn(call);
        until("the first has the connection", || (pair.app.count() == 1).then_some(()));
        let clusters = || pair.web.admin("/clusters").json();
        let waiting = || clusters()[0]["pending"].as_u64();
        scope.spawn(call);
        until("the second waits", || (waiting() == Some(1)).then_some(()));
        assert_told(&pair.call("/").send(), 503, "overflow-pending");
        assert_eq!((pair.app.count(), clusters()[0]["connections"].as_u64()), (1, Some(1)), "{}", clusters());
        until("nobody waits any more", || {
            pair.app.cut();
            (clusters()[0]["requests"].as_u64() == Some(0)).then_some(())
        });
    });
}

/// Opaque streams have no response: the reason is in metrics and in the access log.
#[test]
fn overflow_connections() {
    let lan = Lan::new(3);
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: app, namespace: demo}\n\
         spec: {selector: {app: app}, clusterIP: 10.96.0.10, ports: [{name: tcp, port: 80, targetPort: tcp}]}\n---\n";
    let limit = policy("  circuitBreaker: {maxConnections: 2}");
    let mesh = Mesh::start_on(lan.host(3), &format!("{service}{limit}"));
    let echo = Backend::echo(lan.host(2).listen("[::]:5432".parse().unwrap()), b"hello\r\n");
    let app = mesh.proxy("app-0").labels("app=app").app(&"tcp=127.0.0.1:5432/tcp").on(lan.host(2)).start();
    let web = mesh.proxy("web-0").on(lan.host(1)).start();
    app.intercept();
    web.intercept();
    let address: SocketAddr = "10.96.0.10:80".parse().unwrap();
    let connect = || Raw::new(lan.host(1).connect(address).unwrap());
    let greeted = || {
        let mut raw = connect();
        raw.try_exactly(7).map(|_| raw)
    };
    let mut open = vec![until("the service is reached", greeted)];
    open.push(greeted().expect("two may"));

    assert_eq!(connect().rest(), "", "the third is refused");
    let refused = web.metrics().sum("outrigger_tcp_connections_total", &[("reason", "overflow-connections")]);
    assert!(refused >= 1.0, "{refused}");
    until("it is logged", || web.process.log().contains("\"reason\":\"overflow-connections\"").then_some(()));
    assert_eq!(echo.connections(), 2);

    // A place becomes free.
    drop(open.pop());
    until("another is let in", greeted);
}

#[test]
fn overloaded() {
    let hung = Backend::http_with(loopback(), "v1", |request| match &*request.path {
        "/hang" => Reply::Hang,
        _ => Reply::Answer { status: 200, headers: Vec::new(), body: Vec::new() },
    });
    let pair = Pair::start_with("", hung, &[("--max-requests", "1")], &[]);
    until("the application is reached", || (pair.call("/").send().status == 200).then_some(()));
    let mut held = pair.raw();
    held.send("GET /hang HTTP/1.1\r\nHost: app\r\n\r\n");
    until("a request is in flight", || pair.app.requests().iter().any(|request| request.path == "/hang").then_some(()));
    let response = pair.call("/").send();
    assert_told(&response, 503, "overloaded");
    assert_eq!(response.header("retry-after"), Some("1"));

    // Who looks after it is answered all the same.
    let stats = pair.web.admin("/stats").json();
    assert_eq!(stats["workers"][0]["refused"], 1, "{stats}");
    let refused = pair.web.metrics().sum("outrigger_requests_total", &[("code", "503"), ("reason", "overloaded")]);
    assert!((refused - 1.0).abs() < f64::EPSILON, "{refused}");

    drop(held);
    until("there is room again", || (pair.call("/").send().status == 200).then_some(()));
}

/// What is upgraded cannot be asked to end: it is cut at the maximum time, and the access log says why.
#[test]
fn draining() {
    let port = TcpListener::bind((loopback(), 0)).unwrap().local_addr().unwrap().port();
    let mesh = Mesh::start(
        "apiVersion: v1\nkind: Service\nmetadata: {name: chat, namespace: demo}\n\
         spec: {selector: {app: chat}, ports: [{name: http, port: 80, targetPort: http}]}\n",
    );
    let mut command = python("websocket_peer.py");
    command.args(["serve", &port.to_string()]);
    let _server = Process::serve("server", command, &mesh.path(""));
    let app = format!("127.0.0.1:{port}");
    let flags = |builder: outrigger_e2e::ProxyBuilder<'_>| {
        builder.flag("--drain-min", "100ms").flag("--drain-max", "1s").labels("app=chat").app(&app).start()
    };
    let mut chat = flags(mesh.proxy("chat-0"));
    let web = mesh.proxy("web-0").start();
    until("chat is reached", || (web.call("chat", "/").send().status == 426).then_some(()));
    let url = format!("ws://{}/", web.outbound());
    let mut command = python("websocket_peer.py");
    command.env("PYTHONUNBUFFERED", "1").args(["hold", &url, "chat"]);
    let mut client = Process::start("client", command, &mesh.path(""));
    until("the WebSocket is open", || client.log().contains("open").then_some(()));

    let status = chat.process.stop();
    assert!(status.success(), "{status}: what is cut is no failure of the proxy");
    client.ended();
    assert!(client.log().contains("closed"), "{}", client.log());
    let log = chat.process.log();
    assert!(log.contains("\"reason\":\"draining\""), "{log}");
}

#[test]
fn every_code_is_produced_by_some_test() {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let mut sources = fs::read_to_string(tests.with_file_name("corpus").join("cases.json")).unwrap();
    for entry in fs::read_dir(tests).unwrap() {
        sources += &fs::read_to_string(entry.unwrap().path()).unwrap();
    }
    let named = |code: &str| sources.contains(&format!("\"{code}\"")) || sources.contains(&format!("\\\"{code}\\\""));
    let codes = Reason::ALL.iter().map(|reason| reason.code());
    let forgotten: Vec<&str> = codes.filter(|code| !named(code)).collect();
    assert!(forgotten.is_empty(), "no test produces {forgotten:?}");
}
