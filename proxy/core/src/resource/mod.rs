//! YAML text into validated resources, each with its file and line. One bad document is one [`Rejection`]; the others
//! of its file are accepted all the same. Unknown fields are errors, and what this version cannot do is refused.
//!
//! The model keeps leaves (matches, header modifiers, authorization rules) in the wire's types, since they have
//! nothing left to decide; everything that merging and resolving needs is in types of its own.

mod authorization_policy;
mod decode;
mod document;
mod grpc_route;
mod http_route;
mod kinds;
mod kubernetes;
mod located;
mod mesh_config;
mod meta;
mod mtls_policy;
mod registration;
mod rejection;
mod route;
mod traffic_policy;
pub(crate) mod value;
mod wasm_filter;
pub(crate) mod workload;

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use decode::Bad;
use document::{Document, Lines};
use kinds::{Class, Kind};
use meta::{Meta, Scope};

pub use authorization_policy::{Action, AuthorizationPolicy};
pub(crate) use kubernetes::SERVICE_NAME;
pub use kubernetes::{EndpointSlice, Service, ServicePort, SliceEndpoint, TargetPort};
pub use located::{Located, explained};
pub use mesh_config::MeshConfig;
pub use meta::Target;
pub use mtls_policy::MtlsPolicy;
pub use registration::{AppPort, BadRegistration, Dial, PortProtocol, Registration};
pub use rejection::{Closed, Closes, Rejection};
pub use route::{BackendRef, Match, Parent, Route, Rule};
pub use traffic_policy::{RetryOn, Settings, TrafficPolicy};
pub use wasm_filter::{ModuleSource, WasmFilter};
pub use workload::Workload;

/// Everything that one file holds.
#[derive(Debug, Default)]
pub struct Parsed {
    /// Accepted, in the order of the file
    pub resources: Vec<Loaded>,
    /// Not accepted, each with the reason
    pub rejections: Vec<Rejection>,
    /// Of no use to the mesh: one line each in the log
    pub skipped: Vec<Skipped>,
}

/// A document that is not for the mesh.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Skipped {
    /// As given to [`parse`]
    pub file: String,
    /// First line of the document
    pub line: u32,
    /// Kind as written
    pub kind: String,
    /// Namespace, or empty
    pub namespace: String,
    /// Name, or empty
    pub name: String,
    /// Why
    pub reason: String,
}

/// One accepted resource and where it came from.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// As given to [`parse`]
    pub file: String,
    /// First line of the document, counted from 1
    pub line: u32,
    /// The document's text: `parse_at(file, line, document)` gives this resource again. To be kept as the last good version
    pub document: String,
    /// Kind, namespace, name
    pub id: ResourceId,
    /// `metadata.creationTimestamp` in seconds since the Unix epoch, where the document has one
    pub created: Option<i64>,
    /// What it says
    pub resource: Resource,
    /// For what is found out when it meets the others
    pub(crate) lines: Lines,
}

/// What makes a resource the same one over its versions.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ResourceId {
    /// Kind, as `HTTPRoute`
    pub kind: String,
    /// Namespace; empty for cluster-wide kinds
    pub namespace: String,
    /// Name
    pub name: String,
}

/// A validated resource.
#[derive(Debug, Clone)]
pub enum Resource {
    /// Accepted and not needed (Namespace, ServiceAccount, ReferenceGrant)
    Unused,
    /// `Service`
    Service(Service),
    /// `EndpointSlice`
    EndpointSlice(EndpointSlice),
    /// `HTTPRoute` or `GRPCRoute`
    Route(Route),
    /// `MeshConfig`
    MeshConfig(Box<MeshConfig>),
    /// `Workload`
    Workload(Workload),
    /// `TrafficPolicy`
    TrafficPolicy(Box<TrafficPolicy>),
    /// `AuthorizationPolicy`
    AuthorizationPolicy(AuthorizationPolicy),
    /// `MtlsPolicy`
    MtlsPolicy(MtlsPolicy),
    /// `WasmFilter`
    WasmFilter(Box<WasmFilter>),
}

/// Reads every document of `text`. `file` is only a name: it appears in what is reported, and relative paths in the
/// documents are joined to its directory.
pub fn parse(file: &str, text: &str) -> Parsed {
    parse_at(file, 1, text)
}

/// As [`parse`], for text that begins at `line` of its file.
pub fn parse_at(file: &str, line: u32, text: &str) -> Parsed {
    let mut parsed = Parsed::default();
    for document in document::split(text, line) {
        match one(file, &document) {
            Ok(Some(Outcome::Loaded(loaded))) => parsed.resources.push(*loaded),
            Ok(Some(Outcome::Skipped(skipped))) => parsed.skipped.push(skipped),
            Ok(None) => {}
            Err(rejection) => parsed.rejections.push(*rejection),
        }
    }
    parsed
}

enum Outcome {
    Loaded(Box<Loaded>),
    Skipped(Skipped),
}

/// What is known of a document while it is read, for what is reported about it.
struct Context<'a> {
    file: &'a str,
    lines: Lines,
    value: Value,
    kind: String,
    closed: Option<Closed>,
}

impl Context<'_> {
    fn text(&self, pointer: &str) -> String {
        self.value.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
    }

    fn namespace(&self) -> String {
        match self.text("/metadata/namespace") {
            namespace if namespace.is_empty() => meta::DEFAULT_NAMESPACE.to_owned(),
            namespace => namespace,
        }
    }

    fn reject(&self, bad: Bad) -> Box<Rejection> {
        let closes = self.closed.map(|what| Closes { what, namespace: self.namespace(), selector: self.selector() });
        let cluster = matches!(self.kind.as_str(), "Namespace" | "MeshConfig");
        Box::new(Rejection {
            file: self.file.to_owned(),
            line: self.lines.of(&bad.field),
            kind: self.kind.clone(),
            namespace: if cluster { String::new() } else { self.namespace() },
            name: self.text("/metadata/name"),
            field: bad.field,
            reason: bad.reason,
            closes,
        })
    }

    /// The labels that the policy selects by, if they can be read whatever else is wrong with it.
    fn selector(&self) -> Option<BTreeMap<String, String>> {
        let selector = self.value.pointer("/spec/selector")?.as_object().filter(|selector| selector.len() == 1)?;
        let labels = selector.get("matchLabels")?.as_object()?;
        labels.iter().map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect()
    }
}

fn one(file: &str, document: &Document<'_>) -> Result<Option<Outcome>, Box<Rejection>> {
    let (value, lines) = match document::read(document) {
        Ok(Some(read)) => read,
        Ok(None) => return Ok(None),
        Err(error) => return Err(Box::new(unreadable(file, document, &error))),
    };
    let mut context = Context { file, lines, value, kind: String::new(), closed: None };
    context.kind = context.text("/kind");
    if !context.value.is_object() {
        return Err(context.reject(Bad::new("", "a resource is a mapping with apiVersion, kind and metadata")));
    }
    let api_version = context.text("/apiVersion");
    for (field, text) in [("apiVersion", &api_version), ("kind", &context.kind)] {
        if text.is_empty() {
            return Err(context.reject(Bad::new(field, "missing; it is required")));
        }
    }
    let kind = match kinds::classify(&api_version, &context.kind) {
        Class::Ours(kind) => kind,
        Class::Skip(reason) => return Ok(Some(Outcome::Skipped(skipped(&context, document.line, reason)))),
        Class::Wrong { field, reason, meant } => {
            context.closed = meant.and_then(closed_by);
            return Err(context.reject(Bad::new(field, reason)));
        }
    };
    context.closed = closed_by(kind);
    let scope = match kind {
        Kind::Namespace | Kind::MeshConfig => Scope::Cluster,
        _ => Scope::Namespaced,
    };
    let label = matches!(kind, Kind::Namespace | Kind::Service | Kind::Workload | Kind::ServiceAccount);
    let meta = meta::read(&context.value, scope, label).map_err(|bad| context.reject(bad))?;
    let resource = read(kind, &context.value, &meta, file).map_err(|bad| context.reject(bad))?;
    let Some(resource) = resource else {
        let reason = "no parentRef is a Service; routes of gateways are not the mesh's".to_owned();
        return Ok(Some(Outcome::Skipped(skipped(&context, document.line, reason))));
    };
    Ok(Some(Outcome::Loaded(Box::new(Loaded {
        file: file.to_owned(),
        line: document.line,
        document: document.text.to_owned(),
        id: ResourceId { kind: context.kind, namespace: meta.namespace, name: meta.name },
        created: meta.created,
        resource,
        lines: context.lines,
    }))))
}

fn closed_by(kind: Kind) -> Option<Closed> {
    match kind {
        Kind::AuthorizationPolicy => Some(Closed::Authorization),
        Kind::MtlsPolicy => Some(Closed::Mtls),
        _ => None,
    }
}

fn skipped(context: &Context<'_>, line: u32, reason: String) -> Skipped {
    Skipped {
        file: context.file.to_owned(),
        line,
        kind: context.kind.clone(),
        namespace: context.text("/metadata/namespace"),
        name: context.text("/metadata/name"),
        reason,
    }
}

/// Reads the resource of a known kind; `None`: a route that is not the mesh's.
fn read(kind: Kind, document: &Value, meta: &Meta, file: &str) -> Result<Option<Resource>, Bad> {
    match kind {
        Kind::Namespace => {
            decode::decode::<k8s_openapi::api::core::v1::Namespace>(document, "", &["spec", "status"])?;
            return Ok(Some(Resource::Unused));
        }
        Kind::ServiceAccount => {
            decode::decode::<k8s_openapi::api::core::v1::ServiceAccount>(
                document,
                "",
                &["secrets", "imagePullSecrets"],
            )?;
            return Ok(Some(Resource::Unused));
        }
        Kind::ReferenceGrant => return Ok(Some(Resource::Unused)),
        Kind::Service => return kubernetes::service(document).map(|service| Some(Resource::Service(service))),
        Kind::EndpointSlice => {
            return kubernetes::endpoint_slice(document, meta).map(|slice| Some(Resource::EndpointSlice(slice)));
        }
        _ => {}
    }
    let top = ["apiVersion", "kind", "metadata", "spec", "status"];
    let fields = document.as_object().into_iter().flat_map(|fields| fields.keys());
    if let Some(field) = fields.into_iter().find(|field| !top.contains(&field.as_str())) {
        let reason = match decode::suggest(field, top.into_iter()) {
            Some(meant) => format!("unknown field; did you mean `{meant}`?"),
            None => format!("unknown field; known here: {}", top.join(", ")),
        };
        return Err(Bad::new(field, reason));
    }
    let spec = document.get("spec").ok_or_else(|| Bad::new("spec", "missing; it is required"))?;
    let namespace = meta.namespace.as_str();
    Ok(Some(match kind {
        Kind::HttpRoute => return Ok(http_route::read(spec, namespace)?.map(Resource::Route)),
        Kind::GrpcRoute => return Ok(grpc_route::read(spec, namespace)?.map(Resource::Route)),
        Kind::MeshConfig => Resource::MeshConfig(Box::new(mesh_config::read(spec)?)),
        Kind::Workload => Resource::Workload(workload::read(spec, meta)?),
        Kind::TrafficPolicy => Resource::TrafficPolicy(Box::new(traffic_policy::read(spec, namespace)?)),
        Kind::AuthorizationPolicy => Resource::AuthorizationPolicy(authorization_policy::read(spec, meta)?),
        Kind::MtlsPolicy => Resource::MtlsPolicy(mtls_policy::read(spec)?),
        Kind::WasmFilter => Resource::WasmFilter(Box::new(wasm_filter::read(spec, namespace, file)?)),
        Kind::Namespace | Kind::ServiceAccount | Kind::ReferenceGrant | Kind::Service | Kind::EndpointSlice => {
            Resource::Unused
        }
    }))
}

/// A document that is no YAML. What it would have been is looked for in its text, since a policy that cannot be read
/// must still close what it governed, and its last good version be found.
fn unreadable(file: &str, document: &Document<'_>, error: &document::SyntaxError) -> Rejection {
    let find = |field: &str| {
        document.text.lines().find_map(|line| {
            let (before, after) = line.split_once(field)?;
            let begins = before.is_empty() || before.ends_with([' ', '{', ',', '\t']);
            let value = after.strip_prefix(':')?.trim_start().trim_matches(['"', '\'']);
            let value = value.split([',', '}', ' ', '#', '"', '\'']).next().unwrap_or_default();
            (begins && !value.is_empty()).then(|| value.to_owned())
        })
    };
    let kind = find("kind").unwrap_or_default();
    let namespace = find("namespace").unwrap_or_else(|| meta::DEFAULT_NAMESPACE.to_owned());
    let ours = match kinds::classify(&find("apiVersion").unwrap_or_default(), &kind) {
        Class::Ours(kind) => Some(kind),
        Class::Wrong { meant, .. } => meant,
        Class::Skip(_) => None,
    };
    let closes = ours.and_then(closed_by).map(|what| Closes { what, namespace: namespace.clone(), selector: None });
    Rejection {
        file: file.to_owned(),
        line: error.line,
        namespace: if kind.is_empty() { String::new() } else { namespace },
        name: find("name").unwrap_or_default(),
        kind,
        field: String::new(),
        reason: format!("not valid YAML: {}", error.reason),
        closes,
    }
}

impl fmt::Display for ResourceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.namespace.as_str() {
            "" => write!(f, "{} {}", self.kind, self.name),
            namespace => write!(f, "{} {namespace}/{}", self.kind, self.name),
        }
    }
}

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, line, kind, namespace, name, reason } = self;
        let id = ResourceId { kind: kind.clone(), namespace: namespace.clone(), name: name.clone() };
        write!(f, "{file}:{line}: {id}: skipped: {reason}")
    }
}
