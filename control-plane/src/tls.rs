//! TLS of the gRPC port: the control plane's own certificate, and who the client is.

use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use outrigger_core::chain::{self, Usage};
use outrigger_core::spiffe::SpiffeId;
use rcgen::KeyPair;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{DigitallySignedStruct, DistinguishedName, Error, ServerConfig, SignatureScheme};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, UnixTime};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::ca::{Authority, CaError, ProvenKey};
use crate::peer::Peer;
use crate::refusals::Refusals;
use crate::token::CONTROL;

/// Beside its SPIFFE ID: for gRPC clients that verify names (our proxies verify the SPIFFE ID).
pub const DNS_NAME: &str = "outrigger-control.outrigger-system.svc";

/// Why the TLS side cannot start.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// Signing our own certificate
    #[error("the control plane's own certificate: {0}")]
    Ca(#[from] CaError),
    /// Making its key
    #[error("the control plane's own key: {0}")]
    Key(#[from] rcgen::Error),
    /// rustls
    #[error("TLS: {0}")]
    Tls(#[from] Error),
    /// Trust domain
    #[error(transparent)]
    Identity(#[from] outrigger_core::spiffe::BadSpiffeId),
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

/// The control plane's own certificate. Replaced at half life; connections that are open go on.
pub struct ServerCert {
    authority: Arc<Authority>,
    identity: SpiffeId,
    current: ArcSwap<CertifiedKey>,
}

impl std::fmt::Debug for ServerCert {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ServerCert({})", self.identity)
    }
}

impl ResolvesServerCert for ServerCert {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current.load_full())
    }
}

impl ServerCert {
    /// The first one, signed now.
    ///
    /// # Errors
    /// When the authority cannot sign.
    pub fn new(authority: Arc<Authority>) -> Result<Arc<Self>, TlsError> {
        let identity = SpiffeId::new(authority.trust_domain(), CONTROL.0, CONTROL.1)?;
        let current = ArcSwap::new(issue(&authority, &identity)?);
        Ok(Arc::new(Self { authority, identity, current }))
    }

    /// Signs another one, with another key.
    ///
    /// # Errors
    /// When the authority cannot sign; the current one stays.
    pub fn renew(&self) -> Result<(), TlsError> {
        self.current.store(issue(&self.authority, &self.identity)?);
        Ok(())
    }

    /// Renews at half life, for ever.
    pub async fn run(self: Arc<Self>) {
        loop {
            // Looked at often, since the lifetime is configuration and may become shorter.
            let issued = tokio::time::Instant::now();
            while issued.elapsed() < self.authority.lifetime() / 2 {
                let rest = (self.authority.lifetime() / 2).saturating_sub(issued.elapsed());
                tokio::time::sleep(rest.clamp(Duration::from_millis(10), Duration::from_secs(1))).await;
            }
            if let Err(error) = self.renew() {
                tracing::error!(%error, "the control plane's own certificate could not be renewed");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }

    /// The TLS configuration that shows it.
    ///
    /// # Errors
    /// Those of rustls.
    pub fn config(self: &Arc<Self>) -> Result<Arc<ServerConfig>, TlsError> {
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(Arc::new(AnyClient(provider())))
            .with_cert_resolver(Arc::clone(self) as _);
        config.alpn_protocols = vec![b"h2".to_vec()];
        // A resumed session would carry the client's former certificate.
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        Ok(Arc::new(config))
    }
}

fn issue(authority: &Authority, identity: &SpiffeId) -> Result<Arc<CertifiedKey>, TlsError> {
    let pair = KeyPair::generate()?;
    let key = ProvenKey::of_pair(&pair)?;
    let signed = authority.sign_names(&key, identity, &[DNS_NAME], SystemTime::now())?;
    let private = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(pair.serialize_der()));
    let signing = aws_lc_rs::sign::any_ecdsa_type(&private)?;
    Ok(Arc::new(CertifiedKey::new(signed.chain, signing)))
}

/// Takes any client certificate whose key the client has: whether it is ours is judged after the handshake, so that a
/// client with an expired one gets an answer that says so, and may still join with a token.
#[derive(Debug)]
struct AnyClient(Arc<CryptoProvider>);

impl ClientCertVerifier for AnyClient {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.3 only".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// Accepts TLS on the gRPC port, and says who the client is.
pub struct Terminator {
    acceptor: TlsAcceptor,
    authority: Arc<Authority>,
    refusals: Arc<Refusals>,
}

impl std::fmt::Debug for Terminator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Terminator").finish_non_exhaustive()
    }
}

impl Terminator {
    /// Shows `cert`, and judges clients by the bundle of its authority.
    ///
    /// # Errors
    /// Those of rustls.
    pub fn new(cert: &Arc<ServerCert>, refusals: Arc<Refusals>) -> Result<Self, TlsError> {
        Ok(Self { acceptor: TlsAcceptor::from(cert.config()?), authority: Arc::clone(&cert.authority), refusals })
    }

    /// One handshake. A client certificate that is expired or foreign is in [`Peer::rejected`], the log and status.
    ///
    /// # Errors
    /// Those of the connection and of TLS.
    pub async fn accept(&self, io: TcpStream) -> io::Result<(TlsStream<TcpStream>, Peer)> {
        let (address, local) = (io.peer_addr()?, io.local_addr()?);
        let io = self.acceptor.accept(io).await?;
        let mut peer = Peer { address, local, chain: None, rejected: None };
        if let Some(shown) = io.get_ref().1.peer_certificates() {
            let algorithms = aws_lc_rs::default_provider().signature_verification_algorithms.all;
            match chain::verify(shown, self.authority.bundle(), Usage::Client, algorithms, UnixTime::now()) {
                Ok(_) => peer.chain = Some(shown.iter().map(|der| der.clone().into_owned()).collect()),
                Err(error) => {
                    let claimed = chain::describe(shown).ok().and_then(|described| described.identity.ok());
                    let caller = claimed.map_or_else(|| address.to_string(), |id| format!("{id} ({address})"));
                    self.refusals.record("connect", &caller, &error.to_string());
                    peer.rejected = Some(error.to_string().into());
                }
            }
        }
        Ok((io, peer))
    }
}
