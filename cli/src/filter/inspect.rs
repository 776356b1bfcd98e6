//! `outrigger filter inspect`: what a module is made of, and whether a proxy would load it.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use outrigger_proxy::filter::wasm::{Inspection, Memory, inspect};

use super::host;
use crate::Global;
use crate::output::{self, Format, table};

#[derive(Debug, clap::Args)]
pub(super) struct Inspect {
    /// The module
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Also try it with this configuration: a text, or @FILE; a filter that does not take it counts as refused
    #[arg(long, value_name = "TEXT|@FILE")]
    configuration: Option<String>,
}

/// Fails (exit code 1) when a proxy would refuse it.
pub(super) fn run(args: &Inspect, global: &Global) -> anyhow::Result<ExitCode> {
    let module = host::read_module(&args.file)?;
    let configuration = host::configuration(args.configuration.as_deref())?;
    host::log("info", false)?;
    let scratch = tempfile::tempdir().context("cannot make a temporary directory")?;
    let runtime = host::runtime()?;
    let found = runtime.block_on(inspect(module.into(), &configuration, &host::compiler()?, scratch.path()))?;
    let refused = found.refused.is_some() || (args.configuration.is_some() && found.configuration.is_some());
    match global.output {
        Format::Json => {
            let mut value = serde_json::to_value(&found)?;
            if let Some(object) = value.as_object_mut() {
                object.insert("file".into(), args.file.display().to_string().into());
                object.insert("loads".into(), (!refused).into());
            }
            output::json(&value)?;
        }
        Format::Table => {
            let file = args.file.display().to_string();
            output::line(render(&file, &found, args.configuration.is_some()).trim_end())?;
        }
    }
    Ok(if refused { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn render(file: &str, found: &Inspection, configured: bool) -> String {
    let mut rows =
        vec![("module", file.to_owned()), ("sha256", found.sha256.clone()), ("size", host::bytes(found.size))];
    rows.push(("ABI", found.abi.as_ref().map_or("none that is served".into(), |abi| format!("Proxy-Wasm {abi}"))));
    rows.push(("made with", made(found)));
    if let Some(memory) = &found.memory {
        rows.push(("memory", memory_text(memory)));
    }
    if let Some(ms) = found.compile_ms {
        rows.push(("compile time", format!("{ms:.0} ms")));
    }
    rows.push(match (&found.refused, &found.configuration) {
        (Some(why), _) => ("refused", why.clone()),
        (None, Some(why)) if configured => ("refused", format!("with this configuration, {why}")),
        (None, Some(why)) => {
            ("loads", format!("yes, but without a configuration {why} (try one with --configuration)"))
        }
        (None, None) => ("loads", "yes".into()),
    });
    let rows: Vec<Vec<String>> = rows.into_iter().map(|(name, value)| vec![name.to_owned(), value]).collect();
    let mut text = table(&["", ""], &rows).trim_start().to_owned();
    let mut part = |header: &[&str], rows: Vec<Vec<String>>| {
        if !rows.is_empty() {
            text.push('\n');
            text.push_str(&table(header, &rows));
        }
    };
    part(
        &["SECTION", "SIZE"],
        found.sections.iter().map(|section| vec![section.name.clone(), host::bytes(section.size)]).collect(),
    );
    let imports = found.imports.iter().map(|import| {
        let served = if import.served { "yes" } else { "NO" };
        vec![format!("{}.{}", import.module, import.name), served.to_owned(), import.ty.clone()]
    });
    part(&["IMPORT", "SERVED", "TYPE"], imports.collect());
    part(
        &["EXPORT", "TYPE"],
        found.exports.iter().map(|export| vec![export.name.clone(), export.ty.clone()]).collect(),
    );
    text
}

fn made(found: &Inspection) -> String {
    let one = |made: &outrigger_proxy::filter::wasm::Producer| {
        let version = made.version.split(" (").next().unwrap_or_default();
        let name = if made.field == "guess" { format!("{}, by the looks of it", made.name) } else { made.name.clone() };
        format!("{name} {version}").trim().to_owned()
    };
    let all: Vec<String> = found.made.iter().map(one).collect();
    if all.is_empty() { "unknown: it has no section `producers`".into() } else { all.join(", ") }
}

fn memory_text(memory: &Memory) -> String {
    let most = memory.maximum.map_or("no maximum of its own".into(), |most| format!("at most {}", host::bytes(most)));
    format!("{} at the start, {most}", host::bytes(memory.initial))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_module_says_why_and_a_configuration_is_only_a_refusal_when_it_was_given() {
        let refused = Inspection { refused: Some("it is no filter".into()), ..Inspection::default() };
        assert!(render("f.wasm", &refused, false).contains("refused    it is no filter"));
        let picky = Inspection { configuration: Some("returned false".into()), ..Inspection::default() };
        assert!(render("f.wasm", &picky, false).contains("loads      yes, but"));
        assert!(render("f.wasm", &picky, true).contains("refused    with this configuration"));
    }
}
