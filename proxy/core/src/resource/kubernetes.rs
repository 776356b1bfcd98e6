//! `Service` and `EndpointSlice`, as Kubernetes has them.

use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde_json::Value;

use super::decode::{Bad, decode};
use super::meta::Meta;
use super::{PortProtocol, value};

/// A Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// Empty: its endpoints come from EndpointSlices and Workloads that name it
    pub selector: BTreeMap<String, String>,
    /// TCP ports; those of other transports are not the mesh's
    pub ports: Vec<ServicePort>,
    /// Cluster addresses; none for a headless one
    pub vips: Vec<IpAddr>,
    /// `type: ExternalName`: no service of the mesh
    pub external: bool,
    /// `clusterIP: None`
    pub headless: bool,
}

/// A port of a Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServicePort {
    /// Name, or empty
    pub name: String,
    /// Number
    pub port: u16,
    /// The workload's port
    pub target: TargetPort,
    /// By `appProtocol`, else by the name's first part (`grpc`, `http-admin`)
    pub protocol: PortProtocol,
}

/// What a Service's `targetPort` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetPort {
    /// By number
    Number(u16),
    /// By name of the workload's port
    Name(String),
}

/// An EndpointSlice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointSlice {
    /// Name of its Service (label `kubernetes.io/service-name`)
    pub service: String,
    /// By name of the Service's port
    pub ports: Vec<(String, u16)>,
    /// Ready endpoints
    pub endpoints: Vec<SliceEndpoint>,
}

/// A ready endpoint of a slice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SliceEndpoint {
    /// What is dialled
    pub address: IpAddr,
    /// Name of the Pod, or of whatever `targetRef` names
    pub workload: Option<String>,
    /// Zone, or empty
    pub zone: String,
}

/// The label that ties endpoints to a Service without selector.
pub(crate) const SERVICE_NAME: &str = "kubernetes.io/service-name";

const SERVICE_FIELDS: &[&str] = &[
    "apiVersion",
    "kind",
    "metadata",
    "spec",
    "status",
    "selector",
    "ports",
    "name",
    "port",
    "targetPort",
    "nodePort",
    "protocol",
    "appProtocol",
    "clusterIP",
    "clusterIPs",
    "type",
    "externalName",
    "sessionAffinity",
    "ipFamilies",
    "ipFamilyPolicy",
    "publishNotReadyAddresses",
    "internalTrafficPolicy",
    "externalTrafficPolicy",
];
const SLICE_FIELDS: &[&str] = &[
    "apiVersion",
    "kind",
    "metadata",
    "addressType",
    "endpoints",
    "ports",
    "addresses",
    "conditions",
    "ready",
    "serving",
    "terminating",
    "hostname",
    "nodeName",
    "targetRef",
    "zone",
    "name",
    "port",
    "protocol",
    "appProtocol",
];

pub(crate) fn service(document: &Value) -> Result<Service, Bad> {
    let service: core::Service = decode(document, "", SERVICE_FIELDS)?;
    let spec = service.spec.ok_or_else(|| Bad::new("spec", "missing; it is required"))?;
    let external = spec.type_.as_deref() == Some("ExternalName");
    let mut addresses = spec.cluster_ips.unwrap_or_default();
    addresses.extend(spec.cluster_ip);
    let headless = addresses.iter().any(|address| address == "None");
    let mut vips = Vec::new();
    for address in addresses.iter().filter(|address| !matches!(address.as_str(), "" | "None")) {
        let vip =
            address.parse().map_err(|_| Bad::new("spec.clusterIP", format!("`{address}` is not an IP address")))?;
        if !vips.contains(&vip) {
            vips.push(vip);
        }
    }
    let mut ports: Vec<ServicePort> = Vec::new();
    let declared = spec.ports.unwrap_or_default();
    let several = declared.len() > 1;
    for (index, port) in declared.into_iter().enumerate() {
        let at = |field: &str| format!("spec.ports[{index}].{field}");
        match port.protocol.as_deref() {
            None | Some("TCP") => {}
            Some("UDP" | "SCTP") => continue,
            Some(other) => return Err(Bad::new(at("protocol"), format!("`{other}` is not one of TCP, UDP, SCTP"))),
        }
        if several && port.name.is_none() {
            return Err(Bad::new(at("name"), "missing; ports need names where there are several"));
        }
        let port = service_port(port, &at)?;
        if ports.iter().any(|other| other.port == port.port) {
            return Err(Bad::new(at("port"), format!("port {} is declared twice", port.port)));
        }
        if !port.name.is_empty() && ports.iter().any(|other| other.name == port.name) {
            return Err(Bad::new(at("name"), format!("port name `{}` is used twice", port.name)));
        }
        ports.push(port);
    }
    if ports.is_empty() && !several && !external && !headless {
        return Err(Bad::new("spec.ports", "a Service needs a TCP port"));
    }
    Ok(Service { selector: spec.selector.unwrap_or_default(), ports, vips, external, headless })
}

fn service_port(port: core::ServicePort, at: &impl Fn(&str) -> String) -> Result<ServicePort, Bad> {
    let number = number(port.port)
        .ok_or_else(|| Bad::new(at("port"), format!("`{}` is not a port from 1 to 65535", port.port)))?;
    let name = port.name.unwrap_or_default();
    if !name.is_empty() && !value::dns_label(&name) {
        return Err(Bad::new(at("name"), format!("`{name}` is not a DNS label")));
    }
    let target = match port.target_port {
        None => TargetPort::Number(number),
        // Kubernetes itself writes 0 for "not given".
        Some(IntOrString::Int(0)) => TargetPort::Number(number),
        Some(IntOrString::Int(target)) => TargetPort::Number(
            self::number(target)
                .ok_or_else(|| Bad::new(at("targetPort"), format!("`{target}` is not a port from 1 to 65535")))?,
        ),
        Some(IntOrString::String(target)) => match target.parse::<u16>() {
            Ok(number) if number != 0 => TargetPort::Number(number),
            _ if value::dns_label(&target) => TargetPort::Name(target),
            _ => return Err(Bad::new(at("targetPort"), format!("`{target}` is neither a port nor a port's name"))),
        },
    };
    let protocol = protocol(port.app_protocol.as_deref(), &name);
    Ok(ServicePort { name, port: number, target, protocol })
}

fn number(port: i32) -> Option<u16> {
    u16::try_from(port).ok().filter(|port| *port != 0)
}

/// What a port speaks, by `appProtocol`, else by the part of its name before the first `-`. What neither tells is
/// detected.
fn protocol(app_protocol: Option<&str>, name: &str) -> PortProtocol {
    let word = app_protocol.map_or_else(
        || name.split('-').next().unwrap_or_default().to_owned(),
        |protocol| protocol.trim_start_matches("kubernetes.io/").to_ascii_lowercase(),
    );
    match word.as_str() {
        "http" | "http1" | "ws" => PortProtocol::Http1,
        "h2c" | "http2" | "h2" | "grpc" => PortProtocol::H2,
        "tcp" | "tls" | "https" | "wss" | "mongo" | "mysql" | "postgresql" | "redis" => PortProtocol::Tcp,
        _ => PortProtocol::Detect,
    }
}

pub(crate) fn endpoint_slice(document: &Value, meta: &Meta) -> Result<EndpointSlice, Bad> {
    let slice: discovery::EndpointSlice = decode(document, "", SLICE_FIELDS)?;
    if !matches!(slice.address_type.as_str(), "IPv4" | "IPv6") {
        let reason = format!("`{}` is not supported yet; IPv4 and IPv6 are", slice.address_type);
        return Err(Bad::new("addressType", reason));
    }
    let service = meta.labels.get(SERVICE_NAME).cloned().ok_or_else(|| {
        Bad::new(format!("metadata.labels.{SERVICE_NAME}"), "missing; it names the Service that the slice belongs to")
    })?;
    let mut ports = Vec::new();
    for (index, port) in slice.ports.unwrap_or_default().into_iter().enumerate() {
        let Some(wanted) = port.port else { continue };
        let number = number(wanted).ok_or_else(|| {
            Bad::new(format!("ports[{index}].port"), format!("`{wanted}` is not a port from 1 to 65535"))
        })?;
        if matches!(port.protocol.as_deref(), None | Some("TCP")) {
            ports.push((port.name.unwrap_or_default(), number));
        }
    }
    let mut endpoints = Vec::new();
    for (index, endpoint) in slice.endpoints.into_iter().enumerate() {
        let at = format!("endpoints[{index}].addresses[0]");
        let first =
            endpoint.addresses.first().ok_or_else(|| Bad::new(at.clone(), "missing; an endpoint needs an address"))?;
        let address = first.parse().map_err(|_| Bad::new(at, format!("`{first}` is not an IP address")))?;
        // Kubernetes: unknown readiness counts as ready.
        if endpoint.conditions.and_then(|conditions| conditions.ready) == Some(false) {
            continue;
        }
        let workload = endpoint.target_ref.and_then(|target| target.name);
        endpoints.push(SliceEndpoint { address, workload, zone: endpoint.zone.unwrap_or_default() });
    }
    Ok(EndpointSlice { service, ports, endpoints })
}
