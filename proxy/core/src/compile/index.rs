//! The catalog's indexes. They are persistent maps: a change copies what it touches, whatever the size of the mesh, and the
//! states before and after share the rest.

use std::cmp::Ordering;
use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::Arc;

use bytes::Bytes;
use rpds::{HashTrieMapSync, RedBlackTreeMapSync, RedBlackTreeSetSync};

use super::instance::Instance;
use super::{ClosedPolicy, Module};
use crate::key::ServiceKey;
use crate::resource::{
    AuthorizationPolicy, Dial, EndpointSlice, Loaded, MeshConfig, MtlsPolicy, Rejection, Resource, ResourceId, Route,
    SERVICE_NAME, Service, ServicePort, Settings, Target, WasmFilter,
};

/// Namespace and name.
pub(super) type Name = (String, String);
/// Several values for a key, in their order.
pub(super) type Many<K, V> = HashTrieMapSync<K, RedBlackTreeSetSync<V>>;

/// All resources, indexed. Cloning costs next to nothing.
#[derive(Debug, Clone, Default)]
pub struct Catalog {
    pub(super) trust_domain: String,
    pub(super) roots: BTreeMap<String, Vec<Bytes>>,
    pub(super) resources: RedBlackTreeMapSync<ResourceId, Placed>,
    pub(super) last_order: u64,
    pub(super) services: RedBlackTreeMapSync<ServiceKey, Arc<Loaded>>,
    /// The oldest of those that claim an address has it
    pub(super) vips: Many<IpAddr, Placed>,
    /// Services by one label of their selector: namespace, label, value
    pub(super) selecting: Many<(String, String, String), ServiceKey>,
    pub(super) slices: Many<ServiceKey, Placed>,
    /// Services by the addresses in their slices
    pub(super) sliced: Many<IpAddr, (ServiceKey, String)>,
    pub(super) written: HashTrieMapSync<Name, Arc<Instance>>,
    pub(super) registered: HashTrieMapSync<Name, Arc<Instance>>,
    /// By namespace, label, value; the names
    pub(super) by_label: Many<(String, String, String), String>,
    /// Instances whose application is dialled directly; the first has the address
    pub(super) by_address: Many<(IpAddr, u16), Name>,
    /// By parent, oldest first
    pub(super) routes: RedBlackTreeMapSync<ServiceKey, RedBlackTreeSetSync<Attached>>,
    /// Parents of the routes that name a Service as a backend
    pub(super) used_by: Many<ServiceKey, (ServiceKey, ResourceId)>,
    pub(super) policies: Arc<Policies>,
}

/// What governs others. A change of these builds the catalog anew.
#[derive(Debug, Default)]
pub(super) struct Policies {
    pub(super) mesh: MeshConfig,
    pub(super) traffic: HashMap<Attachment, Settings>,
    pub(super) authorization: HashMap<String, Vec<Named<AuthorizationPolicy>>>,
    pub(super) mtls: HashMap<String, Vec<MtlsPolicy>>,
    pub(super) closed: Vec<ClosedPolicy>,
    pub(super) filters: BTreeMap<Name, Filter>,
}

/// A resource at its place among the others.
#[derive(Debug, Clone)]
pub(super) struct Placed {
    /// Smaller is older; those of one timestamp go by name, those without by the order of the input
    pub(super) age: (i64, u64),
    pub(super) loaded: Arc<Loaded>,
}

/// A policy with its name.
#[derive(Debug, Clone)]
pub(super) struct Named<T> {
    pub(super) name: String,
    pub(super) policy: T,
}

/// A route on one of its parents.
#[derive(Debug, Clone)]
pub(super) struct Attached {
    /// As in [`Placed`]
    pub(super) age: (i64, u64),
    pub(super) loaded: Arc<Loaded>,
    /// Index into the route's parents
    pub(super) parent: usize,
}

impl Ord for Placed {
    fn cmp(&self, other: &Self) -> Ordering {
        self.age.cmp(&other.age).then_with(|| self.loaded.id.cmp(&other.loaded.id))
    }
}

impl PartialOrd for Placed {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Placed {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Placed {}

impl Ord for Attached {
    fn cmp(&self, other: &Self) -> Ordering {
        let age = self.age.cmp(&other.age);
        age.then_with(|| self.loaded.id.cmp(&other.loaded.id)).then_with(|| self.parent.cmp(&other.parent))
    }
}

impl PartialOrd for Attached {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Attached {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Attached {}

impl Attached {
    pub(super) fn route(&self) -> Option<&Route> {
        match &self.loaded.resource {
            Resource::Route(route) => Some(route),
            _ => None,
        }
    }

    /// The ports of its parent that it is for.
    pub(super) fn ports<'a>(&'a self, service: &'a Service) -> impl Iterator<Item = &'a ServicePort> {
        let parent = self.route().and_then(|route| route.parents.get(self.parent));
        service.ports.iter().filter(move |port| {
            parent.is_some_and(|parent| {
                parent.port.is_none_or(|wanted| wanted == port.port)
                    && parent.section.as_ref().is_none_or(|wanted| *wanted == port.name)
            })
        })
    }
}

/// What a TrafficPolicy is attached to: the policy's namespace and its target.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Attachment {
    Namespace(String),
    Service(ServiceKey),
    Route { grpc: bool, namespace: String, name: String, rule: Option<String> },
}

/// A filter and its module, where that is at hand.
#[derive(Debug, Clone)]
pub(super) struct Filter {
    pub(super) spec: WasmFilter,
    pub(super) module: Option<Module>,
}

pub(super) fn attachment(namespace: &str, target: &Target) -> Attachment {
    match target {
        Target::Namespace => Attachment::Namespace(namespace.to_owned()),
        Target::Service(name) => Attachment::Service(key(namespace, name)),
        Target::Route { grpc, name, rule } => {
            Attachment::Route { grpc: *grpc, namespace: namespace.to_owned(), name: name.clone(), rule: rule.clone() }
        }
    }
}

pub(super) fn key(namespace: &str, name: &str) -> ServiceKey {
    ServiceKey { namespace: namespace.to_owned(), name: name.to_owned() }
}

pub(super) fn rejection(loaded: &Loaded, field: &str, reason: impl Into<String>) -> Rejection {
    Rejection {
        file: loaded.file.clone(),
        line: loaded.lines.of(field),
        kind: loaded.id.kind.clone(),
        namespace: loaded.id.namespace.clone(),
        name: loaded.id.name.clone(),
        field: field.to_owned(),
        reason: reason.into(),
        closes: None,
    }
}

fn add<K: Eq + Hash + Clone, V: Ord + Clone>(many: &mut Many<K, V>, key: K, value: V) {
    match many.get_mut(&key) {
        Some(values) => {
            values.insert_mut(value);
        }
        None => {
            many.insert_mut(key, RedBlackTreeSetSync::default().insert(value));
        }
    }
}

fn take<K: Eq + Hash + Clone, V: Ord + Clone>(many: &mut Many<K, V>, key: &K, value: &V) {
    if let Some(values) = many.get_mut(key) {
        values.remove_mut(value);
        if values.is_empty() {
            many.remove_mut(key);
        }
    }
}

/// The label by which a Service is found from an instance: one of its selector, or the one that names it.
fn found_by(key: &ServiceKey, service: &Service) -> (String, String, String) {
    let (label, value) = match service.selector.first_key_value() {
        Some((label, value)) => (label.as_str(), value.as_str()),
        None => (SERVICE_NAME, key.name.as_str()),
    };
    (key.namespace.clone(), label.to_owned(), value.to_owned())
}

impl Catalog {
    /// Puts a resource into the indexes that it belongs in. Policies are in [`Policies`].
    pub(super) fn place(&mut self, placed: &Placed) {
        let Placed { age, loaded } = placed;
        let ResourceId { namespace, name, .. } = &loaded.id;
        self.resources.insert_mut(loaded.id.clone(), placed.clone());
        match &loaded.resource {
            Resource::Service(service) => {
                let key = key(namespace, name);
                for vip in &service.vips {
                    add(&mut self.vips, *vip, placed.clone());
                }
                if !service.external {
                    add(&mut self.selecting, found_by(&key, service), key.clone());
                }
                self.services.insert_mut(key, loaded.clone());
            }
            Resource::EndpointSlice(slice) => {
                let key = key(namespace, &slice.service);
                for endpoint in &slice.endpoints {
                    add(&mut self.sliced, endpoint.address, (key.clone(), name.clone()));
                }
                add(&mut self.slices, key, placed.clone());
            }
            Resource::Route(route) => {
                for (parent, target) in route.parents.iter().enumerate() {
                    let parent_key = key(&target.namespace, &target.name);
                    for backend in route.rules.iter().flat_map(|rule| &rule.backends) {
                        let used = (parent_key.clone(), loaded.id.clone());
                        add(&mut self.used_by, key(&backend.namespace, &backend.name), used);
                    }
                    let attached = Attached { age: *age, loaded: loaded.clone(), parent };
                    match self.routes.get_mut(&parent_key) {
                        Some(all) => {
                            all.insert_mut(attached);
                        }
                        None => {
                            self.routes.insert_mut(parent_key, RedBlackTreeSetSync::default().insert(attached));
                        }
                    }
                }
            }
            Resource::Workload(workload) => {
                let instance = Instance::written(namespace, name, workload, &self.trust_domain);
                self.set_instance(&(namespace.clone(), name.clone()), Source::Written, Some(instance));
            }
            _ => {}
        }
    }

    /// Takes a resource out of the indexes again.
    pub(super) fn displace(&mut self, placed: &Placed) {
        let Placed { age, loaded } = placed;
        let ResourceId { namespace, name, .. } = &loaded.id;
        self.resources.remove_mut(&loaded.id);
        match &loaded.resource {
            Resource::Service(service) => {
                let key = key(namespace, name);
                for vip in &service.vips {
                    take(&mut self.vips, vip, placed);
                }
                take(&mut self.selecting, &found_by(&key, service), &key);
                self.services.remove_mut(&key);
            }
            Resource::EndpointSlice(slice) => {
                let key = key(namespace, &slice.service);
                for endpoint in &slice.endpoints {
                    take(&mut self.sliced, &endpoint.address, &(key.clone(), name.clone()));
                }
                take(&mut self.slices, &key, placed);
            }
            Resource::Route(route) => {
                for (parent, target) in route.parents.iter().enumerate() {
                    let parent_key = key(&target.namespace, &target.name);
                    for backend in route.rules.iter().flat_map(|rule| &rule.backends) {
                        let used = (parent_key.clone(), loaded.id.clone());
                        take(&mut self.used_by, &key(&backend.namespace, &backend.name), &used);
                    }
                    let attached = Attached { age: *age, loaded: loaded.clone(), parent };
                    if let Some(all) = self.routes.get_mut(&parent_key) {
                        all.remove_mut(&attached);
                        if all.is_empty() {
                            self.routes.remove_mut(&parent_key);
                        }
                    }
                }
            }
            Resource::Workload(_) => {
                self.set_instance(&(namespace.clone(), name.clone()), Source::Written, None);
            }
            _ => {}
        }
    }

    /// Sets or removes what one source says of an instance. What a running proxy says is newer than what a file says of it.
    pub(super) fn set_instance(&mut self, name: &Name, source: Source, instance: Option<Instance>) {
        if let Some(before) = self.instance(&name.0, &name.1).cloned() {
            self.index_instance(&before, false);
        }
        let of_source = match source {
            Source::Written => &mut self.written,
            Source::Registered => &mut self.registered,
        };
        match instance {
            Some(instance) => {
                of_source.insert_mut(name.clone(), Arc::new(instance));
            }
            None => {
                of_source.remove_mut(name);
            }
        }
        if let Some(now) = self.instance(&name.0, &name.1).cloned() {
            self.index_instance(&now, true);
        }
    }

    fn index_instance(&mut self, instance: &Instance, present: bool) {
        for (label, value) in &instance.labels {
            let key = (instance.namespace.clone(), label.clone(), value.clone());
            match present {
                true => add(&mut self.by_label, key, instance.name.clone()),
                false => take(&mut self.by_label, &key, &instance.name),
            }
        }
        if let Dial::Application(address) = instance.dial {
            let name = (instance.namespace.clone(), instance.name.clone());
            for port in &instance.ports {
                match present {
                    true => add(&mut self.by_address, (address, port.port), name.clone()),
                    false => take(&mut self.by_address, &(address, port.port), &name),
                }
            }
        }
    }

    /// What one instance of a workload is, from whichever source counts.
    pub(super) fn instance(&self, namespace: &str, name: &str) -> Option<&Arc<Instance>> {
        let name = (namespace.to_owned(), name.to_owned());
        self.registered.get(&name).or_else(|| self.written.get(&name))
    }

    /// The Service that an address belongs to.
    pub(super) fn at_vip(&self, address: IpAddr) -> Option<ServiceKey> {
        let first = self.vips.get(&address)?.first()?;
        Some(key(&first.loaded.id.namespace, &first.loaded.id.name))
    }

    /// Slices of a Service, oldest first.
    pub(super) fn slices_of(&self, key: &ServiceKey) -> impl Iterator<Item = &EndpointSlice> {
        self.slices.get(key).into_iter().flatten().filter_map(|placed| match &placed.loaded.resource {
            Resource::EndpointSlice(slice) => Some(slice),
            _ => None,
        })
    }
}

/// Who says what an instance is.
#[derive(Debug, Clone, Copy)]
pub(super) enum Source {
    Written,
    Registered,
}
