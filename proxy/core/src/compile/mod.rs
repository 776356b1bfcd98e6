//! All resources into answers to subscriptions. [`Catalog::build`] indexes and checks what concerns several
//! resources; [`Catalog::answer`] compiles one answer on demand, so that a mesh of 5,000 services costs a proxy (and the
//! control plane) only what is asked for. Equal inputs give equal bytes and so equal versions.

mod build;
mod change;
mod inbound;
mod index;
mod instance;
mod policy;
mod rows;
mod service;
mod warn;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use outrigger_proto::{mesh, type_url};
use prost::Message;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::key::{Key, Named, ServiceKey, canonicalise};
use instance::{shard_count, shard_of};

pub use build::NOT_FETCHED;
pub use change::{Change, Topic};
pub use index::Catalog;
pub use rows::{EndpointRow, RouteBackendRow, RouteRow, ServicePortRow, ServiceRow};

use crate::resource::{Closes, Loaded, ModuleSource, Registration, Rejection, Resource};

/// What a catalog is built from.
#[derive(Debug, Clone, Default)]
pub struct Inputs {
    /// Every accepted resource (the last good version of what is now rejected included), oldest first: the order
    /// counts as the creation time where a document has no `creationTimestamp`
    pub resources: Vec<Arc<Loaded>>,
    /// Workloads that registered themselves
    pub registrations: Vec<Arc<Registration>>,
    /// The trust domain that certificates are signed for
    pub trust_domain: String,
    /// Policies that could not be read and of which no good version is held
    pub closed: Vec<ClosedPolicy>,
    /// Filter modules
    pub modules: Modules,
    /// DER of the roots, by trust domain
    pub roots: BTreeMap<String, Vec<Bytes>>,
}

/// A policy that fails closed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClosedPolicy {
    /// What
    pub closes: Closes,
    /// For people: which policy, and why it could not be read
    pub reason: String,
}

/// Filter modules as the caller found them: this crate reads no files.
#[derive(Debug, Clone, Default)]
pub struct Modules {
    /// By source, as [`wanted_modules`] names them
    pub found: BTreeMap<ModuleSource, Module>,
    /// Why a source's module is not there, where that is known
    pub problems: BTreeMap<ModuleSource, String>,
    /// Sizes by hex digest of modules that are held whatever the files say now: a filter that pins a digest goes on
    /// with the module it pins after its file changed
    pub held: BTreeMap<String, u64>,
}

/// One module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Module {
    /// Hex digest of the content
    pub sha256: String,
    /// Bytes
    pub size: u64,
}

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Client {
    /// Namespace of its identity: decides consumer routes and `self/…`
    pub namespace: String,
    /// Workload name
    pub workload: String,
    /// Service account of its identity
    pub service_account: String,
}

/// The answer to one subscription.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The resource
    Found(Found),
    /// Authoritatively nothing: `removed_resources`
    Absent,
}

/// A resource on the wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Canonical key
    pub name: String,
    /// Other keys under which this was asked for
    pub aliases: Vec<String>,
    /// One of [`outrigger_proto::type_url`]
    pub type_url: &'static str,
    /// The encoded message, without the `Any` around it
    pub bytes: Bytes,
    /// Hash of the bytes: equal content has equal versions across restarts and replicas
    pub version: String,
}

/// Where the modules of the filters among `resources` come from, with the digests that they must have, if any is given.
pub fn wanted_modules(resources: &[Arc<Loaded>]) -> BTreeMap<ModuleSource, BTreeSet<String>> {
    let mut wanted = BTreeMap::<_, BTreeSet<String>>::new();
    for loaded in resources {
        if let Resource::WasmFilter(filter) = &loaded.resource {
            wanted.entry(filter.module.clone()).or_default().extend(filter.sha256.clone());
        }
    }
    wanted
}

/// The trust domain that the MeshConfig among `resources` names, if one does: for whoever must know it before anything
/// is built.
pub fn wanted_trust_domain(resources: &[Arc<Loaded>]) -> Option<String> {
    resources.iter().find_map(|loaded| match &loaded.resource {
        Resource::MeshConfig(config) => config.trust_domain.clone(),
        _ => None,
    })
}

impl Catalog {
    /// Indexes the inputs. What contradicts another resource is left out and reported; a reference to nothing is no
    /// rejection but a warning, and an invalid backend of its route.
    pub fn build(inputs: Inputs) -> (Self, Vec<Rejection>) {
        build::build(inputs)
    }

    /// Every resource that it was built from.
    pub fn resources(&self) -> impl Iterator<Item = &Arc<Loaded>> {
        self.resources.values().map(|placed| &placed.loaded)
    }

    /// Answers one subscription.
    pub fn answer(&self, type_url: &str, key: &Key, client: &Client) -> Answer {
        let found = match (type_url, key) {
            (type_url::SERVICE, Key::Service(service)) => self.answer_service(key, service, client),
            (type_url::SERVICE, Key::Ip(address)) => {
                self.at_vip(address.ip().to_canonical()).and_then(|service| self.answer_service(key, &service, client))
            }
            (type_url::SERVICE, Key::Host(name, _)) => match canonicalise(name, &client.namespace) {
                Some((Named::Service(service), _)) => self.answer_service(key, &service, client),
                _ => None,
            },
            (type_url::WORKLOAD, Key::Ip(address)) => {
                self.workload(*address).map(|workload| found(key.to_string(), type_url::WORKLOAD, &workload))
            }
            (type_url::ENDPOINTS, Key::Endpoints(service, port, shard)) => self
                .endpoints_shard(service, *port, *shard)
                .map(|endpoints| found(key.to_string(), type_url::ENDPOINTS, &endpoints)),
            // Only of oneself: what is enforced on others is none of its business.
            (type_url::SELF, Key::SelfOf(workload)) if *workload == client.workload => {
                self.own(client).map(|own| found(key.to_string(), type_url::SELF, &own))
            }
            (type_url::FILTER, Key::Filter(namespace, name)) => {
                self.filter(namespace, name).map(|filter| found(key.to_string(), type_url::FILTER, &filter))
            }
            (type_url::BUNDLE, Key::Bundle(domain)) => self
                .roots
                .get(domain)
                .map(|roots| found(key.to_string(), type_url::BUNDLE, &mesh::Bundle { roots: roots.clone() })),
            (type_url::MESH_CONFIG, Key::Mesh) => {
                Some(found(key.to_string(), type_url::MESH_CONFIG, &self.mesh_config()))
            }
            _ => None,
        };
        found.map_or(Answer::Absent, Answer::Found)
    }

    /// Modules that filters use now.
    pub fn wasm_modules(&self) -> Vec<Module> {
        let mut modules: Vec<_> = self.policies.filters.values().filter_map(|filter| filter.module.clone()).collect();
        modules.sort_by(|a, b| a.sha256.cmp(&b.sha256));
        modules.dedup();
        modules
    }

    fn answer_service(&self, asked: &Key, service: &ServiceKey, client: &Client) -> Option<Found> {
        let name = Key::Service(service.clone()).to_string();
        let mut answer = found(name, type_url::SERVICE, &self.service(service, &client.namespace)?);
        let asked = asked.to_string();
        if asked != answer.name {
            answer.aliases.push(asked);
        }
        Some(answer)
    }

    fn workload(&self, address: SocketAddr) -> Option<mesh::Workload> {
        let (instance, port) = self.instance_at(address.ip().to_canonical(), address.port())?;
        Some(mesh::Workload {
            namespace: instance.namespace.clone(),
            name: instance.name.clone(),
            endpoint: Some(instance.endpoint(port, self.mtls_mode(instance, port.port))),
            protocol: port.protocol.wire().into(),
        })
    }

    fn endpoints_shard(&self, key: &ServiceKey, port: u16, shard: u32) -> Option<mesh::Endpoints> {
        let service = self.find_service(key)?;
        let port = service.ports.iter().find(|own| own.port == port)?;
        let mut endpoints = self.endpoints_of(key, service, port);
        let count = shard_count(&endpoints);
        endpoints.retain(|endpoint| shard_of(&endpoint.id, count) == shard);
        (shard < count).then_some(mesh::Endpoints { endpoints })
    }

    fn mesh_config(&self) -> mesh::MeshConfig {
        let config = &self.policies.mesh;
        let outbound = config.outbound_traffic.unwrap_or(mesh::mesh_config::OutboundTraffic::AllowAny);
        mesh::MeshConfig {
            trust_domain: self.trust_domain.clone(),
            outbound_traffic: outbound.into(),
            mesh_ranges: config.mesh_ranges.clone(),
            trusted_forwarders: config.trusted_forwarders.clone(),
            access_log: config.access_log.unwrap_or(mesh::mesh_config::AccessLog::Errors).into(),
            sampling_ppm: config.sampling_ppm.unwrap_or(0),
            certificate_lifetime_ms: self.certificate_lifetime_ms(),
        }
    }

    /// Lifetime of the certificates that are signed, in milliseconds.
    pub fn certificate_lifetime_ms(&self) -> u64 {
        self.policies.mesh.certificate_lifetime.unwrap_or(86_400_000)
    }
}

fn found(name: String, type_url: &'static str, message: &impl Message) -> Found {
    let bytes = Bytes::from(message.encode_to_vec());
    let digest = Sha256::digest(&bytes);
    // 64 bits tell versions of one resource apart; a full digest would be most of a small answer.
    let version = hex::encode(digest.get(..8).unwrap_or_default());
    Found { name, aliases: Vec::new(), type_url, bytes, version }
}
