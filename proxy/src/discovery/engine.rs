//! What responses do: link each resource, wait for what it needs, install it, and acknowledge what is installed. Pure but
//! for its outputs, which the driver executes in order: endpoints, roots, snapshot, requests. An acknowledgement is therefore
//! sent after the swap; readers load the swapped pointer itself, so it is visible to all of them by then.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use outrigger_core::balance::EndpointInfo;
use outrigger_core::key::{Key, ServiceKey};
use outrigger_core::link::{self, Backend, Inbound, InboundPort, Mesh, Port, Service};
use outrigger_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};
use outrigger_proto::mesh as wire;
use prost::Message;

use super::reply::OpenResponse;
use super::subscriptions::{Answer, Kind, Subscriptions};
use crate::filter::Plugin;
use crate::snapshot::{FilterSlot, Snapshot, Target, Use, Workload};

/// Destinations that are subscribed to at once; the longest unused makes room.
const MAX_WANTED: usize = 4096;
/// Sweeps without a use after which a destination is given up: with a sweep each minute, ten minutes.
const IDLE_SWEEPS: u32 = 10;
/// How long a new version of a service waits for the first endpoints of its backends.
const ENDPOINTS_WAIT: Duration = Duration::from_secs(2);

/// The state of discovery.
#[derive(Debug, Default)]
pub(crate) struct Engine {
    pub(super) subscriptions: Subscriptions,
    wanted: HashMap<Key, Want>,
    mesh: Option<Arc<Mesh>>,
    inbound: Option<Arc<Inbound>>,
    pending_inbound: Option<Pending<Inbound>>,
    /// `inbound` has the rules of `pending_inbound` and older filters.
    mixed: bool,
    services: HashMap<String, Arc<Service>>,
    pending_services: BTreeMap<String, Pending<Service>>,
    workloads: HashMap<String, Target>,
    filters: BTreeMap<String, FilterSlot>,
    preparing: HashMap<String, Prepare>,
    /// Accepted resources as received: what is persisted.
    pub(super) accepted: BTreeMap<(Kind, String), Resource>,
    open: Vec<OpenResponse>,
    dirty: bool,
    output: Output,
}

/// What the driver has to do, in the order of the fields.
#[derive(Debug, Default)]
pub(crate) struct Output {
    /// Endpoints of a shard of a backend
    pub(crate) endpoints: Vec<(Arc<str>, u32, Vec<EndpointInfo>)>,
    /// Keys of all backends in use, when that changed
    pub(crate) backends: Option<HashSet<Arc<str>>>,
    /// DER of the roots to trust
    pub(crate) roots: Option<Vec<Bytes>>,
    /// To be swapped in
    pub(crate) snapshot: Option<Snapshot>,
    /// Filters to compile; [`Engine::prepared`] takes the result
    pub(crate) prepare: Vec<Prepare>,
    /// To be sent, last of all
    pub(crate) requests: Vec<DeltaDiscoveryRequest>,
}

/// A filter to compile.
#[derive(Debug, Clone)]
pub(crate) struct Prepare {
    pub(crate) key: String,
    pub(crate) spec: wire::Filter,
    resource: Resource,
}

/// A linked resource that waits for what it names.
#[derive(Debug)]
struct Pending<T> {
    linked: Arc<T>,
    resource: Resource,
    since: Instant,
}

#[derive(Debug)]
struct Want {
    used: Use,
    idle: u32,
}

/// What became of one resource of a response.
enum Fate {
    Installed,
    Waits,
}

impl Engine {
    /// Subscribes to what every proxy needs.
    pub(crate) fn new(workload: &str) -> Self {
        let mut engine = Self::default();
        engine.subscriptions.add(Kind::Mesh, &Key::Mesh.to_string());
        engine.subscriptions.add(Kind::SelfOf, &Key::SelfOf(workload.to_owned()).to_string());
        engine
    }

    /// Subscribes to a destination.
    pub(crate) fn want(&mut self, key: Key) {
        if self.wanted.contains_key(&key) || kinds(&key).is_empty() {
            return;
        }
        if self.wanted.len() >= MAX_WANTED {
            self.sweep_used();
            let oldest = self.wanted.iter().max_by_key(|(_, want)| want.idle).map(|(key, _)| key.clone());
            if let Some(oldest) = oldest {
                self.give_up(&oldest);
            }
        }
        for kind in kinds(&key) {
            self.subscriptions.add(*kind, &key.to_string());
        }
        self.wanted.insert(key, Want { used: Use::default(), idle: 0 });
        // The answer may be here already, under another name.
        self.dirty = true;
    }

    /// Once a minute: gives up what was not used for long.
    pub(crate) fn sweep(&mut self) {
        self.sweep_used();
        let idle: Vec<Key> =
            self.wanted.iter().filter(|(_, want)| want.idle >= IDLE_SWEEPS).map(|(key, _)| key.clone()).collect();
        for key in idle {
            self.give_up(&key);
        }
    }

    fn sweep_used(&mut self) {
        for want in self.wanted.values_mut() {
            want.idle = if want.used.take() { 0 } else { want.idle + 1 };
        }
    }

    fn give_up(&mut self, key: &Key) {
        self.wanted.remove(key);
        for kind in kinds(key) {
            self.subscriptions.remove(*kind, &key.to_string());
        }
        let held = |subscriptions: &Subscriptions, kind, name: &String| {
            subscriptions
                .names(kind)
                .any(|key| matches!(subscriptions.answer(kind, key), Some(Answer::Is(is)) if is == name))
        };
        let subscriptions = &self.subscriptions;
        self.services.retain(|name, _| held(subscriptions, Kind::Service, name));
        self.pending_services.retain(|name, _| held(subscriptions, Kind::Service, name));
        self.workloads.retain(|name, _| held(subscriptions, Kind::Workload, name));
        self.accepted.retain(|(kind, name), _| {
            !matches!(kind, Kind::Service | Kind::Workload) || held(subscriptions, *kind, name)
        });
        self.dirty = true;
    }

    /// A new connection: what was not acknowledged on the old one never will be.
    pub(crate) fn connected(&mut self) -> Vec<DeltaDiscoveryRequest> {
        self.open.clear();
        // The other side may be back at the version that is held and send nothing, and what is pending would go in after
        // all: it is asked for again, and the answer supersedes it.
        let services = self.pending_services.keys().map(|name| (Kind::Service, name));
        let filters = self.preparing.keys().map(|name| (Kind::Filter, name));
        let inbound = self.pending_inbound.iter().map(|pending| (Kind::SelfOf, &pending.resource.name));
        for (kind, name) in services.chain(filters).chain(inbound) {
            self.subscriptions.forget(kind, name);
        }
        self.subscriptions.first()
    }

    /// Takes one response. Every resource of it is judged alone.
    pub(crate) fn response(&mut self, response: DeltaDiscoveryResponse, now: Instant) {
        let mut open = OpenResponse::new(response.type_url, response.nonce);
        match Kind::of(&open.type_url) {
            None => open.fail("", "this proxy knows no resources of this type"),
            Some(kind) => {
                for resource in response.resources {
                    let name = resource.name.clone();
                    open.supersede(&mut self.open, &name);
                    match self.resource(kind, resource, now) {
                        Ok(Fate::Installed) => {}
                        Ok(Fate::Waits) => open.wait(name),
                        Err(problem) => open.fail(&name, &problem),
                    }
                }
                for name in response.removed_resources {
                    open.supersede(&mut self.open, &name);
                    self.removed(kind, &name);
                }
            }
        }
        self.open.push(open);
    }

    fn resource(&mut self, kind: Kind, resource: Resource, now: Instant) -> Result<Fate, String> {
        let Some(any) = &resource.resource else { return Err("the resource is empty".to_owned()) };
        if any.type_url != kind.type_url() {
            return Err(format!("the resource is of type {}", any.type_url));
        }
        let value = any.value.as_ref();
        match kind {
            Kind::Mesh => {
                let mesh = link::mesh(&decode(value)?).map_err(text)?;
                self.subscriptions.add(Kind::Bundle, &Key::Bundle(mesh.trust_domain.to_string()).to_string());
                self.mesh = Some(Arc::new(mesh));
                self.accept(kind, resource);
            }
            Kind::Bundle => {
                let bundle: wire::Bundle = decode(value)?;
                if bundle.roots.is_empty() {
                    return Err("roots: empty, so that nobody could be trusted".to_owned());
                }
                self.output.roots = Some(bundle.roots);
                self.accept(kind, resource);
            }
            Kind::SelfOf => {
                let linked = Arc::new(link::inbound(&decode(value)?).map_err(text)?);
                self.subscriptions.found(kind, &resource.name, &resource.aliases);
                self.mixed = false;
                self.pending_inbound = Some(Pending { linked, resource, since: now });
                return Ok(Fate::Waits);
            }
            Kind::Service => {
                let linked = Arc::new(link::service(&decode(value)?).map_err(text)?);
                if self.subscriptions.found(kind, &resource.name, &resource.aliases) {
                    self.dirty = true;
                    self.pending_services.insert(resource.name.clone(), Pending { linked, resource, since: now });
                    return Ok(Fate::Waits);
                }
            }
            Kind::Workload => {
                let (endpoint, protocol) = link::workload(&decode(value)?).map_err(text)?;
                if self.subscriptions.found(kind, &resource.name, &resource.aliases) {
                    let workload = Arc::new(Workload { endpoint, protocol });
                    self.workloads.insert(resource.name.clone(), Target::Workload(workload));
                    self.accept(kind, resource);
                }
            }
            Kind::Endpoints => {
                let linked = link::endpoints(&decode(value)?).map_err(text)?;
                let (backend, shard) = shard(&resource.name)?;
                if self.subscriptions.found(kind, &resource.name, &[]) {
                    self.output.endpoints.push((backend.into(), shard, linked));
                    self.accept(kind, resource);
                }
            }
            Kind::Filter => {
                let spec: wire::Filter = decode(value)?;
                if self.subscriptions.found(kind, &resource.name, &[]) {
                    let prepare = Prepare { key: resource.name.clone(), spec, resource };
                    self.preparing.insert(prepare.key.clone(), prepare.clone());
                    self.output.prepare.push(prepare);
                    return Ok(Fate::Waits);
                }
            }
        }
        Ok(Fate::Installed)
    }

    fn accept(&mut self, kind: Kind, mut resource: Resource) {
        // A copy of its own: what was received may be a small part of a large buffer.
        if let Some(any) = &mut resource.resource {
            any.value = Bytes::copy_from_slice(&any.value);
        }
        self.subscriptions.found(kind, &resource.name, &resource.aliases);
        self.subscriptions.accepted(kind, &resource.name, &resource.version);
        self.accepted.insert((kind, resource.name.clone()), resource);
        // Endpoints have a place of their own: a change of theirs rebuilds no snapshot.
        self.dirty |= kind != Kind::Endpoints;
    }

    fn removed(&mut self, kind: Kind, name: &str) {
        self.subscriptions.gone(kind, name);
        self.accepted.remove(&(kind, name.to_owned()));
        self.dirty = true;
        match kind {
            Kind::Mesh | Kind::Bundle => {}
            // Nobody is told what to enforce any more: what was enforced stays enforced.
            Kind::SelfOf => self.pending_inbound = None,
            Kind::Service => {
                self.services.remove(name);
                self.pending_services.remove(name);
            }
            Kind::Workload => {
                self.workloads.remove(name);
            }
            Kind::Filter => {
                self.filters.remove(name);
                self.preparing.remove(name);
            }
            Kind::Endpoints => {
                if let Ok((backend, shard)) = shard(name) {
                    self.output.endpoints.push((backend.into(), shard, Vec::new()));
                }
            }
        }
    }

    /// Between two replayed responses: the next one answers what the last one needs.
    pub(super) fn restored(&mut self) {
        self.subscribe_needs();
    }

    /// Takes the result of a [`Prepare`]. One that was overtaken by a newer version is forgotten.
    pub(crate) fn prepared(&mut self, prepare: Prepare, result: Result<Arc<Plugin>, String>) {
        let key = prepare.key;
        if self.preparing.get(&key).is_none_or(|newest| newest.resource.version != prepare.resource.version) {
            return;
        }
        self.preparing.remove(&key);
        let problem = match result {
            Ok(plugin) => {
                self.filters
                    .insert(key.clone(), FilterSlot { plugin: Some(plugin), fail_open: prepare.spec.fail_open });
                self.accept(Kind::Filter, prepare.resource);
                None
            }
            Err(problem) => {
                let slot = FilterSlot { plugin: None, fail_open: prepare.spec.fail_open };
                let kept = self.filters.entry(key.clone()).or_insert_with(|| slot.clone());
                if kept.plugin.is_none() {
                    // Nothing serves: the newest policy says what that means.
                    *kept = slot;
                }
                Some(problem)
            }
        };
        self.dirty = true;
        for open in &mut self.open {
            open.settle(Kind::Filter.type_url(), &key, problem.as_deref());
        }
    }

    /// When [`Engine::take`] must be called though nothing arrived.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.pending_services.values().map(|pending| pending.since + ENDPOINTS_WAIT).min()
    }

    /// Installs what is complete, and returns what has to be done.
    pub(crate) fn take(&mut self, now: Instant) -> Output {
        self.subscribe_needs();
        self.install_services(now);
        self.install_inbound();
        // What was installed may need less than what it replaced.
        self.subscribe_needs();
        let mut output = std::mem::take(&mut self.output);
        if std::mem::take(&mut self.dirty) {
            output.backends = Some(self.backends());
            output.snapshot = Some(self.snapshot());
        }
        output.requests = self.subscriptions.changes();
        let (done, open) = std::mem::take(&mut self.open).into_iter().partition(OpenResponse::is_done);
        self.open = open;
        output.requests.extend(done.into_iter().filter_map(OpenResponse::reply));
        output
    }

    fn install_services(&mut self, now: Instant) {
        let ready: Vec<String> = self
            .pending_services
            .iter()
            .filter(|(_, pending)| self.service_ready(pending, now))
            .map(|(name, _)| name.clone())
            .collect();
        for name in ready {
            let Some(pending) = self.pending_services.remove(&name) else { continue };
            self.services.insert(name.clone(), pending.linked);
            self.accept(Kind::Service, pending.resource);
            for open in &mut self.open {
                open.settle(Kind::Service.type_url(), &name, None);
            }
        }
    }

    fn service_ready(&self, pending: &Pending<Service>, now: Instant) -> bool {
        let mut filters = pending.linked.ports.iter().flat_map(Port::every_filter);
        let mut endpoints = pending.linked.backends.iter().flat_map(|backend| shards(backend));
        filters.all(|key| self.filter_answered(key))
            && (now >= pending.since + ENDPOINTS_WAIT
                || endpoints.all(|name| self.subscriptions.answered(Kind::Endpoints, &name)))
    }

    fn filter_answered(&self, key: &str) -> bool {
        self.filters.contains_key(key) || matches!(self.subscriptions.answer(Kind::Filter, key), Some(Answer::Absent))
    }

    /// Authorization never waits for a filter: while one of a new version's filters is not ready, the new rules apply with
    /// the old filters.
    fn install_inbound(&mut self) {
        let Some(pending) = &self.pending_inbound else { return };
        let ready =
            pending.linked.ports.iter().flat_map(InboundPort::every_filter).all(|key| self.filter_answered(key));
        if !ready {
            let mixed =
                self.inbound.as_ref().filter(|_| !self.mixed).and_then(|old| with_filters(&pending.resource, old));
            if let Some(mixed) = mixed {
                self.inbound = Some(Arc::new(mixed));
                self.mixed = true;
                self.dirty = true;
            }
            return;
        }
        let Some(pending) = self.pending_inbound.take() else { return };
        self.inbound = Some(pending.linked);
        let name = pending.resource.name.clone();
        self.accept(Kind::SelfOf, pending.resource);
        for open in &mut self.open {
            open.settle(Kind::SelfOf.type_url(), &name, None);
        }
    }

    /// Subscribes to exactly the endpoints and filters that held and pending resources name.
    fn subscribe_needs(&mut self) {
        let services = || self.services.values().chain(self.pending_services.values().map(|pending| &pending.linked));
        let endpoints: BTreeSet<String> =
            services().flat_map(|service| service.backends.iter().flat_map(|backend| shards(backend))).collect();
        let inbound = self.inbound.iter().chain(self.pending_inbound.iter().map(|pending| &pending.linked));
        let filters: BTreeSet<String> = services()
            .flat_map(|service| service.ports.iter().flat_map(Port::every_filter).cloned())
            .chain(inbound.flat_map(|inbound| inbound.ports.iter().flat_map(InboundPort::every_filter).cloned()))
            .collect();
        self.subscriptions.set(Kind::Endpoints, &endpoints);
        self.subscriptions.set(Kind::Filter, &filters);
        self.filters.retain(|key, _| filters.contains(key));
        self.preparing.retain(|key, _| filters.contains(key));
        self.accepted.retain(|(kind, name), _| match kind {
            Kind::Endpoints => endpoints.contains(name),
            Kind::Filter => filters.contains(name),
            _ => true,
        });
    }

    /// Keys of the backends of held and pending services.
    fn backends(&self) -> HashSet<Arc<str>> {
        let pending = self.pending_services.values().map(|pending| &pending.linked);
        pending
            .chain(self.services.values())
            .flat_map(|service| &service.backends)
            .map(|backend| backend.key.clone())
            .collect()
    }

    fn snapshot(&self) -> Snapshot {
        let mut snapshot = Snapshot {
            number: 0,
            mesh: self.mesh.clone(),
            inbound: self.inbound.clone(),
            filters: self.filters.clone(),
            targets: HashMap::with_capacity_and_hasher(self.wanted.len(), Default::default()),
        };
        for (key, want) in &self.wanted {
            if let Some(found) = self.target(key) {
                snapshot.targets.insert(key.clone(), (found, want.used.clone()));
            }
        }
        snapshot
    }

    /// What is known of a destination; `None` as long as a kind that could name it has not answered.
    fn target(&self, key: &Key) -> Option<Target> {
        let name = key.to_string();
        let mut known = true;
        for kind in kinds(key) {
            match (kind, self.subscriptions.answer(*kind, &name)) {
                (Kind::Service, Some(Answer::Is(is))) => {
                    return self.services.get(is).map(|service| Target::Service(service.clone()));
                }
                (_, Some(Answer::Is(is))) => return self.workloads.get(is).cloned(),
                (_, Some(Answer::Absent)) => {}
                (_, Some(Answer::Unknown) | None) => known = false,
            }
        }
        known.then_some(Target::Absent)
    }

    /// Destinations in use: they are asked for again after a restart.
    pub(crate) fn wanted(&self) -> impl Iterator<Item = &Key> {
        self.wanted.keys()
    }
}

/// The kinds that can answer for a destination, the stronger first.
fn kinds(key: &Key) -> &'static [Kind] {
    match key {
        Key::Service(_) | Key::Host(..) => &[Kind::Service],
        Key::Ip(_) => &[Kind::Service, Kind::Workload],
        _ => &[],
    }
}

fn shards(backend: &Backend) -> impl Iterator<Item = String> {
    let key = backend.key.clone();
    (0..backend.shards).map(move |shard| format!("endpoints/{key}/{shard}"))
}

/// Backend key and shard number of `endpoints/<backend key>/<shard>`.
fn shard(name: &str) -> Result<(String, u32), String> {
    match name.parse() {
        Ok(Key::Endpoints(ServiceKey { namespace, name }, port, shard)) => {
            Ok((format!("{namespace}/{name}:{port}"), shard))
        }
        Ok(_) => Err("the name is not of the form endpoints/<ns>/<svc>:<port>/<shard>".to_owned()),
        Err(bad) => Err(bad.to_string()),
    }
}

/// The resource linked once more, with the filters of an older version on the ports that both have.
fn with_filters(resource: &Resource, old: &Inbound) -> Option<Inbound> {
    let mut mixed = link::inbound(&decode(&resource.resource.as_ref()?.value).ok()?).ok()?;
    for port in &mut mixed.ports {
        if let Some(old) = old.port(port.port) {
            port.filters = old.filters.clone();
            port.stream_filters = old.stream_filters.clone();
        }
    }
    Some(mixed)
}

fn decode<M: Message + Default>(bytes: &[u8]) -> Result<M, String> {
    M::decode(bytes).map_err(|error| format!("cannot be decoded: {error}"))
}

#[allow(clippy::needless_pass_by_value)] // for map_err
fn text(error: link::LinkError) -> String {
    error.to_string()
}
