//! What a module is made of, and whether this host loads it: by loading it, in a place of its own.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use outrigger_proto::mesh;
use serde::Serialize;
use sha2::{Digest, Sha256};
use wasmparser::{BinaryReaderError, KnownCustom, Parser, Payload};
use wasmtime::{ExternType, Module, Store, ValType};

use super::super::plugin::{Compiler, FilterError};
use super::abi::Abi;
use super::cache::Cache;
use super::host::{Counters, Host, Spec};
use super::{Instance, Runtime, load};

/// Most exports and imports that are listed.
const LISTED: usize = 10_000;

/// What was found. What cannot be read of a refused module is empty.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Inspection {
    /// Of the module
    pub sha256: String,
    /// Bytes
    pub size: u64,
    /// The served version of the ABI that it marks: `0.2.1`
    pub abi: Option<String>,
    /// What made it: language and tools, by its `producers` section or by what it exports
    pub made: Vec<Producer>,
    /// What the module wants of the host, in its order
    pub imports: Vec<Import>,
    /// What it has for the host, in its order
    pub exports: Vec<Export>,
    /// The memory that it exports
    pub memory: Option<Memory>,
    /// In its order
    pub sections: Vec<Section>,
    /// Milliseconds that compiling took, as in a proxy: in a process of its own
    pub compile_ms: Option<f64>,
    /// Why a proxy refuses the module, if it does
    pub refused: Option<String>,
    /// Why it does not take the configuration it was tried with
    pub configuration: Option<String>,
}

/// A language or tool.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Producer {
    /// `language`, `processed-by`, `sdk`, or `guess`
    pub field: String,
    /// `Rust`, `clang`
    pub name: String,
    /// Its version, or ""
    pub version: String,
}

/// A thing that the module imports.
#[derive(Debug, Serialize)]
pub struct Import {
    /// `env`
    pub module: String,
    /// `proxy_log`
    pub name: String,
    /// `(i32, i32) -> (i32)`
    #[serde(rename = "type")]
    pub ty: String,
    /// The host has it, with this type
    pub served: bool,
}

/// A thing that the module exports.
#[derive(Debug, Serialize)]
pub struct Export {
    /// `proxy_on_request_headers`
    pub name: String,
    /// Its type, as in [`Import`]
    #[serde(rename = "type")]
    pub ty: String,
}

/// Linear memory, bytes.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// When it starts
    pub initial: u64,
    /// The most that the module itself declares
    pub maximum: Option<u64>,
}

/// A part of the module.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Section {
    /// `code`; custom sections by their own name
    pub name: String,
    /// Bytes
    pub size: u64,
}

/// Loads a module as a proxy does, and tells what it saw on the way. `configuration`: what `on_configure` is tried with. `cache`: a
/// directory for what is compiled, which the caller removes.
///
/// # Errors
/// Trouble of this machine: a module that is refused is no error.
pub async fn inspect(
    module: Bytes,
    configuration: &[u8],
    compiler: &Compiler,
    cache: &Path,
) -> Result<Inspection, FilterError> {
    let sha256 = hex::encode(Sha256::digest(&module));
    let mut found = Inspection { sha256: sha256.clone(), size: module.len() as u64, ..Inspection::default() };
    // What cannot be parsed to its end is refused below, with the compiler's reason.
    let _ = parts(&module, &mut found);
    Cache::prepare(cache)?;
    let runtime = Runtime::new(cache, &[], false)?;
    let source = mesh::Filter {
        namespace: "inspect".into(),
        name: "filter".into(),
        sha256: sha256.clone(),
        configuration: Bytes::copy_from_slice(configuration),
        ..mesh::Filter::default()
    };
    let begin = Instant::now();
    match runtime.fill(compiler, &sha256, Some(module)).await {
        Ok(()) => found.compile_ms = Some((begin.elapsed().as_secs_f64() * 1e4).round() / 10.0),
        Err(FilterError::Refused(why)) => {
            found.refused = Some(why);
            return Ok(found);
        }
        Err(trouble) => return Err(trouble),
    }
    let trying = tokio::task::spawn_blocking(move || runtime.look(&source, found));
    trying.await.map_err(|error| FilterError::Io("trying a filter".into(), std::io::Error::other(error)))?
}

impl Runtime {
    /// Maps and links a module and lists what it is linked with; then starts it.
    fn look(&self, source: &mesh::Filter, mut found: Inspection) -> Result<Inspection, FilterError> {
        let module = self.cache.map(&self.engine, &source.sha256)?;
        let vm = self.vms.join(&source.namespace, &source.vm_id, &source.name);
        let metrics = self.metrics.of(&source.name);
        let spec = |abi| Arc::new(Spec::of(source, abi, vm.clone(), metrics.clone()));
        let marked = load::version(&module);
        found.abi = marked.map(Abi::number);
        let abi = marked.unwrap_or(Abi::V0_2_1);
        let mut store = Store::new(&self.engine, Host::new(spec(abi), Arc::new(Counters::new(0))));
        found.imports = module
            .imports()
            .take(LISTED)
            .map(|import| Import {
                module: import.module().to_owned(),
                name: import.name().to_owned(),
                ty: text(&import.ty()),
                served: self.linkers.serves(abi, &mut store, &import),
            })
            .collect();
        let export = |export: wasmtime::ExportType<'_>| Export { name: export.name().into(), ty: text(&export.ty()) };
        found.exports = module.exports().take(LISTED).map(export).collect();
        found.memory = memory(&module);
        guess(&module, &mut found);
        let (abi, pre) = match self.linkers.resolve(&module) {
            Ok(ready) => ready,
            Err(why) => {
                found.refused = Some(why);
                return Ok(found);
            }
        };
        let spec = spec(abi);
        let instance = Instance::start(&pre, &self.ticker, &Arc::new(spec.for_trial()), Arc::new(Counters::new(0)));
        match instance {
            Err(failure) => found.refused = Some(super::does_not_start(&failure)),
            Ok(instance) => {
                let root = instance.add_root(&Arc::new(spec.for_trial()), Arc::new(Counters::new(0)));
                found.configuration = root.err().map(|failure| super::does_not_start(&failure));
            }
        }
        Ok(found)
    }
}

fn text(ty: &ExternType) -> String {
    match ty {
        ExternType::Func(ty) => {
            let words = |types: &mut dyn Iterator<Item = ValType>| {
                types.map(|ty| ty.to_string()).collect::<Vec<_>>().join(", ")
            };
            format!("({}) -> ({})", words(&mut ty.params()), words(&mut ty.results()))
        }
        ExternType::Global(_) => "global".into(),
        ExternType::Table(_) => "table".into(),
        ExternType::Memory(_) => "memory".into(),
        ExternType::Tag(_) => "tag".into(),
    }
}

fn memory(module: &Module) -> Option<Memory> {
    let ExternType::Memory(ty) = module.get_export("memory")? else { return None };
    let bytes = |pages: u64| pages.saturating_mul(ty.page_size());
    Some(Memory { initial: bytes(ty.minimum()), maximum: ty.maximum().map(bytes) })
}

/// Tools that leave no `producers` section are told by what they export and import.
fn guess(module: &Module, found: &mut Inspection) {
    let exports = |name: &str| module.get_export(name).is_some();
    let imports = |name: &str| module.imports().any(|import| import.name() == name);
    let name = if imports("emscripten_notify_memory_growth") {
        "C++ (Emscripten)"
    } else if found.sections.iter().any(|section| section.name == "go:buildid") {
        "Go"
    } else if exports("__new") && exports("__pin") {
        "AssemblyScript"
    } else {
        return;
    };
    if !found.made.iter().any(|made| made.field == "language") {
        found.made.push(Producer { field: "guess".into(), name: name.into(), version: String::new() });
    }
}

/// The module's sections, and who made it.
fn parts(module: &[u8], found: &mut Inspection) -> Result<(), BinaryReaderError> {
    for payload in Parser::new(0).parse_all(module) {
        let payload = payload?;
        let Some((id, range)) = payload.as_section() else { continue };
        let name = match &payload {
            Payload::CustomSection(custom) => {
                if let KnownCustom::Producers(producers) = custom.as_known() {
                    for field in producers {
                        let field = field?;
                        for value in field.values {
                            let value = value?;
                            found.made.push(Producer {
                                field: field.name.into(),
                                name: value.name.into(),
                                version: value.version.into(),
                            });
                        }
                    }
                }
                custom.name().to_owned()
            }
            _ => section(id).to_owned(),
        };
        found.sections.push(Section { name, size: range.len() as u64 });
    }
    Ok(())
}

/// Names of sections in the WebAssembly specification, by id.
fn section(id: u8) -> &'static str {
    const NAMES: [&str; 14] = [
        "custom",
        "type",
        "import",
        "function",
        "table",
        "memory",
        "global",
        "export",
        "start",
        "element",
        "code",
        "data",
        "data count",
        "tag",
    ];
    NAMES.get(usize::from(id)).copied().unwrap_or("unknown")
}
