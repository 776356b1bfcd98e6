//! `svc/…`: a Service as the clients of one namespace see it.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use outrigger_proto::mesh;

use super::Catalog;
use super::inbound::{Ordered, keys};
use super::index::Attached;
use super::instance::shard_count;
use super::policy::{cluster_policy, route_policy};
use crate::key::ServiceKey;
use crate::resource::{BackendRef, Resource, Route, Service, ServicePort, Settings};

/// Backends that a Service names, by key.
type Backends = BTreeMap<String, mesh::Backend>;

impl Catalog {
    pub(super) fn find_service(&self, key: &ServiceKey) -> Option<&Service> {
        match &self.services.get(key)?.resource {
            Resource::Service(service) if !service.external => Some(service),
            _ => None,
        }
    }

    pub(super) fn service(&self, key: &ServiceKey, client_namespace: &str) -> Option<mesh::Service> {
        let service = self.find_service(key)?;
        let settings = self.service_settings(key);
        let (filters, stream_filters) = (self.outbound_filters(key, false), self.outbound_filters(key, true));
        let mut backends = Backends::new();
        let mut ports = Vec::with_capacity(service.ports.len());
        for port in &service.ports {
            let attached = self.attached(key, port, client_namespace);
            let of_service = (&settings, &filters);
            let routes = (!attached.is_empty()).then(|| self.http_routes(&attached, of_service, &mut backends));
            ports.push(mesh::ServicePort {
                port: u32::from(port.port),
                name: port.name.clone(),
                protocol: port.protocol.wire().into(),
                routes,
                backend: self.backend(key, service, port, &mut backends),
                policy: Some(route_policy(&settings)),
                filters: keys(filters.clone()),
                stream_filters: keys(stream_filters.clone()),
            });
        }
        Some(mesh::Service {
            namespace: key.namespace.clone(),
            name: key.name.clone(),
            ports,
            vips: service.vips.iter().map(ToString::to_string).collect(),
            backends: backends.into_values().collect(),
        })
    }

    /// The routes that hold for one port and one client namespace: a consumer's own replace the producer's, and
    /// GRPCRoutes replace HTTPRoutes.
    pub(super) fn attached(&self, key: &ServiceKey, port: &ServicePort, client_namespace: &str) -> Vec<&Attached> {
        if port.protocol == crate::resource::PortProtocol::Tcp {
            return Vec::new();
        }
        let Some(service) = self.find_service(key) else { return Vec::new() };
        let mut found: Vec<(&Attached, &Route)> = Vec::new();
        for attached in self.routes.get(key).into_iter().flatten() {
            let Some(route) = attached.route() else { continue };
            let here = attached.ports(service).any(|own| own.port == port.port);
            // Naming a parent twice must not double the rules.
            let again = found.iter().any(|(other, _)| other.loaded.id == attached.loaded.id);
            if here && !again {
                found.push((attached, route));
            }
        }
        let of_namespace = |namespace: &str| -> Vec<(&Attached, &Route)> {
            found.iter().filter(|(attached, _)| attached.loaded.id.namespace == namespace).copied().collect()
        };
        let mut chosen = of_namespace(client_namespace);
        if chosen.is_empty() {
            chosen = of_namespace(&key.namespace);
        }
        if chosen.iter().any(|(_, route)| route.grpc) {
            chosen.retain(|(_, route)| route.grpc);
        }
        chosen.into_iter().map(|(attached, _)| attached).collect()
    }

    fn http_routes(
        &self,
        attached: &[&Attached],
        (settings, chain): (&Settings, &Ordered),
        backends: &mut Backends,
    ) -> mesh::HttpRoutes {
        let mut rules = Vec::new();
        let mut matches = Vec::new();
        for attached in attached {
            let Some(route) = attached.route() else { continue };
            let id = &attached.loaded.id;
            for (index, rule) in route.rules.iter().enumerate() {
                let number = u32::try_from(rules.len()).unwrap_or(u32::MAX);
                for (order, one) in rule.matches.iter().enumerate() {
                    let wire = mesh::HttpMatch { rule: number, ..one.wire.clone() };
                    let precedence = (Reverse(one.rank), attached.age, &id.namespace, &id.name, index, order);
                    matches.push((precedence, wire));
                }
                let settings = self.rule_settings(settings, route.grpc, &id.namespace, &id.name, rule);
                let rule_name = rule.name.clone().unwrap_or_else(|| index.to_string());
                rules.push(mesh::HttpRule {
                    name: format!("{}/{}/{rule_name}", id.namespace, id.name),
                    filters: rule.filters.clone(),
                    backends: rule.backends.iter().map(|backend| self.weighted(backend, backends)).collect(),
                    policy: Some(route_policy(&settings)),
                    grpc: route.grpc,
                    wasm: self.rule_filters(chain, (route.grpc, id), rule).map(keys).unwrap_or_default(),
                });
            }
        }
        matches.sort_by_key(|(precedence, _)| *precedence);
        mesh::HttpRoutes { matches: matches.into_iter().map(|(_, wire)| wire).collect(), rules }
    }

    /// Why a backend's share is answered with an error, if it is.
    pub(super) fn invalid_backend(&self, reference: &BackendRef) -> Option<String> {
        if let Some(invalid) = &reference.invalid {
            return Some(invalid.clone());
        }
        let key = ServiceKey { namespace: reference.namespace.clone(), name: reference.name.clone() };
        let Some(service) = self.find_service(&key) else {
            return Some(format!("Service {key} does not exist"));
        };
        let known = service.ports.iter().any(|port| port.port == reference.port);
        (!known).then(|| format!("Service {key} has no port {}", reference.port))
    }

    fn weighted(&self, reference: &BackendRef, backends: &mut Backends) -> mesh::WeightedBackend {
        let key = ServiceKey { namespace: reference.namespace.clone(), name: reference.name.clone() };
        let invalid = self.invalid_backend(reference).unwrap_or_default();
        let service = self.find_service(&key).filter(|_| invalid.is_empty());
        let port = service.and_then(|service| {
            let port = service.ports.iter().find(|port| port.port == reference.port)?;
            Some((service, port))
        });
        mesh::WeightedBackend {
            backend: port.map(|(service, port)| self.backend(&key, service, port, backends)).unwrap_or_default(),
            weight: reference.weight,
            filters: reference.filters.clone(),
            invalid,
        }
    }

    /// Adds the backend of a Service's port, and returns its key.
    fn backend(&self, key: &ServiceKey, service: &Service, port: &ServicePort, backends: &mut Backends) -> String {
        let name = format!("{key}:{}", port.port);
        backends.entry(name.clone()).or_insert_with(|| mesh::Backend {
            key: name.clone(),
            namespace: key.namespace.clone(),
            service: key.name.clone(),
            port: u32::from(port.port),
            protocol: port.protocol.wire().into(),
            shards: shard_count(&self.endpoints_of(key, service, port)),
            policy: Some(cluster_policy(&self.service_settings(key))),
        });
        name
    }
}
