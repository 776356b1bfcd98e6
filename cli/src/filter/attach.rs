//! `outrigger filter push`, `attach`, `detach`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use serde_json::{Map, Value, json};

use super::status::{self, Filter};
use crate::Global;
use crate::client::Control;
use crate::output::{self, Format};
use crate::token::Admin;

const POLL: Duration = Duration::from_millis(200);

#[derive(Debug, clap::Args)]
pub(super) struct Push {
    /// The module
    #[arg(value_name = "FILE")]
    file: PathBuf,
    #[command(flatten)]
    admin: Admin,
}

/// What an attached filter is: the fields of a WasmFilter.
#[derive(Debug, clap::Args)]
pub(super) struct Attach {
    /// Its name
    name: String,
    /// Its namespace
    #[arg(short, long, default_value = "default")]
    namespace: String,
    /// A file to push, the digest of a pushed module, or oci://REGISTRY/REPOSITORY@sha256:DIGEST
    #[arg(long, value_name = "FILE|SHA256|oci://…")]
    module: String,
    /// What it stands before: service/NAME, namespace/NAME for everything in it, or httproute/NAME[/RULE] and grpcroute/NAME[/RULE];
    /// may be repeated
    #[arg(long = "to", value_name = "KIND/NAME", required = true, value_parser = target)]
    to: Vec<Target>,
    /// Inbound (at the service's own proxies, the default) or Outbound (at its callers', as a route's are)
    #[arg(long, value_parser = ["Inbound", "Outbound"])]
    direction: Option<String>,
    /// What it filters: Http or Tcp (opaque connections)
    #[arg(long, default_value = "Http", value_parser = ["Http", "Tcp"])]
    protocol: String,
    /// Lower runs first on the request, last on the response
    #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
    order: i32,
    /// Given to the filter: JSON, a text, or @FILE
    #[arg(long, value_name = "JSON|@FILE")]
    configuration: Option<String>,
    /// Which of the module's filters, where it has several
    #[arg(long, value_name = "ID")]
    root_id: Option<String>,
    /// What becomes of requests when it fails: FailClosed or FailOpen
    #[arg(long, default_value = "FailClosed", value_parser = ["FailClosed", "FailOpen"])]
    failure_policy: String,
    /// A service that it may call, by the name that it uses: authz=ext-authz.demo:80; may be repeated
    #[arg(long = "upstream", value_name = "NAME=SERVICE", value_parser = pair)]
    upstreams: Vec<(String, String)>,
    /// A limit: memory=16Mi, callTime=5ms, cpuShare=20%, body=1Mi, callouts=16; may be repeated
    #[arg(long = "limit", value_name = "NAME=VALUE", value_parser = pair)]
    limits: Vec<(String, String)>,
    /// How long to wait for the proxies, in seconds; 0: not at all
    #[arg(long, default_value_t = 30, value_name = "SECONDS")]
    wait: u64,
    #[command(flatten)]
    admin: Admin,
}

#[derive(Debug, clap::Args)]
pub(super) struct Detach {
    /// Its name
    name: String,
    /// Its namespace
    #[arg(short, long, default_value = "default")]
    namespace: String,
    #[command(flatten)]
    admin: Admin,
}

#[derive(Debug, Clone)]
struct Target {
    group: &'static str,
    kind: &'static str,
    name: String,
    rule: Option<String>,
}

fn target(text: &str) -> Result<Target, String> {
    let wrong =
        || format!("`{text}` is none of service/NAME, namespace/NAME, httproute/NAME[/RULE], grpcroute/NAME[/RULE]");
    let (kind, name) = text.split_once('/').filter(|(_, name)| !name.is_empty()).ok_or_else(wrong)?;
    let (name, rule) = name.split_once('/').map_or((name, None), |(name, rule)| (name, Some(rule.to_owned())));
    let (group, kind) = match kind {
        "service" => ("", "Service"),
        "namespace" => ("", "Namespace"),
        "httproute" => ("gateway.networking.k8s.io", "HTTPRoute"),
        "grpcroute" => ("gateway.networking.k8s.io", "GRPCRoute"),
        _ => return Err(wrong()),
    };
    if group.is_empty() && rule.is_some() {
        return Err(wrong());
    }
    Ok(Target { group, kind, name: name.to_owned(), rule })
}

fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() && !value.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err(format!("`{text}` is not NAME=VALUE")),
    }
}

pub(super) fn push(args: &Push, global: &Global) -> anyhow::Result<ExitCode> {
    let answer = upload(&global.control()?, &args.admin.token()?, &args.file)?;
    match global.output {
        Format::Json => output::json(&answer)?,
        Format::Table => output::line(digest(&answer)?)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn upload(control: &Control, token: &str, file: &Path) -> anyhow::Result<Value> {
    let bytes = std::fs::read(file).with_context(|| format!("{}: cannot read the module", file.display()))?;
    control.upload("/api/v1/modules", token, bytes.into())
}

fn digest(answer: &Value) -> anyhow::Result<&str> {
    answer["sha256"].as_str().context("the control plane's answer has no sha256")
}

pub(super) fn attach(args: &Attach, global: &Global) -> anyhow::Result<ExitCode> {
    let (control, token) = (global.control()?, args.admin.token()?);
    let module = module(&args.module, &control, &token)?;
    let spec = spec(args, &module)?;
    let answer = control.put(&format!("/api/v1/filters/{}/{}", args.namespace, args.name), &token, &spec)?;
    if args.wait == 0 {
        match global.output {
            Format::Json => output::json(&answer)?,
            Format::Table => output::line(&format!("{}/{} attached", args.namespace, args.name))?,
        }
        return Ok(ExitCode::SUCCESS);
    }
    let filter = wait(args, &control)?;
    match global.output {
        Format::Json => output::json(&filter.raw)?,
        Format::Table => output::line(status::render(std::slice::from_ref(&filter)).trim_end())?,
    }
    if filter.serves() {
        return Ok(ExitCode::SUCCESS);
    }
    if filter.proxies.is_empty() {
        output::error("no proxy serves by it: do its targets exist, with a connected proxy that has been called?");
    } else {
        output::error("not every proxy serves by it yet: outrigger filter status");
    }
    Ok(ExitCode::FAILURE)
}

/// Until every connected proxy that has it said yes or no, or the time is over.
fn wait(args: &Attach, control: &Control) -> anyhow::Result<Filter> {
    let until = Instant::now() + Duration::from_secs(args.wait);
    loop {
        let filters = status::read(control)?;
        let found = filters.into_iter().find(|filter| filter.namespace == args.namespace && filter.name == args.name);
        let filter = found.context("the filter was taken away again")?;
        if (filter.settled() && !filter.fetching()) || Instant::now() >= until {
            return Ok(filter);
        }
        std::thread::sleep(POLL);
    }
}

fn module(text: &str, control: &Control, token: &str) -> anyhow::Result<Value> {
    if let Some(reference) = text.strip_prefix("oci://") {
        return Ok(json!({ "oci": reference }));
    }
    if text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Ok(json!({ "sha256": text }));
    }
    if text.contains("://") {
        bail!("--module {text}: a module on a web server needs its digest too; write a WasmFilter with url and sha256");
    }
    let answer = upload(control, token, Path::new(text))?;
    Ok(json!({ "sha256": digest(&answer)? }))
}

fn spec(args: &Attach, module: &Value) -> anyhow::Result<Value> {
    let refs = args.to.iter().map(|target| {
        let mut target_ref = json!({ "group": target.group, "kind": target.kind, "name": target.name });
        if let Some(rule) = &target.rule {
            target_ref["sectionName"] = json!(rule);
        }
        target_ref
    });
    let mut spec = json!({
        "targetRefs": refs.collect::<Vec<_>>(),
        "protocol": args.protocol,
        "order": args.order,
        "module": module,
        "failurePolicy": args.failure_policy,
    });
    if let Some(direction) = &args.direction {
        spec["direction"] = json!(direction);
    }
    if let Some(text) = &args.configuration {
        let text = match text.strip_prefix('@') {
            Some(file) => std::fs::read_to_string(file).with_context(|| format!("--configuration {text}"))?,
            None => text.clone(),
        };
        spec["configuration"] = serde_json::from_str(&text).unwrap_or(Value::String(text));
    }
    if let Some(root) = &args.root_id {
        spec["rootId"] = json!(root);
    }
    for (field, pairs) in [("upstreams", &args.upstreams), ("limits", &args.limits)] {
        if !pairs.is_empty() {
            // callouts is a number; everything else is text.
            let value = |text: &String| text.parse::<u32>().map_or_else(|_| json!(text), |number| json!(number));
            let pairs: Map<_, _> = pairs.iter().map(|(name, text)| (name.clone(), value(text))).collect();
            spec[field] = Value::Object(pairs);
        }
    }
    Ok(spec)
}

pub(super) fn detach(args: &Detach, global: &Global) -> anyhow::Result<ExitCode> {
    let path = format!("/api/v1/filters/{}/{}", args.namespace, args.name);
    let answer = global.control()?.delete(&path, &args.admin.token()?)?;
    match global.output {
        Format::Json => output::json(&answer)?,
        Format::Table => output::line(&format!("{}/{} detached", args.namespace, args.name))?,
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_and_pairs() {
        assert_eq!(target("service/reviews").unwrap().kind, "Service");
        assert_eq!(target("namespace/demo").unwrap().name, "demo");
        let route = target("httproute/reviews/canary").unwrap();
        assert_eq!((route.kind, route.name.as_str(), route.rule.as_deref()), ("HTTPRoute", "reviews", Some("canary")));
        for bad in ["reviews", "service/", "pod/a", "service/a/b"] {
            assert!(target(bad).is_err(), "{bad}");
        }
        assert_eq!(pair("authz=ext-authz.demo:80").unwrap().1, "ext-authz.demo:80");
        assert!(pair("authz").is_err());
    }
}
