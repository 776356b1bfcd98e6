//! How filters do, as each workload's proxy last told.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use outrigger_proto::control::FilterReport;
use serde::Serialize;

/// A proxy that tells nothing for so long is gone.
const REMEMBERED: Duration = Duration::from_secs(600);

/// The last report of every workload.
#[derive(Debug, Default)]
pub struct Reports {
    by_workload: Mutex<BTreeMap<Workload, (Instant, Vec<FilterReport>)>>,
}

/// Namespace and name.
type Workload = (String, String);

/// One filter in one proxy, for `/api/v1/filters`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Row {
    /// Hex digest of the module that serves
    pub sha256: String,
    /// `running`, `backing-off`, `quarantined` or `refused`
    pub health: String,
    /// Live instances
    pub instances: u64,
    /// Exchanges that entered the filter
    pub requests: u64,
    /// Instances that failed
    pub failures: u64,
    /// Of these, the ones that ran too long
    pub timeouts: u64,
    /// Milliseconds of CPU in callbacks
    pub cpu_ms: u64,
    /// Linear memory of all instances
    pub memory_bytes: u64,
    /// The last failure
    pub last_error: Option<String>,
}

impl Reports {
    /// A workload's proxy tells of its filters.
    pub fn take(&self, workload: Workload, filters: Vec<FilterReport>, now: Instant) {
        let mut reports = self.lock();
        if filters.is_empty() {
            reports.remove(&workload);
            return;
        }
        for report in &filters {
            let known = reports.get(&workload).and_then(|(_, before)| find(before, &report.namespace, &report.name));
            let was = known.map_or("running", |known| known.health.as_str());
            if report.health != was {
                let filter = format!("{}/{}", report.namespace, report.name);
                let (namespace, name) = &workload;
                if report.health == "running" {
                    tracing::info!(filter, proxy = %format!("{namespace}/{name}"), "a filter runs again");
                } else {
                    let (health, error) = (&report.health, &report.last_error);
                    tracing::warn!(filter, proxy = %format!("{namespace}/{name}"), health, error, "a filter fails");
                }
            }
        }
        reports.insert(workload, (now, filters));
        reports.retain(|_, (at, _)| now.duration_since(*at) < REMEMBERED);
    }

    /// What a workload's proxy last said of a filter.
    pub fn of(&self, workload: &Workload, namespace: &str, name: &str) -> Option<Row> {
        let reports = self.lock();
        let report = find(&reports.get(workload)?.1, namespace, name)?.clone();
        Some(Row {
            sha256: report.sha256,
            health: report.health,
            instances: report.instances,
            requests: report.requests,
            failures: report.failures,
            timeouts: report.timeouts,
            cpu_ms: report.cpu_ms,
            memory_bytes: report.memory_bytes,
            last_error: Some(report.last_error).filter(|error| !error.is_empty()),
        })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Workload, (Instant, Vec<FilterReport>)>> {
        self.by_workload.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn find<'a>(reports: &'a [FilterReport], namespace: &str, name: &str) -> Option<&'a FilterReport> {
    reports.iter().find(|report| report.namespace == namespace && report.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_report_counts_until_its_proxy_is_gone() {
        let reports = Reports::default();
        let start = Instant::now();
        let workload = |name: &str| ("demo".to_owned(), name.to_owned());
        let report = |failures| FilterReport {
            namespace: "demo".into(),
            name: "f".into(),
            health: "backing-off".into(),
            failures,
            ..FilterReport::default()
        };
        reports.take(workload("a"), vec![report(1)], start);
        reports.take(workload("a"), vec![report(2)], start);
        assert_eq!(reports.of(&workload("a"), "demo", "f").unwrap().failures, 2);
        assert!(reports.of(&workload("a"), "other", "f").is_none());
        reports.take(workload("b"), vec![report(1)], start + REMEMBERED);
        assert!(reports.of(&workload("a"), "demo", "f").is_none());
        reports.take(workload("b"), Vec::new(), start + REMEMBERED);
        assert!(reports.of(&workload("b"), "demo", "f").is_none());
    }
}
