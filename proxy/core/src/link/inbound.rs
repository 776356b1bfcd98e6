//! `Self`: what a proxy enforces for its own workload.

use std::sync::Arc;

use outrigger_proto::mesh as wire;

use super::{LinkError, MtlsMode, Protocol, Within, port, protocol, unknown};
use crate::authz::Authorization;

/// What a proxy enforces inbound.
#[derive(Debug)]
pub struct Inbound {
    /// Namespace of the workload
    pub namespace: Arc<str>,
    /// Its name
    pub workload: Arc<str>,
    /// Its declared ports; nothing else is forwarded to
    pub ports: Vec<InboundPort>,
}

/// One application port.
#[derive(Debug)]
pub struct InboundPort {
    /// Name, as `http`
    pub name: Arc<str>,
    /// Number
    pub port: u16,
    /// Declared protocol
    pub protocol: Protocol,
    /// Whether plaintext is served
    pub mtls: MtlsMode,
    /// Who may call
    pub authorization: Authorization,
    /// Keys of the filters of HTTP in the order of the request
    pub filters: Arc<[String]>,
    /// Of opaque connections
    pub stream_filters: Arc<[String]>,
    /// Services that select this port, `<namespace>/<name>`
    pub services: Arc<[Arc<str>]>,
}

impl InboundPort {
    /// Keys of all its filters.
    pub fn every_filter(&self) -> impl Iterator<Item = &String> {
        self.filters.iter().chain(self.stream_filters.iter())
    }
}

impl Inbound {
    /// The declared port of this number.
    pub fn port(&self, number: u16) -> Option<&InboundPort> {
        self.ports.iter().find(|port| port.port == number)
    }
}

/// Links `Self`.
///
/// # Errors
/// The first field that cannot be read.
pub fn inbound(wire: &wire::Self_) -> Result<Inbound, LinkError> {
    let ports = wire.ports.iter().enumerate().map(|(i, wire)| inbound_port(wire).at("ports", i));
    Ok(Inbound {
        namespace: wire.namespace.as_str().into(),
        workload: wire.workload.as_str().into(),
        ports: ports.collect::<Result<_, _>>()?,
    })
}

fn inbound_port(wire: &wire::SelfPort) -> Result<InboundPort, LinkError> {
    Ok(InboundPort {
        name: wire.name.as_str().into(),
        port: port("port", wire.port)?,
        protocol: protocol(wire.protocol)?,
        mtls: MtlsMode::try_from(wire.mtls).map_err(|_| unknown("mtls", wire.mtls))?,
        authorization: match &wire.authorization {
            Some(wire) => Authorization::link(wire).within("authorization")?,
            None => Authorization::default(),
        },
        filters: wire.filters.as_slice().into(),
        stream_filters: wire.stream_filters.as_slice().into(),
        services: wire.services.iter().map(|name| name.as_str().into()).collect(),
    })
}
