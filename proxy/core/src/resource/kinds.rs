//! Which kinds there are, and what is said of those that are not for us.

use super::decode::suggest;

/// Group of the Gateway API.
pub(crate) const GATEWAY: &str = "gateway.networking.k8s.io";
pub(crate) const OUTRIGGER: &str = "outrigger.dev";
const DISCOVERY: &str = "discovery.k8s.io";

/// What a document is, by its `apiVersion` and `kind`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Namespace,
    Service,
    ServiceAccount,
    EndpointSlice,
    HttpRoute,
    GrpcRoute,
    ReferenceGrant,
    MeshConfig,
    Workload,
    TrafficPolicy,
    AuthorizationPolicy,
    MtlsPolicy,
    WasmFilter,
}

/// Kinds that are read: group, kind, versions.
const KINDS: &[(&str, &str, &[&str], Kind)] = &[
    ("", "Namespace", &["v1"], Kind::Namespace),
    ("", "Service", &["v1"], Kind::Service),
    ("", "ServiceAccount", &["v1"], Kind::ServiceAccount),
    (DISCOVERY, "EndpointSlice", &["v1"], Kind::EndpointSlice),
    (GATEWAY, "HTTPRoute", &["v1", "v1beta1"], Kind::HttpRoute),
    (GATEWAY, "GRPCRoute", &["v1"], Kind::GrpcRoute),
    (GATEWAY, "ReferenceGrant", &["v1", "v1beta1"], Kind::ReferenceGrant),
    (OUTRIGGER, "MeshConfig", &["v1alpha1"], Kind::MeshConfig),
    (OUTRIGGER, "Workload", &["v1alpha1"], Kind::Workload),
    (OUTRIGGER, "TrafficPolicy", &["v1alpha1"], Kind::TrafficPolicy),
    (OUTRIGGER, "AuthorizationPolicy", &["v1alpha1"], Kind::AuthorizationPolicy),
    (OUTRIGGER, "MtlsPolicy", &["v1alpha1"], Kind::MtlsPolicy),
    (OUTRIGGER, "WasmFilter", &["v1alpha1"], Kind::WasmFilter),
];

/// Kinds of the design that this version does not have.
const NOT_YET: &[(&str, &str)] = &[
    (OUTRIGGER, "HttpFilter"),
    (OUTRIGGER, "Rollout"),
    (GATEWAY, "TCPRoute"),
    (GATEWAY, "TLSRoute"),
    (GATEWAY, "UDPRoute"),
    (GATEWAY, "BackendTLSPolicy"),
];

/// Kinds of the Gateway API that are for gateways, not for a mesh.
const GATEWAYS: &[&str] = &["Gateway", "GatewayClass", "ListenerSet", "XListenerSet"];

/// What to do with a document.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// It is of this kind
    Ours(Kind),
    /// It is not for the mesh
    Skip(String),
    /// It looks as if it were meant for the mesh; `meant` is the kind that may have been
    Wrong { field: &'static str, reason: String, meant: Option<Kind> },
}

/// Classifies a document.
pub(crate) fn classify(api_version: &str, kind: &str) -> Class {
    let (group, version) = api_version.rsplit_once('/').unwrap_or(("", api_version));
    if let Some((_, _, versions, ours)) = KINDS.iter().find(|(g, k, ..)| *g == group && *k == kind) {
        if versions.contains(&version) {
            return Class::Ours(*ours);
        }
        let slash = if group.is_empty() { "" } else { "/" };
        let reason = format!("{kind} has no version `{version}`; write `{group}{slash}{}`", versions.join("` or `"));
        return Class::Wrong { field: "apiVersion", reason, meant: Some(*ours) };
    }
    if NOT_YET.contains(&(group, kind)) {
        return Class::Wrong { field: "kind", reason: format!("{kind} is not supported yet; remove it"), meant: None };
    }
    if group.is_empty() && kind == "List" {
        let reason = "a List is not read; write its items as documents separated by ---".to_owned();
        return Class::Wrong { field: "kind", reason, meant: None };
    }
    let groups = [OUTRIGGER, GATEWAY, DISCOVERY];
    if !group.is_empty() && !groups.contains(&group) {
        return match groups.into_iter().find(|ours| strsim::damerau_levenshtein(ours, group) <= 2) {
            Some(ours) => Class::Wrong {
                field: "apiVersion",
                reason: format!("unknown group `{group}`; did you mean `{ours}`?"),
                meant: KINDS.iter().find(|(g, k, ..)| *g == ours && *k == kind).map(|(.., meant)| *meant),
            },
            None => Class::Skip(format!("the mesh has no use for {kind} of {group}")),
        };
    }
    if group == GATEWAY && GATEWAYS.contains(&kind) {
        return Class::Skip(format!("{kind} is for gateways; a mesh has none"));
    }
    let of_group = KINDS.iter().filter(|(g, ..)| *g == group).map(|(_, kind, ..)| *kind);
    let meant = suggest(kind, of_group).and_then(|name| KINDS.iter().find(|(g, k, ..)| *g == group && *k == name));
    match meant {
        Some((_, name, _, meant)) => Class::Wrong {
            field: "kind",
            reason: format!("unknown kind `{kind}`; did you mean `{name}`?"),
            meant: Some(*meant),
        },
        None if group == OUTRIGGER || group == GATEWAY => {
            let known: Vec<_> = KINDS.iter().filter(|(g, ..)| *g == group).map(|(_, kind, ..)| *kind).collect();
            let reason = format!("unknown kind `{kind}`; {group} has {}", known.join(", "));
            Class::Wrong { field: "kind", reason, meant: None }
        }
        None => {
            // `apiVersion: v1` is easily left standing where the group is another.
            let elsewhere = KINDS.iter().find(|(g, k, ..)| !g.is_empty() && *k == kind && group.is_empty());
            match elsewhere {
                Some((g, _, versions, meant)) => Class::Wrong {
                    field: "apiVersion",
                    reason: format!("{kind} is of `{g}/{}`", versions.first().unwrap_or(&"v1")),
                    meant: Some(*meant),
                },
                None => Class::Skip(format!("the mesh has no use for {kind}")),
            }
        }
    }
}
