//! `GRPCRoute` of the Gateway API: a method is a path, `/<service>/<method>`.

use outrigger_proto::mesh::{self, http_match::Path};
use serde::Deserialize;
use serde_json::Value;

use super::decode::{Bad, decode};
use super::route::{self, HeaderMatch, Match, ParentRef, Place, Route, Rule, SpecBackendRef, SpecFilter, ValueType};
use super::value::{Label, NotYet, check_regex};

#[derive(Debug, Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Spec {
    parent_refs: Vec<ParentRef>,
    #[serde(rename = "hostnames")]
    _hostnames: Vec<String>,
    rules: Option<Vec<SpecRule>>,
    #[serde(rename = "useDefaultGateways")]
    _use_default_gateways: Option<NotYet>,
}

#[derive(Debug, Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct SpecRule {
    name: Option<Label>,
    matches: Vec<SpecMatch>,
    filters: Vec<SpecFilter>,
    backend_refs: Vec<SpecBackendRef>,
    #[serde(rename = "sessionPersistence")]
    _session_persistence: Option<NotYet>,
}

#[derive(Debug, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct SpecMatch {
    method: Option<MethodMatch>,
    headers: Vec<HeaderMatch>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct MethodMatch {
    #[serde(default)]
    r#type: ValueType,
    service: Option<String>,
    method: Option<String>,
}

/// `None`: no parent is a Service.
pub(crate) fn read(spec: &Value, namespace: &str) -> Result<Option<Route>, Bad> {
    let spec: Spec = decode(spec, "spec", &[])?;
    let parents = route::parents(spec.parent_refs, namespace)?;
    if parents.is_empty() {
        return Ok(None);
    }
    let specs = spec.rules.unwrap_or_else(|| vec![SpecRule::default()]);
    let mut rules = Vec::with_capacity(specs.len());
    for (index, rule) in specs.into_iter().enumerate() {
        rules.push(self::rule(rule, namespace).map_err(|bad| bad.within(&format!("spec.rules[{index}]")))?);
    }
    route::unique_names(&rules)?;
    Ok(Some(Route { grpc: true, parents, rules }))
}

fn rule(mut spec: SpecRule, namespace: &str) -> Result<Rule, Bad> {
    if spec.matches.is_empty() {
        spec.matches.push(SpecMatch::default());
    }
    let place = Place { grpc: true, backend: false, one_prefix: false };
    let mut matches = Vec::with_capacity(spec.matches.len());
    for (index, one) in spec.matches.into_iter().enumerate() {
        matches.push(self::one_match(one).map_err(|bad| bad.within(&format!("matches[{index}]")))?);
    }
    let route::Filters { filters, extensions } = route::filters(spec.filters, place)?;
    Ok(Rule {
        name: spec.name.map(|name| name.0),
        matches,
        filters,
        extensions,
        backends: route::backends(spec.backend_refs, namespace, place)?,
        request_timeout: None,
        backend_timeout: None,
    })
}

fn one_match(spec: SpecMatch) -> Result<Match, Bad> {
    let (service, method) = spec.method.as_ref().map_or((None, None), |m| (m.service.as_deref(), m.method.as_deref()));
    let path = match &spec.method {
        None => Path::Prefix(String::new()),
        Some(spec) => path(spec)?,
    };
    let headers = route::headers(spec.headers)?;
    let rank = [service.map_or(0, str::len), method.map_or(0, str::len), headers.len(), 0, 0];
    let wire = mesh::HttpMatch { rule: 0, path: Some(path), method: String::new(), headers, query: Vec::new() };
    Ok(Match { wire, rank })
}

fn path(spec: &MethodMatch) -> Result<Path, Bad> {
    let parts = [("service", &spec.service), ("method", &spec.method)];
    for (field, value) in parts {
        let Some(value) = value else { continue };
        let wrong = match spec.r#type {
            ValueType::RegularExpression => check_regex(value).err(),
            ValueType::Exact if !name(value) => Some(format!("`{value}` is not the name of a gRPC {field}")),
            ValueType::Exact => None,
        };
        if let Some(reason) = wrong {
            return Err(Bad::new(format!("method.{field}"), reason));
        }
    }
    Ok(match (spec.r#type, spec.service.as_deref(), spec.method.as_deref()) {
        (_, None, None) => return Err(Bad::new("method", "names neither service nor method; it needs one of them")),
        (ValueType::Exact, Some(service), Some(method)) => Path::Exact(format!("/{service}/{method}")),
        (ValueType::Exact, Some(service), None) => Path::Prefix(format!("/{service}")),
        (ValueType::Exact, None, Some(method)) => Path::Regex(format!("/[^/]+/{}", regex::escape(method))),
        (ValueType::RegularExpression, service, method) => {
            Path::Regex(format!("/(?:{})/(?:{})", service.unwrap_or("[^/]+"), method.unwrap_or("[^/]+")))
        }
    })
}

/// The characters of protobuf's names.
fn name(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.'))
}
