//! Wire types of Outrigger, generated at build time from `proto/*.proto` (no `protoc` needed).
//!
//! Without the feature `grpc` only the messages exist, and nothing in this crate does IO.

/// `google.protobuf.Any`, with bytes that are shared rather than copied.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct Any {
    /// What `value` is
    #[prost(string, tag = "1")]
    pub type_url: String,
    /// The encoded message
    #[prost(bytes = "bytes", tag = "2")]
    pub value: prost::bytes::Bytes,
}

/// The incremental xDS transport, wire-compatible with Envoy's `envoy.service.discovery.v3`.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod discovery {
    include!(concat!(env!("OUT_DIR"), "/envoy.service.discovery.v3.rs"));
}

/// `outrigger.mesh.v1`: what the control plane tells a proxy.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod mesh {
    include!(concat!(env!("OUT_DIR"), "/outrigger.mesh.v1.rs"));
}

/// `outrigger.control.v1`: certificates, registration, filter modules.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod control {
    include!(concat!(env!("OUT_DIR"), "/outrigger.control.v1.rs"));
}

/// Type URLs of the resources that the discovery transport carries.
pub mod type_url {
    /// `svc/…`, and `ip/…`, `host/…` where they name a service
    pub const SERVICE: &str = "type.googleapis.com/outrigger.mesh.v1.Service";
    /// `endpoints/…`
    pub const ENDPOINTS: &str = "type.googleapis.com/outrigger.mesh.v1.Endpoints";
    /// `ip/…` where it names one instance
    pub const WORKLOAD: &str = "type.googleapis.com/outrigger.mesh.v1.Workload";
    /// `self/…`
    pub const SELF: &str = "type.googleapis.com/outrigger.mesh.v1.Self";
    /// `filter/…`
    pub const FILTER: &str = "type.googleapis.com/outrigger.mesh.v1.Filter";
    /// `bundle/…`
    pub const BUNDLE: &str = "type.googleapis.com/outrigger.mesh.v1.Bundle";
    /// `mesh`
    pub const MESH_CONFIG: &str = "type.googleapis.com/outrigger.mesh.v1.MeshConfig";
}
