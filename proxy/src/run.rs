//! Starts a proxy, and ends it: what [`main`](../main.rs) calls with the command line.

use std::future::Future;
use std::io::IsTerminal;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use outrigger_core::chain::Bundle;
use outrigger_core::compile::Client;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, reload};

use crate::admin::{Admin, LogHandle, Surface};
use crate::discovery::{Directory, Discovery, Local, Origin, Remote};
use crate::drain::{self, Drain, Phase};
use crate::filter::{self, Plugins};
use crate::flags::{Settings, Source};
use crate::identity::{self, ControlPlane, Enrolment, IdentityFiles, IdentityStore, StateDir};
use crate::listen;
use crate::log::AccessLog;
use crate::metrics::Metrics;
use crate::register::{self, Register};
use crate::state::{Bound, Proxy};
use crate::upstream::Clusters;
use crate::worker::{self, Listeners};

/// Threads of the runtime that serves no request: discovery, certificates, administration, compiling filters.
const CONTROL_THREADS: usize = 1;

/// Most time for the last lines of the access log.
const LAST_LINES: Duration = Duration::from_secs(1);

/// Runs a proxy until it has drained.
///
/// # Errors
/// What keeps it from starting, with the flag or file to look at.
pub fn run(settings: Settings) -> Result<()> {
    let log = start_log(&settings.log)?;
    run_logged(settings, log, false)
}

/// The same, with a log that is set up already; `log` is its filter. `trace`: what filters call and are called with is told in it, see
/// [`Plugins::traced`].
///
/// # Errors
/// As [`run`].
pub fn run_logged(settings: Settings, log: LogHandle, trace: bool) -> Result<()> {
    raise_descriptors();
    let settings = Arc::new(settings);
    let runtime = Builder::new_multi_thread()
        .worker_threads(CONTROL_THREADS)
        .thread_name("control")
        // Filters are tried on its blocking threads.
        .thread_stack_size(worker::STACK)
        .enable_all()
        .build()
        .context("the control runtime cannot be made")?;
    let started = Started::new(&settings, &runtime, log, trace)?;
    let threads = started.workers;
    runtime.block_on(until_drained(&started.proxy, started.register.as_deref()))?;
    for thread in threads {
        // A worker that panicked has said so; the process ends all the same.
        let _ = thread.join();
    }
    started.proxy.log.flush(LAST_LINES);
    runtime.shutdown_background();
    Ok(())
}

/// A proxy whose listeners are bound and whose tasks run.
struct Started {
    proxy: Arc<Proxy>,
    workers: Vec<std::thread::JoinHandle<()>>,
    register: Option<Arc<Register>>,
}

impl Started {
    fn new(settings: &Arc<Settings>, runtime: &Runtime, log: LogHandle, trace: bool) -> Result<Self> {
        let _entered = runtime.enter();
        let state = settings
            .state
            .as_ref()
            .map(|path| StateDir::open(path).with_context(|| format!("--state {} cannot be used", path.display())));
        let state = state.transpose()?;
        let identity = IdentityStore::new(state.clone());
        let workers = usize::from(settings.workers);
        let inbound = listen::bind(settings.inbound, workers).context("--inbound")?;
        let outbound = listen::bind(settings.outbound, workers).context("--outbound")?;
        let admin = listen::bind(settings.admin, 1).context("--admin")?;
        let health = listen::bind(settings.health, 1).context("--health")?;
        let (directory, wanted) = Directory::new();
        let proxy = Arc::new(Proxy {
            settings: settings.clone(),
            directory: directory.clone(),
            identity: identity.clone(),
            clusters: Clusters::new(),
            metrics: Metrics::new(),
            log: AccessLog::stdout().context("the access log's thread cannot be made")?,
            drain: Drain::new(),
            workers: (0..workers).map(|_| Arc::default()).collect(),
            bound: Bound::default(),
        });
        let inbound_address = address(&inbound)?;
        let _ = proxy.bound.inbound.set(inbound_address);
        let _ = proxy.bound.outbound.set(address(&outbound)?);
        let plugins = plugins(settings, trace)?;
        let (filters, snapshots) = (plugins.clone(), directory.clone());
        proxy.metrics.collect_with(move |text| {
            filter::prometheus(&snapshots.snapshot().filter_rows(&filters), text);
            filters.custom_metrics(text);
        });
        let (origin, register) = origin(settings, &identity, state, inbound_address, &plugins, runtime)?;
        runtime.spawn(
            Discovery {
                directory,
                wanted,
                sink: proxy.clusters.clone(),
                identity,
                plugins: Some(plugins.clone()),
                origin,
                workload: settings.name.clone(),
                namespace: settings.namespace.clone(),
                state: settings.state.clone(),
            }
            .run(),
        );
        let listeners = inbound.into_iter().zip(outbound);
        let listeners = listeners.map(|(inbound, outbound)| Listeners { inbound, outbound }).collect();
        let threads = worker::start(&proxy, listeners).context("a worker cannot be started")?;
        proxy.bound.ready.store(true, Ordering::Release);
        let endpoints = Arc::new(Admin { proxy: proxy.clone(), plugins: Some(plugins), log });
        for (listener, surface) in
            admin.into_iter().map(|l| (l, Surface::Admin)).chain(health.into_iter().map(|l| (l, Surface::Health)))
        {
            runtime.spawn(endpoints.clone().serve(listener, surface));
        }
        say_started(&proxy);
        Ok(Self { proxy, workers: threads, register })
    }
}

fn address(listeners: &[std::net::TcpListener]) -> Result<SocketAddr> {
    listeners.first().context("no listener")?.local_addr().context("a listener has no address")
}

fn say_started(proxy: &Proxy) {
    let settings = &proxy.settings;
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        workload = format!("{}/{}", settings.namespace, settings.name),
        inbound = ?proxy.bound.inbound.get(),
        outbound = ?proxy.bound.outbound.get(),
        admin = %settings.admin,
        health = %settings.health,
        workers = settings.workers,
        "outrigger-proxy started"
    );
}

/// Where filters are compiled to: under --state, or in a directory of this process.
fn plugins(settings: &Settings, trace: bool) -> Result<Arc<Plugins>> {
    let cache = match &settings.state {
        Some(state) => state.join("filters"),
        None => std::env::temp_dir().join(format!("outrigger-{}-{}", nix::unistd::getuid(), std::process::id())),
    };
    let executable = std::env::current_exe().context("the path of this executable")?;
    let settings = filter::Settings { compiler: filter::Compiler::Child(executable), cache };
    let plugins = if trace { Plugins::traced(settings) } else { Plugins::new(settings) };
    Ok(Arc::new(plugins.context("the filters' host cannot be started")?))
}

/// Starts what the source of configuration needs: the identity's renewal, and registration.
fn origin(
    settings: &Arc<Settings>,
    identity: &Arc<IdentityStore>,
    state: Option<StateDir>,
    inbound: SocketAddr,
    filters: &Arc<Plugins>,
    runtime: &Runtime,
) -> Result<(Origin, Option<Arc<Register>>)> {
    match &settings.source {
        Source::ControlPlane { url, ca_file, token_file } => {
            let roots = ca_file.as_ref().map(|file| read_roots(file)).transpose()?.unwrap_or_default();
            let control = Arc::new(ControlPlane::new(url, roots, identity.clone())?);
            let enrolment = Enrolment {
                namespace: settings.namespace.clone(),
                service_account: settings.service_account.clone(),
                workload: settings.name.clone(),
                labels: settings.labels.clone(),
                token_file: token_file.clone(),
            };
            runtime.spawn(identity::run(identity.clone(), control.clone(), state, enrolment));
            let register = (!settings.apps.is_empty()).then(|| {
                let (settings, control, identity) = (settings.clone(), control.clone(), identity.clone());
                Arc::new(Register { settings, control, identity, inbound, filters: filters.clone() })
            });
            let remote = Remote { control, identity: identity.clone(), workload: settings.name.clone() };
            Ok((Origin::Remote(remote), register))
        }
        Source::Directory { path, identity: files } => {
            anyhow::ensure!(path.is_dir(), "--config {} is not a directory", path.display());
            if let Some(files) = files {
                let files = IdentityFiles { cert: files.cert.clone(), key: files.key.clone(), ca: files.ca.clone() };
                files.load(identity)?;
                runtime.spawn(identity::watch_files(files, identity.clone()));
            }
            let client = Client {
                namespace: settings.namespace.clone(),
                workload: settings.name.clone(),
                service_account: settings.service_account.clone(),
            };
            let own = register::registration(settings, inbound);
            Ok((Origin::Local(Local::new(path.clone(), own, client, identity.clone())), None))
        }
    }
}

fn read_roots(file: &std::path::Path) -> Result<Bundle> {
    let name = file.display();
    let roots = CertificateDer::pem_file_iter(file)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| anyhow::anyhow!("--ca-file {name}: {error}"))?;
    let bundle = Bundle::new(roots).with_context(|| format!("--ca-file {name}"))?;
    anyhow::ensure!(!bundle.is_empty(), "--ca-file {name} holds no certificate");
    Ok(bundle)
}

/// Registers, waits for a signal or `POST /drain`, and drains. A second signal ends it at once.
async fn until_drained(proxy: &Arc<Proxy>, register: Option<&Register>) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM cannot be handled")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT cannot be handled")?;
    let registering = maybe(register, Register::run);
    tokio::select! {
        () = registering => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        () = proxy.drain.requested() => {}
    }
    let withdrawing = async {
        if let Some(register) = register {
            register.withdraw().await;
        }
    };
    tokio::select! {
        () = drain::run(proxy, withdrawing) => {}
        _ = terminate.recv() => tracing::warn!("a second signal: ending at once"),
        _ = interrupt.recv() => tracing::warn!("a second signal: ending at once"),
    }
    proxy.drain.advance(Phase::Cut);
    Ok(())
}

/// For ever where there is nothing to register.
async fn maybe<'a, F>(register: Option<&'a Register>, run: impl FnOnce(&'a Register) -> F)
where
    F: Future<Output = ()>,
{
    match register {
        Some(register) => run(register).await,
        None => std::future::pending().await,
    }
}

/// The proxy's own log goes to standard error; standard output is the access log's.
fn start_log(filter: &str) -> Result<LogHandle> {
    let filter = EnvFilter::try_new(filter).with_context(|| format!("--log `{filter}`"))?;
    let (filter, handle) = reload::Layer::new(filter);
    let colours = std::io::stderr().is_terminal();
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_target(false).with_ansi(colours);
    // Beside each other, not `and_then`: that loses the filter's hint of the highest level, and then every trace event of h2 and
    // rustls is put to the filter, a tenth of the CPU time of HTTP/2.
    tracing_subscriber::registry().with(filter).with(lines).try_init().context("the log is set up already")?;
    Ok(handle)
}

/// Each connection costs two descriptors: as many as the system allows.
fn raise_descriptors() {
    let raised =
        getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open files could not be raised");
    }
}
