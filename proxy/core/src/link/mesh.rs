//! `MeshConfig`.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use outrigger_proto::mesh as wire;

use super::{AccessLog, LinkError, OutboundTraffic, unknown};
use crate::spiffe::SpiffeId;

/// What holds for the whole mesh.
#[derive(Debug, Clone)]
pub struct Mesh {
    /// As `cluster.local`
    pub trust_domain: Arc<str>,
    /// What happens to destinations outside the mesh
    pub outbound: OutboundTraffic,
    /// Addresses that belong to the mesh: never passed through in plaintext while undecided
    pub ranges: Vec<IpNet>,
    /// Peers whose `X-Forwarded-*` and `Forwarded` are kept
    pub forwarders: Vec<SpiffeId>,
    /// Which requests are logged
    pub access_log: AccessLog,
    /// Share of new traces that are sampled, in millionths
    pub sampling_ppm: u32,
}

impl Mesh {
    /// Whether an address lies in the mesh's ranges.
    pub fn contains(&self, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        self.ranges.iter().any(|range| range.contains(&ip))
    }
}

impl Default for Mesh {
    fn default() -> Self {
        Self {
            trust_domain: "cluster.local".into(),
            outbound: OutboundTraffic::AllowAny,
            ranges: Vec::new(),
            forwarders: Vec::new(),
            access_log: AccessLog::Errors,
            sampling_ppm: 0,
        }
    }
}

/// Links `MeshConfig`.
///
/// # Errors
/// A range or identity that cannot be read.
pub fn mesh(wire: &wire::MeshConfig) -> Result<Mesh, LinkError> {
    let range = |(i, text): (usize, &String)| {
        let problem = || LinkError::new(format!("mesh_ranges[{i}]"), format_args!("`{text}` is not a CIDR block"));
        text.parse::<IpNet>().map_err(|_| problem())
    };
    let forwarder = |(i, text): (usize, &String)| {
        text.parse().map_err(|error| LinkError::new(format!("trusted_forwarders[{i}]"), error))
    };
    Ok(Mesh {
        trust_domain: wire.trust_domain.as_str().into(),
        outbound: OutboundTraffic::try_from(wire.outbound_traffic)
            .map_err(|_| unknown("outbound_traffic", wire.outbound_traffic))?,
        ranges: wire.mesh_ranges.iter().enumerate().map(range).collect::<Result<_, _>>()?,
        forwarders: wire.trusted_forwarders.iter().enumerate().map(forwarder).collect::<Result<_, _>>()?,
        access_log: AccessLog::try_from(wire.access_log).map_err(|_| unknown("access_log", wire.access_log))?,
        sampling_ppm: wire.sampling_ppm.min(1_000_000),
    })
}
