//! Envoy as a target: the same cases on the binary that `scripts/setup.sh` installs.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use outrigger_proxy::filter::cases::{Case, FilterSpec};
use serde_json::{Value, json};

use super::guests::module;
use super::world::{Target, World};
use crate::{Curl, Process, until};

const TYPES: &str = "type.googleapis.com/envoy.";

/// One Envoy for one case.
#[derive(Debug)]
pub struct Envoy {
    directory: tempfile::TempDir,
    process: Option<Process>,
    loads: usize,
    workers: usize,
    address: Option<SocketAddr>,
}

/// The binary of the Python environment.
pub(super) fn binary() -> PathBuf {
    let venv = crate::python::environment();
    let found =
        fs::read_dir(venv.join("lib")).expect("the Python environment: run scripts/setup.sh").find_map(|entry| {
            let path = entry.ok()?.path().join("site-packages/envoy/_bin/envoy");
            path.exists().then_some(path)
        });
    found.unwrap_or_else(|| panic!("no Envoy in {}: run scripts/setup.sh", venv.display()))
}

impl Default for Envoy {
    fn default() -> Self {
        let directory = tempfile::Builder::new().prefix("outrigger-").tempdir().expect("temporary directory");
        Self { directory, process: None, loads: 0, workers: 1, address: None }
    }
}

impl Envoy {
    /// With as many workers as the case asks for.
    pub fn of(case: &Case) -> Self {
        Self { workers: case.workers.max(1), ..Self::default() }
    }

    fn path(&self, name: &str) -> String {
        self.directory.path().join(name).display().to_string()
    }

    fn admin(&self, path: &str) -> String {
        let address = fs::read_to_string(self.path("admin")).unwrap_or_default();
        Curl::get(&format!("http://{address}{path}")).send().body
    }

    fn counter(&self, name: &str) -> u64 {
        let text = self.admin(&format!("/stats?filter=^{name}$"));
        text.trim().rsplit(' ').next().and_then(|value| value.parse().ok()).unwrap_or(0)
    }

    fn filter(&self, index: usize, spec: &FilterSpec) -> Value {
        let string = |text: &str| json!({"@type": "type.googleapis.com/google.protobuf.StringValue", "value": text});
        let file = self.path(&format!("{}-{index}.wasm", self.loads));
        fs::write(&file, module(&spec.module)).expect("write");
        let mut vm = json!({
            "vm_id": spec.vm_id, "runtime": "envoy.wasm.runtime.v8", "code": {"local": {"filename": file}},
            "environment_variables": {"key_values": spec.environment},
        });
        if !spec.vm_configuration.is_empty() {
            vm["configuration"] = string(&spec.vm_configuration);
        }
        let mut config = json!({
            "name": format!("demo/{}", spec.name_at(index)), "root_id": spec.root_id, "vm_config": vm,
            "failure_policy": if spec.fail_open { "FAIL_OPEN" } else { "FAIL_RELOAD" },
        });
        if !spec.configuration.is_empty() {
            config["configuration"] = string(&spec.configuration);
        }
        json!({"name": format!("wasm{index}"), "typed_config": {
            "@type": format!("{TYPES}extensions.filters.http.wasm.v3.Wasm"), "config": config,
        }})
    }

    fn listener(&self, filters: &[FilterSpec]) -> Value {
        let mut chain: Vec<Value> = filters.iter().enumerate().map(|(index, spec)| self.filter(index, spec)).collect();
        chain.push(json!({"name": "router", "typed_config": {
            "@type": format!("{TYPES}extensions.filters.http.router.v3.Router"),
        }}));
        let route = |prefix: &str, cluster: &str, timeout: &str| json!({"match": {"prefix": prefix}, "route": {"cluster": cluster, "timeout": timeout}});
        let limit = filters.iter().map(|spec| spec.body_limit).max().filter(|limit| *limit > 0);
        json!({
            "@type": format!("{TYPES}config.listener.v3.Listener"), "name": "main",
            "address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}},
            "per_connection_buffer_limit_bytes": limit.unwrap_or(1 << 20),
            "filter_chains": [{"filters": [{"name": "http", "typed_config": {
                "@type": format!("{TYPES}extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"),
                "stat_prefix": "main", "generate_request_id": false,
                "http_protocol_options": {"enable_trailers": true},
                "route_config": {"virtual_hosts": [
                    {"name": "second", "domains": ["second"], "routes": [route("/", "second", "0s")]},
                    {"name": "all", "domains": ["*"], "routes": [
                        route("/rewritten", "second", "0s"), route("/timeout", "reviews", "0.5s"),
                        route("/", "reviews", "0s"),
                    ]},
                ]},
                "http_filters": chain,
            }}]}],
        })
    }

    fn bootstrap(&self, world: &World) -> Value {
        let options = json!({
            "@type": format!("{TYPES}extensions.upstreams.http.v3.HttpProtocolOptions"),
            "explicit_http_config": {"http_protocol_options": {"enable_trailers": true}},
        });
        let cluster = |(name, address): &(String, SocketAddr)| {
            json!({
                "name": name, "type": "STATIC", "connect_timeout": "2s",
                "typed_extension_protocol_options": {
                    "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options,
                },
                "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [{"endpoint": {"address":
                    {"socket_address": {"address": "127.0.0.1", "port_value": address.port()}}}}]}]},
            })
        };
        json!({
            "node": {"id": "conformance", "cluster": "conformance"},
            "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}}},
            "stats_flush_interval": "0.1s",
            "static_resources": {"clusters": world.servers.iter().map(cluster).collect::<Vec<_>>()},
            "dynamic_resources": {"lds_config": {"path_config_source": {"path": self.path("lds.json")}}},
        })
    }

    fn start(&mut self, world: &World) {
        fs::write(self.path("envoy.json"), self.bootstrap(world).to_string()).expect("write");
        let mut command = Command::new(binary());
        command.args([
            "-c",
            &self.path("envoy.json"),
            "--concurrency",
            &self.workers.to_string(),
            "--disable-hot-restart",
            "--drain-time-s",
            "1",
            "-l",
            "warning",
        ]);
        command.args(["--component-log-level", "wasm:trace,config:debug", "--log-format", "@@%l@@%_"]);
        command.args(["--admin-address-path", &self.path("admin")]);
        self.process = Some(Process::start("envoy", command, self.directory.path()));
    }

    fn text(&self) -> String {
        self.process.as_ref().map(Process::log).unwrap_or_default()
    }
}

impl Target for Envoy {
    fn load(&mut self, filters: &[FilterSpec], world: &World) -> Result<(), String> {
        self.loads += 1;
        let resources = json!({"version_info": self.loads.to_string(), "resources": [self.listener(filters)]});
        let before = self.text().len();
        fs::write(self.path("lds.new"), resources.to_string()).expect("write");
        fs::rename(self.path("lds.new"), self.path("lds.json")).expect("rename");
        if self.process.is_none() {
            self.start(world);
        }
        let (success, rejected) = ("listener_manager.lds.update_success", "listener_manager.lds.update_rejected");
        until("Envoy has taken or refused the filters", || {
            let ended = self.ended().is_some();
            let done = || self.counter(success) + self.counter(rejected) >= self.loads as u64;
            (ended || (fs::exists(self.path("admin")).unwrap_or(false) && done())).then_some(())
        });
        let text = self.text();
        let mut new = text.get(before..).unwrap_or_default().lines();
        // What the VM says comes before the listener's own line.
        let why: Vec<&str> = new.by_ref().filter(|line| !line.contains("wasm log ")).collect();
        if self.ended().is_some() || why.iter().any(|line| line.contains("rejected: ")) {
            return Err(why.join("\n"));
        }
        let address = until("Envoy listens", || {
            let listeners: Value = serde_json::from_str(&self.admin("/listeners?format=json")).ok()?;
            let socket = &listeners["listener_statuses"][0]["local_address"]["socket_address"];
            Some(SocketAddr::from(([127, 0, 0, 1], u16::try_from(socket["port_value"].as_u64()?).ok()?)))
        });
        until("Envoy is live", || self.admin("/ready").starts_with("LIVE").then_some(()));
        self.address = Some(address);
        Ok(())
    }

    fn address(&self) -> SocketAddr {
        self.address.expect("loaded")
    }

    fn log(&self) -> Vec<String> {
        let text = self.text();
        let lines = text.lines().filter_map(|line| {
            let (level, rest) = line.strip_prefix("@@")?.split_once("@@")?;
            let (_, text) = rest.strip_prefix("wasm log")?.split_once(": ")?;
            let level = if level == "warning" { "warn" } else { level };
            Some(format!("{level} {text}"))
        });
        lines.collect()
    }

    fn metrics(&self, names: &[&String]) -> BTreeMap<String, i64> {
        if names.is_empty() {
            return BTreeMap::new();
        }
        let text = self.admin("/stats/prometheus");
        let value = |name: &String| {
            text.lines().find_map(|line| {
                let (of, value) = line.split_once(' ')?;
                let of = of.split('{').next()?;
                let is = of == name || of.strip_suffix("_count") == Some(name);
                is.then(|| value.parse().ok()).flatten()
            })
        };
        names.iter().filter_map(|name| Some(((*name).clone(), value(name)?))).collect()
    }

    fn patience(&self) -> Duration {
        // Above its first pause after a trap, which is a second.
        Duration::from_secs(2)
    }

    fn words(&self) -> bool {
        false
    }

    fn ended(&mut self) -> Option<String> {
        let process = self.process.as_mut()?;
        if process.is_running() { None } else { Some("ended".to_owned()) }
    }
}
