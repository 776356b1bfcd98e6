//! Who is at the other end of a gRPC connection, as the TLS handshake proved it.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::Arc;

use rustls_pki_types::CertificateDer;
use tonic::{Request, Status};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

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

/// A workload's identity: `spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identity {
    /// Trust domain
    pub trust_domain: String,
    /// Namespace
    pub namespace: String,
    /// Service account
    pub service_account: String,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/ns/{}/sa/{}", self.trust_domain, self.namespace, self.service_account)
    }
}

/// Not a SPIFFE ID of a workload.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("`{0}` is not a workload's identity (spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>)")]
pub struct BadIdentity(pub String);

impl FromStr for Identity {
    type Err = BadIdentity;

    fn from_str(text: &str) -> Result<Self, BadIdentity> {
        let parts: Option<Vec<&str>> = text.strip_prefix("spiffe://").map(|rest| rest.split('/').collect());
        match parts.as_deref() {
            Some(&[trust_domain, "ns", namespace, "sa", service_account])
                if ![trust_domain, namespace, service_account].contains(&"") =>
            {
                Ok(Self {
                    trust_domain: trust_domain.to_owned(),
                    namespace: namespace.to_owned(),
                    service_account: service_account.to_owned(),
                })
            }
            _ => Err(BadIdentity(text.to_owned())),
        }
    }
}

/// What the leaf of a verified chain says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leaf {
    /// Its only SAN
    pub identity: Identity,
    /// The public key (SubjectPublicKeyInfo), DER
    pub spki: Vec<u8>,
    /// When it ends, seconds since the Unix epoch
    pub not_after: i64,
}

impl Leaf {
    /// Reads a certificate, which must have exactly one SAN, a workload's SPIFFE ID.
    ///
    /// # Errors
    /// A sentence that says what is wrong with it.
    pub fn read(der: &[u8]) -> Result<Self, String> {
        let (_, certificate) =
            X509Certificate::from_der(der).map_err(|error| format!("the certificate is not X.509: {error}"))?;
        let names = certificate
            .subject_alternative_name()
            .map_err(|error| format!("the certificate's names cannot be read: {error}"))?
            .map(|extension| extension.value.general_names.as_slice())
            .unwrap_or_default();
        let [GeneralName::URI(uri)] = names else {
            return Err("the certificate's SAN is not exactly one SPIFFE ID".to_owned());
        };
        Ok(Self {
            identity: uri.parse().map_err(|error: BadIdentity| error.to_string())?,
            spki: certificate.public_key().raw.to_vec(),
            not_after: certificate.validity().not_after.timestamp(),
        })
    }
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
        let certificate = self.chain.as_deref().and_then(<[_]>::first).ok_or_else(|| {
            Status::unauthenticated("this call needs a client certificate of the mesh: sign one with Certificates.Sign")
        })?;
        let leaf = Leaf::read(certificate).map_err(Status::unauthenticated)?;
        // It was valid at the handshake, but a connection may outlive it.
        if leaf.not_after < crate::certificates::unix_now() {
            return Err(Status::unauthenticated(
                "the certificate expired while the connection was open: connect again with the renewed one",
            ));
        }
        if leaf.identity.trust_domain != trust_domain {
            let theirs = &leaf.identity.trust_domain;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_read_back_as_written() {
        let text = "spiffe://cluster.local/ns/demo/sa/web";
        assert_eq!(text.parse::<Identity>().unwrap().to_string(), text);
        for text in
            ["", "spiffe://td/ns/demo", "spiffe:///ns/demo/sa/web", "spiffe://td/ns//sa/web", "spiffe://td/ns/a/sa/b/c"]
        {
            assert!(text.parse::<Identity>().is_err(), "{text}");
        }
    }
}
