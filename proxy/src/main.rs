//! `outrigger-proxy`: flags, then [`outrigger_proxy::run`].

use std::process::ExitCode;

use clap::Parser;
use outrigger_proxy::flags::Flags;

// Connections and pools free memory on the thread that made it; jemalloc gives most of it back.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

#[allow(clippy::print_stderr)] // what is said before there is a log
fn main() -> ExitCode {
    // Filters are compiled by a child of the same executable, with limits of its own.
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    if let Some(code) = outrigger_proxy::filter::wasm::compile_main(&arguments) {
        return ExitCode::from(u8::try_from(code).unwrap_or(1));
    }
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
