//! The catalog as rows: what the HTTP API and the command line list.

use serde::Serialize;

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
