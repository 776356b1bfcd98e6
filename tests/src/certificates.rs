//! Certificates that a test signs itself: expired ones, foreign ones, ones for somebody else.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::string::Ia5String;
use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair, SanType};
use time::OffsetDateTime;

/// An authority whose key the test has.
#[derive(Debug)]
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    key: String,
    /// Itself and those above it, PEM, up to the root
    chain: String,
}

/// A certificate with its key, as files.
#[derive(Debug, Clone)]
pub struct Leaf {
    /// PEM: leaf first, then what is between it and the root
    pub cert: PathBuf,
    /// PEM
    pub key: PathBuf,
}

impl Authority {
    /// A root that nobody trusts yet.
    pub fn root(name: &str) -> Self {
        let key = KeyPair::generate().expect("key");
        let params = authority(name);
        let chain = params.self_signed(&key).expect("self-signed").pem();
        Self { key: key.serialize_pem(), issuer: Issuer::new(params, key), chain }
    }

    /// The authority of a control plane's state directory.
    pub fn of_state(state: &Path) -> Self {
        let read = |name: &str| fs::read_to_string(state.join(name)).expect(name);
        let (chain, key) = (read("root.pem"), read("root-key.pem"));
        let pair = KeyPair::from_pem(&key).expect("key");
        Self { issuer: Issuer::from_ca_cert_pem(&chain, pair).expect("root"), key, chain }
    }

    /// An authority below this one.
    pub fn intermediate(&self, name: &str) -> Self {
        let key = KeyPair::generate().expect("key");
        let params = authority(name);
        let pem = params.signed_by(&key, &self.issuer).expect("signed").pem();
        Self { key: key.serialize_pem(), issuer: Issuer::new(params, key), chain: pem + &self.chain }
    }

    /// Writes what `--ca-cert` and `--ca-key` want: itself first, up to the root, and its key.
    pub fn write(&self, directory: &Path, name: &str) -> Leaf {
        write(directory, name, &self.chain, &self.key)
    }

    /// A certificate of the service account in `namespace/account`, valid for `life` from now; `None`: expired a minute
    /// ago.
    pub fn leaf(&self, directory: &Path, name: &str, account: &str, life: Option<Duration>) -> Leaf {
        let (namespace, account) = account.split_once('/').expect("namespace/account");
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let uri = format!("spiffe://cluster.local/ns/{namespace}/sa/{account}");
        params.subject_alt_names = vec![SanType::URI(Ia5String::try_from(uri).expect("URI"))];
        let now = OffsetDateTime::now_utc();
        params.not_before = now - Duration::from_secs(3600);
        params.not_after = life.map_or(now - Duration::from_secs(60), |life| now + life);
        let key = KeyPair::generate().expect("key");
        let pem = params.signed_by(&key, &self.issuer).expect("signed").pem();
        write(directory, name, &pem, &key.serialize_pem())
    }

    /// A certificate of a server at an address, valid for an hour.
    pub fn server(&self, directory: &Path, name: &str, ip: IpAddr) -> Leaf {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::IpAddress(ip)];
        let now = OffsetDateTime::now_utc();
        params.not_before = now - Duration::from_secs(60);
        params.not_after = now + Duration::from_secs(3600);
        let key = KeyPair::generate().expect("key");
        let pem = params.signed_by(&key, &self.issuer).expect("signed").pem();
        write(directory, name, &pem, &key.serialize_pem())
    }
}

fn authority(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params
}

fn write(directory: &Path, name: &str, cert: &str, key: &str) -> Leaf {
    let leaf = Leaf { cert: directory.join(format!("{name}.pem")), key: directory.join(format!("{name}-key.pem")) };
    fs::write(&leaf.cert, cert).expect("write");
    fs::write(&leaf.key, key).expect("write");
    leaf
}
