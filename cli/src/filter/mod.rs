//! `outrigger filter`.

mod attach;
mod status;
mod test;

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
        FilterCommand::Push(push) => attach::push(&push, global),
        FilterCommand::Attach(attach) => attach::attach(&attach, global),
        FilterCommand::Detach(detach) => attach::detach(&detach, global),
        FilterCommand::Status(status) => status::run(&status, global),
        FilterCommand::Test(args) => test::run(&args, global),
    }
}
