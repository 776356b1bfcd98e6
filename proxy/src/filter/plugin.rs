//! Prepared WASM filters, shared by all workers.

use std::collections::HashMap;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use outrigger_proto::mesh;

use super::report::{Health, StatusRow};
use super::wasm::{Cache, Counters, Entered, Failure, Instance, Ready, Restart, Runtime, WasmFilter};
use super::{Filter, Interest};

/// Milliseconds where a specification has 0.
const BACKOFF: u64 = 1_000;
const MAX_BACKOFF: u64 = 60_000;

/// Where modules are compiled.
#[derive(Debug, Clone)]
pub enum Compiler {
    /// In this process: for tests
    InProcess,
    /// In a child process of this executable, with limits of memory and time; its `main` calls
    /// [`compile_main`](super::wasm::compile_main)
    Child(PathBuf),
}

/// How [`Plugins`] works.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where modules are compiled
    pub compiler: Compiler,
    /// Private directory of compiled modules, made with mode 0700. Its content is machine code: nothing else may write to it
    pub cache: PathBuf,
}

/// Why a filter cannot be used. The message names the thing and the remedy; the filter's own name is not in it.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// The bytes are not those that the digest promises
    #[error("the module's SHA-256 is {actual}, but {expected} was announced; fetch it again")]
    Digest {
        /// Announced
        expected: String,
        /// Of the bytes
        actual: String,
    },
    /// The module was refused
    #[error("{0}")]
    Refused(String),
    /// The module is not in the cache, and no bytes were given
    #[error("the module wasm/{0} is not here yet")]
    Missing(String),
    /// The proxy's own trouble: disk, child process
    #[error("{0}: {1}")]
    Io(String, #[source] std::io::Error),
}

/// A WASM filter, compiled, linked and tried once; of one version of its configuration. Shared by all workers.
#[derive(Debug)]
pub struct Plugin {
    id: u64,
    ready: Ready,
    source: mesh::Filter,
    failures: AtomicU64,
    timeouts: AtomicU64,
    throttled: AtomicU64,
    /// Taken when an instance starts or fails, and for the status: never on the way of a request that goes well.
    slow: Mutex<Slow>,
}

#[derive(Debug)]
struct Slow {
    restart: Restart,
    last_error: Option<String>,
    counters: Vec<Arc<Counters>>,
    /// Requests, calls and time of instances that are gone
    retired: (u64, u64, Duration),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Plugin {
    /// This filter's part in one exchange, on the calling worker.
    pub fn filter(plugin: &Arc<Self>) -> Box<dyn Filter> {
        Box::new(WasmFilter::new(Arc::clone(plugin)))
    }

    /// `<namespace>/<name>`
    pub fn name(&self) -> &str {
        &self.ready.spec.name
    }

    pub(super) fn id(&self) -> u64 {
        self.id
    }

    pub(super) fn fail_open(&self) -> bool {
        self.ready.spec.fail_open
    }

    pub(super) fn interest(&self) -> Interest {
        self.ready.interest
    }

    pub(super) fn body_limit(&self) -> usize {
        self.ready.spec.body
    }

    /// What has to be equal in plugins that share an instance; `None`: this one shares none.
    pub(super) fn shared(&self) -> Option<&Arc<str>> {
        self.ready.shared.as_ref()
    }

    /// Whether an instance may start now; if not, why.
    pub(super) fn may_start(&self, now: Instant) -> Result<(), String> {
        let slow = lock(&self.slow);
        match slow.restart.wait(now) {
            None => Ok(()),
            Some(wait) => Err(format!(
                "it failed too often and starts again in {wait:.1?}; last: {}",
                slow.last_error.as_deref().unwrap_or("unknown")
            )),
        }
    }

    /// An exchange went without it, because it has no time left.
    pub(super) fn throttled(&self) {
        self.throttled.fetch_add(1, Ordering::Relaxed);
    }

    /// How long the next instance has to wait.
    pub(super) fn wait(&self) -> Duration {
        lock(&self.slow).restart.wait(Instant::now()).unwrap_or_default()
    }

    /// Enters an instance, or starts one.
    pub(super) fn start(&self, shared: Option<Rc<Instance>>) -> Result<Entered, Failure> {
        let counters = Arc::new(Counters::new(self.ready.spec.cpu_share));
        let entered = self.ready.start(shared, Arc::clone(&counters))?;
        let mut slow = lock(&self.slow);
        slow.settle();
        slow.counters.push(counters);
        Ok(entered)
    }

    /// An instance failed, or could not start.
    pub(super) fn failed(&self, reason: String, timeout: bool) {
        self.failures.fetch_add(1, Ordering::Relaxed);
        self.timeouts.fetch_add(u64::from(timeout), Ordering::Relaxed);
        let now = Instant::now();
        let mut slow = lock(&self.slow);
        let waited = slow.restart.wait(now).is_some();
        slow.restart.failed(now);
        // While it waits, others' failures of the same moment would only repeat the line.
        if !waited {
            let next = slow.restart.wait(now).map_or_else(|| "at once".to_owned(), |wait| format!("in {wait:?}"));
            tracing::warn!(filter = self.name(), reason, next, "a filter's instance failed");
        }
        slow.last_error = Some(reason);
    }

    /// Callbacks so far.
    #[cfg(test)]
    pub(crate) fn calls(&self) -> u64 {
        self.row(Instant::now()).calls
    }

    fn row(&self, now: Instant) -> StatusRow {
        let mut slow = lock(&self.slow);
        slow.settle();
        let sum = |field: fn(&Counters) -> &AtomicU64| -> u64 {
            slow.counters.iter().map(|counters| field(counters).load(Ordering::Relaxed)).sum()
        };
        StatusRow {
            namespace: self.source.namespace.clone(),
            name: self.source.name.clone(),
            sha256: self.source.sha256.clone(),
            health: match slow.restart.wait(now) {
                None => Health::Running,
                Some(_) if slow.restart.at_maximum(now) => Health::Quarantined,
                Some(_) => Health::BackingOff,
            },
            instances: slow.counters.len(),
            requests: slow.retired.0 + sum(|counters| &counters.requests),
            calls: slow.retired.1 + sum(|counters| &counters.calls),
            failures: self.failures.load(Ordering::Relaxed),
            timeouts: self.timeouts.load(Ordering::Relaxed),
            throttled: self.throttled.load(Ordering::Relaxed),
            memory_bytes: sum(|counters| &counters.memory),
            cpu_ms: slow.cpu_ms(),
            last_error: slow.last_error.clone(),
            refused: None,
        }
    }
}

impl Slow {
    /// Moves the counts of instances that are gone to the total.
    fn settle(&mut self) {
        let retired = &mut self.retired;
        self.counters.retain(|counters| {
            let alive = Arc::strong_count(counters) > 1;
            if !alive {
                retired.0 += counters.requests.load(Ordering::Relaxed);
                retired.1 += counters.calls.load(Ordering::Relaxed);
                retired.2 += counters.meter.used();
            }
            alive
        });
    }

    fn cpu_ms(&self) -> u64 {
        let time: Duration = self.counters.iter().map(|counters| counters.meter.used()).sum();
        u64::try_from((self.retired.2 + time).as_millis()).unwrap_or(u64::MAX)
    }
}

/// Every WASM filter of this process: one engine, one cache.
#[derive(Debug)]
pub struct Plugins {
    compiler: Compiler,
    cache: PathBuf,
    hollow: Vec<String>,
    trace: bool,
    /// Made with the first filter: a proxy without any has neither the engine nor its thread
    runtime: OnceLock<Arc<Runtime>>,
    starting: Mutex<()>,
    known: Mutex<HashMap<(String, String), Known>>,
}

#[derive(Debug, Default)]
struct Known {
    plugin: Weak<Plugin>,
    /// Digest of the newest version and why it is not used
    refused: Option<(String, String)>,
}

impl Plugins {
    /// Makes the cache directory. The engine is made with the first filter.
    ///
    /// # Errors
    /// When the directory is not there and cannot be made, or is not private.
    pub fn new(settings: Settings) -> Result<Self, FilterError> {
        Self::hollow(settings, &[])
    }

    /// The same, and each callback and host call is an event of target `filter_call`, at level trace. For authors: it costs.
    ///
    /// # Errors
    /// As [`Plugins::new`].
    pub fn traced(settings: Settings) -> Result<Self, FilterError> {
        Self::with(settings, &[], true)
    }

    /// The same, with host functions (`proxy_…`) that return Ok and do nothing: for runs that show what depends on them.
    pub(super) fn hollow(settings: Settings, hollow: &[&str]) -> Result<Self, FilterError> {
        Self::with(settings, hollow, false)
    }

    fn with(settings: Settings, hollow: &[&str], trace: bool) -> Result<Self, FilterError> {
        let Settings { compiler, cache } = settings;
        Cache::prepare(&cache)?;
        let hollow = hollow.iter().map(|name| (*name).to_owned()).collect();
        let (runtime, starting, known) = (OnceLock::new(), Mutex::default(), Mutex::default());
        Ok(Self { compiler, cache, hollow, trace, runtime, starting, known })
    }

    fn runtime(&self) -> Result<&Arc<Runtime>, FilterError> {
        if let Some(runtime) = self.runtime.get() {
            return Ok(runtime);
        }
        let _one = lock(&self.starting);
        if let Some(runtime) = self.runtime.get() {
            return Ok(runtime);
        }
        let hollow: Vec<&str> = self.hollow.iter().map(String::as_str).collect();
        let runtime = Arc::new(Runtime::new(&self.cache, &hollow, self.trace)?);
        Ok(self.runtime.get_or_init(|| runtime))
    }

    /// True: [`Plugins::prepare`] needs no bytes for this digest.
    pub fn has_module(&self, sha256: &str) -> bool {
        self.runtime().is_ok_and(|runtime| runtime.cache.has(sha256))
    }

    /// Compiles (in the cache, or from `module`), links and tries a filter: its start-up, `on_vm_start` and `on_configure` ran
    /// in a throw-away instance when this returns. The same specification again gives the same plugin, as long as it is in use.
    ///
    /// Off the data path: runs on the caller's runtime and its blocking threads.
    ///
    /// # Errors
    /// When the module or its configuration is refused; what serves stays as it is.
    pub async fn prepare(&self, spec: &mesh::Filter, module: Option<Bytes>) -> Result<Arc<Plugin>, FilterError> {
        let key = (spec.namespace.clone(), spec.name.clone());
        let same = lock(&self.known).get_mut(&key).and_then(|known| {
            let plugin = known.plugin.upgrade().filter(|plugin| plugin.source == *spec)?;
            known.refused = None;
            Some(plugin)
        });
        if let Some(plugin) = same {
            return Ok(plugin);
        }
        let result = self.prepare_new(spec, module).await;
        let mut known = lock(&self.known);
        known.retain(|_, known| known.plugin.strong_count() > 0 || known.refused.is_some());
        let entry = known.entry(key).or_default();
        match &result {
            Ok(plugin) => *entry = Known { plugin: Arc::downgrade(plugin), refused: None },
            // The caller fetches it and comes again.
            Err(FilterError::Missing(_)) => {}
            Err(error) => entry.refused = Some((spec.sha256.clone(), error.to_string())),
        }
        result
    }

    async fn prepare_new(&self, spec: &mesh::Filter, module: Option<Bytes>) -> Result<Arc<Plugin>, FilterError> {
        // Of the process: a worker finds its instance by it, whoever prepared the filter.
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let (runtime, source) = (Arc::clone(self.runtime()?), spec.clone());
        runtime.fill(&self.compiler, &spec.sha256, module).await?;
        let ready = tokio::task::spawn_blocking(move || runtime.ready(&source))
            .await
            .map_err(|error| FilterError::Io("trying a filter".into(), std::io::Error::other(error)))??;
        let or = |value: u64, default: u64| Duration::from_millis(if value == 0 { default } else { value });
        let restart = Restart::new(or(spec.backoff_ms, BACKOFF), or(spec.max_backoff_ms, MAX_BACKOFF));
        Ok(Arc::new(Plugin {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            ready,
            source: spec.clone(),
            failures: AtomicU64::new(0),
            timeouts: AtomicU64::new(0),
            throttled: AtomicU64::new(0),
            slow: Mutex::new(Slow { restart, last_error: None, counters: Vec::new(), retired: (0, 0, Duration::ZERO) }),
        }))
    }

    /// Appends the metrics that filters define, in Prometheus' text format.
    pub fn custom_metrics(&self, text: &mut String) {
        if let Some(runtime) = self.runtime.get() {
            runtime.metrics.prometheus(text);
        }
    }

    /// Rows of `/filters`, by namespace and name. A version that only drains is not listed; what was refused is, even after its
    /// configuration is gone: whoever shows it knows what is configured.
    pub fn status(&self) -> Vec<StatusRow> {
        let now = Instant::now();
        let known = lock(&self.known);
        let mut rows: Vec<StatusRow> = known
            .iter()
            .filter_map(|((namespace, name), known)| match (known.plugin.upgrade(), &known.refused) {
                (Some(plugin), refused) => {
                    Some(StatusRow { refused: refused.as_ref().map(|(_, why)| why.clone()), ..plugin.row(now) })
                }
                (None, Some((sha256, why))) => Some(StatusRow::refused(namespace, name, sha256, why)),
                (None, None) => None,
            })
            .collect();
        rows.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
        rows
    }
}
