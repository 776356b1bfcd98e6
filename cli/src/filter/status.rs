//! `outrigger filter status`: where each filter serves, and how it does there.

use std::process::ExitCode;

use anyhow::Context as _;
use outrigger_core::compile::NOT_FETCHED;
use serde::Deserialize;
use serde_json::Value;

use crate::Global;
use crate::client::Control;
use crate::output::{self, Format, table};

#[derive(Debug, clap::Args)]
pub(super) struct Status {
    /// Only this filter
    name: Option<String>,
    /// Only of this namespace
    #[arg(short, long)]
    namespace: Option<String>,
}

/// One of `GET /api/v1/filters`, the part that is shown.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Filter {
    pub(super) namespace: String,
    pub(super) name: String,
    sha256: Option<String>,
    problem: Option<String>,
    #[serde(default)]
    pub(super) proxies: Vec<Served>,
    /// As it came
    #[serde(skip)]
    pub(super) raw: Value,
}

/// A filter in one proxy.
#[derive(Debug, Deserialize)]
pub(super) struct Served {
    proxy: Proxy,
    report: Option<Report>,
}

#[derive(Debug, Deserialize)]
struct Proxy {
    namespace: String,
    workload: String,
    connected: bool,
    state: String,
    reason: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    health: String,
    requests: u64,
    failures: u64,
    timeouts: u64,
    cpu_ms: u64,
    memory_bytes: u64,
    last_error: Option<String>,
}

impl Filter {
    /// Every connected proxy that has it said yes or no, and there is one.
    pub(super) fn settled(&self) -> bool {
        let mut connected = self.connected().peekable();
        connected.peek().is_some() && connected.all(|served| served.proxy.state != "pending")
    }

    /// Every connected proxy that has it serves by it, and there is one.
    pub(super) fn serves(&self) -> bool {
        let applied = |served: &Served| served.proxy.state == "applied";
        self.settled() && self.problem.is_none() && self.connected().all(applied)
    }

    /// The control plane does not have its module yet: what proxies said is of the version before.
    pub(super) fn fetching(&self) -> bool {
        self.problem.as_ref().is_some_and(|problem| problem.ends_with(NOT_FETCHED))
    }

    fn refused(&self) -> bool {
        self.connected().any(|served| served.proxy.state == "refused")
    }

    fn fails(&self) -> bool {
        let failing = |served: &Served| served.report.as_ref().is_some_and(|report| report.health != "running");
        self.problem.is_some() || self.refused() || self.connected().any(failing)
    }

    /// What a proxy that is away said last says nothing about now.
    fn connected(&self) -> impl Iterator<Item = &Served> {
        self.proxies.iter().filter(|served| served.proxy.connected)
    }
}

/// Fails (exit code 1) when a filter is refused, backs off, or has a problem.
pub(super) fn run(args: &Status, global: &Global) -> anyhow::Result<ExitCode> {
    let mut filters = read(&global.control()?)?;
    filters.retain(|filter| args.namespace.as_ref().is_none_or(|namespace| *namespace == filter.namespace));
    filters.retain(|filter| args.name.as_ref().is_none_or(|name| *name == filter.name));
    match global.output {
        Format::Json => output::json(&filters.iter().map(|filter| &filter.raw).collect::<Vec<_>>())?,
        Format::Table => output::line(render(&filters).trim_end())?,
    }
    let missing = args.name.is_some() && filters.is_empty();
    Ok(if missing || filters.iter().any(Filter::fails) { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

pub(super) fn read(control: &Control) -> anyhow::Result<Vec<Filter>> {
    let answer = control.get("/api/v1/filters")?;
    let rows = answer.as_array().context("/api/v1/filters: not what this version reads")?;
    let row = |raw: &Value| {
        let mut filter: Filter =
            serde_json::from_value(raw.clone()).context("/api/v1/filters: not what this version reads")?;
        filter.raw = raw.clone();
        anyhow::Ok(filter)
    };
    rows.iter().map(row).collect()
}

pub(super) fn render(filters: &[Filter]) -> String {
    if filters.is_empty() {
        return "no filters\n".to_owned();
    }
    let header = ["FILTER", "MODULE", "PROXY", "STATE", "HEALTH", "REQUESTS", "FAILED", "TIMEOUTS", "CPU", "MEMORY"];
    let mut rows = Vec::new();
    let mut notes = Vec::new();
    for filter in filters {
        let name = format!("{}/{}", filter.namespace, filter.name);
        let module = filter.sha256.as_ref().map_or("none", |digest| &digest[..digest.len().min(12)]).to_owned();
        if let Some(problem) = &filter.problem {
            notes.push(vec![name.clone(), "control plane".to_owned(), problem.clone()]);
        }
        if filter.proxies.is_empty() {
            rows.push([vec![name.clone(), module.clone(), "none has it".to_owned()], vec![String::new(); 7]].concat());
        }
        for served in &filter.proxies {
            let Served { proxy, report } = served;
            let who = format!("{}/{}", proxy.namespace, proxy.workload);
            let state = if proxy.connected { proxy.state.clone() } else { "away".to_owned() };
            let mut row = vec![name.clone(), module.clone(), who.clone(), state];
            row.extend(report.as_ref().map_or_else(|| vec!["-".to_owned(); 6], numbers));
            rows.push(row);
            let failure = report.as_ref().and_then(|report| report.last_error.as_ref());
            for why in [&proxy.reason, &failure.cloned()].into_iter().flatten() {
                notes.push(vec![name.clone(), who.clone(), why.lines().next().unwrap_or_default().to_owned()]);
            }
        }
    }
    let mut text = table(&header, &rows);
    if !notes.is_empty() {
        notes.dedup();
        text.push_str("\nlast failures:\n");
        text.push_str(&table(&["FILTER", "WHERE", "WHY"], &notes));
    }
    text
}

fn numbers(report: &Report) -> Vec<String> {
    vec![
        report.health.clone(),
        report.requests.to_string(),
        report.failures.to_string(),
        report.timeouts.to_string(),
        format!("{} ms", report.cpu_ms),
        format!("{:.1} MiB", report.memory_bytes as f64 / f64::from(1 << 20)),
    ]
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn filter(state: &str, health: &str) -> Filter {
        let proxy =
            json!({"namespace": "demo", "workload": "reviews-0", "connected": true, "state": state, "reason": null});
        let report = json!({"health": health, "requests": 7, "failures": 1, "timeouts": 0, "cpuMs": 3,
            "memoryBytes": 1_572_864, "lastError": "unreachable\n at f"});
        let row = json!({"namespace": "demo", "name": "f", "sha256": "ab".repeat(32), "problem": null,
            "proxies": [{"proxy": proxy, "report": report}]});
        serde_json::from_value(row).unwrap()
    }

    #[test]
    fn a_filter_serves_when_every_proxy_that_has_it_applied_it() {
        assert!(filter("applied", "running").serves());
        assert!(!filter("pending", "running").settled());
        assert!(filter("refused", "running").settled() && !filter("refused", "running").serves());
        assert!(filter("applied", "backing-off").fails());
    }

    #[test]
    fn only_connected_proxies_count() {
        let mut two = filter("applied", "running");
        for (state, health) in [("refused", "running"), ("applied", "backing-off")] {
            two.proxies.truncate(1);
            two.proxies.extend(filter(state, health).proxies);
            assert!(two.fails(), "{state} {health}");
            two.proxies.last_mut().unwrap().proxy.connected = false;
            assert!(two.serves() && !two.fails(), "{state} {health}");
        }
        assert!(!two.fetching());
        two.problem = Some("f.yaml:1: WasmFilter demo/f: spec.module: oci://r.example/f is not fetched yet".into());
        assert!(two.fetching() && two.fails());
    }

    #[test]
    fn the_table_aligns_and_names_the_failure() {
        let text = render(&[filter("applied", "running")]);
        let mut lines = text.lines();
        let header = lines.next().unwrap();
        let row = lines.next().unwrap();
        assert_eq!(header.find("PROXY"), row.find("demo/reviews-0"), "{text}");
        assert!(row.ends_with("1.5 MiB"), "{text}");
        assert!(text.contains("unreachable") && !text.contains(" at f"), "{text}");
    }
}
