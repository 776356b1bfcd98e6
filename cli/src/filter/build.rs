//! `outrigger filter build`: the repository's own `filters/build.sh`, on one project.

use std::io::{BufRead as _, BufReader, IsTerminal as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context as _, ensure};
use sha2::{Digest as _, Sha256};

use crate::Global;
use crate::output::{self, Format};

#[derive(Debug, clap::Args)]
pub(super) struct Build {
    /// The project: with Cargo.toml (Rust), assembly/index.ts (AssemblyScript) or *.c (C)
    #[arg(value_name = "DIR", default_value = ".")]
    directory: PathBuf,
    /// Where the modules go [default: DIR/build]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

const SCRIPT: &str = include_str!("../../../filters/build.sh");

/// How the script tells what it made: `==> built FILE (SIZE)`.
const BUILT: &str = "==> built ";

/// Fails (exit code 1) when it does not build; what the compiler says goes to standard error.
pub(super) fn run(args: &Build, global: &Global) -> anyhow::Result<ExitCode> {
    let directory = &args.directory;
    ensure!(directory.is_dir(), "{} is not a directory", directory.display());
    let out = args.out.clone().unwrap_or_else(|| directory.join("build"));
    // cargo runs in the project's directory.
    let cargo = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| directory.join("target"), PathBuf::from);
    let cargo = std::path::absolute(cargo).context("the current directory")?;
    let mut child = Command::new("sh")
        .args(["-c", SCRIPT, "build.sh", "--one"])
        .arg(plain(directory))
        .env("OUTRIGGER_FILTERS_DIR", &out)
        .env("OUTRIGGER_CARGO_DIR", cargo)
        .env("OUTRIGGER_BUILD_QUIET", if std::io::stderr().is_terminal() { "" } else { "--quiet" })
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("sh cannot be started")?;
    let mut modules = Vec::new();
    for line in BufReader::new(child.stdout.take().context("sh has no output")?).lines() {
        let line = line.context("what sh says")?;
        if let Some((file, _)) = line.strip_prefix(BUILT).and_then(|rest| rest.rsplit_once(" (")) {
            modules.push(PathBuf::from(file));
        }
        match global.output {
            Format::Table => output::line(&line)?,
            Format::Json => output::error(&line),
        }
    }
    let status = child.wait().context("sh")?;
    if global.output == Format::Json && status.success() {
        let rows: anyhow::Result<Vec<_>> = modules.iter().map(|file| row(file)).collect();
        output::json(&rows?)?;
    }
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// No path that looks like a flag.
fn plain(path: &Path) -> PathBuf {
    if path.as_os_str().as_encoded_bytes().starts_with(b"-") { Path::new(".").join(path) } else { path.to_owned() }
}

fn row(file: &Path) -> anyhow::Result<serde_json::Value> {
    let bytes = std::fs::read(file).with_context(|| file.display().to_string())?;
    let sha256: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(serde_json::json!({ "file": file, "size": bytes.len(), "sha256": sha256 }))
}
