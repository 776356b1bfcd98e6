//! Thread per core: each worker has a runtime, listeners and connection pools of its own.

use std::cell::RefCell;
use std::io;
use std::net::TcpListener;
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use arc_swap::{ArcSwap, Cache};
use outrigger_core::first::ServerFirst;
use outrigger_core::key::Key;
use outrigger_core::quiet::Quiet;
use outrigger_core::reason::Reason;
use tokio::runtime::{Builder, LocalOptions, LocalRuntime};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::drain::{DrainWatch, Phase};
use crate::flags::Settings;
use crate::http::{Calls, Connections};
use crate::listen::{self, Accepted, Way};
use crate::log::Lines;
use crate::metrics::Local;
use crate::shed::Gate;
use crate::snapshot::{Pinned, Snapshot, Target};
use crate::state::{Proxy, WorkerLoad};
use crate::upstream::Pools;

/// Stack of a thread that calls filters, bytes: a guest's own and room for the host's frames above it, unoptimised builds
/// included. Too little would abort the process; what is not touched costs nothing.
pub const STACK: usize = 4 << 20;
/// Instances of replaced filters that are still held are looked at again after this long.
const RELEASE_AGAIN: Duration = Duration::from_millis(500);

/// What this proxy's own traffic is counted under.
#[derive(Debug)]
pub struct Labels {
    /// Namespace of the workload
    pub namespace: Arc<str>,
    /// Its name
    pub name: Arc<str>,
    /// `<namespace>/<name>`
    pub workload: Arc<str>,
    /// Its label `version`, or `app.kubernetes.io/version`
    pub version: Arc<str>,
    /// For destinations that are not of the mesh
    pub outside: Arc<str>,
    /// Where nothing is known
    pub unknown: Arc<str>,
}

impl Labels {
    fn new(settings: &Settings) -> Self {
        let version = ["version", "app.kubernetes.io/version"].iter().find_map(|name| settings.labels.get(*name));
        Self {
            namespace: settings.namespace.as_str().into(),
            name: settings.name.as_str().into(),
            workload: format!("{}/{}", settings.namespace, settings.name).into(),
            version: version.map_or("", String::as_str).into(),
            outside: "outside".into(),
            unknown: "".into(),
        }
    }
}

/// One worker: what everything on its thread uses. Lives in an `Rc`.
#[derive(Debug)]
pub struct Worker {
    /// Number of this worker, from 0
    pub index: usize,
    /// What all workers share
    pub proxy: Arc<Proxy>,
    /// This worker's part of the metrics
    pub metrics: Local,
    /// This worker's part of the access log
    pub log: Lines,
    /// The shutdown
    pub drain: DrainWatch,
    /// Randomness of decisions
    pub rng: RefCell<fastrand::Rng>,
    /// Connections to endpoints and to the application
    pub pools: Pools,
    /// Connections of clients
    pub connections: Connections,
    /// What this proxy's own traffic is counted under
    pub labels: Labels,
    /// Open connections
    pub load: Arc<WorkerLoad>,
    /// Destinations whose servers speak first
    pub server_first: RefCell<ServerFirst>,
    /// How often refused connections are logged
    pub refusals: RefCell<Quiet>,
    /// How often overload is logged
    pub overloads: RefCell<Quiet>,
    /// Requests in flight, and whether there may be more
    pub gate: Gate,
    /// Where requests of each rule go
    pub calls: Calls,
    snapshots: RefCell<Pins>,
}

/// The newest snapshot, and the one that was the newest when it was last asked for.
#[derive(Debug)]
struct Pins {
    newest: Cache<Arc<ArcSwap<Snapshot>>, Arc<Snapshot>>,
    pinned: Pinned,
}

impl Pins {
    fn of(cell: Arc<ArcSwap<Snapshot>>) -> Self {
        let mut newest = Cache::new(cell);
        let pinned = Rc::new(newest.load().clone());
        Self { newest, pinned }
    }
}

impl Worker {
    /// A worker of the calling thread.
    pub fn new(proxy: Arc<Proxy>, index: usize) -> Rc<Self> {
        let metrics = proxy.metrics.local();
        Rc::new(Self {
            index,
            pools: Pools::new(proxy.clone(), metrics.clone()),
            log: proxy.log.lines(metrics.clone()),
            metrics,
            drain: proxy.drain.watch(),
            rng: RefCell::new(fastrand::Rng::new()),
            connections: Connections::default(),
            labels: Labels::new(&proxy.settings),
            load: proxy.workers.get(index).cloned().unwrap_or_default(),
            server_first: RefCell::default(),
            refusals: RefCell::default(),
            overloads: RefCell::default(),
            gate: Gate::new(proxy.settings.max_requests),
            calls: Calls::default(),
            snapshots: RefCell::new(Pins::of(proxy.directory.cell())),
            proxy,
        })
    }

    /// Pins the newest snapshot.
    pub fn snapshot(&self) -> Pinned {
        let mut pins = self.snapshots.borrow_mut();
        let Pins { newest, pinned } = &mut *pins;
        let newest = newest.load();
        if !Arc::ptr_eq(newest, pinned) {
            *pinned = Rc::new(newest.clone());
            self.calls.forget();
        }
        pinned.clone()
    }

    /// The snapshot that has an answer for a destination, and the answer. The first use of a destination waits for
    /// discovery, at most a second.
    ///
    /// # Errors
    /// `discovery-timeout`, or `discovery-unavailable` while the control plane is away.
    pub async fn find(&self, key: &Key) -> Result<(Pinned, Target), Reason> {
        let snapshot = self.snapshot();
        if let Some(target) = snapshot.lookup(key) {
            let target = target.clone();
            return Ok((snapshot, target));
        }
        // Boxed: as a rule there is nothing to wait for.
        let (snapshot, target) = Box::pin(self.proxy.directory.resolve(key)).await?;
        Ok((Rc::new(snapshot), target))
    }
}

/// One worker's listening sockets.
#[derive(Debug)]
pub struct Listeners {
    /// What others send
    pub inbound: TcpListener,
    /// What the application sends
    pub outbound: TcpListener,
}

/// Where a worker's tasks run, on the calling thread.
pub(crate) fn runtime() -> io::Result<LocalRuntime> {
    let mut builder = Builder::new_current_thread();
    builder.enable_all().on_thread_park(crate::filter::next_turn).build_local(LocalOptions::default())
}

/// Starts one thread per pair of listeners. A thread ends when everything is cut.
///
/// # Errors
/// When a thread or its runtime cannot be made.
pub fn start(proxy: &Arc<Proxy>, listeners: Vec<Listeners>) -> io::Result<Vec<JoinHandle<()>>> {
    let (senders, receivers): (Vec<_>, Vec<_>) = listeners.iter().map(|_| mpsc::unbounded_channel()).unzip();
    let mut threads = Vec::with_capacity(listeners.len());
    for (index, (listeners, mailbox)) in listeners.into_iter().zip(receivers).enumerate() {
        let (proxy, senders) = (proxy.clone(), senders.clone());
        let thread = std::thread::Builder::new().name(format!("worker-{index}")).stack_size(STACK);
        threads.push(thread.spawn(move || match runtime() {
            Ok(runtime) => runtime.block_on(async {
                run(proxy, index, listeners, mailbox, senders).await;
                // It holds the worker.
                crate::filter::connect(None);
            }),
            Err(error) => tracing::error!(%error, "a worker has no runtime"),
        })?);
    }
    Ok(threads)
}

/// What is cut still counts and logs how it ended.
async fn wind_up(worker: &Worker) {
    const MOST: Duration = Duration::from_millis(500);
    let over = async {
        while worker.load.open() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let _ = tokio::time::timeout(MOST, over).await;
}

async fn run(
    proxy: Arc<Proxy>,
    index: usize,
    listeners: Listeners,
    mut mailbox: mpsc::UnboundedReceiver<Accepted>,
    others: Vec<mpsc::UnboundedSender<Accepted>>,
) {
    let worker = Worker::new(proxy, index);
    crate::filter::connect(Some(Rc::new(crate::http::Callouts::new(&worker))));
    for (listener, way) in [(listeners.inbound, Way::Inbound), (listeners.outbound, Way::Outbound)] {
        tokio::task::spawn_local(listen::accept(worker.clone(), listener, way, others.clone()));
    }
    tokio::task::spawn_local(worker.log.clone().keep_moving());
    let mut swaps = worker.proxy.directory.swaps();
    let cut = worker.drain.reached(Phase::Cut);
    tokio::pin!(cut);
    let mut release_at = None;
    loop {
        tokio::select! {
            () = &mut cut => return wind_up(&worker).await,
            Some(accepted) = mailbox.recv() => listen::adopt(&worker, accepted),
            changed = swaps.changed() => {
                if changed.is_err() {
                    return;
                }
                release_at = renew_filters(&worker);
            }
            () = at(release_at) => release_at = renew_filters(&worker),
        }
    }
}

/// Starts this worker's instances of the newest filters and drops those that nothing uses any more. When to do so again: some
/// are still held, by exchanges or by a worker that has not refreshed yet.
fn renew_filters(worker: &Worker) -> Option<Instant> {
    // Pinned by nobody on this thread from here on, so that what a swap replaced is freed.
    let snapshot = worker.snapshot();
    let plugins = || snapshot.filters.values().filter_map(|slot| slot.plugin.as_ref());
    plugins().for_each(crate::filter::warm);
    (crate::filter::release_unused() > plugins().count()).then(|| Instant::now() + RELEASE_AGAIN)
}

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}
