//! `outrigger`: the command for people. It talks to the control plane's HTTP API, checks configuration with the same
//! compiler as the control plane, installs interception, and runs the demo.

mod client;
mod demo;
mod filter;
mod intercept;
mod output;
mod status;
mod token;
mod validate;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use crate::client::Control;
use crate::output::Format;

/// Install, inspect and explain an Outrigger mesh.
#[derive(Debug, Parser)]
#[command(name = "outrigger", version)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Flags of every command.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Global {
    /// HTTP API of the control plane
    #[arg(
        long,
        global = true,
        env = "OUTRIGGER_CONTROL",
        value_name = "URL",
        default_value = "http://127.0.0.1:15014"
    )]
    control: String,
    /// How results are written
    #[arg(short = 'o', long = "output", global = true, value_enum, default_value = "table")]
    output: Format,
}

impl Global {
    fn control(&self) -> anyhow::Result<Control> {
        Control::new(&self.control)
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a mesh of four small services on this machine, with load and a live view
    Demo(demo::Args),
    /// WASM filters: write, build, run, measure; push, attach, detach, and how they do
    Filter(filter::Args),
    /// Redirect this host's or pod's traffic to its proxy, with nftables
    Intercept(intercept::Args),
    /// Join tokens, with which proxies get their first certificate
    Token(token::Args),
    /// Proxies, what they acknowledged or refused, and rejected resources
    Status,
    /// Check a directory of YAML as the control plane would
    Validate(validate::Args),
    /// Print the version
    Version,
    /// Print a completion script: outrigger completion bash > /etc/bash_completion.d/outrigger
    Completion {
        /// The shell
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
    /// The applications of the demo's shop
    #[command(hide = true)]
    DemoApp(demo::app::Args),
}

fn main() -> ExitCode {
    // Filters that run here are compiled by a child of the same executable, with limits of its own.
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    if let Some(code) = outrigger_proxy::filter::wasm::compile_main(&arguments) {
        return ExitCode::from(u8::try_from(code).unwrap_or(1));
    }
    let cli = Cli::parse();
    match run(cli) {
        Ok(code) => code,
        // The reader of a pipe went away (`outrigger status | head`): no error of ours.
        Err(error) if output::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            output::error(&format!("outrigger: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let Cli { global, command } = cli;
    match command {
        Command::Demo(args) => demo::run(args),
        Command::DemoApp(args) => demo::app::run(args),
        Command::Filter(args) => filter::run(args, &global),
        Command::Intercept(args) => intercept::run(&args, global.output),
        Command::Token(args) => token::run(&args, &global),
        Command::Status => status::run(&global),
        Command::Validate(args) => validate::run(&args, global.output),
        Command::Version => {
            let version = env!("CARGO_PKG_VERSION");
            match global.output {
                Format::Table => output::line(&format!("outrigger {version}"))?,
                Format::Json => output::json(&serde_json::json!({ "version": version }))?,
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "outrigger", &mut script);
            output::bytes(&script)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
