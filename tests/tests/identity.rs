//! Who is let in, who is believed, and what happens when certificates change. The other side is OpenSSL's TLS.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use outrigger_e2e::{Authority, Backend, Curl, Lan, Leaf, Mesh, Process, Proxy, Shop, binary, python, succeed, until};
use serde_json::Value;

const HOUR: Option<Duration> = Some(Duration::from_secs(3600));

/// The SNI that callers of the application at this address send.
fn sni(application: &Backend) -> String {
    format!("p{}.reviews.demo.outrigger.internal", application.address().port())
}

fn peer(what: &str, address: SocketAddr, name: Option<&str>, leaf: Option<&Leaf>) -> Command {
    let mut command = python("tls_peer.py");
    command.args([what, &address.to_string()]).args(name);
    if let Some(leaf) = leaf {
        command.args([&leaf.cert, &leaf.key]);
    }
    command
}

/// One request to the proxy's inbound listener by a client with this certificate.
fn calls_in(proxy: &Proxy, application: &Backend, leaf: Option<&Leaf>) -> Value {
    let name = sni(application);
    serde_json::from_str(&succeed(&mut peer("call", proxy.inbound(), Some(&name), leaf))).unwrap()
}

fn lines(process: &Process) -> Vec<Value> {
    process.log().lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

#[test]
fn a_client_without_a_certificate_that_holds_is_refused_before_the_application_sees_a_byte() {
    let shop = Shop::start("");
    let directory = shop.mesh.path("");
    let (ours, foreign) = (Authority::of_state(&shop.mesh.path("control")), Authority::root("Outrigger root"));
    let leaf = |authority: &Authority, name: &str, life| authority.leaf(&directory, name, "demo/caller", life);

    for (what, leaf, alert) in [
        ("expired", Some(leaf(&ours, "expired", None)), "expired"),
        ("of a foreign root", Some(leaf(&foreign, "foreign", HOUR)), "unknown ca"),
        ("absent", None, "certificate required"),
    ] {
        let refused = calls_in(&shop.proxy1, &shop.v1, leaf.as_ref());
        assert_eq!(refused["status"], Value::Null, "a certificate that is {what} was accepted: {refused}");
        let error = refused["error"].as_str().unwrap().to_lowercase().replace('_', " ");
        assert!(error.contains(alert) || error.contains("closed"), "{what}: {refused}");
    }
    assert!(shop.v1.bytes().iter().all(Vec::is_empty), "the application was sent {:?}", shop.v1.bytes());
    let causes = shop.proxy1.metrics().by("outrigger_connections_refused_total", "cause");
    for cause in ["expired", "untrusted-root", "certificate"] {
        assert!(causes.get(cause).is_some_and(|count| *count >= 1.0), "{cause}: {causes:?}");
    }

    // The same client with a certificate that holds is served, as whom it proves to be.
    let good = leaf(&ours, "good", HOUR);
    assert_eq!(calls_in(&shop.proxy1, &shop.v1, Some(&good))["status"], 200);
    let arrived = shop.v1.requests().pop().unwrap();
    assert!(arrived.header("x-forwarded-client-cert").unwrap().contains("ns/demo/sa/caller"), "{arrived:?}");
}

#[test]
fn a_peer_may_not_call_http_opaque_to_get_around_what_is_done_to_http() {
    let mesh = Mesh::start(REVIEWS);
    let application = Backend::http([127, 0, 0, 1].into(), "v1");
    let declared = format!("{}/http1", application.address());
    let reviews = mesh.proxy("reviews-0").labels("app=reviews").app(&declared).start();
    let caller = Authority::of_state(&mesh.path("control")).leaf(&mesh.path(""), "caller", "demo/caller", HOUR);

    let name = sni(&application);
    let mut call = peer("call", reviews.inbound(), Some(&name), Some(&caller));
    let told: Value = serde_json::from_str(&succeed(call.env("ALPN", "outrigger-tcp"))).unwrap();

    assert_eq!(told["status"], 200, "{told}");
    let arrived = application.requests().pop().unwrap();
    let xfcc = arrived.header("x-forwarded-client-cert").unwrap();
    assert!(xfcc.contains("ns/demo/sa/caller") && !xfcc.contains("forged"), "{xfcc}");
}

#[test]
fn whoever_took_an_endpoint_s_address_is_sent_nothing_unless_he_proves_its_identity() {
    let mesh = Mesh::start_with(REVIEWS, &["--lease", "5m"]);
    let application = Backend::http([127, 0, 0, 1].into(), "v1");
    let mut reviews = mesh.proxy("reviews-0").labels("app=reviews").app(&application.address()).start();
    let web = mesh.proxy("web-0").start();
    until("web reaches reviews", || (web.call("reviews", "/").send().status == 200).then_some(()));
    let directory = mesh.path("");
    let (ours, foreign) = (Authority::of_state(&mesh.path("control")), Authority::root("Outrigger root"));

    // It dies, and somebody else listens where it did.
    reviews.process.kill();
    let rogue =
        |name: &str, leaf: &Leaf| Process::serve(name, peer("serve", reviews.inbound(), None, Some(leaf)), &directory);
    for (name, leaf) in [
        ("another-account", ours.leaf(&directory, "account", "demo/ratings", HOUR)),
        ("another-namespace", ours.leaf(&directory, "namespace", "ops/reviews", HOUR)),
        ("expired", ours.leaf(&directory, "expired", "demo/reviews", None)),
        ("foreign", foreign.leaf(&directory, "foreign", "demo/reviews", HOUR)),
    ] {
        let rogue = rogue(name, &leaf);
        let refused = web.call("reviews", "/secret").send();
        assert_eq!((refused.status, refused.reason()), (503, Some("peer-identity")), "{name}: {refused:?}");
        until("the rogue saw the connection", || (!lines(&rogue).is_empty()).then_some(()));
        for line in lines(&rogue) {
            assert_eq!(line["bytes"], 0, "{name} was sent something: {line}");
        }
    }
    // With the right identity it is an endpoint like any other: the test's own TLS is not what fails above.
    let _right = rogue("right", &ours.leaf(&directory, "right", "demo/reviews", HOUR));
    let answer =
        until("the right identity answers", || Some(web.call("reviews", "/").send()).filter(|it| it.status == 200));
    assert_eq!(answer.header("x-backend"), Some("rogue"));
}

const REVIEWS: &str = "
apiVersion: v1
kind: Service
metadata: {name: reviews, namespace: demo}
spec: {selector: {app: reviews}, ports: [{name: http, port: 80, targetPort: http}]}
";

#[test]
fn sessions_are_resumed_and_the_certificate_is_judged_again() {
    let shop = Shop::start("");
    let ours = Authority::of_state(&shop.mesh.path("control"));
    // Its life ends soon, its session could go on for an hour.
    let short = ours.leaf(&shop.mesh.path(""), "short", "demo/caller", Some(Duration::from_secs(4)));
    let text = succeed(&mut peer("resume", shop.proxy1.inbound(), Some(&sni(&shop.v1)), Some(&short)));
    let answers: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let (served, refused): (Vec<_>, Vec<_>) = answers.iter().partition(|answer| answer["status"] == 200);
    let last = refused.last().expect("a refusal");

    assert!(served.len() >= 2, "{text}");
    assert_eq!(served[0]["resumed"], false);
    assert!(served[1..].iter().all(|answer| answer["resumed"] == true), "sessions are not resumed: {text}");
    // Resumed by OpenSSL, and refused all the same: a resumed handshake by itself verifies no certificate.
    assert_eq!(last["resumed"], true, "{text}");
    let metrics = shop.proxy1.metrics();
    assert!(metrics.by("outrigger_connections_refused_total", "cause").contains_key("expired"), "{metrics:?}");
    assert!(metrics.sum("outrigger_tls_resumed_total", &[("direction", "inbound")]) >= 1.0, "{metrics:?}");
}

#[test]
fn proxies_resume_sessions_with_each_other() {
    // A connection that is idle is closed at once: the next call dials again.
    let shop = Shop::start(
        "apiVersion: outrigger.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {name: idle, namespace: demo}\n\
         spec: {targetRefs: [{group: '', kind: Service, name: reviews-v1}], timeouts: {idle: 10ms}}\n",
    );
    until("web resumes a session", || {
        assert_eq!(shop.web.call("reviews-v1", "/").send().status, 200);
        (shop.proxy1.metrics().sum("outrigger_tls_resumed_total", &[("direction", "inbound")]) >= 2.0).then_some(())
    });
}

#[test]
fn modes_per_port_and_a_policy_that_cannot_be_read_closes() {
    let lan = Lan::new(2);
    let mesh = Mesh::start_on(lan.host(1), REVIEWS);
    let serve = |port: u16, name: &str| {
        let text = name.to_owned();
        Backend::on(lan.host(2).listen(SocketAddr::from(([0, 0, 0, 0], port))), name, move |_| {
            outrigger_e2e::Reply::Answer { status: 200, headers: Vec::new(), body: text.clone().into_bytes() }
        })
    };
    let (_main, _probe) = (serve(8080, "main"), serve(8081, "probe"));
    let reviews = mesh.proxy("reviews-0").labels("app=reviews").app(&"127.0.0.1:8080").app(&"probe=127.0.0.1:8081");
    let reviews = reviews.on(lan.host(2)).start();
    reviews.intercept();
    let plain = |port: u16| Curl::from(lan.host(1), &format!("http://{}:{port}/", lan.host(2).ip())).send();
    until("plaintext is served by default", || (plain(8080).status == 200 && plain(8081).status == 200).then_some(()));

    let policy = |spec: &str| {
        format!(
            "apiVersion: outrigger.dev/v1alpha1\nkind: MtlsPolicy\nmetadata: {{name: m, namespace: demo}}\n\
             spec: {{selector: {{matchLabels: {{app: reviews}}}}, {spec}}}\n"
        )
    };
    mesh.write("policy.yaml", &policy("mode: Strict, ports: {'8081': Permissive}"));
    let refused = until("the policy applies", || Some(plain(8080)).filter(|response| response.status != 200));
    assert_eq!((refused.status, refused.reason()), (403, Some("mtls-required")));
    assert_eq!(plain(8081).status, 200);

    mesh.remove("policy.yaml");
    until("plaintext is served again", || (plain(8080).status == 200).then_some(()));
    // There is no last good version of another name: what it selects is closed to plaintext.
    mesh.write("policy.yaml", &policy("mode: Strikt").replace("name: m,", "name: n,"));
    let closed = until("it is closed", || Some(plain(8080)).filter(|response| response.status != 200));
    assert_eq!(closed.reason(), Some("mtls-required"));
    assert_eq!(plain(8081).reason(), Some("mtls-required"));
}

/// Requests one after the other on one connection, until told to stop; what failed, and how many there were.
fn steady(proxy: &Proxy, stop: &std::sync::atomic::AtomicBool) -> (Vec<String>, usize) {
    let mut stream = TcpStream::connect(proxy.outbound()).unwrap();
    stream.set_read_timeout(Some(outrigger_e2e::HANG)).unwrap();
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let (mut failed, mut count) = (Vec::new(), 0);
    while !stop.load(std::sync::atomic::Ordering::SeqCst) {
        stream.write_all(b"GET / HTTP/1.1\r\nHost: reviews\r\n\r\n").unwrap();
        let (mut status, mut length) = (String::new(), 0);
        reader.read_line(&mut status).unwrap();
        loop {
            let mut line = String::new();
            assert!(reader.read_line(&mut line).unwrap() > 0, "the connection was closed after {count} requests");
            let line = line.trim().to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            if let Some(text) = line.strip_prefix("content-length:") {
                length = text.trim().parse().unwrap();
            }
        }
        std::io::copy(&mut std::io::Read::take(&mut reader, length), &mut std::io::sink()).unwrap();
        if !status.starts_with("HTTP/1.1 200") {
            failed.push(status);
        }
        count += 1;
    }
    (failed, count)
}

#[test]
fn certificates_are_renewed_with_no_connection_dropped() {
    let shop = Shop::start(
        "apiVersion: outrigger.dev/v1alpha1\nkind: MeshConfig\nmetadata: {name: default}\n\
         spec: {certificates: {lifetime: 12s}, mtls: {mode: Strict}}\n",
    );
    let serials =
        || [&shop.web, &shop.proxy1, &shop.proxy2].map(|proxy| proxy.admin("/certs").json()["serial"].to_string());
    let stop = std::sync::atomic::AtomicBool::new(false);
    let mut socket = websocket(&shop);
    thread::scope(|scope| {
        let loads: Vec<_> = (0..2).map(|_| scope.spawn(|| steady(&shop.web, &stop))).collect();
        let rotated = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let mut seen: [BTreeSet<String>; 3] = Default::default();
            until("each certificate was replaced twice", || {
                for (seen, serial) in seen.iter_mut().zip(serials()) {
                    seen.insert(serial);
                }
                socket.round();
                seen.iter().all(|seen| seen.len() >= 3).then_some(())
            });
        }));
        stop.store(true, std::sync::atomic::Ordering::SeqCst);
        for load in loads {
            let (failed, count) = load.join().unwrap();
            assert!(count > 50, "{count} requests are no load");
            assert!(failed.is_empty(), "{} of {count} failed: {failed:?}", failed.len());
        }
        rotated.unwrap();
    });
    // What the peers saw was mTLS throughout.
    let peers = shop.proxy1.metrics().by("outrigger_peer_requests_total", "peer");
    assert_eq!(peers.keys().map(String::as_str).collect::<Vec<_>>(), ["spiffe://cluster.local/ns/demo/sa/web"]);
}

/// A WebSocket client that stays on one connection and sends one message per line it is given.
struct Socket {
    _server: Process,
    _chat: Proxy,
    client: std::process::Child,
    answers: BufReader<std::process::ChildStdout>,
}

fn websocket(shop: &Shop) -> Socket {
    shop.mesh.write("chat.yaml", &REVIEWS.replace("reviews", "chat"));
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut server = python("websocket_peer.py");
    server.args(["serve", &port.to_string()]);
    let server = Process::serve("websocket", server, &shop.mesh.path(""));
    let chat = shop.mesh.proxy("chat-0").labels("app=chat").app(&format!("127.0.0.1:{port}")).start();
    let url = format!("ws://{}/", shop.web.outbound());
    until("chat is reached", || (shop.web.call("chat", "/").send().status == 426).then_some(()));
    let mut client = python("websocket_peer.py");
    let mut client = client.args(["lines", &url, "chat"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let answers = BufReader::new(client.stdout.take().unwrap());
    Socket { _server: server, _chat: chat, client, answers }
}

impl Socket {
    /// A message there and back.
    fn round(&mut self) {
        self.client.stdin.as_mut().unwrap().write_all(b"hello\n").unwrap();
        let mut answer = String::new();
        self.answers.read_line(&mut answer).unwrap();
        assert_eq!(answer, "hello\n", "the WebSocket connection ended");
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = self.client.kill();
        let _ = self.client.wait();
    }
}

#[test]
fn an_authority_of_one_s_own_with_an_intermediate_signs() {
    let directory = tempfile::tempdir().unwrap();
    let root = Authority::root("Our company");
    let files = root.intermediate("Our mesh").write(directory.path(), "mesh");
    let flags = ["--ca-cert", files.cert.to_str().unwrap(), "--ca-key", files.key.to_str().unwrap()];
    let mesh = Mesh::start_with(REVIEWS, &flags);
    let application = Backend::http([127, 0, 0, 1].into(), "v1");
    let reviews = mesh.proxy("reviews-0").labels("app=reviews").app(&application.address()).start();
    let web = mesh.proxy("web-0").start();
    until("web reaches reviews", || (web.call("reviews", "/").send().status == 200).then_some(()));
    assert!(
        reviews
            .metrics()
            .by("outrigger_tls_connections_total", "peer")
            .contains_key("spiffe://cluster.local/ns/demo/sa/web")
    );

    // OpenSSL agrees that the root alone, through the intermediate that is sent along, vouches for the workload.
    let root = root.write(directory.path(), "root");
    let chain = mesh.path("web-0/state/cert.pem");
    let mut verify = Command::new("openssl");
    verify.args(["verify", "-CAfile"]).arg(&root.cert).arg("-untrusted").args([&chain, &chain]);
    assert!(succeed(&mut verify).contains("OK"));
    assert!(!mesh.path("control/root-key.pem").exists(), "it made a root of its own all the same");

    // Files that do not belong together end the start with the remedy.
    let mut wrong = Command::new(binary("outrigger-control"));
    wrong.arg("--config").arg(mesh.path("config")).arg("--state").arg(directory.path().join("state"));
    wrong.arg("--ca-cert").arg(&files.cert).arg("--ca-key").arg(&root.key);
    let wrong = wrong.output().unwrap();
    assert!(!wrong.status.success());
    let said = String::from_utf8_lossy(&wrong.stderr);
    assert!(said.contains("put the issuing certificate first"), "{said}");
}

#[test]
fn a_restart_needs_no_token_while_the_saved_certificate_is_valid() {
    let mut shop = Shop::start("");
    let serial = shop.web.admin("/certs").json()["serial"].clone();
    std::fs::write(shop.mesh.path("web-0/token"), "expired").unwrap();
    shop.web.process.stop();
    shop.web.restart();

    assert_eq!(shop.web.admin("/certs").json()["serial"], serial);
    until("web reaches reviews", || (shop.get("/").status == 200).then_some(()));
}
