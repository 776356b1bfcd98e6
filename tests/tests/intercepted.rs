//! What interception carries, and what it never forwards: one workload with several ports, behind nftables rules.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};

use outrigger_e2e::{Backend, Curl, HANG, Host, Lan, Mesh, Process, Proxy, Recorded, Reply, binary, python, until};

/// One Service of one workload; the port `mail` declares no protocol.
const REVIEWS: &str = "
apiVersion: v1
kind: Service
metadata: {name: reviews, namespace: demo}
spec:
  clusterIP: 10.96.0.10
  clusterIPs: [10.96.0.10, 'fd96::10']
  selector: {app: reviews}
  ports:
  - {name: http, port: 80, targetPort: http}
  - {name: grpc, port: 81, targetPort: grpc}
  - {name: echo, port: 82, targetPort: echo}
  - {name: mail, port: 83, targetPort: mail}
  - {name: chat, port: 84, targetPort: chat}
";
const ROUTE: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: reviews, namespace: demo}
spec:
  parentRefs: [{group: '', kind: Service, name: reviews}]
  rules:
  - matches: [{path: {type: PathPrefix, value: /old}}]
    filters: [{type: RequestRedirect, requestRedirect: {statusCode: 301, hostname: new.example}}]
  - backendRefs: [{name: reviews, port: 80}]
";
const HTTP: u16 = 8080;
const GRPC: u16 = 9000;
const ECHO: u16 = 5432;
const MAIL: u16 = 2525;
const CHAT: u16 = 9001;
/// A server of the application's host that no --app declares.
const UNDECLARED: u16 = 7070;
const GREETING: &[u8] = b"220 ready\r\n";
const WEB: &str = "spiffe://cluster.local/ns/demo/sa/web";

/// web on host 1, reviews on host 2, the control plane on host 3, which is not part of the mesh itself.
struct Site {
    web: Proxy,
    reviews: Proxy,
    http: Backend,
    undeclared: Backend,
    mesh: Mesh,
    lan: Lan,
    _servers: Vec<Backend>,
}

fn http(host: &Host, port: u16) -> Backend {
    let reply = |request: &Recorded| {
        let body = format!("{} {}", request.method, request.path).into_bytes();
        Reply::Answer { status: 200, headers: Vec::new(), body }
    };
    Backend::on(host.listen(any(port)), "reviews", reply)
}

fn any(port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::from([0; 16]), port)
}

fn site(config: &str, flags: &[(&str, &str)]) -> Site {
    let lan = Lan::new(3);
    let mesh = Mesh::start_on(lan.host(3), &format!("{REVIEWS}---\n{config}"));
    let host = lan.host(2);
    let (http, undeclared) = (http(host, HTTP), http(host, UNDECLARED));
    let servers = vec![Backend::echo(host.listen(any(ECHO)), b""), Backend::echo(host.listen(any(MAIL)), GREETING)];
    let mut reviews = mesh.proxy("reviews-0").labels("app=reviews").on(host);
    for app in [
        format!("127.0.0.1:{HTTP}"),
        format!("grpc=127.0.0.1:{GRPC}/h2"),
        format!("echo=127.0.0.1:{ECHO}/tcp"),
        format!("mail=127.0.0.1:{MAIL}"),
        format!("chat=127.0.0.1:{CHAT}"),
    ] {
        reviews = reviews.app(&app);
    }
    for (name, value) in flags {
        reviews = reviews.flag(name, value);
    }
    let reviews = reviews.start();
    let web = mesh.proxy("web-0").on(lan.host(1)).start();
    for proxy in [&reviews, &web] {
        proxy.intercept();
    }
    let site = Site { web, reviews, http, undeclared, mesh, lan, _servers: servers };
    until("web reaches reviews", || (site.curl(1, "http://10.96.0.10/").send().status == 200).then_some(()));
    site
}

impl Site {
    fn curl(&self, host: usize, url: &str) -> Curl {
        Curl::from(self.lan.host(host), url).args(["--max-time", "10"])
    }

    fn reviews_at(&self, port: u16, path: &str) -> String {
        format!("http://{}:{port}{path}", self.lan.host(2).ip())
    }

    /// Connections of web that reviews has proven.
    fn proven(&self) -> f64 {
        self.reviews.metrics().by("outrigger_tls_connections_total", "peer").get(WEB).copied().unwrap_or_default()
    }

    fn refused(&self, cause: &str) -> f64 {
        self.reviews.metrics().sum("outrigger_connections_refused_total", &[("cause", cause)])
    }

    fn connect(&self, host: usize, address: SocketAddr) -> TcpStream {
        let stream = self.lan.host(host).connect(address).unwrap();
        stream.set_read_timeout(Some(HANG)).unwrap();
        stream
    }

    /// A script of `tests/python` on a host, to its end.
    fn python(&self, host: usize, script: &str, args: &[&str]) -> std::process::Output {
        self.lan.host(host).wrap(python(script).args(args)).output().unwrap()
    }

    fn serve(&self, script: &str, port: u16) -> Process {
        let command = self.lan.host(2).wrap(python(script).args(["serve", &port.to_string()]));
        Process::serve(script, command, &self.mesh.path(""))
    }
}

fn increased(before: f64, now: f64) -> bool {
    now - before > 0.5
}

#[test]
fn grpc_and_websocket_by_service_address() {
    let site = site("", &[]);
    let _grpc = site.serve("grpc_peer.py", GRPC);
    let _chat = site.serve("websocket_peer.py", CHAT);
    let before = site.proven();
    until("grpcio's unary call succeeds", || {
        let ran = site.python(1, "grpc_peer.py", &["call", "10.96.0.10:81", "reviews", "unary"]);
        ran.status.success().then_some(())
    });
    for case in ["stream", "error", "deadline"] {
        let ran = site.python(1, "grpc_peer.py", &["call", "10.96.0.10:81", "reviews", case]);
        assert!(ran.status.success(), "{case}: {}", String::from_utf8_lossy(&ran.stderr));
    }
    assert!(increased(before, site.proven()));

    until("the WebSocket client succeeds", || {
        let ran = site.python(1, "websocket_peer.py", &["call", "ws://10.96.0.10:84/chat?room=1", "10.96.0.10"]);
        ran.status.success().then_some(())
    });
}

#[test]
fn tcp_is_carried_over_mtls_and_servers_may_speak_first() {
    let site = site("", &[]);
    let (before, streams) =
        (site.proven(), || site.reviews.metrics().sum("outrigger_tcp_open_connections", &[("direction", "inbound")]));

    let mut echo = site.connect(1, "10.96.0.10:82".parse().unwrap());
    echo.write_all(b"\0\x01hello").unwrap();
    let mut answer = [0; 7];
    echo.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"\0\x01hello");
    assert!(increased(before, site.proven()));
    assert!(increased(0.0, streams()), "the receiving proxy carries it as an opaque stream");

    let learned = || -> u64 {
        let stats = site.web.admin("/stats").json();
        stats["workers"].as_array().unwrap().iter().map(|worker| worker["serverFirst"].as_u64().unwrap()).sum()
    };
    assert_eq!(learned(), 0, "this client spoke first");
    // By pod address as well as by the Service's; the second time the caller knows who speaks first.
    for address in [("10.96.0.10", 83), ("10.96.0.10", 83), ("10.77.0.2", MAIL)] {
        let before = site.proven();
        let address = SocketAddr::new(address.0.parse().unwrap(), address.1);
        let mut mail = site.connect(1, address);
        let mut greeting = [0; GREETING.len()];
        mail.read_exact(&mut greeting).unwrap();
        assert_eq!(greeting, GREETING, "{address}");
        mail.write_all(b"QUIT").unwrap();
        let mut answer = [0; 4];
        mail.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"QUIT");
        assert!(increased(before, site.proven()), "{address}");
    }
    assert!(learned() >= 2, "both addresses of the server that speaks first");
}

#[test]
fn a_pod_address_bypasses_routes_but_has_mtls() {
    let site = site(ROUTE, &[("--advertise", "fd77::2")]);
    until("the route applies by the Service's address", || {
        (site.curl(1, "http://10.96.0.10/old").send().status == 301).then_some(())
    });
    assert_eq!(site.curl(1, "http://[fd96::10]/old").send().status, 301);

    let by_pod = site.curl(1, &format!("http://[fd77::2]:{HTTP}/old")).send();
    assert_eq!((by_pod.status, by_pod.body.as_str()), (200, "GET /old"));
    let arrived = site.http.requests().pop().unwrap();
    assert!(arrived.header("x-forwarded-client-cert").is_some_and(|value| value.contains(WEB)), "{arrived:?}");
}

#[test]
fn own_and_undeclared_ports_are_never_forwarded_to() {
    let site = site("", &[]);
    let (arrived, undeclared) = (site.http.count(), site.refused("undeclared-port"));
    // From a host without a mesh, from an application with one, and from the application beside the proxy.
    for from in [3, 1, 2] {
        for port in [15000, 15001, 15006] {
            let before = site.refused("own-port");
            let response = site.curl(from, &site.reviews_at(port, "/")).send();
            assert_ne!(response.status, 200, "host {from} to port {port}: {response:?}");
            if from == 3 {
                assert!(increased(before, site.refused("own-port")), "port {port}");
            }
        }
    }
    for from in [3, 1] {
        let response = site.curl(from, &site.reviews_at(UNDECLARED, "/")).send();
        assert_ne!(response.status, 200, "{response:?}");
    }
    assert!(increased(undeclared, site.refused("undeclared-port")));
    assert_eq!((site.http.count(), site.undeclared.count()), (arrived, 0));

    // Both declared ports are served to a caller without a mesh.
    assert_eq!(site.curl(3, &site.reviews_at(HTTP, "/")).send().status, 200);
    let mut mail = site.connect(3, SocketAddr::new(site.lan.host(2).ip(), MAIL));
    let mut greeting = [0; GREETING.len()];
    mail.read_exact(&mut greeting).unwrap();
    assert_eq!(greeting, GREETING);

    // Excluded, the port is reached as if there were no mesh.
    let exclude = format!("{} intercept install --exclude-inbound {UNDECLARED}", binary("outrigger").display());
    site.lan.host(2).run(&exclude);
    assert_eq!(site.curl(3, &site.reviews_at(UNDECLARED, "/")).send().status, 200);
}

#[test]
fn a_flood_of_refused_connections_is_a_few_lines() {
    const DIALS: usize = 200;
    let site = site("", &[]);
    let before = site.refused("own-port");
    let address = SocketAddr::new(site.lan.host(2).ip(), 15006);
    for _ in 0..DIALS {
        // Refused in one way or another.
        let _ = site.connect(3, address).read(&mut [0]);
    }
    let refused = site.refused("own-port") - before;
    assert!(refused > DIALS as f64 - 0.5, "{refused}");
    let log = site.reviews.process.log();
    let lines = log.lines().filter(|line| line.contains("inbound connection refused")).count();
    assert!(0 < lines && lines < DIALS / 2, "{lines} lines");
}

#[test]
fn plaintext_to_a_strict_workload_is_refused_and_mtls_is_not() {
    let site = site("", &[]);
    assert_eq!(site.curl(3, &site.reviews_at(HTTP, "/")).send().status, 200, "Permissive is the default");
    site.mesh.write(
        "strict.yaml",
        "apiVersion: outrigger.dev/v1alpha1\nkind: MtlsPolicy\nmetadata: {name: strict, namespace: demo}\n\
         spec: {mode: Strict}\n",
    );
    let refused = until("the policy applies", || {
        Some(site.curl(3, &site.reviews_at(HTTP, "/")).send()).filter(|response| response.status != 200)
    });
    assert_eq!(refused.reason(), Some("mtls-required"), "{refused:?}");
    let before = site.refused("mtls-required");
    let mut echo = site.connect(3, SocketAddr::new(site.lan.host(2).ip(), ECHO));
    let _ = echo.write_all(b"\0hello");
    assert!(!matches!(echo.read(&mut [0]), Ok(1)), "a byte came back");
    assert!(increased(before, site.refused("mtls-required")));
    assert_eq!(site.curl(1, "http://10.96.0.10/").send().status, 200);
}

#[test]
fn destinations_outside_are_passed_through_or_refused() {
    let site = site("", &[]);
    // Host 3 has no proxy, and no resource names it.
    let outside = http(site.lan.host(3), HTTP);
    let url = format!("http://{}:{HTTP}/outside", site.lan.host(3).ip());
    assert_eq!(site.curl(1, &url).send().status, 200);
    let arrived = outside.count();
    site.mesh.write(
        "mesh-config.yaml",
        "apiVersion: outrigger.dev/v1alpha1\nkind: MeshConfig\nmetadata: {name: default}\n\
         spec: {outboundTraffic: RegistryOnly}\n",
    );
    let refused = until("only the registry's destinations are reached", || {
        Some(site.curl(1, &url).send()).filter(|response| response.status != 200)
    });
    assert_eq!(refused.reason(), Some("unknown-service"), "{refused:?}");
    let count = outside.count();
    assert_ne!(site.curl(1, &url).send().status, 200);
    assert_eq!(outside.count(), count);
    assert!(count >= arrived);
    assert_eq!(site.curl(1, "http://10.96.0.10/").send().status, 200);
}

#[test]
fn the_proxys_user_is_exempt() {
    let site = site("", &[]);
    let outbound = || site.web.metrics().sum("outrigger_requests_total", &[("direction", "outbound")]);
    let before = outbound();
    let url = site.reviews_at(HTTP, "/own");
    let host = site.lan.host(1);
    let text = host.run(&format!("setpriv --reuid=1337 --clear-groups curl --silent --max-time 10 {url}"));
    assert_eq!(text, "GET /own");
    assert!(!increased(before, outbound()), "its connection went past the proxy");
    assert_eq!(site.http.requests().pop().unwrap().header("x-forwarded-client-cert"), None);

    assert_eq!(site.curl(1, &url).send().status, 200);
    assert!(increased(before, outbound()), "another user's did not");
}
