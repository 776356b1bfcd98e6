//! Why mesh TLS failed, and what a client of the proxy is told.

use std::io;

use outrigger_core::chain::ChainError;
use outrigger_core::reason::Reason;
use outrigger_core::spiffe::SpiffeId;
use rustls::{AlertDescription, CertificateError};

/// Why a mesh connection was not made.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// This proxy has no valid certificate
    #[error("this proxy has no valid certificate")]
    NoIdentity,
    /// The peer is someone else
    #[error("the peer is {got}, not {expected}")]
    PeerIdentity {
        /// Who should have answered
        expected: SpiffeId,
        /// Who did
        got: SpiffeId,
    },
    /// The peer's certificate is outside its validity
    #[error("the peer's certificate is not valid now: {0}")]
    Expired(String),
    /// The peer's certificate is of no root of the bundle
    #[error("the peer's certificate was not issued by a root of the trust bundle")]
    UntrustedRoot,
    /// The peer's certificate is missing, malformed, or names no workload
    #[error("the peer's certificate: {0}")]
    Certificate(String),
    /// The SNI is not a host name
    #[error("`{0}` cannot be sent as SNI")]
    Name(String),
    /// The handshake failed otherwise
    #[error("TLS handshake: {0}")]
    Handshake(#[source] rustls::Error),
    /// The connection failed
    #[error("TLS handshake: {0}")]
    Io(#[source] io::Error),
    /// It took too long
    #[error("the TLS handshake took too long")]
    Timeout,
}

impl TlsError {
    /// The reason of the response to a client whose request needed this connection.
    pub fn reason(&self) -> Reason {
        match self {
            Self::NoIdentity => Reason::IdentityUnavailable,
            Self::PeerIdentity { .. } | Self::Expired(_) | Self::UntrustedRoot | Self::Certificate(_) => {
                Reason::PeerIdentity
            }
            Self::Timeout => Reason::ConnectTimeout,
            Self::Name(_) | Self::Handshake(_) | Self::Io(_) => Reason::ConnectFailure,
        }
    }

    /// For `outrigger_tls_failures_total{cause}`: a fixed set of words.
    pub fn cause(&self) -> &'static str {
        match self {
            Self::NoIdentity => "no-identity",
            Self::PeerIdentity { .. } => "peer-identity",
            Self::Expired(_) => "expired",
            Self::UntrustedRoot => "untrusted-root",
            Self::Certificate(_) => "certificate",
            Self::Name(_) => "name",
            Self::Handshake(_) => "handshake",
            Self::Io(_) => "io",
            Self::Timeout => "timeout",
        }
    }
}

impl From<ChainError> for TlsError {
    fn from(error: ChainError) -> Self {
        match error {
            ChainError::Expired { .. } | ChainError::NotYetValid { .. } => Self::Expired(error.to_string()),
            ChainError::UntrustedRoot => Self::UntrustedRoot,
            ChainError::Missing | ChainError::Malformed(_) | ChainError::Identity(_) | ChainError::Refused(_) => {
                Self::Certificate(error.to_string())
            }
        }
    }
}

impl From<rustls::Error> for TlsError {
    fn from(error: rustls::Error) -> Self {
        match error {
            rustls::Error::NoCertificatesPresented => Self::Certificate("none was presented".into()),
            rustls::Error::InvalidCertificate(CertificateError::Expired) => Self::Expired("it has expired".into()),
            rustls::Error::InvalidCertificate(CertificateError::NotValidYet) => {
                Self::Expired("it is not valid yet; compare the hosts' clocks".into())
            }
            rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => Self::UntrustedRoot,
            rustls::Error::InvalidCertificate(CertificateError::Other(other)) => {
                match other.0.downcast_ref::<ChainError>() {
                    Some(chain) => chain.clone().into(),
                    None => Self::Certificate(format!("{other}")),
                }
            }
            // What the peer thinks of *our* certificate; ours is then as good as none.
            rustls::Error::AlertReceived(AlertDescription::CertificateExpired) => {
                Self::Expired("the peer says that ours has expired".into())
            }
            rustls::Error::AlertReceived(AlertDescription::UnknownCA) => Self::UntrustedRoot,
            other => Self::Handshake(other),
        }
    }
}

impl From<io::Error> for TlsError {
    fn from(error: io::Error) -> Self {
        match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            Some(tls) => tls.clone().into(),
            None => Self::Io(error),
        }
    }
}
