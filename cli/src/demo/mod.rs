//! `outrigger demo`: a control plane and a small shop of four services, each with a sidecar, under load.

pub(crate) mod app;

use std::process::ExitCode;

use crate::output;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Unattended: observe what a mesh must do, and exit non-zero naming what was not observed
    #[arg(long)]
    check: bool,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let _ = args.check;
    output::error("demo: not built yet");
    Ok(ExitCode::FAILURE)
}
