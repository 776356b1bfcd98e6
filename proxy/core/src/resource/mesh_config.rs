//! `MeshConfig`: what holds for the whole mesh.

use outrigger_proto::mesh::MtlsMode;
use outrigger_proto::mesh::mesh_config::{AccessLog, OutboundTraffic};
use serde::Deserialize;
use serde_json::Value;

use super::decode::{Bad, decode};
use super::mtls_policy::Mode;
use super::traffic_policy::{self, Settings};
use super::value::{Block, Identity, Millis, NotYet, Percent, Subdomain};

/// A MeshConfig. `None`: not said, the default holds.
#[derive(Debug, Clone, Default)]
pub struct MeshConfig {
    /// Must be the one that certificates are signed for
    pub trust_domain: Option<String>,
    /// Lifetime of certificates in milliseconds
    pub certificate_lifetime: Option<u64>,
    /// Mode of workloads that no MtlsPolicy selects
    pub mtls: Option<MtlsMode>,
    /// CIDR blocks whose unknown addresses are never passed through
    pub mesh_ranges: Vec<String>,
    /// What happens to destinations that are not the mesh's
    pub outbound_traffic: Option<OutboundTraffic>,
    /// SPIFFE IDs of peers whose `X-Forwarded-*` are believed
    pub trusted_forwarders: Vec<String>,
    /// Which exchanges are logged
    pub access_log: Option<AccessLog>,
    /// Share of new traces that are sampled, in millionths
    pub sampling_ppm: Option<u32>,
    /// Under every TrafficPolicy
    pub defaults: Settings,
}

#[derive(Debug, Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Spec {
    trust_domain: Option<Subdomain>,
    certificates: Certificates,
    mtls: Mtls,
    mesh_ranges: Vec<Block>,
    outbound_traffic: Option<OutboundTrafficName>,
    trusted_forwarders: Vec<Identity>,
    access_log: Log,
    tracing: Tracing,
    defaults: Option<traffic_policy::Spec>,
}

#[derive(Debug, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct Certificates {
    lifetime: Option<Millis>,
}

#[derive(Debug, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct Mtls {
    mode: Option<Mode>,
}

#[derive(Debug, Deserialize)]
enum OutboundTrafficName {
    AllowAny,
    RegistryOnly,
}

#[derive(Debug, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct Log {
    mode: Option<LogMode>,
    #[serde(rename = "format")]
    _format: Option<LogFormat>,
}

#[derive(Debug, Deserialize)]
enum LogMode {
    Off,
    Errors,
    All,
}

#[derive(Debug, Deserialize)]
enum LogFormat {
    Json,
}

#[derive(Debug, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct Tracing {
    sampling: Option<Percent>,
    #[serde(rename = "otlp")]
    _otlp: Option<NotYet>,
}

pub(crate) fn read(spec: &Value) -> Result<MeshConfig, Bad> {
    let spec: Spec = decode(spec, "spec", &[])?;
    if spec.certificates.lifetime.is_some_and(|lifetime| lifetime.0 < 1_000) {
        return Err(Bad::new("spec.certificates.lifetime", "shorter than 1s; certificates are renewed at half of it"));
    }
    Ok(MeshConfig {
        trust_domain: spec.trust_domain.map(|domain| domain.0),
        certificate_lifetime: spec.certificates.lifetime.map(|lifetime| lifetime.0),
        mtls: spec.mtls.mode.map(Mode::wire),
        mesh_ranges: spec.mesh_ranges.into_iter().map(|block| block.0).collect(),
        outbound_traffic: spec.outbound_traffic.map(|name| match name {
            OutboundTrafficName::AllowAny => OutboundTraffic::AllowAny,
            OutboundTrafficName::RegistryOnly => OutboundTraffic::RegistryOnly,
        }),
        trusted_forwarders: spec.trusted_forwarders.into_iter().map(|identity| identity.0).collect(),
        access_log: spec.access_log.mode.map(|mode| match mode {
            LogMode::Off => AccessLog::Off,
            LogMode::Errors => AccessLog::Errors,
            LogMode::All => AccessLog::All,
        }),
        sampling_ppm: spec.tracing.sampling.map(|sampling| sampling.0),
        defaults: spec
            .defaults
            .map_or_else(|| Ok(Settings::default()), |spec| traffic_policy::defaults(spec, "spec.defaults"))?,
    })
}
