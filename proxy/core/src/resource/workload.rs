//! `Workload`: an instance that does not register itself.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use serde::Deserialize;
use serde_json::Value;

use super::decode::{Bad, decode};
use super::meta::Meta;
use super::registration::Dial;
use super::value::{Identity, Label, Port};
use super::{AppPort, PortProtocol};

/// A Workload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    /// From `metadata`
    pub labels: BTreeMap<String, String>,
    /// What is dialled: the application's own address, or its proxy's inbound listener
    pub dial: Dial,
    /// The application's ports
    pub ports: Vec<AppPort>,
    /// Service account, from which its identity is derived
    pub service_account: Option<String>,
    /// SPIFFE ID expected of it, where that is not the derived one. Neither this nor an account: no sidecar, plaintext
    pub identity: Option<String>,
    /// Share among the service's endpoints; 0: none
    pub weight: u32,
    /// Locality; empty when unknown
    pub region: String,
    /// Locality; empty when unknown
    pub zone: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Spec {
    address: String,
    /// Port of its proxy's inbound listener, where traffic is not intercepted
    inbound_port: Option<Port>,
    ports: Vec<SpecPort>,
    service_account: Option<Label>,
    identity: Option<Identity>,
    #[serde(default)]
    locality: Locality,
    weight: Option<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SpecPort {
    name: Option<Label>,
    port: Port,
    #[serde(default)]
    protocol: PortProtocol,
}

#[derive(Debug, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct Locality {
    region: String,
    zone: String,
}

/// Weight of an endpoint that states none.
pub(crate) const DEFAULT_WEIGHT: u32 = 100;

pub(crate) fn read(spec: &Value, meta: &Meta) -> Result<Workload, Bad> {
    let spec: Spec = decode(spec, "spec", &[])?;
    let address: IpAddr = spec
        .address
        .parse()
        .map_err(|_| Bad::new("spec.address", format!("`{}` is not an IP address", spec.address)))?;
    if address.is_unspecified() || address.is_multicast() {
        return Err(Bad::new("spec.address", format!("`{address}` cannot be dialled")));
    }
    if spec.ports.is_empty() {
        return Err(Bad::new("spec.ports", "a Workload needs a port"));
    }
    let mut ports: Vec<AppPort> = Vec::with_capacity(spec.ports.len());
    for (index, port) in spec.ports.into_iter().enumerate() {
        let name = port.name.map_or_else(|| "http".to_owned(), |name| name.0);
        if ports.iter().any(|other| other.name == name || other.port == port.port.0) {
            return Err(Bad::new(format!("spec.ports[{index}]"), "its name or number is used twice"));
        }
        ports.push(AppPort { name, port: port.port.0, protocol: port.protocol });
    }
    let weight = spec.weight.unwrap_or(DEFAULT_WEIGHT);
    if weight > 1_000_000 {
        return Err(Bad::new("spec.weight", "a weight is at most 1000000"));
    }
    Ok(Workload {
        labels: meta.labels.clone(),
        dial: spec
            .inbound_port
            .map_or(Dial::Application(address), |port| Dial::Inbound(SocketAddr::new(address, port.0))),
        ports,
        service_account: spec.service_account.map(|account| account.0),
        identity: spec.identity.map(|identity| identity.0),
        weight,
        region: spec.locality.region,
        zone: spec.locality.zone,
    })
}
