//! Who may open opaque connections: authorization without a request to look at.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use std::net::SocketAddr;

use outrigger_e2e::{Backend, Host, Lan, Mesh, Proxy, Raw, until};

struct Database {
    application: Backend,
    database: Proxy,
    _web: Proxy,
    mesh: Mesh,
    lan: Lan,
}

/// `database` on host 2 greets whoever gets through; web on host 1 has a sidecar, host 3 has none.
fn start() -> Database {
    let lan = Lan::new(3);
    let mesh = Mesh::start_on(
        lan.host(3),
        "apiVersion: v1\nkind: Service\nmetadata: {name: database, namespace: demo}\n\
         spec: {selector: {app: database}, clusterIP: 10.96.0.10, ports: [{name: tcp, port: 80, targetPort: tcp}]}\n",
    );
    let application = Backend::echo(lan.host(2).listen("[::]:5432".parse().unwrap()), b"hello\r\n");
    let app = "tcp=127.0.0.1:5432/tcp";
    let database = mesh.proxy("database-0").labels("app=database").app(&app).on(lan.host(2)).start();
    let web = mesh.proxy("web-0").on(lan.host(1)).start();
    database.intercept();
    web.intercept();
    Database { application, database, _web: web, mesh, lan }
}

impl Database {
    /// From web, by the service's address, over mTLS.
    fn web_may(&self) -> bool {
        greeted(self.lan.host(1), "10.96.0.10:80".parse().unwrap())
    }

    /// From a host without a sidecar, by the instance's address, in plaintext.
    fn stranger_may(&self) -> bool {
        greeted(self.lan.host(3), SocketAddr::new(self.lan.host(2).ip(), 5432))
    }

    fn policies(&self, policies: &[(&str, &str)]) {
        let text = policies.iter().enumerate().map(|(number, (action, rules))| {
            format!(
                "apiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\n\
                 metadata: {{name: policy-{number}, namespace: demo}}\n\
                 spec: {{selector: {{matchLabels: {{app: database}}}}, action: {action}, rules: [{rules}]}}\n---\n"
            )
        });
        self.mesh.write("policies.yaml", &text.collect::<String>());
    }
}

fn greeted(host: &Host, address: SocketAddr) -> bool {
    host.connect(address).is_ok_and(|stream| Raw::new(stream).try_exactly(7).is_some())
}

const WEB: &str = "from: [{principals: ['spiffe://cluster.local/ns/demo/sa/web']}]";

#[test]
fn connections_are_allowed_and_denied_by_who_opens_them() {
    let mesh = start();
    until("everyone may", || (mesh.web_may() && mesh.stranger_may()).then_some(()));

    // An Allow for web: nobody else.
    mesh.policies(&[("Allow", &format!("{{{WEB}}}"))]);
    until("a stranger may not", || (!mesh.stranger_may()).then_some(()));
    assert!(mesh.web_may());

    // An Allow with HTTP fields never matches what is no HTTP.
    mesh.policies(&[("Allow", &format!("{{{WEB}, to: [{{methods: [GET]}}]}}"))]);
    until("web may not", || (!mesh.web_may()).then_some(()));
    let before = mesh.application.connections();
    assert!(!mesh.web_may() && !mesh.stranger_may());
    assert_eq!(mesh.application.connections(), before, "the application saw none of it");
    let denied = mesh.database.metrics();
    assert!(denied.sum("outrigger_tcp_connections_total", &[("reason", "authorization-denied")]) >= 2.0);

    // A Deny ignores its HTTP fields: rather too much than too little.
    mesh.policies(&[("Deny", &format!("{{{WEB}, to: [{{methods: [DELETE]}}]}}"))]);
    until("a stranger may again", || mesh.stranger_may().then_some(()));
    assert!(!mesh.web_may());

    // Ports are of the connection.
    mesh.policies(&[("Allow", &format!("{{{WEB}, to: [{{ports: [5432]}}]}}"))]);
    until("web may", || mesh.web_may().then_some(()));
    assert!(!mesh.stranger_may());
}

#[test]
fn a_strict_port_takes_no_plaintext() {
    let mesh = start();
    until("everyone may", || (mesh.web_may() && mesh.stranger_may()).then_some(()));
    mesh.mesh.write(
        "strict.yaml",
        "apiVersion: outrigger.dev/v1alpha1\nkind: MtlsPolicy\nmetadata: {name: strict, namespace: demo}\n\
         spec: {selector: {matchLabels: {app: database}}, mode: Strict}\n",
    );
    until("a stranger may not", || (!mesh.stranger_may()).then_some(()));
    assert!(mesh.web_may());
}

#[test]
fn a_tcp_filter_tells_protocols_apart_and_closes_what_is_not_allowed() {
    let setup = start();
    std::fs::copy(outrigger_e2e::example_filter("sniff"), setup.mesh.path("config/sniff.wasm")).unwrap();
    setup.mesh.write(
        "filters.yaml",
        "apiVersion: outrigger.dev/v1alpha1\nkind: WasmFilter\nmetadata: {name: sniff, namespace: demo}\n\
         spec:\n  selector: {matchLabels: {app: database}}\n  protocol: Tcp\n  module: {file: sniff.wasm}\n  \
         configuration: {allow: [redis]}\n",
    );
    let talk = |said: &[u8]| {
        let stream = setup.lan.host(1).connect("10.96.0.10:80".parse().unwrap()).unwrap();
        let mut raw = Raw::new(stream);
        raw.send(said);
        let greeting = raw.try_exactly(7)?;
        Some((greeting, raw.try_exactly(said.len())?))
    };
    until("the filter closes what is not redis", || talk(b"GET / HTTP/1.1\r\n\r\n").is_none().then_some(()));
    let (greeting, echo) = talk(b"*1\r\n$4\r\nPING\r\n").expect("redis is allowed");
    assert_eq!((greeting.as_slice(), echo.as_slice()), (b"hello\r\n".as_slice(), b"*1\r\n$4\r\nPING\r\n".as_slice()));
    let metrics = setup.database.metrics();
    let counted =
        |name: &str| metrics.sum("outrigger_filter_counter_total", &[("filter", "demo/sniff"), ("name", name)]);
    assert!(counted("sniffed_redis") > 0.0 && counted("sniffed_http1") > 0.0);
    assert!(
        metrics.sum("outrigger_tcp_connections_total", &[("direction", "inbound"), ("reason", "filter-response")])
            > 0.0
    );
    setup.mesh.write("filters.yaml", "");
    until("without the filter anything passes again", || talk(b"GET / HTTP/1.1\r\n\r\n").map(drop));
}
