//! `outrigger filter run`: a filter on a port in front of a server, in the proxy that serves traffic, loaded anew when its file changes.

use std::net::{SocketAddr, TcpListener, ToSocketAddrs as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, ensure};
use bytes::Bytes;
use clap::Parser as _;
use http::{Method, Uri};
use outrigger_proxy::filter::wasm::inspect;
use outrigger_proxy::flags::Flags;
use serde_json::json;
use sha2::{Digest as _, Sha256};

use super::host;
use super::watch::Watch;
use crate::client;
use crate::output;

/// How long the proxy may take to be ready, or to say what became of a new module.
const PATIENCE: Duration = Duration::from_secs(30);
/// Name of the filter in the proxy.
const NAME: &str = "filter";

#[derive(Debug, clap::Args)]
pub(super) struct Run {
    /// The module; when it changes, it is loaded anew
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// The server behind the filter
    #[arg(long, value_name = "http://HOST:PORT")]
    upstream: String,
    /// Where clients connect
    #[arg(long, default_value = "8080")]
    port: u16,
    /// Its configuration: a text, or @FILE
    #[arg(long, value_name = "TEXT|@FILE")]
    configuration: Option<String>,
    /// Show every callback and host call, with arguments and status
    #[arg(long)]
    trace: bool,
    /// Requests go on without the filter when it fails
    #[arg(long)]
    fail_open: bool,
    /// A service that the filter may call; repeat it for more
    #[arg(long = "service", value_name = "NAME=http://HOST:PORT")]
    services: Vec<String>,
    /// The lowest level of the filter's log: trace, debug, info, warn, error
    #[arg(long, default_value = "info")]
    log: String,
    /// Where the proxy tells about itself: /filters, /metrics [default: a free port of 127.0.0.1]
    #[arg(long, value_name = "ADDR:PORT")]
    admin: Option<SocketAddr>,
}

/// Serves until it is interrupted. Fails (exit code 1) when the module is refused at the start.
pub(super) fn run(args: &Run) -> anyhow::Result<ExitCode> {
    let upstream = address(&args.upstream).context("--upstream")?;
    let listen = SocketAddr::from(([127, 0, 0, 1], args.port));
    ensure!(upstream != listen, "--port {} is where --upstream is: give the filter another one", args.port);
    // The proxy says it by the names of its own flags.
    drop(TcpListener::bind(listen).with_context(|| format!("--port {}: cannot listen there", args.port))?);
    let module = host::read_module(&args.file)?;
    let configuration = host::configuration(args.configuration.as_deref())?;
    let configuration = String::from_utf8(configuration).context("--configuration: it is not UTF-8")?;
    let admin = args.admin.map_or_else(free, Ok)?;
    let log = host::log(&args.log, args.trace)?;
    let scratch = tempfile::tempdir().context("cannot make a temporary directory")?;
    let state = scratch.path().join("state");
    let cache = state.join("filters");
    if let Some(why) = refusal(&module, &configuration, &cache)? {
        output::error(&format!("outrigger: {}: {why}", args.file.display()));
        return Ok(ExitCode::FAILURE);
    }
    let place = Place { config: scratch.path().join("config") };
    std::fs::create_dir(&place.config).context("cannot make a temporary directory")?;
    place.module(&module)?;
    let resources = resources(args, &configuration)?;
    std::fs::write(place.config.join("filter.yaml"), resources).context("the proxy's configuration")?;

    let path = |path: &Path| path.display().to_string();
    let (config, state) = (path(&place.config), path(&state));
    let (app, inbound, admin_text) = (upstream.to_string(), listen.to_string(), admin.to_string());
    let flags = [
        ["--config", &config],
        ["--state", &state],
        ["--name", "filter-run"],
        ["--labels", "app=filter-run"],
        ["--app", &app],
        ["--inbound", &inbound],
        ["--outbound", "127.0.0.1:0"],
        ["--health", "127.0.0.1:0"],
        ["--admin", &admin_text],
        ["--workers", "1"],
        ["--drain-min", "0ms"],
        ["--drain-max", "1s"],
    ];
    let flags = std::iter::once("outrigger-proxy").chain(flags.into_iter().flatten());
    let settings = Flags::try_parse_from(flags)?.settings().map_err(|error| anyhow!("{error}"))?;

    let watch = Watch::of(&args.file)?;
    let follow = Follow {
        proxy: admin,
        place,
        file: args.file.clone(),
        configuration,
        cache,
        serving: format!("http://{listen} → {} → {}", args.file.display(), args.upstream),
        last: digest(&module),
    };
    std::thread::spawn(move || {
        if let Err(error) = follow.run(&watch) {
            output::error(&format!("outrigger: {error:#}"));
        }
    });
    outrigger_proxy::run::run_logged(settings, log, args.trace)?;
    Ok(ExitCode::SUCCESS)
}

/// Why a proxy would refuse it. What is compiled stays in the cache, where the proxy finds it.
fn refusal(module: &[u8], configuration: &str, cache: &Path) -> anyhow::Result<Option<String>> {
    let compiler = host::compiler()?;
    let trial = inspect(module.to_vec().into(), configuration.as_bytes(), &compiler, cache);
    let found = host::runtime()?.block_on(trial)?;
    Ok(found.refused.or(found.configuration))
}

/// The server that a URL names.
fn address(url: &str) -> anyhow::Result<SocketAddr> {
    let uri: Uri = url.parse().with_context(|| format!("`{url}` is no URL"))?;
    let scheme = uri.scheme_str();
    ensure!(
        scheme == Some("http"),
        "`{url}`: give http://HOST:PORT; a server with TLS needs a plain one in front of it"
    );
    ensure!(matches!(uri.path(), "" | "/") && uri.query().is_none(), "`{url}`: leave out the path");
    let host = uri.host().ok_or_else(|| anyhow!("`{url}`: the host is missing"))?;
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let mut found = (bare, uri.port_u16().unwrap_or(80)).to_socket_addrs().with_context(|| format!("`{url}`"))?;
    found.next().ok_or_else(|| anyhow!("`{url}`: {host} has no address"))
}

fn free() -> anyhow::Result<SocketAddr> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).context("no port of 127.0.0.1 is free")?;
    Ok(listener.local_addr()?)
}

/// What the proxy reads: one document each, JSON being YAML.
fn resources(args: &Run, configuration: &str) -> anyhow::Result<String> {
    let service = |name: &str, selector: serde_json::Value| {
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default"},
            "spec": {"selector": selector, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]}})
    };
    let mut all = vec![service("filter-run", json!({"app": "filter-run"}))];
    let mut upstreams = serde_json::Map::new();
    for given in &args.services {
        let (name, url) =
            given.split_once('=').ok_or_else(|| anyhow!("--service {given}: give NAME=http://HOST:PORT"))?;
        let at = address(url).with_context(|| format!("--service {name}"))?;
        ensure!(name != "filter-run", "--service {name}: this name is the filter's own");
        let family = if at.is_ipv4() { "IPv4" } else { "IPv6" };
        let labels = json!({"kubernetes.io/service-name": name});
        all.push(service(name, serde_json::Value::Null));
        all.push(json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family,
            "metadata": {"name": name, "namespace": "default", "labels": labels},
            "ports": [{"name": "http", "port": at.port()}], "endpoints": [{"addresses": [at.ip()]}]}));
        upstreams.insert(name.to_owned(), format!("{name}.default:80").into());
    }
    all.push(json!({"apiVersion": "outrigger.dev/v1alpha1", "kind": "WasmFilter",
        "metadata": {"name": NAME, "namespace": "default"},
        "spec": {"targetRefs": [{"group": "", "kind": "Service", "name": "filter-run"}], "direction": "Inbound",
            "module": {"file": "filter.wasm"}, "configuration": configuration, "upstreams": upstreams,
            "failurePolicy": if args.fail_open { "FailOpen" } else { "FailClosed" },
            // A trace takes its time inside of callbacks.
            "limits": {"callTime": if args.trace { "1s" } else { "5ms" }}}}));
    let documents: Result<Vec<String>, _> = all.iter().map(serde_json::to_string_pretty).collect();
    Ok(documents?.join("\n---\n"))
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The directory that the proxy watches.
struct Place {
    config: PathBuf,
}

impl Place {
    /// Puts a module there in one step, so that the proxy never reads half of it.
    fn module(&self, bytes: &[u8]) -> anyhow::Result<()> {
        let (new, file) = (self.config.join(".new"), self.config.join("filter.wasm"));
        std::fs::write(&new, bytes).and_then(|()| std::fs::rename(&new, file)).context("the proxy's copy of the module")
    }
}

/// Tells when the proxy serves, and hands it each new version of the file. On standard error, as the filter's log: standard output is the
/// access log's.
struct Follow {
    proxy: SocketAddr,
    place: Place,
    file: PathBuf,
    configuration: String,
    /// Where the proxy keeps compiled modules
    cache: PathBuf,
    serving: String,
    /// Digest of the version that was looked at last
    last: String,
}

impl Follow {
    fn run(mut self, watch: &Watch) -> anyhow::Result<()> {
        let runtime = host::runtime()?;
        let ready = |this: &Self| this.get(&runtime, "/ready").map(|_| ());
        self.until(ready).context("the proxy does not get ready")?;
        output::error(&format!("serving {} (Ctrl-C ends it)", self.serving));
        output::error(&format!("        about it: http://{0}/filters, http://{0}/metrics", self.proxy));
        while watch.changed() {
            let Ok(module) = std::fs::read(&self.file) else { continue };
            let new = digest(&module);
            if module.is_empty() || new == self.last {
                continue;
            }
            self.last = new;
            let what = format!("reload  {} changed ({})", self.file.display(), host::bytes(module.len() as u64));
            // Half a file is refused too, and what follows is another change.
            if let Some(why) = refusal(&module, &self.configuration, &self.cache)? {
                output::error(&format!("{what}: refused, and the one before serves on: {why}"));
                continue;
            }
            self.place.module(&module)?;
            match self.until(|this| this.serves(&runtime)) {
                Ok(()) => output::error(&format!("{what}: serves")),
                Err(_) => output::error(&format!("{what}: the proxy does not take it; see its log")),
            }
        }
        Ok(())
    }

    /// The proxy serves by the newest version.
    fn serves(&self, runtime: &tokio::runtime::Runtime) -> Option<()> {
        let rows: serde_json::Value = serde_json::from_slice(&self.get(runtime, "/filters")?).ok()?;
        let mut rows = rows.as_array()?.iter();
        rows.any(|row| row["name"] == NAME && row["sha256"] == self.last.as_str()).then_some(())
    }

    fn get(&self, runtime: &tokio::runtime::Runtime, path: &str) -> Option<Bytes> {
        let authority = self.proxy.to_string();
        let answer = client::request(&authority, Method::GET, path, &[], Bytes::new());
        runtime.block_on(answer).ok().filter(|answer| answer.status.is_success()).map(|answer| answer.body)
    }

    fn until(&self, ask: impl Fn(&Self) -> Option<()>) -> anyhow::Result<()> {
        let begin = Instant::now();
        while ask(self).is_none() {
            ensure!(begin.elapsed() < PATIENCE, "nothing for {PATIENCE:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn upstreams_are_plain_servers() {
        assert_eq!(address("http://127.0.0.1:3000").unwrap(), ([127, 0, 0, 1], 3000).into());
        assert_eq!(address("http://[::1]/").unwrap().port(), 80);
        for bad in ["127.0.0.1:3000", "https://127.0.0.1:3000", "http://127.0.0.1:3000/api", "http://"] {
            assert!(address(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_the_proxy_reads_is_valid() {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            run: Run,
        }
        let line = ["run", "f.wasm", "--upstream", "http://127.0.0.1:1", "--service", "authz=http://127.0.0.1:2"];
        let args = Line::try_parse_from(line).unwrap().run;
        let text = resources(&args, "{\"a\": 1}").unwrap();
        let parsed = outrigger_core::resource::parse("filter.yaml", &text);
        assert_eq!((parsed.resources.len(), parsed.rejections.len()), (4, 0), "{:?}", parsed.rejections);
    }
}
