//! The control plane as a whole, over real sockets: a client joins, registers, subscribes, and sees changes.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::fs;
use std::future::Future;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use clap::Parser;
use outrigger_control::flags::Flags;
use outrigger_control::run::Control;
use outrigger_control::tls::DNS_NAME;
use outrigger_proto::control::certificates_client::CertificatesClient;
use outrigger_proto::control::modules_client::ModulesClient;
use outrigger_proto::control::registry_client::RegistryClient;
use outrigger_proto::control::{FetchRequest, Port, RegisterRequest, SignRequest, WithdrawRequest};
use outrigger_proto::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use outrigger_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node};
use outrigger_proto::{mesh, type_url};
use prost::Message;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

const SERVICE: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: reviews, namespace: demo}\nspec:\n  selector: {app: reviews}\n  ports: [{name: http, port: 80, targetPort: http}]\n";

/// Nothing here takes long; a test that hangs ends with this.
async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), what).await.expect("took too long")
}

struct World {
    config: TempDir,
    state: TempDir,
    control: Control,
}

impl World {
    async fn start(files: &[(&str, &str)]) -> Self {
        let (config, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for (name, text) in files {
            fs::write(config.path().join(name), text).unwrap();
        }
        let control = Control::start(&flags(&config, &state)).await.unwrap();
        Self { config, state, control }
    }

    async fn restart(self) -> Self {
        let Self { config, state, control } = self;
        control.stop().await;
        let control = Control::start(&flags(&config, &state)).await.unwrap();
        Self { config, state, control }
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.config.path().join(name), text).unwrap();
    }

    async fn channel(&self, identity: Option<&Identity>) -> Channel {
        connect(self.control.grpc, self.state.path(), identity).await
    }

    async fn join(&self, account: &str, workload: &str) -> Identity {
        let key = rcgen::KeyPair::generate().unwrap();
        let csr = rcgen::CertificateParams::default().serialize_request(&key).unwrap();
        let token = fs::read_to_string(self.state.path().join("join-token")).unwrap();
        let mut request = tonic::Request::new(SignRequest {
            csr_der: csr.der().to_vec().into(),
            namespace: "demo".into(),
            service_account: account.into(),
            workload: workload.into(),
            labels: Default::default(),
        });
        request.metadata_mut().insert("authorization", format!("Bearer {}", token.trim()).parse().unwrap());
        let mut certificates = CertificatesClient::new(self.channel(None).await);
        let signed = certificates.sign(request).await.unwrap().into_inner();
        let chain = signed.chain.iter().map(|der| CertificateDer::from(der.to_vec())).collect();
        Identity { chain, key: key.serialize_der() }
    }

    /// Status line and body of an HTTP request to the API.
    async fn http(&self, request: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(self.control.http).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut text = String::new();
        soon(stream.read_to_string(&mut text)).await.unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (head[9..12].parse().unwrap(), body.to_owned())
    }

    async fn get(&self, path: &str) -> serde_json::Value {
        let (status, body) =
            self.http(&format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")).await;
        assert_eq!(status, 200, "{body}");
        serde_json::from_str(&body).unwrap()
    }
}

fn flags(config: &TempDir, state: &TempDir) -> Flags {
    let text = |path: &Path| path.display().to_string();
    let (config, state) = (text(config.path()), text(state.path()));
    let any = "127.0.0.1:0";
    let arguments = ["outrigger-control", "--config", &config, "--state", &state, "--grpc", any, "--http", any];
    Flags::try_parse_from(arguments).unwrap()
}

#[derive(Clone)]
struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: Vec<u8>,
}

#[derive(Clone)]
struct Connector {
    address: SocketAddr,
    tls: tokio_rustls::TlsConnector,
}

impl tower_service::Service<http::Uri> for Connector {
    type Response = hyper_util::rt::TokioIo<tokio_rustls::client::TlsStream<TcpStream>>;
    type Error = std::io::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: http::Uri) -> Self::Future {
        let Self { address, tls } = self.clone();
        Box::pin(async move {
            let stream = TcpStream::connect(address).await?;
            let stream = tls.connect(ServerName::try_from(DNS_NAME).unwrap(), stream).await?;
            Ok(hyper_util::rt::TokioIo::new(stream))
        })
    }
}

async fn connect(address: SocketAddr, state: &Path, identity: Option<&Identity>) -> Channel {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(state.join("root.pem")).unwrap()).unwrap();
    let config = rustls::ClientConfig::builder().with_root_certificates(roots);
    let mut config = match identity {
        None => config.with_no_client_auth(),
        Some(Identity { chain, key }) => config
            .with_client_auth_cert(chain.clone(), PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.clone())))
            .unwrap(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    let connector = Connector { address, tls: Arc::new(config).into() };
    Endpoint::from_static("http://control").connect_with_connector(connector).await.unwrap()
}

fn registration(workload: &str) -> RegisterRequest {
    RegisterRequest {
        namespace: "demo".into(),
        workload: workload.into(),
        service_account: "reviews".into(),
        labels: [("app".to_owned(), "reviews".to_owned())].into(),
        inbound: "127.0.0.1:15006".into(),
        ports: vec![Port { name: "http".into(), port: 8080, protocol: "http1".into() }],
        ..RegisterRequest::default()
    }
}

/// A discovery stream.
struct Stream {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: tonic::Streaming<DeltaDiscoveryResponse>,
}

impl Stream {
    async fn open(channel: Channel, workload: &str, first: DeltaDiscoveryRequest) -> Self {
        let (requests, receiver) = mpsc::channel(16);
        let node = Some(Node { id: workload.into(), cluster: String::new() });
        requests.send(DeltaDiscoveryRequest { node, ..first }).await.unwrap();
        let mut client = AggregatedDiscoveryServiceClient::new(channel);
        let responses = client.delta_aggregated_resources(ReceiverStream::new(receiver)).await.unwrap().into_inner();
        Self { requests, responses }
    }

    async fn next(&mut self) -> DeltaDiscoveryResponse {
        let response = soon(self.responses.message()).await.unwrap().unwrap();
        let (type_url, response_nonce) = (response.type_url.clone(), response.nonce.clone());
        self.send(DeltaDiscoveryRequest { type_url, response_nonce, ..Default::default() }).await;
        response
    }

    async fn send(&self, request: DeltaDiscoveryRequest) {
        self.requests.send(request).await.unwrap();
    }
}

fn ask(type_url: &str, name: &str) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: type_url.into(),
        resource_names_subscribe: vec![name.into()],
        ..DeltaDiscoveryRequest::default()
    }
}

fn endpoints(response: &DeltaDiscoveryResponse) -> usize {
    let [resource] = response.resources.as_slice() else { panic!("{response:?}") };
    mesh::Endpoints::decode(resource.resource.as_ref().unwrap().value.clone()).unwrap().endpoints.len()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_workload_joins_registers_is_seen_and_is_withdrawn() {
    let world = World::start(&[("mesh.yaml", SERVICE)]).await;
    let reviews = world.join("reviews", "reviews-0").await;
    let web = world.join("web", "web-0").await;
    let mut registry = RegistryClient::new(world.channel(Some(&reviews)).await);
    let lease = registry.register(registration("reviews-0")).await.unwrap().into_inner().lease_ms;
    assert_eq!(lease, 15_000);

    let name = "endpoints/demo/reviews:80/0";
    let mut stream = Stream::open(world.channel(Some(&web)).await, "web-0", ask(type_url::ENDPOINTS, name)).await;
    while endpoints(&stream.next().await) == 0 {}

    let withdraw = WithdrawRequest { namespace: "demo".into(), workload: "reviews-0".into() };
    let withdrawing = tokio::spawn(async move { registry.withdraw(withdraw).await });
    let response = stream.next().await;
    assert!(response.removed_resources == [name] || endpoints(&response) == 0, "{response:?}");
    assert!(soon(withdrawing).await.unwrap().unwrap().into_inner().confirmed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_file_is_pushed_and_a_bad_one_is_reported_while_the_good_one_serves() {
    let world = World::start(&[("mesh.yaml", SERVICE)]).await;
    let web = world.join("web", "web-0").await;
    let channel = world.channel(Some(&web)).await;
    let mut stream = Stream::open(channel.clone(), "web-0", ask(type_url::SERVICE, "svc/demo/reviews")).await;
    let first = stream.next().await.resources.remove(0);
    assert_eq!(first.name, "svc/demo/reviews");
    world.write("mesh.yaml", &SERVICE.replace("port: 80,", "port: 81,"));
    let second = stream.next().await.resources.remove(0);
    assert_ne!(first.version, second.version);

    world.write("mesh.yaml", &SERVICE.replace("port: 80,", "port: 99999999,"));
    let mut states = world.control.mesh.subscribe();
    soon(states.wait_for(|state| !state.accepted.rejected.is_empty())).await.unwrap();
    drop(states);
    let world = world.restart().await;
    let status = world.get("/api/v1/status").await;
    let rejected = &status["rejections"][0];
    assert_eq!((rejected["name"].as_str(), rejected["serving"].as_str()), (Some("reviews"), Some("last good")));
    assert!(rejected["field"].as_str().unwrap().starts_with("spec.ports[0]"), "{rejected}");

    // A new process, and nothing that is held is sent: the first answer is to the second question.
    let mut request = ask(type_url::SERVICE, "svc/demo/reviews");
    request.initial_resource_versions = [("svc/demo/reviews".to_owned(), second.version.clone())].into();
    let mut stream = Stream::open(world.channel(Some(&web)).await, "web-0", request).await;
    stream.send(ask(type_url::SERVICE, "svc/demo/none")).await;
    let response = stream.next().await;
    assert_eq!((response.resources.len(), response.removed_resources), (0, vec!["svc/demo/none".to_owned()]));
    let proxies = world.get("/api/v1/proxies").await;
    assert_eq!(proxies[0]["identity"], "spiffe://cluster.local/ns/demo/sa/web");
    let held = proxies[0]["resources"].as_array().unwrap().iter().find(|row| row["name"] == "svc/demo/reviews");
    assert_eq!(held.unwrap()["acked"], second.version.as_str());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_certificate_does_not_permit_is_refused_and_reported() {
    let world = World::start(&[("mesh.yaml", SERVICE)]).await;
    let reviews = world.join("reviews", "reviews-0").await;
    let mut registry = RegistryClient::new(world.channel(Some(&reviews)).await);
    for (case, request) in [
        ("namespace", RegisterRequest { namespace: "other".into(), ..registration("reviews-0") }),
        ("account", RegisterRequest { service_account: "web".into(), ..registration("reviews-0") }),
        ("workload", registration("reviews-1")),
    ] {
        assert_eq!(registry.register(request).await.unwrap_err().code(), Code::PermissionDenied, "{case}");
    }
    let withdraw = WithdrawRequest { namespace: "other".into(), workload: "reviews-0".into() };
    assert_eq!(registry.withdraw(withdraw).await.unwrap_err().code(), Code::PermissionDenied);
    let mut nobody = RegistryClient::new(world.channel(None).await);
    assert_eq!(nobody.register(registration("reviews-0")).await.unwrap_err().code(), Code::Unauthenticated);
    let refusals = world.get("/api/v1/status").await["refusals"].as_array().unwrap().len();
    assert_eq!(refusals, 5);

    // self/… of another workload is absent, and the attempt is reported.
    let channel = world.channel(Some(&reviews)).await;
    let mut stream = Stream::open(channel.clone(), "reviews-0", ask(type_url::SELF, "self/web-0")).await;
    assert_eq!(stream.next().await.removed_resources, ["self/web-0"]);
    assert_eq!(world.get("/api/v1/status").await["refusals"].as_array().unwrap().len(), 6);

    // So is its own name's self with another account's certificate.
    registry.register(registration("reviews-0")).await.unwrap();
    let mut mine = Stream::open(channel, "reviews-0", ask(type_url::SELF, "self/reviews-0")).await;
    while mine.next().await.resources.is_empty() {}
    let web = world.join("web", "reviews-0").await;
    let mut other =
        Stream::open(world.channel(Some(&web)).await, "reviews-0", ask(type_url::SELF, "self/reviews-0")).await;
    assert_eq!(other.next().await.removed_resources, ["self/reviews-0"]);

    // A wildcard ends the stream with a reason.
    stream.send(ask(type_url::SERVICE, "*")).await;
    let ended = soon(stream.responses.message()).await.unwrap_err();
    assert_eq!(ended.code(), Code::InvalidArgument);
    assert!(ended.message().contains("wildcard"), "{ended}");
    let mut stream = AggregatedDiscoveryServiceClient::new(world.channel(None).await);
    let refused = stream.delta_aggregated_resources(tokio_stream::pending()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_state_directory_has_one_control_plane() {
    let world = World::start(&[]).await;
    let second = Control::start(&flags(&world.config, &world.state)).await.unwrap_err();
    assert!(format!("{second:#}").contains("another control plane"), "{second:#}");
    world.restart().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_api_answers_local_hosts_only_and_mutations_need_the_token() {
    let world = World::start(&[]).await;
    let request = |line: &str, headers: &str| format!("{line} HTTP/1.1\r\nConnection: close\r\n{headers}\r\n");
    let get = "GET /api/v1/status";
    assert_eq!(world.http(&request(get, "Host: evil.test\r\n")).await.0, 403);
    assert_eq!(world.http(&request(get, "Host: 127.0.0.1\r\nOrigin: http://evil.test\r\n")).await.0, 403);
    assert_eq!(world.http(&request(get, "Host: 127.0.0.1\r\nOrigin: http://localhost:3000\r\n")).await.0, 200);
    let body = r#"{"namespace":"demo","serviceAccount":"web","ttlSeconds":60}"#;
    let post = |token: &str| {
        let length = body.len();
        let headers = format!(
            "Host: localhost\r\nAuthorization: Bearer {token}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n"
        );
        request("POST /api/v1/tokens", &headers) + body
    };
    assert_eq!(world.http(&post("wrong")).await.0, 401);
    let token = fs::read_to_string(world.state.path().join("admin-token")).unwrap();
    let (status, answer) = world.http(&post(token.trim())).await;
    assert_eq!(status, 200, "{answer}");
    assert!(answer.contains("\"token\""), "{answer}");
    let (_, metrics) = world.http(&request("GET /metrics", "Host: localhost\r\n")).await;
    assert!(metrics.contains("outrigger_control_connected_proxies 0"), "{metrics}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_module_is_fetched_by_digest_from_an_offset() {
    let filter = "apiVersion: outrigger.dev/v1alpha1\nkind: WasmFilter\nmetadata: {name: f, namespace: demo}\nspec:\n  targetRefs: [{group: \"\", kind: Service, name: reviews}]\n  direction: Inbound\n  module: {file: f.wasm}\n";
    let module: String = (0..20_000).map(|n| format!("{n:05}")).collect();
    let world = World::start(&[("mesh.yaml", &format!("{SERVICE}---\n{filter}")), ("f.wasm", &module)]).await;
    assert_eq!(world.get("/api/v1/status").await["rejections"], serde_json::json!([]));
    let web = world.join("web", "web-0").await;
    let channel = world.channel(Some(&web)).await;
    let mut stream = Stream::open(channel.clone(), "web-0", ask(type_url::FILTER, "filter/demo/f")).await;
    let resource = stream.next().await.resources.remove(0).resource.unwrap();
    let name = format!("wasm/{}", mesh::Filter::decode(resource.value.clone()).unwrap().sha256);
    let mut modules = ModulesClient::new(channel);
    let fetch = FetchRequest { name, offset: 10 };
    let mut chunks = modules.fetch(fetch).await.unwrap().into_inner();
    let (mut bytes, mut total) = (Vec::new(), 0);
    while let Some(chunk) = soon(chunks.message()).await.unwrap() {
        assert!(chunk.data.len() <= 64 * 1024);
        total += chunk.total;
        bytes.extend_from_slice(&chunk.data);
    }
    assert_eq!(total, module.len() as u64);
    assert!(bytes == module.as_bytes()[10..], "{} bytes", bytes.len());
    let unknown = FetchRequest { name: format!("wasm/{}", "0".repeat(64)), offset: 0 };
    assert_eq!(modules.fetch(unknown).await.unwrap_err().code(), Code::NotFound);
    let mut nobody = ModulesClient::new(world.channel(None).await);
    let unknown = FetchRequest { name: "wasm/x".into(), offset: 0 };
    assert_eq!(nobody.fetch(unknown).await.unwrap_err().code(), Code::Unauthenticated);
}
