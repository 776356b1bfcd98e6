//! The gRPC channel to the control plane: mesh TLS that verifies the control plane's SPIFFE ID, not a host name.

use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption};
use http::Uri;
use hyper_util::rt::TokioIo;
use outrigger_core::chain::{self, Bundle, Usage};
use rustls::ClientConfig;
use rustls::sign::SingleCertAndKey;
use rustls_pki_types::{ServerName, UnixTime};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint};

use super::IdentityStore;
use crate::tls::{self, TlsError};

/// The namespace and service account in the control plane's certificate.
const CONTROL: (&str, &str) = ("outrigger-system", "outrigger-control");
/// Sent as SNI; the control plane does not look at it.
const SNI: &str = "control.outrigger.internal";
const CONNECT: Duration = Duration::from_secs(5);
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// Why there is no connection to the control plane.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The address given
    #[error("`{0}` is not the address of a control plane; the form is https://host:15012")]
    Address(String),
    /// Name resolution or TCP
    #[error("the control plane at {0} cannot be reached: {1}")]
    Connect(String, #[source] std::io::Error),
    /// TLS
    #[error("the control plane at {0}: {1} (is --ca-file the root.pem of this control plane?)")]
    Tls(String, #[source] TlsError),
    /// Not the control plane
    #[error("what answers at {0} is {1}, not a control plane")]
    Identity(String, String),
}

/// How this proxy reaches its control plane. Gives out channels that verify it and show the current certificate.
#[derive(Debug)]
pub struct ControlPlane {
    endpoint: Endpoint,
    connector: Connector,
    cached: Mutex<Option<(u64, Channel)>>,
}

impl ControlPlane {
    /// `uri` as `https://127.0.0.1:15012`; `ca` from `--ca-file`, trusted beside the bundle.
    ///
    /// # Errors
    /// When `uri` is not of that form.
    pub fn new(uri: &str, ca: Bundle, store: Arc<IdentityStore>) -> Result<Self, ChannelError> {
        let bad = || ChannelError::Address(uri.to_owned());
        let parsed: Uri = uri.parse().map_err(|_| bad())?;
        if parsed.scheme_str() != Some("https") || parsed.host().is_none() {
            return Err(bad());
        }
        let endpoint = Endpoint::from(parsed)
            .connect_timeout(CONNECT * 2)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .keep_alive_while_idle(true);
        let connector = Connector { ca: Arc::new(ca), store, local: Arc::default() };
        Ok(Self { endpoint, connector, cached: Mutex::new(None) })
    }

    /// A channel that connects when it is first used, and again when its connection breaks. Ask anew for each call or
    /// stream: after a renewal it is another one, since a connection keeps the certificate it was made with.
    pub fn channel(&self) -> Channel {
        let generation = *self.connector.store.subscribe().borrow();
        let mut cached = self.cached.lock().unwrap_or_else(PoisonError::into_inner);
        match cached.as_ref() {
            Some((at, channel)) if *at == generation => channel.clone(),
            _ => {
                let channel = self.endpoint.connect_with_connector_lazy(self.connector.clone());
                *cached = Some((generation, channel.clone()));
                channel
            }
        }
    }

    /// Our address on the last connection to the control plane: what `--advertise` defaults to.
    pub fn local_address(&self) -> Option<IpAddr> {
        self.connector.local.load().as_deref().copied()
    }
}

/// A `tower` service from a URI to a verified TLS stream.
#[derive(Debug, Clone)]
struct Connector {
    ca: Arc<Bundle>,
    store: Arc<IdentityStore>,
    local: Arc<ArcSwapOption<IpAddr>>,
}

impl tower_service::Service<Uri> for Connector {
    type Response = TokioIo<TlsStream<TcpStream>>;
    type Error = ChannelError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, ChannelError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), ChannelError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let this = self.clone();
        Box::pin(async move { this.connect(&uri).await.map(TokioIo::new) })
    }
}

impl Connector {
    async fn connect(&self, uri: &Uri) -> Result<TlsStream<TcpStream>, ChannelError> {
        let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
        let port = uri.port_u16().unwrap_or(15012);
        let name = format!("{host}:{port}");
        let io = tokio::time::timeout(CONNECT, TcpStream::connect((host, port)))
            .await
            .map_err(|_| std::io::Error::from(std::io::ErrorKind::TimedOut))
            .and_then(|connected| connected)
            .map_err(|error| ChannelError::Connect(name.clone(), error))?;
        // Without it requests wait for acknowledgements; nothing breaks.
        let _nodelay = io.set_nodelay(true);
        let local = io.local_addr().map(|address: SocketAddr| address.ip()).ok();
        let stream = self.secure(io, &name).await?;
        self.local.store(local.map(Arc::new));
        Ok(stream)
    }

    async fn secure(&self, io: TcpStream, name: &str) -> Result<TlsStream<TcpStream>, ChannelError> {
        let failed = |error: TlsError| ChannelError::Tls(name.to_owned(), error);
        let roots = self.ca.roots().iter().chain(self.store.bundle().roots()).cloned().collect::<Vec<_>>();
        let bundle = Arc::new(Bundle::new(roots).map_err(|e| failed(e.into()))?);
        let config = self.config(Arc::clone(&bundle)).map_err(|e| failed(e.into()))?;
        let sni = ServerName::try_from(SNI).map_err(|_| failed(TlsError::Name(SNI.to_owned())))?;
        let stream = tokio::time::timeout(CONNECT, TlsConnector::from(Arc::new(config)).connect(sni, io))
            .await
            .map_err(|_| failed(TlsError::Timeout))?
            .map_err(|e| failed(e.into()))?;
        let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
        let algorithms = tls::provider().signature_verification_algorithms.all;
        let verified =
            chain::verify(chain, &bundle, Usage::Server, algorithms, UnixTime::now()).map_err(|e| failed(e.into()))?;
        let id = verified.identity;
        // Before the first certificate our own trust domain is unknown; the roots then decide alone.
        let domain_ok = self.store.last().is_none_or(|own| own.spiffe().trust_domain() == id.trust_domain());
        if (id.namespace(), id.service_account()) != CONTROL || !domain_ok {
            return Err(ChannelError::Identity(name.to_owned(), id.to_string()));
        }
        Ok(stream)
    }

    fn config(&self, bundle: Arc<Bundle>) -> Result<ClientConfig, rustls::Error> {
        let builder = ClientConfig::builder_with_provider(Arc::clone(tls::provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(tls::ServerVerifier(Arc::new(ArcSwap::new(bundle)))));
        let mut config = match self.store.current() {
            Some(identity) => builder
                .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(identity.certified_key())))),
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![tls::ALPN_H2.into()];
        config.resumption = rustls::client::Resumption::disabled();
        Ok(config)
    }
}
