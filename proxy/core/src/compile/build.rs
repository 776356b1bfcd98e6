//! Building the catalog from everything: every resource into its index, contradictions reported.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::index::{Attachment, Catalog, Filter, Named, Placed, Policies, Source, attachment, rejection};
use super::instance::Instance;
use super::{Inputs, Module, Modules};
use crate::resource::{Loaded, MeshConfig, ModuleSource, Rejection, Resource, ResourceId, WasmFilter};

/// How the reason ends for which a filter is refused whose remote module is still to come.
pub const NOT_FETCHED: &str = "is not fetched yet";

/// A catalog being built.
struct Builder {
    catalog: Catalog,
    policies: Policies,
    modules: Modules,
    rejections: Vec<Rejection>,
    mesh: Option<Arc<Loaded>>,
    attached: BTreeMap<Attachment, Arc<Loaded>>,
}

pub(super) fn build(inputs: Inputs) -> (Catalog, Vec<Rejection>) {
    let Inputs { mut resources, registrations, trust_domain, closed, modules, roots } = inputs;
    // The sort is stable: without a timestamp, and with equal ones, the order of the input decides.
    resources.sort_by_key(|loaded| loaded.created.unwrap_or(i64::MAX));
    let mut builder = Builder {
        catalog: Catalog { trust_domain, roots, ..Catalog::default() },
        policies: Policies { closed, ..Policies::default() },
        modules,
        rejections: Vec::new(),
        mesh: None,
        attached: BTreeMap::new(),
    };
    for loaded in resources {
        if let Some(first) = builder.catalog.resources.get(&loaded.id) {
            let first = &first.loaded;
            let reason = format!("already defined at {}:{}; rename one of them or remove it", first.file, first.line);
            builder.rejections.push(rejection(&loaded, "metadata.name", reason));
            continue;
        }
        builder.catalog.last_order += 1;
        let placed = Placed::new(loaded, builder.catalog.last_order);
        builder.catalog.place(&placed);
        builder.policy(&placed.loaded);
    }
    for registration in registrations {
        let instance = Instance::registered(&registration, &builder.catalog.trust_domain);
        let name = (instance.namespace.clone(), instance.name.clone());
        builder.catalog.set_instance(&name, Source::Registered, Some(instance));
    }
    builder.catalog.policies = Arc::new(builder.policies);
    (builder.catalog, builder.rejections)
}

impl Placed {
    /// `order` counts where the document has no timestamp.
    pub(super) fn new(loaded: Arc<Loaded>, order: u64) -> Self {
        Self { age: loaded.created.map_or((i64::MAX, order), |created| (created, 0)), loaded }
    }
}

impl Builder {
    fn policy(&mut self, loaded: &Arc<Loaded>) {
        let ResourceId { namespace, name, .. } = &loaded.id;
        let policies = &mut self.policies;
        match &loaded.resource {
            Resource::MeshConfig(config) => self.mesh_config(loaded, config),
            Resource::TrafficPolicy(policy) => {
                let targets: Vec<_> = policy.targets.iter().map(|target| attachment(namespace, target)).collect();
                if let Some(older) = targets.iter().find_map(|target| self.attached.get(target)) {
                    let reason = format!(
                        "TrafficPolicy {} ({}:{}) has one of these targets already, and is older; merge the two",
                        older.id.name, older.file, older.line
                    );
                    self.rejections.push(rejection(loaded, "spec.targetRefs", reason));
                    return;
                }
                for target in targets {
                    policies.traffic.insert(target.clone(), policy.settings.clone());
                    self.attached.insert(target, loaded.clone());
                }
            }
            Resource::AuthorizationPolicy(policy) => {
                let named = Named { name: name.clone(), policy: policy.clone() };
                policies.authorization.entry(namespace.clone()).or_default().push(named);
            }
            Resource::MtlsPolicy(policy) => {
                policies.mtls.entry(namespace.clone()).or_default().push(policy.clone());
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
                policies.filters.insert((namespace.clone(), name.clone()), filter);
            }
            _ => {}
        }
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
        self.policies.mesh = config.clone();
        self.mesh = Some(loaded.clone());
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
        (None, ModuleSource::Url(_) | ModuleSource::Oci(_)) => format!("{source} {NOT_FETCHED}"),
    };
    Err((source.field(), why))
}
