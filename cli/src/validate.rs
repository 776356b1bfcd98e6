//! `outrigger validate DIR`: the control plane's own reading and compiling, without a control plane.

use std::path::PathBuf;
use std::process::ExitCode;

use crate::output::{self, Format};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Directory of YAML, as given to outrigger-control --config
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

pub(crate) fn run(args: &Args, format: Format) -> anyhow::Result<ExitCode> {
    let _ = (args, format);
    output::error("validate: not built yet");
    Ok(ExitCode::FAILURE)
}
