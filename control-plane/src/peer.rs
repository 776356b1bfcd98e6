//! Who is at the other end of a gRPC connection, as the TLS handshake proved it.

use std::net::SocketAddr;
use std::sync::Arc;

use outrigger_core::chain::{self, ChainError, Fingerprint};
use outrigger_core::spiffe::SpiffeId;
use rustls_pki_types::CertificateDer;
use tonic::{Request, Status};

/// In the extensions of every gRPC request.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Where it connects from
    pub address: SocketAddr,
    /// Our end of the connection
    pub local: SocketAddr,
    /// The client's certificate, verified against the bundle, leaf first; `None` when it showed none
    pub chain: Option<Arc<[CertificateDer<'static>]>>,
    /// It showed a certificate that is expired or not of the bundle: why. `chain` is then `None`
    pub rejected: Option<Arc<str>>,
}

/// What the leaf of a verified chain says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leaf {
    /// Its SPIFFE ID
    pub identity: SpiffeId,
    /// Its public key
    pub key: Fingerprint,
    /// When the earliest certificate of the chain ends, seconds since the Unix epoch
    pub not_after: i64,
}

impl Peer {
    /// The client's certificate.
    ///
    /// # Errors
    /// `UNAUTHENTICATED`, when there is none, or none that names a workload of `trust_domain`.
    pub fn leaf(&self, trust_domain: &str) -> Result<Leaf, Status> {
        if let Some(why) = &self.rejected {
            return Err(Status::unauthenticated(format!("{why}: join again with a token")));
        }
        let chain = self.chain.as_deref().ok_or_else(|| {
            Status::unauthenticated("this call needs a client certificate of the mesh: sign one with Certificates.Sign")
        })?;
        let unreadable = |error: ChainError| Status::unauthenticated(error.to_string());
        let described = chain::describe(chain).map_err(unreadable)?;
        let identity = described.identity.map_err(unreadable)?;
        let leaf = Leaf { identity, key: described.key, not_after: described.not_after };
        // It was valid at the handshake, but a connection may outlive it.
        if leaf.not_after < crate::certificates::unix_now() {
            return Err(Status::unauthenticated(
                "the certificate expired while the connection was open: connect again with the renewed one",
            ));
        }
        if leaf.identity.trust_domain() != trust_domain {
            let theirs = leaf.identity.trust_domain();
            return Err(Status::unauthenticated(format!(
                "the certificate is of trust domain {theirs}; this is {trust_domain}"
            )));
        }
        Ok(leaf)
    }

    /// The peer of a request.
    ///
    /// # Errors
    /// `INTERNAL`: the request did not come through our listener.
    pub fn of<T>(request: &Request<T>) -> Result<Self, Status> {
        request.extensions().get::<Self>().cloned().ok_or_else(|| Status::internal("the connection is not known"))
    }
}
