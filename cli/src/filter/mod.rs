//! `outrigger filter`.

mod attach;
mod bench;
mod build;
mod host;
mod inspect;
mod new;
mod run;
mod status;
mod test;
mod watch;

use std::process::ExitCode;

use clap::Subcommand;

use crate::Global;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: FilterCommand,
}

#[derive(Debug, Subcommand)]
enum FilterCommand {
    /// Make a project: a filter that builds, and cases that it passes
    New(new::New),
    /// Build a filter in Rust, AssemblyScript or C
    Build(build::Build),
    /// Serve a filter on a port, in front of a server, and load it anew when it is rebuilt
    Run(run::Run),
    /// What a filter costs: beside an empty one, and beside an earlier measurement
    Bench(bench::Args),
    /// What a module is made of, and whether a proxy would load it
    Inspect(inspect::Inspect),
    /// Give the control plane a module; prints its digest
    Push(attach::Push),
    /// Put a filter before services or workloads, and wait until their proxies serve by it
    Attach(Box<attach::Attach>),
    /// Take away a filter that was attached
    Detach(attach::Detach),
    /// Filters, which proxies serve by them, and how they do there
    Status(status::Status),
    /// Run cases of filters, written in YAML, without a proxy
    Test(test::Test),
}

pub(crate) fn run(args: Args, global: &Global) -> anyhow::Result<ExitCode> {
    match args.command {
        FilterCommand::New(new) => new::run(&new, global),
        FilterCommand::Build(build) => build::run(&build, global),
        FilterCommand::Run(run) => run::run(&run),
        FilterCommand::Bench(args) => bench::run(&args, global),
        FilterCommand::Inspect(inspect) => inspect::run(&inspect, global),
        FilterCommand::Push(push) => attach::push(&push, global),
        FilterCommand::Attach(attach) => attach::attach(&attach, global),
        FilterCommand::Detach(detach) => attach::detach(&detach, global),
        FilterCommand::Status(status) => status::run(&status, global),
        FilterCommand::Test(args) => test::run(&args, global),
    }
}
