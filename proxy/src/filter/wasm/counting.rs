//! Metrics that guests define: of each filter, over all workers and versions of it; they go with it.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::abi::Status;
use crate::metrics::escape;

/// Metrics of one filter, and ids that one instance may be given for them.
const METRICS: usize = 1024;
const IDS: usize = 4096;
/// Longest name, bytes.
const NAME: usize = 256;
/// Upper bounds of the buckets: those that the same filters have in Envoy, whatever their unit is.
const BOUNDS: [u64; 18] = [
    1, 5, 10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 30_000, 60_000, 300_000, 600_000, 1_800_000,
    3_600_000,
];

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Kind {
    Counter,
    Gauge,
    Histogram,
}

/// One metric, shared by everything that defined it.
#[derive(Debug)]
#[repr(align(64))]
struct Metric {
    kind: Kind,
    /// The value; of a histogram, the sum
    value: AtomicU64,
    buckets: Option<Box<[AtomicU64; BOUNDS.len() + 1]>>,
}

impl Metric {
    fn new(kind: Kind) -> Self {
        let buckets = (kind == Kind::Histogram).then(|| Box::new(std::array::from_fn(|_| AtomicU64::new(0))));
        Self { kind, value: AtomicU64::new(0), buckets }
    }

    fn increment(&self, by: i64) -> Result<(), Status> {
        match self.kind {
            Kind::Histogram => return Err(Status::BadArgument),
            Kind::Counter if by <= 0 => return Err(Status::BadArgument),
            Kind::Gauge if by < 0 => {
                let less = by.unsigned_abs();
                let sub = |value: u64| Some(value.saturating_sub(less));
                let _ = self.value.fetch_update(Ordering::Relaxed, Ordering::Relaxed, sub);
            }
            Kind::Gauge | Kind::Counter => {
                self.value.fetch_add(by.unsigned_abs(), Ordering::Relaxed);
            }
        }
        Ok(())
    }

    fn record(&self, value: u64) {
        match &self.buckets {
            None if self.kind == Kind::Gauge => self.value.store(value, Ordering::Relaxed),
            None => {
                self.value.fetch_add(value, Ordering::Relaxed);
            }
            Some(buckets) => {
                let index = BOUNDS.partition_point(|bound| *bound < value);
                if let Some(bucket) = buckets.get(index) {
                    bucket.fetch_add(1, Ordering::Relaxed);
                }
                self.value.fetch_add(value, Ordering::Relaxed);
            }
        }
    }
}

type Known = HashMap<(Kind, Box<str>), Arc<Metric>>;

/// The metrics of one filter.
#[derive(Debug)]
pub(super) struct FilterMetrics {
    /// `<namespace>/<name>`
    filter: String,
    known: Mutex<Known>,
}

/// The metrics of all filters.
#[derive(Debug, Default)]
pub(in super::super) struct GuestMetrics {
    filters: Mutex<HashMap<String, Weak<FilterMetrics>>>,
}

impl GuestMetrics {
    /// Those of a filter, `<namespace>/<name>`: kept for as long as a version of it is held.
    pub(super) fn of(&self, filter: &str) -> Arc<FilterMetrics> {
        let mut filters = lock(&self.filters);
        filters.retain(|_, metrics| metrics.strong_count() > 0);
        if let Some(metrics) = filters.get(filter).and_then(Weak::upgrade) {
            return metrics;
        }
        let metrics = Arc::new(FilterMetrics::alone(filter));
        filters.insert(filter.to_owned(), Arc::downgrade(&metrics));
        metrics
    }

    /// Appends the families in Prometheus' text format.
    pub(in super::super) fn prometheus(&self, text: &mut String) {
        let mut filters: Vec<_> = lock(&self.filters).values().filter_map(Weak::upgrade).collect();
        filters.sort_by(|a, b| a.filter.cmp(&b.filter));
        let mut rows: Vec<(Kind, String, Arc<Metric>)> = Vec::new();
        for metrics in filters {
            let mut known: Vec<_> = lock(&metrics.known)
                .iter()
                .map(|((kind, name), metric)| (*kind, name.clone(), Arc::clone(metric)))
                .collect();
            known.sort_by(|a, b| a.1.cmp(&b.1));
            for (kind, name, metric) in known {
                let mut label = String::from("filter=\"");
                escape(&mut label, &metrics.filter);
                label.push_str("\",name=\"");
                escape(&mut label, &name);
                label.push('"');
                rows.push((kind, label, metric));
            }
        }
        for (kind, family, ty) in [
            (Kind::Counter, "outrigger_filter_counter_total", "counter"),
            (Kind::Gauge, "outrigger_filter_gauge", "gauge"),
            (Kind::Histogram, "outrigger_filter_histogram", "histogram"),
        ] {
            let mut rows = rows.iter().filter(|row| row.0 == kind).peekable();
            if rows.peek().is_some() {
                let _ = writeln!(text, "# HELP {family} Defined by filters, under their names.\n# TYPE {family} {ty}");
            }
            for (_, label, metric) in rows {
                write_row(text, family, label, metric);
            }
        }
    }
}

// Writing to a String cannot fail.
fn write_row(text: &mut String, family: &str, label: &str, metric: &Metric) {
    let value = metric.value.load(Ordering::Relaxed);
    let Some(buckets) = &metric.buckets else {
        let _ = writeln!(text, "{family}{{{label}}} {value}");
        return;
    };
    let mut sum = 0;
    for (index, bucket) in buckets.iter().enumerate() {
        sum += bucket.load(Ordering::Relaxed);
        let _ = match BOUNDS.get(index) {
            Some(bound) => writeln!(text, "{family}_bucket{{{label},le=\"{bound}\"}} {sum}"),
            None => writeln!(text, "{family}_bucket{{{label},le=\"+Inf\"}} {sum}"),
        };
    }
    let _ = writeln!(text, "{family}_sum{{{label}}} {value}\n{family}_count{{{label}}} {sum}");
}

impl FilterMetrics {
    /// Ones that nobody reads: for trying a filter out.
    pub(super) fn alone(filter: &str) -> Self {
        Self { filter: filter.to_owned(), known: Mutex::default() }
    }

    fn metric(&self, kind: Kind, name: &str) -> Result<Arc<Metric>, Status> {
        let mut known = lock(&self.known);
        if let Some(metric) = known.get(&(kind, name.into())) {
            return Ok(Arc::clone(metric));
        }
        if known.len() >= METRICS {
            return Err(Status::InternalFailure);
        }
        let metric = Arc::new(Metric::new(kind));
        known.insert((kind, name.into()), Arc::clone(&metric));
        Ok(metric)
    }
}

/// The ids that one instance has for metrics.
#[derive(Debug, Default)]
pub(super) struct MetricIds(Vec<Arc<Metric>>);

impl MetricIds {
    /// An id for a metric: 0 counter, 1 gauge, 2 histogram. The same name again is the same metric under another id.
    pub(super) fn define(&mut self, metrics: &FilterMetrics, kind: u32, name: &[u8]) -> Result<u32, Status> {
        let kind = match kind {
            0 => Kind::Counter,
            1 => Kind::Gauge,
            2 => Kind::Histogram,
            _ => return Err(Status::BadArgument),
        };
        let name = std::str::from_utf8(name).map_err(|_| Status::BadArgument)?;
        if name.is_empty() || name.len() > NAME || name.chars().any(char::is_control) {
            return Err(Status::BadArgument);
        }
        if self.0.len() >= IDS {
            return Err(Status::InternalFailure);
        }
        self.0.push(metrics.metric(kind, name)?);
        u32::try_from(self.0.len()).map_err(|_| Status::InternalFailure)
    }

    fn find(&self, id: u32) -> Result<&Metric, Status> {
        let index = usize::try_from(id).ok().and_then(|id| id.checked_sub(1));
        index.and_then(|index| self.0.get(index)).map(AsRef::as_ref).ok_or(Status::NotFound)
    }

    /// Adds: to a counter what is above 0, to a gauge anything.
    pub(super) fn increment(&self, id: u32, by: i64) -> Result<(), Status> {
        self.find(id)?.increment(by)
    }

    /// Sets a gauge, adds to a counter, counts a value of a histogram.
    pub(super) fn record(&self, id: u32, value: u64) -> Result<(), Status> {
        self.find(id)?.record(value);
        Ok(())
    }

    /// The value of a counter or a gauge.
    pub(super) fn get(&self, id: u32) -> Result<u64, Status> {
        let metric = self.find(id)?;
        if metric.kind == Kind::Histogram {
            return Err(Status::BadArgument);
        }
        Ok(metric.value.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn c78_metrics_count_as_the_contract_says() {
        let all = GuestMetrics::default();
        let filter = all.of("demo/f");
        let (mut ids, mut other) = (MetricIds::default(), MetricIds::default());
        let counter = ids.define(&filter, 0, b"hits").unwrap();
        let again = ids.define(&filter, 0, b"hits").unwrap();
        let elsewhere = other.define(&all.of("demo/f"), 0, b"hits").unwrap();
        assert_ne!(counter, again);
        for by in [0, -1, i64::MIN] {
            assert_eq!(ids.increment(counter, by), Err(Status::BadArgument));
        }
        ids.increment(counter, 2).unwrap();
        ids.record(again, 3).unwrap();
        other.increment(elsewhere, 5).unwrap();
        assert_eq!((ids.get(counter), ids.get(again), other.get(elsewhere)), (Ok(10), Ok(10), Ok(10)));

        let gauge = ids.define(&filter, 1, b"hits").unwrap();
        ids.increment(gauge, 5).unwrap();
        ids.increment(gauge, -7).unwrap();
        assert_eq!(ids.get(gauge), Ok(0));
        ids.record(gauge, 4).unwrap();
        assert_eq!(ids.get(gauge), Ok(4));

        let histogram = ids.define(&filter, 2, b"took \"ms\"").unwrap();
        assert_eq!(
            (ids.increment(histogram, 1), ids.get(histogram)),
            (Err(Status::BadArgument), Err(Status::BadArgument))
        );
        for value in [1, 2, 10_000_000] {
            ids.record(histogram, value).unwrap();
        }
        for id in [0, 99, u32::MAX] {
            assert_eq!(
                (ids.get(id), ids.increment(id, 1), ids.record(id, 1)),
                (Err(Status::NotFound), Err(Status::NotFound), Err(Status::NotFound))
            );
        }
        let mut text = String::new();
        all.prometheus(&mut text);
        for line in [
            "outrigger_filter_counter_total{filter=\"demo/f\",name=\"hits\"} 10",
            "outrigger_filter_gauge{filter=\"demo/f\",name=\"hits\"} 4",
            "outrigger_filter_histogram_bucket{filter=\"demo/f\",name=\"took \\\"ms\\\"\",le=\"1\"} 1",
            "outrigger_filter_histogram_bucket{filter=\"demo/f\",name=\"took \\\"ms\\\"\",le=\"5\"} 2",
            "outrigger_filter_histogram_bucket{filter=\"demo/f\",name=\"took \\\"ms\\\"\",le=\"+Inf\"} 3",
            "outrigger_filter_histogram_sum{filter=\"demo/f\",name=\"took \\\"ms\\\"\"} 10000003",
            "outrigger_filter_histogram_count{filter=\"demo/f\",name=\"took \\\"ms\\\"\"} 3",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
    }

    #[test]
    fn metrics_are_bounded_and_go_with_their_filter() {
        let all = GuestMetrics::default();
        let filter = all.of("demo/f");
        let mut ids = MetricIds::default();
        for n in 0..METRICS {
            ids.define(&filter, 0, n.to_string().as_bytes()).unwrap();
        }
        assert_eq!(ids.define(&filter, 0, b"more"), Err(Status::InternalFailure));
        ids.define(&filter, 0, b"0").unwrap();
        for (kind, name) in [(3, &b"a"[..]), (0, b""), (0, b"a\nb"), (0, &[b'a'; 257]), (0, &[0xff])] {
            assert_eq!(ids.define(&filter, kind, name), Err(Status::BadArgument));
        }
        drop((filter, ids));
        let mut text = String::new();
        all.prometheus(&mut text);
        assert_eq!(text, "");
    }
}
