//! No control plane: a directory of YAML, compiled by the same code, answers the same subscriptions.

use std::collections::{BTreeMap, HashMap};
use std::io::ErrorKind;
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
/// How often a first reading that failed is tried again, beside when something changes.
const REREAD: Duration = Duration::from_secs(5);

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

/// What a directory said last.
#[derive(Default)]
struct LastGood {
    resources: BTreeMap<ResourceId, Arc<Loaded>>,
    /// What fails closed, by the file that says so
    closed: Vec<(String, ClosedPolicy)>,
    /// Files and directories that could not be read
    unread: Vec<PathBuf>,
}

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
        let Some(mut catalog) = self.first(&mut last_good, &mut changes, &events).await else { return };
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
                let known = std::mem::take(&mut last_good.unread);
                catalog = self.load(&mut last_good, &known);
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

    /// The first reading. What cannot be read may be a policy, and no earlier version of it is held: nothing is answered
    /// until it can be. `None`: nobody asks any more.
    async fn first(
        &self,
        last_good: &mut LastGood,
        changes: &mut mpsc::Receiver<()>,
        events: &mpsc::Sender<Event>,
    ) -> Option<Catalog> {
        let mut known = Vec::new();
        loop {
            let catalog = self.load(last_good, &known);
            if last_good.unread.is_empty() {
                return Some(catalog);
            }
            if known != last_good.unread {
                let directory = self.directory.display();
                tracing::error!(%directory, "nothing serves until every file of --config can be read: repair or remove those named");
                known.clone_from(&last_good.unread);
            }
            tokio::select! {
                _ = changes.recv() => tokio::time::sleep(DEBOUNCE).await,
                () = tokio::time::sleep(REREAD) => {}
                () = events.closed() => return None,
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

    /// Reads and compiles everything. What is bad is logged, unless it is among `known`, and its last good version stays.
    fn load(&self, last_good: &mut LastGood, known: &[PathBuf]) -> Catalog {
        let mut now = LastGood::default();
        let unreadable = |path: PathBuf, error: &std::io::Error, now: &mut LastGood| {
            if !known.contains(&path) {
                tracing::error!(file = %path.display(), %error, "cannot be read; what it said before stays");
            }
            now.unread.push(path);
        };
        let (files, unlisted) = yaml_files(&self.directory);
        for (directory, error) in unlisted {
            unreadable(directory, &error, &mut now);
        }
        for file in files {
            match std::fs::read_to_string(&file) {
                Ok(text) => take(&file.display().to_string(), &text, last_good, &mut now),
                // Gone since it was listed: another event follows.
                Err(error) if error.kind() == ErrorKind::NotFound && !file.is_symlink() => {}
                Err(error) => unreadable(file, &error, &mut now),
            }
        }
        now.keep_unread(last_good);
        *last_good = now;
        let closed = last_good.closed.iter().map(|(_, closed)| closed.clone()).collect();
        let (catalog, rejections) = Catalog::build(self.inputs(&last_good.resources, closed));
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

impl LastGood {
    /// What files that cannot be read said before, they say still; what another file says now goes before it.
    fn keep_unread(&mut self, before: &Self) {
        let unread: Vec<PathBuf> = self.unread.iter().map(|path| path.display().to_string().into()).collect();
        let kept = |file: &str| unread.iter().any(|path| Path::new(file).starts_with(path));
        for (id, loaded) in before.resources.iter().filter(|(_, loaded)| kept(&loaded.file)) {
            self.resources.entry(id.clone()).or_insert_with(|| loaded.clone());
        }
        self.closed.extend(before.closed.iter().filter(|(file, _)| kept(file)).cloned());
    }
}

/// What the text of a file says; of what is bad in it, the version before.
fn take(file: &str, text: &str, before: &LastGood, now: &mut LastGood) {
    let parsed = resource::parse(file, text);
    for skipped in &parsed.skipped {
        tracing::info!("{skipped}");
    }
    for loaded in parsed.resources {
        now.resources.insert(loaded.id.clone(), Arc::new(loaded));
    }
    for rejection in parsed.rejections {
        tracing::error!("{rejection}");
        let id = ResourceId {
            kind: rejection.kind.clone(),
            namespace: rejection.namespace.clone(),
            name: rejection.name.clone(),
        };
        match (before.resources.get(&id), rejection.closes.clone()) {
            (Some(good), _) => {
                now.resources.insert(id, good.clone());
            }
            (None, Some(closes)) => {
                now.closed.push((file.to_owned(), ClosedPolicy { closes, reason: rejection.to_string() }));
            }
            (None, None) => {}
        }
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

/// Every `.yaml` and `.yml` below, in order of names, and the directories that cannot be listed.
fn yaml_files(directory: &Path) -> (Vec<PathBuf>, Vec<(PathBuf, std::io::Error)>) {
    let mut files = Vec::new();
    let mut unlisted = Vec::new();
    let mut directories = vec![directory.to_owned()];
    while let Some(below) = directories.pop() {
        let entries = std::fs::read_dir(&below).and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
        let entries = match entries {
            Ok(entries) => entries,
            // Gone since it was listed; the directory itself is only away.
            Err(error) if error.kind() == ErrorKind::NotFound && below != directory => continue,
            Err(error) => {
                unlisted.push((below, error));
                continue;
            }
        };
        for entry in entries {
            let path = entry.path();
            let hidden = entry.file_name().to_string_lossy().starts_with('.');
            // The listing tells it even of a directory that may not be entered.
            let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir()) || path.is_dir();
            if is_directory && !hidden {
                directories.push(path);
            } else if !hidden && path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml") {
                files.push(path);
            }
        }
    }
    files.sort();
    (files, unlisted)
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

#[cfg(test)]
mod tests {
    use super::*;

    const SERVICE: &str = "\
apiVersion: v1
kind: Service
metadata: {name: NAME, namespace: demo}
spec: {selector: {app: NAME}, ports: [{name: http, port: 80}]}
";
    const BAD_POLICY: &str = "\
apiVersion: outrigger.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: p, namespace: demo}
spec: {action: Perhaps}
";

    fn local(directory: &Path) -> Local {
        let client = Client { namespace: "demo".into(), workload: "web-0".into(), service_account: "web".into() };
        Local::new(directory.to_owned(), None, client, IdentityStore::new(None))
    }

    #[test]
    fn what_cannot_be_read_says_what_it_said_before() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let (local, mut last_good) = (local(directory.path()), LastGood::default());
        std::fs::write(at("a.yaml"), SERVICE.replace("NAME", "a")).unwrap();
        std::fs::write(at("b.yaml"), SERVICE.replace("NAME", "b")).unwrap();
        std::fs::write(at("p.yaml"), BAD_POLICY).unwrap();
        local.load(&mut last_good, &[]);
        assert_eq!((last_good.resources.len(), last_good.closed.len()), (2, 1));
        // Neither is text.
        std::fs::write(at("a.yaml"), [0xff]).unwrap();
        std::fs::write(at("p.yaml"), [0xff]).unwrap();
        std::fs::remove_file(at("b.yaml")).unwrap();
        for _ in 0..2 {
            local.load(&mut last_good, &[]);
            let names: Vec<_> = last_good.resources.keys().map(|id| id.name.as_str()).collect();
            assert_eq!((names, last_good.closed.len()), (vec!["a"], 1));
            assert_eq!(last_good.unread, [at("a.yaml"), at("p.yaml")]);
        }
        std::fs::remove_file(at("a.yaml")).unwrap();
        std::fs::remove_file(at("p.yaml")).unwrap();
        local.load(&mut last_good, &[]);
        assert!(last_good.resources.is_empty() && last_good.closed.is_empty() && last_good.unread.is_empty());
    }

    #[tokio::test]
    async fn nothing_is_answered_before_everything_could_be_read_once() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("a.yaml");
        std::fs::write(&file, [0xff]).unwrap();
        let (local, mut last_good) = (local(directory.path()), LastGood::default());
        let (changed, mut changes) = mpsc::channel(1);
        let (events, _receiver) = mpsc::channel(1);
        let waiting = local.first(&mut last_good, &mut changes, &events);
        assert!(tokio::time::timeout(Duration::from_millis(200), waiting).await.is_err());
        std::fs::write(&file, SERVICE.replace("NAME", "a")).unwrap();
        changed.send(()).await.unwrap();
        assert!(local.first(&mut last_good, &mut changes, &events).await.is_some());
        assert_eq!(last_good.resources.len(), 1);
    }
}
