//! What is measured.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::client::{Control, Event, Identity, Key, Proxy};
use crate::world::{self, ControlPlane, Files};

/// Nothing here takes so long.
const HANG: Duration = Duration::from_secs(60);
/// Connections over which certificates are asked for, and calls at once on each.
const SIGNERS: usize = 4;
const CALLS: usize = 8;

/// How large a mesh is.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Shape {
    pub(crate) proxies: usize,
    pub(crate) services: usize,
    pub(crate) endpoints: usize,
    /// Services that each proxy subscribes to
    pub(crate) subscriptions: usize,
    /// Services that are subscribed to at all: the first ones
    pub(crate) subscribed: usize,
}

/// A control plane with proxies.
pub(crate) struct Mesh {
    shape: Shape,
    control: Control,
    process: ControlPlane,
    files: Files,
    proxies: Vec<Proxy>,
    running: Vec<JoinHandle<Proxy>>,
    stop: tokio::sync::watch::Sender<bool>,
    events: mpsc::UnboundedReceiver<Event>,
    sender: mpsc::UnboundedSender<Event>,
    version: usize,
    _directory: tempfile::TempDir,
}

impl Mesh {
    pub(crate) async fn start(binary: &Path, shape: Shape) -> anyhow::Result<Self> {
        let directory = tempfile::tempdir()?;
        let (config, state) = (directory.path().join("config"), directory.path().join("state"));
        let files = Files::write(&config, shape.services, shape.endpoints)?;
        let process = ControlPlane::start(binary, &config, &state)?;
        let control = Control::new(process.grpc, &state)?;
        let identities = sign(&control, shape.proxies).await?;
        let proxy = |(number, identity)| {
            // Neighbours subscribe to neighbouring services, so that every service has as many subscribers.
            let first = number * shape.subscriptions;
            let services: Vec<String> =
                (first..first + shape.subscriptions).map(|service| world::name(service % shape.subscribed)).collect();
            Proxy::new(format!("w-{number}"), identity, &services)
        };
        let proxies = identities.into_iter().enumerate().map(proxy).collect();
        let (sender, events) = mpsc::unbounded_channel();
        Ok(Self {
            shape,
            control,
            process,
            files,
            proxies,
            running: Vec::new(),
            stop: tokio::sync::watch::Sender::new(false),
            events,
            sender,
            version: 0,
            _directory: directory,
        })
    }

    /// Signs certificates as fast as it can.
    pub(crate) async fn signatures(&self, count: usize) -> anyhow::Result<Value> {
        let (cpu, start) = (self.process.cpu()?, Instant::now());
        sign(&self.control, count).await?;
        let (cpu, wall) = (self.process.cpu()? - cpu, start.elapsed());
        let per = |time: Duration| (count as f64 / time.as_secs_f64()).round();
        Ok(json!({ "signed": count, "perCpuSecond": per(cpu), "perSecond": per(wall) }))
    }

    /// Connects every proxy at once.
    pub(crate) async fn connect(&mut self) -> anyhow::Result<Value> {
        let work = self.work()?;
        let (cpu, start) = (self.process.cpu()?, Instant::now());
        self.stop.send_replace(false);
        for mut proxy in std::mem::take(&mut self.proxies) {
            let (control, sender, mut stop) = (self.control.clone(), self.sender.clone(), self.stop.subscribe());
            self.running.push(tokio::spawn(async move {
                tokio::select! {
                    () = proxy.run(&control, &sender) => {}
                    _ = stop.wait_for(|stop| *stop) => {}
                }
                proxy
            }));
        }
        let (mut ready, mut resources) = (0, 0_u64);
        while ready < self.shape.proxies {
            match self.next().await? {
                Event::Ready => ready += 1,
                Event::Resource(..) => resources += 1,
                Event::Ended(why) => bail!("{why}"),
            }
        }
        let (wall, cpu) = (start.elapsed(), self.process.cpu()? - cpu);
        let mut result = json!({ "seconds": round(wall.as_secs_f64()), "cpuSeconds": round(cpu.as_secs_f64()), "resources": resources });
        self.add_work(&mut result, &work)?;
        Ok(result)
    }

    /// Cuts every connection, and connects every proxy again at once with what it holds.
    pub(crate) async fn reconnect(&mut self) -> anyhow::Result<Value> {
        self.stop.send_replace(true);
        for running in std::mem::take(&mut self.running) {
            self.proxies.push(running.await?);
        }
        while self.events.try_recv().is_ok() {}
        self.connect().await
    }

    /// Changes the endpoints or the routes of one service after the other; each once its subscribers have the one before.
    pub(crate) async fn changes(&mut self, count: usize, endpoints: bool) -> anyhow::Result<Value> {
        let subscribers = self.shape.proxies * self.shape.subscriptions / self.shape.subscribed;
        let work = self.work()?;
        let cpu = self.process.cpu()?;
        let mut latencies = Vec::new();
        for n in 0..count {
            self.version += 1;
            // All over the mesh.
            let service = (n * 7919) % self.shape.subscribed;
            let kind = if endpoints { "endpoints" } else { "svc" };
            let suffix = if endpoints { ":80/0" } else { "" };
            let wanted = format!("{kind}/{}{suffix}", world::name(service));
            let start = Instant::now();
            match endpoints {
                true => self.files.slice(service, self.version)?,
                false => self.files.route(service, self.version)?,
            }
            let mut told = 0;
            while told < subscribers {
                match self.next().await.with_context(|| format!("{wanted}: {told} of {subscribers}"))? {
                    Event::Resource(name, at) if name == wanted => {
                        told += 1;
                        latencies.push(at.saturating_duration_since(start));
                    }
                    Event::Resource(name, _) => bail!("{name} was sent, which did not change"),
                    Event::Ended(why) => bail!("{why}"),
                    Event::Ready => {}
                }
            }
        }
        let cpu = self.process.cpu()? - cpu;
        latencies.sort_unstable();
        let at = |percent: usize| {
            let index = (latencies.len() * percent / 100).min(latencies.len().saturating_sub(1));
            latencies.get(index).map_or(0.0, |time| round(time.as_secs_f64() * 1e3))
        };
        let mut result = json!({
            "changes": count,
            "received": latencies.len(),
            "ms": { "p50": at(50), "p99": at(99), "max": at(100) },
            "cpuMsPerChange": round(cpu.as_secs_f64() * 1e3 / count as f64),
        });
        self.add_work(&mut result, &work)?;
        Ok(result)
    }

    /// Resident, now and at most.
    pub(crate) fn memory(&self) -> anyhow::Result<Value> {
        Ok(json!({ "now": round(self.process.memory("VmRSS")?), "peak": round(self.process.memory("VmHWM")?) }))
    }

    async fn next(&mut self) -> anyhow::Result<Event> {
        let event = tokio::time::timeout(HANG, self.events.recv()).await.context("nothing came for a long time")?;
        event.context("all streams ended")
    }

    fn work(&self) -> anyhow::Result<BTreeMap<&'static str, u64>> {
        let counters = ["compiled_answers", "full_builds", "files_read", "pushes", "pushed_bytes"];
        counters.into_iter().map(|name| Ok((name, self.process.counter(name)?))).collect()
    }

    fn add_work(&self, result: &mut Value, before: &BTreeMap<&'static str, u64>) -> anyhow::Result<()> {
        for (name, now) in self.work()? {
            result[name] = json!(now - before.get(name).copied().unwrap_or_default());
        }
        Ok(())
    }
}

/// Keys are made before; what is timed is the control plane's part.
async fn sign(control: &Control, count: usize) -> anyhow::Result<Vec<Identity>> {
    let mut keys = (0..count).map(|number| Ok((number, Key::new()?))).collect::<anyhow::Result<Vec<_>>>()?;
    let mut calls = Vec::new();
    for _ in 0..SIGNERS {
        let channel = control.connect(None).await?;
        for _ in 0..CALLS {
            let share = keys.split_off(keys.len() - keys.len() / (SIGNERS * CALLS - calls.len()));
            let (control, channel) = (control.clone(), channel.clone());
            calls.push(tokio::spawn(async move {
                let mut signed = Vec::new();
                for (number, key) in share {
                    signed.push((number, control.sign(channel.clone(), &format!("w-{number}"), key).await?));
                }
                anyhow::Ok(signed)
            }));
        }
    }
    let mut signed = Vec::new();
    for call in calls {
        signed.extend(call.await??);
    }
    signed.sort_by_key(|(number, _)| *number);
    Ok(signed.into_iter().map(|(_, identity)| identity).collect())
}

fn round(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}
