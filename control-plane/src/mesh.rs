//! What the mesh says now: one catalog, built aside and published by one swap.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use outrigger_core::compile::{Catalog, Change, Client, Found, Inputs, Module, Modules, wanted_modules};
use outrigger_core::key::Key;
use outrigger_core::resource::{ModuleSource, Registration, Rejection};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tokio::sync::{Notify, watch};

use crate::answers::{Answers, Epochs, Touched};
use crate::durable::{self, Log};
use crate::lease::{Leases, Name};
use crate::modules::store::ModuleStore;
use crate::source::Sources;
use crate::store::{self, Accepted, Rejected, Replaced, Serving, Store};
use crate::watch::{Noticed, Ready, Watch};

/// Registrations that arrive together are compiled together.
const COALESCE: Duration = Duration::from_millis(20);
/// A watch may miss changes (network file systems, links into other directories).
const RESCAN: Duration = Duration::from_secs(10);

/// One state of the mesh. Never changes.
#[derive(Debug)]
pub struct Published {
    /// Counts states since the start
    pub generation: u64,
    /// The compiled resources
    pub catalog: Catalog,
    /// What was said of the files and of what they say together
    pub accepted: Arc<Accepted>,
    /// Modules by digest, with sizes
    pub modules: BTreeMap<String, u64>,
    /// Modules on other hosts that are not here yet, with the digests that filters pin
    pub missing: BTreeMap<ModuleSource, BTreeSet<String>>,
    epochs: Epochs,
    answers: Arc<Answers>,
}

impl Published {
    /// The answer to one subscription of one client.
    pub fn answer(&self, type_url: &str, key: &Key, client: &Client) -> Option<Arc<Found>> {
        self.answers.get(&self.catalog, &self.epochs, type_url, key, client)
    }
}

/// States before and after a change, and what it touched.
#[derive(Debug, Clone)]
pub struct Changed {
    /// Before
    pub before: Arc<Published>,
    /// After
    pub after: Arc<Published>,
    /// What may be other
    pub touched: Touched,
}

/// The mesh over time.
pub struct Mesh {
    settings: Settings,
    published: watch::Sender<Arc<Published>>,
    /// Held while building, never while answering
    building: Mutex<Building>,
    leases: Mutex<Leases>,
    registered: Notify,
    answers: Arc<Answers>,
    builds: AtomicU64,
    reads: AtomicU64,
    /// Told of every change after it was published
    listener: OnceLock<Listener>,
}

/// Who is told what a change touched.
type Listener = Box<dyn Fn(&Touched) + Send + Sync>;

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
}

impl std::fmt::Debug for Mesh {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mesh").field("settings", &self.settings).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Building {
    store: Store,
    modules: ModuleStore,
    watch: Watch,
    sources: Sources,
    /// What the last build from everything found
    findings: Vec<Rejected>,
    /// The sources that filters name, with the digests that they pin
    wanted: BTreeMap<ModuleSource, BTreeSet<String>>,
    found: BTreeMap<ModuleSource, Module>,
    /// Why a remote source's module is not there
    problems: BTreeMap<ModuleSource, String>,
    roots: Vec<Bytes>,
    registrations: Log,
    /// Of the last state: for what is new to be logged
    accepted: Arc<Accepted>,
}

/// A line of the registrations on disk; no registration: withdrawn.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    name: Name,
    registration: Option<Registration>,
}

impl Mesh {
    /// Restores the state directory, reads every source once, and publishes the first state. `roots` is the trust
    /// bundle, DER. The receiver is for [`Mesh::run`].
    ///
    /// # Errors
    /// When the configuration cannot be listed or the state directory cannot be read.
    pub fn open(settings: Settings, roots: Vec<Bytes>) -> io::Result<(Arc<Self>, Noticed)> {
        let name = |error: io::Error, path: &Path| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        durable::directory(&settings.state).map_err(|error| name(error, &settings.state))?;
        let last_good = settings.state.join("last-good");
        durable::directory(&last_good).map_err(|error| name(error, &last_good))?;
        let last_good = last_good.join("resources.jsonl");
        let mut store = Store::open(last_good.clone()).map_err(|error| name(error, &last_good))?;
        let modules = settings.state.join("modules");
        let modules = ModuleStore::open(modules.clone()).map_err(|error| name(error, &modules))?;
        let registrations = settings.state.join("registrations.jsonl");
        let (log, lines) = Log::open::<Saved>(registrations.clone()).map_err(|error| name(error, &registrations))?;
        let mut registrations = BTreeMap::new();
        for Saved { name, registration } in lines {
            match registration {
                Some(registration) => registrations.insert(name, registration),
                None => registrations.remove(&name),
            };
        }
        // The watch begins before the first reading, so that no change falls between.
        let (watch, changes) = Watch::new(&settings.config)
            .map_err(|error| name(io::Error::other(error.to_string()), &settings.config))?;
        let attached = settings.attached();
        durable::directory(&attached).map_err(|error| name(error, &attached))?;
        let mut sources = Sources::new(&[&settings.config, &attached]);
        store.begin(sources.scan().map_err(|error| name(error, &settings.config))?);
        let answers = Arc::new(Answers::default());
        let first = Published {
            generation: 0,
            catalog: Catalog::default(),
            accepted: Arc::default(),
            modules: BTreeMap::new(),
            missing: BTreeMap::new(),
            epochs: Epochs::default(),
            answers: answers.clone(),
        };
        let leases = Leases::new(settings.lease, registrations.into_values().collect(), Instant::now());
        let building = Building {
            store,
            modules,
            watch,
            sources,
            findings: Vec::new(),
            found: BTreeMap::new(),
            wanted: BTreeMap::new(),
            problems: BTreeMap::new(),
            roots,
            registrations: log,
            accepted: Arc::default(),
        };
        let mesh = Arc::new(Self {
            settings,
            published: watch::Sender::new(Arc::new(first)),
            building: Mutex::new(building),
            leases: Mutex::new(leases),
            registered: Notify::new(),
            answers,
            builds: AtomicU64::new(0),
            reads: AtomicU64::new(0),
            listener: OnceLock::new(),
        });
        {
            let mut building = lock(&mesh.building);
            building.load_modules(true);
            mesh.publish(&mut building, None);
        }
        Ok((mesh, changes))
    }

    /// Sets who is told of every change; only the first is.
    pub fn listen(&self, listener: impl Fn(&Touched) + Send + Sync + 'static) {
        let _ = self.listener.set(Box::new(listener));
    }

    /// Since the start: answers compiled, catalogs built from everything, files read.
    pub fn work(&self) -> (u64, u64, u64) {
        (self.answers.compiled(), self.builds.load(Ordering::Relaxed), self.reads.load(Ordering::Relaxed))
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

    /// Where filters are kept that were attached over the API.
    pub fn attached(&self) -> PathBuf {
        self.settings.attached()
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
        let mut building = lock(&self.building);
        building.roots = roots;
        self.publish(&mut building, None);
    }

    /// Compiles the registrations and publishes now.
    pub async fn rebuild(self: &Arc<Self>) -> Changed {
        let mesh = self.clone();
        let build = move || mesh.publish(&mut lock(&mesh.building), Some(Vec::new()));
        match tokio::task::spawn_blocking(build).await {
            Ok(changed) => changed,
            Err(error) => {
                tracing::error!(%error, "compiling failed; the state before goes on serving");
                Changed { before: self.now(), after: self.now(), touched: Touched::Topics(BTreeSet::new()) }
            }
        }
    }

    /// [`Mesh::rebuild`] for a withdrawal: what became other since `before`, the state of before it, though another build
    /// may have taken it along.
    pub async fn withdrawn(self: &Arc<Self>, before: Arc<Published>, name: Name) -> Changed {
        let changed = self.rebuild().await;
        if changed.before.generation == before.generation {
            return changed;
        }
        let state = before.clone();
        let change = Change { resources: Vec::new(), registrations: vec![(name, None)] };
        let topics = tokio::task::spawn_blocking(move || Some(state.catalog.changed(&change)?.1)).await;
        let touched = topics.ok().flatten().map_or(Touched::All, Touched::Topics);
        Changed { before, after: changed.after, touched }
    }

    /// Follows files and registrations until dropped.
    pub async fn run(self: Arc<Self>, mut noticed: Noticed) {
        let mut rescan = tokio::time::interval_at(tokio::time::Instant::now() + RESCAN, RESCAN);
        let mut sweep = tokio::time::interval((self.settings.lease / 10).max(Duration::from_millis(50)));
        sweep.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        loop {
            tokio::select! {
                ready = noticed.next() => self.look(ready).await,
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
        self.look(Ready::Any).await;
    }

    async fn look(self: &Arc<Self>, ready: Ready) {
        let mesh = self.clone();
        let work = move || {
            let mut building = lock(&mesh.building);
            let changes = match &ready {
                Ready::Paths(paths) => building.sources.look(paths),
                Ready::Any => building.sources.scan(),
            };
            mesh.reads.store(building.sources.reads(), Ordering::Relaxed);
            let changes = match changes {
                Ok(changes) => changes,
                Err(error) => {
                    let config = mesh.settings.config.display();
                    tracing::error!(%config, %error, "the configuration cannot be read; what it held goes on serving");
                    return;
                }
            };
            let before = building.store.accepted();
            let replaced = building.store.apply(changes);
            let filters = replaced.iter().any(|(id, _)| id.kind == "WasmFilter");
            let modules = building.load_modules(filters);
            let closed = before.closed != building.store.accepted().closed;
            if modules || closed {
                mesh.publish(&mut building, None);
            } else if !replaced.is_empty() || !Arc::ptr_eq(&before, &building.store.accepted()) {
                mesh.publish(&mut building, Some(replaced));
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
            let pinned = building.wanted.get(&source).cloned().unwrap_or_default();
            let other =
                || Err(io::Error::other(format!("its content has digest {digest}, not the one in spec.module.sha256")));
            if !pinned.is_empty() && !pinned.contains(&digest) {
                return other();
            }
            building.problems.remove(&source);
            building.modules.fetched(source, &bytes)?;
            mesh.again(building);
            // One place gives one module: another filter that pins another one waits.
            let held = building.modules.held();
            if pinned.iter().all(|digest| held.contains_key(digest)) { Ok(()) } else { other() }
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

    /// With other modules: what had to be put back for want of one may serve now.
    fn again(&self, building: &mut Building) {
        building.store.apply(BTreeMap::new());
        building.load_modules(true);
        self.publish(building, None);
    }

    /// Publishes what these resources and the registrations became; `None`: from everything.
    fn publish(&self, building: &mut Building, replaced: Option<Vec<Replaced>>) -> Changed {
        let before = self.now();
        let renewed = self.leases().take_changed();
        let change = replaced.map(|resources| Change { resources, registrations: renewed.clone() });
        let narrow = change.and_then(|change| before.catalog.changed(&change));
        let (catalog, touched) = match narrow {
            Some((catalog, topics)) => (catalog, Touched::Topics(topics)),
            None => (self.build(building), Touched::All),
        };
        let generation = before.generation + 1;
        let after = Arc::new(Published {
            generation,
            catalog,
            accepted: building.say(),
            missing: building.missing(),
            modules: building.modules.held(),
            epochs: before.epochs.after(generation, &touched),
            answers: self.answers.clone(),
        });
        self.published.send_replace(after.clone());
        if let Some(listener) = self.listener.get() {
            listener(&touched);
        }
        self.save(building, &renewed);
        Changed { before, after, touched }
    }

    fn build(&self, building: &mut Building) -> Catalog {
        self.builds.fetch_add(1, Ordering::Relaxed);
        let registrations = self.leases().registrations();
        let (mut catalog, mut rejections) = Catalog::build(self.inputs(building, registrations.clone()));
        if building.restore(&rejections, &self.now().accepted) {
            (catalog, rejections) = Catalog::build(self.inputs(building, registrations));
        }
        let now = self.now();
        for rejection in rejections {
            if !now.accepted.rejected.iter().any(|known| known.rejection == rejection) {
                tracing::error!("rejected: {rejection}");
            }
            building.findings.push(Rejected::new(rejection, Serving::Nothing));
        }
        let in_use = catalog.wasm_modules().into_iter().chain(building.found.values().cloned());
        let in_use: BTreeSet<String> = in_use.map(|module| module.sha256).collect();
        building.modules.prune(&in_use);
        catalog
    }

    fn inputs(&self, building: &Building, registrations: Vec<Arc<Registration>>) -> Inputs {
        Inputs {
            resources: building.store.resources(),
            registrations,
            trust_domain: self.settings.trust_domain.clone(),
            closed: building.store.accepted().closed.clone(),
            modules: Modules {
                // Of earlier versions, too: one of these may have to serve on.
                found: building.modules.last(),
                problems: building.problems.clone(),
                held: building.modules.held(),
            },
            roots: BTreeMap::from([(self.settings.trust_domain.clone(), building.roots.clone())]),
        }
    }

    fn save(&self, building: &mut Building, renewed: &[(Name, Option<Arc<Registration>>)]) {
        if let Err(error) = building.store.save() {
            tracing::error!(%error, "last good versions cannot be written");
        }
        if renewed.is_empty() {
            return;
        }
        let line = |name: &Name, registration: Option<&Registration>| Saved {
            name: name.clone(),
            registration: registration.cloned(),
        };
        let lines: Vec<Saved> =
            renewed.iter().map(|(name, registration)| line(name, registration.as_deref())).collect();
        let live = self.leases().registrations();
        let named = |one: &Arc<Registration>| line(&(one.namespace.clone(), one.name.clone()), Some(one));
        let all = match building.registrations.grows(lines.len(), live.len()) {
            true => live.iter().map(named).collect(),
            false => Vec::new(),
        };
        if let Err(error) = building.registrations.append(&lines, &all) {
            tracing::error!(%error, "registrations cannot be written");
        }
    }
}

impl Building {
    /// Looks at the modules again; which ones are wanted only if filters changed. Returns whether one is other than before.
    fn load_modules(&mut self, filters: bool) -> bool {
        if filters {
            self.wanted = wanted_modules(&self.store.resources());
            self.problems.retain(|source, _| self.wanted.contains_key(source));
        }
        if self.wanted.is_empty() && self.found.is_empty() {
            return false;
        }
        let found = self.modules.load(self.wanted.keys());
        self.watch.also(self.wanted.keys().filter_map(|source| match source {
            ModuleSource::File(path) => Some(path.as_str()),
            _ => None,
        }));
        let changed = found != self.found;
        self.found = found;
        changed
    }

    /// What is to be said of the files, and of what they say together. Logs what is new.
    fn say(&mut self) -> Arc<Accepted> {
        let accepted = self.store.accepted();
        store::report(&self.accepted, &accepted);
        self.accepted = accepted.clone();
        if self.findings.is_empty() {
            return accepted;
        }
        let mut accepted = Accepted::clone(&accepted);
        accepted.rejected.extend(self.findings.iter().cloned());
        Arc::new(accepted)
    }

    /// Remote sources of which a module is wanted that is not here.
    fn missing(&self) -> BTreeMap<ModuleSource, BTreeSet<String>> {
        if self.wanted.is_empty() {
            return BTreeMap::new();
        }
        let held = self.modules.held();
        let here = |source: &ModuleSource, pinned: &BTreeSet<String>| match pinned.is_empty() {
            true => self.found.contains_key(source),
            false => pinned.iter().all(|digest| held.contains_key(digest)),
        };
        let missing = self.wanted.iter().filter(|(source, pinned)| source.is_remote() && !here(source, pinned));
        missing.map(|(source, pinned)| (source.clone(), pinned.clone())).collect()
    }

    /// Puts back the last good versions of policies that contradict older ones, and of filters whose module is not here; whether
    /// there was any. Other findings of the compilation leave a resource in force, or have no earlier version.
    fn restore(&mut self, rejections: &[Rejection], said: &Accepted) -> bool {
        let restorable = |rejection: &&Rejection| matches!(rejection.kind.as_str(), "TrafficPolicy" | "WasmFilter");
        // A version that was found wanting itself is no good one to go back to.
        let before = std::mem::take(&mut self.findings);
        let wanting = |rejection: &Rejection| {
            before.iter().filter(|found| found.serving == Serving::Nothing).any(|found| {
                let Rejection { kind, namespace, name, .. } = &found.rejection;
                (kind, namespace, name) == (&rejection.kind, &rejection.namespace, &rejection.name)
            })
        };
        for rejection in rejections.iter().filter(restorable).filter(|rejection| !wanting(rejection)) {
            if self.store.retract(rejection).is_some() {
                if !said.rejected.iter().any(|known| known.rejection == *rejection) {
                    tracing::error!("rejected: {rejection}");
                }
                self.findings.push(Rejected::new(rejection.clone(), Serving::LastGood));
            }
        }
        !self.findings.is_empty()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
