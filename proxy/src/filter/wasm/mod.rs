//! The Proxy-Wasm host: ABI 0.1.0, 0.2.0 and 0.2.1 on wasmtime.
//!
//! Served are start-up, configuration, request and response headers, local responses, properties and logging. Every other
//! function of the ABI links and answers `Unimplemented` (12), with a line in the log; body and trailer callbacks are not made.
//! A callback that pauses with nothing pending that could resume it fails by the filter's policy.

mod abi;
mod cache;
mod calls;
#[allow(dead_code, reason = "the host functions that use it follow")]
mod counting;
mod engine;
#[allow(dead_code, reason = "the host functions that use it follow")]
mod foreign;
mod headers;
mod host;
mod instance;
mod load;
mod mapped;
mod properties;
mod restart;
#[allow(dead_code, reason = "the host functions that use it follow")]
mod shared;
mod stream;
#[cfg(test)]
mod tests;
mod ticker;
mod wasi;

pub use cache::compile_main;
pub use stream::{release_unused, warm};

pub(super) use cache::Cache;
pub(super) use host::Counters;
use host::Spec;
pub(super) use instance::{Failure, Instance};
pub(super) use restart::Restart;
pub(super) use stream::WasmFilter;

use std::sync::Arc;

use bytes::Bytes;
use outrigger_proto::mesh;
use wasmtime::{Engine, InstancePre};

use super::plugin::{Compiler, FilterError};

/// The engine, its clock and the functions that guests import: one per process.
#[derive(Debug)]
pub(super) struct Runtime {
    engine: Engine,
    ticker: Arc<ticker::Ticker>,
    linkers: load::Linkers,
    pub(super) cache: Cache,
}

/// A module that is ready to be instantiated, with what its instances share.
pub(super) struct Ready {
    pre: InstancePre<host::Host>,
    ticker: Arc<ticker::Ticker>,
    pub(super) spec: Arc<Spec>,
    /// It may read heads after their own callback: it logs, or asks for properties
    pub(super) keeps_heads: bool,
}

impl std::fmt::Debug for Ready {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ready").field("spec", &self.spec.name).finish_non_exhaustive()
    }
}

impl Runtime {
    pub(super) fn new(cache: &std::path::Path) -> Result<Self, FilterError> {
        let refused = |error: wasmtime::Error| FilterError::Refused(format!("no WebAssembly engine: {error:#}"));
        let engine = engine::engine().map_err(refused)?;
        let ticker = ticker::Ticker::start(&engine)
            .map_err(|error| FilterError::Io("the thread that limits filters' time".into(), error))?;
        let linkers = load::Linkers::new(&engine).map_err(refused)?;
        Ok(Self { cache: Cache::open(cache, &engine)?, ticker, linkers, engine })
    }

    /// Compiles a module into the cache.
    pub(super) async fn fill(
        &self,
        compiler: &Compiler,
        sha256: &str,
        module: Option<Bytes>,
    ) -> Result<(), FilterError> {
        self.cache.fill(&self.engine, compiler, sha256, module).await
    }

    /// Maps, links and tries a module of the cache. Blocks for as long as start-up takes.
    pub(super) fn ready(&self, source: &mesh::Filter) -> Result<Ready, FilterError> {
        let module = self.cache.map(&self.engine, &source.sha256)?;
        let (abi, pre) = self.linkers.resolve(&module).map_err(FilterError::Refused)?;
        let imports = |name| module.imports().any(|import| import.name() == name);
        let logs = module.get_export("proxy_on_log").is_some();
        let reads = imports("proxy_get_header_map_value") || imports("proxy_get_header_map_pairs");
        let keeps_heads = imports("proxy_get_property") || (logs && reads);
        let ready = Ready { pre, ticker: Arc::clone(&self.ticker), spec: Arc::new(Spec::of(source, abi)), keeps_heads };
        ready
            .start(Arc::default())
            .map(drop)
            .map_err(|failure| FilterError::Refused(format!("the filter does not start: {}", failure.message)))?;
        Ok(ready)
    }
}

impl Ready {
    /// A new instance for the calling thread.
    pub(super) fn start(&self, counters: Arc<Counters>) -> Result<Instance, Failure> {
        Instance::start(&self.pre, &self.ticker, &self.spec, counters)
    }
}
