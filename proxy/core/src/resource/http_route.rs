//! `HTTPRoute` of the Gateway API.

use outrigger_proto::mesh::{self, http_match::Path};
use serde::Deserialize;
use serde_json::Value;

use crate::normalize::canonical;

use super::decode::{Bad, decode};
use super::route::{self, HeaderMatch, Match, ParentRef, Place, Route, Rule, SpecBackendRef, SpecFilter, ValueType};
use super::value::{Label, Method, Millis, NotYet, check_regex};

#[derive(Debug, Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Spec {
    parent_refs: Vec<ParentRef>,
    /// For gateways: a mesh routes by the Service that was called.
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
    timeouts: Timeouts,
    #[serde(rename = "retry")]
    _retry: Option<NotYet>,
    #[serde(rename = "sessionPersistence")]
    _session_persistence: Option<NotYet>,
}

#[derive(Debug, Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Timeouts {
    request: Option<Millis>,
    backend_request: Option<Millis>,
}

#[derive(Debug, Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct SpecMatch {
    path: PathMatch,
    headers: Vec<HeaderMatch>,
    query_params: Vec<QueryMatch>,
    method: Option<Method>,
}

#[derive(Debug, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct PathMatch {
    r#type: PathType,
    value: Option<String>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
enum PathType {
    Exact,
    #[default]
    PathPrefix,
    RegularExpression,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct QueryMatch {
    #[serde(default)]
    r#type: ValueType,
    name: String,
    value: String,
}

/// `None`: no parent is a Service.
pub(crate) fn read(spec: &Value, namespace: &str) -> Result<Option<Route>, Bad> {
    let spec: Spec = decode(spec, "spec", &[])?;
    let parents = route::parents(spec.parent_refs, namespace)?;
    if parents.is_empty() {
        return Ok(None);
    }
    // Without rules there is one, which matches everything and has no backend.
    let specs = spec.rules.unwrap_or_else(|| vec![SpecRule::default()]);
    let mut rules = Vec::with_capacity(specs.len());
    for (index, rule) in specs.into_iter().enumerate() {
        rules.push(self::rule(rule, namespace).map_err(|bad| bad.within(&format!("spec.rules[{index}]")))?);
    }
    route::unique_names(&rules)?;
    Ok(Some(Route { grpc: false, parents, rules }))
}

fn rule(mut spec: SpecRule, namespace: &str) -> Result<Rule, Bad> {
    if spec.matches.is_empty() {
        spec.matches.push(SpecMatch::default());
    }
    let one_prefix = matches!(spec.matches.as_slice(), [only] if only.path.r#type == PathType::PathPrefix);
    let place = Place { grpc: false, backend: false, one_prefix };
    let mut matches = Vec::with_capacity(spec.matches.len());
    for (index, one) in spec.matches.into_iter().enumerate() {
        matches.push(self::one_match(one).map_err(|bad| bad.within(&format!("matches[{index}]")))?);
    }
    let route::Filters { filters, extensions } = route::filters(spec.filters, place)?;
    let backends = route::backends(spec.backend_refs, namespace, place)?;
    let redirects = filters.iter().any(|filter| matches!(filter.filter, Some(mesh::route_filter::Filter::Redirect(_))));
    if redirects && !backends.is_empty() {
        return Err(Bad::new("backendRefs", "a redirect answers by itself; remove the backends, or the redirect"));
    }
    let (request, backend) = (spec.timeouts.request, spec.timeouts.backend_request);
    if let (Some(request), Some(backend)) = (request, backend)
        && request.0 != 0
        && backend.0 > request.0
    {
        return Err(Bad::new("timeouts.backendRequest", "longer than timeouts.request"));
    }
    Ok(Rule {
        name: spec.name.map(|name| name.0),
        matches,
        filters,
        extensions,
        backends,
        request_timeout: request.map(|timeout| timeout.0),
        backend_timeout: backend.map(|timeout| timeout.0),
    })
}

fn one_match(spec: SpecMatch) -> Result<Match, Bad> {
    let value = spec.path.value.unwrap_or_else(|| "/".to_owned());
    let (kind, length, path) = match spec.path.r#type {
        PathType::Exact => (2, value.len(), Path::Exact(check_path(value)?)),
        PathType::RegularExpression => {
            check_regex(&value).map_err(|reason| Bad::new("path.value", reason))?;
            (1, value.len(), Path::Regex(value))
        }
        PathType::PathPrefix => {
            let prefix = check_path(value)?.trim_end_matches('/').to_owned();
            (0, prefix.len(), Path::Prefix(prefix))
        }
    };
    let headers = route::headers(spec.headers)?;
    let query = spec.query_params.into_iter().map(|query| (query.name, query.r#type, query.value));
    let query = route::value_matches(query, "queryParams")?;
    let rank = [kind, length, usize::from(spec.method.is_some()), headers.len(), query.len()];
    let method = spec.method.map(|method| method.0).unwrap_or_default();
    Ok(Match { wire: mesh::HttpMatch { rule: 0, path: Some(path), method, headers, query }, rank })
}

/// A path that requests can have: they are compared in canonical spelling.
fn check_path(path: String) -> Result<String, Bad> {
    let wrong = match canonical(&path, true) {
        _ if !path.starts_with('/') => format!("`{path}` does not begin with /"),
        Ok(None) => return Ok(path),
        Ok(Some(canonical)) => format!("`{path}` is not in canonical spelling; write `{canonical}`"),
        Err(_) => format!("`{path}` has %2F, %5C, %00 or \\, which no rule may name"),
    };
    Err(Bad::new("path.value", wrong))
}
