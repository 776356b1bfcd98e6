//! The configuration of a mesh, and a control plane that serves it.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use nix::time::ClockId;
use nix::unistd::Pid;

/// Namespaces that the services are spread over.
const NAMESPACES: usize = 10;

/// A directory of YAML.
pub(crate) struct Files {
    directory: PathBuf,
    endpoints: usize,
}

impl Files {
    /// One file with a Service and its route, and one with its EndpointSlice, per service.
    pub(crate) fn write(directory: &Path, services: usize, endpoints: usize) -> anyhow::Result<Self> {
        std::fs::create_dir_all(directory)?;
        let files = Self { directory: directory.to_owned(), endpoints };
        for service in 0..services {
            files.route(service, 0)?;
            files.slice(service, 0)?;
        }
        Ok(files)
    }

    /// Writes the Service with its route, as of a version.
    pub(crate) fn route(&self, service: usize, version: usize) -> anyhow::Result<()> {
        let (namespace, name) = parts(service);
        let timeout = 10 + version;
        self.replace(
            &format!("{name}.yaml"),
            &format!(
                "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec:\n  clusterIP: 10.96.{}.{}\n  ports: [{{name: http, port: 80, targetPort: 8080, appProtocol: http}}]\n---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec:\n  parentRefs: [{{group: \"\", kind: Service, name: {name}, port: 80}}]\n  rules:\n  - matches: [{{path: {{type: PathPrefix, value: /v1}}}}]\n    timeouts: {{request: {timeout}s}}\n    backendRefs: [{{name: {name}, port: 80}}]\n",
                service / 250,
                1 + service % 250
            ),
        )
    }

    /// Writes the endpoints, as of a version: one of them has another address in each.
    pub(crate) fn slice(&self, service: usize, version: usize) -> anyhow::Result<()> {
        let (namespace, name) = parts(service);
        let mut endpoints = String::new();
        for endpoint in 0..self.endpoints {
            let last = if endpoint == 0 { 100 + version % 100 } else { endpoint };
            let (high, low) = (service / 250, service % 250);
            writeln!(
                endpoints,
                "- addresses: [10.{high}.{low}.{last}]\n  targetRef: {{kind: Pod, name: {name}-{endpoint}}}\n  zone: z{}",
                endpoint % 3
            )?;
        }
        self.replace(
            &format!("{name}-endpoints.yaml"),
            &format!(
                "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{kubernetes.io/service-name: {name}}}}}\naddressType: IPv4\nports: [{{name: http, port: 8080}}]\nendpoints:\n{endpoints}"
            ),
        )
    }

    fn replace(&self, name: &str, text: &str) -> anyhow::Result<()> {
        let beside = self.directory.join(format!(".{name}.new"));
        std::fs::write(&beside, text)?;
        std::fs::rename(&beside, self.directory.join(name))?;
        Ok(())
    }
}

fn parts(service: usize) -> (String, String) {
    (format!("ns{}", service % NAMESPACES), format!("s{service}"))
}

/// `<namespace>/<name>`
pub(crate) fn name(service: usize) -> String {
    let (namespace, name) = parts(service);
    format!("{namespace}/{name}")
}

/// A control plane in a process of its own; killed when dropped.
pub(crate) struct ControlPlane {
    child: Child,
    pub(crate) grpc: SocketAddr,
    http: SocketAddr,
}

impl ControlPlane {
    pub(crate) fn start(binary: &Path, config: &Path, state: &Path) -> anyhow::Result<Self> {
        let mut child = Command::new(binary)
            .arg("--config")
            .arg(config)
            .arg("--state")
            .arg(state)
            .args(["--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--lease", "3600s", "--log", "error"])
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| binary.display().to_string())?;
        let mut line = String::new();
        if let Some(stdout) = child.stdout.take() {
            BufReader::new(stdout).read_line(&mut line)?;
        }
        let after = |text: &str| {
            let rest = line.split_once(text)?.1;
            rest.split([',', ' ']).next()?.parse().ok()
        };
        let (Some(grpc), Some(http)) = (after("gRPC on "), after("HTTP API on http://")) else {
            let _ = child.kill();
            bail!("the control plane did not start: {line}");
        };
        Ok(Self { child, grpc, http })
    }

    /// CPU time since its start.
    pub(crate) fn cpu(&self) -> anyhow::Result<Duration> {
        let pid = Pid::from_raw(i32::try_from(self.child.id())?);
        Ok(Duration::from(ClockId::pid_cpu_clock_id(pid)?.now()?))
    }

    /// A line of `/proc/PID/status`, in MiB.
    pub(crate) fn memory(&self, field: &str) -> anyhow::Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find(|line| line.starts_with(field)).context("no such field")?;
        let kib: f64 = line.split_whitespace().nth(1).context("no value")?.parse()?;
        Ok(kib / 1024.0)
    }

    /// A counter of its metrics.
    pub(crate) fn counter(&self, name: &str) -> anyhow::Result<u64> {
        let mut stream = TcpStream::connect(self.http)?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        let prefix = format!("outrigger_control_{name}_total ");
        let value = text.lines().find_map(|line| line.strip_prefix(&prefix)).with_context(|| format!("no {name}"))?;
        Ok(value.trim().parse()?)
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
