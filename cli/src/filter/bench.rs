//! `outrigger filter bench`: what a filter costs, beside an empty one and beside an earlier measurement.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, anyhow, ensure};
use outrigger_core::resource::Located;
use outrigger_proxy::filter::Settings;
use outrigger_proxy::filter::cases::{Bench, Chunk, Cost, Costs, Reply, Request, Suite, bench};
use serde::{Deserialize, Serialize};

use super::host;
use crate::Global;
use crate::output::{self, Format, table};

/// How far the rounds' percentiles may lie apart before they say more of the machine than of the filter.
const NOISY: f64 = 1.5;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The module
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Its configuration: a text, or @FILE
    #[arg(long, value_name = "TEXT|@FILE")]
    configuration: Option<String>,
    /// Send the requests of these cases in turn, and answer as they say; their first filter's configuration is the default
    #[arg(long, value_name = "FILE")]
    cases: Option<PathBuf>,
    /// Compare with what an earlier run saved
    #[arg(long, value_name = "FILE")]
    baseline: Option<PathBuf>,
    /// Save what was measured
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,
    /// Exchanges in a round
    #[arg(long, default_value = "2000", value_parser = clap::value_parser!(u32).range(100..))]
    requests: u32,
    /// Rounds of the filter, and of the empty one between them
    #[arg(long, default_value = "10", value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
}

/// What is saved.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    /// Of this program: other hosts cost otherwise
    version: String,
    /// An unoptimised build of it
    debug: bool,
    exchanges: usize,
    #[serde(flatten)]
    costs: Costs,
}

pub(super) fn run(args: &Args, global: &Global) -> anyhow::Result<ExitCode> {
    let module = host::read_module(&args.file)?;
    let mut sent = Sent { exchanges: vec![exchange()], configuration: Vec::new(), left_out: 0 };
    if let Some(file) = &args.cases {
        sent = of_cases(file)?;
    }
    let configuration = match &args.configuration {
        Some(given) => host::configuration(Some(given))?,
        None => sent.configuration,
    };
    let baseline = args.baseline.as_deref().map(read).transpose()?;
    // What it logs is work of its own, and not what is measured.
    host::log("error", false)?;
    let scratch = tempfile::tempdir().context("cannot make a temporary directory")?;
    let settings = Settings { compiler: host::compiler()?, cache: scratch.path().join("cache") };
    let what = Bench {
        module: module.into(),
        configuration: configuration.into(),
        exchanges: &sent.exchanges,
        requests: usize::try_from(args.requests)?,
        rounds: usize::try_from(args.rounds)?,
    };
    let count = |work: &mut dyn FnMut()| allocation_counter::measure(work).count_total;
    // Guests need a stack of this size.
    let costs = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(host::STACK);
        let thread = thread.spawn_scoped(scope, || bench(&what, settings, &count))?;
        thread.join().map_err(|_| anyhow!("the measuring thread ended"))?.map_err(anyhow::Error::msg)
    });
    let costs = costs.with_context(|| args.file.display().to_string())?;
    let saved = Saved {
        version: env!("CARGO_PKG_VERSION").into(),
        debug: cfg!(debug_assertions),
        exchanges: sent.exchanges.len(),
        costs,
    };
    if let Some(file) = &args.save {
        let text = serde_json::to_string_pretty(&saved)?;
        std::fs::write(file, text + "\n").with_context(|| format!("--save {}", file.display()))?;
    }
    let mut notes = notes(&saved, baseline.as_ref());
    if sent.left_out > 0 {
        notes.push(format!(
            "{} steps are left out: they need others to play, never end, or are of TCP connections",
            sent.left_out
        ));
    }
    match global.output {
        Format::Json => output::json(&serde_json::json!({
            "measured": saved, "baseline": baseline, "notes": notes,
            "change": baseline.as_ref().map(|baseline| changes(&saved.costs.filter, &baseline.costs.filter)),
        }))?,
        Format::Table => {
            output::line(render(&saved.costs, baseline.as_ref().map(|baseline| &baseline.costs)).trim_end())?;
            for note in notes {
                output::line(&format!("note: {note}"))?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn read(file: &Path) -> anyhow::Result<Saved> {
    let text = std::fs::read(file).with_context(|| format!("--baseline {}", file.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("--baseline {}: not what --save writes", file.display()))
}

/// What goes through the filters.
struct Sent {
    exchanges: Vec<(Request, Reply)>,
    configuration: Vec<u8>,
    /// Steps that cannot be sent
    left_out: usize,
}

/// The exchanges of a file of cases.
fn of_cases(file: &Path) -> anyhow::Result<Sent> {
    let name = file.display().to_string();
    let text = std::fs::read_to_string(file).with_context(|| format!("--cases {name}"))?;
    let suite = Located::<Suite>::read(&name, &text).map_err(|why| anyhow!("--cases {why}"))?.value;
    let configuration = suite.filters.first().map(|filter| filter.configuration.clone().into_bytes());
    // Cases with filters of their own are about other configurations.
    let cases = suite.cases.iter().filter(|case| case.filters.is_empty() || suite.filters.is_empty());
    let mut sent = Sent { exchanges: Vec::new(), configuration: configuration.unwrap_or_default(), left_out: 0 };
    let mut tcp = false;
    for step in cases.flat_map(|case| &case.steps) {
        tcp |= step.tcp.is_some();
        match &step.request {
            Some(request) if step.services.is_empty() && !step.upstream.hang && !request.disconnect => {
                sent.exchanges.push((request.clone(), step.upstream.clone()));
            }
            Some(_) => sent.left_out += 1,
            None => sent.left_out += usize::from(step.tcp.is_some()),
        }
    }
    ensure!(
        !sent.exchanges.is_empty() || !tcp,
        "--cases {name}: its cases are of TCP connections, and bench measures requests: there is no bench of a TCP filter"
    );
    ensure!(!sent.exchanges.is_empty(), "--cases {name}: there is no request in it that could be sent");
    Ok(sent)
}

/// An exchange as there are many: a dozen headers, a short answer.
fn exchange() -> (Request, Reply) {
    let lines = |lines: &[&str]| lines.iter().map(|line| (*line).to_owned()).collect();
    let request = Request {
        path: "/reviews/17?page=2".into(),
        headers: lines(&[
            "accept: application/json",
            "accept-encoding: gzip, br",
            "accept-language: en-GB,en;q=0.8",
            "authorization: Bearer 0123456789abcdef0123456789abcdef",
            "cookie: session=0123456789abcdef; theme=dark",
            "user-agent: Mozilla/5.0 (X11; Linux x86_64)",
            "x-forwarded-proto: https",
            "x-request-id: 7c1f8c2e-5d0b-4f6d-9f58-0a3b1c2d4e5f",
        ]),
        ..Request::default()
    };
    let body = "{\"id\": 17, \"stars\": 5, \"text\": \"as described\"}".to_owned();
    let length = format!("content-length: {}", body.len());
    let headers = lines(&["content-type: application/json", "cache-control: no-store", &length]);
    (request, Reply { headers, body: vec![Chunk::Text(body)], ..Reply::default() })
}

/// A number of a cost, its name, and how it is written.
type Figure = (&'static str, fn(&Cost) -> f64, fn(f64) -> String);

const FIGURES: [Figure; 4] = [
    ("time per request, p50", |cost| cost.p50_ns as f64, ns),
    ("time per request, p99", |cost| cost.p99_ns as f64, ns),
    ("host allocations per request", |cost| cost.allocations, |count| format!("{count:.1}")),
    ("memory of an instance", |cost| cost.memory_bytes as f64, host::amount),
];

fn ns(ns: f64) -> String {
    format!("{ns:.0} ns")
}

fn render(costs: &Costs, baseline: Option<&Costs>) -> String {
    let mut header = vec!["", "EMPTY FILTER", "THIS FILTER", "ADDED"];
    if baseline.is_some() {
        header.extend(["BASELINE", "CHANGE"]);
    }
    let rows: Vec<Vec<String>> = FIGURES
        .iter()
        .map(|(name, of, write)| {
            let (empty, filter) = (of(&costs.empty), of(&costs.filter));
            let added = if filter < empty { format!("-{}", write(empty - filter)) } else { write(filter - empty) };
            let mut row = vec![(*name).to_owned(), write(empty), write(filter), added];
            if let Some(baseline) = baseline {
                row.extend([write(of(&baseline.filter)), percent(filter, of(&baseline.filter))]);
            }
            row
        })
        .collect();
    table(&header, &rows)
}

fn change(now: f64, before: f64) -> Option<f64> {
    (before > 0.0).then(|| (now - before) / before * 100.0)
}

fn percent(now: f64, before: f64) -> String {
    change(now, before).map_or_else(|| "-".to_owned(), |change| format!("{change:+.1} %"))
}

fn changes(now: &Cost, before: &Cost) -> serde_json::Value {
    let all = FIGURES.iter().map(|(name, of, _)| ((*name).to_owned(), change(of(now), of(before)).into()));
    serde_json::Value::Object(all.collect())
}

/// What the numbers do not say by themselves.
fn notes(saved: &Saved, baseline: Option<&Saved>) -> Vec<String> {
    let mut notes = Vec::new();
    let Saved { costs, .. } = saved;
    for (name, of) in [("p50", (|cost| cost.p50_range) as fn(&Cost) -> (u64, u64)), ("p99", |cost| cost.p99_range)] {
        // The empty filter meets what the machine does as well: what it shows is no matter of the filter.
        let worst = [&costs.empty, &costs.filter].map(of).into_iter().max_by(|a, b| spread(*a).total_cmp(&spread(*b)));
        if let Some((least, most)) = worst.filter(|range| spread(*range) > NOISY) {
            notes.push(format!(
                "{name} lies between {least} and {most} ns in the rounds: the machine is busy, and {name} is noise here"
            ));
        }
    }
    if saved.debug {
        notes.push(
            "an unoptimised build of outrigger measured this: its times are many times those of a release".into(),
        );
    }
    if let Some(baseline) = baseline {
        if baseline.debug != saved.debug || baseline.version != saved.version {
            notes.push("the baseline is of another build of outrigger: the host's own cost is another".into());
        }
        if baseline.exchanges != saved.exchanges {
            notes.push("the baseline is of other exchanges".into());
        }
    }
    notes
}

fn spread((least, most): (u64, u64)) -> f64 {
    most as f64 / (least as f64).max(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cost(p50: u64, p99: u64, spread: u64) -> Cost {
        let range = |ns: u64| (ns, ns * spread);
        let (p50_range, p99_range) = (range(p50), range(p99));
        Cost { p50_ns: p50, p50_range, p99_ns: p99, p99_range, allocations: 10.0, memory_bytes: 65536 }
    }

    fn saved(filter: Cost) -> Saved {
        let costs = Costs { empty: cost(1000, 2000, 1), filter };
        Saved { version: "1".into(), debug: false, exchanges: 1, costs }
    }

    #[test]
    fn the_table_compares_with_the_empty_filter_and_the_baseline() {
        let (now, before) = (saved(cost(3000, 9000, 1)), saved(cost(2000, 9000, 1)));
        let text = render(&now.costs, Some(&before.costs));
        let line = text.lines().nth(1).unwrap();
        for part in ["1000 ns", "3000 ns", "2000 ns", "+50.0 %"] {
            assert!(line.contains(part), "{part}: {text}");
        }
        assert!(notes(&now, Some(&before)).is_empty());
    }

    #[test]
    fn cases_of_tcp_connections_are_left_out_or_refused() {
        let file = tempfile::Builder::new().suffix(".yaml").tempfile().unwrap();
        let read = |steps: &str| {
            let text = format!(
                "filters: [{{module: f.wasm}}]\ncases:\n- name: tcp\n  steps: [{{tcp: {{client: hi}}}}]\n{steps}"
            );
            std::fs::write(file.path(), text).unwrap();
            of_cases(file.path())
        };
        let refused = read("").map(drop).unwrap_err().to_string();
        assert!(refused.contains("of TCP connections, and bench measures requests"), "{refused}");
        let sent = read("- name: http\n  steps: [{request: {}}]\n").unwrap();
        assert_eq!((sent.exchanges.len(), sent.left_out), (1, 1));
    }

    #[test]
    fn what_is_noise_is_said() {
        let noise = notes(&saved(cost(3000, 9000, 3)), None);
        assert!(noise.len() == 2 && noise[1].contains("p99 is noise"), "{noise:?}");
        let other = Saved { debug: true, ..saved(cost(1, 1, 1)) };
        assert!(notes(&saved(cost(1, 1, 1)), Some(&other))[0].contains("another build"));
    }
}
