//! `WasmFilter`: a module and where it runs.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::decode::{Bad, decode};
use super::meta::{LabelSelector, Target, TargetRef, targets};
use super::value::{Millis, Percent, Size};
use crate::key::{Named, ServiceKey, canonicalise};

/// A WasmFilter. Durations in milliseconds, sizes in bytes; defaults applied.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)] // The names are those of the YAML.
pub struct WasmFilter {
    /// Where it runs; of none of them what an ExtensionRef names
    pub targets: Vec<Target>,
    /// Labels of the workloads that it runs at; then there are no targets
    pub selector: Option<BTreeMap<String, String>>,
    pub outbound: bool,
    /// For opaque connections rather than HTTP
    pub tcp: bool,
    pub order: i32,
    /// Where its module comes from
    pub module: ModuleSource,
    /// Hex digest that the module must have
    pub sha256: Option<String>,
    pub root_id: String,
    pub configuration: String,
    pub fail_open: bool,
    pub vm_id: String,
    pub vm_configuration: String,
    pub environment: BTreeMap<String, String>,
    pub memory: u64,
    pub call_time: u64,
    pub body: u64,
    /// Millionths of each worker's time; 0: no limit
    pub cpu_share: u32,
    /// Call-outs outstanding in one instance
    pub callouts: u32,
    /// Services that call-outs reach, with the port if one is named, by the names they use
    pub upstreams: BTreeMap<String, (ServiceKey, Option<u16>)>,
    pub backoff: u64,
    pub max_backoff: u64,
}

/// Where a module comes from.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ModuleSource {
    /// Path, joined to the directory of the YAML file where it is relative
    File(String),
    /// `http://` or `https://`
    Url(String),
    /// `<registry>/<repository>[:<tag>][@sha256:<digest>]`
    Oci(String),
    /// Given to the control plane by digest (`outrigger filter push`)
    Pushed,
}

impl ModuleSource {
    /// The field of a WasmFilter that names it.
    pub fn field(&self) -> &'static str {
        match self {
            Self::File(_) => "spec.module.file",
            Self::Url(_) => "spec.module.url",
            Self::Oci(_) => "spec.module.oci",
            Self::Pushed => "spec.module.sha256",
        }
    }

    /// It is on another host.
    pub fn is_remote(&self) -> bool {
        matches!(self, Self::Url(_) | Self::Oci(_))
    }
}

impl std::fmt::Display for ModuleSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(place) | Self::Url(place) | Self::Oci(place) => f.write_str(place),
            Self::Pushed => f.write_str("the module"),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Spec {
    target_refs: Option<Vec<TargetRef>>,
    selector: Option<LabelSelector>,
    direction: Option<Direction>,
    #[serde(default)]
    protocol: Protocol,
    #[serde(default)]
    order: i32,
    module: Module,
    #[serde(default)]
    root_id: String,
    #[serde(default)]
    configuration: Value,
    #[serde(default)]
    failure_policy: FailurePolicy,
    #[serde(default)]
    upstreams: BTreeMap<String, String>,
    #[serde(default)]
    vm: Vm,
    #[serde(default)]
    limits: Limits,
    #[serde(default)]
    restart: Restart,
}

#[derive(Debug, Clone, Copy, Deserialize, PartialEq)]
enum Direction {
    Inbound,
    Outbound,
}

/// What it filters. A module has callbacks of both as a rule, and breaks in those that it is not written for.
#[derive(Debug, Clone, Copy, Deserialize, Default, PartialEq)]
enum Protocol {
    #[default]
    Http,
    Tcp,
}

#[derive(Debug, Deserialize, Default, PartialEq)]
enum FailurePolicy {
    FailOpen,
    #[default]
    FailClosed,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Module {
    file: Option<String>,
    url: Option<String>,
    oci: Option<String>,
    sha256: Option<String>,
}

#[derive(Debug, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct Vm {
    id: String,
    configuration: Value,
    environment: BTreeMap<String, String>,
}

#[derive(Debug, Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Limits {
    memory: Option<Size>,
    call_time: Option<Millis>,
    body: Option<Size>,
    cpu_share: Option<Percent>,
    callouts: Option<u32>,
}

#[derive(Debug, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct Restart {
    backoff: Option<Millis>,
    max: Option<Millis>,
}

/// Smallest `cpuShare`, in millionths: less could not be told from none.
const LEAST_SHARE: u32 = 10_000;
const MOST_CALLOUTS: u32 = 10_000;

pub(crate) fn read(spec: &Value, namespace: &str, yaml: &str) -> Result<WasmFilter, Bad> {
    let spec: Spec = decode(spec, "spec", &[])?;
    let targets = spec.target_refs.map(|refs| targets(refs, "spec.targetRefs", namespace)).transpose()?;
    let selector = spec.selector.map(|selector| selector.match_labels);
    if targets.is_some() && selector.is_some() {
        return Err(Bad::new("spec.selector", "excludes targetRefs; remove one of them"));
    }
    let targets = targets.unwrap_or_default();
    let direction = direction(spec.direction, &targets, selector.is_some())?;
    let tcp = spec.protocol == Protocol::Tcp;
    if tcp
        && (targets.is_empty() && selector.is_none()
            || targets.iter().any(|target| matches!(target, Target::Route { .. })))
    {
        return Err(Bad::new(
            "spec.protocol",
            "routes are for HTTP; a Tcp filter has a Service, a Namespace or a selector",
        ));
    }
    let (module, sha256) = source(spec.module, yaml)?;
    let memory = spec.limits.memory.map_or(16 << 20, |size| size.0);
    if memory < 1 << 16 {
        return Err(Bad::new("spec.limits.memory", "less than one page of WebAssembly (64Ki)"));
    }
    let call_time = spec.limits.call_time.map_or(5, |time| time.0);
    if call_time == 0 {
        return Err(Bad::new("spec.limits.callTime", "a call needs a limit; write a duration above 0s"));
    }
    let cpu_share = spec.limits.cpu_share.map_or(0, |share| share.0);
    if spec.limits.cpu_share.is_some() && cpu_share < LEAST_SHARE {
        return Err(Bad::new("spec.limits.cpuShare", "less than 1%; leave it out for no limit"));
    }
    let callouts = spec.limits.callouts.unwrap_or(16);
    if !(1..=MOST_CALLOUTS).contains(&callouts) {
        let message =
            format!("`{callouts}` is not a number from 1 to {MOST_CALLOUTS}; without `upstreams` there are none");
        return Err(Bad::new("spec.limits.callouts", message));
    }
    let backoff = spec.restart.backoff.map_or(1_000, |time| time.0);
    let max_backoff = spec.restart.max.map_or(60_000.max(backoff), |time| time.0);
    if backoff > max_backoff {
        return Err(Bad::new("spec.restart.backoff", "longer than restart.max"));
    }
    Ok(WasmFilter {
        targets,
        selector,
        outbound: direction == Direction::Outbound,
        tcp,
        order: spec.order,
        module,
        sha256,
        root_id: spec.root_id,
        configuration: text(&spec.configuration),
        fail_open: spec.failure_policy == FailurePolicy::FailOpen,
        vm_id: spec.vm.id,
        vm_configuration: text(&spec.vm.configuration),
        environment: spec.vm.environment,
        memory,
        call_time,
        body: spec.limits.body.map_or(64 << 10, |size| size.0),
        cpu_share,
        callouts,
        upstreams: upstreams(&spec.upstreams, namespace)?,
        backoff,
        max_backoff,
    })
}

/// At the caller or at the called workload: where what it is attached to is.
fn direction(given: Option<Direction>, targets: &[Target], selected: bool) -> Result<Direction, Bad> {
    let route = targets.iter().position(|target| matches!(target, Target::Route { .. }));
    let elsewhere = targets.iter().any(|target| !matches!(target, Target::Route { .. }));
    match (given, route) {
        (Some(Direction::Outbound), _) if selected => {
            let reason = "a selector is for the filters of what comes to a workload; leave it out, or name a Service or route in targetRefs";
            Err(Bad::new("spec.direction", reason))
        }
        (Some(Direction::Inbound), Some(index)) => Err(Bad::new(
            format!("spec.targetRefs[{index}].kind"),
            "a route's filters run at the caller; write `direction: Outbound`, or name the Service",
        )),
        (None, Some(index)) if elsewhere => Err(Bad::new(
            format!("spec.targetRefs[{index}].kind"),
            "a route's filters run at the caller, those of the other targets at the workload unless told otherwise; write `direction: Outbound`, or a WasmFilter for each",
        )),
        (Some(Direction::Inbound), None) if targets.is_empty() && !selected => Err(Bad::new(
            "spec.targetRefs",
            "missing; without it (or a selector) only routes name this filter, and theirs are Outbound",
        )),
        (Some(given), _) => Ok(given),
        (None, Some(_)) => Ok(Direction::Outbound),
        // Named by routes alone.
        (None, None) if targets.is_empty() && !selected => Ok(Direction::Outbound),
        (None, None) => Ok(Direction::Inbound),
    }
}

/// Exactly one source, and the digest of the module. What is fetched over a network is pinned, so that nobody but the author of
/// the resource decides what runs.
fn source(module: Module, yaml: &str) -> Result<(ModuleSource, Option<String>), Bad> {
    let sha256 = module.sha256.map(|digest| digest.to_ascii_lowercase());
    if let Some(digest) = sha256.as_ref().filter(|digest| !is_digest(digest)) {
        return Err(Bad::new("spec.module.sha256", format!("`{digest}` is not 64 hexadecimal digits")));
    }
    let source = match (module.file, module.url, module.oci) {
        (Some(file), None, None) if !file.is_empty() => ModuleSource::File(relative_to(yaml, &file)),
        (None, Some(url), None) => ModuleSource::Url(http_url(url)?),
        (None, None, Some(oci)) => ModuleSource::Oci(reference(oci)?),
        (None, None, None) if sha256.is_some() => ModuleSource::Pushed,
        (None | Some(_), None, None) => {
            let message = "names no module; write one of file, url, oci, or the sha256 of a pushed one";
            return Err(Bad::new("spec.module", message));
        }
        _ => return Err(Bad::new("spec.module", "has more than one of file, url and oci; keep one")),
    };
    let pinned = matches!(&source, ModuleSource::Oci(reference) if reference.contains("@sha256:"));
    if source.is_remote() && sha256.is_none() && !pinned {
        let message = match source {
            ModuleSource::Oci(_) => "missing; it is required where `oci` has no @sha256:<digest>",
            _ => "missing; it is required with `url`",
        };
        return Err(Bad::new("spec.module.sha256", message));
    }
    Ok((source, sha256))
}

fn is_digest(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn http_url(url: String) -> Result<String, Bad> {
    let parsed = url.parse::<http::Uri>().ok();
    let scheme = parsed.as_ref().and_then(http::Uri::scheme_str);
    let plain = parsed.as_ref().is_some_and(|uri| uri.authority().is_some_and(|host| !host.as_str().contains('@')));
    if matches!(scheme, Some("http" | "https")) && plain {
        return Ok(url);
    }
    Err(Bad::new("spec.module.url", format!("`{url}` is not an http:// or https:// URL without credentials")))
}

/// The shape only: a registry, a repository, and what selects one of its images.
fn reference(oci: String) -> Result<String, Bad> {
    let (name, digest) = oci.split_once("@sha256:").map_or((oci.as_str(), None), |(name, digest)| (name, Some(digest)));
    let registry = name.split_once('/').is_some_and(|(registry, rest)| {
        let host = registry == "localhost" || registry.contains(['.', ':']);
        host && !rest.is_empty() && !name.contains("//") && !name.contains("://")
    });
    let plain = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"./-_:[]".contains(&byte));
    if registry && plain && digest.is_none_or(is_digest) {
        return Ok(oci);
    }
    let message =
        format!("`{oci}` is not <registry>/<repository>[:<tag>][@sha256:<digest>], the registry with a dot or a port");
    Err(Bad::new("spec.module.oci", message))
}

/// The services that call-outs may reach: no other host, so that a filter opens no way out of the mesh.
fn upstreams(
    named: &BTreeMap<String, String>,
    namespace: &str,
) -> Result<BTreeMap<String, (ServiceKey, Option<u16>)>, Bad> {
    let read = |(name, authority): (&String, &String)| match canonicalise(authority, namespace) {
        Some((Named::Service(service), port)) if !name.is_empty() => Ok((name.clone(), (service, port))),
        _ => Err(Bad::new(
            format!("spec.upstreams.{name}"),
            format!("`{authority}` is not a service of the mesh; write one like ext-authz.demo:80"),
        )),
    };
    named.iter().map(read).collect()
}

/// A string is given to the filter as it is, anything else as JSON, and nothing as nothing.
fn text(configuration: &Value) -> String {
    match configuration {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn relative_to(yaml: &str, file: &str) -> String {
    match yaml.rsplit_once('/') {
        Some((directory, _)) if !file.starts_with('/') => format!("{directory}/{}", file.trim_start_matches("./")),
        _ => file.to_owned(),
    }
}
