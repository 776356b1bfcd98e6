//! What the mesh says now: one catalog, built aside and published by one swap.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use outrigger_core::compile::{Answer, Catalog, Client, Found, Inputs, Module, Modules, wanted_modules};
use outrigger_core::key::Key;
use outrigger_core::resource::{ModuleSource, Registration, Rejection};
use sha2::{Digest as _, Sha256};
use tokio::sync::{Notify, mpsc, watch};

use crate::durable;
use crate::lease::Leases;
use crate::modules::store::ModuleStore;
use crate::source::{self, Files, Watch};
use crate::store::{self, Accepted, Rejected, Serving, Store};

/// Files are read this long after the first sign of a change: editors write in several steps.
const DEBOUNCE: Duration = Duration::from_millis(100);
/// Registrations that arrive together are compiled together.
const COALESCE: Duration = Duration::from_millis(20);
/// A watch may miss changes (network file systems, links into other directories).
const RESCAN: Duration = Duration::from_secs(10);
const SHARDS: usize = 16;
/// Answers kept per shard; further ones are computed each time.
const SHARD_ANSWERS: usize = 16 * 1024;

/// One state of the mesh. Never changes.
#[derive(Debug)]
pub struct Published {
    /// Counts states since the start
    pub generation: u64,
    /// The compiled resources
    pub catalog: Catalog,
    /// What it was built from, with every rejection
    pub accepted: Accepted,
    /// Modules by digest, with sizes
    pub modules: BTreeMap<String, u64>,
    /// Modules on other hosts that are not here yet
    pub missing: BTreeSet<ModuleSource>,
    answers: Answers,
}

/// Answers by type, key, namespace and, where it counts, workload and account: each is computed once.
type Slot = Arc<OnceLock<Option<Arc<Found>>>>;
type Question = (String, Key, Client);

#[derive(Debug, Default)]
struct Answers {
    hasher: RandomState,
    shards: [Mutex<HashMap<Question, Slot>>; SHARDS],
}

impl Published {
    fn new(generation: u64, catalog: Catalog, accepted: Accepted, modules: BTreeMap<String, u64>) -> Self {
        Self { generation, catalog, accepted, modules, missing: BTreeSet::new(), answers: Answers::default() }
    }

    /// The answer to one subscription of one client.
    pub fn answer(&self, type_url: &str, key: &Key, client: &Client) -> Option<Arc<Found>> {
        let asker = match key {
            Key::SelfOf(_) => client.clone(),
            _ => {
                Client { namespace: client.namespace.clone(), workload: String::new(), service_account: String::new() }
            }
        };
        let question = (type_url.to_owned(), key.clone(), asker);
        let shard = usize::try_from(self.answers.hasher.hash_one(&question)).unwrap_or_default() % SHARDS;
        let compute = || match self.catalog.answer(type_url, key, client) {
            Answer::Found(found) => Some(Arc::new(found)),
            Answer::Absent => None,
        };
        let slot = {
            let mut shard = lock(&self.answers.shards[shard]);
            if shard.len() >= SHARD_ANSWERS && !shard.contains_key(&question) {
                drop(shard);
                return compute();
            }
            shard.entry(question).or_default().clone()
        };
        slot.get_or_init(compute).clone()
    }
}

/// The mesh over time.
#[derive(Debug)]
pub struct Mesh {
    settings: Settings,
    published: watch::Sender<Arc<Published>>,
    /// Held while building, never while answering
    building: Mutex<Building>,
    leases: Mutex<Leases>,
    registered: Notify,
}

/// Where things are.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `--config`
    pub config: PathBuf,
    /// `--state`
    pub state: PathBuf,
    /// `--trust-domain`
    pub trust_domain: String,
    /// `--lease`
    pub lease: Duration,
}

impl Settings {
    /// Where filters are kept that were attached over the API.
    pub fn attached(&self) -> PathBuf {
        self.state.join("attached")
    }

    fn read(&self) -> io::Result<Files> {
        let mut files = source::read(&self.config)?;
        files.extend(source::read(&self.attached())?);
        Ok(files)
    }
}

#[derive(Debug)]
struct Building {
    store: Store,
    modules: ModuleStore,
    watch: Watch,
    files: Files,
    accepted: Accepted,
    /// The sources that filters name, with the digests that they pin
    wanted: BTreeMap<ModuleSource, BTreeSet<String>>,
    found: BTreeMap<ModuleSource, Module>,
    /// Why a remote source's module is not there
    problems: BTreeMap<ModuleSource, String>,
    roots: Vec<Bytes>,
}

impl Mesh {
    /// Restores the state directory, reads every source once, and publishes the first state. `roots` is the trust
    /// bundle, DER. The receiver is for [`Mesh::run`].
    ///
    /// # Errors
    /// When the configuration cannot be listed or the state directory cannot be read.
    pub fn open(settings: Settings, roots: Vec<Bytes>) -> io::Result<(Arc<Self>, mpsc::Receiver<()>)> {
        let name = |error: io::Error, path: &Path| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        durable::directory(&settings.state).map_err(|error| name(error, &settings.state))?;
        let last_good = settings.state.join("last-good");
        durable::directory(&last_good).map_err(|error| name(error, &last_good))?;
        let last_good = last_good.join("resources.json");
        let store = Store::open(last_good.clone()).map_err(|error| name(error, &last_good))?;
        let modules = settings.state.join("modules");
        let modules = ModuleStore::open(modules.clone()).map_err(|error| name(error, &modules))?;
        let registrations = settings.state.join("registrations.json");
        let registrations = read_registrations(&registrations).map_err(|error| name(error, &registrations))?;
        // The watch begins before the first reading, so that no change falls between.
        let (watch, changes) = Watch::new(&settings.config)
            .map_err(|error| name(io::Error::other(error.to_string()), &settings.config))?;
        let attached = settings.attached();
        durable::directory(&attached).map_err(|error| name(error, &attached))?;
        let files = settings.read().map_err(|error| name(error, &settings.config))?;
        let first = Published::new(0, Catalog::default(), Accepted::default(), BTreeMap::new());
        let leases = Leases::new(settings.lease, registrations, Instant::now());
        let building = Building {
            store,
            modules,
            watch,
            files: Files::new(),
            accepted: Accepted::default(),
            wanted: BTreeMap::new(),
            found: BTreeMap::new(),
            problems: BTreeMap::new(),
            roots,
        };
        let mesh = Arc::new(Self {
            settings,
            published: watch::Sender::new(Arc::new(first)),
            building: Mutex::new(building),
            leases: Mutex::new(leases),
            registered: Notify::new(),
        });
        mesh.take(files, &mut lock(&mesh.building), false);
        mesh.build(&mut lock(&mesh.building));
        Ok((mesh, changes))
    }

    /// The state now.
    pub fn now(&self) -> Arc<Published> {
        self.published.borrow().clone()
    }

    /// Follows the states.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Published>> {
        self.published.subscribe()
    }

    /// The trust domain.
    pub fn trust_domain(&self) -> &str {
        &self.settings.trust_domain
    }

    /// The state directory.
    pub fn state(&self) -> &Path {
        &self.settings.state
    }

    /// The registered workloads. After a change, [`Mesh::registrations_changed`] or [`Mesh::rebuild`].
    pub fn leases(&self) -> MutexGuard<'_, Leases> {
        lock(&self.leases)
    }

    /// Compiles the registrations soon.
    pub fn registrations_changed(&self) {
        self.registered.notify_one();
    }

    /// Replaces the trust bundle.
    pub fn set_roots(self: &Arc<Self>, roots: Vec<Bytes>) {
        lock(&self.building).roots = roots;
        self.registrations_changed();
    }

    /// Compiles and publishes now. Returns the states before and after.
    pub async fn rebuild(self: &Arc<Self>) -> (Arc<Published>, Arc<Published>) {
        let mesh = self.clone();
        let build = move || {
            let mut building = lock(&mesh.building);
            let before = mesh.now();
            mesh.build(&mut building);
            (before, mesh.now())
        };
        match tokio::task::spawn_blocking(build).await {
            Ok(states) => states,
            Err(error) => {
                tracing::error!(%error, "compiling failed; the state before goes on serving");
                (self.now(), self.now())
            }
        }
    }

    /// Follows files and registrations until dropped.
    pub async fn run(self: Arc<Self>, mut changes: mpsc::Receiver<()>) {
        let mut rescan = tokio::time::interval_at(tokio::time::Instant::now() + RESCAN, RESCAN);
        let mut sweep = tokio::time::interval((self.settings.lease / 10).max(Duration::from_millis(50)));
        sweep.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        loop {
            tokio::select! {
                Some(()) = changes.recv() => {
                    tokio::time::sleep(DEBOUNCE).await;
                    let _ = changes.try_recv();
                    self.reload().await;
                }
                _ = rescan.tick() => self.reload().await,
                () = self.registered.notified() => {
                    tokio::time::sleep(COALESCE).await;
                    self.rebuild().await;
                }
                _ = sweep.tick() => self.sweep(),
            }
        }
    }

    fn sweep(&self) {
        let (ended, held, before) = {
            let mut leases = self.leases();
            let before = leases.held();
            let ended = leases.sweep(Instant::now());
            (ended, leases.held(), before)
        };
        for (namespace, workload) in &ended {
            tracing::warn!(%namespace, %workload, "withdrawn: its lease ended");
        }
        if held > before {
            tracing::error!(held, "too many leases ended at once: none is withdrawn");
        }
        if !ended.is_empty() {
            self.registrations_changed();
        }
    }

    /// Reads every source again.
    pub async fn reload(self: &Arc<Self>) {
        let mesh = self.clone();
        let work = move || {
            let files = match mesh.settings.read() {
                Ok(files) => files,
                Err(error) => {
                    let config = mesh.settings.config.display();
                    tracing::error!(%config, %error, "the configuration cannot be read; what it held goes on serving");
                    return;
                }
            };
            let mut building = lock(&mesh.building);
            if mesh.take(files, &mut building, false) {
                mesh.build(&mut building);
            }
        };
        if let Err(error) = tokio::task::spawn_blocking(work).await {
            tracing::error!(%error, "reading the configuration failed; the state before goes on serving");
        }
    }

    /// Keeps a module that was pushed.
    ///
    /// # Errors
    /// Those of the file system.
    pub async fn push(self: &Arc<Self>, bytes: Bytes) -> io::Result<Module> {
        self.building(move |mesh, building| {
            let module = building.modules.add(&bytes)?;
            mesh.again(building);
            Ok(module)
        })
        .await
    }

    /// A remote source gave this.
    ///
    /// # Errors
    /// Why it is not what the filters want, or could not be kept.
    pub async fn fetched(self: &Arc<Self>, source: ModuleSource, bytes: Vec<u8>) -> Result<(), String> {
        let take = move |mesh: &Self, building: &mut Building| {
            let digest = hex::encode(Sha256::digest(&bytes));
            if building.wanted.get(&source).is_some_and(|pinned| !pinned.is_empty() && !pinned.contains(&digest)) {
                return Err(io::Error::other(format!(
                    "its content has digest {digest}, not the one in spec.module.sha256"
                )));
            }
            building.problems.remove(&source);
            building.modules.fetched(source, &bytes)?;
            mesh.again(building);
            Ok(())
        };
        self.building(take).await.map_err(|error| error.to_string())
    }

    /// A remote source gave nothing.
    pub async fn not_fetched(self: &Arc<Self>, source: ModuleSource, why: String) {
        let tell = move |mesh: &Self, building: &mut Building| {
            if building.problems.get(&source) != Some(&why) {
                building.problems.insert(source, why);
                mesh.again(building);
            }
            Ok(())
        };
        // That the build itself failed has been logged.
        let _ = self.building(tell).await;
    }

    async fn building<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self, &mut Building) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let mesh = self.clone();
        let done = tokio::task::spawn_blocking(move || work(&mesh, &mut lock(&mesh.building))).await;
        done.unwrap_or_else(|error| {
            tracing::error!(%error, "compiling failed; the state before goes on serving");
            Err(io::Error::other("compiling failed"))
        })
    }

    /// Takes the same files with other modules: what had to be put back for want of a module may serve now.
    fn again(&self, building: &mut Building) {
        let files = building.files.clone();
        self.take(files, building, true);
        self.build(building);
    }

    /// Takes in files and modules. Returns whether anything is other than before; `again`: it is.
    fn take(&self, files: Files, building: &mut Building, again: bool) -> bool {
        let files_changed = again || files != building.files || self.now().generation == 0;
        if files_changed {
            let accepted = building.store.apply(&files);
            store::report(&building.accepted, &accepted);
            building.accepted = accepted;
            building.files = files;
            building.wanted = wanted_modules(&building.accepted.resources);
            building.problems.retain(|source, _| building.wanted.contains_key(source));
        }
        let found = building.modules.load(building.wanted.keys());
        building.watch.also(building.wanted.keys().filter_map(|source| match source {
            ModuleSource::File(path) => Some(path.as_str()),
            _ => None,
        }));
        let modules_changed = found != building.found;
        building.found = found;
        files_changed || modules_changed
    }

    fn build(&self, building: &mut Building) {
        let registrations = self.leases().registrations();
        let held = building.modules.held();
        let inputs = |building: &Building| Inputs {
            resources: building.accepted.resources.clone(),
            registrations: registrations.clone(),
            trust_domain: self.settings.trust_domain.clone(),
            closed: building.accepted.closed.clone(),
            modules: Modules { found: building.found.clone(), problems: building.problems.clone(), held: held.clone() },
            roots: BTreeMap::from([(self.settings.trust_domain.clone(), building.roots.clone())]),
        };
        let (mut catalog, mut rejections) = Catalog::build(inputs(building));
        if building.restore(&rejections) {
            (catalog, rejections) = Catalog::build(inputs(building));
        }
        let mut accepted = building.accepted.clone();
        let now = self.now();
        for rejection in rejections {
            if !now.accepted.rejected.iter().any(|known| known.rejection == rejection) {
                tracing::error!("rejected: {rejection}");
            }
            accepted.rejected.push(Rejected::new(rejection, Serving::Nothing));
        }
        let in_use = catalog.wasm_modules().into_iter().chain(building.found.values().cloned());
        let in_use: BTreeSet<String> = in_use.map(|module| module.sha256).collect();
        let missing = building.missing(&held);
        let published = Published { missing, ..Published::new(now.generation + 1, catalog, accepted, held) };
        self.published.send_replace(Arc::new(published));
        building.modules.prune(&in_use);
        if let Err(error) = building.store.save() {
            tracing::error!(%error, "last good versions cannot be written");
        }
        if let Err(error) = write_registrations(&self.settings.state.join("registrations.json"), &registrations) {
            tracing::error!(%error, "registrations cannot be written");
        }
    }
}

impl Building {
    /// Remote sources of which a module is wanted that is not here.
    fn missing(&self, held: &BTreeMap<String, u64>) -> BTreeSet<ModuleSource> {
        let here = |source: &ModuleSource, pinned: &BTreeSet<String>| match pinned.is_empty() {
            true => self.found.contains_key(source),
            false => pinned.iter().all(|digest| held.contains_key(digest)),
        };
        let missing = self.wanted.iter().filter(|(source, pinned)| source.is_remote() && !here(source, pinned));
        missing.map(|(source, _)| source.clone()).collect()
    }

    /// Puts back the last good versions of policies that contradict older ones, and of filters whose module is not here; whether
    /// there was any. Other findings of the compilation leave a resource in force, or have no earlier version.
    fn restore(&mut self, rejections: &[Rejection]) -> bool {
        let mut restored = false;
        let restorable = |rejection: &&Rejection| matches!(rejection.kind.as_str(), "TrafficPolicy" | "WasmFilter");
        for rejection in rejections.iter().filter(restorable) {
            let Some(last) = self.store.retract(rejection) else { continue };
            if let Some(place) = self.accepted.resources.iter_mut().find(|loaded| loaded.id == last.id) {
                *place = last;
            }
            tracing::error!("rejected: {rejection}");
            self.accepted.rejected.push(Rejected::new(rejection.clone(), Serving::LastGood));
            restored = true;
        }
        restored
    }
}

fn read_registrations(path: &Path) -> io::Result<Vec<Registration>> {
    match std::fs::read(path) {
        Ok(text) => Ok(serde_json::from_slice(&text)?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

fn write_registrations(path: &Path, registrations: &[Arc<Registration>]) -> io::Result<()> {
    let registrations: Vec<&Registration> = registrations.iter().map(|registration| &**registration).collect();
    let text = serde_json::to_vec(&registrations)?;
    // Most builds change no registration.
    if std::fs::read(path).is_ok_and(|before| before == text) {
        return Ok(());
    }
    durable::write(path, &text, 0o600)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
