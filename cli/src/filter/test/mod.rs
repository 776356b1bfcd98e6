//! `outrigger filter test`: cases of filters against the host that serves traffic, without a proxy.

mod find;
mod read;
mod record;
mod report;
mod yaml;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;

use anyhow::Context as _;
use outrigger_proxy::filter::cases::{Case, Outcome, Runner};

use self::read::File;
use self::report::{Ran, Report, Result as Verdict};
use crate::Global;
use crate::output::{self, Format};

/// Exit code when cases or modules cannot be read.
const UNREADABLE: u8 = 2;
/// Stack of the thread that a case runs on: guests use a part of it.
const STACK: usize = 8 << 20;

#[derive(Debug, clap::Args)]
pub(super) struct Test {
    /// Files of cases, or directories: cases.yaml and cases/*.yaml in them, or in the directories in them [default: .]
    #[arg(value_name = "PATH")]
    paths: Vec<PathBuf>,
    /// Only cases whose name contains this
    #[arg(long, value_name = "TEXT")]
    name: Option<String>,
    /// Where modules are, instead of the directory of the cases
    #[arg(long, value_name = "DIR")]
    modules: Option<PathBuf>,
    /// Write what was observed into the expectations of steps that differ, or have none
    #[arg(long)]
    record: bool,
}

impl Test {
    fn wants(&self, case: &Case) -> bool {
        self.name.as_ref().is_none_or(|name| case.name.contains(name.as_str()))
    }
}

/// Exit code 0: all pass; 1: some fail; 2: something cannot be read.
pub(super) fn run(args: &Test, global: &Global) -> anyhow::Result<ExitCode> {
    let here = [PathBuf::from(".")];
    let mut report = Report::default();
    for path in find::files(if args.paths.is_empty() { &here } else { &args.paths }, &mut report.unreadable) {
        match File::read(&path, args.modules.as_deref()) {
            Ok(file) => run_file(&file, args, global.output, &mut report)?,
            Err(why) => report.unreadable.push(why.to_string()),
        }
    }
    if report.unreadable.is_empty() && report.ran() == 0 {
        report.unreadable.push(match &args.name {
            Some(name) => format!("no case is called `{name}`"),
            None => "there are no cases".to_owned(),
        });
    }
    report.end(global.output)?;
    Ok(match (report.unreadable.is_empty(), report.failed) {
        (false, _) => ExitCode::from(UNREADABLE),
        (true, 0) => ExitCode::SUCCESS,
        (true, _) => ExitCode::FAILURE,
    })
}

fn run_file(file: &File, args: &Test, format: Format, report: &mut Report) -> anyhow::Result<()> {
    let compiled = tempfile::tempdir().context("cannot make a directory for compiled modules")?;
    report.begin(file, format)?;
    let mut recorded = Vec::new();
    for (index, case) in file.suite.cases.iter().enumerate().filter(|(_, case)| args.wants(case)) {
        let mut ran = Ran::new(&case.name, file.line(&format!("cases[{index}]")));
        match &case.proxy_only {
            Some(why) => ran.result = Verdict::Skipped(why.clone()),
            None => {
                let outcome = play(file, case, &compiled.path().join("filters"))?;
                ran.took = outcome.took;
                if !outcome.differences.is_empty() {
                    ran.result = Verdict::Failed;
                }
                if args.record {
                    if record::places(case, &outcome) > 0 {
                        ran.result = Verdict::Recorded;
                    }
                    recorded.push((index, outcome.clone()));
                }
                ran.outcome = outcome;
            }
        }
        report.add(ran, format)?;
    }
    if args.record {
        match record::write(file, &recorded) {
            Ok(steps) => report.recorded += steps,
            Err(error) => {
                let why = format!("{error:#}");
                report.not_recorded(&why);
            }
        }
    }
    Ok(())
}

/// Runs a case on a thread of its own: what filters leave behind on a worker ends with it.
fn play(file: &File, case: &Case, compiled: &Path) -> anyhow::Result<Outcome> {
    let run = || -> anyhow::Result<Outcome> {
        let modules = |name: &str| file.module(name);
        let runner = Runner::new(compiled, &modules, &[]).context("cannot start the filters' host")?;
        Ok(runner.run(case)?)
    };
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("case".into()).stack_size(STACK).spawn_scoped(scope, run)?;
        thread.join().unwrap_or_else(|_| Err(anyhow::anyhow!("case `{}` ended the host: please report it", case.name)))
    })
}

/// A text in a colour, where stdout is a terminal.
fn paint(colour: u8, text: &str) -> String {
    if output::is_colourful() { format!("\x1b[{colour}m{text}\x1b[0m") } else { text.to_owned() }
}
