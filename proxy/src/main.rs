//! `outrigger-proxy`: flags, then [`outrigger_proxy::run`].

use std::process::ExitCode;

use clap::Parser;
use outrigger_proxy::flags::Flags;

// Connections and pools free memory on the thread that made it; jemalloc gives most of it back.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

#[allow(clippy::print_stderr)] // what is said before there is a log
fn main() -> ExitCode {
    let settings = match Flags::parse().settings() {
        Ok(settings) => settings,
        Err(error) => {
            eprintln!("outrigger-proxy: {error}");
            return ExitCode::from(2);
        }
    };
    match outrigger_proxy::run::run(settings) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("outrigger-proxy: {error:#}");
            ExitCode::FAILURE
        }
    }
}
