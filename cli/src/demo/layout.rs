//! Where the demo's files, ports and programs are, and the resources it is made of.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};

use anyhow::Context as _;

use super::check::Condition;

/// The header that the demo's filter adds to what reviews answers.
pub(super) const FILTER_HEADER: &str = "x-shop-filter";
/// Its value.
pub(super) const FILTER_VALUE: &str = "header-policy";
/// Share of v2 at the start, percent.
pub(super) const CANARY: u32 = 20;
const NAMESPACE: &str = "demo";

/// One instance of a service of the shop.
#[derive(Debug, Clone)]
pub(super) struct Workload {
    pub(super) name: &'static str,
    pub(super) service: &'static str,
    pub(super) version: &'static str,
    pub(super) calls: Option<&'static str>,
    pub(super) app: SocketAddr,
    pub(super) inbound: SocketAddr,
    pub(super) outbound: SocketAddr,
    pub(super) admin: SocketAddr,
    pub(super) health: SocketAddr,
}

/// The demo's directory, programs and addresses.
#[derive(Debug)]
pub(super) struct Layout {
    dir: PathBuf,
    // Removes the directory at the end, unless the user named it.
    _temporary: Option<tempfile::TempDir>,
    programs: PathBuf,
    filter: PathBuf,
    pub(super) sabotage: Option<Condition>,
    pub(super) check: bool,
    pub(super) grpc: SocketAddr,
    pub(super) http: SocketAddr,
    pub(super) workloads: Vec<Workload>,
    /// A second instance of ratings, started by the check only to be killed.
    pub(super) spare: Workload,
}

impl Layout {
    /// Chooses ports, writes the resources.
    ///
    /// # Errors
    /// When the filter or a program is missing, or a file cannot be written.
    pub(super) fn create(
        dir: Option<PathBuf>,
        filter: Option<PathBuf>,
        sabotage: Option<Condition>,
        check: bool,
    ) -> anyhow::Result<Self> {
        let (dir, temporary) = match dir {
            Some(dir) => (dir, None),
            None => {
                let made =
                    tempfile::Builder::new().prefix("outrigger-demo-").tempdir().context("temporary directory")?;
                (made.path().to_owned(), Some(made))
            }
        };
        let me = std::env::current_exe().context("where am I")?;
        let programs = me.parent().context("the outrigger binary has no directory")?.to_owned();
        for program in ["outrigger-control", "outrigger-proxy"] {
            let path = programs.join(program);
            anyhow::ensure!(path.exists(), "{} is missing; `make demo` builds it", path.display());
        }
        let filter = filter.unwrap_or_else(|| default_filter(&programs));
        anyhow::ensure!(
            filter.exists(),
            "the demo's filter is missing ({}); `make demo` builds it, or name it with --filter FILE",
            filter.display()
        );
        let mut ports = free_ports(2 + 5 * 5)?.into_iter();
        let mut next = || ports.next().unwrap_or(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
        let (grpc, http) = (next(), next());
        let mut workload = |name, service, version, calls| Workload {
            name,
            service,
            version,
            calls,
            app: next(),
            inbound: next(),
            outbound: next(),
            admin: next(),
            health: next(),
        };
        let layout = Self {
            dir,
            _temporary: temporary,
            programs,
            filter,
            sabotage,
            check,
            grpc,
            http,
            workloads: vec![
                workload("web-0", "web", "v1", Some("reviews")),
                workload("reviews-v1-0", "reviews", "v1", Some("ratings")),
                workload("reviews-v2-0", "reviews", "v2", Some("ratings")),
                workload("ratings-0", "ratings", "v1", None),
            ],
            spare: workload("ratings-1", "ratings", "v1", None),
        };
        for made in [layout.config(), layout.logs(), layout.state("control")] {
            std::fs::create_dir_all(&made).with_context(|| format!("cannot make {}", made.display()))?;
        }
        layout.write_resources()?;
        Ok(layout)
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The directory of resources.
    pub(super) fn config(&self) -> PathBuf {
        self.dir.join("config")
    }

    pub(super) fn logs(&self) -> PathBuf {
        self.dir.join("logs")
    }

    pub(super) fn state(&self, of: &str) -> PathBuf {
        self.dir.join("state").join(of)
    }

    pub(super) fn program(&self, name: &str) -> PathBuf {
        self.programs.join(name)
    }

    /// The file whose weights move the canary.
    pub(super) fn route_file(&self) -> PathBuf {
        self.config().join("reviews-route.yaml")
    }

    /// Where the load goes: the web application itself, as a user's browser would.
    pub(super) fn web_url(&self) -> String {
        format!("http://{}/", self.workloads[0].app)
    }

    pub(super) fn namespace(&self) -> &'static str {
        NAMESPACE
    }

    /// The SPIFFE ID of a service's account.
    pub(super) fn identity(&self, service: &str) -> String {
        format!("spiffe://cluster.local/ns/{NAMESPACE}/sa/{service}")
    }

    /// Sends `canary` percent of reviews to v2. Replaced whole by a rename, as editors do.
    pub(super) fn write_route(&self, canary: u32) -> anyhow::Result<()> {
        let text = format!(
            "# Move the canary here: the two weights. The change shows at once.\n\
             apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: reviews, namespace: {NAMESPACE}}}\nspec:\n  \
             parentRefs: [{{group: \"\", kind: Service, name: reviews}}]\n  rules:\n  - backendRefs:\n    \
             - {{name: reviews-v1, port: 80, weight: {}}}\n    - {{name: reviews-v2, port: 80, weight: {canary}}}\n",
            100 - canary
        );
        replace(&self.route_file(), &text)
    }

    fn write_resources(&self) -> anyhow::Result<()> {
        // Short enough in the check that every certificate is replaced while it runs.
        let rotates = self.check && self.sabotage != Some(Condition::Rotation);
        let lifetime = if rotates { "24s" } else { "24h" };
        let mtls = if self.sabotage == Some(Condition::Mtls) { "Disabled" } else { "Strict" };
        let retries = if self.sabotage == Some(Condition::Retry) { 0 } else { 2 };
        let mut mesh = format!(
            "apiVersion: outrigger.dev/v1alpha1\nkind: MeshConfig\nmetadata: {{name: default}}\n\
             spec: {{trustDomain: cluster.local, certificates: {{lifetime: {lifetime}}}}}\n---\n\
             apiVersion: v1\nkind: Namespace\nmetadata: {{name: {NAMESPACE}}}\n---\n\
             apiVersion: outrigger.dev/v1alpha1\nkind: MtlsPolicy\nmetadata: {{name: all, namespace: {NAMESPACE}}}\n\
             spec: {{mode: {mtls}}}\n---\n\
             apiVersion: outrigger.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: retries, namespace: {NAMESPACE}}}\n\
             spec:\n  targetRefs: [{{group: \"\", kind: Namespace, name: {NAMESPACE}}}]\n  \
             retries: {{attempts: {retries}}}\n"
        );
        for (name, selector) in [
            ("web", "app: web"),
            ("reviews", "app: reviews"),
            ("reviews-v1", "app: reviews, version: v1"),
            ("reviews-v2", "app: reviews, version: v2"),
            ("ratings", "app: ratings"),
        ] {
            mesh.push_str(&format!(
                "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {NAMESPACE}}}\n\
                 spec: {{selector: {{{selector}}}, ports: [{{name: http, port: 80, targetPort: http}}]}}\n"
            ));
        }
        if mtls == "Strict" {
            for (service, caller) in [("reviews", "web"), ("ratings", "reviews")] {
                mesh.push_str(&format!(
                    "---\napiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\n\
                     metadata: {{name: {service}, namespace: {NAMESPACE}}}\nspec:\n  \
                     selector: {{matchLabels: {{app: {service}}}}}\n  action: Allow\n  \
                     rules: [{{from: [{{principals: [\"{}\"]}}]}}]\n",
                    self.identity(caller)
                ));
            }
        }
        replace(&self.config().join("shop.yaml"), &mesh)?;
        if self.sabotage != Some(Condition::Filter) {
            std::fs::copy(&self.filter, self.config().join("header-policy.wasm")).context("copying the filter")?;
            let filter = format!(
                "apiVersion: outrigger.dev/v1alpha1\nkind: WasmFilter\nmetadata: {{name: header-policy, namespace: {NAMESPACE}}}\n\
                 spec:\n  targetRefs: [{{group: \"\", kind: Service, name: reviews}}]\n  direction: Inbound\n  order: 10\n  \
                 module: {{file: header-policy.wasm}}\n  configuration:\n    \
                 response: {{{FILTER_HEADER}: {FILTER_VALUE}}}\n  failurePolicy: FailClosed\n"
            );
            replace(&self.config().join("filter.yaml"), &filter)?;
        }
        // Sabotage: the route sends another share to v2 than the demo believes.
        let canary = if self.sabotage == Some(Condition::Split) { 60 } else { CANARY };
        self.write_route(canary)
    }
}

fn replace(path: &Path, text: &str) -> anyhow::Result<()> {
    let partial = path.with_extension("partial");
    std::fs::write(&partial, text)
        .and_then(|()| std::fs::rename(&partial, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Where `make` leaves the filter: beside the target directory, or in the cache.
fn default_filter(programs: &Path) -> PathBuf {
    let beside = programs.join("../../filters/header_policy.wasm");
    if beside.exists() {
        return beside;
    }
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")));
    cache.map_or(beside, |cache| cache.join("outrigger/filters/header_policy.wasm"))
}

/// Ports that nobody listened on a moment ago: all held at once, so that they differ.
fn free_ports(count: usize) -> anyhow::Result<Vec<SocketAddr>> {
    let held: Vec<TcpListener> = (0..count)
        .map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))
        .collect::<Result<_, _>>()
        .context("no free port")?;
    held.iter().map(|listener| listener.local_addr().context("no free port")).collect()
}
