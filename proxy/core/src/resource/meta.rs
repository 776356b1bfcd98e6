//! `metadata`, of all kinds alike.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize;
use serde_json::Value;

use super::decode::{Bad, decode};
use super::value::{dns_label, dns_subdomain};

/// The part of `metadata` that means something to the mesh.
#[derive(Debug, Clone, Default)]
pub(crate) struct Meta {
    pub(crate) name: String,
    /// Empty for cluster-wide kinds
    pub(crate) namespace: String,
    pub(crate) labels: BTreeMap<String, String>,
    /// Seconds since the Unix epoch
    pub(crate) created: Option<i64>,
}

/// Whether a kind lives in a namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scope {
    Namespaced,
    Cluster,
}

/// The namespace of what names none.
pub(crate) const DEFAULT_NAMESPACE: &str = "default";

/// Reads `metadata`. `label`: the name must be a DNS label, not only a subdomain.
pub(crate) fn read(document: &Value, scope: Scope, label: bool) -> Result<Meta, Bad> {
    const KNOWN: &[&str] = &["name", "namespace", "labels", "annotations", "creationTimestamp"];
    let value = document.get("metadata").ok_or_else(|| Bad::new("metadata", "missing; it is required"))?;
    let meta: ObjectMeta = decode(value, "metadata", KNOWN)?;
    let name = meta
        .name
        .filter(|name| !name.is_empty())
        .ok_or_else(|| Bad::new("metadata.name", "missing; it is required"))?;
    if label && !dns_label(&name) {
        let reason = format!("`{name}` is not a DNS label (lower-case letters, digits and -, at most 63)");
        return Err(Bad::new("metadata.name", reason));
    }
    if !dns_subdomain(&name) {
        return Err(Bad::new(
            "metadata.name",
            format!("`{name}` is not a name (DNS labels joined by dots, at most 253)"),
        ));
    }
    let namespace = match (scope, meta.namespace) {
        (Scope::Cluster, None) => String::new(),
        (Scope::Cluster, Some(_)) => {
            return Err(Bad::new(
                "metadata.namespace",
                "this kind is for the whole mesh and has no namespace; remove it",
            ));
        }
        (Scope::Namespaced, namespace) => namespace.unwrap_or_else(|| DEFAULT_NAMESPACE.to_owned()),
    };
    if scope == Scope::Namespaced && !dns_label(&namespace) {
        return Err(Bad::new("metadata.namespace", format!("`{namespace}` is not a DNS label")));
    }
    Ok(Meta {
        name,
        namespace,
        labels: meta.labels.unwrap_or_default(),
        created: meta.creation_timestamp.map(|time| time.0.as_second()),
    })
}

/// `{matchLabels: {…}}`
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct LabelSelector {
    pub(crate) match_labels: BTreeMap<String, String>,
    #[serde(rename = "matchExpressions")]
    _match_expressions: Option<super::value::NotYet>,
}

/// What a policy attaches to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Target {
    /// Everything in the policy's own namespace
    Namespace,
    /// A Service of the policy's namespace
    Service(String),
    /// A route of the policy's namespace, whole or one rule of it
    Route {
        /// GRPCRoute rather than HTTPRoute
        grpc: bool,
        /// Its name
        name: String,
        /// Name of the rule
        rule: Option<String>,
    },
}

/// As policy attachment of the Gateway API writes it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct TargetRef {
    #[serde(default)]
    group: String,
    kind: String,
    name: String,
    section_name: Option<String>,
}

/// Reads the target references at `at` of a policy in `namespace`.
pub(crate) fn targets(refs: Vec<TargetRef>, at: &str, namespace: &str) -> Result<Vec<Target>, Bad> {
    if refs.is_empty() {
        return Err(Bad::new(at, "no target; name at least one Service, Namespace or route"));
    }
    let mut targets = Vec::with_capacity(refs.len());
    for (index, reference) in refs.into_iter().enumerate() {
        let field = |name: &str| format!("{at}[{index}].{name}");
        let core = matches!(reference.group.as_str(), "" | "core");
        let section = reference.section_name;
        let target = match (core, reference.kind.as_str()) {
            (true, "Namespace") if reference.name == namespace => Target::Namespace,
            (true, "Namespace") => {
                let reason =
                    format!("a policy attaches to its own namespace only; write `{namespace}`, or move the policy");
                return Err(Bad::new(field("name"), reason));
            }
            (true, "Service") => Target::Service(reference.name),
            (false, kind @ ("HTTPRoute" | "GRPCRoute")) if reference.group == super::kinds::GATEWAY => {
                let grpc = kind == "GRPCRoute";
                targets.push(Target::Route { grpc, name: reference.name, rule: section });
                continue;
            }
            (true, kind @ ("HTTPRoute" | "GRPCRoute")) => {
                return Err(Bad::new(field("group"), format!("the group of {kind} is {}", super::kinds::GATEWAY)));
            }
            (_, kind) => {
                let reason = format!(
                    "`{kind}` of group `{}` cannot be a target; Namespace, Service, HTTPRoute and GRPCRoute can",
                    reference.group
                );
                return Err(Bad::new(field("kind"), reason));
            }
        };
        if section.is_some() {
            return Err(Bad::new(field("sectionName"), "not supported yet on this kind; remove it"));
        }
        targets.push(target);
    }
    Ok(targets)
}
