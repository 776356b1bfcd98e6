//! Certificate chains of the mesh: which root one ends at, until when it is valid, whose it is.
//!
//! The one implementation for both sides of a connection between sidecars, and for the control plane. No clock and no
//! cryptography of its own: the time and the signature algorithms are arguments.

use std::fmt;

use rustls_pki_types::{CertificateDer, SignatureVerificationAlgorithm, TrustAnchor, UnixTime};
use sha2::{Digest, Sha256};
use webpki::{EndEntityCert, KeyUsage};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::spiffe::SpiffeId;

/// SHA-256 of a root certificate's DER, or of a public key (SubjectPublicKeyInfo).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Fingerprint(pub [u8; 32]);

impl Fingerprint {
    /// Of these bytes.
    pub fn of(der: &[u8]) -> Self {
        Self(Sha256::digest(der).into())
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// The trust bundle: roots, any of which a chain may end at.
#[derive(Debug, Clone, Default)]
pub struct Bundle {
    roots: Vec<CertificateDer<'static>>,
    anchors: Vec<TrustAnchor<'static>>,
    ids: Vec<Fingerprint>,
}

impl Bundle {
    /// From the DER of each root; duplicates count once.
    ///
    /// # Errors
    /// When one of them is not a certificate.
    pub fn new(roots: impl IntoIterator<Item = CertificateDer<'static>>) -> Result<Self, ChainError> {
        let mut bundle = Self::default();
        for root in roots {
            let id = Fingerprint::of(&root);
            if bundle.ids.contains(&id) {
                continue;
            }
            let anchor =
                webpki::anchor_from_trusted_cert(&root).map_err(|e| ChainError::Malformed(e.to_string()))?.to_owned();
            bundle.anchors.push(anchor);
            bundle.ids.push(id);
            bundle.roots.push(root);
        }
        Ok(bundle)
    }

    /// DER of each root.
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// Whether this root is (still) trusted.
    pub fn contains(&self, root: &Fingerprint) -> bool {
        self.ids.contains(root)
    }

    /// No root: nobody is trusted.
    pub fn is_empty(&self) -> bool {
        self.roots.is_empty()
    }
}

impl PartialEq for Bundle {
    fn eq(&self, other: &Self) -> bool {
        self.ids == other.ids
    }
}

/// Which side of the connection showed the chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Usage {
    /// The accepting side
    Server,
    /// The connecting side
    Client,
}

/// What a verified chain says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// The leaf's one SPIFFE ID
    pub identity: SpiffeId,
    /// Seconds since the Unix epoch: the latest of the chain
    pub not_before: i64,
    /// Seconds since the Unix epoch: the earliest of the chain
    pub not_after: i64,
    /// The root that it ends at
    pub root: Fingerprint,
    /// The leaf's public key
    pub key: Fingerprint,
}

impl Verified {
    /// Whether the chain is (still) within its time: all of [`verify`]'s verdict that depends on the moment.
    ///
    /// # Errors
    /// `Expired` or `NotYetValid`.
    pub fn valid_at(&self, now: UnixTime) -> Result<(), ChainError> {
        valid(self.not_before, self.not_after, now)
    }
}

fn valid(not_before: i64, not_after: i64, now: UnixTime) -> Result<(), ChainError> {
    let seconds = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
    if seconds > not_after {
        return Err(ChainError::Expired { at: not_after });
    }
    if seconds < not_before {
        return Err(ChainError::NotYetValid { at: not_before });
    }
    Ok(())
}

/// Why a chain is not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// No certificate at all
    #[error("no certificate was presented")]
    Missing,
    /// Not a certificate
    #[error("malformed certificate: {0}")]
    Malformed(String),
    /// Past its `notAfter`; `at` is that, in seconds since the Unix epoch
    #[error("the certificate expired (notAfter {at}, seconds since the epoch)")]
    Expired {
        /// Seconds since the Unix epoch
        at: i64,
    },
    /// Before its `notBefore`
    #[error("the certificate is not valid yet (notBefore {at}, seconds since the epoch): compare the hosts' clocks")]
    NotYetValid {
        /// Seconds since the Unix epoch
        at: i64,
    },
    /// Of no root of the bundle
    #[error("the certificate was not issued by a root of the trust bundle")]
    UntrustedRoot,
    /// Not exactly one SPIFFE ID
    #[error("the certificate names no single workload: {0}")]
    Identity(String),
    /// Anything else that path building refuses
    #[error("the certificate was refused: {0}")]
    Refused(String),
}

/// Verifies a chain (leaf first) against the bundle at a time, for one side of a connection.
///
/// # Errors
/// See [`ChainError`].
pub fn verify(
    chain: &[CertificateDer<'_>],
    bundle: &Bundle,
    usage: Usage,
    algorithms: &[&dyn SignatureVerificationAlgorithm],
    now: UnixTime,
) -> Result<Verified, ChainError> {
    let (leaf, intermediates) = chain.split_first().ok_or(ChainError::Missing)?;
    let described = describe(chain)?;
    // First, so that an expired certificate is called that, whatever else is wrong with its chain.
    valid(described.not_before, described.not_after, now)?;
    let end_entity = EndEntityCert::try_from(leaf).map_err(|e| ChainError::Malformed(e.to_string()))?;
    let key_usage = match usage {
        Usage::Server => KeyUsage::server_auth(),
        Usage::Client => KeyUsage::client_auth(),
    };
    let path = end_entity
        .verify_for_usage(algorithms, &bundle.anchors, intermediates, now, key_usage, None, None)
        .map_err(refusal)?;
    let root = bundle.anchors.iter().position(|anchor| anchor == path.anchor()).and_then(|at| bundle.ids.get(at));
    Ok(Verified {
        identity: described.identity?,
        not_before: described.not_before,
        not_after: described.not_after,
        root: *root.ok_or(ChainError::UntrustedRoot)?,
        key: described.key,
    })
}

fn refusal(error: webpki::Error) -> ChainError {
    match error {
        webpki::Error::UnknownIssuer
        | webpki::Error::InvalidSignatureForPublicKey
        // A root of the same name with a key of another kind.
        | webpki::Error::UnsupportedSignatureAlgorithmForPublicKeyContext(_) => ChainError::UntrustedRoot,
        other => ChainError::Refused(other.to_string()),
    }
}

/// What a chain claims, before anything is verified.
#[derive(Debug)]
pub struct Described {
    /// The leaf's one SPIFFE ID, or why there is none
    pub identity: Result<SpiffeId, ChainError>,
    /// Seconds since the Unix epoch: the latest of the chain
    pub not_before: i64,
    /// Seconds since the Unix epoch: the earliest of the chain
    pub not_after: i64,
    /// The leaf's public key
    pub key: Fingerprint,
}

/// Reads a chain (leaf first) without verifying anything: for showing, and for a proxy's own certificate.
///
/// # Errors
/// When it is empty or a certificate is malformed.
pub fn describe(chain: &[CertificateDer<'_>]) -> Result<Described, ChainError> {
    let (leaf, intermediates) = chain.split_first().ok_or(ChainError::Missing)?;
    let parse = |der| {
        let (rest, certificate): (&[u8], X509Certificate<'_>) =
            X509Certificate::from_der(der).map_err(|e| ChainError::Malformed(e.to_string()))?;
        if rest.is_empty() { Ok(certificate) } else { Err(ChainError::Malformed("trailing bytes".into())) }
    };
    let leaf = parse(leaf)?;
    let mut not_before = leaf.validity().not_before.timestamp();
    let mut not_after = leaf.validity().not_after.timestamp();
    for der in intermediates {
        let validity = parse(der)?.validity().clone();
        not_before = not_before.max(validity.not_before.timestamp());
        not_after = not_after.min(validity.not_after.timestamp());
    }
    Ok(Described { identity: identity(&leaf), not_before, not_after, key: Fingerprint::of(leaf.public_key().raw) })
}

/// Exactly one URI among the subject alternative names, and a SPIFFE ID. Other kinds of names carry no identity here.
fn identity(leaf: &X509Certificate<'_>) -> Result<SpiffeId, ChainError> {
    let san = leaf.subject_alternative_name().map_err(|e| ChainError::Malformed(e.to_string()))?;
    let mut uris = san.iter().flat_map(|san| &san.value.general_names).filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    match (uris.next(), uris.next()) {
        (Some(uri), None) => uri.parse().map_err(|e| ChainError::Identity(format!("{e}"))),
        (None, _) => Err(ChainError::Identity("it has no URI among its subject alternative names".into())),
        (Some(_), Some(_)) => {
            Err(ChainError::Identity("it has several URIs among its subject alternative names".into()))
        }
    }
}
