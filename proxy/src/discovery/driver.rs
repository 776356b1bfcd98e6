//! Runs the engine: feeds it what arrives and executes what it puts out, in order.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use outrigger_core::balance::EndpointInfo;
use outrigger_core::chain::Bundle;
use outrigger_core::key::Key;
use outrigger_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node};
use rustls_pki_types::CertificateDer;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::engine::{Engine, Output, Prepare};
use super::local::Local;
use super::remote::Remote;
use super::{Directory, persist};
use crate::filter::{FilterError, Plugin, Plugins};
use crate::identity::IdentityStore;
use crate::upstream::Clusters;

const SWEEP: Duration = Duration::from_secs(60);
/// Changes within this time are persisted together.
const PERSIST_AFTER: Duration = Duration::from_millis(500);

/// What the source of configuration says.
#[derive(Debug)]
pub(super) enum Event {
    /// Requests can be queued; they are sent if the stream opens
    Opening(Requests),
    /// The stream is open
    Up,
    /// A response arrived
    Response(DeltaDiscoveryResponse),
    /// The stream ended
    Down(String),
}

/// The sending half of a stream.
#[derive(Debug)]
pub(super) struct Requests {
    pub(super) queue: mpsc::UnboundedSender<DeltaDiscoveryRequest>,
    /// Sent with the first request.
    pub(super) node: Option<Node>,
}

/// Where configuration comes from.
#[derive(Debug, Clone)]
pub enum Origin {
    /// A control plane
    Remote(Remote),
    /// A directory of YAML
    Local(Local),
}

/// Takes what discovery learns about endpoints.
pub trait Sink: Send + Sync + std::fmt::Debug {
    /// Replaces the endpoints of a shard.
    fn set(&self, backend: &Arc<str>, shard: u32, endpoints: Vec<EndpointInfo>);
    /// Forgets every other backend.
    fn retain(&self, backends: &HashSet<Arc<str>>);
}

impl Sink for Clusters {
    fn set(&self, backend: &Arc<str>, shard: u32, endpoints: Vec<EndpointInfo>) {
        self.set_endpoints(backend, shard, endpoints);
    }

    fn retain(&self, backends: &HashSet<Arc<str>>) {
        Clusters::retain(self, |key| backends.contains(key));
    }
}

/// What discovery works with.
#[derive(Debug)]
pub struct Discovery {
    /// Where answers are published
    pub directory: Arc<Directory>,
    /// What the data path asks for
    pub wanted: mpsc::Receiver<Key>,
    /// Where endpoints go
    pub sink: Arc<dyn Sink>,
    /// Where roots go
    pub identity: Arc<IdentityStore>,
    /// Prepares filters; `None` refuses them
    pub plugins: Option<Arc<Plugins>>,
    /// Where configuration comes from
    pub origin: Origin,
    /// Name of the workload
    pub workload: String,
    /// Namespace of the workload
    pub namespace: String,
    /// Where the last configuration is kept
    pub state: Option<PathBuf>,
}

struct Driver {
    engine: Engine,
    directory: Arc<Directory>,
    sink: Arc<dyn Sink>,
    identity: Arc<IdentityStore>,
    plugins: Option<Arc<Plugins>>,
    origin: Origin,
    requests: Option<Requests>,
    preparing: JoinSet<(Prepare, Result<Arc<Plugin>, String>)>,
    unsaved: bool,
    was_up: bool,
    /// Why it is down, as it was last said
    down: Option<String>,
}

impl Discovery {
    /// Runs for as long as somebody may ask.
    pub async fn run(self) {
        let Self { directory, mut wanted, sink, identity, plugins, origin, workload, namespace, state } = self;
        let mut driver = Driver {
            engine: Engine::new(&workload),
            directory,
            sink,
            identity,
            plugins,
            origin: origin.clone(),
            requests: None,
            preparing: JoinSet::new(),
            unsaved: false,
            was_up: false,
            down: None,
        };
        let file = state.map(|state| state.join("snapshot.pb"));
        let owner = format!("{namespace}/{workload}");
        if let Some(file) = &file {
            persist::restore(&mut driver.engine, file, &owner, Instant::now());
            driver.act();
            driver.unsaved = false;
        }
        let (sender, mut events) = mpsc::channel(16);
        let source = tokio::spawn(async move {
            match origin {
                Origin::Remote(remote) => remote.run(sender).await,
                Origin::Local(local) => local.run(sender).await,
            }
        });
        let mut sweep = tokio::time::interval(SWEEP);
        let mut save_at = None;
        loop {
            let deadline = driver.engine.deadline().map(tokio::time::Instant::from_std);
            tokio::select! {
                biased;
                event = events.recv() => match event {
                    Some(event) => driver.event(event),
                    None => break,
                },
                key = wanted.recv() => match key {
                    Some(key) => driver.engine.want(key),
                    None => break,
                },
                Some(prepared) = driver.preparing.join_next() => driver.prepared(prepared),
                () = at(deadline) => {}
                () = at(save_at) => {
                    save_at = None;
                    if let Some(file) = &file {
                        persist::save(&driver.engine, file, &owner);
                    }
                }
                _ = sweep.tick() => driver.engine.sweep(),
            }
            driver.act();
            if std::mem::take(&mut driver.unsaved) && save_at.is_none() {
                save_at = Some(tokio::time::Instant::now() + PERSIST_AFTER);
            }
        }
        source.abort();
    }
}

async fn at(deadline: Option<tokio::time::Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

impl Driver {
    fn event(&mut self, event: Event) {
        match event {
            Event::Opening(requests) => {
                self.requests = Some(requests);
                let first = self.engine.connected();
                self.send(first);
            }
            Event::Up => {
                tracing::info!("configuration is connected");
                self.was_up = true;
                self.down = None;
                self.directory.set_connected(true);
            }
            Event::Response(response) => self.engine.response(response, Instant::now()),
            Event::Down(why) => {
                self.requests = None;
                self.directory.set_connected(false);
                let held = self.directory.snapshot().targets.len();
                let state = if self.was_up { "away" } else { "not reached yet" };
                // Once per cause: it is tried again several times a second.
                if self.down.as_ref() == Some(&why) {
                    tracing::debug!(why, "the control plane is still {state}");
                } else {
                    tracing::warn!(why, held, "the control plane is {state}; what is held goes on serving");
                    self.down = Some(why);
                }
            }
        }
    }

    fn prepared(&mut self, done: Result<(Prepare, Result<Arc<Plugin>, String>), tokio::task::JoinError>) {
        match done {
            Ok((prepare, result)) => self.engine.prepared(prepare, result),
            Err(error) => tracing::error!(%error, "preparing a filter ended badly"),
        }
    }

    /// Installs what is complete. The order matters: requests (and so acknowledgements) come last.
    fn act(&mut self) {
        let Output { endpoints, backends, roots, snapshot, prepare, requests } = self.engine.take(Instant::now());
        self.unsaved |= snapshot.is_some() || !endpoints.is_empty() || roots.is_some();
        for (backend, shard, endpoints) in endpoints {
            self.sink.set(&backend, shard, endpoints);
        }
        if let Some(roots) = roots {
            let roots = roots.into_iter().map(|der| CertificateDer::from(der.to_vec()));
            let set = Bundle::new(roots).map_err(|error| error.to_string());
            if let Err(error) = set.and_then(|bundle| self.identity.set_bundle(bundle).map_err(|e| e.to_string())) {
                tracing::error!(error, "the trust bundle is not usable; the old one stays");
            }
        }
        if let Some(snapshot) = snapshot {
            self.directory.publish(snapshot);
        }
        if let Some(backends) = backends {
            self.sink.retain(&backends);
        }
        for prepare in prepare {
            let (plugins, origin) = (self.plugins.clone(), self.origin.clone());
            self.preparing.spawn(async move {
                let result = make(plugins, origin, &prepare).await;
                (prepare, result)
            });
        }
        self.send(requests);
    }

    fn send(&mut self, requests: Vec<DeltaDiscoveryRequest>) {
        let Some(stream) = &mut self.requests else { return };
        for mut request in requests {
            request.node = stream.node.take();
            // A stream that is gone says so by its own event.
            let _ = stream.queue.send(request);
        }
    }
}

async fn make(plugins: Option<Arc<Plugins>>, origin: Origin, prepare: &Prepare) -> Result<Arc<Plugin>, String> {
    let plugins = plugins.ok_or("this proxy runs no WASM filters")?;
    let digest = &prepare.spec.sha256;
    if plugins.has_module(digest) {
        match plugins.prepare(&prepare.spec, None).await {
            // What was compiled cannot be used: from the beginning.
            Err(FilterError::Missing(_)) => {}
            prepared => return prepared.map_err(|error| error.to_string()),
        }
    }
    let module = match &origin {
        Origin::Remote(remote) => remote.module(digest).await?,
        Origin::Local(local) => local.module(digest)?,
    };
    plugins.prepare(&prepare.spec, Some(module)).await.map_err(|error| error.to_string())
}
