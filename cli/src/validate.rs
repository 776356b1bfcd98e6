//! `outrigger validate DIR`: the control plane's own reading and compiling, without a control plane.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use outrigger_control::modules::store::ModuleStore;
use outrigger_control::source::Sources;
use outrigger_control::store::Store;
use outrigger_core::compile::{self, Catalog, Inputs, Module, Modules};
use outrigger_core::resource::{ModuleSource, Rejection, Skipped};
use serde::Serialize;

use crate::output::{self, Format};

/// Used where the configuration names none; as the control plane's flag.
const TRUST_DOMAIN: &str = "cluster.local";

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Directory of YAML, as given to outrigger-control --config
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

/// What was found.
#[derive(Debug, Serialize)]
struct Report {
    files: usize,
    accepted: usize,
    /// Errors: these would not serve
    rejected: Vec<Rejection>,
    /// Accepted, and still worth a look
    warnings: Vec<Rejection>,
    skipped: Vec<Skipped>,
}

pub(crate) fn run(args: &Args, format: Format) -> anyhow::Result<ExitCode> {
    let report = validate(&args.directory)?;
    match format {
        Format::Json => output::json(&report)?,
        Format::Table => print(&report)?,
    }
    Ok(if report.rejected.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn validate(directory: &Path) -> anyhow::Result<Report> {
    let files = Sources::new(&[directory]).scan().with_context(|| {
        format!("{}: give the directory that outrigger-control --config reads", directory.display())
    })?;
    // Stores of this run alone: nothing here has an earlier version.
    let scratch = tempfile::tempdir().context("cannot make a temporary directory")?;
    let mut store = Store::open(scratch.path().join("last-good"))?;
    let count = files.len();
    store.begin(files);
    let (resources, accepted) = (store.resources(), store.accepted());
    let mut modules = ModuleStore::open(scratch.path().join("modules"))?;
    let wanted = compile::wanted_modules(&resources);
    let trust_domain = compile::wanted_trust_domain(&resources).unwrap_or_else(|| TRUST_DOMAIN.to_owned());
    let total = resources.len();
    let inputs = Inputs {
        resources,
        registrations: Vec::new(),
        trust_domain,
        closed: accepted.closed.clone(),
        modules: here(&wanted, &mut modules),
        ..Inputs::default()
    };
    let (catalog, conflicts) = Catalog::build(inputs);
    let left_out = conflicts.len();
    let mut rejected: Vec<Rejection> = accepted.rejected.iter().map(|rejected| rejected.rejection.clone()).collect();
    rejected.extend(conflicts);
    rejected.sort_by(|a, b| (&a.file, a.line, &a.field).cmp(&(&b.file, b.line, &b.field)));
    Ok(Report {
        files: count,
        accepted: total.saturating_sub(left_out),
        rejected,
        warnings: catalog.warnings(),
        skipped: accepted.skipped.clone(),
    })
}

/// The modules of files. What is on other hosts, and what was pushed, is not looked for here: it is taken to be there.
fn here(wanted: &BTreeMap<ModuleSource, BTreeSet<String>>, modules: &mut ModuleStore) -> Modules {
    let mut found = modules.load(wanted.keys());
    let mut held = modules.held();
    for (source, pinned) in wanted.iter().filter(|(source, _)| !matches!(source, ModuleSource::File(_))) {
        held.extend(pinned.iter().map(|digest| (digest.clone(), 0)));
        found.entry(source.clone()).or_insert_with(|| Module { sha256: String::new(), size: 0 });
    }
    Modules { found, held, problems: BTreeMap::new() }
}

fn print(report: &Report) -> std::io::Result<()> {
    for skipped in &report.skipped {
        output::line(&skipped.to_string())?;
    }
    for warning in &report.warnings {
        output::line(&format!("{warning} (warning)"))?;
    }
    for rejection in &report.rejected {
        output::line(&rejection.to_string())?;
    }
    let Report { files, accepted, rejected, skipped, .. } = report;
    let (rejected, skipped) = (rejected.len(), skipped.len());
    output::line(&format!("{accepted} accepted, {rejected} rejected, {skipped} skipped, in {files} files"))
}
