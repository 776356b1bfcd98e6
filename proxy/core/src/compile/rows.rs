//! The catalog as rows: what the HTTP API and the command line list.

use std::collections::BTreeSet;

use serde::Serialize;

use super::Catalog;
use super::instance::{shard_count, shard_of};
use crate::key::ServiceKey;
use crate::resource::{Loaded, PortProtocol, Resource, Service};

/// A Service, for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ServiceRow {
    /// Namespace
    pub namespace: String,
    /// Name
    pub name: String,
    /// Its ports
    pub ports: Vec<ServicePortRow>,
    /// Cluster addresses
    pub vips: Vec<String>,
    /// `file:line`
    pub source: String,
}

/// A port of a Service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ServicePortRow {
    /// Name, or empty
    pub name: String,
    /// Number
    pub port: u16,
    /// `detect`, `http1`, `http2` or `tcp`
    pub protocol: &'static str,
    /// Endpoints that can be dialled
    pub endpoints: usize,
    /// Routes attached to it, as `HTTPRoute <namespace>/<name>`
    pub routes: Vec<String>,
}

/// One endpoint of one Service port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct EndpointRow {
    /// `<namespace>/<service>:<port>`
    pub backend: String,
    /// `<namespace>/<workload>`
    pub workload: String,
    /// What is dialled
    pub address: String,
    /// The application's port
    pub app_port: u16,
    /// SPIFFE ID expected of it; empty for plaintext
    pub identity: String,
    /// Version label
    pub version: String,
    /// Shard
    pub shard: u32,
}

/// One rule of a route on one parent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RouteRow {
    /// `HTTPRoute` or `GRPCRoute`
    pub kind: &'static str,
    /// Namespace of the route
    pub namespace: String,
    /// Name of the route
    pub name: String,
    /// Name or index of the rule
    pub rule: String,
    /// `<namespace>/<service>`, with `:<port>` where it is limited to one
    pub parent: String,
    /// Whether only clients in the route's namespace are affected
    pub consumer: bool,
    /// Its backends
    pub backends: Vec<RouteBackendRow>,
    /// `file:line`
    pub source: String,
}

/// One backend of a rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RouteBackendRow {
    /// `<namespace>/<service>:<port>`
    pub backend: String,
    /// Share, of the sum of the rule's
    pub weight: u32,
    /// Why its share is answered with 500; empty when it is well
    pub invalid: String,
}

impl Catalog {
    /// Every Service, by name.
    pub fn services(&self) -> Vec<ServiceRow> {
        self.each_service().map(|(key, loaded, service)| self.service_row(key, loaded, service)).collect()
    }

    /// Every endpoint of every Service port.
    pub fn endpoints(&self) -> Vec<EndpointRow> {
        let mut rows = Vec::new();
        for (key, _, service) in self.each_service() {
            for port in &service.ports {
                let endpoints = self.endpoints_of(key, service, port);
                let shards = shard_count(&endpoints);
                rows.extend(endpoints.into_iter().map(|endpoint| EndpointRow {
                    backend: format!("{key}:{}", port.port),
                    shard: shard_of(&endpoint.id, shards),
                    address: dialled(&endpoint.address, endpoint.port),
                    app_port: u16::try_from(endpoint.app_port).unwrap_or(0),
                    workload: endpoint.id,
                    identity: endpoint.identity,
                    version: endpoint.version,
                }));
            }
        }
        rows
    }

    /// Every rule of every route, once per parent.
    pub fn routes(&self) -> Vec<RouteRow> {
        let mut rows = Vec::new();
        for (key, attached) in self.routes.iter().flat_map(|(key, list)| list.iter().map(move |one| (key, one))) {
            let Some(route) = attached.route() else { continue };
            let Some(parent) = route.parents.get(attached.parent) else { continue };
            let limit = parent.port.map(|port| format!(":{port}"));
            let limit = limit.or_else(|| parent.section.as_ref().map(|section| format!(":{section}")));
            let loaded = &attached.loaded;
            rows.extend(route.rules.iter().enumerate().map(|(index, rule)| {
                RouteRow {
                    kind: if route.grpc { "GRPCRoute" } else { "HTTPRoute" },
                    namespace: loaded.id.namespace.clone(),
                    name: loaded.id.name.clone(),
                    rule: rule.name.clone().unwrap_or_else(|| index.to_string()),
                    parent: format!("{key}{}", limit.as_deref().unwrap_or_default()),
                    consumer: loaded.id.namespace != key.namespace,
                    backends: rule
                        .backends
                        .iter()
                        .map(|backend| RouteBackendRow {
                            backend: format!("{}/{}:{}", backend.namespace, backend.name, backend.port),
                            weight: backend.weight,
                            invalid: self.invalid_backend(backend).unwrap_or_default(),
                        })
                        .collect(),
                    source: source(loaded),
                }
            }));
        }
        rows
    }

    fn each_service(&self) -> impl Iterator<Item = (&ServiceKey, &Loaded, &Service)> {
        self.services.iter().filter_map(|(key, loaded)| match &loaded.resource {
            Resource::Service(service) => Some((key, loaded.as_ref(), service)),
            _ => None,
        })
    }

    fn service_row(&self, key: &ServiceKey, loaded: &Loaded, service: &Service) -> ServiceRow {
        // Producers' routes and those of every consumer: whichever may hold for some client.
        let attached = self.routes.get(key).into_iter().flatten();
        let clients: BTreeSet<&str> =
            attached.map(|one| one.loaded.id.namespace.as_str()).chain([key.namespace.as_str()]).collect();
        let ports = service.ports.iter().map(|port| {
            let mut routes = BTreeSet::new();
            for client in &clients {
                routes.extend(self.attached(key, port, client).into_iter().map(|one| one.loaded.id.to_string()));
            }
            ServicePortRow {
                name: port.name.clone(),
                port: port.port,
                protocol: match port.protocol {
                    PortProtocol::Detect => "detect",
                    PortProtocol::Http1 => "http1",
                    PortProtocol::H2 => "http2",
                    PortProtocol::Tcp => "tcp",
                },
                endpoints: self.endpoints_of(key, service, port).len(),
                routes: routes.into_iter().collect(),
            }
        });
        ServiceRow {
            namespace: key.namespace.clone(),
            name: key.name.clone(),
            ports: ports.collect(),
            vips: service.vips.iter().map(ToString::to_string).collect(),
            source: source(loaded),
        }
    }
}

fn source(loaded: &Loaded) -> String {
    format!("{}:{}", loaded.file, loaded.line)
}

fn dialled(address: &str, port: u32) -> String {
    if address.contains(':') { format!("[{address}]:{port}") } else { format!("{address}:{port}") }
}
