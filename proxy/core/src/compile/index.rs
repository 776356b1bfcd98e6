//! Building the catalog: every resource into its index, contradictions reported.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use bytes::Bytes;

use super::instance::Instance;
use super::{ClosedPolicy, Inputs, Module, Modules};
use crate::key::ServiceKey;
use crate::resource::{
    AuthorizationPolicy, Dial, EndpointSlice, Loaded, MeshConfig, ModuleSource, MtlsPolicy, PortProtocol, Rejection,
    Resource, ResourceId, Route, Service, ServicePort, Settings, Target, WasmFilter,
};

/// All resources, indexed.
#[derive(Debug, Default)]
pub struct Catalog {
    pub(super) trust_domain: String,
    pub(super) roots: BTreeMap<String, Vec<Bytes>>,
    pub(super) mesh: MeshConfig,
    pub(super) services: BTreeMap<ServiceKey, Arc<Loaded>>,
    pub(super) vips: HashMap<IpAddr, ServiceKey>,
    pub(super) slices: HashMap<ServiceKey, Vec<EndpointSlice>>,
    pub(super) instances: BTreeMap<(String, String), Arc<Instance>>,
    /// By namespace, label, value
    pub(super) by_label: HashMap<(String, String, String), Vec<Arc<Instance>>>,
    /// Instances whose application is dialled directly
    pub(super) by_address: HashMap<(IpAddr, u16), (String, String)>,
    /// By parent, oldest first
    pub(super) routes: BTreeMap<ServiceKey, Vec<Attached>>,
    pub(super) traffic: HashMap<Attachment, Settings>,
    pub(super) authorization: HashMap<String, Vec<Named<AuthorizationPolicy>>>,
    pub(super) mtls: HashMap<String, Vec<MtlsPolicy>>,
    pub(super) closed: Vec<ClosedPolicy>,
    pub(super) filters: BTreeMap<(String, String), Filter>,
    pub(super) warnings: Vec<Rejection>,
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
    pub(super) loaded: Arc<Loaded>,
    /// Index into the route's parents
    pub(super) parent: usize,
    /// Smaller is older; those of one timestamp go by name, those without by the order of the input
    pub(super) age: (i64, usize),
}

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
        Target::Service(name) => {
            Attachment::Service(ServiceKey { namespace: namespace.to_owned(), name: name.clone() })
        }
        Target::Route { grpc, name, rule } => {
            Attachment::Route { grpc: *grpc, namespace: namespace.to_owned(), name: name.clone(), rule: rule.clone() }
        }
    }
}

/// A catalog being built.
struct Builder {
    catalog: Catalog,
    modules: Modules,
    rejections: Vec<Rejection>,
    seen: BTreeMap<ResourceId, Arc<Loaded>>,
    mesh: Option<Arc<Loaded>>,
    policies: BTreeMap<Attachment, Arc<Loaded>>,
}

pub(super) fn build(inputs: Inputs) -> (Catalog, Vec<Rejection>) {
    let Inputs { mut resources, registrations, trust_domain, closed, modules, roots } = inputs;
    // The sort is stable: without a timestamp, and with equal ones, the order of the input decides.
    resources.sort_by_key(|loaded| loaded.created.unwrap_or(i64::MAX));
    let catalog = Catalog { trust_domain, roots, closed, ..Catalog::default() };
    let mut builder = Builder {
        catalog,
        modules,
        rejections: Vec::new(),
        seen: BTreeMap::new(),
        mesh: None,
        policies: BTreeMap::new(),
    };
    for (order, loaded) in resources.into_iter().enumerate() {
        if let Some(first) = builder.seen.get(&loaded.id) {
            let reason = format!("already defined at {}:{}; rename one of them or remove it", first.file, first.line);
            builder.rejections.push(rejection(&loaded, "metadata.name", reason));
            continue;
        }
        builder.seen.insert(loaded.id.clone(), loaded.clone());
        builder.add(&loaded, order);
    }
    for registration in registrations {
        let instance = Instance::registered(&registration, &builder.catalog.trust_domain);
        // What a running proxy says is newer than what a file says of it.
        builder.catalog.instances.insert((instance.namespace.clone(), instance.name.clone()), Arc::new(instance));
    }
    builder.index_instances();
    builder.warn();
    (builder.catalog, builder.rejections)
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

impl Builder {
    fn add(&mut self, loaded: &Arc<Loaded>, order: usize) {
        let age = loaded.created.map_or((i64::MAX, order), |created| (created, 0));
        let ResourceId { namespace, name, .. } = &loaded.id;
        let catalog = &mut self.catalog;
        match &loaded.resource {
            Resource::Unused => {}
            Resource::Service(service) => self.service(loaded, service),
            Resource::EndpointSlice(slice) => {
                let key = ServiceKey { namespace: namespace.clone(), name: slice.service.clone() };
                catalog.slices.entry(key).or_default().push(slice.clone());
            }
            Resource::Route(route) => {
                for (parent, target) in route.parents.iter().enumerate() {
                    let key = ServiceKey { namespace: target.namespace.clone(), name: target.name.clone() };
                    let attached = Attached { loaded: loaded.clone(), parent, age };
                    catalog.routes.entry(key).or_default().push(attached);
                }
            }
            Resource::MeshConfig(config) => self.mesh_config(loaded, config),
            Resource::Workload(workload) => {
                let instance = Instance::written(namespace, name, workload, &catalog.trust_domain);
                catalog.instances.insert((namespace.clone(), name.clone()), Arc::new(instance));
            }
            Resource::TrafficPolicy(policy) => {
                let targets: Vec<_> = policy.targets.iter().map(|target| attachment(namespace, target)).collect();
                if let Some(older) = targets.iter().find_map(|target| self.policies.get(target)) {
                    let reason = format!(
                        "TrafficPolicy {} ({}:{}) has one of these targets already, and is older; merge the two",
                        older.id.name, older.file, older.line
                    );
                    self.rejections.push(rejection(loaded, "spec.targetRefs", reason));
                    return;
                }
                for target in targets {
                    catalog.traffic.insert(target.clone(), policy.settings.clone());
                    self.policies.insert(target, loaded.clone());
                }
            }
            Resource::AuthorizationPolicy(policy) => {
                let named = Named { name: name.clone(), policy: policy.clone() };
                catalog.authorization.entry(namespace.clone()).or_default().push(named);
            }
            Resource::MtlsPolicy(policy) => {
                catalog.mtls.entry(namespace.clone()).or_default().push(policy.clone());
            }
            Resource::WasmFilter(filter) => {
                let module = match module(filter, &self.modules) {
                    Ok(module) => Some(module),
                    Err((field, reason)) => {
                        self.rejections.push(rejection(loaded, field, reason));
                        None
                    }
                };
                let filter = Filter { spec: filter.as_ref().clone(), module };
                catalog.filters.insert((namespace.clone(), name.clone()), filter);
            }
        }
    }

    fn service(&mut self, loaded: &Arc<Loaded>, service: &Service) {
        let key = ServiceKey { namespace: loaded.id.namespace.clone(), name: loaded.id.name.clone() };
        for vip in &service.vips {
            match self.catalog.vips.get(vip) {
                Some(other) => {
                    let reason = format!("{vip} is the address of Service {other} already; traffic to it goes there");
                    self.catalog.warnings.push(rejection(loaded, "spec.clusterIP", reason));
                }
                None => {
                    self.catalog.vips.insert(*vip, key.clone());
                }
            }
        }
        self.catalog.services.insert(key, loaded.clone());
    }

    fn mesh_config(&mut self, loaded: &Arc<Loaded>, config: &MeshConfig) {
        if let Some(first) = &self.mesh {
            let reason =
                format!("there is one MeshConfig, and {} ({}:{}) is older", first.id.name, first.file, first.line);
            self.rejections.push(rejection(loaded, "kind", reason));
            return;
        }
        let own = &self.catalog.trust_domain;
        if let Some(wanted) = config.trust_domain.as_ref().filter(|wanted| *wanted != own) {
            // The rest of it holds: dropping that would loosen what it tightens.
            let reason = format!(
                "`{wanted}` is not the trust domain that certificates are signed for (`{own}`, --trust-domain); make them agree"
            );
            self.rejections.push(rejection(loaded, "spec.trustDomain", reason));
        }
        self.catalog.mesh = config.clone();
        self.mesh = Some(loaded.clone());
    }

    fn index_instances(&mut self) {
        let catalog = &mut self.catalog;
        for (id, instance) in &catalog.instances {
            for (label, value) in &instance.labels {
                let index = (instance.namespace.clone(), label.clone(), value.clone());
                catalog.by_label.entry(index).or_default().push(instance.clone());
            }
            if let Dial::Application(address) = instance.dial {
                for port in &instance.ports {
                    catalog.by_address.entry((address, port.port)).or_insert_with(|| id.clone());
                }
            }
        }
    }

    /// References to nothing: allowed, since the other side may come later, but worth a line.
    fn warn(&mut self) {
        let mut warnings = Vec::new();
        for (key, attached) in &self.catalog.routes {
            for one in attached {
                if let Some(reason) = self.catalog.idle(key, one, attached) {
                    // As the document has it: parents that are no Services are not counted here.
                    warnings.push(rejection(&one.loaded, "spec.parentRefs", reason));
                }
            }
        }
        for loaded in self.seen.values() {
            match &loaded.resource {
                Resource::Route(route) => {
                    for (index, rule) in route.rules.iter().enumerate() {
                        for (backend, reference) in rule.backends.iter().enumerate() {
                            if let Some(reason) = self.catalog.invalid_backend(reference) {
                                let field = format!("spec.rules[{index}].backendRefs[{backend}]");
                                warnings.push(rejection(loaded, &field, reason));
                            }
                        }
                    }
                }
                Resource::TrafficPolicy(policy) => self.warn_targets(loaded, &policy.targets, &mut warnings),
                Resource::WasmFilter(filter) => self.warn_targets(loaded, &filter.targets, &mut warnings),
                _ => {}
            }
        }
        self.catalog.warnings.append(&mut warnings);
    }

    fn warn_targets(&self, loaded: &Loaded, targets: &[Target], warnings: &mut Vec<Rejection>) {
        let namespace = &loaded.id.namespace;
        for (index, target) in targets.iter().enumerate() {
            let missing = match target {
                Target::Namespace => None,
                Target::Service(name) => {
                    let key = ServiceKey { namespace: namespace.clone(), name: name.clone() };
                    (!self.catalog.services.contains_key(&key)).then(|| format!("Service {key} does not exist"))
                }
                Target::Route { grpc, name, rule } => {
                    let kind = if *grpc { "GRPCRoute" } else { "HTTPRoute" };
                    let id = ResourceId { kind: kind.to_owned(), namespace: namespace.clone(), name: name.clone() };
                    match (self.seen.get(&id).map(|loaded| &loaded.resource), rule) {
                        (Some(Resource::Route(route)), Some(wanted)) => {
                            let named = route.rules.iter().any(|rule| rule.name.as_ref() == Some(wanted));
                            (!named).then(|| format!("{kind} {namespace}/{name} has no rule named `{wanted}`"))
                        }
                        (Some(_), _) => None,
                        (None, _) => Some(format!("{kind} {namespace}/{name} does not exist")),
                    }
                }
            };
            if let Some(reason) = missing {
                warnings.push(rejection(loaded, &format!("spec.targetRefs[{index}]"), reason));
            }
        }
    }
}

impl Catalog {
    /// Why a route has no effect on one of its parents, or on a port of it.
    fn idle(&self, key: &ServiceKey, attached: &Attached, all: &[Attached]) -> Option<String> {
        let Some(service) = self.find_service(key) else {
            return Some(format!("Service {key} does not exist"));
        };
        let mut http = attached.ports(service).filter(|port| port.protocol != PortProtocol::Tcp).peekable();
        if http.peek().is_none() {
            return Some(match attached.ports(service).next() {
                Some(port) => {
                    format!("port {} of Service {key} is declared as TCP, which no HTTP route is for", port.port)
                }
                None => format!("Service {key} has no such port"),
            });
        }
        if attached.route()?.grpc {
            return None;
        }
        // Consumers and producers do not meet: who loses, loses to one of its own namespace.
        let rivals = all.iter().filter(|other| other.loaded.id.namespace == attached.loaded.id.namespace);
        let rivals: Vec<_> = rivals.filter(|other| other.route().is_some_and(|route| route.grpc)).collect();
        http.find_map(|port| {
            let rival = rivals.iter().find(|rival| rival.ports(service).any(|other| other.port == port.port))?;
            Some(format!("{} takes its place on port {} of Service {key}", rival.loaded.id, port.port))
        })
    }
}

/// The module that a filter runs, or the field that is wrong and why.
fn module(filter: &WasmFilter, modules: &Modules) -> Result<Module, (&'static str, String)> {
    let found = modules.found.get(&filter.module);
    let source = &filter.module;
    match (&filter.sha256, found) {
        (None, Some(module)) => return Ok(module.clone()),
        (Some(pinned), Some(module)) if *pinned == module.sha256 => return Ok(module.clone()),
        (Some(pinned), found) => match (modules.held.get(pinned), found) {
            (Some(size), _) => return Ok(Module { sha256: pinned.clone(), size: *size }),
            (None, Some(module)) => {
                return Err(("spec.module.sha256", format!("{source} has digest {}, not this one", module.sha256)));
            }
            (None, None) => {}
        },
        (None, None) => {}
    }
    let why = match (modules.problems.get(source), source) {
        (Some(problem), _) => format!("{source}: {problem}"),
        (None, ModuleSource::Pushed) => {
            "no module of this digest is here; give it by `outrigger filter push`".to_owned()
        }
        (None, ModuleSource::File(_)) => format!("{source} cannot be read"),
        (None, ModuleSource::Url(_) | ModuleSource::Oci(_)) => format!("{source} is not fetched yet"),
    };
    Err((source.field(), why))
}
