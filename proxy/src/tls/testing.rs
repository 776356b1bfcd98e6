//! An authority for tests of whatever needs mesh TLS.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use outrigger_core::chain::Bundle;
use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use crate::identity::IdentityStore;

pub(crate) struct TestCa(CertifiedIssuer<'static, KeyPair>);

impl TestCa {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    pub(crate) fn root(&self) -> CertificateDer<'static> {
        self.0.der().clone()
    }

    pub(crate) fn bundle(&self) -> Bundle {
        Bundle::new([self.root()]).unwrap()
    }

    /// Valid from an hour before `end` until `end`.
    pub(crate) fn issue(&self, uris: &[&str], end: SystemTime) -> (Vec<CertificateDer<'static>>, KeyPair) {
        let key = KeyPair::generate().unwrap();
        (self.sign(uris, &key, end - Duration::from_secs(3600), end), key)
    }

    pub(crate) fn sign(
        &self,
        uris: &[&str],
        key: &impl rcgen::PublicKeyData,
        from: SystemTime,
        end: SystemTime,
    ) -> Vec<CertificateDer<'static>> {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.subject_alt_names = uris.iter().map(|uri| SanType::URI(Ia5String::try_from(*uri).unwrap())).collect();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        (params.not_before, params.not_after) = (from.into(), end.into());
        vec![params.signed_by(key, &self.0).unwrap().der().clone()]
    }

    /// The store of a proxy with this identity, which trusts this authority.
    pub(crate) fn store(&self, uri: &str) -> Arc<IdentityStore> {
        let store = IdentityStore::new(None);
        self.install(&store, uri, SystemTime::now() + Duration::from_secs(1800));
        store
    }

    pub(crate) fn install(&self, store: &IdentityStore, uri: &str, end: SystemTime) {
        let (chain, key) = self.issue(&[uri], end);
        store.install(chain, &private(&key), self.bundle()).unwrap();
    }
}

pub(crate) fn private(key: &KeyPair) -> PrivateKeyDer<'static> {
    PrivatePkcs8KeyDer::from(key.serialize_der()).into()
}
