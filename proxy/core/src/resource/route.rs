//! What HTTPRoute and GRPCRoute share: parents, filters, backends.
//!
//! The shapes are read by types of our own rather than by the generated ones of the Gateway API, which have a type per
//! place a filter may stand; and these name what is refused.

use outrigger_proto::mesh::{self, route_filter};
use serde::Deserialize;

use super::decode::Bad;
use super::value::{HeaderName, HeaderText, Label, NotYet, Port, Subdomain};

/// An HTTPRoute or a GRPCRoute with at least one Service as parent.
#[derive(Debug, Clone)]
pub struct Route {
    /// GRPCRoute
    pub grpc: bool,
    /// Services it is attached to
    pub parents: Vec<Parent>,
    /// In the order of the document
    pub rules: Vec<Rule>,
}

/// A Service that a route is attached to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parent {
    /// Namespace of the Service
    pub namespace: String,
    /// Name of the Service
    pub name: String,
    /// Only this port
    pub port: Option<u16>,
    /// Only the port of this name
    pub section: Option<String>,
}

/// A rule.
#[derive(Debug, Clone)]
pub struct Rule {
    /// Name, for policies and people
    pub name: Option<String>,
    /// Any of; at least one
    pub matches: Vec<Match>,
    /// Of the rule
    pub filters: Vec<mesh::RouteFilter>,
    /// WasmFilters of the route's namespace that the rule names (`ExtensionRef`)
    pub extensions: Vec<String>,
    /// Shares
    pub backends: Vec<BackendRef>,
    /// `timeouts.request` in milliseconds, 0 for none
    pub request_timeout: Option<u64>,
    /// `timeouts.backendRequest` in milliseconds, 0 for none
    pub backend_timeout: Option<u64>,
}

/// One match and its precedence.
#[derive(Debug, Clone)]
pub struct Match {
    /// As it goes to proxies, but for the rule's index
    pub wire: mesh::HttpMatch,
    /// Greater wins. HTTP: kind of path, its length, method, headers, query. gRPC: length of service, of method, headers
    pub rank: [usize; 5],
}

/// One backend of a rule.
#[derive(Debug, Clone)]
pub struct BackendRef {
    /// Namespace of the Service
    pub namespace: String,
    /// Name of the Service
    pub name: String,
    /// Its port
    pub port: u16,
    /// Share
    pub weight: u32,
    /// For this backend only
    pub filters: Vec<mesh::RouteFilter>,
    /// Not a Service at all: why its share is an error
    pub invalid: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct ParentRef {
    group: Option<String>,
    kind: Option<String>,
    name: Subdomain,
    namespace: Option<Label>,
    port: Option<Port>,
    section_name: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SpecBackendRef {
    #[serde(default)]
    group: String,
    kind: Option<String>,
    name: Subdomain,
    namespace: Option<Label>,
    port: Option<Port>,
    weight: Option<u32>,
    #[serde(default)]
    filters: Vec<SpecFilter>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct SpecFilter {
    r#type: FilterType,
    request_header_modifier: Option<HeaderModifier>,
    response_header_modifier: Option<HeaderModifier>,
    request_redirect: Option<Redirect>,
    url_rewrite: Option<Rewrite>,
    #[serde(rename = "requestMirror")]
    _request_mirror: Option<NotYet>,
    #[serde(rename = "cors")]
    _cors: Option<NotYet>,
    extension_ref: Option<ExtensionRef>,
    #[serde(rename = "externalAuth")]
    _external_auth: Option<NotYet>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
enum FilterType {
    RequestHeaderModifier,
    ResponseHeaderModifier,
    RequestRedirect,
    #[serde(rename = "URLRewrite")]
    UrlRewrite,
    RequestMirror,
    #[serde(rename = "CORS")]
    Cors,
    ExtensionRef,
    ExternalAuth,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ExtensionRef {
    group: String,
    kind: String,
    name: Subdomain,
}

/// What stands under `filters`.
#[derive(Debug, Default)]
pub(crate) struct Filters {
    pub(crate) filters: Vec<mesh::RouteFilter>,
    /// Names of WasmFilters
    pub(crate) extensions: Vec<String>,
}

#[derive(Debug, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct HeaderModifier {
    set: Vec<Header>,
    add: Vec<Header>,
    remove: Vec<HeaderName>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    name: HeaderName,
    value: HeaderText,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Redirect {
    scheme: Option<Scheme>,
    hostname: Option<Subdomain>,
    path: Option<Path>,
    port: Option<Port>,
    status_code: Option<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Scheme {
    Http,
    Https,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rewrite {
    hostname: Option<Subdomain>,
    path: Option<Path>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Path {
    r#type: PathType,
    replace_full_path: Option<String>,
    replace_prefix_match: Option<String>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
enum PathType {
    ReplaceFullPath,
    ReplacePrefixMatch,
}

/// Where a filter stands.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    pub(crate) grpc: bool,
    /// On a backend rather than on the rule
    pub(crate) backend: bool,
    /// The rule has exactly one match and it is a PathPrefix
    pub(crate) one_prefix: bool,
}

/// The parents that are Services. Others (Gateways) are not the mesh's business.
pub(crate) fn parents(refs: Vec<ParentRef>, namespace: &str) -> Result<Vec<Parent>, Bad> {
    let mut parents = Vec::new();
    for (index, parent) in refs.into_iter().enumerate() {
        if parent.kind.as_deref() != Some("Service") {
            continue;
        }
        match parent.group.as_deref() {
            Some("" | "core") => {}
            // Left out it means the Gateway API's own group: easily forgotten, and then nothing would be routed.
            None | Some(super::kinds::GATEWAY) => {
                let reason = "a Service is of the core group; write `group: \"\"`";
                return Err(Bad::new(format!("spec.parentRefs[{index}].group"), reason));
            }
            Some(_) => continue,
        }
        parents.push(Parent {
            namespace: parent.namespace.map_or_else(|| namespace.to_owned(), |namespace| namespace.0),
            name: parent.name.0,
            port: parent.port.map(|port| port.0),
            section: parent.section_name.filter(|section| !section.is_empty()),
        });
    }
    Ok(parents)
}

/// Policies name rules, so a name must be one rule's only.
pub(crate) fn unique_names(rules: &[Rule]) -> Result<(), Bad> {
    for (index, rule) in rules.iter().enumerate() {
        let earlier = rules.iter().take(index).position(|other| rule.name.is_some() && other.name == rule.name);
        if let Some(earlier) = earlier {
            let reason = format!("rule {earlier} has this name already");
            return Err(Bad::new(format!("spec.rules[{index}].name"), reason));
        }
    }
    Ok(())
}

pub(crate) fn backends(refs: Vec<SpecBackendRef>, namespace: &str, place: Place) -> Result<Vec<BackendRef>, Bad> {
    let mut backends = Vec::with_capacity(refs.len());
    for (index, reference) in refs.into_iter().enumerate() {
        let at = format!("backendRefs[{index}]");
        let weight = reference.weight.unwrap_or(1);
        if weight > 1_000_000 {
            return Err(Bad::new(format!("{at}.weight"), format!("{weight} is more than 1000000")));
        }
        let kind = reference.kind.as_deref().unwrap_or("Service");
        let service = matches!(reference.group.as_str(), "" | "core") && kind == "Service";
        let invalid = (!service).then(|| format!("a backend of kind {kind} is not supported"));
        let port = match reference.port {
            Some(port) => port.0,
            None if invalid.is_some() => 0,
            None => return Err(Bad::new(format!("{at}.port"), "missing; a Service as backend needs its port")),
        };
        let place = Place { backend: true, ..place };
        let Filters { filters, .. } = filters(reference.filters, place).map_err(|bad| bad.within(&at))?;
        let namespace = reference.namespace.map_or_else(|| namespace.to_owned(), |namespace| namespace.0);
        backends.push(BackendRef { namespace, name: reference.name.0, port, weight, filters, invalid });
    }
    Ok(backends)
}

/// Reads the filters of a rule or a backend.
pub(crate) fn filters(specs: Vec<SpecFilter>, place: Place) -> Result<Filters, Bad> {
    let mut seen: Vec<FilterType> = Vec::new();
    let mut filters = Filters::default();
    for (index, spec) in specs.into_iter().enumerate() {
        let at = format!("filters[{index}]");
        let kind = spec.r#type;
        if kind == FilterType::ExtensionRef {
            filters.extensions.push(extension(spec, place).map_err(|bad| bad.within(&at))?);
            continue;
        }
        if seen.contains(&kind) {
            return Err(Bad::new(format!("{at}.type"), format!("{kind:?} is there twice; merge the two")));
        }
        let redirects = [FilterType::RequestRedirect, FilterType::UrlRewrite];
        if redirects.contains(&kind) && redirects.iter().any(|other| seen.contains(other)) {
            return Err(Bad::new(format!("{at}.type"), "a redirect and a rewrite exclude each other"));
        }
        seen.push(kind);
        let filter = filter(spec, place).map_err(|bad| bad.within(&at))?;
        filters.filters.push(mesh::RouteFilter { filter: Some(filter) });
    }
    Ok(filters)
}

/// The WasmFilter that a rule names.
fn extension(spec: SpecFilter, place: Place) -> Result<String, Bad> {
    foreign_field(&spec)?;
    if place.backend {
        return Err(Bad::new("type", "ExtensionRef on a backendRef is not supported yet; put it on the rule"));
    }
    let reference = spec.extension_ref.ok_or_else(|| Bad::new("extensionRef", "missing; it is required"))?;
    if reference.group != super::kinds::OUTRIGGER {
        let reason = format!("`{}` is not a group of filters; write {}", reference.group, super::kinds::OUTRIGGER);
        return Err(Bad::new("extensionRef.group", reason));
    }
    match reference.kind.as_str() {
        "WasmFilter" => Ok(reference.name.0),
        "HttpFilter" => Err(Bad::new("extensionRef.kind", "HttpFilter is not supported yet; WasmFilter is")),
        kind => Err(Bad::new("extensionRef.kind", format!("`{kind}` is not a kind of filter; write WasmFilter"))),
    }
}

/// A field of another type than the filter's.
fn foreign_field(spec: &SpecFilter) -> Result<(), Bad> {
    let given = [
        ("requestHeaderModifier", spec.request_header_modifier.is_some(), FilterType::RequestHeaderModifier),
        ("responseHeaderModifier", spec.response_header_modifier.is_some(), FilterType::ResponseHeaderModifier),
        ("requestRedirect", spec.request_redirect.is_some(), FilterType::RequestRedirect),
        ("urlRewrite", spec.url_rewrite.is_some(), FilterType::UrlRewrite),
        ("extensionRef", spec.extension_ref.is_some(), FilterType::ExtensionRef),
    ];
    match given.iter().find(|(_, given, kind)| *given && *kind != spec.r#type) {
        Some((field, ..)) => Err(Bad::new(*field, "belongs to another `type` than this filter's")),
        None => Ok(()),
    }
}

fn filter(spec: SpecFilter, place: Place) -> Result<route_filter::Filter, Bad> {
    foreign_field(&spec)?;
    let missing = |field: &str| Bad::new(field, "missing; it is required");
    let only_http = |name: &str| match (place.grpc, place.backend) {
        (true, _) => Err(Bad::new("type", format!("{name} is for HTTPRoute only"))),
        (_, true) => Err(Bad::new("type", format!("{name} on a backendRef is not supported yet; put it on the rule"))),
        _ => Ok(()),
    };
    Ok(match spec.r#type {
        FilterType::RequestHeaderModifier => {
            let field = "requestHeaderModifier";
            route_filter::Filter::RequestHeaders(modifier(
                spec.request_header_modifier.ok_or_else(|| missing(field))?,
                field,
            )?)
        }
        FilterType::ResponseHeaderModifier => {
            let field = "responseHeaderModifier";
            route_filter::Filter::ResponseHeaders(modifier(
                spec.response_header_modifier.ok_or_else(|| missing(field))?,
                field,
            )?)
        }
        FilterType::RequestRedirect => {
            only_http("RequestRedirect")?;
            let redirect = spec.request_redirect.ok_or_else(|| missing("requestRedirect"))?;
            route_filter::Filter::Redirect(
                self::redirect(redirect, place).map_err(|bad| bad.within("requestRedirect"))?,
            )
        }
        FilterType::UrlRewrite => {
            only_http("URLRewrite")?;
            let rewrite = spec.url_rewrite.ok_or_else(|| missing("urlRewrite"))?;
            if rewrite.hostname.is_none() && rewrite.path.is_none() {
                return Err(Bad::new("urlRewrite", "rewrites nothing; write hostname or path"));
            }
            route_filter::Filter::Rewrite(mesh::Rewrite {
                hostname: rewrite.hostname.map(|hostname| hostname.0).unwrap_or_default(),
                path: rewrite
                    .path
                    .map(|path| modifier_of_path(path, place))
                    .transpose()
                    .map_err(|bad| bad.within("urlRewrite.path"))?,
            })
        }
        FilterType::RequestMirror | FilterType::Cors | FilterType::ExtensionRef | FilterType::ExternalAuth => {
            return Err(Bad::new("type", format!("{:?} is not supported yet; remove the filter", spec.r#type)));
        }
    })
}

fn redirect(redirect: Redirect, place: Place) -> Result<mesh::Redirect, Bad> {
    let status = redirect.status_code.unwrap_or(302);
    if !matches!(status, 301 | 302 | 303 | 307 | 308) {
        return Err(Bad::new("statusCode", format!("{status} is not one of 301, 302, 303, 307, 308")));
    }
    let scheme = match redirect.scheme {
        Some(Scheme::Http) => "http",
        Some(Scheme::Https) => "https",
        None => "",
    };
    Ok(mesh::Redirect {
        scheme: scheme.to_owned(),
        hostname: redirect.hostname.map(|hostname| hostname.0).unwrap_or_default(),
        path: redirect.path.map(|path| modifier_of_path(path, place)).transpose().map_err(|bad| bad.within("path"))?,
        port: redirect.port.map_or(0, |port| u32::from(port.0)),
        status,
    })
}

fn modifier_of_path(path: Path, place: Place) -> Result<mesh::PathModifier, Bad> {
    use mesh::path_modifier::Path as Wire;
    let missing = |field: &str| Bad::new(field, "missing; it is required");
    let path = match (path.r#type, path.replace_full_path, path.replace_prefix_match) {
        (PathType::ReplaceFullPath, Some(full), None) => Wire::Full(check_path(full, "replaceFullPath")?),
        (PathType::ReplacePrefixMatch, None, Some(prefix)) => {
            if !place.one_prefix {
                let reason = "ReplacePrefixMatch needs a rule with exactly one match, of path type PathPrefix";
                return Err(Bad::new("type", reason));
            }
            Wire::Prefix(check_path(prefix, "replacePrefixMatch")?)
        }
        (PathType::ReplaceFullPath, None, _) => return Err(missing("replaceFullPath")),
        (PathType::ReplacePrefixMatch, _, None) => return Err(missing("replacePrefixMatch")),
        (_, Some(_), Some(_)) => return Err(Bad::new("", "replaceFullPath and replacePrefixMatch exclude each other")),
    };
    Ok(mesh::PathModifier { path: Some(path) })
}

fn check_path(path: String, field: &str) -> Result<String, Bad> {
    let allowed = path.is_empty() || path.parse::<http::uri::PathAndQuery>().is_ok_and(|uri| uri.query().is_none());
    if allowed && !path.contains('#') { Ok(path) } else { Err(Bad::new(field, format!("`{path}` is not a path"))) }
}

fn modifier(modifier: HeaderModifier, field: &str) -> Result<mesh::HeaderModifier, Bad> {
    let names = modifier.set.iter().chain(&modifier.add).map(|header| &header.name).chain(&modifier.remove);
    let mut names: Vec<&HeaderName> = names.collect();
    names.sort_unstable();
    if let Some([twice, _]) = names.array_windows().find(|[a, b]| a == b) {
        return Err(Bad::new(field, format!("header `{}` is named twice; one action per header", twice.0)));
    }
    let header = |header: Header| mesh::Header { name: header.name.0, value: header.value.0 };
    Ok(mesh::HeaderModifier {
        set: modifier.set.into_iter().map(header).collect(),
        add: modifier.add.into_iter().map(header).collect(),
        remove: modifier.remove.into_iter().map(|name| name.0).collect(),
    })
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub(crate) enum ValueType {
    #[default]
    Exact,
    RegularExpression,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct HeaderMatch {
    #[serde(default)]
    r#type: ValueType,
    name: HeaderName,
    value: String,
}

/// Header matches; of a name given twice only the first counts, as the Gateway API has it.
pub(crate) fn headers(specs: Vec<HeaderMatch>) -> Result<Vec<mesh::ValueMatch>, Bad> {
    let values = specs.into_iter().map(|spec| (spec.name.0, spec.r#type, spec.value));
    value_matches(values, "headers")
}

pub(crate) fn value_matches(
    values: impl Iterator<Item = (String, ValueType, String)>,
    field: &str,
) -> Result<Vec<mesh::ValueMatch>, Bad> {
    let mut matches: Vec<mesh::ValueMatch> = Vec::new();
    for (index, (name, kind, value)) in values.enumerate() {
        if kind == ValueType::RegularExpression {
            super::value::check_regex(&value).map_err(|reason| Bad::new(format!("{field}[{index}].value"), reason))?;
        }
        if matches.iter().any(|other| other.name == name) {
            continue;
        }
        let value = match kind {
            ValueType::Exact => mesh::value_match::Value::Exact(value),
            ValueType::RegularExpression => mesh::value_match::Value::Regex(value),
        };
        matches.push(mesh::ValueMatch { name, value: Some(value) });
    }
    Ok(matches)
}
