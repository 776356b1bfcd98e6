//! Runs cases in process: the host that serves traffic, its chains driven without sockets, the services that filters call played.

use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use outrigger_proto::mesh;
use sha2::{Digest, Sha256};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tracing::Dispatch;
use tracing_subscriber::layer::SubscriberExt as _;

use super::called::Called;
use super::capture::Capture;
use super::drive::drive;
use super::model::{Case, Expect, FilterSpec, Request, Step};
use super::observe::{Differences, Seen, compare, compare_refusal, compare_start, is_settled};
use super::tcp::Connection;
use crate::filter::wasm::clock;
use crate::filter::{
    Chain, Compiler, FilterError, Plugin, Plugins, Settings, StaticConnection, StreamInfo, connect, release_unused,
    warm,
};

/// The longest that something expected is waited for.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long nothing more must come before it is taken that nothing will.
const QUIET: Duration = Duration::from_millis(15);
/// How often one looks.
const LOOK: Duration = Duration::from_millis(2);
/// CPU time of a callback where the case does not say: far above what a guest needs on a busy machine.
const CALL_TIME_MS: u64 = 1000;

/// Finds a module by the name that a case gives.
pub type Modules<'a> = &'a dyn Fn(&str) -> Result<Vec<u8>, String>;

/// A host, and where its modules come from.
pub struct Runner<'a> {
    modules: Modules<'a>,
    plugins: Plugins,
    patience: Duration,
    capture: Capture,
}

/// What came of a case.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// None: as expected
    pub differences: Differences,
    /// Of each step that was reached
    pub steps: Vec<Seen>,
    /// What filters logged before the first step
    pub start: Vec<String>,
    /// Why the filters were refused, if they were
    pub refused: Option<String>,
    /// How long the steps took, without loading the filters
    pub took: Duration,
}

impl std::fmt::Debug for Runner<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Runner").field("plugins", &self.plugins).finish_non_exhaustive()
    }
}

/// One case on its way.
struct Play<'a> {
    runner: &'a Runner<'a>,
    called: Rc<Called>,
    /// What the filters' clocks show, if they are set
    now: Option<Duration>,
    plugins: Vec<Arc<Plugin>>,
    /// The TCP connection that was made last
    connection: Option<Connection>,
}

/// The moment that a case's `clock` names, since the Unix epoch.
///
/// # Errors
/// What is wrong with it.
pub fn moment(clock: &str) -> Result<Duration, String> {
    let wrong = |why: &dyn std::fmt::Display| format!("clock: {clock:?} is no time like 2026-01-01T00:00:00Z: {why}");
    let time = OffsetDateTime::parse(clock, &Rfc3339).map_err(|error| wrong(&error))?;
    Duration::try_from(time - OffsetDateTime::UNIX_EPOCH).map_err(|_| wrong(&"it is before 1970"))
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
        Ok(Self { modules, plugins: Plugins::hollow(settings, hollow)?, patience, capture: Capture::default() })
    }

    /// Runs a case on the calling thread.
    ///
    /// # Errors
    /// When the thread cannot have a runtime, or the case's clock is no time.
    pub fn run(&self, case: &Case) -> std::io::Result<Outcome> {
        let now = case.clock.as_deref().map(moment).transpose().map_err(std::io::Error::other)?;
        let lines = Dispatch::new(tracing_subscriber::registry().with(self.capture.clone()));
        let _guard = tracing::dispatcher::set_default(&lines);
        // Filters are tried on threads of the runtime: what they say there counts too, and they read the same clock.
        let begin = move || {
            std::mem::forget(tracing::dispatcher::set_default(&lines));
            clock::set(now);
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().on_thread_start(begin).build()?;
        let tasks = tokio::task::LocalSet::new();
        self.capture.take_lines();
        self.capture.take_notes();
        let called = Rc::<Called>::default();
        connect(Some(called.clone()));
        clock::set(now);
        let mut play = Play { runner: self, called, now, plugins: Vec::new(), connection: None };
        let outcome = tasks.block_on(&runtime, play.all(case));
        drop(play);
        // Filters end here, and may still use what is connected.
        tasks.block_on(&runtime, async { release_unused() });
        connect(None);
        clock::set(None);
        Ok(outcome)
    }
}

impl Play<'_> {
    async fn all(&mut self, case: &Case) -> Outcome {
        let capture = &self.runner.capture;
        let loaded = self.runner.load(&case.filters).await;
        let start = capture.take_lines();
        let refused = loaded.as_ref().err().cloned();
        let differences = compare_start(&case.start, refused.as_deref(), &start, true);
        let mut outcome = Outcome { differences, start, refused, ..Outcome::default() };
        let Ok(plugins) = loaded else { return outcome };
        self.plugins = plugins;
        let started = Instant::now();
        for (index, step) in case.steps.iter().enumerate() {
            let name = if step.name.is_empty() { format!("step {}", index + 1) } else { step.name.clone() };
            let mut differences = Differences::new();
            // A TCP connection is over with the last step that it may have.
            let next = case.steps.get(index + 1);
            let last = next.is_none_or(|next| next.tcp.as_ref().is_some_and(|tcp| tcp.connect));
            let mut seen = self.step(step, last, &mut differences).await;
            seen.log.retain(|line| !case.start.log.contains(line));
            differences.extend(compare(&step.expect, &seen));
            outcome.differences.extend(differences.into_iter().map(|difference| difference.of(&name)));
            outcome.steps.push(seen);
        }
        outcome.took = started.elapsed();
        outcome
    }

    async fn step(&mut self, step: &Step, last: bool, out: &mut Differences) -> Seen {
        self.called.play(&step.services);
        let mut seen = Seen::default();
        if let Some(update) = &step.update {
            match self.runner.load(update).await {
                Ok(new) => {
                    compare_refusal(&step.expect.refused, None, true, out);
                    self.plugins = new;
                    release_unused();
                }
                Err(refusal) => {
                    compare_refusal(&step.expect.refused, Some(&refusal), true, out);
                    seen.refused = Some(refusal);
                }
            }
        }
        if let Some(request) = &step.request {
            for _ in 0..request.times.max(1) {
                self.exchange(step, request, &mut seen).await;
            }
        }
        if let Some(tcp) = &step.tcp {
            if tcp.connect || self.connection.is_none() {
                let filters = self.plugins.iter().map(Plugin::filter).collect();
                self.connection = Some(Connection::new(filters, info()));
            }
            if let Some(connection) = &self.connection {
                connection.send(tcp);
            }
        }
        self.pass(Duration::from_millis(step.wait_ms)).await;
        self.settle(&step.expect, last).await;
        if let Some(connection) = &self.connection {
            seen.tcp = Some(connection.take());
            seen.properties = properties(connection.chain());
            seen.notes.extend(connection.failure());
        }
        seen.log = self.runner.capture.take_lines();
        for note in self.runner.capture.take_notes() {
            if !seen.notes.contains(&note) {
                seen.notes.push(note);
            }
        }
        seen.called = self.called.take();
        seen.metrics = self.runner.metrics();
        seen
    }

    async fn exchange(&mut self, step: &Step, request: &Request, seen: &mut Seen) {
        let chain = Chain::new(&self.plugins, info());
        let (runner, plugins) = (self.runner, &mut self.plugins);
        let during = async {
            if let Some(update) = &step.update_during
                && let Ok(new) = runner.load(update).await
            {
                *plugins = new;
            }
        };
        drive(&chain, request, &step.upstream, during, runner.patience, seen).await;
        chain.done();
        seen.properties = properties(&chain);
    }

    /// Lets time pass, as a worker does: what ends, ends meanwhile.
    async fn pass(&mut self, time: Duration) {
        let started = Instant::now();
        loop {
            let passed = started.elapsed().min(time);
            if let Some(now) = self.now {
                clock::set(Some(now + passed));
            }
            if passed == time {
                break;
            }
            tokio::time::sleep(LOOK.min(time - passed)).await;
            release_unused();
        }
        self.now = self.now.map(|now| now + time);
    }

    /// Waits until what is expected is there, and then until no more comes. `last`: the TCP connection is over then.
    async fn settle(&mut self, expect: &Expect, last: bool) {
        let ends = last && self.connection.is_some();
        // Lines of the filters may be those of the connection's end.
        self.wait(expect, !ends).await;
        if !expect.more_log || self.connection.is_some() {
            tokio::time::sleep(QUIET).await;
        }
        if let Some(connection) = self.connection.as_mut().filter(|_| ends) {
            connection.cut().await;
            self.wait(expect, true).await;
            tokio::time::sleep(QUIET).await;
        }
    }

    async fn wait(&self, expect: &Expect, lines: bool) {
        let runner = self.runner;
        let there = || {
            let called = expect.called.as_ref().is_none_or(|called| called.len() <= self.called.count());
            let said = !lines || expect.log.len() <= runner.capture.said().lines.len();
            let carried = match (&expect.tcp, &self.connection) {
                (Some(expected), Some(connection)) => connection.is_over() || is_settled(expected, &connection.seen()),
                _ => true,
            };
            called && said && carried
        };
        let started = Instant::now();
        while !there() && started.elapsed() < runner.patience {
            release_unused();
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// What is known of the exchange or connection that a case plays.
fn info() -> StreamInfo {
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
    info
}

/// What filters set; the parts of a name are joined by dots.
fn properties(chain: &Chain) -> BTreeMap<String, String> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    chain.properties(|all| all.iter().map(|(name, value)| (text(name).replace('\0', "."), text(value))).collect())
}

impl Runner<'_> {
    /// Every metric that filters defined; a histogram's value is its count.
    fn metrics(&self) -> BTreeMap<String, i64> {
        let mut text = String::new();
        self.plugins.custom_metrics(&mut text);
        let names = text.lines().filter_map(|line| Some(line.split_once("name=\"")?.1.split_once('"')?.0));
        names.filter_map(|name| Some((name.to_owned(), metric(&text, name)?))).collect()
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
