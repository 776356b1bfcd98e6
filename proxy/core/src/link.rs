//! From a wire resource to what the data path evaluates: expressions compiled, header names parsed, references
//! resolved. A resource that cannot be linked is refused alone (NACK), with the field that is wrong.

mod cluster;
mod inbound;
mod mesh;
mod service;

pub use cluster::{Backend, Budget, ClusterPolicy, Limits, OutlierPolicy, endpoints, workload};
pub use inbound::{Inbound, InboundPort, inbound};
pub use mesh::{Mesh, mesh};
pub use outrigger_proto::mesh::cluster_policy::Algorithm;
pub use outrigger_proto::mesh::mesh_config::{AccessLog, OutboundTraffic};
pub use outrigger_proto::mesh::{MtlsMode, Protocol};
pub use service::{
    HeaderChange, Match, PathChange, PathMatch, Port, Redirect, Retries, Rewrite, RouteFilters, RoutePolicy,
    RouteTable, Rule, Service, ValueMatch, ValuePattern, Weighted, service,
};

use std::fmt::Display;
use std::net::IpAddr;
use std::time::Duration;

/// Why a wire resource was refused: the field and what is wrong with it.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{field}: {problem}")]
pub struct LinkError {
    /// Path of the field in the wire message, as `ports[0].routes.matches[2].path`
    pub field: String,
    /// What is wrong, with the value
    pub problem: String,
}

impl LinkError {
    fn new(field: impl Into<String>, problem: impl Display) -> Self {
        Self { field: field.into(), problem: problem.to_string() }
    }

    /// Puts the name of the containing field before this one's.
    fn within(mut self, outer: impl Display) -> Self {
        self.field = format!("{outer}.{}", self.field);
        self
    }
}

/// Names the element of a list in which linking failed.
trait Within<T> {
    fn within(self, field: impl Display) -> Result<T, LinkError>;
    fn at(self, list: &str, index: usize) -> Result<T, LinkError>;
}

impl<T> Within<T> for Result<T, LinkError> {
    fn within(self, field: impl Display) -> Self {
        self.map_err(|error| error.within(field))
    }

    fn at(self, list: &str, index: usize) -> Self {
        self.map_err(|error| error.within(format_args!("{list}[{index}]")))
    }
}

/// Milliseconds on the wire, where 0 means none.
fn optional_ms(ms: u64) -> Option<Duration> {
    (ms != 0).then(|| Duration::from_millis(ms))
}

fn port(field: &str, number: u32) -> Result<u16, LinkError> {
    u16::try_from(number)
        .ok()
        .filter(|port| *port != 0)
        .ok_or_else(|| LinkError::new(field, format_args!("{number} is not a port (1 to 65535)")))
}

fn protocol(number: i32) -> Result<Protocol, LinkError> {
    Protocol::try_from(number).map_err(|_| unknown("protocol", number))
}

fn unknown(field: &str, number: i32) -> LinkError {
    LinkError::new(field, format_args!("{number} is not known to this version of the proxy"))
}

fn address(field: &str, text: &str) -> Result<IpAddr, LinkError> {
    text.parse().map_err(|_| LinkError::new(field, format_args!("`{text}` is not an IP address")))
}

#[cfg(test)]
mod tests;
