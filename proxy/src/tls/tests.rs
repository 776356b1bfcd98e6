use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::testing::{TestCa, private};
use super::*;

const WEB: &str = "spiffe://td/ns/demo/sa/web";
const API: &str = "spiffe://td/ns/demo/sa/api";
const SNI: &str = "p80.api.demo.outrigger.internal";
const LIMIT: Duration = Duration::from_secs(20);

type Client = Result<(Dialled<DuplexStream>, Peer), TlsError>;
type Server = Result<(Accepted<DuplexStream>, Peer), TlsError>;

fn address(port: u16) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, 1], port))
}

/// A handshake between whoever the stores are, valid or not, then one byte each way where both sides agree.
async fn meet(client: &Arc<Identity>, server: &Arc<Identity>, expected: &str, port: u16) -> (Client, Server) {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let expected = expected.parse().unwrap();
    let target = Target { address: address(port), sni: SNI, expected: &expected, alpn: &[ALPN_H2] };
    let (mut near, mut far) = tokio::join!(connect(near, client, &target, LIMIT), accept(far, server, LIMIT));
    if let (Ok((near, _)), Ok((far, _))) = (&mut near, &mut far) {
        talk(near, far).await;
    }
    (near, far)
}

/// One byte each way; the client reads the session's ticket with it.
async fn talk(near: &mut Dialled<DuplexStream>, far: &mut Accepted<DuplexStream>) {
    near.write_all(b"?").await.unwrap();
    near.flush().await.unwrap();
    assert_eq!(far.read_u8().await.unwrap(), b'?');
    far.write_all(b"!").await.unwrap();
    far.flush().await.unwrap();
    assert_eq!(near.read_u8().await.unwrap(), b'!');
}

fn id(store: &IdentityStore) -> Arc<Identity> {
    store.last().unwrap()
}

#[tokio::test]
async fn both_sides_know_each_other() {
    let ca = TestCa::new("root");
    let (near, far) = meet(&id(&ca.store(WEB)), &id(&ca.store(API)), API, 1).await;
    let ((near, server), (far, client)) = (near.unwrap(), far.unwrap());
    assert_eq!(server.identity.as_str(), API);
    assert_eq!(client.identity.as_str(), WEB);
    let tls = far.get_ref().1;
    assert_eq!(tls.alpn_protocol(), Some(ALPN_H2));
    assert_eq!(near.get_ref().1.negotiated_key_exchange_group().unwrap().name(), rustls::NamedGroup::X25519MLKEM768);
    let suite = near.get_ref().1.negotiated_cipher_suite().unwrap().suite();
    assert_eq!(suite, rustls::CipherSuite::TLS13_AES_128_GCM_SHA256);
}

#[tokio::test]
async fn another_account_of_the_same_mesh_is_not_the_endpoint() {
    let ca = TestCa::new("root");
    let (near, _) = meet(&id(&ca.store(WEB)), &id(&ca.store(WEB)), API, 1).await;
    let error = near.unwrap_err();
    assert!(matches!(&error, TlsError::PeerIdentity { got, .. } if got.as_str() == WEB), "{error}");
    assert_eq!(error.reason(), outrigger_core::reason::Reason::PeerIdentity);
}

#[tokio::test]
async fn expired_certificates_are_refused_on_either_side() {
    let ca = TestCa::new("root");
    let stale = ca.store(API);
    ca.install(&stale, API, SystemTime::now() - Duration::from_secs(60));
    assert!(stale.current().is_none(), "an expired identity is not used for new connections");
    let (near, _) = meet(&id(&ca.store(WEB)), &id(&stale), API, 1).await;
    assert!(matches!(near, Err(TlsError::Expired(_))), "{near:?}");
    let (_, far) = meet(&id(&stale), &id(&ca.store(API)), API, 1).await;
    assert!(matches!(far, Err(TlsError::Expired(_))), "{far:?}");
}

#[tokio::test]
async fn a_foreign_root_is_refused_on_either_side_even_with_our_root_s_name() {
    let (ours, foreign) = (TestCa::new("root"), TestCa::new("root"));
    let (near, _) = meet(&id(&ours.store(WEB)), &id(&foreign.store(API)), API, 1).await;
    assert!(matches!(near, Err(TlsError::UntrustedRoot)), "{near:?}");
    // A client that trusts the server, but is itself of the foreign root.
    let client = foreign.store(WEB);
    client.trust_only(ours.bundle());
    let (_, far) = meet(&id(&client), &id(&ours.store(API)), API, 1).await;
    assert!(matches!(far, Err(TlsError::UntrustedRoot)), "{far:?}");
}

#[tokio::test]
async fn a_client_without_a_certificate_is_refused() {
    let ca = TestCa::new("root");
    let bundle = Arc::new(arc_swap::ArcSwap::new(Arc::new(ca.bundle())));
    let config = rustls::ClientConfig::builder_with_provider(Arc::clone(provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ServerVerifier(bundle)))
        .with_no_client_auth();
    let (near, far) = tokio::io::duplex(64 * 1024);
    let name = ServerName::try_from(SNI).unwrap();
    let server = id(&ca.store(API));
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let (_, far) = tokio::join!(connector.connect(name, near), accept(far, &server, LIMIT));
    assert!(matches!(far, Err(TlsError::Certificate(_))), "{far:?}");
}

#[tokio::test]
async fn a_certificate_with_no_or_two_identities_is_refused() {
    let ca = TestCa::new("root");
    let client = id(&ca.store(WEB));
    for uris in [&[API, WEB][..], &["https://api.demo"], &[]] {
        let (chain, key) = ca.issue(uris, SystemTime::now() + Duration::from_secs(60));
        // No proxy of ours would serve with it.
        assert!(IdentityStore::new(None).install(chain.clone(), &private(&key), ca.bundle()).is_err());
        let server = ca.store(API);
        server.show(chain, &private(&key));
        let (near, _) = meet(&client, &id(&server), API, 1).await;
        assert!(matches!(near, Err(TlsError::Certificate(_))), "{uris:?}: {near:?}");
    }
}

#[tokio::test]
async fn sessions_are_resumed_by_address() {
    let ca = TestCa::new("root");
    let (client, server) = (id(&ca.store(WEB)), id(&ca.store(API)));
    let resumed = async |port| {
        let (near, far) = meet(&client, &server, API, port).await;
        let (near, far) = (near.unwrap().1.resumed, far.unwrap().1.resumed);
        assert_eq!(near, far);
        near
    };
    assert!(!resumed(1).await);
    assert!(resumed(1).await, "the same address and SNI resumes");
    assert!(!resumed(2).await, "another address behind the same SNI does not");
    assert!(resumed(1).await && resumed(2).await, "each use brought the next ticket");
    let mut known = client.sessions().destinations();
    known.sort();
    assert_eq!(known, [address(1), address(2)]);
}

#[tokio::test]
async fn a_resumed_session_is_judged_by_the_bundle_of_now() {
    let (ca, next) = (TestCa::new("root"), TestCa::new("next"));
    let (web, api) = (ca.store(WEB), ca.store(API));
    let (client, server) = (id(&web), id(&api));
    let (near, far) = meet(&client, &server, API, 1).await;
    assert!(near.is_ok() && far.is_ok());
    // Without the check after the handshake these would pass: a resumed handshake verifies no certificate.
    api.trust_only(next.bundle());
    let (near, far) = meet(&client, &server, API, 1).await;
    assert!(near.is_ok_and(|(_, peer)| peer.resumed), "the client still trusts the root and resumes");
    assert!(matches!(far, Err(TlsError::UntrustedRoot)), "{far:?}");
    api.trust_only(ca.bundle());
    let (near, far) = meet(&client, &server, API, 1).await;
    assert!(near.is_ok() && far.is_ok());
    web.trust_only(next.bundle());
    let (near, far) = meet(&client, &server, API, 1).await;
    // In a full handshake the client's verifier would have refused, and its alert told the server so.
    assert!(!matches!(far, Err(TlsError::UntrustedRoot)), "{far:?}");
    assert!(matches!(near, Err(TlsError::UntrustedRoot)), "{near:?}");
}

#[tokio::test]
async fn tickets_end_with_the_bundle() {
    let (ca, next) = (TestCa::new("root"), TestCa::new("next"));
    let (web, api) = (ca.store(WEB), ca.store(API));
    let client = id(&web);
    let (near, far) = meet(&client, &id(&api), API, 1).await;
    assert!(near.is_ok() && far.is_ok());
    api.set_bundle(Bundle::new([ca.root(), next.root()]).unwrap()).unwrap();
    let (near, far) = meet(&client, &id(&api), API, 1).await;
    assert!(!near.unwrap().1.resumed, "the server's ticket keys are new");
    assert!(!far.unwrap().1.resumed);
    web.set_bundle(Bundle::new([ca.root(), next.root()]).unwrap()).unwrap();
    assert!(id(&web).sessions().destinations().is_empty(), "the client's sessions are new");
}

#[tokio::test]
async fn renewal_keeps_open_connections_and_serves_new_ones_with_the_new_certificate() {
    let ca = TestCa::new("root");
    let (web, api) = (ca.store(WEB), ca.store(API));
    let (near, far) = meet(&id(&web), &id(&api), API, 1).await;
    let ((mut near, _), (mut far, _)) = (near.unwrap(), far.unwrap());
    let mut changes = api.subscribe();
    changes.mark_unchanged();
    let before = id(&api);
    ca.install(&api, API, SystemTime::now() + Duration::from_secs(2000));
    ca.install(&web, WEB, SystemTime::now() + Duration::from_secs(2000));
    assert!(changes.has_changed().unwrap());
    assert!(id(&api).generation() > before.generation());
    talk(&mut near, &mut far).await;
    let (again, _) = meet(&id(&web), &id(&api), API, 1).await;
    let (again, peer) = again.unwrap();
    assert!(!peer.resumed);
    let shown = again.get_ref().1.peer_certificates().unwrap().to_vec();
    assert_eq!(shown, id(&api).chain());
    assert_ne!(shown, before.chain());
}

#[tokio::test]
async fn a_peer_ends_with_its_certificate_or_its_root() {
    let (ca, next) = (TestCa::new("root"), TestCa::new("next"));
    let (web, api) = (ca.store(WEB), ca.store(API));
    let (near, _) = meet(&id(&web), &id(&api), API, 1).await;
    let peer = near.unwrap().1;
    assert_eq!(peer.ended_at(&web.bundle(), Instant::now()), None);
    assert_eq!(peer.ended_at(&web.bundle(), Instant::now() + Duration::from_secs(1801)), Some(Ended::Expired));
    let waiting = peer.ended(&web);
    tokio::pin!(waiting);
    assert!(futures_util::poll!(&mut waiting).is_pending());
    web.set_bundle(Bundle::new([ca.root(), next.root()]).unwrap()).unwrap();
    assert!(futures_util::poll!(&mut waiting).is_pending(), "a bundle that gains a root ends nothing");
    web.set_bundle(next.bundle()).unwrap();
    assert_eq!(waiting.await, Ended::RootDropped);
}

#[tokio::test]
async fn a_peer_that_says_nothing_ends_in_time() {
    let ca = TestCa::new("root");
    let (_near, far) = tokio::io::duplex(1024);
    let result = accept(far, &id(&ca.store(API)), Duration::from_millis(1)).await;
    assert!(matches!(result, Err(TlsError::Timeout)), "{result:?}");
}
