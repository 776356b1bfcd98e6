//! `outrigger demo`: a whole mesh on this machine, with load, to watch or (`--check`) to prove.

pub(crate) mod app;
mod check;
mod layout;
mod load;
mod observe;
mod process;
mod shop;
mod view;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;

use check::Condition;
use layout::Layout;
use shop::Shop;

/// Starts a control plane and a small shop (web → reviews v1 and v2 → ratings), each workload with a sidecar, and sends
/// load through it.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Prove the demo instead of showing it: exits 0 when everything was observed, 1 with the reason otherwise
    #[arg(long)]
    check: bool,
    /// Requests per second
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..=2000))]
    rate: u32,
    /// Where the demo keeps its files; a temporary directory, removed at the end, when left out
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// The filter to run (built by `make demo`)
    #[arg(long, value_name = "FILE")]
    filter: Option<PathBuf>,
    /// Breaks one thing on purpose, to show that --check notices
    #[arg(long, hide = true, requires = "check")]
    sabotage: Option<Condition>,
}

/// Runs the demo until Ctrl-C, or `--check` to its verdict.
///
/// # Errors
/// When a part cannot be started: which, why, and the end of its log.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    tokio::runtime::Runtime::new().context("starting the runtime")?.block_on(show_or_check(args))
}

async fn show_or_check(args: Args) -> anyhow::Result<ExitCode> {
    let layout = Layout::create(args.dir, args.filter, args.sabotage, args.check)?;
    let mut interrupted = Box::pin(async {
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        tokio::select! {
            done = tokio::signal::ctrl_c() => done,
            _ = terminate.recv() => Ok(()),
        }
    });
    say(&format!("starting a control plane and four workloads with sidecars, files in {}", layout.dir().display()));
    let mut shop = tokio::select! {
        shop = Shop::start(layout) => shop?,
        _ = &mut interrupted => return Ok(ExitCode::from(130)),
    };
    let load = load::start(shop.layout().web_url(), args.rate, args.sabotage == Some(Condition::Traffic));
    let code = if args.check {
        tokio::select! {
            verdict = tokio::time::timeout(check::LIMIT, check::run(&mut shop, &load)) => report(verdict),
            _ = &mut interrupted => ExitCode::from(130),
        }
    } else {
        tokio::select! {
            end = view::run(&shop, &load) => end.map(|()| ExitCode::SUCCESS)?,
            end = &mut interrupted => end.context("waiting for Ctrl-C").map(|()| ExitCode::SUCCESS)?,
        }
    };
    load.stop();
    say("stopping everything");
    shop.stop().await;
    Ok(code)
}

fn report(verdict: Result<Result<(), check::Failure>, tokio::time::error::Elapsed>) -> ExitCode {
    match verdict {
        Ok(Ok(())) => {
            say("every condition was observed");
            ExitCode::SUCCESS
        }
        Ok(Err(failure)) => fail(&failure.to_string()),
        Err(_) => fail(&format!("not finished within {} s", check::LIMIT.as_secs())),
    }
}

fn fail(why: &str) -> ExitCode {
    say(&format!("FAILED: {why}"));
    ExitCode::FAILURE
}

/// One line of progress.
#[allow(clippy::print_stdout)]
fn say(line: &str) {
    println!("demo: {line}");
}

/// How often something that is waited for is looked at.
const POLL: Duration = Duration::from_millis(100);
