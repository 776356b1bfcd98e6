//! How a proxy ends: in order, losing nothing, within its time; and how its workers share connections.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use nix::sys::signal::Signal;
use outrigger_e2e::{Backend, HANG, Mesh, Process, Proxy, Recorded, Reply, python, until};

const REVIEWS: &str = "
apiVersion: v1
kind: Service
metadata: {name: reviews, namespace: demo}
spec: {selector: {app: reviews}, ports: [{name: http, port: 80, targetPort: http}]}
";
/// A maximum that no test waits for: what depends on it hangs, and fails.
const NEVER: &str = "1h";

/// An application whose `/slow` is answered once the gate is open.
fn gated() -> (Backend, Arc<AtomicBool>) {
    let gate = Arc::new(AtomicBool::new(false));
    let open = gate.clone();
    let backend = Backend::http_with(IpAddr::from([127, 0, 0, 1]), "v1", move |request: &Recorded| {
        if request.path == "/slow" {
            until("the gate opens", || open.load(Ordering::SeqCst).then_some(()));
        }
        Reply::Answer { status: 200, headers: Vec::new(), body: b"whole".to_vec() }
    });
    (backend, gate)
}

/// A kept-alive connection of a client that has made one request.
fn kept_alive(address: SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(HANG)).unwrap();
    request(&mut stream);
    stream
}

fn request(stream: &mut TcpStream) {
    stream.write_all(b"GET / HTTP/1.1\r\nHost: reviews\r\n\r\n").unwrap();
    let mut reader = BufReader::new(stream);
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        assert!(reader.read_until(b'\n', &mut head).unwrap() > 0, "{}", String::from_utf8_lossy(&head));
    }
    assert!(head.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&head));
    let mut body = [0; 5];
    reader.read_exact(&mut body).unwrap();
}

/// Backends that the control plane tells callers of.
fn endpoints(mesh: &Mesh) -> usize {
    mesh.api("/api/v1/endpoints").as_array().map_or(0, Vec::len)
}

fn reaches(web: &Proxy) {
    until("web reaches reviews", || (web.call("reviews", "/").send().status == 200).then_some(()));
}

#[test]
fn what_runs_is_finished_and_idle_connections_hold_nothing_up() {
    let mesh = Mesh::start(REVIEWS);
    let (application, gate) = gated();
    let start = |name: &str| mesh.proxy(name).flag("--drain-max", NEVER);
    let reviews = start("reviews-0").labels("app=reviews").app(&application.address());
    let mut reviews = reviews.flag("--drain-min", "4s").start();
    let mut web = start("web-0").start();
    reaches(&web);
    let _idle = kept_alive(web.outbound());

    let slow = web.call("reviews", "/slow");
    let slow = thread::spawn(move || slow.send());
    until("the slow request is with the application", || {
        application.requests().iter().any(|request| request.path == "/slow").then_some(())
    });
    reviews.process.signal(Signal::SIGTERM);
    // First nobody is sent here any more; those who do not know yet are still let in.
    until("the registration is withdrawn", || (endpoints(&mesh) == 0).then_some(()));
    drop(TcpStream::connect(reviews.inbound()).expect("the inbound listener outlives the registration"));
    assert_eq!(reviews.admin("/ready").status, 503);
    until("the inbound listener is closed", || TcpStream::connect(reviews.inbound()).is_err().then_some(()));
    assert!(reviews.process.is_running(), "a request still runs");

    gate.store(true, Ordering::SeqCst);
    let answer = slow.join().unwrap();
    assert_eq!((answer.status, answer.body.as_str()), (200, "whole"), "{answer:?}");
    assert_eq!(reviews.process.ended().code(), Some(0));

    // The application of web has a connection open, on which nothing happens.
    assert_eq!(web.process.stop().code(), Some(0));
}

#[test]
fn a_long_stream_is_cut_at_the_maximum_with_a_reason() {
    let mesh = Mesh::start(&REVIEWS.replace("reviews", "chat"));
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut server = python("websocket_peer.py");
    server.args(["serve", &port.to_string()]);
    let _server = Process::serve("websocket-server", server, &mesh.path(""));
    let chat = mesh.proxy("chat-0").labels("app=chat").app(&format!("127.0.0.1:{port}"));
    let mut chat = chat.flag("--drain-max", "2s").start();
    let web = mesh.proxy("web-0").start();
    let url = format!("ws://{}/room", web.outbound());
    let dial = |name: &str| {
        let mut client = python("websocket_peer.py");
        client.args(["hold", &url, "chat"]);
        Process::start(name, client, &mesh.path(""))
    };
    until("the service is known", || (web.call("chat", "/").send().reason().is_none()).then_some(()));
    let mut client = dial("websocket-client");
    until("the WebSocket is open", || client.log().contains("open").then_some(()));

    assert_eq!(chat.process.stop().code(), Some(0));
    let log = chat.process.log();
    assert!(log.contains("the maximum time of draining is over"), "{log}");
    let line = log.lines().find(|line| line.contains("\"kind\":\"access\"") && line.contains("\"path\":\"/room\""));
    assert!(line.is_some_and(|line| line.contains("\"reason\":\"draining\"")), "{log}");
    until("the client is told", || client.log().contains("closed").then_some(()));
    assert!(client.ended().success());
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let mesh = Mesh::start(REVIEWS);
    let (application, gate) = gated();
    let reviews = mesh.proxy("reviews-0").labels("app=reviews").app(&application.address());
    let mut reviews = reviews.flag("--drain-max", NEVER).start();
    let web = mesh.proxy("web-0").start();
    reaches(&web);
    let slow = web.call("reviews", "/slow");
    let slow = thread::spawn(move || slow.send());
    until("the slow request is with the application", || {
        application.requests().iter().any(|request| request.path == "/slow").then_some(())
    });

    reviews.process.signal(Signal::SIGTERM);
    until("it drains", || reviews.process.log().contains("draining").then_some(()));
    reviews.process.signal(Signal::SIGTERM);
    assert_eq!(reviews.process.ended().code(), Some(0));
    assert!(reviews.process.log().contains("a second signal"));
    gate.store(true, Ordering::SeqCst);
    assert_ne!(slow.join().unwrap().status, 200);
}

#[test]
fn connections_are_shared_evenly_between_workers() {
    let mesh = Mesh::start(REVIEWS);
    let (application, _gate) = gated();
    let _reviews = mesh.proxy("reviews-0").labels("app=reviews").app(&application.address()).start();
    let web = mesh.proxy("web-0").flag("--workers", "2").start();
    reaches(&web);
    let workers = |of: &str| -> Vec<u64> {
        let stats = web.admin("/stats").json();
        stats["workers"].as_array().unwrap().iter().map(|worker| worker[of].as_u64().unwrap()).collect()
    };
    until("curl's connections are gone", || (workers("outbound") == [0, 0]).then_some(()));

    let mut connections: Vec<TcpStream> = (0..4).map(|_| kept_alive(web.outbound())).collect();
    assert_eq!(workers("outbound"), [2, 2]);
    let before = workers("requests");
    for _ in 0..5 {
        connections.iter_mut().for_each(request);
    }
    let made: Vec<u64> = workers("requests").iter().zip(before).map(|(now, before)| now - before).collect();
    assert_eq!(made, [10, 10]);
}
