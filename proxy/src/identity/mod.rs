//! Who this proxy is: key, certificate and trust bundle, where they come from and how they are renewed.
//!
//! The private key is made here and never leaves the host. An [`Identity`] is immutable; [`IdentityStore`] swaps in the
//! next one, and connections made with the last go on.

mod channel;
mod files;
mod renew;
mod state;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::{ArcSwap, ArcSwapOption};
use outrigger_core::chain::{self, Bundle, ChainError};
use outrigger_core::spiffe::SpiffeId;
use rustls::crypto::aws_lc_rs::sign::any_ecdsa_type;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, ServerConfig};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::sync::watch;
use tokio::time::Instant;

pub use channel::{ChannelError, ControlPlane};
pub use files::{IdentityFiles, watch_files};
pub use renew::{Enrolment, run};
pub use state::StateDir;

use crate::tls;

/// Key, certificate and what is derived from them. One generation.
#[derive(Debug)]
pub struct Identity {
    spiffe: SpiffeId,
    not_before: SystemTime,
    not_after: SystemTime,
    deadline: Instant,
    generation: u64,
    key: Arc<CertifiedKey>,
    bundle: Arc<ArcSwap<Bundle>>,
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
    sessions: Arc<tls::Sessions>,
}

impl Identity {
    /// The SPIFFE ID of the certificate.
    pub fn spiffe(&self) -> &SpiffeId {
        &self.spiffe
    }

    /// Start of the certificate's validity.
    pub fn not_before(&self) -> SystemTime {
        self.not_before
    }

    /// End of the certificate's validity.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// Rises with every new certificate or bundle.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Leaf first.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.key.cert
    }

    /// The trust bundle of this moment (not of the moment when this identity was made).
    pub fn bundle(&self) -> arc_swap::Guard<Arc<Bundle>> {
        self.bundle.load()
    }

    pub(crate) fn certified_key(&self) -> &Arc<CertifiedKey> {
        &self.key
    }

    pub(crate) fn server_config(&self) -> &Arc<ServerConfig> {
        &self.server
    }

    pub(crate) fn client_config(&self) -> &Arc<ClientConfig> {
        &self.client
    }

    pub(crate) fn sessions(&self) -> &Arc<tls::Sessions> {
        &self.sessions
    }

    /// `not_after` on the monotonic clock.
    pub(crate) fn deadline(&self) -> Instant {
        self.deadline
    }
}

/// Why key and certificate make no identity.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The certificate
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// The key
    #[error("the private key is not usable: {0}")]
    Key(#[source] rustls::Error),
    /// They are not of one pair
    #[error("the private key does not belong to the certificate")]
    Mismatch,
    /// Configuration of TLS
    #[error("TLS: {0}")]
    Tls(#[source] rustls::Error),
    /// A file
    #[error("{path}: {error}")]
    File {
        /// The file
        path: String,
        /// What is wrong with it
        error: String,
    },
}

/// The current [`Identity`] and trust bundle. One per proxy; readers take no lock.
#[derive(Debug)]
pub struct IdentityStore {
    current: ArcSwapOption<Identity>,
    bundle: Arc<ArcSwap<Bundle>>,
    changed: watch::Sender<u64>,
    /// Serialises writers: a generation is made from the last.
    writing: std::sync::Mutex<()>,
    state: Option<StateDir>,
}

impl IdentityStore {
    /// Empty; `state` is where bundles that arrive later are persisted.
    pub fn new(state: Option<StateDir>) -> Arc<Self> {
        Arc::new(Self {
            current: ArcSwapOption::empty(),
            bundle: Arc::new(ArcSwap::default()),
            changed: watch::Sender::new(0),
            writing: std::sync::Mutex::new(()),
            state,
        })
    }

    /// The identity, while its certificate is valid. To be read for every connection.
    pub fn current(&self) -> Option<Arc<Identity>> {
        self.current.load_full().filter(|identity| Instant::now() < identity.deadline)
    }

    /// As [`current`](Self::current), for a handshake.
    ///
    /// # Errors
    /// [`tls::TlsError::NoIdentity`].
    pub fn required(&self) -> Result<Arc<Identity>, tls::TlsError> {
        self.current().ok_or(tls::TlsError::NoIdentity)
    }

    /// The last identity, even if its certificate has expired: for `/certs`.
    pub fn last(&self) -> Option<Arc<Identity>> {
        self.current.load_full()
    }

    /// The trust bundle.
    pub fn bundle(&self) -> Arc<Bundle> {
        self.bundle.load_full()
    }

    /// The generation; wakes at every change of certificate or bundle.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Waits until there is a valid identity.
    pub async fn ready(&self) -> Arc<Identity> {
        let mut changes = self.subscribe();
        loop {
            if let Some(identity) = self.current() {
                return identity;
            }
            if changes.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Swaps in a new certificate with its key, and the bundle that came with it.
    ///
    /// # Errors
    /// When they do not fit together; the current identity then stays.
    pub fn install(
        &self,
        chain: Vec<CertificateDer<'static>>,
        key: &PrivateKeyDer<'_>,
        bundle: Bundle,
    ) -> Result<Arc<Identity>, IdentityError> {
        let key = any_ecdsa_type(key).map_err(IdentityError::Key)?;
        let key = Arc::new(CertifiedKey::new(chain, key));
        match key.keys_match() {
            Ok(()) => {}
            Err(rustls::Error::InconsistentKeys(_)) => return Err(IdentityError::Mismatch),
            Err(error) => return Err(IdentityError::Key(error)),
        }
        let _writing = self.writing.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let identity = self.build(key)?;
        self.bundle.store(Arc::new(bundle));
        self.publish(Arc::clone(&identity));
        Ok(identity)
    }

    /// Replaces the trust bundle (a `Bundle` resource arrived, or its file changed), and persists it. Sessions and tickets end
    /// with the old one.
    ///
    /// # Errors
    /// When the TLS configuration cannot be rebuilt; the old bundle then stays.
    pub fn set_bundle(&self, bundle: Bundle) -> Result<(), IdentityError> {
        let _writing = self.writing.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if **self.bundle.load() == bundle {
            return Ok(());
        }
        let next = match self.current.load_full() {
            Some(identity) => Some(self.build(Arc::clone(&identity.key))?),
            None => None,
        };
        if let Some(state) = &self.state
            && let Err(error) = state.save_roots(bundle.roots())
        {
            tracing::warn!(%error, "the trust bundle could not be persisted; it is used all the same");
        }
        self.bundle.store(Arc::new(bundle));
        match next {
            Some(identity) => self.publish(identity),
            None => self.changed.send_modify(|generation| *generation += 1),
        }
        Ok(())
    }

    /// The bundle alone, so that a test sees what the check after the handshake does and not new ticket keys.
    #[cfg(test)]
    pub(crate) fn trust_only(&self, bundle: Bundle) {
        self.bundle.store(Arc::new(bundle));
    }

    /// Shows a chain that no store would install.
    #[cfg(test)]
    pub(crate) fn show(&self, chain: Vec<CertificateDer<'static>>, key: &PrivateKeyDer<'_>) {
        let key = Arc::new(CertifiedKey::new(chain, any_ecdsa_type(key).unwrap()));
        let server = Arc::new(self.server_config(&key).unwrap());
        let last = self.last().unwrap();
        self.publish(Arc::new(Identity {
            spiffe: last.spiffe.clone(),
            not_before: last.not_before,
            not_after: last.not_after,
            deadline: last.deadline,
            generation: last.generation + 1,
            key,
            bundle: Arc::clone(&self.bundle),
            server,
            client: Arc::clone(&last.client),
            sessions: Arc::default(),
        }));
    }

    fn publish(&self, identity: Arc<Identity>) {
        let generation = identity.generation;
        self.current.store(Some(identity));
        self.changed.send_replace(generation);
    }

    fn build(&self, key: Arc<CertifiedKey>) -> Result<Arc<Identity>, IdentityError> {
        let described = chain::describe(&key.cert)?;
        let spiffe = described.identity?;
        let not_after = unix(described.not_after);
        let left = not_after.duration_since(SystemTime::now()).unwrap_or_default();
        Ok(Arc::new(Identity {
            spiffe,
            not_before: unix(described.not_before),
            not_after,
            deadline: Instant::now() + left,
            generation: *self.changed.borrow() + 1,
            server: Arc::new(self.server_config(&key)?),
            client: Arc::new(self.client_config(&key)?),
            key,
            bundle: Arc::clone(&self.bundle),
            sessions: Arc::default(),
        }))
    }

    fn server_config(&self, key: &Arc<CertifiedKey>) -> Result<ServerConfig, IdentityError> {
        let mut config = ServerConfig::builder_with_provider(Arc::clone(tls::provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(IdentityError::Tls)?
            .with_client_cert_verifier(Arc::new(tls::ClientVerifier(Arc::clone(&self.bundle))))
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(key))));
        config.alpn_protocols = vec![tls::ALPN_H2.into(), tls::ALPN_HTTP1.into(), tls::ALPN_TCP.into()];
        config.ticketer = tls::ticketer().map_err(IdentityError::Tls)?;
        // Tickets only: no session is kept here, and one ticket replaces the one that a resumption spent.
        config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        config.send_tls13_tickets = 1;
        config.max_early_data_size = 0;
        Ok(config)
    }

    fn client_config(&self, key: &Arc<CertifiedKey>) -> Result<ClientConfig, IdentityError> {
        let mut config = ClientConfig::builder_with_provider(Arc::clone(tls::provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(IdentityError::Tls)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(tls::ServerVerifier(Arc::clone(&self.bundle))))
            .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(key))));
        config.enable_early_data = false;
        // `tls::connect` puts in the store of the address.
        config.resumption = rustls::client::Resumption::disabled();
        Ok(config)
    }
}

fn unix(seconds: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}
