//! This proxy as a target: the real binary in local mode, its outbound side between a client and the application.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::SocketAddr;

use outrigger_proxy::filter::cases::{Case, FilterSpec, metric};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::guests::module;
use super::world::{Target, World};
use crate::{Local, LocalProxy, until};

/// One proxy for one case.
#[derive(Debug, Default)]
pub struct Through {
    workers: usize,
    local: Option<Local>,
    proxy: Option<LocalProxy>,
}

/// Services for the servers of a case, and the routes that Envoy has too.
fn mesh(world: &World) -> String {
    let mut yaml = String::new();
    for (name, address) in &world.servers {
        let port = address.port();
        let _ = write!(
            yaml,
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: demo}}\n\
             spec: {{ports: [{{name: http, port: 80}}]}}\n---\n\
             apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
             metadata: {{name: {name}-1, namespace: demo, labels: {{kubernetes.io/service-name: {name}}}}}\n\
             addressType: IPv4\nports: [{{name: http, port: {port}}}]\nendpoints: [{{addresses: [127.0.0.1]}}]\n---\n"
        );
    }
    yaml + "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: routes, namespace: demo}\nspec:\n  \
            parentRefs: [{group: \"\", kind: Service, name: reviews}]\n  rules:\n  \
            - matches: [{path: {type: PathPrefix, value: /rewritten}}]\n    backendRefs: [{name: second, port: 80}]\n  \
            - matches: [{path: {type: PathPrefix, value: /timeout}}]\n    timeouts: {request: 500ms}\n    \
            backendRefs: [{name: reviews, port: 80}]\n  \
            - backendRefs: [{name: reviews, port: 80}]\n"
}

/// One filter as YAML, which JSON is.
fn resource(index: usize, spec: &FilterSpec, file: &str) -> Value {
    let text = |text: &str| if text.is_empty() { Value::Null } else { json!(text) };
    let mut limits =
        json!({"callTime": format!("{}ms", if spec.call_time_ms == 0 { 1000 } else { spec.call_time_ms })});
    if spec.memory > 0 {
        limits["memory"] = json!(format!("{}Ki", spec.memory / 1024));
    }
    if spec.body_limit > 0 {
        limits["body"] = json!(format!("{}Ki", spec.body_limit / 1024));
    }
    let upstreams: BTreeMap<&String, String> =
        spec.upstreams.iter().map(|name| (name, format!("{name}.demo:80"))).collect();
    let mut spec_ = json!({
        "targetRefs": [{"group": "", "kind": "Service", "name": "reviews"}], "direction": "Outbound", "order": index,
        "module": {"file": file}, "rootId": spec.root_id, "limits": limits, "upstreams": upstreams,
        "failurePolicy": if spec.fail_open { "FailOpen" } else { "FailClosed" },
        "vm": {"id": spec.vm_id, "configuration": text(&spec.vm_configuration), "environment": spec.environment},
    });
    if !spec.configuration.is_empty() {
        spec_["configuration"] = json!(spec.configuration);
    }
    json!({"apiVersion": "outrigger.dev/v1alpha1", "kind": "WasmFilter", "spec": spec_,
        "metadata": {"name": spec.name_at(index), "namespace": "demo"}})
}

impl Through {
    /// With as many workers as the case asks for.
    pub fn of(case: &Case) -> Self {
        Self { workers: case.workers.max(1), ..Self::default() }
    }

    fn proxy(&self) -> &LocalProxy {
        self.proxy.as_ref().expect("loaded")
    }
}

/// Waits until the proxy has these filters, by name and digest, or has refused one.
fn until_there_or_refused(proxy: &LocalProxy, wanted: &[(String, String)]) -> Result<(), String> {
    // A first request makes the proxy ask for the service, and with it for its filters; at this port none is reached.
    until("the filters are there or refused", || {
        let rows = proxy.admin("/filters").json();
        let rows = rows.as_array()?;
        let state = |(name, sha256): &(String, String)| {
            let row = rows.iter().find(|row| row["name"] == name.as_str())?;
            if let Some(refused) = row["refused"].as_str() {
                return Some(Err(refused.to_owned()));
            }
            (row["sha256"] == sha256.as_str()).then_some(Ok(()))
        };
        let known: Option<Vec<Result<(), String>>> = wanted.iter().map(state).collect();
        if known.is_none() {
            proxy.call("reviews:81", "/wake").send();
        }
        known
    })
    .into_iter()
    .collect()
}

impl Target for Through {
    fn load(&mut self, filters: &[FilterSpec], world: &World) -> Result<(), String> {
        let workers = self.workers;
        let local = self.local.get_or_insert_with(|| Local::new(&mesh(world)));
        // Filters become ready each for itself. Where they share an instance it matters which one was there first: one after the other.
        let together = filters.iter().all(|spec| spec.vm_id.is_empty());
        let steps = if together { filters.len()..=filters.len() } else { 1..=filters.len() };
        let mut result = Ok(());
        for filters in steps.filter_map(|most| filters.get(..most)) {
            let mut yaml = String::new();
            let mut wanted: Vec<(String, String)> = Vec::new();
            for (index, spec) in filters.iter().enumerate() {
                let bytes = module(&spec.module);
                let sha256 = hex::encode(Sha256::digest(&bytes));
                let file = format!("{sha256}.wasm");
                std::fs::write(local.path("config").join(&file), bytes).expect("write");
                let _ = writeln!(yaml, "{}\n---", resource(index, spec, &file));
                wanted.push((spec.name_at(index), sha256));
            }
            local.write("filters.yaml", &yaml);
            let proxy = self.proxy.get_or_insert_with(|| {
                let proxy =
                    local.proxy("web-0").flag("--workers", &workers).flag("--log", &"info,filter=trace").start();
                proxy.ready()
            });
            result = until_there_or_refused(proxy, &wanted);
        }
        result
    }

    fn address(&self) -> SocketAddr {
        self.proxy().outbound()
    }

    fn log(&self) -> Vec<String> {
        let text = self.proxy().process.log();
        text.lines().filter_map(line).collect()
    }

    fn metrics(&self, names: &[&String]) -> BTreeMap<String, i64> {
        if names.is_empty() {
            return BTreeMap::new();
        }
        let text = self.proxy().admin("/metrics").body;
        names.iter().filter_map(|name| Some(((*name).clone(), metric(&text, name)?))).collect()
    }

    fn words(&self) -> bool {
        true
    }

    fn ended(&mut self) -> Option<String> {
        let proxy = self.proxy.as_mut()?;
        if proxy.process.is_running() { None } else { Some("ended".to_owned()) }
    }
}

/// `time LEVEL text filter="demo/name"`, as the proxy writes it.
fn line(line: &str) -> Option<String> {
    let (before, name) = line.rsplit_once(" filter=\"")?;
    let name = name.strip_suffix('"')?;
    let (_, rest) = before.split_once(char::is_whitespace)?;
    let (level, text) = rest.trim_start().split_once(' ')?;
    (!name.contains('"')).then(|| format!("{} {text}", level.to_ascii_lowercase()))
}
