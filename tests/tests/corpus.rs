//! Bytes as an attacker sends them (`tests/corpus`): what the application received, and what the next request gets.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::Path;

use outrigger_e2e::{Backend, HANG, Mesh, Recorded, until};
use serde::Deserialize;

const SERVICE: &str = "
apiVersion: v1
kind: Service
metadata: {name: app, namespace: demo}
spec:
  selector: {app: app}
  ports: [{name: http, port: 80, targetPort: http}]
";
const SECOND: &str = "GET /second HTTP/1.1\r\nHost: app.demo\r\nConnection: close\r\n\r\n";

/// As `tests/corpus/README.md` describes it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    name: String,
    #[serde(rename = "why")]
    _why: String,
    expect: Expect,
    status: Option<u16>,
    reason: Option<String>,
    #[serde(default)]
    closes: bool,
    #[serde(default)]
    half_close: bool,
    body: Option<String>,
    target: Option<String>,
    #[serde(default)]
    present: Vec<String>,
    #[serde(default)]
    absent: Vec<String>,
    #[serde(default)]
    never: Vec<String>,
    #[serde(default)]
    spoof: bool,
    requests: Option<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Expect {
    Refused,
    Forwarded,
    Broken,
    Either,
}

/// Sends the bytes, then a second request on the same connection, and reads until the proxy closes.
fn exchange(case: &Case, address: std::net::SocketAddr) -> String {
    let raw =
        fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(format!("{}.raw", case.name))).unwrap();
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(HANG)).unwrap();
    // The proxy may refuse and close before everything is written.
    let _ = stream.write_all(&raw);
    if case.half_close {
        let _ = stream.shutdown(Shutdown::Write);
    } else {
        let _ = stream.write_all(SECOND.as_bytes());
    }
    let (mut answer, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => answer.extend_from_slice(&buffer[..read]),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                panic!("{}: neither answered nor closed", case.name)
            }
            // Closed with our bytes unread.
            Err(_) => break,
        }
    }
    String::from_utf8_lossy(&answer).into_owned()
}

fn unambiguous(case: &Case, request: &Recorded) {
    let framing = |name: &str| request.headers.iter().filter(|(of, _)| of == name).count();
    assert!(framing("content-length") + framing("transfer-encoding") <= 1, "{}: {request:?}", case.name);
    assert_eq!(framing("host"), 1, "{}: {request:?}", case.name);
}

fn check(case: &Case, answer: &str, received: &[Recorded]) {
    let name = &case.name;
    let context = || format!("{name}: answered {answer:?}; the application received {received:?}");
    let (second, own): (Vec<_>, Vec<_>) = received.iter().cloned().partition(|request| request.path == "/second");
    for request in &own {
        unambiguous(case, request);
        assert!(!case.never.contains(&request.path), "{}", context());
    }
    let status: Option<u16> = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
    match case.expect {
        Expect::Refused => {
            assert!(own.is_empty(), "{}", context());
            assert!(answer.is_empty() || status.is_some_and(|status| status >= 400), "{}", context());
        }
        Expect::Broken => assert!(received.is_empty(), "{}", context()),
        Expect::Either => assert!(own.len() <= 1, "{}", context()),
        Expect::Forwarded => {
            assert_eq!(own.len(), case.requests.unwrap_or(1), "{}", context());
            assert_eq!(second.len(), usize::from(!case.closes), "{}", context());
        }
    }
    if let Some(wanted) = case.status {
        assert_eq!(status, Some(wanted), "{}", context());
    }
    if let Some(reason) = &case.reason {
        assert!(answer.to_ascii_lowercase().contains(&format!("x-outrigger-reason: {reason}\r\n")), "{}", context());
    }
    let Some(request) = own.first() else { return };
    if let Some(body) = &case.body {
        assert_eq!(String::from_utf8_lossy(&request.body), *body, "{}", context());
    }
    if let Some(target) = &case.target {
        assert_eq!(request.path, *target, "{}", context());
    }
    for header in &case.present {
        assert!(request.header(header).is_some(), "{header}: {}", context());
    }
    for header in &case.absent {
        assert!(request.header(header).is_none(), "{header}: {}", context());
    }
    if case.spoof {
        let xfcc = request.header("x-forwarded-client-cert").unwrap_or_default();
        assert!(xfcc.contains("ns/demo/sa/web") && !xfcc.contains("admin"), "{}", context());
        assert!(
            request.headers.iter().all(|(name, _)| !name.starts_with("x-outrigger-") && name != "l5d-client-id"),
            "{}",
            context()
        );
    }
}

#[test]
fn every_case_is_refused_or_one_unambiguous_request() {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus/cases.json")).unwrap();
    let cases: Vec<Case> = serde_json::from_str(&text).unwrap();
    assert!(cases.len() > 50);
    let mesh = Mesh::start(SERVICE);
    let application = Backend::http([127, 0, 0, 1].into(), "v1");
    let _app = mesh.proxy("app-0").labels("app=app").app(&application.address()).start();
    let web = mesh.proxy("web-0").start();
    until("web reaches app", || (web.call("app", "/").send().status == 200).then_some(()));

    let mut failed = BTreeMap::new();
    for case in &cases {
        let before = application.count();
        let outcome = std::panic::catch_unwind(|| {
            let answer = exchange(case, web.outbound());
            check(case, &answer, &application.requests()[before..]);
        });
        if outcome.is_err() {
            failed.insert(&case.name, ());
        }
        // And the mesh still works.
        assert_eq!(web.call("app", "/after").send().status, 200, "after {}", case.name);
    }
    assert!(failed.is_empty(), "{} of {} cases failed, see above: {:?}", failed.len(), cases.len(), failed.keys());
}
