//! Prepared WASM filters, shared by all workers.

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use outrigger_proto::mesh;
use serde::Serialize;

use super::Filter;

/// Where modules are compiled.
#[derive(Debug, Clone)]
pub enum Compiler {
    /// In this process: for tests
    InProcess,
    /// In a child process of this executable, with limits of memory and time
    Child(PathBuf),
}

/// How [`Plugins`] works.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where modules are compiled
    pub compiler: Compiler,
    /// Private directory of compiled modules, made with mode 0700. Its content is machine code: nothing else may write to it
    pub cache: PathBuf,
}

/// Why a filter cannot be used. The message names the thing and the remedy; the filter's own name is not in it.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// The bytes are not those that the digest promises
    #[error("the module's SHA-256 is {actual}, but {expected} was announced; fetch it again")]
    Digest {
        /// Announced
        expected: String,
        /// Of the bytes
        actual: String,
    },
    /// The module was refused
    #[error("{0}")]
    Refused(String),
    /// The module is not in the cache, and no bytes were given
    #[error("the module wasm/{0} is not here yet")]
    Missing(String),
    /// The proxy's own trouble: disk, child process
    #[error("{0}: {1}")]
    Io(String, #[source] std::io::Error),
}

/// How a filter does in this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Health {
    /// Instances run, or will at the first request
    Running,
    /// An instance failed and a new one waits for its time
    BackingOff,
    /// Three failures in 10 s: restarts are spaced out up to the maximum
    Quarantined,
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
    pub instances: u64,
    /// Exchanges that entered the filter
    pub requests: u64,
    /// Callbacks made
    pub calls: u64,
    /// Callbacks that trapped, ran too long or used too much memory
    pub failures: u64,
    /// Of these, the ones that ran too long
    pub timeouts: u64,
    /// Linear memory of all instances, bytes
    pub memory_bytes: u64,
    /// The last failure
    pub last_error: Option<String>,
}

/// A WASM filter, compiled, linked and tried once; of one version of its configuration. Shared by all workers.
#[derive(Debug)]
pub struct Plugin {}

impl Plugin {
    /// This filter's part in one exchange, on the calling worker.
    pub fn filter(_plugin: &Arc<Self>) -> Box<dyn Filter> {
        unreachable!()
    }
}

/// Every WASM filter of this process: one engine, one cache.
#[derive(Debug)]
pub struct Plugins {}

impl Plugins {
    /// Makes the engine and the cache directory.
    ///
    /// # Errors
    /// When the engine cannot be made on this machine, or the directory is not there and cannot be made.
    pub fn new(_settings: Settings) -> Result<Self, FilterError> {
        Ok(Self {})
    }

    /// True: [`Plugins::prepare`] needs no bytes for this digest.
    pub fn has_module(&self, _sha256: &str) -> bool {
        false
    }

    /// Compiles (in the cache, or from `module`), links and tries a filter: its start-up, `on_vm_start` and `on_configure` ran
    /// in a throw-away instance when this returns. The same specification again gives the same plugin.
    ///
    /// Off the data path: runs on the caller's runtime and its blocking threads.
    ///
    /// # Errors
    /// When the module or its configuration is refused; what serves stays as it is.
    pub async fn prepare(&self, _spec: &mesh::Filter, _module: Option<Bytes>) -> Result<Arc<Plugin>, FilterError> {
        Ok(Arc::new(Plugin {}))
    }

    /// Rows of `/filters`, by name. A version that only drains is not listed.
    pub fn status(&self) -> Vec<StatusRow> {
        Vec::new()
    }
}

/// Drops the calling worker's instances of filters that no snapshot and no exchange uses any more. Workers call it after a swap.
pub fn release_unused() {}
