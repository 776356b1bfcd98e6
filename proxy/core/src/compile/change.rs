//! One change of a few resources: what the indexes become, and whose answers may be others than before.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use outrigger_proto::type_url;

use super::Client;
use super::index::{Catalog, Name, Placed, Source, key};
use super::instance::{Instance, belongs, shard_count};
use crate::key::{Key, Named, ServiceKey, canonicalise};
use crate::resource::{Dial, Loaded, Registration, Resource, ResourceId, Service};

/// What became other.
#[derive(Debug, Clone, Default)]
pub struct Change {
    /// Each with its new version, or `None` where it is gone; new ones oldest first
    pub resources: Vec<(ResourceId, Option<Arc<Loaded>>)>,
    /// Namespace and workload, with what it registered
    pub registrations: Vec<(Name, Option<Arc<Registration>>)>,
}

/// What answers are about. A change touches topics, and a subscription has one.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Topic {
    /// The Service itself, with its routes
    Service(ServiceKey),
    /// The endpoints of all its ports
    Endpoints(ServiceKey),
    /// What the proxy of one workload enforces
    Instance(String, String),
    /// What an address is
    Address(IpAddr),
    /// A filter
    Filter(String, String),
    /// The roots of a trust domain
    Bundle(String),
    /// The MeshConfig
    Mesh,
}

impl Topic {
    /// What the answer to a subscription depends on; `None` where there never is one.
    pub fn of(type_url: &str, key: &Key, client: &Client) -> Option<Self> {
        Some(match (type_url, key) {
            (type_url::SERVICE, Key::Service(service)) => Self::Service(service.clone()),
            (type_url::SERVICE, Key::Host(name, _)) => match canonicalise(name, &client.namespace) {
                Some((Named::Service(service), _)) => Self::Service(service),
                _ => return None,
            },
            (type_url::SERVICE | type_url::WORKLOAD, Key::Ip(address)) => Self::Address(address.ip().to_canonical()),
            (type_url::ENDPOINTS, Key::Endpoints(service, ..)) => Self::Endpoints(service.clone()),
            (type_url::SELF, Key::SelfOf(workload)) => Self::Instance(client.namespace.clone(), workload.clone()),
            (type_url::FILTER, Key::Filter(namespace, name)) => Self::Filter(namespace.clone(), name.clone()),
            (type_url::BUNDLE, Key::Bundle(domain)) => Self::Bundle(domain.clone()),
            (type_url::MESH_CONFIG, Key::Mesh) => Self::Mesh,
            _ => return None,
        })
    }
}

/// Whether a change of this resource is one of a few answers. Policies may govern every answer.
fn narrow(loaded: &Loaded) -> bool {
    matches!(
        loaded.resource,
        Resource::Unused
            | Resource::Service(_)
            | Resource::EndpointSlice(_)
            | Resource::Route(_)
            | Resource::Workload(_)
    )
}

impl Catalog {
    /// The catalog after a change, and the topics that it touches: every other answer is as before. The work is that of what is
    /// touched, not of the mesh. `None`: the change is one of policies, which needs [`Catalog::build`].
    pub fn changed(&self, change: &Change) -> Option<(Self, BTreeSet<Topic>)> {
        let before = |id: &ResourceId| self.resources.get(id).map(|placed| &placed.loaded);
        let wide = |(id, now): &(ResourceId, Option<Arc<Loaded>>)| {
            before(id).into_iter().chain(now).any(|loaded| !narrow(loaded))
        };
        if change.resources.iter().any(wide) {
            return None;
        }
        let mut next = self.clone();
        let mut touched = BTreeSet::new();
        for (id, now) in &change.resources {
            next.replace(id, now.as_ref(), &mut touched);
        }
        for (name, registration) in &change.registrations {
            let instance = registration.as_ref().map(|known| Instance::registered(known, &next.trust_domain));
            next.around(name, &mut touched, |next| next.set_instance(name, Source::Registered, instance));
        }
        Some((next, touched))
    }

    fn replace(&mut self, id: &ResourceId, now: Option<&Arc<Loaded>>, touched: &mut BTreeSet<Topic>) {
        let before = self.resources.get(id).cloned();
        let after = now.map(|loaded| match &before {
            // Its place among the others stays.
            Some(before) if loaded.created.is_none() && before.loaded.created.is_none() => {
                Placed { age: before.age, loaded: loaded.clone() }
            }
            _ => {
                self.last_order += 1;
                Placed::new(loaded.clone(), self.last_order)
            }
        });
        let swap = |catalog: &mut Self| {
            before.iter().for_each(|before| catalog.displace(before));
            after.iter().for_each(|after| catalog.place(after));
        };
        let either = [&before, &after];
        let resources = either.into_iter().flatten().map(|placed| &placed.loaded.resource);
        match (&before, &after) {
            (Some(Placed { loaded, .. }), _) | (None, Some(Placed { loaded, .. })) => match &loaded.resource {
                Resource::Workload(_) => self.around(&(id.namespace.clone(), id.name.clone()), touched, swap),
                Resource::EndpointSlice(_) => {
                    let services = resources.filter_map(|resource| match resource {
                        Resource::EndpointSlice(slice) => Some(key(&id.namespace, &slice.service)),
                        _ => None,
                    });
                    let services: BTreeSet<ServiceKey> = services.collect();
                    self.endpoints_around(&services, touched, swap);
                }
                Resource::Route(_) => {
                    for resource in resources {
                        let Resource::Route(route) = resource else { continue };
                        for parent in &route.parents {
                            self.touch_service(&key(&parent.namespace, &parent.name), touched);
                        }
                    }
                    swap(self);
                }
                Resource::Service(_) => {
                    let own = key(&id.namespace, &id.name);
                    self.touch_all_of(&own, touched);
                    swap(self);
                    self.touch_all_of(&own, touched);
                }
                _ => swap(self),
            },
            (None, None) => {}
        }
    }

    /// Everything that says something of a Service.
    fn touch_all_of(&self, own: &ServiceKey, touched: &mut BTreeSet<Topic>) {
        self.touch_service(own, touched);
        touched.insert(Topic::Endpoints(own.clone()));
        self.touch_users(own, touched);
        if let Some(service) = self.find_service(own) {
            for instance in self.members(own, service) {
                touched.insert(Topic::Instance(instance.namespace.clone(), instance.name.clone()));
            }
        }
    }

    fn touch_service(&self, own: &ServiceKey, touched: &mut BTreeSet<Topic>) {
        if let Some(Resource::Service(service)) = self.services.get(own).map(|loaded| &loaded.resource) {
            touched.extend(service.vips.iter().map(|vip| Topic::Address(vip.to_canonical())));
        }
        touched.insert(Topic::Service(own.clone()));
    }

    /// The Services whose routes name this one.
    fn touch_users(&self, own: &ServiceKey, touched: &mut BTreeSet<Topic>) {
        for (parent, _) in self.used_by.get(own).into_iter().flatten() {
            self.touch_service(parent, touched);
        }
    }

    /// A change of what an instance is.
    fn around(&mut self, name: &Name, touched: &mut BTreeSet<Topic>, change: impl FnOnce(&mut Self)) {
        let before = self.instance(&name.0, &name.1).cloned();
        let mut after = self.clone();
        change(&mut after);
        let now = after.instance(&name.0, &name.1).cloned();
        if before == now {
            *self = after;
            return;
        }
        touched.insert(Topic::Instance(name.0.clone(), name.1.clone()));
        let mut services = BTreeSet::new();
        for (catalog, instance) in [(&*self, &before), (&after, &now)] {
            let Some(instance) = instance else { continue };
            services.extend(catalog.having(instance));
            if let Dial::Application(address) = instance.dial {
                touched.insert(Topic::Address(address.to_canonical()));
                services.extend(catalog.sliced.get(&address).into_iter().flatten().map(|(service, _)| service.clone()));
            }
        }
        self.endpoints_around(&services, touched, |catalog| *catalog = after);
    }

    /// Services of an instance's namespace that take it for an endpoint.
    pub(super) fn having<'a>(&'a self, instance: &'a Instance) -> impl Iterator<Item = ServiceKey> + 'a {
        let by_label = instance.labels.iter().flat_map(|(label, value)| {
            self.selecting.get(&(instance.namespace.clone(), label.clone(), value.clone())).into_iter().flatten()
        });
        by_label
            .filter(|own| self.find_service(own).is_some_and(|service| belongs(&own.name, service, instance)))
            .cloned()
    }

    /// A change of the endpoints of some Services. Where their number changes that of the shards, it is one of the Services, too.
    fn endpoints_around(
        &mut self,
        services: &BTreeSet<ServiceKey>,
        touched: &mut BTreeSet<Topic>,
        change: impl FnOnce(&mut Self),
    ) {
        let before: Vec<Vec<u32>> = services.iter().map(|own| self.shards(own)).collect();
        change(self);
        for (own, before) in services.iter().zip(before) {
            touched.insert(Topic::Endpoints(own.clone()));
            if self.shards(own) != before {
                self.touch_service(own, touched);
                self.touch_users(own, touched);
            }
        }
    }

    fn shards(&self, own: &ServiceKey) -> Vec<u32> {
        let of = |service: &Service| {
            service.ports.iter().map(|port| shard_count(&self.endpoints_of(own, service, port))).collect()
        };
        self.find_service(own).map(of).unwrap_or_default()
    }
}
