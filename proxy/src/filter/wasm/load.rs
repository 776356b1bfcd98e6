//! What a module must look like, checked before anything of it runs.

use wasmtime::{ExternType, ImportType, InstancePre, Linker, Module, Store, ValType};

use super::abi::Abi;
use super::host::Host;
use super::{calls, trace, wasi};

/// The functions of every ABI, linked once per process.
pub(super) struct Linkers {
    all: [(Abi, Linker<Host>); 3],
    /// Functions that do nothing
    hollow: Vec<String>,
    /// Host calls and callbacks are told
    pub(super) trace: bool,
}

impl std::fmt::Debug for Linkers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Linkers")
    }
}

impl Linkers {
    pub(super) fn new(engine: &wasmtime::Engine, hollow: &[&str], trace: bool) -> wasmtime::Result<Self> {
        let linker = |abi| -> wasmtime::Result<_> {
            let mut linker = Linker::new(engine);
            calls::link(&mut linker, abi)?;
            wasi::link(&mut linker)?;
            Ok((abi, linker))
        };
        let [a, b, c] = Abi::ALL;
        let hollow = hollow.iter().map(|name| (*name).to_owned()).collect();
        Ok(Self { all: [linker(a)?, linker(b)?, linker(c)?], hollow, trace })
    }

    /// Checks a module's exports and resolves its imports. The error is the user's message.
    pub(super) fn resolve(&self, module: &Module) -> Result<(Abi, InstancePre<Host>), String> {
        let abi = check(module)?;
        let linker = self.all.iter().find(|(of, _)| *of == abi).map(|(_, linker)| linker);
        let linker = linker.ok_or("no linker")?;
        let pre = if self.hollow.is_empty() {
            linker.instantiate_pre(module)
        } else {
            empty(linker, module, &self.hollow).and_then(|linker| linker.instantiate_pre(module))
        };
        let mut pre = pre.map_err(|error| {
            format!("an import of the module is not served in Proxy-Wasm ABI {}: {error:#}", abi.number())
        })?;
        if self.trace {
            let traced = trace::imports(linker, module).and_then(|linker| linker.instantiate_pre(module));
            pre = traced.map_err(|error| format!("the module cannot be traced: {error:#}"))?;
        }
        Ok((abi, pre))
    }

    /// True: modules of this ABI may import it, with this type. For those who look; [`Linkers::resolve`] decides.
    pub(super) fn serves(&self, abi: Abi, store: &mut Store<Host>, import: &ImportType<'_>) -> bool {
        let linker = self.all.iter().find(|(of, _)| *of == abi).map(|(_, linker)| linker);
        let found = linker.and_then(|linker| linker.get_by_import(&mut *store, import));
        match (found.map(|found| found.ty(&*store)), import.ty()) {
            (Some(ExternType::Func(ours)), ExternType::Func(wanted)) => ours.matches(&wanted),
            _ => false,
        }
    }
}

/// Replaces functions that a module imports by some that return Ok (0) and do nothing.
fn empty(linker: &Linker<Host>, module: &Module, hollow: &[String]) -> wasmtime::Result<Linker<Host>> {
    let mut linker = linker.clone();
    linker.allow_shadowing(true);
    for import in module.imports().filter(|import| hollow.iter().any(|name| name == import.name())) {
        let ExternType::Func(ty) = import.ty() else { continue };
        linker.func_new(import.module(), import.name(), ty, |_, _, results| {
            results.fill(wasmtime::Val::I32(0));
            Ok(())
        })?;
    }
    Ok(linker)
}

/// Callbacks that are called, and their parameters and results.
const CALLBACKS: [(&str, usize, usize); 29] = [
    ("malloc", 1, 1),
    ("proxy_on_memory_allocate", 1, 1),
    ("_initialize", 0, 0),
    ("_start", 0, 0),
    ("proxy_on_context_create", 2, 0),
    ("proxy_on_vm_start", 2, 1),
    ("proxy_on_configure", 2, 1),
    ("proxy_on_request_headers", 3, 1),
    ("proxy_on_response_headers", 3, 1),
    ("proxy_on_request_body", 3, 1),
    ("proxy_on_response_body", 3, 1),
    ("proxy_on_request_trailers", 2, 1),
    ("proxy_on_response_trailers", 2, 1),
    ("proxy_on_new_connection", 1, 1),
    ("proxy_on_downstream_data", 3, 1),
    ("proxy_on_upstream_data", 3, 1),
    ("proxy_on_downstream_connection_close", 2, 0),
    ("proxy_on_upstream_connection_close", 2, 0),
    ("proxy_on_tick", 1, 0),
    ("proxy_on_queue_ready", 2, 0),
    ("proxy_on_http_call_response", 5, 0),
    ("proxy_on_grpc_receive_initial_metadata", 3, 0),
    ("proxy_on_grpc_receive", 3, 0),
    ("proxy_on_grpc_receive_trailing_metadata", 3, 0),
    ("proxy_on_grpc_close", 3, 0),
    ("proxy_on_done", 1, 1),
    ("proxy_on_log", 1, 0),
    ("proxy_on_delete", 1, 0),
    ("main", 2, 1),
];

/// The newest served version of the ABI that the module marks.
pub(super) fn version(module: &Module) -> Option<Abi> {
    Abi::ALL.into_iter().rev().find(|abi| matches!(module.get_export(abi.marker()), Some(ExternType::Func(_))))
}

fn check(module: &Module) -> Result<Abi, String> {
    let exported = |name: &str| module.get_export(name);
    let Some(abi) = version(module) else {
        let other = module.exports().map(|export| export.name()).find(|name| name.starts_with("proxy_abi_version_"));
        return Err(format!(
            "{}; served are Proxy-Wasm ABI 0.1.0, 0.2.0 and 0.2.1 (an export such as proxy_abi_version_0_2_1)",
            other.map_or_else(
                || "the module exports no proxy_abi_version_* function, so it is no Proxy-Wasm filter".to_owned(),
                |name| format!("the module is for another version of the ABI ({name})")
            )
        ));
    };
    if !matches!(exported("memory"), Some(ExternType::Memory(_))) {
        return Err("the module exports no `memory`".into());
    }
    if exported("malloc").is_none() && exported("proxy_on_memory_allocate").is_none() {
        return Err("the module exports no allocator: neither `proxy_on_memory_allocate` nor `malloc`".into());
    }
    for (name, params, results) in CALLBACKS {
        let Some(export) = exported(name) else { continue };
        let ExternType::Func(ty) = &export else { return Err(format!("the module's export `{name}` is no function")) };
        let words = ty.params().chain(ty.results()).all(|ty| matches!(ty, ValType::I32));
        // Modules for 0.1.0 leave out `end_of_stream`, though not all that say so.
        let short = name.ends_with("_headers") && abi == Abi::V0_1_0 && ty.params().len() == 2;
        if !words || !(ty.params().len() == params || short) || ty.results().len() != results {
            return Err(format!(
                "the module's export `{name}` has the type {ty}; the ABI has {params} parameters and {results} results, all i32"
            ));
        }
    }
    Ok(abi)
}
