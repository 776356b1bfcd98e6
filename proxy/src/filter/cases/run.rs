//! Runs cases in process: the host that serves traffic, its chains driven without sockets.

use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use outrigger_proto::mesh;
use sha2::{Digest, Sha256};
use tracing::Dispatch;
use tracing_subscriber::layer::SubscriberExt as _;

use super::capture::Capture;
use super::drive::drive;
use super::model::{Case, FilterSpec, Step};
use super::observe::{Differences, Seen, compare, compare_refusal, compare_start};
use crate::filter::{
    Chain, Compiler, FilterError, Plugin, Plugins, Settings, StaticConnection, StreamInfo, release_unused, warm,
};

/// The longest that something expected is waited for.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long nothing more must come before it is taken that nothing will.
const QUIET: Duration = Duration::from_millis(15);
/// CPU time of a callback where the case does not say: far above what a guest needs on a busy machine.
const CALL_TIME_MS: u64 = 1000;

/// Finds a module by the name that a case gives.
pub type Modules<'a> = &'a dyn Fn(&str) -> Result<Vec<u8>, String>;

/// A host, and where its modules come from.
pub struct Runner<'a> {
    modules: Modules<'a>,
    plugins: Plugins,
    patience: Duration,
    log: Arc<Mutex<Vec<String>>>,
}

impl std::fmt::Debug for Runner<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Runner").field("plugins", &self.plugins).finish_non_exhaustive()
    }
}

impl<'a> Runner<'a> {
    /// A host with a private directory for compiled modules. `hollow`: host functions that return Ok and do nothing, which shows
    /// what a case depends on.
    ///
    /// # Errors
    /// When the engine or the directory cannot be made.
    pub fn new(cache: &Path, modules: Modules<'a>, hollow: &[&str]) -> Result<Self, FilterError> {
        let settings = Settings { compiler: Compiler::InProcess, cache: cache.to_owned() };
        // What does not happen is waited for only where it should happen.
        let patience = if hollow.is_empty() { PATIENCE } else { PATIENCE / 20 };
        Ok(Self { modules, plugins: Plugins::hollow(settings, hollow)?, patience, log: Arc::default() })
    }

    /// Runs a case, and returns what differs from its expectations.
    ///
    /// # Errors
    /// When the calling thread cannot have a runtime.
    pub fn run(&self, case: &Case) -> std::io::Result<Differences> {
        let (differences, _) = self.observe(case)?;
        Ok(differences)
    }

    /// Runs a case, and returns what differs from its expectations, and what was seen of each step.
    ///
    /// # Errors
    /// When the calling thread cannot have a runtime.
    pub fn observe(&self, case: &Case) -> std::io::Result<(Differences, Vec<Seen>)> {
        let lines = Dispatch::new(tracing_subscriber::registry().with(Capture(Arc::clone(&self.log))));
        let _guard = tracing::dispatcher::set_default(&lines);
        // Filters are tried on threads of the runtime, and what they say there counts too.
        let begin = move || std::mem::forget(tracing::dispatcher::set_default(&lines));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().on_thread_start(begin).build()?;
        let tasks = tokio::task::LocalSet::new();
        self.take();
        let result = tasks.block_on(&runtime, self.all(case));
        release_unused();
        Ok(result)
    }

    async fn all(&self, case: &Case) -> (Differences, Vec<Seen>) {
        let loaded = self.load(&case.filters).await;
        let mut out = compare_start(&case.start, loaded.as_ref().err().map(String::as_str), &self.take(), true);
        let mut all = Vec::new();
        let Ok(mut plugins) = loaded else { return (out, all) };
        for (index, step) in case.steps.iter().enumerate() {
            let name = if step.name.is_empty() { format!("step {}", index + 1) } else { step.name.clone() };
            let mut seen = self.step(step, &mut plugins, &mut out).await;
            seen.log.retain(|line| !case.start.log.contains(line));
            out.extend(compare(&step.expect, &seen).into_iter().map(|line| format!("{name}: {line}")));
            all.push(seen);
        }
        drop(plugins);
        (out, all)
    }

    async fn step(&self, step: &Step, plugins: &mut Vec<Arc<Plugin>>, out: &mut Differences) -> Seen {
        if let Some(update) = &step.update {
            match self.load(update).await {
                Ok(new) => {
                    compare_refusal(&step.expect.refused, None, true, out);
                    *plugins = new;
                    release_unused();
                }
                Err(refusal) => compare_refusal(&step.expect.refused, Some(&refusal), true, out),
            }
        }
        let mut seen = Seen::default();
        if let Some(request) = &step.request {
            let connection = StaticConnection {
                source: Some(([127, 0, 0, 1], 51314).into()),
                destination: Some(([127, 0, 0, 1], 15001).into()),
                id: 1,
                workload: "filters".into(),
                namespace: "demo".into(),
                ..StaticConnection::default()
            };
            let mut info = StreamInfo::new(Rc::new(connection), Instant::now());
            info.service = Some("demo/reviews".into());
            let chain = Chain::new(plugins, info);
            let during = async {
                if let Some(update) = &step.update_during
                    && let Ok(new) = self.load(update).await
                {
                    *plugins = new;
                }
            };
            drive(&chain, request, &step.upstream, during, self.patience, &mut seen).await;
            chain.done();
            drop(chain);
        }
        tokio::time::sleep(Duration::from_millis(step.wait_ms)).await;
        self.settle(step).await;
        seen.log = self.take();
        seen.metrics = self.metrics(step);
        seen
    }

    /// Waits until the expected lines are there, and then until no more come.
    async fn settle(&self, step: &Step) {
        let started = Instant::now();
        while self.lines() < step.expect.log.len() && started.elapsed() < self.patience {
            release_unused();
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        if !step.expect.more_log {
            tokio::time::sleep(QUIET).await;
        }
    }

    fn metrics(&self, step: &Step) -> BTreeMap<String, i64> {
        let text = String::new();
        step.expect.metrics.keys().filter_map(|name| Some((name.clone(), metric(&text, name)?))).collect()
    }

    /// Prepares a chain and starts its instances, as a worker does.
    async fn load(&self, filters: &[FilterSpec]) -> Result<Vec<Arc<Plugin>>, String> {
        let mut plugins = Vec::with_capacity(filters.len());
        for (index, spec) in filters.iter().enumerate() {
            let module = (self.modules)(&spec.module)?;
            let source = source(index, spec, &module);
            plugins.push(
                self.plugins.prepare(&source, Some(Bytes::from(module))).await.map_err(|error| error.to_string())?,
            );
        }
        plugins.iter().for_each(warm);
        Ok(plugins)
    }

    fn lines(&self) -> usize {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.log.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The value of a filter's metric in Prometheus' text format; a histogram's is its count.
pub fn metric(text: &str, name: &str) -> Option<i64> {
    let label = format!("name=\"{name}\"");
    text.lines().find_map(|line| {
        let (series, value) = line.rsplit_once(' ')?;
        let (family, labels) = series.split_once('{')?;
        let is = labels.contains(&label) && !family.ends_with("_sum") && !family.ends_with("_bucket");
        is.then(|| value.parse().ok()).flatten()
    })
}

/// The specification as the control plane would send it.
fn source(index: usize, spec: &FilterSpec, module: &[u8]) -> mesh::Filter {
    let upstream = |name: &String| {
        let upstream = mesh::filter::Upstream { namespace: "demo".into(), name: name.clone(), port: 80 };
        (name.clone(), upstream)
    };
    mesh::Filter {
        namespace: "demo".into(),
        name: spec.name_at(index),
        sha256: hex::encode(Sha256::digest(module)),
        size: module.len() as u64,
        root_id: spec.root_id.clone(),
        configuration: spec.configuration.clone().into(),
        fail_open: spec.fail_open,
        vm_id: spec.vm_id.clone(),
        vm_configuration: spec.vm_configuration.clone().into(),
        environment: spec.environment.clone().into_iter().collect(),
        memory: spec.memory,
        call_time_ms: if spec.call_time_ms == 0 { CALL_TIME_MS } else { spec.call_time_ms },
        body: spec.body_limit,
        upstreams: spec.upstreams.iter().map(upstream).collect(),
        ..mesh::Filter::default()
    }
}
