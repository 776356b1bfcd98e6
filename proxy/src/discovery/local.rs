//! No control plane: a directory of YAML, compiled by the same code, answers the same subscriptions.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use notify::{RecursiveMode, Watcher};
use outrigger_core::compile::{Answer, Catalog, Client, ClosedPolicy, Inputs, Module, Modules, wanted_modules};
use outrigger_core::key::Key;
use outrigger_core::resource::{self, Loaded, ModuleSource, Registration, ResourceId};
use outrigger_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};
use outrigger_proto::mesh;
use prost::Message;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;

use super::driver::{Event, Requests};
use crate::identity::IdentityStore;

/// Editors write a file in several steps; changes within this time are read once.
const DEBOUNCE: Duration = Duration::from_millis(100);

/// A directory of YAML as the source of configuration.
#[derive(Debug, Clone)]
pub struct Local {
    /// The directory
    pub directory: PathBuf,
    /// What the proxy's own application is
    pub own: Option<Arc<Registration>>,
    /// Who asks
    pub client: Client,
    /// Tells the trust domain and its roots
    pub identity: Arc<IdentityStore>,
    /// Bytes of the modules that filters name, by digest
    modules: Arc<Mutex<HashMap<String, Bytes>>>,
}

/// What a directory said last, per resource.
#[derive(Default)]
struct LastGood(BTreeMap<ResourceId, Arc<Loaded>>);

/// What was said to the engine: versions by kind and name; `None` is absence.
type Said = BTreeMap<(String, String), Option<String>>;

impl Local {
    /// Reads nothing yet.
    pub fn new(directory: PathBuf, own: Option<Registration>, client: Client, identity: Arc<IdentityStore>) -> Self {
        Self { directory, own: own.map(Arc::new), client, identity, modules: Arc::default() }
    }

    /// The bytes of a module, by digest.
    pub(super) fn module(&self, sha256: &str) -> Result<Bytes, String> {
        let modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        modules.get(sha256).cloned().ok_or_else(|| format!("no module with digest {sha256} is in the directory"))
    }

    /// Answers subscriptions for ever, again whenever a file changes.
    pub(super) async fn run(self, events: mpsc::Sender<Event>) {
        let (sender, mut changes) = mpsc::channel(1);
        let _watcher = watch(&self.directory, sender.clone());
        let mut certificates = self.identity.subscribe();
        let mut last_good = LastGood::default();
        let mut catalog = self.load(&mut last_good);
        let (queue, mut requests) = mpsc::unbounded_channel();
        let mut said = Said::new();
        for event in [Event::Opening(Requests { queue, node: None }), Event::Up] {
            if events.send(event).await.is_err() {
                return;
            }
        }
        loop {
            let mut ask_again = false;
            tokio::select! {
                request = requests.recv() => match request {
                    Some(request) => subscribe(&mut said, &request),
                    None => return,
                },
                _ = changes.recv() => ask_again = true,
                changed = certificates.changed() => ask_again = changed.is_ok(),
            }
            if ask_again {
                tokio::time::sleep(DEBOUNCE).await;
                while changes.try_recv().is_ok() {}
                catalog = self.load(&mut last_good);
            }
            while let Ok(request) = requests.try_recv() {
                subscribe(&mut said, &request);
            }
            for response in self.answers(&catalog, &mut said) {
                if events.send(Event::Response(response)).await.is_err() {
                    return;
                }
            }
        }
    }

    /// What changed for the subscriptions, one response per kind.
    fn answers(&self, catalog: &Catalog, said: &mut Said) -> Vec<DeltaDiscoveryResponse> {
        let mut responses: BTreeMap<String, DeltaDiscoveryResponse> = BTreeMap::new();
        for ((type_url, name), version) in said.iter_mut() {
            let response = responses.entry(type_url.clone()).or_insert_with(|| DeltaDiscoveryResponse {
                type_url: type_url.clone(),
                nonce: "local".to_owned(),
                ..DeltaDiscoveryResponse::default()
            });
            let answer = name.parse::<Key>().map_or(Answer::Absent, |key| catalog.answer(type_url, &key, &self.client));
            match answer {
                Answer::Absent if version.as_deref() != Some("") => {
                    *version = Some(String::new());
                    response.removed_resources.push(name.clone());
                }
                Answer::Found(found) if version.as_ref() != Some(&found.version) => {
                    *version = Some(found.version.clone());
                    let value = self.plain_if_alone(type_url, &found.bytes);
                    response.resources.push(Resource {
                        version: found.version,
                        name: found.name,
                        aliases: found.aliases,
                        resource: Some(outrigger_proto::Any { type_url: type_url.clone(), value }),
                    });
                }
                Answer::Absent | Answer::Found(_) => {}
            }
        }
        let filled = responses.into_values();
        filled.filter(|response| !response.resources.is_empty() || !response.removed_resources.is_empty()).collect()
    }

    /// Without a certificate the proxy cannot speak mTLS, not even with its own inbound side: its own application is then
    /// reached in plaintext.
    fn plain_if_alone(&self, type_url: &str, bytes: &Bytes) -> Bytes {
        let Some(own) = &self.own else { return bytes.clone() };
        if type_url != outrigger_proto::type_url::ENDPOINTS || self.identity.last().is_some() {
            return bytes.clone();
        }
        let Ok(mut endpoints) = mesh::Endpoints::decode(bytes.clone()) else { return bytes.clone() };
        let id = format!("{}/{}", own.namespace, own.name);
        for endpoint in endpoints.endpoints.iter_mut().filter(|endpoint| endpoint.id == id) {
            endpoint.identity.clear();
        }
        endpoints.encode_to_vec().into()
    }

    /// Reads and compiles everything. What is bad is logged, and its last good version stays.
    fn load(&self, last_good: &mut LastGood) -> Catalog {
        let mut found: BTreeMap<ResourceId, Arc<Loaded>> = BTreeMap::new();
        let mut closed = Vec::new();
        for file in yaml_files(&self.directory) {
            let name = file.display().to_string();
            let text = match std::fs::read_to_string(&file) {
                Ok(text) => text,
                Err(error) => {
                    tracing::error!(file = name, %error, "cannot be read");
                    continue;
                }
            };
            let parsed = resource::parse(&name, &text);
            for skipped in &parsed.skipped {
                tracing::info!("{skipped}");
            }
            for loaded in parsed.resources {
                found.insert(loaded.id.clone(), Arc::new(loaded));
            }
            for rejection in parsed.rejections {
                tracing::error!("{rejection}");
                let id = ResourceId {
                    kind: rejection.kind.clone(),
                    namespace: rejection.namespace.clone(),
                    name: rejection.name.clone(),
                };
                match (last_good.0.get(&id), rejection.closes.clone()) {
                    (Some(good), _) => {
                        found.insert(id, good.clone());
                    }
                    (None, Some(closes)) => closed.push(ClosedPolicy { closes, reason: rejection.to_string() }),
                    (None, None) => {}
                }
            }
        }
        last_good.0 = found;
        let (catalog, rejections) = Catalog::build(self.inputs(&last_good.0, closed));
        for rejection in rejections {
            tracing::error!("{rejection}");
        }
        catalog
    }

    fn inputs(&self, found: &BTreeMap<ResourceId, Arc<Loaded>>, closed: Vec<ClosedPolicy>) -> Inputs {
        let mut resources: Vec<Arc<Loaded>> = found.values().cloned().collect();
        resources.sort_by(|a, b| (&a.file, a.line).cmp(&(&b.file, b.line)));
        let trust_domain = match self.identity.last() {
            Some(own) => own.spiffe().trust_domain().to_owned(),
            None => {
                outrigger_core::compile::wanted_trust_domain(&resources).unwrap_or_else(|| "cluster.local".to_owned())
            }
        };
        let roots: Vec<Bytes> =
            self.identity.bundle().roots().iter().map(|root| Bytes::copy_from_slice(root)).collect();
        let mut inputs = Inputs {
            registrations: self.own.iter().cloned().collect(),
            closed,
            modules: self.read_modules(&resources),
            roots: BTreeMap::new(),
            resources,
            trust_domain: trust_domain.clone(),
        };
        if !roots.is_empty() {
            inputs.roots.insert(trust_domain, roots);
        }
        inputs
    }

    fn read_modules(&self, resources: &[Arc<Loaded>]) -> Modules {
        let mut modules = Modules::default();
        let mut held = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        for source in wanted_modules(resources).into_keys() {
            let ModuleSource::File(path) = &source else {
                let why = "needs a control plane, which fetches it; without one use `file`";
                modules.problems.insert(source, why.to_owned());
                continue;
            };
            match std::fs::read(path) {
                Ok(bytes) => {
                    let sha256 = hex::encode(Sha256::digest(&bytes));
                    modules.found.insert(source, Module { sha256: sha256.clone(), size: bytes.len() as u64 });
                    held.insert(sha256, bytes.into());
                }
                Err(error) => tracing::error!(file = path, %error, "a filter's module cannot be read"),
            }
        }
        modules.held = held.iter().map(|(sha256, bytes)| (sha256.clone(), bytes.len() as u64)).collect();
        modules
    }
}

fn subscribe(said: &mut Said, request: &DeltaDiscoveryRequest) {
    if let Some(error) = &request.error_detail {
        tracing::error!(problem = error.message, "a compiled resource was refused");
    }
    for name in &request.resource_names_unsubscribe {
        said.remove(&(request.type_url.clone(), name.clone()));
    }
    for name in &request.resource_names_subscribe {
        said.insert((request.type_url.clone(), name.clone()), None);
    }
}

/// Every `.yaml` and `.yml` below, in order of names.
fn yaml_files(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut directories = vec![directory.to_owned()];
    while let Some(directory) = directories.pop() {
        let entries = match std::fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(error) => {
                tracing::error!(directory = %directory.display(), %error, "cannot be read");
                continue;
            }
        };
        for path in entries.filter_map(|entry| entry.ok().map(|entry| entry.path())) {
            let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
            if path.is_dir() && !hidden {
                directories.push(path);
            } else if !hidden && path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml") {
                files.push(path);
            }
        }
    }
    files.sort();
    files
}

/// Without notifications the configuration still serves; it is only not reloaded.
fn watch(directory: &Path, changes: mpsc::Sender<()>) -> Option<notify::RecommendedWatcher> {
    let changed = move |event: notify::Result<notify::Event>| {
        if event.is_ok_and(|event| !event.kind.is_access()) {
            // A full channel means that a reload is due already.
            let _ = changes.try_send(());
        }
    };
    let watching = notify::recommended_watcher(changed).and_then(|mut watcher| {
        watcher.watch(directory, RecursiveMode::Recursive)?;
        Ok(watcher)
    });
    watching.inspect_err(|error| tracing::warn!(%error, "the directory is not watched: changes need a restart")).ok()
}
