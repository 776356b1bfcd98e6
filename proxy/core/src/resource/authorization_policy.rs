//! `AuthorizationPolicy`: who may call what.

use std::collections::BTreeMap;

use outrigger_proto::mesh;
use serde::Deserialize;
use serde_json::Value;

use super::decode::{Bad, decode};
use super::meta::{LabelSelector, Meta};
use super::value::{Block, Glob, HeaderName, Label, Method, NotYet, Port, Principal};

/// An AuthorizationPolicy.
#[derive(Debug, Clone)]
pub struct AuthorizationPolicy {
    /// Labels of the workloads; `None`: the namespace
    pub selector: Option<BTreeMap<String, String>>,
    /// What its rules do
    pub action: Action,
    /// As they go to proxies
    pub rules: Vec<mesh::AuthorizationRule>,
}

/// What a matching rule does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
pub enum Action {
    /// Permits; once an Allow selects a workload, what none allows is denied
    #[default]
    Allow,
    /// Refuses, before any Allow
    Deny,
    /// Logs, and decides nothing
    Audit,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Spec {
    selector: Option<LabelSelector>,
    #[serde(default)]
    action: Action,
    #[serde(default)]
    rules: Vec<Rule>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    from: Option<Vec<Source>>,
    to: Option<Vec<Operation>>,
    #[serde(default)]
    when: Vec<Condition>,
}

#[derive(Debug, Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Source {
    principals: Option<Vec<Principal>>,
    namespaces: Option<Vec<Label>>,
    ip_blocks: Option<Vec<Block>>,
}

#[derive(Debug, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct Operation {
    methods: Option<Vec<Method>>,
    paths: Option<Vec<Glob>>,
    ports: Option<Vec<Port>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Condition {
    header: Option<HeaderName>,
    #[serde(default)]
    values: Vec<String>,
    #[serde(rename = "jwt")]
    _jwt: Option<NotYet>,
}

pub(crate) fn read(spec: &Value, meta: &Meta) -> Result<AuthorizationPolicy, Bad> {
    let spec: Spec = decode(spec, "spec", &[])?;
    if spec.rules.is_empty() && spec.action != Action::Allow {
        let reason = "missing; without rules this policy does nothing. `rules: [{}]` matches everything";
        return Err(Bad::new("spec.rules", reason));
    }
    let mut rules = Vec::with_capacity(spec.rules.len());
    for (index, rule) in spec.rules.into_iter().enumerate() {
        let name = format!("{}/{}/{index}", meta.namespace, meta.name);
        rules.push(convert(rule, name).map_err(|bad| bad.within(&format!("spec.rules[{index}]")))?);
    }
    let selector = spec.selector.map(|selector| selector.match_labels);
    Ok(AuthorizationPolicy { selector, action: spec.action, rules })
}

fn convert(rule: Rule, name: String) -> Result<mesh::AuthorizationRule, Bad> {
    let mut from = Vec::new();
    for (index, source) in given(rule.from, "from")?.into_iter().enumerate() {
        let at = format!("from[{index}]");
        if source.principals.is_none() && source.namespaces.is_none() && source.ip_blocks.is_none() {
            return Err(Bad::new(at, "names nobody; leave `from` out to mean anyone"));
        }
        from.push(mesh::Source {
            principals: values(source.principals, &at, "principals")?.into_iter().map(|value| value.0).collect(),
            namespaces: values(source.namespaces, &at, "namespaces")?.into_iter().map(|value| value.0).collect(),
            ip_blocks: values(source.ip_blocks, &at, "ipBlocks")?.into_iter().map(|value| value.0).collect(),
        });
    }
    let mut to = Vec::new();
    for (index, operation) in given(rule.to, "to")?.into_iter().enumerate() {
        let at = format!("to[{index}]");
        if operation.methods.is_none() && operation.paths.is_none() && operation.ports.is_none() {
            return Err(Bad::new(at, "names nothing; leave `to` out to mean anything"));
        }
        to.push(mesh::Operation {
            methods: values(operation.methods, &at, "methods")?.into_iter().map(|value| value.0).collect(),
            paths: values(operation.paths, &at, "paths")?.into_iter().map(|value| value.0).collect(),
            ports: values(operation.ports, &at, "ports")?.into_iter().map(|value| u32::from(value.0)).collect(),
        });
    }
    let mut when = Vec::new();
    for (index, condition) in rule.when.into_iter().enumerate() {
        let at = format!("when[{index}]");
        let Some(header) = condition.header else {
            return Err(Bad::new(format!("{at}.header"), "missing; it is required"));
        };
        if condition.values.is_empty() {
            return Err(Bad::new(format!("{at}.values"), "missing; any of them will match"));
        }
        when.push(mesh::Condition { header: header.0, values: condition.values });
    }
    Ok(mesh::AuthorizationRule { name, from, to, when })
}

/// An empty list is not the same as none: on the wire it would match everything, and nobody means that by writing it.
fn given<T>(list: Option<Vec<T>>, field: &str) -> Result<Vec<T>, Bad> {
    match list {
        Some(list) if list.is_empty() => Err(Bad::new(field, "empty; name at least one, or leave it out to match all")),
        list => Ok(list.unwrap_or_default()),
    }
}

fn values<T>(list: Option<Vec<T>>, at: &str, field: &str) -> Result<Vec<T>, Bad> {
    given(list, field).map_err(|bad| bad.within(at))
}
