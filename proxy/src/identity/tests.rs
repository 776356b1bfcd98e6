use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Mutex;

use outrigger_proto::control::certificates_server::{Certificates, CertificatesServer};
use outrigger_proto::control::{SignRequest, SignResponse};
use rustls::pki_types::pem::PemObject;
use tokio::net::TcpListener;
use tonic::{Request, Response, Status};

use super::*;
use crate::tls::testing::{TestCa, private};

const WEB: &str = "spiffe://td/ns/demo/sa/web";

fn in_half_an_hour() -> SystemTime {
    SystemTime::now() + Duration::from_secs(1800)
}

fn write_files(directory: &Path, ca: &TestCa) -> IdentityFiles {
    let (chain, key) = ca.issue(&[WEB], in_half_an_hour());
    let files =
        IdentityFiles { cert: directory.join("c.pem"), key: directory.join("k.pem"), ca: directory.join("a.pem") };
    let pem = |der: &CertificateDer<'_>| pem::encode(&pem::Pem::new("CERTIFICATE", der.to_vec()));
    std::fs::write(&files.key, key.serialize_pem()).unwrap();
    std::fs::write(&files.cert, pem(&chain[0])).unwrap();
    std::fs::write(&files.ca, pem(&ca.root())).unwrap();
    files
}

#[test]
fn bad_files_keep_the_old_identity_and_say_which_file() {
    let directory = tempfile::tempdir().unwrap();
    let ca = TestCa::new("root");
    let store = IdentityStore::new(None);
    let files = write_files(directory.path(), &ca);
    let first = files.load(&store).unwrap();
    std::fs::write(&files.cert, "no certificate").unwrap();
    let error = files.load(&store).unwrap_err().to_string();
    assert!(error.contains("c.pem"), "{error}");
    write_files(directory.path(), &ca);
    std::fs::write(&files.key, rcgen::KeyPair::generate().unwrap().serialize_pem()).unwrap();
    assert!(matches!(files.load(&store), Err(IdentityError::Mismatch)));
    assert!(Arc::ptr_eq(&store.current().unwrap(), &first));
    write_files(directory.path(), &ca);
    let second = files.load(&store).unwrap();
    assert!(second.generation() > first.generation());
}

#[tokio::test]
async fn changed_files_are_reloaded() {
    let directory = tempfile::tempdir().unwrap();
    let ca = TestCa::new("root");
    let store = IdentityStore::new(None);
    let files = write_files(directory.path(), &ca);
    let watching = tokio::spawn(super::files::watch_every(files, Arc::clone(&store), Duration::from_millis(5)));
    let first = store.ready().await;
    let mut changes = store.subscribe();
    changes.mark_unchanged();
    write_files(directory.path(), &ca);
    while store.current().unwrap().chain() == first.chain() {
        changes.changed().await.unwrap();
    }
    watching.abort();
}

#[test]
fn saved_state_is_closed_to_others_and_survives_an_interrupted_write() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state");
    let state = StateDir::open(&path).unwrap();
    assert!(state.load().unwrap().is_none());
    let ca = TestCa::new("root");
    let (old, old_key) = ca.issue(&[WEB], in_half_an_hour());
    state.save(&old_key.serialize_pem(), &old, &[ca.root()]).unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&path), 0o700);
    assert_eq!(mode(&path.join("key.pem")), 0o600);
    let resumes = |chain: &[CertificateDer<'static>]| {
        let store = IdentityStore::new(None);
        let identity = super::renew::resume(&store, &state, &enrolment(None)).unwrap();
        assert_eq!(identity.chain(), chain);
        assert_eq!(store.bundle().roots(), [ca.root()]);
    };
    resumes(&old);
    // Stopped after the new key, before its certificate; then after the certificate, before the key took its place.
    let (new, new_key) = ca.issue(&[WEB], in_half_an_hour());
    std::fs::write(path.join("key.next.pem"), new_key.serialize_pem()).unwrap();
    resumes(&old);
    let pem = pem::encode(&pem::Pem::new("CERTIFICATE", new[0].to_vec()));
    std::fs::write(path.join("cert.pem"), pem).unwrap();
    resumes(&new);
    let other = Enrolment { service_account: "other".into(), ..enrolment(None) };
    assert!(super::renew::resume(&IdentityStore::new(None), &state, &other).is_none(), "not another account's");
}

fn enrolment(token_file: Option<std::path::PathBuf>) -> Enrolment {
    Enrolment {
        namespace: "demo".into(),
        service_account: "web".into(),
        workload: "web-0".into(),
        labels: BTreeMap::new(),
        token_file,
    }
}

/// A control plane of few words: signs whatever comes, notes by which credential.
#[derive(Clone)]
struct Control {
    ca: Arc<TestCa>,
    life: Duration,
    seen: Arc<Mutex<Vec<String>>>,
}

/// Whether the client showed a certificate.
#[derive(Clone)]
struct Shown(bool);

struct Io(tokio_rustls::server::TlsStream<tokio::net::TcpStream>);

impl tonic::transport::server::Connected for Io {
    type ConnectInfo = Shown;
    fn connect_info(&self) -> Shown {
        Shown(self.0.get_ref().1.peer_certificates().is_some())
    }
}

impl tokio::io::AsyncRead for Io {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buf: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl tokio::io::AsyncWrite for Io {
    fn poll_write(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buf: &[u8],
    ) -> std::task::Poll<std::io::Result<usize>> {
        std::pin::Pin::new(&mut self.0).poll_write(cx, buf)
    }
    fn poll_flush(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.0).poll_flush(cx)
    }
    fn poll_shutdown(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

#[tonic::async_trait]
impl Certificates for Control {
    async fn sign(&self, request: Request<SignRequest>) -> Result<Response<SignResponse>, Status> {
        let token = request.metadata().get("authorization").map(|value| value.to_str().unwrap().to_owned());
        let certificate = request.extensions().get::<Shown>().unwrap().0.then(|| "certificate".to_owned());
        self.seen.lock().unwrap().push(token.or(certificate).unwrap_or_default());
        let csr = request.into_inner().csr_der.to_vec().into();
        let key = rcgen::CertificateSigningRequestParams::from_der(&csr).unwrap().public_key;
        let now = SystemTime::now();
        let chain = self.ca.sign(&[WEB], &key, now, now + self.life);
        Ok(Response::new(SignResponse {
            chain: chain.iter().map(|der| der.to_vec().into()).collect(),
            roots: vec![self.ca.root().to_vec().into()],
            identity: WEB.into(),
            not_before: 0,
            not_after: 0,
        }))
    }
}

/// Serves on loopback with a certificate for `uri`; returns the address as a URI.
async fn serve(control: Control, uri: &str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (chain, key) = control.ca.issue(&[uri], in_half_an_hour());
    let bundle = Arc::new(ArcSwap::new(Arc::new(control.ca.bundle())));
    let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(
        {
            let mut roots = rustls::RootCertStore::empty();
            roots.add(bundle.load().roots()[0].clone()).unwrap();
            Arc::new(roots)
        },
        Arc::clone(tls::provider()),
    )
    .allow_unauthenticated()
    .build()
    .unwrap();
    let mut config = ServerConfig::builder_with_provider(Arc::clone(tls::provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, private(&key))
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let (sender, connections) = tokio::sync::mpsc::channel::<std::io::Result<Io>>(1);
    tokio::spawn(async move {
        while let Ok((io, _)) = listener.accept().await {
            if let Ok(io) = acceptor.accept(io).await {
                let _ = sender.send(Ok(Io(io))).await;
            }
        }
    });
    tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(CertificatesServer::new(control))
            .serve_with_incoming(tokio_stream::wrappers::ReceiverStream::new(connections)),
    );
    format!("https://{address}")
}

#[tokio::test]
async fn joins_with_the_token_and_renews_with_the_certificate() {
    let directory = tempfile::tempdir().unwrap();
    let token = directory.path().join("token");
    std::fs::write(&token, "joining\n").unwrap();
    let control = Control { ca: Arc::new(TestCa::new("root")), life: Duration::from_secs(2), seen: Arc::default() };
    let seen = Arc::clone(&control.seen);
    let bundle = control.ca.bundle();
    let uri = serve(control, "spiffe://td/ns/outrigger-system/sa/outrigger-control").await;
    let state = StateDir::open(directory.path().join("state")).unwrap();
    let store = IdentityStore::new(Some(state.clone()));
    let channel = Arc::new(ControlPlane::new(&uri, bundle, Arc::clone(&store)).unwrap());
    let mut changes = store.subscribe();
    let running = tokio::spawn(run(Arc::clone(&store), channel, Some(state.clone()), enrolment(Some(token))));
    while seen.lock().unwrap().len() < 3 {
        changes.changed().await.unwrap();
    }
    running.abort();
    assert_eq!(seen.lock().unwrap()[..3], ["Bearer joining", "certificate", "certificate"]);
    let saved = state.load().unwrap().unwrap();
    let key = PrivateKeyDer::from_pem_file(state.path().join("key.pem")).unwrap();
    assert!(IdentityStore::new(None).install(saved.chain, &key, Bundle::default()).is_ok(), "the newest is saved");
}

#[tokio::test]
async fn what_is_not_a_control_plane_gets_no_token() {
    let directory = tempfile::tempdir().unwrap();
    let token = directory.path().join("token");
    std::fs::write(&token, "joining").unwrap();
    let control = Control { ca: Arc::new(TestCa::new("root")), life: Duration::from_secs(60), seen: Arc::default() };
    let (seen, bundle) = (Arc::clone(&control.seen), control.ca.bundle());
    // A workload of the mesh, and a stranger with the right name.
    let workload = serve(control.clone(), WEB).await;
    let stranger = Control { ca: Arc::new(TestCa::new("root")), ..control };
    let stranger = serve(stranger, "spiffe://td/ns/outrigger-system/sa/outrigger-control").await;
    for (uri, words) in [(workload, "not a control plane"), (stranger, "not issued by a root")] {
        let store = IdentityStore::new(None);
        let channel = ControlPlane::new(&uri, bundle.clone(), Arc::clone(&store)).unwrap();
        let error = super::renew::obtain(&store, &channel, None, &enrolment(Some(token.clone()))).await.unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
    }
    assert!(seen.lock().unwrap().is_empty());
    let store = IdentityStore::new(None);
    let error = ControlPlane::new("http://127.0.0.1:1", bundle, store).unwrap_err().to_string();
    assert!(error.contains("https://host:15012"), "{error}");
}
