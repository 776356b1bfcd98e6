//! The certificate authority: a root of its own, or the one that `--ca-cert --ca-key` name.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use outrigger_core::chain::{Bundle, ChainError, Fingerprint};
use outrigger_core::spiffe::SpiffeId;
use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData, SanType, SerialNumber, SubjectPublicKeyInfo,
};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use time::OffsetDateTime;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::durable;

/// The root certificate in the state directory, for `--ca-file` of proxies.
pub const ROOT: &str = "root.pem";
const ROOT_KEY: &str = "root-key.pem";
/// For hosts whose clocks lag.
const BACKDATED: Duration = Duration::from_secs(300);
const ROOT_LIFE: Duration = Duration::from_secs(10 * 365 * 86_400);
/// A workload certificate's life when `MeshConfig` says nothing.
pub const DEFAULT_LIFETIME: Duration = Duration::from_secs(86_400);
/// Signed by ecdsa-with-SHA256: the one algorithm of a CSR that is accepted.
const ECDSA_SHA256: &str = "1.2.840.10045.4.3.2";

/// Why the authority cannot work, or cannot sign.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// A file
    #[error("{path}: {error}")]
    File {
        /// The file
        path: String,
        /// What is wrong with it
        error: String,
    },
    /// What `--ca-cert` names
    #[error("--ca-cert {path}: {error}")]
    Chain {
        /// The file
        path: String,
        /// What is wrong, and the remedy
        error: String,
    },
    /// The request
    #[error("the CSR is refused: {0}; send a PKCS #10 request for an ECDSA P-256 key, signed by that key with SHA-256")]
    Csr(String),
    /// The authority itself
    #[error("the authority's certificate ends before a new one would begin: replace it")]
    AuthorityExpired,
    /// rcgen
    #[error("signing: {0}")]
    Sign(#[from] rcgen::Error),
    /// A root that cannot be read
    #[error(transparent)]
    Root(#[from] ChainError),
}

/// Signs workload certificates. Prepared once; [`sign`](Self::sign) takes no lock.
#[derive(Debug)]
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// Sent after each leaf: the certificates between it and the root.
    intermediates: Vec<CertificateDer<'static>>,
    bundle: Bundle,
    trust_domain: String,
    /// End of the issuing certificate, seconds since the Unix epoch.
    not_after: i64,
    lifetime_ms: AtomicU64,
}

/// A signed certificate.
#[derive(Debug, Clone)]
pub struct Signed {
    /// Leaf first, without the root
    pub chain: Vec<CertificateDer<'static>>,
    /// Seconds since the Unix epoch
    pub not_before: i64,
    /// Seconds since the Unix epoch
    pub not_after: i64,
    /// The public key that was signed
    pub key: Fingerprint,
}

/// A public key whose owner proved to have the private one.
#[derive(Debug)]
pub struct ProvenKey(SubjectPublicKeyInfo);

impl ProvenKey {
    /// The key of a CSR, after its signature was verified. Nothing else of the CSR is looked at.
    ///
    /// # Errors
    /// [`CaError::Csr`].
    pub fn of_csr(der: &[u8]) -> Result<Self, CaError> {
        let bad = |what: &str| CaError::Csr(what.to_owned());
        let (rest, csr) = X509CertificationRequest::from_der(der).map_err(|_| bad("it is not PKCS #10"))?;
        if !rest.is_empty() {
            return Err(bad("bytes follow it"));
        }
        if csr.signature_algorithm.algorithm.to_id_string() != ECDSA_SHA256 {
            return Err(bad("its signature is not ECDSA with SHA-256"));
        }
        let info = &csr.certification_request_info;
        let key = SubjectPublicKeyInfo::from_der(info.subject_pki.raw).map_err(|_| bad("its key is not usable"))?;
        if key.algorithm() != &rcgen::PKCS_ECDSA_P256_SHA256 {
            return Err(bad("its key is not ECDSA P-256"));
        }
        aws_lc_rs::signature::UnparsedPublicKey::new(&aws_lc_rs::signature::ECDSA_P256_SHA256_ASN1, key.der_bytes())
            .verify(info.raw, &csr.signature_value.data)
            .map_err(|_| bad("it is not signed by its key"))?;
        Ok(Self(key))
    }

    /// The key of a pair that is ours.
    pub fn of_pair(pair: &KeyPair) -> Result<Self, CaError> {
        Ok(Self(SubjectPublicKeyInfo::from_der(&pair.subject_public_key_info())?))
    }

    /// Of the SubjectPublicKeyInfo.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.0.subject_public_key_info())
    }
}

impl Authority {
    /// The authority of the state directory; made there at the first start.
    ///
    /// # Errors
    /// When its files cannot be read or written.
    pub fn open(state: &Path, trust_domain: &str) -> Result<Self, CaError> {
        let (cert, key) = (state.join(ROOT), state.join(ROOT_KEY));
        if !key.exists() {
            let file = |path: &Path| {
                let path = path.display().to_string();
                move |e: std::io::Error| CaError::File { path, error: e.to_string() }
            };
            if cert.exists() {
                // root.pem also holds the roots of `--ca-cert`; a new root must not silently replace one in use.
                return Err(CaError::File {
                    path: key.display().to_string(),
                    error: "missing, while root.pem is there: restore it, start with --ca-cert and --ca-key, or move \
                            root.pem away to make a new root (every proxy must then be given it)"
                        .into(),
                });
            }
            let pair = KeyPair::generate()?;
            let root = root_params(trust_domain).self_signed(&pair)?;
            durable::directory(state).map_err(file(state))?;
            // The certificate last: without it the next start begins again.
            durable::write(&key, pair.serialize_pem().as_bytes(), 0o600).map_err(file(&key))?;
            durable::write(&cert, root.pem().as_bytes(), 0o644).map_err(file(&cert))?;
            tracing::info!(root = %cert.display(), trust_domain, "made a root certificate");
        }
        Self::from_files(&cert, &key, trust_domain)
    }

    /// An authority of one's own: `cert` has the issuing certificate first, then those up to and including the root.
    ///
    /// # Errors
    /// When the files do not make an authority; the message has the remedy.
    pub fn from_files(cert: &Path, key: &Path, trust_domain: &str) -> Result<Self, CaError> {
        let wrong = |error: &str| CaError::Chain { path: cert.display().to_string(), error: error.to_owned() };
        let chain: Vec<CertificateDer<'static>> =
            CertificateDer::pem_file_iter(cert).and_then(Iterator::collect).map_err(|e| wrong(&e.to_string()))?;
        let file = |error: String| CaError::File { path: key.display().to_string(), error };
        let pem = std::fs::read_to_string(key).map_err(|e| file(e.to_string()))?;
        let pair = KeyPair::from_pem(&pem).map_err(|e| file(e.to_string()))?;
        let parsed = chain
            .iter()
            .map(|der| X509Certificate::from_der(der).map(|(_, parsed)| parsed))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| wrong(&e.to_string()))?;
        let first = parsed.first().ok_or_else(|| wrong("it has no PEM block `CERTIFICATE`"))?;
        if first.public_key().raw != pair.subject_public_key_info().as_slice() {
            return Err(wrong(
                "its first certificate is not of the key in --ca-key: put the issuing certificate first",
            ));
        }
        if parsed.iter().any(|certificate| !certificate.is_ca()) {
            return Err(wrong("a certificate in it is not of an authority (basicConstraints CA:TRUE)"));
        }
        if parsed.windows(2).any(|pair| matches!(pair, [child, parent] if child.issuer() != parent.subject())) {
            return Err(wrong("its certificates are out of order: each must be followed by its issuer"));
        }
        if parsed.last().is_some_and(|last| last.issuer() != last.subject()) {
            return Err(wrong("it does not end at a root: append the certificates up to the self-signed one"));
        }
        let not_after = parsed.iter().map(|c| c.validity().not_after.timestamp()).min().unwrap_or(0);
        let (root, intermediates) = chain.split_last().ok_or_else(|| wrong("it is empty"))?;
        let issuing = chain.first().ok_or_else(|| wrong("it is empty"))?;
        Ok(Self {
            issuer: Issuer::from_ca_cert_der(issuing, pair)?,
            intermediates: intermediates.to_vec(),
            bundle: Bundle::new([root.clone()])?,
            trust_domain: trust_domain.to_owned(),
            not_after,
            lifetime_ms: AtomicU64::new(millis(DEFAULT_LIFETIME)),
        })
    }

    /// Writes the roots to `STATE/root.pem`: for an authority that came from files.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn publish_roots(&self, state: &Path) -> std::io::Result<()> {
        let text: String =
            self.bundle.roots().iter().map(|der| pem::encode(&pem::Pem::new("CERTIFICATE", der.to_vec()))).collect();
        durable::directory(state)?;
        durable::write(&state.join(ROOT), text.as_bytes(), 0o644)
    }

    /// The trust bundle: what proxies must trust.
    pub fn bundle(&self) -> &Bundle {
        &self.bundle
    }

    /// The trust domain of every identity it signs.
    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    /// How long certificates live from now on (`certificates.lifetime` of `MeshConfig`); zero is the default.
    pub fn set_lifetime(&self, lifetime: Duration) {
        let lifetime = if lifetime.is_zero() { DEFAULT_LIFETIME } else { lifetime };
        self.lifetime_ms.store(millis(lifetime), Ordering::Relaxed);
    }

    /// How long certificates live.
    pub fn lifetime(&self) -> Duration {
        Duration::from_millis(self.lifetime_ms.load(Ordering::Relaxed))
    }

    /// Signs a key for an identity that the *caller* of this function derived. The identity is the only name.
    ///
    /// # Errors
    /// When the authority has expired, or the signature fails.
    pub fn sign(&self, key: &ProvenKey, identity: &SpiffeId, now: SystemTime) -> Result<Signed, CaError> {
        self.sign_names(key, identity, &[], now)
    }

    /// As [`sign`](Self::sign), with DNS names: for the control plane's own certificate, since gRPC clients other than
    /// our proxies verify names.
    pub(crate) fn sign_names(
        &self,
        key: &ProvenKey,
        identity: &SpiffeId,
        names: &[&str],
        now: SystemTime,
    ) -> Result<Signed, CaError> {
        let uri = Ia5String::try_from(identity.as_str())?;
        let now = OffsetDateTime::from(now);
        // Whole seconds are what a certificate holds.
        let not_before = (now - BACKDATED).unix_timestamp();
        let not_after = (now + self.lifetime()).unix_timestamp().min(self.not_after);
        if not_after <= now.unix_timestamp() {
            return Err(CaError::AuthorityExpired);
        }
        let mut params = CertificateParams::default();
        // Without a subject the SAN is critical (RFC 5280 §4.2.1.6), which rcgen sees to.
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(uri)];
        for name in names {
            params.subject_alt_names.push(SanType::DnsName(Ia5String::try_from(*name)?));
        }
        params.not_before = at(not_before);
        params.not_after = at(not_after);
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(serial()?);
        let leaf = params.signed_by(&key.0, &self.issuer)?;
        let chain = std::iter::once(leaf.der().clone()).chain(self.intermediates.iter().cloned()).collect();
        Ok(Signed { chain, not_before, not_after, key: key.fingerprint() })
    }
}

/// 128 random bits, positive.
fn serial() -> Result<SerialNumber, CaError> {
    let mut bytes = [0_u8; 16];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| rcgen::Error::RingUnspecified)?;
    bytes[0] = bytes[0] & 0x7f | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}

fn root_params(trust_domain: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "Outrigger");
    params.distinguished_name.push(DnType::CommonName, format!("Outrigger root of {trust_domain}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let now = OffsetDateTime::now_utc();
    params.not_before = now - BACKDATED;
    params.not_after = now + ROOT_LIFE;
    params
}

fn at(seconds: i64) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp(seconds).unwrap_or(OffsetDateTime::UNIX_EPOCH)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
