//! Running instances of workloads, whether they registered themselves or a `Workload` says so, and the endpoints they
//! make for Services.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use outrigger_proto::mesh::{self, MtlsMode};

use super::Catalog;
use crate::key::ServiceKey;
use crate::resource::{
    AppPort, Dial, Registration, SERVICE_NAME, Service, ServicePort, TargetPort, Workload, workload,
};

/// Most endpoints in one shard: what one change costs on the wire.
pub(crate) const SHARD_SIZE: usize = 64;
/// More shards than this would mean a broken hash, not a service.
const MAX_SHARDS: u32 = 1 << 16;

/// One instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Instance {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) ports: Vec<AppPort>,
    pub(crate) dial: Dial,
    /// SPIFFE ID; empty: no sidecar there
    pub(crate) identity: String,
    pub(crate) weight: u32,
    pub(crate) region: String,
    pub(crate) zone: String,
}

impl Instance {
    pub(crate) fn registered(registration: &Registration, trust_domain: &str) -> Self {
        Self {
            namespace: registration.namespace.clone(),
            name: registration.name.clone(),
            labels: registration.labels.clone(),
            ports: registration.ports.clone(),
            dial: registration.dial,
            identity: identity(trust_domain, &registration.namespace, &registration.service_account),
            weight: workload::DEFAULT_WEIGHT,
            region: registration.region.clone(),
            zone: registration.zone.clone(),
        }
    }

    pub(crate) fn written(namespace: &str, name: &str, workload: &Workload, trust_domain: &str) -> Self {
        let derived = || workload.service_account.as_ref().map(|account| identity(trust_domain, namespace, account));
        Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            labels: workload.labels.clone(),
            ports: workload.ports.clone(),
            dial: workload.dial,
            identity: workload.identity.clone().or_else(derived).unwrap_or_default(),
            weight: workload.weight,
            region: workload.region.clone(),
            zone: workload.zone.clone(),
        }
    }

    /// `<namespace>/<name>`
    pub(crate) fn id(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// The application's port that a Service port means.
    pub(crate) fn target(&self, port: &ServicePort) -> Option<&AppPort> {
        self.ports.iter().find(|own| match &port.target {
            TargetPort::Number(number) => own.port == *number,
            TargetPort::Name(name) => own.name == *name,
        })
    }

    fn version(&self) -> &str {
        let label = self.labels.get("version").or_else(|| self.labels.get("app.kubernetes.io/version"));
        label.map_or("", String::as_str)
    }

    /// The endpoint for one of the application's ports.
    pub(crate) fn endpoint(&self, port: &AppPort, mtls: MtlsMode) -> mesh::Endpoint {
        let dialled = match self.dial {
            Dial::Application(address) => SocketAddr::new(address, port.port),
            Dial::Inbound(inbound) => inbound,
        };
        mesh::Endpoint {
            id: self.id(),
            address: dialled.ip().to_string(),
            port: u32::from(dialled.port()),
            app_port: u32::from(port.port),
            // A sidecar in mode Disabled takes plaintext only.
            identity: if mtls == MtlsMode::Disabled { String::new() } else { self.identity.clone() },
            version: self.version().to_owned(),
            weight: self.weight,
            region: self.region.clone(),
            zone: self.zone.clone(),
        }
    }
}

pub(super) fn identity(trust_domain: &str, namespace: &str, account: &str) -> String {
    format!("spiffe://{trust_domain}/ns/{namespace}/sa/{account}")
}

/// Whether labels satisfy a selector. An empty selector selects all: whoever means "none" must not ask.
pub(crate) fn selects(selector: &BTreeMap<String, String>, labels: &BTreeMap<String, String>) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

/// Whether a Service of the instance's namespace takes it for an endpoint.
pub(crate) fn belongs(name: &str, service: &Service, instance: &Instance) -> bool {
    match service.selector.is_empty() {
        true => instance.labels.get(SERVICE_NAME).is_some_and(|named| named == name),
        false => selects(&service.selector, &instance.labels),
    }
}

/// Smallest power of two with which no shard holds more than [`SHARD_SIZE`].
pub(crate) fn shard_count(endpoints: &[mesh::Endpoint]) -> u32 {
    let mut count = 1;
    while count < MAX_SHARDS {
        let mut sizes: BTreeMap<u32, usize> = BTreeMap::new();
        for endpoint in endpoints {
            *sizes.entry(shard_of(&endpoint.id, count)).or_default() += 1;
        }
        if sizes.values().all(|size| *size <= SHARD_SIZE) {
            break;
        }
        count *= 2;
    }
    count
}

/// The shard of an endpoint, of `count` (a power of two). It depends on nothing but the endpoint's identity, so the
/// coming and going of others does not move it.
pub(crate) fn shard_of(id: &str, count: u32) -> u32 {
    // FNV-1a, then a finaliser (SplitMix64's), since FNV's low bits of similar names are alike.
    let hash = id
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    let hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    let mask = u64::from(count.max(1) - 1);
    u32::try_from((hash ^ (hash >> 31)) & mask).unwrap_or(0)
}

impl Catalog {
    /// The instances that a Service takes for its endpoints, by name.
    pub(super) fn members(&self, key: &ServiceKey, service: &Service) -> Vec<&Arc<Instance>> {
        let by_service = BTreeMap::from([(SERVICE_NAME.to_owned(), key.name.clone())]);
        let selector = if service.selector.is_empty() { &by_service } else { &service.selector };
        let candidates = selector.iter().map(|(label, value)| {
            let index = (key.namespace.clone(), label.clone(), value.clone());
            self.by_label.get(&index)
        });
        // A label that nothing has leaves none at all.
        let Some(candidates) = candidates.collect::<Option<Vec<_>>>() else { return Vec::new() };
        let fewest = candidates.into_iter().min_by_key(|candidates| candidates.size());
        fewest
            .into_iter()
            .flatten()
            .filter_map(|name| self.instance(&key.namespace, name))
            .filter(|instance| belongs(&key.name, service, instance))
            .collect()
    }

    /// Every endpoint of a Service's port, by id.
    pub(crate) fn endpoints_of(&self, key: &ServiceKey, service: &Service, port: &ServicePort) -> Vec<mesh::Endpoint> {
        let mut endpoints = Vec::new();
        let mut dialled: BTreeSet<(String, u32)> = BTreeSet::new();
        for instance in self.members(key, service) {
            let Some(target) = instance.target(port) else { continue };
            let endpoint = instance.endpoint(target, self.mtls_mode(instance, target.port));
            // Seen even where the weight is 0: a slice must not bring it back.
            dialled.insert((endpoint.address.clone(), endpoint.port));
            if endpoint.weight > 0 {
                endpoints.push(endpoint);
            }
        }
        for slice in self.slices_of(key) {
            let Some((_, number)) = slice.ports.iter().find(|(name, _)| *name == port.name) else { continue };
            for member in &slice.endpoints {
                let address = member.address.to_string();
                if dialled.insert((address, u32::from(*number))) {
                    endpoints.push(self.slice_endpoint(key, member, *number));
                }
            }
        }
        endpoints.sort_by(|a, b| (&a.id, &a.address, a.port).cmp(&(&b.id, &b.address, b.port)));
        endpoints
    }

    /// An endpoint of a slice. Of an address that no known workload has nothing is known: plaintext.
    fn slice_endpoint(&self, key: &ServiceKey, member: &crate::resource::SliceEndpoint, number: u16) -> mesh::Endpoint {
        if let Some((instance, port)) = self.instance_at(member.address, number) {
            return instance.endpoint(port, self.mtls_mode(instance, port.port));
        }
        let name = member.workload.clone().unwrap_or_else(|| member.address.to_string());
        mesh::Endpoint {
            id: format!("{}/{name}", key.namespace),
            address: member.address.to_string(),
            port: u32::from(number),
            app_port: u32::from(number),
            weight: workload::DEFAULT_WEIGHT,
            zone: member.zone.clone(),
            ..mesh::Endpoint::default()
        }
    }

    /// The instance whose application is dialled at this address.
    pub(crate) fn instance_at(&self, address: IpAddr, number: u16) -> Option<(&Instance, &AppPort)> {
        let (namespace, name) = self.by_address.get(&(address, number))?.first()?;
        let instance = self.instance(namespace, name)?;
        let port = instance.ports.iter().find(|port| port.port == number)?;
        Some((instance, port))
    }
}
