//! Start and stop, in order: state, sources read once, then the listeners.

use std::fs::File;
use std::future::Future;
use std::io::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use outrigger_core::compile::Client;
use outrigger_core::key::Key;
use outrigger_proto::control::certificates_server::CertificatesServer;
use outrigger_proto::control::modules_server::ModulesServer;
use outrigger_proto::control::registry_server::RegistryServer;
use outrigger_proto::discovery::aggregated_discovery_service_server::AggregatedDiscoveryServiceServer;
use outrigger_proto::{mesh as wire, type_url};
use prost::Message;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::service::Routes;

use crate::api::{self, Api};
use crate::ca::Authority;
use crate::certificates::{Signer, unix_now};
use crate::discovery::Discovery;
use crate::flags::Flags;
use crate::grants::Grants;
use crate::mesh::{Mesh, Settings};
use crate::metrics::Metrics;
use crate::modules::remote::{Fetcher, Hosts};
use crate::proxies::Proxies;
use crate::refusals::Refusals;
use crate::reports::Reports;
use crate::tls::{ServerCert, Terminator};
use crate::token::{NewToken, Tokens};
use crate::{durable, modules, registry, server};

/// Streams are told to end at once; what has not ended after this is cut.
const STOP: Duration = Duration::from_secs(3);

/// A control plane that serves.
#[derive(Debug)]
pub struct Control {
    /// Where gRPC is served
    pub grpc: SocketAddr,
    /// Where the HTTP API is served
    pub http: SocketAddr,
    /// What it serves
    pub mesh: Arc<Mesh>,
    stop: watch::Sender<bool>,
    grpc_task: tokio::task::JoinHandle<Result<(), tonic::transport::Error>>,
    http_task: tokio::task::JoinHandle<std::io::Result<()>>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
    _lock: File,
}

/// Runs the binary until `stop`.
///
/// # Errors
/// What kept it from starting, or ended it.
pub async fn run(flags: Flags, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
    let mut control = Control::start(&flags).await?;
    let now = control.mesh.now();
    // A broken pipe is no reason to end.
    let _ = writeln!(
        std::io::stdout(),
        "outrigger-control is ready: gRPC on {}, HTTP API on http://{}, trust domain {}, {} resources from {} ({} rejected)",
        control.grpc,
        control.http,
        flags.trust_domain,
        now.catalog.resources().count(),
        flags.config.display(),
        now.accepted.rejected.len()
    );
    tokio::select! {
        () = stop => tracing::info!("stopping"),
        ended = &mut control.grpc_task => ended?.context("the gRPC server ended")?,
        ended = &mut control.http_task => ended?.context("the HTTP server ended")?,
    }
    control.stop().await;
    Ok(())
}

impl Control {
    /// Starts everything; returns when streams are accepted.
    ///
    /// # Errors
    /// What kept it from starting.
    pub async fn start(flags: &Flags) -> anyhow::Result<Self> {
        let state = &flags.state;
        durable::directory(state).with_context(|| format!("--state {}", state.display()))?;
        let lock = lock(state)?;
        let authority = Arc::new(authority(flags)?);
        let tokens = Arc::new(Tokens::open(state, !flags.no_bootstrap_token)?);
        let grants = Arc::new(Grants::open(state).context("reading what was granted to certificates")?);
        let admin_token = api::admin_token(state).context("the administrator's token")?;
        let settings = Settings {
            config: flags.config.clone(),
            state: state.clone(),
            trust_domain: flags.trust_domain.clone(),
            lease: flags.lease,
        };
        let roots = authority.bundle().roots().iter().map(|der| Bytes::copy_from_slice(der)).collect();
        let (mesh, changes) = tokio::task::spawn_blocking(move || Mesh::open(settings, roots)).await??;

        let metrics = Metrics::default();
        let (proxies, refusals) = (Arc::new(Proxies::default()), Arc::new(Refusals::default()));
        let listening = proxies.clone();
        mesh.listen(move |touched| listening.tell(touched));
        let reports = Arc::<Reports>::default();
        let (stop, stopping) = watch::channel(false);
        let signer = Signer {
            authority: authority.clone(),
            tokens: tokens.clone(),
            grants: grants.clone(),
            refusals: refusals.clone(),
            metrics: metrics.clone(),
        };
        let discovery = Discovery {
            mesh: mesh.clone(),
            proxies: proxies.clone(),
            refusals: refusals.clone(),
            metrics: metrics.clone(),
            stopping: stopping.clone(),
        };
        let registry = registry::Service {
            mesh: mesh.clone(),
            proxies: proxies.clone(),
            refusals: refusals.clone(),
            grants: grants.clone(),
            reports: reports.clone(),
        };
        let modules = modules::Service { mesh: mesh.clone(), refusals: refusals.clone() };
        let routes = Routes::new(AggregatedDiscoveryServiceServer::new(discovery))
            .add_service(RegistryServer::new(registry))
            .add_service(ModulesServer::new(modules))
            .add_service(CertificatesServer::new(signer));
        let issuer = Issuer { authority: authority.clone(), tokens, grants };
        let api = Api {
            mesh: mesh.clone(),
            proxies,
            refusals: refusals.clone(),
            metrics,
            authority: Arc::new(issuer),
            reports,
            admin_token,
        };

        let certificate = ServerCert::new(authority.clone())?;
        let fetcher = Fetcher::new(hosts(flags)).context("a client for modules on other hosts")?;
        let grpc = bind("--grpc", flags.grpc).await?;
        let http = bind("--http", flags.http).await?;
        let (grpc_address, http_address) = (grpc.local_addr()?, http.local_addr()?);
        let terminator = Arc::new(Terminator::new(&certificate, refusals)?);
        let grpc_task = tokio::spawn(server::serve(grpc, terminator, routes, told(stopping.clone())));
        let http_task =
            tokio::spawn(async move { axum::serve(http, api.router()).with_graceful_shutdown(told(stopping)).await });
        let tasks = vec![
            tokio::spawn(mesh.clone().run(changes)),
            tokio::spawn(modules::follow::follow(mesh.clone(), fetcher)),
            tokio::spawn(certificate.run()),
            tokio::spawn(follow_lifetime(mesh.clone(), authority)),
        ];
        Ok(Self { grpc: grpc_address, http: http_address, mesh, stop, grpc_task, http_task, tasks, _lock: lock })
    }

    /// Ends every stream, then the servers.
    pub async fn stop(mut self) {
        self.stop.send_replace(true);
        let ended = async {
            let _ = (&mut self.grpc_task).await;
            let _ = (&mut self.http_task).await;
        };
        if tokio::time::timeout(STOP, ended).await.is_err() {
            tracing::warn!("some calls did not end in time");
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.grpc_task.abort();
        self.http_task.abort();
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// The one of the files that are named, or the control plane's own.
fn authority(flags: &Flags) -> anyhow::Result<Authority> {
    let state = &flags.state;
    let (Some(cert), Some(key)) = (&flags.ca_cert, &flags.ca_key) else {
        return Ok(Authority::open(state, &flags.trust_domain)?);
    };
    let authority = Authority::from_files(cert, key, &flags.trust_domain)?;
    authority.publish_roots(state).with_context(|| format!("writing roots to {}", state.display()))?;
    Ok(authority)
}

fn hosts(flags: &Flags) -> Hosts {
    Hosts {
        credentials: flags.registry_config.clone(),
        roots: flags.registry_ca.clone(),
        plain: flags.registry_plain_http.clone(),
    }
}

/// Two control planes on one state directory would overwrite each other's registrations and grants.
fn lock(state: &Path) -> anyhow::Result<File> {
    let path = state.join("lock");
    let file = File::create(&path).with_context(|| path.display().to_string())?;
    file.try_lock().with_context(|| format!("--state {}: another control plane uses it", state.display()))?;
    Ok(file)
}

/// Resolves when the control plane stops.
pub(crate) async fn told(mut stopping: watch::Receiver<bool>) {
    // An error is the end of the sender: that is a stop, too.
    let _ = stopping.wait_for(|stop| *stop).await;
}

async fn bind(flag: &str, address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("{flag} {address}: is another control plane running?"))
}

/// Certificates live as long as MeshConfig says, from its next version on.
async fn follow_lifetime(mesh: Arc<Mesh>, authority: Arc<Authority>) {
    let mut states = mesh.subscribe();
    let client = Client { namespace: String::new(), workload: String::new(), service_account: String::new() };
    loop {
        let now = states.borrow_and_update().clone();
        if let Some(found) = now.answer(type_url::MESH_CONFIG, &Key::Mesh, &client)
            && let Ok(config) = wire::MeshConfig::decode(found.bytes.clone())
        {
            authority.set_lifetime(Duration::from_millis(config.certificate_lifetime_ms));
        }
        if states.changed().await.is_err() {
            return;
        }
    }
}

/// The authority and its tokens, as the API shows them.
struct Issuer {
    authority: Arc<Authority>,
    tokens: Arc<Tokens>,
    grants: Arc<Grants>,
}

impl api::Authority for Issuer {
    fn certificates(&self) -> Value {
        let roots = self.authority.bundle().roots().iter().map(|der| {
            let validity = x509_parser::parse_x509_certificate(der).map(|(_, root)| root.validity().clone());
            json!({
                "sha256": outrigger_core::chain::Fingerprint::of(der).to_string(),
                "notBefore": validity.as_ref().map(|validity| validity.not_before.timestamp()).ok(),
                "notAfter": validity.as_ref().map(|validity| validity.not_after.timestamp()).ok(),
            })
        });
        let granted = self.grants.list().into_iter().map(|(key, grant)| json!({ "key": key, "grant": grant }));
        json!({
            "certificates": granted.collect::<Vec<_>>(),
            "trustDomain": self.authority.trust_domain(),
            "lifetimeMs": u64::try_from(self.authority.lifetime().as_millis()).unwrap_or(u64::MAX),
            "roots": roots.collect::<Vec<_>>(),
        })
    }

    fn create_token(&self, request: Value) -> Result<Value, String> {
        let new: NewToken = serde_json::from_value(request).map_err(|error| error.to_string())?;
        let token = self.tokens.create(&new, unix_now()).map_err(|error| error.to_string())?;
        Ok(json!({ "token": token }))
    }
}
