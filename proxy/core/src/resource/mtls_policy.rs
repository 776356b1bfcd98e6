//! `MtlsPolicy`: whether plaintext is taken, per namespace, workload and port.

use std::collections::BTreeMap;

use outrigger_proto::mesh::MtlsMode;
use serde::Deserialize;
use serde_json::Value;

use super::decode::{Bad, decode};
use super::meta::LabelSelector;
use super::value::Port;

/// An MtlsPolicy.
#[derive(Debug, Clone)]
pub struct MtlsPolicy {
    /// Labels of the workloads; `None`: the namespace
    pub selector: Option<BTreeMap<String, String>>,
    /// Mode of all ports; `None`: whatever is less specific says
    pub mode: Option<MtlsMode>,
    /// Modes of single application ports
    pub ports: BTreeMap<u16, MtlsMode>,
}

#[derive(Debug, Deserialize, Clone, Copy)]
pub(crate) enum Mode {
    Strict,
    Permissive,
    Disabled,
}

impl Mode {
    pub(crate) fn wire(self) -> MtlsMode {
        match self {
            Self::Strict => MtlsMode::Strict,
            Self::Permissive => MtlsMode::Permissive,
            Self::Disabled => MtlsMode::Disabled,
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Spec {
    selector: Option<LabelSelector>,
    mode: Option<Mode>,
    #[serde(default)]
    ports: BTreeMap<String, Mode>,
}

pub(crate) fn read(spec: &Value) -> Result<MtlsPolicy, Bad> {
    let spec: Spec = decode(spec, "spec", &[])?;
    if spec.mode.is_none() && spec.ports.is_empty() {
        return Err(Bad::new("spec.mode", "missing; write Strict, Permissive or Disabled"));
    }
    let mut ports = BTreeMap::new();
    for (text, mode) in spec.ports {
        let port: Port = text.parse().map_err(|reason: String| Bad::new(format!("spec.ports.{text}"), reason))?;
        ports.insert(port.0, mode.wire());
    }
    Ok(MtlsPolicy {
        selector: spec.selector.map(|selector| selector.match_labels),
        mode: spec.mode.map(Mode::wire),
        ports,
    })
}
