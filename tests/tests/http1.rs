//! HTTP/1.1 through both proxies, byte by byte: reuse, chunks, trailers, 100-continue, HEAD, backpressure, CONNECT.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use std::io::{ErrorKind, Read, Write};
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use outrigger_e2e::{Backend, HANG, Pair, header, until};

fn loopback() -> IpAddr {
    [127, 0, 0, 1].into()
}

const OK: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

#[test]
fn connections_are_kept_and_used_again_on_every_hop() {
    let pair = Pair::start(Backend::http(loopback(), "v1"));
    let mut raw = pair.raw();
    for number in 0..20 {
        raw.send(format!("GET /{number} HTTP/1.1\r\nHost: app\r\n\r\n"));
        let (head, _) = raw.message();
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        assert_eq!(header(&head, "connection"), None, "{head}");
    }
    assert_eq!(pair.app.connections(), 1);
    let tls = pair.proxy.metrics().sum("outrigger_tls_connections_total", &[("direction", "inbound")]);
    assert!((tls - 1.0).abs() < f64::EPSILON, "{tls} connections between the proxies");

    // Pipelined: answered in order.
    raw.send("GET /a HTTP/1.1\r\nHost: app\r\n\r\nGET /b HTTP/1.1\r\nHost: app\r\nConnection: close\r\n\r\n");
    let (_, first) = raw.message();
    assert!(String::from_utf8_lossy(&first).contains("\"/a\""));
    let rest = raw.rest();
    assert!(rest.contains("\"/b\""), "{rest}");
    assert_eq!(header(&rest, "connection"), Some("close"), "as the client asked: {rest}");
    // The client's wish is of its own hop.
    assert_eq!(pair.app.connections(), 1);
    assert!(pair.app.requests().iter().all(|request| request.header("connection").is_none()));
}

#[test]
fn chunks_and_trailers_pass_both_ways() {
    let received = Arc::new(Mutex::new(String::new()));
    let recording = received.clone();
    let app = Backend::scripted(loopback(), move |mut raw| {
        while let Some(head) = raw.try_until("\r\n\r\n") {
            *recording.lock().unwrap() = head + &raw.until("\r\n0\r\n") + &raw.until("\r\n\r\n");
            let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n";
            raw.send(format!("{head}2\r\nuv\r\n3\r\nxyz\r\n0\r\nX-Sum: 42\r\n\r\n"));
        }
    });
    let pair = Pair::start(app);
    let request = |te: &str| {
        let mut raw = pair.raw();
        raw.send(format!("POST / HTTP/1.1\r\nHost: app\r\n{te}Transfer-Encoding: chunked\r\nTrailer: X-Check\r\n\r\n"));
        raw.send("3\r\nabc\r\n");
        raw.send("4\r\ndefg\r\n0\r\nX-Check: 7\r\n\r\n");
        let head = raw.head();
        let body = raw.until("\r\n0\r\n") + &raw.until("\r\n");
        (head, body.to_ascii_lowercase(), received.lock().unwrap().to_ascii_lowercase())
    };

    let (head, body, received) = request("TE: trailers\r\nConnection: TE\r\n");
    assert_eq!(header(&head, "transfer-encoding"), Some("chunked"), "{head}");
    assert!(body.contains("uv") && body.contains("xyz") && body.ends_with("x-sum: 42\r\n"), "{body}");
    assert_eq!(header(&received, "transfer-encoding"), Some("chunked"), "{received}");
    assert_eq!(header(&received, "content-length"), None, "{received}");
    assert!(received.contains("abc") && received.contains("defg"), "{received}");
    assert!(received.ends_with("x-check: 7\r\n\r\n"), "{received}");
    // The proxies say anew what they take themselves.
    assert_eq!(header(&received, "te"), Some("trailers"), "{received}");

    // Who does not say that it takes trailers gets none.
    let (head, body, received) = request("");
    assert_eq!(header(&head, "trailer"), None, "{head}");
    assert!(!body.contains("x-sum"), "{body}");
    assert_eq!(header(&received, "te"), None, "{received}");
}

#[test]
fn a_body_waits_for_100_continue() {
    // Says 100 only when it is told to, so that nothing can arrive by itself.
    let gate = Arc::new(AtomicUsize::new(0));
    let told = gate.clone();
    let app = Backend::scripted(loopback(), move |mut raw| {
        let head = raw.head();
        assert_eq!(header(&head, "expect"), Some("100-continue"), "{head}");
        assert!(raw.is_silent(), "the body came with the head");
        told.fetch_add(1, Ordering::SeqCst);
        raw.send("HTTP/1.1 100 Continue\r\n\r\n");
        if raw.try_exactly(5).as_deref() == Some(b"hello") {
            raw.send(OK);
        }
    });
    let pair = Pair::start(app);
    let mut raw = pair.raw();
    raw.send("POST / HTTP/1.1\r\nHost: app\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n");
    let first = raw.head();
    assert!(first.starts_with("HTTP/1.1 100 "), "{first}");
    assert_eq!(gate.load(Ordering::SeqCst), 1, "100 is the application's word");
    raw.send("hello");
    let (head, body) = raw.message();
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    assert_eq!(body, b"ok");
}

#[test]
fn a_final_status_without_100_is_the_answer_and_the_body_is_never_asked_for() {
    let app = Backend::scripted(loopback(), |mut raw| {
        raw.head();
        raw.send("HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\nConnection: close\r\n\r\nbig");
    });
    let pair = Pair::start(app);
    let mut raw = pair.raw();
    raw.send("POST / HTTP/1.1\r\nHost: app\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n");
    let head = raw.head();
    assert!(head.starts_with("HTTP/1.1 413 "), "{head}");
    assert_eq!(header(&head, "x-outrigger-reason"), None, "{head}");
    assert_eq!(raw.exactly(3), b"big");

    // curl, which waits for 100 too.
    let response = pair.call("/").args(["--http1.1", "-H", "Expect: 100-continue", "--data", "hello"]).send();
    assert_eq!((response.status, response.body.as_str()), (413, "big"));
}

#[test]
fn head_has_the_length_and_no_body() {
    let pair = Pair::start(Backend::scripted(loopback(), |mut raw| {
        while let Some(first) = raw.try_until("\r\n\r\n") {
            let body = if first.starts_with("HEAD") { "" } else { "0123456789" };
            raw.send(format!("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{body}"));
        }
    }));
    let mut raw = pair.raw();
    raw.send("HEAD / HTTP/1.1\r\nHost: app\r\n\r\n");
    let head = raw.head();
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    assert_eq!(header(&head, "content-length"), Some("10"), "{head}");
    // The next response begins right there.
    raw.send("GET / HTTP/1.1\r\nHost: app\r\n\r\n");
    let (head, body) = raw.message();
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    assert_eq!(body, b"0123456789");
    // And curl agrees.
    let response = pair.call("/").arg("--head").send();
    assert_eq!((response.status, response.header("content-length"), response.exit), (200, Some("10"), 0));
}

#[test]
fn connect_is_refused_and_a_200_without_body_length_ends_with_the_connection() {
    let pair = Pair::start(Backend::scripted(loopback(), |mut raw| {
        raw.head();
        raw.send("HTTP/1.0 200 OK\r\n\r\nuntil the end");
    }));
    let mut raw = pair.raw();
    raw.send("CONNECT app:80 HTTP/1.1\r\nHost: app:80\r\n\r\n");
    let answer = raw.head();
    assert!(answer.starts_with("HTTP/1.1 405 "), "{answer}");
    assert_eq!(header(&answer, "x-outrigger-reason"), Some("connect-method"));
    assert_eq!(pair.app.connections(), 0);

    assert_eq!(pair.call("/").send().body, "until the end");
}

/// A reader that does not read holds back the sender, with bounded memory in between.
#[test]
fn a_slow_reader_holds_back_the_sender() {
    const BODY: usize = 256 << 20;
    let written = Arc::new(AtomicUsize::new(0));
    let counting = written.clone();
    let app = Backend::scripted(loopback(), move |mut raw| {
        raw.head();
        raw.send(format!("HTTP/1.1 200 OK\r\nContent-Length: {BODY}\r\n\r\n"));
        let chunk = vec![b'x'; 64 << 10];
        while counting.load(Ordering::SeqCst) < BODY && raw.stream().write_all(&chunk).is_ok() {
            counting.fetch_add(chunk.len(), Ordering::SeqCst);
        }
    });
    let pair = Pair::start(app);
    let before = [&pair.web, &pair.proxy].map(|proxy| proxy.process.peak_memory());
    let mut raw = pair.raw();
    raw.send("GET / HTTP/1.1\r\nHost: app\r\n\r\n");
    raw.head();
    // Not reading: soon nothing moves any more.
    let mut last = 0;
    let mut same = 0;
    until("the sender is held back", || {
        let now = written.load(Ordering::SeqCst);
        same = if now > 0 && now == last { same + 1 } else { 0 };
        last = now;
        (same == 25).then_some(())
    });
    assert!(last < BODY / 2, "{last} bytes were taken from the application");
    for (proxy, before) in [&pair.web, &pair.proxy].into_iter().zip(before) {
        let grown = proxy.process.peak_memory().saturating_sub(before);
        assert!(grown < 16 << 20, "{} grew by {grown} bytes", proxy.name);
    }
    // And it goes on when it reads.
    until("the sender goes on", || {
        raw.exactly(1 << 20);
        (written.load(Ordering::SeqCst) > last).then_some(())
    });
}

#[test]
fn a_slow_application_holds_back_the_client() {
    let release = Arc::new(AtomicUsize::new(0));
    let reading = release.clone();
    let app = Backend::scripted(loopback(), move |mut raw| {
        let head = raw.head();
        let length: usize = header(&head, "content-length").unwrap().parse().unwrap();
        until("it may read", || (reading.load(Ordering::SeqCst) > 0).then_some(()));
        if raw.try_exactly(length).is_some() {
            raw.send(OK);
        }
    });
    let pair = Pair::start(app);
    let raw = pair.raw();
    let mut stream = raw.stream();
    const BODY: usize = 64 << 20;
    stream.write_all(format!("POST / HTTP/1.1\r\nHost: app\r\nContent-Length: {BODY}\r\n\r\n").as_bytes()).unwrap();
    stream.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
    let chunk = vec![b'y'; 64 << 10];
    let mut sent = 0;
    let blocked = loop {
        match stream.write(&chunk[..chunk.len().min(BODY - sent)]) {
            Ok(0) => break false,
            Ok(written) => sent += written,
            Err(error) => break matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut),
        }
    };
    assert!(blocked && sent < BODY / 2, "{sent} bytes were taken without a reader");
    let grown = pair.web.process.peak_memory();
    assert!(grown < 256 << 20, "{grown}");
    release.store(1, Ordering::SeqCst);
    stream.set_write_timeout(Some(HANG)).unwrap();
    while sent < BODY {
        sent += stream.write(&chunk[..chunk.len().min(BODY - sent)]).unwrap();
    }
    let mut answer = [0; 12];
    (&mut stream).read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200");
}
