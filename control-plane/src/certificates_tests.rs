use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use outrigger_core::chain::{self, Fingerprint, Usage};
use outrigger_proto::control::certificates_server::Certificates as _;
use rcgen::{CertificateParams, DnType, KeyPair, SanType};
use rustls_pki_types::UnixTime;
use tonic::Code;

use super::*;

const TD: &str = "cluster.local";

fn signer(state: &Path, bootstrap: bool) -> Signer {
    Signer {
        authority: Arc::new(Authority::open(state, TD).unwrap()),
        tokens: Arc::new(Tokens::open(state, bootstrap).unwrap()),
        grants: Arc::new(Grants::open(state).unwrap()),
        refusals: Arc::default(),
        metrics: Metrics::default(),
    }
}

fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// For demo/a with label app=a.
fn token(signer: &Signer, single_use: bool, now: i64) -> String {
    let new = NewToken {
        namespace: "demo".into(),
        service_account: "a".into(),
        labels: labels(&[("app", "a")]),
        ttl_seconds: 3600,
        single_use,
        addresses: vec!["10.0.0.0/8".into()],
    };
    signer.tokens.create(&new, now).unwrap()
}

/// A CSR that asks for more than its key: none of it may count.
fn csr() -> Vec<u8> {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "root");
    params.subject_alt_names = vec![
        SanType::URI("spiffe://cluster.local/ns/ops/sa/admin".try_into().unwrap()),
        SanType::DnsName("evil.test".try_into().unwrap()),
    ];
    params.serialize_request(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
}

struct Ask<'a> {
    token: Option<&'a str>,
    chain: Option<Vec<CertificateDer<'static>>>,
    rejected: Option<&'a str>,
    account: &'a str,
    workload: &'a str,
    labels: BTreeMap<String, String>,
    csr: Vec<u8>,
}

impl Ask<'_> {
    async fn of(self, signer: &Signer) -> Result<SignResponse, Status> {
        let (namespace, account) = self.account.split_once('/').unwrap();
        let mut request = Request::new(SignRequest {
            csr_der: self.csr.into(),
            namespace: namespace.into(),
            service_account: account.into(),
            workload: self.workload.into(),
            labels: self.labels,
        });
        if let Some(token) = self.token {
            request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        }
        let address = "127.0.0.1:1".parse().unwrap();
        let (chain, rejected) = (self.chain.map(Into::into), self.rejected.map(Into::into));
        request.extensions_mut().insert(Peer { address, local: address, chain, rejected });
        signer.sign(request).await.map(Response::into_inner)
    }
}

fn ask() -> Ask<'static> {
    Ask {
        token: None,
        chain: None,
        rejected: None,
        account: "demo/a",
        workload: "a-0",
        labels: labels(&[("app", "a")]),
        csr: csr(),
    }
}

fn chain_of(response: &SignResponse) -> Vec<CertificateDer<'static>> {
    response.chain.iter().map(|der| CertificateDer::from(der.to_vec())).collect()
}

/// Refused, with a remedy in the message and an entry for status.
fn refused(signer: &Signer, result: Result<SignResponse, Status>, code: Code, words: &str) {
    let status = result.unwrap_err();
    assert_eq!(status.code(), code, "{status}");
    assert!(status.message().contains(words), "`{}` lacks `{words}`", status.message());
    let last = signer.refusals.list().pop().unwrap();
    assert_eq!((last.call, last.reason.as_str()), ("sign", status.message()));
    assert!(last.caller.contains("asking for"), "{}", last.caller);
}

#[tokio::test]
async fn only_the_key_of_a_csr_counts() {
    let state = tempfile::tempdir().unwrap();
    let signer = signer(state.path(), true);
    let token = token(&signer, false, unix_now());
    let response = Ask { token: Some(&token), ..ask() }.of(&signer).await.unwrap();
    assert_eq!(response.identity, "spiffe://cluster.local/ns/demo/sa/a");
    let chain = chain_of(&response);
    let algorithms = rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms.all;
    for usage in [Usage::Server, Usage::Client] {
        let verified = chain::verify(&chain, signer.authority.bundle(), usage, algorithms, UnixTime::now()).unwrap();
        assert_eq!(verified.identity.as_str(), response.identity);
    }
    use x509_parser::prelude::{FromDer, X509Certificate};
    let (_, leaf) = X509Certificate::from_der(&chain[0]).unwrap();
    assert_eq!(leaf.subject().iter().count(), 0, "no subject");
    let san = leaf.subject_alternative_name().unwrap().unwrap();
    assert!(san.critical && san.value.general_names.len() == 1);
    assert!(!leaf.is_ca());
    let now = unix_now();
    assert!((now - 302..=now - 300).contains(&response.not_before), "five minutes back");
    assert!((now + 86_398..=now + 86_400).contains(&response.not_after), "a day by default");
}

#[tokio::test]
async fn what_a_token_does_not_permit_is_refused() {
    let state = tempfile::tempdir().unwrap();
    let signer = signer(state.path(), true);
    let good = token(&signer, false, unix_now());
    let with = |token| Ask { token: Some(token), ..ask() };
    let other = Ask { account: "demo/b", ..with(&good) }.of(&signer).await;
    refused(&signer, other, Code::PermissionDenied, "is for demo/a, not demo/b: make one");
    let outside = Ask { labels: labels(&[("app", "b")]), ..with(&good) }.of(&signer).await;
    refused(&signer, outside, Code::PermissionDenied, "label app=b");
    let extra = Ask { labels: labels(&[("app", "a"), ("tier", "gold")]), ..with(&good) }.of(&signer).await;
    refused(&signer, extra, Code::PermissionDenied, "label tier=gold");
    let expired = token(&signer, false, unix_now() - 3601);
    refused(&signer, with(&expired).of(&signer).await, Code::Unauthenticated, "has expired: make another");
    let (head, signature) = good.rsplit_once('.').unwrap();
    let flip = if signature.starts_with('A') { 'B' } else { 'A' };
    let tampered = format!("{head}.{flip}{}", &signature[1..]);
    refused(&signer, with(&tampered).of(&signer).await, Code::Unauthenticated, "was altered");
    let foreign_state = tempfile::tempdir().unwrap();
    let foreign = token(&self::signer(foreign_state.path(), true), false, unix_now());
    refused(&signer, with(&foreign).of(&signer).await, Code::Unauthenticated, "not one of this control plane");
    refused(&signer, ask().of(&signer).await, Code::Unauthenticated, "neither a join token");
    let nameless = Ask { workload: "", ..with(&good) }.of(&signer).await;
    refused(&signer, nameless, Code::InvalidArgument, "workload");
    assert!(with(&good).of(&signer).await.is_ok(), "the token itself is good");
}

#[tokio::test]
async fn a_csr_must_be_signed_by_its_key() {
    let state = tempfile::tempdir().unwrap();
    let signer = signer(state.path(), true);
    let token = token(&signer, true, unix_now());
    let mut broken = csr();
    *broken.last_mut().unwrap() ^= 1;
    let result = Ask { token: Some(&token), csr: broken, ..ask() }.of(&signer).await;
    refused(&signer, result, Code::InvalidArgument, "CSR");
    let p384 = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
    let p384 = CertificateParams::default().serialize_request(&p384).unwrap().der().to_vec();
    let result = Ask { token: Some(&token), csr: p384, ..ask() }.of(&signer).await;
    refused(&signer, result, Code::InvalidArgument, "P-256");
    let result = Ask { token: Some(&token), ..ask() }.of(&signer).await;
    assert!(result.is_ok(), "a refused CSR does not spend the token");
}

#[tokio::test]
async fn a_single_use_token_is_spent_for_ever() {
    let state = tempfile::tempdir().unwrap();
    let first = signer(state.path(), true);
    let token = token(&first, true, unix_now());
    assert!(Ask { token: Some(&token), ..ask() }.of(&first).await.is_ok());
    refused(&first, Ask { token: Some(&token), ..ask() }.of(&first).await, Code::Unauthenticated, "single use");
    let restarted = signer(state.path(), true);
    let again = Ask { token: Some(&token), ..ask() }.of(&restarted).await;
    refused(&restarted, again, Code::Unauthenticated, "single use");
}

#[tokio::test]
async fn the_unscoped_token_may_be_switched_off_and_never_opens_our_own_identity() {
    let state = tempfile::tempdir().unwrap();
    let on = signer(state.path(), true);
    let token = std::fs::read_to_string(state.path().join("join-token")).unwrap();
    let anything = || Ask { token: Some(&token), account: "ops/x", labels: labels(&[("k", "v")]), ..ask() };
    assert!(anything().of(&on).await.is_ok());
    let own = Ask { account: "outrigger-system/outrigger-control", ..anything() };
    refused(&on, own.of(&on).await, Code::PermissionDenied, "control plane's own");
    let off = signer(state.path(), false);
    assert!(!state.path().join("join-token").exists());
    refused(&off, anything().of(&off).await, Code::Unauthenticated, "--no-bootstrap-token");
}

#[tokio::test]
async fn renewal_is_for_the_same_workload_only_and_survives_a_restart() {
    let state = tempfile::tempdir().unwrap();
    let first = signer(state.path(), true);
    let token = token(&first, true, unix_now());
    let joined = Ask { token: Some(&token), ..ask() }.of(&first).await.unwrap();
    let signer = signer(state.path(), true);
    let holding = || Ask { chain: Some(chain_of(&joined)), ..ask() };
    refused(&signer, Ask { account: "demo/b", ..holding() }.of(&signer).await, Code::PermissionDenied, "not of demo/b");
    refused(&signer, Ask { workload: "a-1", ..holding() }.of(&signer).await, Code::PermissionDenied, "not a-1");
    let outside = Ask { labels: labels(&[("app", "b")]), ..holding() }.of(&signer).await;
    refused(&signer, outside, Code::PermissionDenied, "app=b");
    let renewed = holding().of(&signer).await.unwrap();
    assert_eq!(renewed.identity, joined.identity);
    assert_ne!(renewed.chain, joined.chain);
    // The old certificate serves until it ends; the new one carries the same grant.
    for response in [&joined, &renewed] {
        let key = chain::describe(&chain_of(response)).unwrap().key;
        let check = |workload, labels: &_, address: &str| {
            let address = Some(address.parse().unwrap());
            signer.grants.check(&key, "demo", "a", workload, labels, address, unix_now())
        };
        let app = labels(&[("app", "a")]);
        assert_eq!(check("a-0", &app, "10.1.2.3"), Ok(()));
        assert!(check("a-1", &app, "10.1.2.3").is_err());
        assert!(check("a-0", &labels(&[("app", "b")]), "10.1.2.3").is_err());
        assert!(check("a-0", &app, "192.0.2.1").is_err());
    }
    let unknown = Fingerprint::of(b"no key");
    assert!(signer.grants.get(&unknown, unix_now()).is_err());
    assert!(signer.grants.get(&chain::describe(&chain_of(&joined)).unwrap().key, i64::MAX).is_err(), "it ends");
}

#[tokio::test]
async fn expired_and_foreign_certificates_do_not_renew() {
    let state = tempfile::tempdir().unwrap();
    let signer = signer(state.path(), true);
    let expired = Ask { rejected: Some("the certificate expired"), ..ask() }.of(&signer).await;
    refused(&signer, expired, Code::Unauthenticated, "join again with a token");
    // Verified, but never granted here: as after the state was lost.
    let key = ProvenKey::of_csr(&csr()).unwrap();
    let id = SpiffeId::new(TD, "demo", "a").unwrap();
    let chain = signer.authority.sign(&key, &id, SystemTime::now()).unwrap().chain;
    let result = Ask { chain: Some(chain), ..ask() }.of(&signer).await;
    refused(&signer, result, Code::PermissionDenied, "nothing was granted");
    // It expired while the connection was open.
    signer.authority.set_lifetime(Duration::from_secs(5));
    let past = SystemTime::now() - Duration::from_secs(60);
    let chain = signer.authority.sign(&key, &id, past);
    let result = Ask { chain: Some(chain.unwrap().chain), ..ask() }.of(&signer).await;
    refused(&signer, result, Code::Unauthenticated, "connect again");
}

#[test]
fn secrets_are_closed_to_others_and_the_root_is_kept() {
    let state = tempfile::tempdir().unwrap();
    let path = state.path().join("state");
    let first = signer(&path, true);
    let mode = |name: &str| std::fs::metadata(path.join(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
    for secret in ["root-key.pem", "join-token", "token-key"] {
        assert_eq!(mode(secret), 0o600, "{secret}");
    }
    assert_eq!(signer(&path, true).authority.bundle(), first.authority.bundle());
    std::fs::remove_file(path.join("root-key.pem")).unwrap();
    let error = Authority::open(&path, TD).unwrap_err().to_string();
    assert!(error.contains("restore it"), "{error}");
}

#[test]
fn an_authority_of_one_s_own_may_have_an_intermediate() {
    use rcgen::{BasicConstraints, IsCa, KeyUsagePurpose};
    let directory = tempfile::tempdir().unwrap();
    let params = |name: &str| {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params
    };
    let root = rcgen::CertifiedIssuer::self_signed(params("root"), KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let issuing = params("issuing").signed_by(&key, &root).unwrap();
    let (cert_file, key_file) = (directory.path().join("ca.pem"), directory.path().join("key.pem"));
    std::fs::write(&key_file, key.serialize_pem()).unwrap();
    let open = |text: String| {
        std::fs::write(&cert_file, text).unwrap();
        Authority::from_files(&cert_file, &key_file, TD)
    };
    for (text, remedy) in [
        (issuing.pem(), "append the certificates"),
        (root.pem() + &issuing.pem(), "put the issuing certificate first"),
        (String::new(), "CERTIFICATE"),
    ] {
        let error = open(text).unwrap_err().to_string();
        assert!(error.contains(remedy), "{error}");
    }
    let authority = open(issuing.pem() + &root.pem()).unwrap();
    let id = SpiffeId::new(TD, "demo", "a").unwrap();
    let signed = authority.sign(&ProvenKey::of_csr(&csr()).unwrap(), &id, SystemTime::now()).unwrap();
    assert_eq!(signed.chain.len(), 2);
    assert_eq!(authority.bundle().roots(), [root.der().clone()]);
    let algorithms = rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms.all;
    chain::verify(&signed.chain, authority.bundle(), Usage::Server, algorithms, UnixTime::now()).unwrap();
    authority.publish_roots(&directory.path().join("state")).unwrap();
}

#[test]
fn bodies_of_token_requests_are_checked_by_field() {
    let state = tempfile::tempdir().unwrap();
    let signer = signer(state.path(), true);
    let create = |body| crate::api::Authority::create_token(&signer, body);
    let good = json!({"namespace": "demo", "serviceAccount": "a", "labels": {"app": "a"}, "ttlSeconds": 60, "singleUse": true});
    assert!(create(good).unwrap()["token"].is_string());
    for (body, field) in [
        (json!({"namespace": "demo/x", "serviceAccount": "a", "ttlSeconds": 60}), "namespace"),
        (json!({"namespace": "demo", "serviceAccount": "", "ttlSeconds": 60}), "serviceAccount"),
        (json!({"namespace": "demo", "serviceAccount": "a", "ttlSeconds": 0}), "ttlSeconds"),
        (json!({"namespace": "demo", "serviceAccount": "a", "ttlSeconds": 60, "ttl": 1}), "ttl"),
        (json!({"namespace": "demo", "serviceAccount": "a", "ttlSeconds": 60, "addresses": ["x"]}), "addresses"),
        (json!({"namespace": "outrigger-system", "serviceAccount": "outrigger-control", "ttlSeconds": 60}), "own"),
    ] {
        let error = create(body).unwrap_err();
        assert!(error.contains(field), "{error}");
    }
}
