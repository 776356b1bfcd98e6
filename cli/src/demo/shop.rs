//! The running demo: control plane, applications, sidecars.

use std::net::SocketAddr;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Context as _;

use super::layout::{Layout, Workload};
use super::observe::{self, Scrape};
use super::process::Process;
use super::{POLL, say};

/// Until a part must be ready.
const START: Duration = Duration::from_secs(20);

/// Everything that runs.
#[derive(Debug)]
pub(super) struct Shop {
    layout: Layout,
    control: Process,
    pairs: Vec<(Workload, Process, Process)>,
}

impl Shop {
    /// Starts all of it and waits until every sidecar is ready.
    pub(super) async fn start(layout: Layout) -> anyhow::Result<Self> {
        let state = layout.state("control");
        let control = Process::start(
            "control-plane",
            &layout.program("outrigger-control"),
            &strings(&[
                ("--config", layout.config().display().to_string()),
                ("--state", state.display().to_string()),
                ("--grpc", layout.grpc.to_string()),
                ("--http", layout.http.to_string()),
                ("--lease", "5s".into()),
            ]),
            &layout.logs(),
        )?;
        let mut shop = Self { layout, control, pairs: Vec::new() };
        shop.wait_ready(None, shop.layout.http, "/healthz").await?;
        for workload in shop.layout.workloads.clone() {
            shop.add(workload)?;
        }
        for index in 0..shop.pairs.len() {
            let health = shop.pairs[index].0.health;
            shop.wait_ready(Some(index), health, "/ready").await?;
            say(&format!("{} is ready", shop.pairs[index].0.name));
        }
        Ok(shop)
    }

    pub(super) fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The workloads that were started.
    pub(super) fn workloads(&self) -> impl Iterator<Item = &Workload> {
        self.pairs.iter().map(|(workload, ..)| workload)
    }

    /// Starts the second instance of ratings and waits until it is ready.
    pub(super) async fn add_spare(&mut self) -> anyhow::Result<()> {
        let spare = self.layout.spare.clone();
        let health = spare.health;
        self.add(spare)?;
        self.wait_ready(Some(self.pairs.len() - 1), health, "/ready").await
    }

    /// Kills the second instance of ratings, sidecar and application at once, as a lost host.
    pub(super) fn crash_spare(&mut self) {
        let name = self.layout.spare.name;
        for (_, proxy, app) in self.pairs.iter_mut().filter(|(workload, ..)| workload.name == name) {
            proxy.crash();
            app.crash();
        }
        self.pairs.retain(|(workload, ..)| workload.name != name);
    }

    /// What every sidecar says of itself.
    pub(super) async fn scrapes(&self) -> Vec<(Workload, Scrape)> {
        let mut all = Vec::new();
        for workload in self.workloads() {
            if let Ok(scrape) = Scrape::of(workload.health).await {
                all.push((workload.clone(), scrape));
            }
        }
        all
    }

    /// Ends everything, sidecars first so that they can withdraw.
    pub(super) async fn stop(mut self) {
        for (_, proxy, _) in &self.pairs {
            proxy.terminate();
        }
        let by = Instant::now() + Duration::from_secs(3);
        for (_, proxy, _) in &mut self.pairs {
            proxy.ended(by).await;
        }
        self.control.terminate();
        self.control.ended(Instant::now() + Duration::from_secs(2)).await;
    }

    fn add(&mut self, workload: Workload) -> anyhow::Result<()> {
        let layout = &self.layout;
        let mut app = vec!["demo-app".to_owned()];
        app.extend(strings(&[
            ("--name", workload.service.into()),
            ("--version", workload.version.into()),
            ("--listen", workload.app.to_string()),
        ]));
        if let Some(service) = workload.calls {
            app.extend(strings(&[("--calls", service.into()), ("--proxy", workload.outbound.to_string())]));
        }
        let me = std::env::current_exe().context("where am I")?;
        let app = Process::start(&format!("{}-app", workload.name), &me, &app, &layout.logs())?;
        let labels = format!("app={},version={}", workload.service, workload.version);
        let token = layout.state(workload.name).join("join-token");
        std::fs::create_dir_all(layout.state(workload.name)).context("state directory")?;
        std::fs::write(&token, self.token(&workload, &labels)?).context("join token")?;
        let proxy = Process::start(
            &format!("{}-proxy", workload.name),
            &layout.program("outrigger-proxy"),
            &strings(&[
                ("--name", workload.name.into()),
                ("--namespace", layout.namespace().into()),
                ("--service-account", workload.service.into()),
                ("--labels", labels),
                ("--app", format!("{}/http1", workload.app)),
                ("--control-plane", format!("https://{}", layout.grpc)),
                ("--ca-file", layout.state("control").join("root.pem").display().to_string()),
                ("--token-file", token.display().to_string()),
                ("--state", layout.state(workload.name).display().to_string()),
                ("--inbound", workload.inbound.to_string()),
                ("--outbound", workload.outbound.to_string()),
                ("--admin", workload.admin.to_string()),
                ("--health", workload.health.to_string()),
                ("--workers", "1".into()),
            ]),
            &layout.logs(),
        )?;
        self.pairs.push((workload, proxy, app));
        Ok(())
    }

    /// A single-use token for one workload, made with the command that people use.
    fn token(&self, workload: &Workload, labels: &str) -> anyhow::Result<String> {
        let made = Command::new(std::env::current_exe().context("where am I")?)
            .args(["token", "create", "--single-use", "--ttl", "10m", "--labels", labels])
            .args(["--namespace", self.layout.namespace(), "--service-account", workload.service])
            .arg("--state")
            .arg(self.layout.state("control"))
            .args(["--control", &format!("http://{}", self.layout.http)])
            .output()
            .context("outrigger token create")?;
        anyhow::ensure!(made.status.success(), "outrigger token create: {}", String::from_utf8_lossy(&made.stderr));
        Ok(String::from_utf8_lossy(&made.stdout).trim().to_owned())
    }

    /// Waits for a 200. `pair`: whose processes must live meanwhile, beside the control plane.
    async fn wait_ready(&mut self, pair: Option<usize>, address: SocketAddr, path: &str) -> anyhow::Result<()> {
        let end = Instant::now() + START;
        loop {
            self.control.alive()?;
            if let Some((_, proxy, app)) = pair.and_then(|index| self.pairs.get_mut(index)) {
                proxy.alive()?;
                app.alive()?;
            }
            let Err(e) = observe::get(address, path).await else { return Ok(()) };
            if Instant::now() > end {
                let of = pair.map_or(&self.control, |index| &self.pairs[index].1);
                anyhow::bail!(
                    "{} is not ready after {} s ({e:#}). The end of its log:\n{}",
                    of.name,
                    START.as_secs(),
                    of.tail()
                );
            }
            tokio::time::sleep(POLL).await;
        }
    }
}

fn strings(flags: &[(&str, String)]) -> Vec<String> {
    flags.iter().flat_map(|(flag, value)| [(*flag).to_owned(), value.clone()]).collect()
}
