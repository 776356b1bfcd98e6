//! A workload that registered itself: what a proxy started with `--app` says about its application.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use outrigger_proto::{control, mesh};
use serde::{Deserialize, Serialize};

/// A registered workload. The control plane keeps them (with their leases); in local mode the proxy makes its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registration {
    /// Namespace of the workload's identity
    pub namespace: String,
    /// Workload name, unique in the namespace
    pub name: String,
    /// Service account of its identity
    pub service_account: String,
    /// Labels that Services and policies select by
    pub labels: BTreeMap<String, String>,
    /// The application's ports
    pub ports: Vec<AppPort>,
    /// Where peers dial
    pub dial: Dial,
    /// Locality; empty when unknown
    #[serde(default)]
    pub region: String,
    /// Locality; empty when unknown
    #[serde(default)]
    pub zone: String,
}

/// One port of an application.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppPort {
    /// Name, `http` unless given
    pub name: String,
    /// The port the application listens on
    pub port: u16,
    /// What it speaks there
    pub protocol: PortProtocol,
}

/// What is spoken on a port, as far as it was declared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PortProtocol {
    /// Not declared: the proxy detects it
    #[default]
    Detect,
    /// HTTP/1.1
    Http1,
    /// HTTP/2, gRPC included
    H2,
    /// Anything else
    Tcp,
}

/// Where peers dial a workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Dial {
    /// With interception: the application's own address and port
    Application(IpAddr),
    /// Without: the proxy's inbound listener, whatever the port
    Inbound(SocketAddr),
}

/// A registration that cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BadRegistration {
    /// A name that is no DNS label
    #[error("{field} `{value}` is not a DNS label (lower-case letters, digits and -, at most 63)")]
    Name {
        /// Which one
        field: &'static str,
        /// As received
        value: String,
    },
    /// `address` or `inbound`
    #[error("{field} `{value}` is not an address that peers can dial")]
    Address {
        /// Which one
        field: &'static str,
        /// As received
        value: String,
    },
    /// A port of the application
    #[error("port {0} ({1}): {2}")]
    Port(u32, String, &'static str),
    /// No port at all
    #[error("no ports: start the proxy with --app")]
    NoPorts,
}

impl PortProtocol {
    /// The wire's enumeration.
    pub fn wire(self) -> mesh::Protocol {
        match self {
            Self::Detect => mesh::Protocol::Detect,
            Self::Http1 => mesh::Protocol::Http1,
            Self::H2 => mesh::Protocol::Http2,
            Self::Tcp => mesh::Protocol::Tcp,
        }
    }

    /// As written in `--app`, `Workload` and `RegisterRequest`: empty, `http1`, `h2` or `tcp`.
    pub fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "" => Self::Detect,
            "http1" => Self::Http1,
            "h2" => Self::H2,
            "tcp" => Self::Tcp,
            _ => return None,
        })
    }
}

impl TryFrom<&control::RegisterRequest> for Registration {
    type Error = BadRegistration;

    fn try_from(request: &control::RegisterRequest) -> Result<Self, BadRegistration> {
        let name = |field, value: &str| match super::value::dns_label(value) {
            true => Ok(value.to_owned()),
            false => Err(BadRegistration::Name { field, value: value.to_owned() }),
        };
        let dial = if request.intercepted {
            let address = request.address.parse::<IpAddr>().ok().filter(|address| !address.is_unspecified());
            address
                .map(Dial::Application)
                .ok_or_else(|| BadRegistration::Address { field: "address", value: request.address.clone() })?
        } else {
            let inbound = request.inbound.parse::<SocketAddr>().ok();
            let inbound = inbound.filter(|inbound| !inbound.ip().is_unspecified() && inbound.port() != 0);
            inbound
                .map(Dial::Inbound)
                .ok_or_else(|| BadRegistration::Address { field: "inbound", value: request.inbound.clone() })?
        };
        let mut ports: Vec<AppPort> = Vec::with_capacity(request.ports.len());
        for port in &request.ports {
            let bad = |reason| BadRegistration::Port(port.port, port.name.clone(), reason);
            let number =
                u16::try_from(port.port).ok().filter(|number| *number != 0).ok_or_else(|| bad("not a port"))?;
            let protocol =
                PortProtocol::parse(&port.protocol).ok_or_else(|| bad("the protocol is none of http1, h2, tcp"))?;
            if ports.iter().any(|other| other.name == port.name || other.port == number) {
                return Err(bad("declared twice"));
            }
            ports.push(AppPort { name: port.name.clone(), port: number, protocol });
        }
        if ports.is_empty() {
            return Err(BadRegistration::NoPorts);
        }
        Ok(Self {
            namespace: name("namespace", &request.namespace)?,
            name: name("workload", &request.workload)?,
            service_account: name("service account", &request.service_account)?,
            labels: request.labels.clone(),
            ports,
            dial,
            region: request.region.clone(),
            zone: request.zone.clone(),
        })
    }
}
