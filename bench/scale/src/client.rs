//! One proxy, as far as the control plane can see: a certificate of its own, a connection, a discovery stream.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll};
use std::time::{Duration, Instant};

use anyhow::Context;
use outrigger_proto::control::SignRequest;
use outrigger_proto::control::certificates_client::CertificatesClient;
use outrigger_proto::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use outrigger_proto::discovery::{DeltaDiscoveryRequest, Node};
use outrigger_proto::type_url;
use rustls::RootCertStore;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};

/// The name in the control plane's certificate.
const CONTROL: &str = "outrigger-control.outrigger-system.svc";
/// Namespace and account of every proxy.
pub(crate) const NAMESPACE: &str = "demo";
const ACCOUNT: &str = "web";
/// Asked for last: its absence says that everything asked before was answered.
const PROBE: &str = "svc/demo/there-is-no-such-service";

/// What a proxy received.
#[derive(Debug)]
pub(crate) enum Event {
    /// A resource or a removal: name, and when
    Resource(String, Instant),
    /// Everything asked for on a new stream was answered
    Ready,
    /// The stream ended, and why
    Ended(String),
}

/// A key with a request for its certificate.
pub(crate) struct Key {
    pair: rcgen::KeyPair,
    csr: Vec<u8>,
}

impl Key {
    pub(crate) fn new() -> anyhow::Result<Self> {
        let pair = rcgen::KeyPair::generate()?;
        let csr = rcgen::CertificateParams::default().serialize_request(&pair)?.der().to_vec();
        Ok(Self { pair, csr })
    }
}

/// Where the control plane is, and what is trusted.
#[derive(Clone)]
pub(crate) struct Control {
    pub(crate) grpc: SocketAddr,
    roots: Arc<RootCertStore>,
    token: Arc<str>,
}

/// Key and certificate of one proxy.
pub(crate) struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: Vec<u8>,
}

impl Control {
    pub(crate) fn new(grpc: SocketAddr, state: &Path) -> anyhow::Result<Self> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(state.join("root.pem"))?)?;
        let token = std::fs::read_to_string(state.join("join-token"))?;
        Ok(Self { grpc, roots: Arc::new(roots), token: token.trim().into() })
    }

    /// A connection of its own, with mutual TLS if there is an identity.
    pub(crate) async fn connect(&self, identity: Option<&Identity>) -> anyhow::Result<Channel> {
        let config = rustls::ClientConfig::builder().with_root_certificates(self.roots.clone());
        let mut config = match identity {
            None => config.with_no_client_auth(),
            Some(Identity { chain, key }) => {
                let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.clone()));
                config.with_client_auth_cert(chain.clone(), key)?
            }
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        let connector = Connector { address: self.grpc, tls: Arc::new(config).into() };
        let endpoint = Endpoint::from_static("http://control").connect_timeout(Duration::from_secs(30));
        Ok(endpoint.connect_with_connector(connector).await?)
    }

    /// Joins with the token, as a proxy does at its first start.
    pub(crate) async fn sign(&self, channel: Channel, workload: &str, key: Key) -> anyhow::Result<Identity> {
        let mut request = tonic::Request::new(SignRequest {
            csr_der: key.csr.into(),
            namespace: NAMESPACE.to_owned(),
            service_account: ACCOUNT.to_owned(),
            workload: workload.to_owned(),
            labels: BTreeMap::default(),
        });
        request.metadata_mut().insert("authorization", format!("Bearer {}", self.token).parse()?);
        let signed = CertificatesClient::new(channel).sign(request).await?.into_inner();
        let chain = signed.chain.iter().map(|der| CertificateDer::from(der.to_vec())).collect();
        Ok(Identity { chain, key: key.pair.serialize_der() })
    }
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

    fn poll_ready(&mut self, _: &mut TaskContext<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: http::Uri) -> Self::Future {
        let Self { address, tls } = self.clone();
        Box::pin(async move {
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            let name = ServerName::try_from(CONTROL).map_err(std::io::Error::other)?;
            Ok(hyper_util::rt::TokioIo::new(tls.connect(name, stream).await?))
        })
    }
}

/// A proxy with what it holds.
pub(crate) struct Proxy {
    pub(crate) workload: String,
    pub(crate) identity: Identity,
    /// Asked for, by type
    pub(crate) wanted: BTreeMap<&'static str, Vec<String>>,
    /// Versions by type and name; empty: told that there is nothing
    pub(crate) held: BTreeMap<(String, String), String>,
}

impl Proxy {
    pub(crate) fn new(workload: String, identity: Identity, services: &[String]) -> Self {
        let of = |prefix: &str, suffix: &str| services.iter().map(|name| format!("{prefix}{name}{suffix}")).collect();
        let wanted = BTreeMap::from([
            (type_url::MESH_CONFIG, vec!["mesh".to_owned()]),
            (type_url::BUNDLE, vec!["bundle/cluster.local".to_owned()]),
            (type_url::SELF, vec![format!("self/{workload}")]),
            (type_url::SERVICE, of("svc/", "")),
            (type_url::ENDPOINTS, of("endpoints/", ":80/0")),
        ]);
        Self { workload, identity, wanted, held: BTreeMap::new() }
    }

    /// Runs one stream until it is aborted or ends, and keeps what it holds.
    pub(crate) async fn run(&mut self, control: &Control, events: &mpsc::UnboundedSender<Event>) {
        if let Err(error) = self.stream(control, events).await {
            let _ = events.send(Event::Ended(format!("{}: {error:#}", self.workload)));
        }
    }

    async fn stream(&mut self, control: &Control, events: &mpsc::UnboundedSender<Event>) -> anyhow::Result<()> {
        let channel = control.connect(Some(&self.identity)).await.context("connecting")?;
        let (requests, receiver) = mpsc::channel(64);
        for request in self.first() {
            requests.send(request).await?;
        }
        let mut client = AggregatedDiscoveryServiceClient::new(channel);
        let mut responses = client.delta_aggregated_resources(ReceiverStream::new(receiver)).await?.into_inner();
        while let Some(response) = responses.message().await? {
            let now = Instant::now();
            let (type_url, response_nonce) = (response.type_url, response.nonce);
            let ack = DeltaDiscoveryRequest { type_url: type_url.clone(), response_nonce, ..Default::default() };
            requests.send(ack).await?;
            for resource in response.resources {
                self.held.insert((type_url.clone(), resource.name.clone()), resource.version);
                events.send(Event::Resource(resource.name, now))?;
            }
            for name in response.removed_resources {
                if name == PROBE {
                    events.send(Event::Ready)?;
                    continue;
                }
                self.held.insert((type_url.clone(), name.clone()), String::new());
                events.send(Event::Resource(name, now))?;
            }
        }
        anyhow::bail!("the control plane ended the stream")
    }

    fn first(&self) -> Vec<DeltaDiscoveryRequest> {
        let mut requests: Vec<_> = self.wanted.iter().map(|(type_url, names)| self.ask(type_url, names)).collect();
        if let Some(first) = requests.first_mut() {
            first.node = Some(Node { id: self.workload.clone(), cluster: String::new() });
        }
        requests.push(self.ask(type_url::SERVICE, &[PROBE.to_owned()]));
        requests
    }

    fn ask(&self, type_url: &str, names: &[String]) -> DeltaDiscoveryRequest {
        let held = |name: &String| Some((name.clone(), self.held.get(&(type_url.to_owned(), name.clone()))?.clone()));
        DeltaDiscoveryRequest {
            type_url: type_url.to_owned(),
            resource_names_subscribe: names.to_vec(),
            initial_resource_versions: names.iter().filter_map(held).collect(),
            ..Default::default()
        }
    }
}
