//! Counters and histograms: counted per worker, added up when somebody asks.
//!
//! A worker counts in a [`Local`] of its own, on cache lines nobody else writes, with plain loads and stores. Series are made at
//! first use, under a lock that only a scrape shares.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::hash::{BuildHasher, Hasher};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ::http::StatusCode;
use foldhash::quality::RandomState;

macro_rules! metrics {
    ($($(#[$meta:meta])* $name:ident = $text:literal, $kind:ident, [$($label:literal),*], $help:literal;)*) => {
        /// What is counted.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Metric { $(#[doc = $help] $name,)* }

        impl Metric {
            /// Every metric.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// Its name in the Prometheus text.
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// Its labels, in the order in which values are given.
            pub fn labels(self) -> &'static [&'static str] {
                match self { $(Self::$name => &[$($label,)*],)* }
            }

            fn kind(self) -> Kind {
                match self { $(Self::$name => Kind::$kind,)* }
            }

            fn help(self) -> &'static str {
                match self { $(Self::$name => $help,)* }
            }
        }
    };
}

metrics! {
    Requests = "outrigger_requests_total", Counter, ["direction", "service", "version", "code", "reason"], "Requests, counted at the end of the response; `reason` says why the mesh itself answered";
    Duration = "outrigger_request_duration_seconds", Histogram, ["direction", "service", "version"], "Time from the request's head to the end of the response";
    Attempts = "outrigger_attempts_total", Counter, ["service", "outcome"], "Attempts at endpoints: success, failure, reset, connect-failure, timeout, cancelled";
    Connections = "outrigger_connections", Gauge, ["direction", "protocol"], "Open connections of clients";
    UpstreamConnections = "outrigger_upstream_connections", Gauge, ["direction", "service"], "Open connections to endpoints and to the application";
    UpstreamConnects = "outrigger_upstream_connects_total", Counter, ["service", "outcome"], "Connections dialled";
    TlsConnections = "outrigger_tls_connections_total", Counter, ["direction", "peer"], "Mesh TLS connections by the identity that the peer proved";
    TlsResumed = "outrigger_tls_resumed_total", Counter, ["direction"], "Mesh TLS connections that resumed a session; the peer's certificate is judged again all the same";
    Refused = "outrigger_connections_refused_total", Counter, ["direction", "cause"], "Connections closed before a request: handshake failed, plaintext on a Strict port, undeclared port";
    TcpConnections = "outrigger_tcp_connections_total", Counter, ["direction", "service", "reason"], "Opaque connections, counted at their end";
    TcpBytes = "outrigger_tcp_bytes_total", Counter, ["direction", "service", "way"], "Bytes of opaque connections: sent (towards the server) and received";
    TcpOpen = "outrigger_tcp_open_connections", Gauge, ["direction"], "Open opaque connections";
    Upgrades = "outrigger_upgrades_open", Gauge, ["direction"], "Open WebSocket connections";
    Authorization = "outrigger_authorization_total", Counter, ["decision", "policy"], "Authorization decisions by the rule that made them";
    PeerRequests = "outrigger_peer_requests_total", Counter, ["peer"], "Inbound requests by the identity that the peer proved; `none`: plaintext";
    Ambiguous = "outrigger_ambiguous_framing_total", Counter, ["direction"], "Requests with Content-Length and Transfer-Encoding, re-framed";
    LogDropped = "outrigger_log_dropped_total", Counter, [], "Access log lines dropped because the log could not keep up";
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Counter,
    Gauge,
    Histogram,
}

/// Upper bounds of the duration buckets, microseconds.
const BOUNDS: [u64; 15] = [
    500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000, 5_000_000,
    10_000_000, 30_000_000,
];
/// Series of one worker: beyond it new label sets are counted with every label `other`, so that names an application
/// makes up cannot fill the memory.
const MAX_SERIES: usize = 20_000;

/// All metrics of the process.
#[derive(Debug, Default)]
pub struct Metrics {
    shards: Mutex<Vec<Arc<Shard>>>,
    collectors: Mutex<Vec<Collector>>,
}

/// Appends whole Prometheus families to the text, at each scrape.
struct Collector(Box<dyn Fn(&mut String) + Send + Sync>);

impl std::fmt::Debug for Collector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Collector")
    }
}

type Labels = Box<[Box<str>]>;

#[derive(Debug, Default)]
struct Shard {
    series: Mutex<Vec<(Metric, Labels, Arc<Series>)>>,
}

#[derive(Debug)]
enum Series {
    Value(AtomicU64),
    Histogram(Box<Buckets>),
}

#[derive(Debug, Default)]
struct Buckets {
    counts: [AtomicU64; BOUNDS.len() + 1],
    sum_us: AtomicU64,
}

impl Metrics {
    /// No metrics yet.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// The part that one thread counts in.
    pub fn local(&self) -> Local {
        let shard = Arc::<Shard>::default();
        lock(&self.shards).push(shard.clone());
        Local {
            inner: Rc::new(Inner {
                shard,
                hasher: RandomState::default(),
                cache: RefCell::default(),
                recent: RefCell::default(),
            }),
        }
    }

    /// Adds families that something else keeps (discovery, certificates, filters).
    pub fn collect_with(&self, collector: impl Fn(&mut String) + Send + Sync + 'static) {
        lock(&self.collectors).push(Collector(Box::new(collector)));
    }

    /// The value of a counter or gauge over all workers, over every series whose labels begin with `labels`.
    pub fn total(&self, metric: Metric, labels: &[&str]) -> i64 {
        let mut total = 0_u64;
        for shard in lock(&self.shards).iter() {
            for (_, of, series) in lock(&shard.series).iter().filter(|(of, ..)| *of == metric) {
                if labels.iter().zip(of.iter()).all(|(a, b)| **a == **b)
                    && let Series::Value(value) = series.as_ref()
                {
                    total = total.wrapping_add(value.load(Ordering::Relaxed));
                }
            }
        }
        total.cast_signed()
    }

    /// How many durations a histogram holds over all workers, over every series whose labels begin with `labels`.
    pub fn recorded(&self, metric: Metric, labels: &[&str]) -> u64 {
        let mut total = 0_u64;
        for shard in lock(&self.shards).iter() {
            for (_, of, series) in lock(&shard.series).iter().filter(|(of, ..)| *of == metric) {
                if labels.iter().zip(of.iter()).all(|(a, b)| **a == **b)
                    && let Series::Histogram(buckets) = series.as_ref()
                {
                    total += buckets.counts.iter().map(|count| count.load(Ordering::Relaxed)).sum::<u64>();
                }
            }
        }
        total
    }

    /// The Prometheus text exposition of everything.
    pub fn encode(&self) -> String {
        let mut values: BTreeMap<(Metric, Labels), u64> = BTreeMap::new();
        let mut histograms: BTreeMap<(Metric, Labels), ([u64; BOUNDS.len() + 1], u64)> = BTreeMap::new();
        for shard in lock(&self.shards).iter() {
            for (metric, labels, series) in lock(&shard.series).iter() {
                let key = (*metric, labels.clone());
                match series.as_ref() {
                    Series::Value(value) => {
                        let sum = values.entry(key).or_default();
                        *sum = sum.wrapping_add(value.load(Ordering::Relaxed));
                    }
                    Series::Histogram(buckets) => {
                        let (counts, sum) = histograms.entry(key).or_default();
                        for (total, count) in counts.iter_mut().zip(&buckets.counts) {
                            *total += count.load(Ordering::Relaxed);
                        }
                        *sum += buckets.sum_us.load(Ordering::Relaxed);
                    }
                }
            }
        }
        let mut text = String::new();
        for metric in Metric::ALL {
            header(&mut text, *metric);
            for ((_, labels), value) in values.iter().filter(|((of, _), _)| of == metric) {
                line(&mut text, *metric, "", labels, None, &value.cast_signed().to_string());
            }
            for ((_, labels), (counts, sum)) in histograms.iter().filter(|((of, _), _)| of == metric) {
                histogram(&mut text, *metric, labels, counts, *sum);
            }
        }
        for collector in lock(&self.collectors).iter() {
            (collector.0)(&mut text);
        }
        text
    }
}

fn header(text: &mut String, metric: Metric) {
    let kind = match metric.kind() {
        Kind::Counter => "counter",
        Kind::Gauge => "gauge",
        Kind::Histogram => "histogram",
    };
    let _ = writeln!(text, "# HELP {} {}\n# TYPE {} {kind}", metric.name(), metric.help(), metric.name());
}

fn line(text: &mut String, metric: Metric, suffix: &str, values: &[Box<str>], bound: Option<&str>, value: &str) {
    let _ = write!(text, "{}{suffix}", metric.name());
    let pairs = metric.labels().iter().copied().zip(values.iter().map(AsRef::as_ref));
    let mut separator = '{';
    for (name, value) in pairs.chain(bound.map(|bound| ("le", bound))) {
        let _ = write!(text, "{separator}{name}=\"");
        escape(text, value);
        text.push('"');
        separator = ',';
    }
    let _ = writeln!(text, "{} {value}", if separator == ',' { "}" } else { "" });
}

fn histogram(text: &mut String, metric: Metric, labels: &[Box<str>], counts: &[u64], sum_us: u64) {
    let mut total = 0;
    let bounds = BOUNDS.iter().map(|us| seconds(*us)).chain(["+Inf".to_owned()]);
    for (bound, count) in bounds.zip(counts) {
        total += count;
        line(text, metric, "_bucket", labels, Some(&bound), &total.to_string());
    }
    line(text, metric, "_sum", labels, None, &seconds(sum_us));
    line(text, metric, "_count", labels, None, &total.to_string());
}

fn seconds(us: u64) -> String {
    Duration::from_micros(us).as_secs_f64().to_string()
}

/// A label's value as the text format wants it.
pub fn escape(text: &mut String, value: &str) {
    for c in value.chars() {
        match c {
            '\\' => text.push_str("\\\\"),
            '"' => text.push_str("\\\""),
            '\n' => text.push_str("\\n"),
            c => text.push(c),
        }
    }
}

/// One worker's part. Cheap to clone; stays on its thread.
#[derive(Debug, Clone)]
pub struct Local {
    inner: Rc<Inner>,
}

/// Series by the hash of metric and labels, so that looking one up makes no owned key.
type Cache = HashMap<u64, Vec<(Metric, Labels, Arc<Series>)>, foldhash::fast::RandomState>;

#[derive(Debug)]
struct Inner {
    shard: Arc<Shard>,
    hasher: RandomState,
    cache: RefCell<Cache>,
    recent: RefCell<Recent>,
}

/// A label of [`Local::add_known`] and [`Local::record_known`]: one that is told from others by where it is in memory.
#[derive(Debug, Clone, Copy)]
pub enum Known<'a> {
    /// A word of the program
    Word(&'static str),
    /// A name that is shared by everything it is counted for
    Shared(&'a Arc<str>),
    /// A response's status; `None`: there was no response
    Status(Option<StatusCode>),
}

impl Known<'_> {
    /// Equal only for equal labels, as long as what is shared lives.
    fn identity(&self) -> (usize, usize) {
        match self {
            Self::Word(word) => (word.as_ptr().addr(), word.len()),
            Self::Shared(name) => (Arc::as_ptr(name).cast::<u8>().addr(), name.len()),
            Self::Status(status) => (0, status.map_or(0, |status| status.as_u16().into())),
        }
    }

    fn text(&self) -> &str {
        match self {
            Self::Word(word) => word,
            Self::Shared(name) => name,
            Self::Status(status) => status.as_ref().map_or("0", StatusCode::as_str),
        }
    }

    fn pinned(&self) -> Option<Arc<str>> {
        match self {
            Self::Shared(name) => Some(Arc::clone(name)),
            Self::Word(_) | Self::Status(_) => None,
        }
    }
}

/// Labels that a metric has at most.
const MAX_LABELS: usize = 5;
/// Places for series that were used last.
const RECENT: usize = 128;

/// Series that were used last, each at the place its labels' identities give it.
#[derive(Debug, Default)]
struct Recent(Vec<Option<Kept>>);

#[derive(Debug)]
struct Kept {
    metric: Metric,
    identities: [(usize, usize); MAX_LABELS],
    /// What the identities are those of: while it is held here nothing else has its place in memory.
    _pinned: [Option<Arc<str>>; MAX_LABELS],
    series: Arc<Series>,
}

impl Series {
    /// Counts of a [`Local`] have one writer, so that no locked instruction is needed.
    fn add(&self, n: u64) {
        if let Self::Value(value) = self {
            bump(value, n);
        }
    }

    fn record(&self, duration: Duration) {
        let us = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        if let Self::Histogram(buckets) = self {
            let at = BOUNDS.partition_point(|bound| *bound < us);
            if let Some(count) = buckets.counts.get(at) {
                bump(count, 1);
            }
            bump(&buckets.sum_us, us);
        }
    }
}

fn bump(value: &AtomicU64, n: u64) {
    value.store(value.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
}

impl Local {
    /// Adds to a counter whose labels are known by their place in memory: what every request does.
    pub fn add_known<const N: usize>(&self, metric: Metric, labels: [Known<'_>; N], n: u64) {
        self.known(metric, &labels, |series| series.add(n));
    }

    /// Records a duration likewise.
    pub fn record_known<const N: usize>(&self, metric: Metric, labels: [Known<'_>; N], duration: Duration) {
        self.known(metric, &labels, |series| series.record(duration));
    }

    fn known(&self, metric: Metric, labels: &[Known<'_>], act: impl FnOnce(&Series)) {
        const { assert!(RECENT.is_power_of_two()) };
        let mut identities = [(0, 0); MAX_LABELS];
        let mut place = metric as usize;
        for (identity, label) in identities.iter_mut().zip(labels) {
            *identity = label.identity();
            place = place.rotate_left(5) ^ (identity.0 >> 3) ^ identity.1;
        }
        place = place.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32 & (RECENT - 1);
        let mut recent = self.inner.recent.borrow_mut();
        if let Some(Some(kept)) = recent.0.get(place)
            && kept.metric == metric
            && kept.identities == identities
        {
            return act(&kept.series);
        }
        let mut texts = [""; MAX_LABELS];
        let mut pinned = [const { None }; MAX_LABELS];
        for (i, label) in labels.iter().take(MAX_LABELS).enumerate() {
            (texts[i], pinned[i]) = (label.text(), label.pinned());
        }
        self.with(metric, &texts[..labels.len().min(MAX_LABELS)], |series| {
            act(series);
            recent.0.resize_with(RECENT, || None);
            recent.0[place] = Some(Kept { metric, identities, _pinned: pinned, series: series.clone() });
        });
    }

    /// Adds to a counter.
    pub fn add(&self, metric: Metric, labels: &[&str], n: u64) {
        self.with(metric, labels, |series| series.add(n));
    }

    /// Adds one to a gauge until the guard is dropped.
    pub fn hold(&self, metric: Metric, labels: &[&str]) -> Held {
        let mut held = Held(None);
        self.with(metric, labels, |series| {
            if let Series::Value(value) = series.as_ref() {
                value.fetch_add(1, Ordering::Relaxed);
                held.0 = Some(series.clone());
            }
        });
        held
    }

    /// Records a duration in a histogram.
    pub fn record(&self, metric: Metric, labels: &[&str], duration: Duration) {
        self.with(metric, labels, |series| series.record(duration));
    }

    fn with(&self, metric: Metric, labels: &[&str], act: impl FnOnce(&Arc<Series>)) {
        let mut hasher = self.inner.hasher.build_hasher();
        hasher.write_u8(metric as u8);
        for label in labels {
            hasher.write(label.as_bytes());
            hasher.write_u8(0xff);
        }
        let mut cache = self.inner.cache.borrow_mut();
        let same =
            |labels: &[&str], of: &Labels| of.len() == labels.len() && labels.iter().zip(of).all(|(a, b)| **a == **b);
        let bucket = cache.entry(hasher.finish()).or_default();
        if let Some((.., series)) = bucket.iter().find(|(of, owned, _)| *of == metric && same(labels, owned)) {
            return act(series);
        }
        let mut all = lock(&self.inner.shard.series);
        let full = all.len() >= MAX_SERIES;
        let owned: Labels = labels.iter().map(|label| Box::from(if full { "other" } else { *label })).collect();
        if full && let Some((.., series)) = all.iter().find(|(of, labels, _)| *of == metric && *labels == owned) {
            return act(series);
        }
        let series = Arc::new(match metric.kind() {
            Kind::Histogram => Series::Histogram(Box::default()),
            Kind::Counter | Kind::Gauge => Series::Value(AtomicU64::new(0)),
        });
        all.push((metric, owned.clone(), series.clone()));
        if !full {
            bucket.push((metric, owned, series.clone()));
        }
        act(&series);
    }
}

/// One in a gauge; given back on drop.
#[derive(Debug)]
pub struct Held(Option<Arc<Series>>);

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(Series::Value(value)) = self.0.as_deref() {
            value.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Counters stay right whatever a panicking thread left half done: a poisoned lock is used as it is.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_add_up_and_gauges_come_back() {
        let metrics = Metrics::new();
        let (one, two) = (metrics.local(), metrics.local());
        let labels = ["outbound", "demo/reviews", "v1", "200", ""];
        one.add(Metric::Requests, &labels, 2);
        two.add(Metric::Requests, &labels, 3);
        let held = one.hold(Metric::TcpOpen, &["inbound"]);
        let text = metrics.encode();
        let want = "outrigger_requests_total{direction=\"outbound\",service=\"demo/reviews\",version=\"v1\",code=\"200\",reason=\"\"} 5\n";
        assert!(text.contains(want), "{text}");
        assert!(text.contains("outrigger_tcp_open_connections{direction=\"inbound\"} 1\n"));
        drop(held);
        assert_eq!(metrics.total(Metric::TcpOpen, &["inbound"]), 0);
        assert_eq!(metrics.total(Metric::Requests, &["outbound"]), 5);
    }

    #[test]
    fn buckets_are_cumulative_and_labels_escaped() {
        let metrics = Metrics::new();
        let local = metrics.local();
        for ms in [1, 2, 60_000] {
            local.record(Metric::Duration, &["inbound", "a\"b\\", ""], Duration::from_millis(ms));
        }
        assert_eq!(metrics.recorded(Metric::Duration, &["inbound"]), 3);
        assert_eq!(metrics.recorded(Metric::Duration, &["outbound"]), 0);
        let text = metrics.encode();
        let labels = r#"direction="inbound",service="a\"b\\",version="""#;
        for (bound, count) in [("0.001", 1), ("0.0025", 2), ("30", 2), ("+Inf", 3)] {
            let want = format!("outrigger_request_duration_seconds_bucket{{{labels},le=\"{bound}\"}} {count}\n");
            assert!(text.contains(&want), "{want}\n{text}");
        }
        assert!(text.contains(&format!("outrigger_request_duration_seconds_sum{{{labels}}} 60.003\n")));
    }
}
