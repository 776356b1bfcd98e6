//! Backends, their policy, and endpoints.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use outrigger_proto::mesh as wire;

use super::{Algorithm, LinkError, Protocol, Within, address, port, protocol, unknown};
use crate::balance::EndpointInfo;

/// A cluster of endpoints: one port of one service.
#[derive(Debug, Clone, PartialEq)]
pub struct Backend {
    /// `<namespace>/<service>:<port>`: under this key runtime state survives every swap
    pub key: Arc<str>,
    /// Namespace of the service
    pub namespace: Arc<str>,
    /// Name of the service
    pub service: Arc<str>,
    /// `<namespace>/<service>`, as metrics have it
    pub label: Arc<str>,
    /// Port of the service
    pub port: u16,
    /// What its endpoints speak
    pub protocol: Protocol,
    /// How many shards its endpoints come in
    pub shards: u32,
    /// Balancing, breaking, ejection, budget
    pub policy: ClusterPolicy,
}

/// How a cluster is balanced and protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClusterPolicy {
    /// How an endpoint is picked
    pub algorithm: Algorithm,
    /// Longest time that connecting may take
    pub connect_timeout: Duration,
    /// How long an idle connection is kept
    pub idle_timeout: Duration,
    /// Circuit breaker
    pub limits: Limits,
    /// Outlier ejection
    pub outlier: OutlierPolicy,
    /// Retry budget
    pub budget: Budget,
}

/// Limits of the circuit breaker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connections
    pub connections: u32,
    /// Requests that wait for a connection
    pub pending: u32,
    /// Concurrent requests
    pub requests: u32,
    /// Concurrent retries
    pub retries: u32,
}

/// When an endpoint is ejected, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutlierPolicy {
    /// Failures in a row; 0: never eject
    pub consecutive_failures: u32,
    /// First ejection; each following one is twice as long
    pub base_ejection: Duration,
    /// Longest ejection
    pub max_ejection: Duration,
    /// Share of the endpoints that may be ejected at one time
    pub max_ejected_percent: u32,
}

/// How many retries a cluster may get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Per cent of the requests
    pub percent: u32,
    /// And this many per second in any case
    pub min_per_second: u32,
}

/// An absent limit (0 on the wire) is none.
fn limit(value: u32) -> u32 {
    if value == 0 { u32::MAX } else { value }
}

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
const IDLE_TIMEOUT: Duration = Duration::from_secs(300);

pub(super) fn backend(wire: &wire::Backend) -> Result<Backend, LinkError> {
    if wire.key.is_empty() {
        return Err(LinkError::new("key", "is empty"));
    }
    Ok(Backend {
        key: wire.key.as_str().into(),
        namespace: wire.namespace.as_str().into(),
        service: wire.service.as_str().into(),
        label: format!("{}/{}", wire.namespace, wire.service).into(),
        port: port("port", wire.port)?,
        protocol: protocol(wire.protocol)?,
        shards: wire.shards,
        policy: policy(wire.policy.as_ref()).within("policy")?,
    })
}

fn policy(wire: Option<&wire::ClusterPolicy>) -> Result<ClusterPolicy, LinkError> {
    let wire = wire.copied().unwrap_or_default();
    let breaker = wire.breaker.unwrap_or_default();
    let outlier = wire.outlier.unwrap_or_default();
    let budget = wire.budget.unwrap_or_default();
    Ok(ClusterPolicy {
        algorithm: Algorithm::try_from(wire.algorithm).map_err(|_| unknown("algorithm", wire.algorithm))?,
        connect_timeout: super::optional_ms(wire.connect_timeout_ms).unwrap_or(CONNECT_TIMEOUT),
        idle_timeout: super::optional_ms(wire.idle_timeout_ms).unwrap_or(IDLE_TIMEOUT),
        limits: Limits {
            connections: limit(breaker.max_connections),
            pending: limit(breaker.max_pending_requests),
            requests: limit(breaker.max_requests),
            retries: limit(breaker.max_retries),
        },
        outlier: OutlierPolicy {
            consecutive_failures: outlier.consecutive_failures,
            base_ejection: Duration::from_millis(outlier.base_ejection_ms),
            max_ejection: Duration::from_millis(outlier.max_ejection_ms.max(outlier.base_ejection_ms)),
            max_ejected_percent: outlier.max_ejected_percent.min(100),
        },
        budget: Budget { percent: budget.percent, min_per_second: budget.min_per_second },
    })
}

/// Links one shard of a backend's endpoints.
///
/// # Errors
/// An address, port or identity that cannot be read.
pub fn endpoints(wire: &wire::Endpoints) -> Result<Vec<EndpointInfo>, LinkError> {
    wire.endpoints.iter().enumerate().map(|(i, wire)| endpoint(wire).at("endpoints", i)).collect()
}

/// Links the endpoint of a pod-IP hit, with the protocol of its port.
///
/// # Errors
/// An address, port, identity or protocol that cannot be read, or no endpoint.
pub fn workload(wire: &wire::Workload) -> Result<(EndpointInfo, Protocol), LinkError> {
    let found = wire.endpoint.as_ref().ok_or_else(|| LinkError::new("endpoint", "is missing"))?;
    Ok((endpoint(found).within("endpoint")?, protocol(wire.protocol)?))
}

fn endpoint(wire: &wire::Endpoint) -> Result<EndpointInfo, LinkError> {
    if wire.id.is_empty() {
        return Err(LinkError::new("id", "is empty"));
    }
    let identity = match wire.identity.as_str() {
        "" => None,
        text => Some(text.parse().map_err(|error| LinkError::new("identity", error))?),
    };
    Ok(EndpointInfo {
        id: wire.id.as_str().into(),
        address: SocketAddr::new(address("address", &wire.address)?, port("port", wire.port)?),
        app_port: port("app_port", if wire.app_port == 0 { wire.port } else { wire.app_port })?,
        identity,
        version: wire.version.as_str().into(),
        weight: wire.weight,
        region: wire.region.as_str().into(),
        zone: wire.zone.as_str().into(),
    })
}
