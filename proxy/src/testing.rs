//! Proxies in a test: real sockets, configuration given by hand, everything on one thread.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use clap::Parser;
use outrigger_core::chain::Bundle;
use outrigger_core::key::Key;
use outrigger_core::link;
use outrigger_proto::mesh as wire;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, SanType};
use rustls_pki_types::PrivateKeyDer;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::discovery::Directory;
use crate::drain::Drain;
use crate::flags::{App, Flags};
use crate::http::{self, ConnectionInfo};
use crate::identity::IdentityStore;
use crate::io::Io;
use crate::listen::{Inbound, Outbound, Version};
use crate::log::AccessLog;
use crate::metrics::{Metric, Metrics};
use crate::snapshot::{FilterSlot, Snapshot, Target, Workload};
use crate::state::Proxy;
use crate::upstream::Clusters;
use crate::worker::Worker;
use crate::{filter, tcp, tls};

/// Longest time anything here may take: only a test that hangs meets it.
pub(crate) const HANG: Duration = Duration::from_secs(20);

/// One proxy of a test.
pub(crate) struct TestProxy {
    pub(crate) worker: Rc<Worker>,
    pub(crate) log: Receiver<Vec<u8>>,
    snapshot: Snapshot,
}

impl TestProxy {
    /// The proxy of a workload of service account `account` in namespace `demo`, with a certificate.
    pub(crate) fn new(account: &str) -> Self {
        let flags = [
            "outrigger-proxy",
            "--name",
            account,
            "--namespace",
            "demo",
            "--config",
            "/nowhere",
            "--labels",
            "version=v1",
        ];
        let settings = Flags::try_parse_from(flags).unwrap().settings().unwrap();
        let (directory, _wanted) = Directory::new();
        let (log, lines) = AccessLog::channel();
        let proxy = Arc::new(Proxy {
            settings: Arc::new(settings),
            directory,
            identity: identity(account),
            log,
            clusters: Clusters::new(),
            metrics: Metrics::new(),
            drain: Drain::new(),
            workers: Vec::new(),
            bound: crate::state::Bound::default(),
        });
        let mesh = link::Mesh { access_log: link::AccessLog::All, ..link::Mesh::default() };
        let snapshot = Snapshot { mesh: Some(Arc::new(mesh)), ..Snapshot::default() };
        let mut this = Self { worker: Worker::new(proxy, 0), log: lines, snapshot };
        this.publish(|_| {});
        this
    }

    fn publish(&mut self, change: impl FnOnce(&mut Snapshot)) {
        change(&mut self.snapshot);
        self.worker.proxy.directory.publish(self.snapshot.clone());
    }

    /// Makes a service known under `svc/demo/<name>` and under `ip/<vip>:<port>`.
    pub(crate) fn service(&mut self, service: &wire::Service) {
        let linked = Arc::new(link::service(service).unwrap());
        let name = format!("svc/demo/{}", service.name).parse::<Key>().unwrap();
        self.publish(|snapshot| {
            for vip in &linked.vips {
                for port in &linked.ports {
                    let key = Key::Ip(SocketAddr::new(*vip, port.number));
                    snapshot.targets.insert(key, (Target::Service(linked.clone()), Default::default()));
                }
            }
            snapshot.targets.insert(name, (Target::Service(linked.clone()), Default::default()));
        });
    }

    /// Makes a name or address known not to be of the mesh.
    pub(crate) fn absent(&mut self, key: &str) {
        let key = key.parse().unwrap();
        self.publish(|snapshot| drop(snapshot.targets.insert(key, (Target::Absent, Default::default()))));
    }

    /// Makes an instance known under its address.
    pub(crate) fn workload(&mut self, key: SocketAddr, endpoint: wire::Endpoint) {
        let wire = wire::Workload { namespace: "demo".into(), name: "x".into(), endpoint: Some(endpoint), protocol: 0 };
        let (endpoint, protocol) = link::workload(&wire).unwrap();
        let target = Target::Workload(Arc::new(Workload { endpoint, protocol }));
        self.publish(|snapshot| drop(snapshot.targets.insert(Key::Ip(key), (target, Default::default()))));
    }

    /// Changes what holds for the whole mesh.
    pub(crate) fn mesh(&mut self, change: impl FnOnce(&mut link::Mesh)) {
        let mut mesh = self.snapshot.mesh.as_deref().cloned().unwrap_or_default();
        change(&mut mesh);
        self.publish(|snapshot| snapshot.mesh = Some(Arc::new(mesh)));
    }

    /// Sets the endpoints of a backend.
    pub(crate) fn endpoints(&self, key: &str, endpoints: Vec<wire::Endpoint>) {
        let endpoints = link::endpoints(&wire::Endpoints { endpoints }).unwrap();
        self.worker.proxy.clusters.set_endpoints(key, 0, endpoints);
    }

    /// Makes a filter known as `filter/demo/<name>`, which replaces one header (or pseudo header) of every request.
    pub(crate) async fn rewriting_filter(&mut self, name: &str, header: &str, value: &str) {
        self.filter(name, &rewriting_guest(header, value)).await;
    }

    /// Makes a module known as `filter/demo/<name>`.
    pub(crate) async fn filter(&mut self, name: &str, module: &str) {
        // One per process, as in a proxy: a thread tells filters apart by their number.
        static PLUGINS: OnceLock<(filter::Plugins, tempfile::TempDir)> = OnceLock::new();
        let (plugins, _) = PLUGINS.get_or_init(|| {
            let cache = tempfile::tempdir().unwrap();
            let compiler = filter::Compiler::InProcess;
            let settings = filter::Settings { compiler, cache: cache.path().join("filters") };
            (filter::Plugins::new(settings).unwrap(), cache)
        });
        let module = wat::parse_str(module).unwrap();
        let spec = wire::Filter {
            namespace: "demo".into(),
            name: name.into(),
            sha256: hex::encode(Sha256::digest(&module)),
            // Far above what it needs on a busy machine.
            call_time_ms: 1000,
            ..wire::Filter::default()
        };
        let plugin = plugins.prepare(&spec, Some(module.into())).await.unwrap();
        let slot = FilterSlot { plugin: Some(plugin), fail_open: false };
        self.publish(|snapshot| drop(snapshot.filters.insert(format!("filter/demo/{name}"), slot)));
    }

    /// What the proxy enforces for its application.
    pub(crate) fn inbound(&mut self, port: wire::SelfPort) {
        let wire = wire::Self_ { namespace: "demo".into(), workload: "x".into(), ports: vec![port] };
        let inbound = Arc::new(link::inbound(&wire).unwrap());
        self.publish(|snapshot| snapshot.inbound = Some(inbound));
    }

    /// Serves what applications send; with interception, as if to `destination`.
    pub(crate) async fn serve_outbound(&self, version: Option<Version>, destination: Option<SocketAddr>) -> SocketAddr {
        let (listener, address) = listen().await;
        let worker = self.worker.clone();
        tokio::task::spawn_local(async move {
            while let Ok((stream, client)) = listener.accept().await {
                let info = Outbound { client, destination };
                let worker = worker.clone();
                match version {
                    Some(version) => {
                        let info = ConnectionInfo::Outbound(info);
                        tokio::task::spawn_local(http::serve(Io::from(stream), info, version, worker));
                    }
                    None => {
                        tokio::task::spawn_local(tcp::serve_outbound(Io::from(stream), info, worker));
                    }
                }
            }
        });
        address
    }

    /// Serves what others send to the application in plaintext; without a version, as opaque streams.
    pub(crate) async fn serve_plaintext(&self, app: SocketAddr, version: Option<Version>) -> SocketAddr {
        let (listener, address) = listen().await;
        let worker = self.worker.clone();
        tokio::task::spawn_local(async move {
            while let Ok((stream, client)) = listener.accept().await {
                let app = App { name: "http".into(), address: app, protocol: wire::Protocol::Detect };
                let (io, info) = (Io::from(stream), Inbound { client, app, peer: None });
                match version {
                    Some(version) => {
                        let info = ConnectionInfo::Inbound(info);
                        tokio::task::spawn_local(http::serve(io, info, version, worker.clone()))
                    }
                    None => tokio::task::spawn_local(tcp::serve_inbound(io, info, worker.clone())),
                };
            }
        });
        address
    }

    /// The value of a counter or gauge, see [`Metrics::total`].
    pub(crate) fn total(&self, metric: Metric, labels: &[&str]) -> i64 {
        self.worker.proxy.metrics.total(metric, labels)
    }

    /// The next line of the access log with this direction.
    pub(crate) fn logged(&self, direction: &str) -> serde_json::Value {
        loop {
            let line: serde_json::Value = serde_json::from_slice(&self.log.try_recv().unwrap()).unwrap();
            if line["direction"] == direction {
                return line;
            }
        }
    }

    /// Serves what peers send to the application, mTLS or plaintext HTTP/1.
    pub(crate) async fn serve_inbound(&self, app: SocketAddr, mtls: bool) -> SocketAddr {
        let (listener, address) = listen().await;
        let worker = self.worker.clone();
        tokio::task::spawn_local(async move {
            while let Ok((stream, client)) = listener.accept().await {
                tokio::task::spawn_local(accepted(stream, client, app, mtls, worker.clone()));
            }
        });
        address
    }

    /// The Prometheus text.
    pub(crate) fn metrics(&self) -> String {
        self.worker.proxy.metrics.encode()
    }
}

async fn accepted(stream: TcpStream, client: SocketAddr, app: SocketAddr, mtls: bool, worker: Rc<Worker>) {
    let app = App { name: "http".into(), address: app, protocol: wire::Protocol::Detect };
    if !mtls {
        let info = ConnectionInfo::Inbound(Inbound { client, app, peer: None });
        return http::serve(Io::from(stream), info, Version::Http1, worker).await;
    }
    let own = worker.proxy.identity.required().unwrap();
    let Ok((stream, peer)) = tls::accept(stream, &own, HANG).await else { return };
    let alpn = stream.get_ref().1.alpn_protocol().map(<[u8]>::to_vec);
    let info = Inbound { client, app, peer: Some(Arc::new(peer)) };
    let version = match alpn.as_deref() {
        Some(tls::ALPN_H2) => Version::Http2,
        Some(tls::ALPN_HTTP1) => Version::Http1,
        _ => return tcp::serve_inbound(Io::from(stream), info, worker).await,
    };
    http::serve(Io::from(stream), ConnectionInfo::Inbound(info), version, worker).await;
}

/// A listener on a port of its own.
pub(crate) async fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// An address where nobody listens.
pub(crate) async fn closed() -> SocketAddr {
    listen().await.1
}

static CA: OnceLock<CertifiedIssuer<'static, KeyPair>> = OnceLock::new();

fn ca() -> &'static CertifiedIssuer<'static, KeyPair> {
    CA.get_or_init(|| {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
    })
}

/// A store with a certificate of `demo/<account>`.
pub(crate) fn identity(account: &str) -> Arc<IdentityStore> {
    let store = IdentityStore::new(None);
    let day = SystemTime::now() + Duration::from_secs(24 * 3600);
    install(&store, account, day);
    store
}

/// Gives a store a certificate that expires at `end`.
pub(crate) fn install(store: &IdentityStore, account: &str, end: SystemTime) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.not_after = end.into();
    params.subject_alt_names = vec![SanType::URI(spiffe(account).try_into().unwrap())];
    params.extended_key_usages =
        vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth, rcgen::ExtendedKeyUsagePurpose::ServerAuth];
    let certificate = params.signed_by(&key, ca()).unwrap();
    let private = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let bundle = Bundle::new([ca().der().clone()]).unwrap();
    store.install(vec![certificate.der().clone()], &private, bundle).unwrap();
}

/// A filter's module: `header` of every request becomes `value`.
fn rewriting_guest(header: &str, value: &str) -> String {
    let (h, v) = (header.len(), value.len());
    format!(
        r#"(module
        (import "env" "proxy_replace_header_map_value"
            (func $replace (param i32 i32 i32 i32 i32) (result i32)))
        (memory (export "memory") 1)
        (data (i32.const 1024) "{header}{value}")
        (func (export "proxy_abi_version_0_2_1"))
        (func (export "proxy_on_memory_allocate") (param i32) (result i32) (i32.const 4096))
        (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
            (call $replace (i32.const 0) (i32.const 1024) (i32.const {h}) (i32.const {start}) (i32.const {v}))))"#,
        start = 1024 + h,
    )
}

/// Waits until something holds.
pub(crate) async fn until(what: &str, holds: impl Fn() -> bool) {
    let waiting = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(HANG, waiting).await.unwrap_or_else(|_| panic!("never: {what}"));
}

/// The identity of `demo/<account>`.
pub(crate) fn spiffe(account: &str) -> String {
    format!("spiffe://cluster.local/ns/demo/sa/{account}")
}

/// A service of one port without routes, whose backend has the same name.
pub(crate) fn service(name: &str, policy: wire::RoutePolicy) -> wire::Service {
    let key = format!("demo/{name}:80");
    let port = wire::ServicePort {
        port: 80,
        name: "http".into(),
        backend: key.clone(),
        policy: Some(policy),
        ..wire::ServicePort::default()
    };
    wire::Service {
        namespace: "demo".into(),
        name: name.into(),
        ports: vec![port],
        backends: vec![backend(name)],
        vips: vec!["10.96.0.1".into()],
    }
}

/// The backend `demo/<name>:80` with ample limits.
pub(crate) fn backend(name: &str) -> wire::Backend {
    wire::Backend {
        key: format!("demo/{name}:80"),
        namespace: "demo".into(),
        service: name.into(),
        port: 80,
        shards: 1,
        policy: Some(wire::ClusterPolicy {
            connect_timeout_ms: 5_000,
            budget: Some(wire::Budget { percent: 20, min_per_second: 100 }),
            breaker: Some(wire::Breaker {
                max_connections: 1000,
                max_pending_requests: 1000,
                max_requests: 1000,
                max_retries: 100,
            }),
            ..wire::ClusterPolicy::default()
        }),
        ..wire::Backend::default()
    }
}

/// An endpoint; with an account, one behind a proxy of that identity.
pub(crate) fn endpoint(id: &str, address: SocketAddr, account: Option<&str>) -> wire::Endpoint {
    wire::Endpoint {
        id: format!("demo/{id}"),
        address: address.ip().to_string(),
        port: address.port().into(),
        app_port: 80,
        identity: account.map(spiffe).unwrap_or_default(),
        version: "v1".into(),
        weight: 1,
        ..wire::Endpoint::default()
    }
}

/// Retries as the defaults have them, without waiting.
pub(crate) fn retries() -> wire::RoutePolicy {
    wire::RoutePolicy {
        retries: Some(wire::Retries {
            attempts: 2,
            connect_failure: true,
            reset: true,
            statuses: vec![502, 503, 504],
            grpc_statuses: vec![14],
            backoff_base_ms: 1,
            backoff_max_ms: 1,
        }),
        ..wire::RoutePolicy::default()
    }
}

/// A port of the own application.
pub(crate) fn self_port(app: SocketAddr, mtls: wire::MtlsMode) -> wire::SelfPort {
    wire::SelfPort { name: "http".into(), port: app.port().into(), mtls: mtls.into(), ..wire::SelfPort::default() }
}

/// An HTTP/1 server that answers every connection's requests with what `respond` makes of their bytes. A request is read to the
/// end of its head and `content-length`.
pub(crate) async fn app(respond: impl Fn(String) -> String + Clone + 'static) -> SocketAddr {
    let (listener, address) = listen().await;
    tokio::task::spawn_local(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let respond = respond.clone();
            tokio::task::spawn_local(async move {
                while let Some(request) = read_message(&mut stream).await {
                    let response = respond(request);
                    // Nothing to say: the connection is closed without a response.
                    if response.is_empty() || stream.write_all(response.as_bytes()).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    address
}

/// A server that takes connections and says nothing.
pub(crate) async fn hung() -> SocketAddr {
    let (listener, address) = listen().await;
    tokio::task::spawn_local(async move {
        let mut held = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            held.push(stream);
        }
    });
    address
}

/// A response with a body.
pub(crate) fn ok(body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

/// Reads one message: its head, and as much body as `content-length` or `chunked` says. `None` at the end of the stream.
pub(crate) async fn read_message(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> Option<String> {
    let mut bytes = Vec::new();
    let mut byte = [0];
    let until = |bytes: &[u8], end: &[u8]| bytes.ends_with(end);
    while !until(&bytes, b"\r\n\r\n") {
        if stream.read(&mut byte).await.ok()? == 0 {
            return (!bytes.is_empty()).then(|| String::from_utf8_lossy(&bytes).into_owned());
        }
        bytes.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&bytes).to_lowercase();
    if head.contains("transfer-encoding: chunked") {
        while !(until(&bytes, b"\r\n\r\n") && tail_has_trailers(&bytes)) {
            stream.read_exact(&mut byte).await.ok()?;
            bytes.push(byte[0]);
        }
    } else if let Some(length) = head.split("content-length: ").nth(1) {
        let length: usize = length.split("\r\n").next()?.parse().ok()?;
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await.ok()?;
        bytes.extend(body);
    }
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// The last chunk is there, and something after it.
fn tail_has_trailers(bytes: &[u8]) -> bool {
    let text = String::from_utf8_lossy(bytes);
    let body = text.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    body.contains("\r\n0\r\n") || body.starts_with("0\r\n")
}

/// Sends bytes on a connection of its own and reads one response.
pub(crate) async fn exchange(to: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(to).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    within(read_message(&mut stream)).await.unwrap_or_default()
}

/// `GET` of a path of a service.
pub(crate) async fn get(to: SocketAddr, host: &str, path: &str) -> String {
    exchange(to, &format!("GET {path} HTTP/1.1\r\nhost: {host}\r\n\r\n")).await
}

/// Fails the test when it hangs.
pub(crate) async fn within<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(HANG, future).await.expect("hangs")
}

/// Runs a test's future where `spawn_local` works.
pub(crate) fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, async {
        tokio::time::timeout(3 * HANG, test).await.expect("the test hangs");
    });
}
