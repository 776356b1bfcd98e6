//! `make bench-scale`: the control plane with many proxies, services and changes. Prints JSON.
//!
//! It speaks the discovery protocol over mutual TLS as proxies do; only what they do with the answers is left out.

mod client;
mod measure;
mod world;

use std::path::PathBuf;

use clap::Parser;
use serde_json::json;

use measure::{Mesh, Shape};

#[derive(Debug, Parser)]
#[command(about = "Measures the control plane")]
struct Flags {
    /// The control plane's binary
    #[arg(long)]
    control: PathBuf,
    /// Proxies
    #[arg(long, default_value_t = 1000)]
    proxies: usize,
    /// Services
    #[arg(long, default_value_t = 1000)]
    services: usize,
    /// Endpoints per service
    #[arg(long, default_value_t = 10)]
    endpoints: usize,
    /// Services that each proxy subscribes to
    #[arg(long, default_value_t = 20)]
    subscriptions: usize,
    /// Services that are subscribed to at all [default: every one]
    #[arg(long)]
    subscribed: Option<usize>,
    /// Changes of each kind
    #[arg(long, default_value_t = 50)]
    changes: usize,
    /// Certificates signed beside those of the proxies
    #[arg(long, default_value_t = 2000)]
    signatures: usize,
    /// Also the cost of a change by size of the mesh and by number of subscribers
    #[arg(long)]
    curve: bool,
    /// Where the results go
    #[arg(long)]
    json: Option<PathBuf>,
}

#[expect(clippy::print_stdout, reason = "its results")]
fn main() -> anyhow::Result<()> {
    let flags = Flags::parse();
    let (_, hard) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)?;
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, hard.min(1 << 16), hard)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let results = runtime.block_on(run(&flags))?;
    let text = serde_json::to_string_pretty(&results)?;
    println!("{text}");
    if let Some(path) = &flags.json {
        std::fs::write(path, text + "\n")?;
    }
    Ok(())
}

async fn run(flags: &Flags) -> anyhow::Result<serde_json::Value> {
    let shape = Shape {
        proxies: flags.proxies,
        services: flags.services,
        endpoints: flags.endpoints,
        subscriptions: flags.subscriptions,
        subscribed: flags.subscribed.unwrap_or(flags.services).min(flags.services),
    };
    let mut mesh = Mesh::start(&flags.control, shape).await?;
    let certificates = mesh.signatures(flags.signatures).await?;
    let first = mesh.connect().await?;
    let loaded = mesh.memory()?;
    let endpoints = mesh.changes(flags.changes, true).await?;
    let routes = mesh.changes(flags.changes, false).await?;
    let reconnect = mesh.reconnect().await?;
    let memory = mesh.memory()?;
    drop(mesh);
    let mut curve = Vec::new();
    if flags.curve {
        // Twenty subscribers each, in meshes of several sizes; then several numbers of subscribers in one of 1,000.
        let by_size = [500, 1000, 2000, 5000].map(|services| (services, 20));
        let by_subscribers = [5, 80].map(|subscribers| (1000, subscribers));
        for (services, subscribers) in by_size.into_iter().chain(by_subscribers) {
            let shape =
                Shape { proxies: 200, services, endpoints: 10, subscriptions: 20, subscribed: 4000 / subscribers };
            let mut mesh = Mesh::start(&flags.control, shape).await?;
            mesh.connect().await?;
            let endpoints = mesh.changes(flags.changes, true).await?;
            let routes = mesh.changes(flags.changes, false).await?;
            curve.push(
                json!({ "services": services, "subscribers": subscribers, "endpoints": endpoints, "routes": routes }),
            );
        }
    }
    Ok(json!({
        "shape": shape,
        "certificates": certificates,
        "connect": first,
        "rssMiB": { "connected": loaded, "end": memory },
        "endpointChange": endpoints,
        "routeChange": routes,
        "reconnect": reconnect,
        "curve": curve,
    }))
}
