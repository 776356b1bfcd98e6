//! The Proxy-Wasm host: ABI 0.1.0, 0.2.0 and 0.2.1 on wasmtime.
//!
//! An [`instance`] is a store of wasmtime with the plugins (root contexts) in it; [`stream`] is a filter's part in one exchange. A function
//! of the ABI that is not served links and answers `Unimplemented` (12), with a line in the log.

mod abi;
mod buffers;
mod cache;
mod callbacks;
mod callouts;
mod calls;
pub(super) mod clock;
mod contexts;
mod counting;
mod engine;
mod entry;
mod foreign;
mod headers;
mod host;
mod inspect;
mod instance;
mod instances;
mod load;
mod logging;
mod mapped;
mod maps;
mod outside;
mod properties;
mod restart;
mod root;
mod shared;
mod sharing;
mod stream;
#[cfg(test)]
mod tests;
mod ticker;
mod trace;
mod wasi;

pub use cache::compile_main;
pub use inspect::{Export, Import, Inspection, Memory, Producer, Section, inspect};
pub use instances::{release_unused, warm};
pub use outside::{Answer, AnswerBody, CallOut, Outside, connect};

pub(super) use cache::Cache;
pub(super) use host::Counters;
use host::Spec;
pub(super) use instance::{Failure, Instance};
pub(super) use instances::Entered;
pub(super) use restart::Restart;
pub(super) use stream::WasmFilter;

use std::rc::Rc;
use std::sync::Arc;

use bytes::Bytes;
use outrigger_proto::mesh;
use wasmtime::{Engine, InstancePre, Module};

use super::Interest;
use super::plugin::{Compiler, FilterError};

/// The engine, its clock and the functions that guests import: one per process.
#[derive(Debug)]
pub(super) struct Runtime {
    engine: Engine,
    ticker: Arc<ticker::Ticker>,
    linkers: load::Linkers,
    pub(super) cache: Cache,
    vms: Arc<shared::Vms>,
    /// What filters count
    pub(super) metrics: counting::GuestMetrics,
}

/// A module that is ready to be instantiated, with what its instances share.
pub(super) struct Ready {
    pre: InstancePre<host::Host>,
    ticker: Arc<ticker::Ticker>,
    pub(super) spec: Arc<Spec>,
    pub(super) interest: Interest,
    /// What has to be equal in plugins that share an instance: `vm.id`, module, configuration and limits of the VM
    pub(super) shared: Option<Arc<str>>,
}

impl std::fmt::Debug for Ready {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ready").field("spec", &self.spec.name).finish_non_exhaustive()
    }
}

impl Runtime {
    pub(super) fn new(cache: &std::path::Path, hollow: &[&str], trace: bool) -> Result<Self, FilterError> {
        let refused = |error: wasmtime::Error| FilterError::Refused(format!("no WebAssembly engine: {error:#}"));
        let engine = engine::engine().map_err(refused)?;
        let ticker = ticker::Ticker::start(&engine)
            .map_err(|error| FilterError::Io("the thread that limits filters' time".into(), error))?;
        let linkers = load::Linkers::new(&engine, hollow, trace).map_err(refused)?;
        let cache = Cache::of(cache, &engine);
        Ok(Self { cache, ticker, linkers, engine, vms: Arc::default(), metrics: counting::GuestMetrics::default() })
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
        let name = format!("{}/{}", source.namespace, source.name);
        let vm = self.vms.join(&source.namespace, &source.vm_id, &source.name);
        let spec = Spec::of(source, abi, vm, self.metrics.of(&name));
        let spec = Arc::new(Spec { trace: self.linkers.trace, ..spec });
        let shared = (!spec.vm_id.is_empty()).then(|| spec.vm_key(&source.sha256).into());
        let ready = Ready { pre, ticker: Arc::clone(&self.ticker), spec, interest: interest(&module), shared };
        ready
            .enter(None, &Arc::new(ready.spec.for_trial()), Arc::new(Counters::new(0)))
            // Nobody hears of it, its own end included.
            .map(drop)
            .map_err(|failure| FilterError::Refused(does_not_start(&failure)))?;
        Ok(ready)
    }
}

impl Ready {
    /// A place in a shared instance, or a new instance for the calling thread.
    pub(super) fn start(&self, shared: Option<Rc<Instance>>, counters: Arc<Counters>) -> Result<Entered, Failure> {
        self.ticker.watch(&counters.meter);
        self.enter(shared, &self.spec, counters)
    }

    fn enter(
        &self,
        shared: Option<Rc<Instance>>,
        spec: &Arc<Spec>,
        counters: Arc<Counters>,
    ) -> Result<Entered, Failure> {
        let instance = match shared {
            Some(instance) => instance,
            None => Instance::start(&self.pre, &self.ticker, spec, Arc::clone(&counters))?,
        };
        let root = instance.add_root(spec, counters)?;
        Ok(Entered { instance, root })
    }
}

fn does_not_start(failure: &Failure) -> String {
    format!("the filter does not start: {}", failure.message)
}

/// Which callbacks a module has.
fn interest(module: &Module) -> Interest {
    let exports = |name: &str| module.get_export(name).is_some();
    let imports = |name| module.imports().any(|import| import.name() == name);
    // It may read heads after their own callback: it logs, or asks for properties.
    let reads = imports("proxy_get_header_map_value") || imports("proxy_get_header_map_pairs");
    let keeps = imports("proxy_get_property") || (exports("proxy_on_log") && reads);
    Interest {
        request_body: exports("proxy_on_request_body") || exports("proxy_on_downstream_data"),
        request_trailers: exports("proxy_on_request_trailers"),
        response_body: exports("proxy_on_response_body") || exports("proxy_on_upstream_data"),
        response_trailers: exports("proxy_on_response_trailers"),
        keeps_request: keeps,
        keeps_response: keeps,
    }
}
