//! How the filters of this process do: for `/filters` and `/metrics`.

use std::fmt::Write as _;

use serde::Serialize;

use crate::metrics::escape;

/// How a filter does in this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Health {
    /// Instances run, or will at the first request
    Running,
    /// Three failures in 10 s: the next instance waits for its time
    BackingOff,
    /// The wait has reached its maximum
    Quarantined,
    /// No version of it could be prepared: what it guards goes by its failure policy
    Refused,
}

impl Health {
    const ALL: [Self; 4] = [Self::Running, Self::BackingOff, Self::Quarantined, Self::Refused];

    /// In metrics and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::BackingOff => "backing-off",
            Self::Quarantined => "quarantined",
            Self::Refused => "refused",
        }
    }
}

/// A row of `/filters`.
#[derive(Debug, Clone, Serialize)]
pub struct StatusRow {
    /// Namespace of the WasmFilter
    pub namespace: String,
    /// Its name
    pub name: String,
    /// Hex SHA-256 of the module
    pub sha256: String,
    /// Worst of all workers
    pub health: Health,
    /// Live instances, over all workers
    pub instances: usize,
    /// Exchanges that entered the filter
    pub requests: u64,
    /// Callbacks made
    pub calls: u64,
    /// Instances that trapped, ran too long or used too much memory
    pub failures: u64,
    /// Of these, the ones that ran too long
    pub timeouts: u64,
    /// Exchanges that went without it because its share of CPU was used up
    pub throttled: u64,
    /// Linear memory of all instances, bytes
    pub memory_bytes: u64,
    /// Time that its callbacks took so far, milliseconds; sampled
    pub cpu_ms: u64,
    /// The last failure
    pub last_error: Option<String>,
    /// Why the newest version is not the one that serves
    pub refused: Option<String>,
}

impl StatusRow {
    /// A filter of which no version runs.
    pub(super) fn refused(namespace: &str, name: &str, sha256: &str, why: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            sha256: sha256.to_owned(),
            health: Health::Refused,
            instances: 0,
            requests: 0,
            calls: 0,
            failures: 0,
            timeouts: 0,
            throttled: 0,
            memory_bytes: 0,
            cpu_ms: 0,
            last_error: None,
            refused: Some(why.to_owned()),
        }
    }
}

/// Appends the rows as Prometheus families.
pub fn prometheus(rows: &[StatusRow], text: &mut String) {
    type Value = fn(&StatusRow) -> u64;
    let families: [(&str, &str, &str, Value); 7] = [
        ("outrigger_filter_calls_total", "counter", "Requests and connections that a filter was run on.", |row| {
            row.requests
        }),
        (
            "outrigger_filter_failures_total",
            "counter",
            "Instances that trapped, ran too long or could not start.",
            |row| row.failures,
        ),
        ("outrigger_filter_timeouts_total", "counter", "Of the failures, those that ran too long.", |row| row.timeouts),
        (
            "outrigger_filter_throttled_total",
            "counter",
            "Exchanges that went without it because its share of CPU was used up.",
            |row| row.throttled,
        ),
        ("outrigger_filter_instances", "gauge", "Live instances.", |row| row.instances as u64),
        ("outrigger_filter_memory_bytes", "gauge", "Linear memory of all instances.", |row| row.memory_bytes),
        ("outrigger_filter_refused", "gauge", "1: the newest version was refused.", |row| {
            u64::from(row.refused.is_some())
        }),
    ];
    cpu(rows, text);
    // Writing to a String cannot fail.
    for (name, kind, help, value) in families {
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for row in rows {
            let _ = writeln!(text, "{name}{{{}}} {}", label(row), value(row));
        }
    }
    let _ =
        writeln!(text, "# HELP outrigger_filter_health 1: the state it is in.\n# TYPE outrigger_filter_health gauge");
    for row in rows {
        for state in Health::ALL {
            let (label, is) = (label(row), u8::from(row.health == state));
            let _ = writeln!(text, "outrigger_filter_health{{{label},state=\"{}\"}} {is}", state.name());
        }
    }
}

fn cpu(rows: &[StatusRow], text: &mut String) {
    let name = "outrigger_filter_cpu_seconds_total";
    let _ = writeln!(text, "# HELP {name} Time that callbacks took, sampled.\n# TYPE {name} counter");
    for row in rows {
        let _ = writeln!(text, "{name}{{{}}} {}.{:03}", label(row), row.cpu_ms / 1000, row.cpu_ms % 1000);
    }
}

fn label(row: &StatusRow) -> String {
    let mut label = String::from("filter=\"");
    escape(&mut label, &row.namespace);
    label.push('/');
    escape(&mut label, &row.name);
    label.push('"');
    label
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_filter_is_counted_as_one() {
        let mut text = String::new();
        prometheus(&[StatusRow::refused("demo", "f", "00", "no")], &mut text);
        assert!(text.contains("outrigger_filter_refused{filter=\"demo/f\"} 1\n"), "{text}");
        assert!(text.contains("outrigger_filter_health{filter=\"demo/f\",state=\"refused\"} 1\n"), "{text}");
        assert!(text.contains("outrigger_filter_health{filter=\"demo/f\",state=\"running\"} 0\n"), "{text}");
    }
}
