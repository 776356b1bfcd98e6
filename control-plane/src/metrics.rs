//! The control plane's own metrics, in Prometheus' text format.

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// Counters and gauges; cloning shares them.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    /// Discovery responses sent
    pub pushes: Counter,
    /// Their size
    pub pushed_bytes: Counter,
    /// Resources that proxies refused
    pub nacks: Counter,
    /// Certificates signed
    pub signatures: Counter,
    proxies: Gauge,
    rejected: Gauge,
    generation: Gauge,
}

impl Metrics {
    /// The text. The arguments are read at this moment: connected proxies, rejected resources, published
    /// states, and the work of [`Mesh::work`](crate::mesh::Mesh::work).
    pub fn text(&self, proxies: usize, rejected: usize, generation: u64, work: (u64, u64, u64)) -> String {
        let gauge = |value: usize| i64::try_from(value).unwrap_or(i64::MAX);
        self.proxies.set(gauge(proxies));
        self.rejected.set(gauge(rejected));
        self.generation.set(i64::try_from(generation).unwrap_or(i64::MAX));
        let mut registry = Registry::with_prefix("outrigger_control");
        registry.register("pushes", "Discovery responses sent to proxies", self.pushes.clone());
        registry.register("pushed_bytes", "Bytes of discovery responses sent to proxies", self.pushed_bytes.clone());
        registry.register("nacks", "Resources that proxies refused", self.nacks.clone());
        registry.register("signatures", "Certificates signed", self.signatures.clone());
        registry.register("connected_proxies", "Proxies with an open discovery stream", self.proxies.clone());
        registry.register("rejected_resources", "Resources rejected now", self.rejected.clone());
        registry.register("generation", "States published since the start", self.generation.clone());
        for (name, help, count) in [
            ("compiled_answers", "Answers to subscriptions that were compiled and encoded", work.0),
            ("full_builds", "Times that the catalog was built from everything", work.1),
            ("files_read", "Configuration files read", work.2),
        ] {
            let counter = Counter::<u64>::default();
            counter.inc_by(count);
            registry.register(name, help, counter);
        }
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = encode(&mut text, &registry);
        text
    }
}
