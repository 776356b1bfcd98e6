//! Compiled modules on disk, and the child process that compiles them.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use nix::sys::resource::{Resource, setrlimit};
use sha2::{Digest, Sha256};
use wasmtime::{Engine, Module};

use super::super::plugin::{Compiler, FilterError};
use super::{engine, mapped};

/// Argument that turns this program into a compiler.
const COMPILE: &str = "--compile-filter";
/// Limits of a module and of its compilation.
const MODULE_BYTES: usize = 64 * 1024 * 1024;
const COMPILE_MEMORY: u64 = 4 << 30;
const COMPILE_CPU_SECONDS: u64 = 60;
const COMPILE_TIME: Duration = Duration::from_secs(120);
/// Compiled modules that are kept from earlier runs, the newest ones.
const KEPT: usize = 64;
/// What another engine compiled, and half-done work, is nobody's after this time.
const STALE: Duration = Duration::from_secs(600);

/// The directory of compiled modules.
#[derive(Debug)]
pub(crate) struct Cache {
    directory: PathBuf,
    compatibility: u64,
    /// By digest: several filters of one module have it compiled once
    turns: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
}

impl Cache {
    /// Makes the directory, mode 0700.
    pub(crate) fn prepare(directory: &Path) -> Result<(), FilterError> {
        let trouble = |error| FilterError::Io(format!("cache of compiled filters {}", directory.display()), error);
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(trouble)?;
        let meta = std::fs::metadata(directory).map_err(trouble)?;
        if meta.uid() != nix::unistd::geteuid().as_raw() {
            return Err(trouble(io::Error::other("it belongs to another user; name another --state")));
        }
        if meta.permissions().mode() & 0o077 != 0 {
            std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o700)).map_err(trouble)?;
        }
        Ok(())
    }

    /// A directory that was prepared, for the code of an engine.
    pub(crate) fn of(directory: &Path, engine: &Engine) -> Self {
        let compatibility = engine::compatibility(engine);
        let this = Self { directory: directory.to_owned(), compatibility, turns: Mutex::default() };
        if let Err(error) = this.tidy() {
            tracing::warn!(directory = %directory.display(), %error, "the cache of compiled filters cannot be tidied");
        }
        this
    }

    /// Removes what another engine compiled, what an end in the middle left behind, and all but the newest.
    fn tidy(&self) -> io::Result<()> {
        let suffix = format!("-{:016x}.cwasm", self.compatibility);
        let mut ours = Vec::new();
        for entry in std::fs::read_dir(&self.directory)? {
            let entry = entry?;
            let written = entry.metadata().and_then(|meta| meta.modified()).unwrap_or_else(|_| SystemTime::now());
            if entry.file_name().to_string_lossy().ends_with(&suffix) {
                ours.push((written, entry.path()));
            } else if written.elapsed().is_ok_and(|age| age > STALE) {
                // Whoever has one mapped keeps it.
                let _ = std::fs::remove_file(entry.path());
            }
        }
        ours.sort();
        for (_, old) in ours.iter().rev().skip(KEPT) {
            let _ = std::fs::remove_file(old);
        }
        Ok(())
    }

    fn turn(&self, sha256: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        turns.retain(|_, turn| Arc::strong_count(turn) > 1);
        Arc::clone(turns.entry(sha256.to_owned()).or_default())
    }

    fn file(&self, sha256: &str) -> PathBuf {
        self.directory.join(format!("{sha256}-{:016x}.cwasm", self.compatibility))
    }

    /// True: the module of this digest is compiled.
    pub(crate) fn has(&self, sha256: &str) -> bool {
        is_digest(sha256) && self.file(sha256).exists()
    }

    /// Compiles a module whose digest is `sha256`, unless that is done.
    pub(crate) async fn fill(
        &self,
        engine: &Engine,
        compiler: &Compiler,
        sha256: &str,
        module: Option<bytes::Bytes>,
    ) -> Result<(), FilterError> {
        if !is_digest(sha256) {
            return Err(FilterError::Refused(format!("`{sha256}` is not a SHA-256 in lower-case hex")));
        }
        let turn = self.turn(sha256);
        let _turn = turn.lock().await;
        if self.has(sha256) {
            return Ok(());
        }
        let module = module.ok_or_else(|| FilterError::Missing(sha256.to_owned()))?;
        if module.len() > MODULE_BYTES {
            return Err(FilterError::Refused(format!(
                "the module has {} bytes; at most {MODULE_BYTES} are compiled",
                module.len()
            )));
        }
        let actual = hex::encode(Sha256::digest(&module));
        if actual != sha256 {
            return Err(FilterError::Digest { expected: sha256.to_owned(), actual });
        }
        let scratch = self.directory.join(format!("{sha256}-{}-{:x}", std::process::id(), fastrand::u64(..)));
        let result = self.compile(engine, compiler, &scratch, module, sha256).await;
        for suffix in ["wasm", "tmp"] {
            let _ = std::fs::remove_file(scratch.with_extension(suffix));
        }
        result
    }

    async fn compile(
        &self,
        engine: &Engine,
        compiler: &Compiler,
        scratch: &Path,
        module: bytes::Bytes,
        sha256: &str,
    ) -> Result<(), FilterError> {
        let output = scratch.with_extension("tmp");
        match compiler {
            Compiler::InProcess => {
                let engine = engine.clone();
                let output = output.clone();
                blocking(move || compile_to(&engine, &module, &output)).await??;
            }
            Compiler::Child(executable) => {
                let input = scratch.with_extension("wasm");
                let written = input.clone();
                blocking(move || write_private(&written, &module)).await??;
                child(executable, &input, &output).await?;
            }
        }
        std::fs::rename(&output, self.file(sha256)).map_err(|error| FilterError::Io("compiled filter".into(), error))
    }

    /// Maps the compiled module. A file that does not fit is removed and missing: it is to be compiled again.
    pub(crate) fn map(&self, engine: &Engine, sha256: &str) -> Result<Module, FilterError> {
        let file = self.file(sha256);
        mapped::module(engine, &file).map_err(|error| {
            let _ = std::fs::remove_file(&file);
            tracing::warn!(file = %file.display(), error = format!("{error:#}"), "a compiled module cannot be mapped");
            FilterError::Missing(sha256.to_owned())
        })
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, FilterError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| FilterError::Io("compiling a filter".into(), io::Error::other(error)))
}

fn is_digest(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

async fn child(executable: &Path, input: &Path, output: &Path) -> Result<(), FilterError> {
    let run = tokio::process::Command::new(executable)
        .arg(COMPILE)
        .arg(input)
        .arg(output)
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .output();
    let done = tokio::time::timeout(COMPILE_TIME, run)
        .await
        .map_err(|_| FilterError::Refused(format!("compiling took more than {} s", COMPILE_TIME.as_secs())))?
        .map_err(|error| FilterError::Io(format!("starting {}", executable.display()), error))?;
    if done.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&done.stderr);
    let text: String = text.trim().chars().take(2000).collect();
    Err(FilterError::Refused(if text.is_empty() {
        format!("compiling ended with {}: more than 4 GiB of memory or 60 s of CPU", done.status)
    } else {
        text
    }))
}

fn write_private(file: &Path, bytes: &[u8]) -> Result<(), FilterError> {
    std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(file)
        .and_then(|mut open| io::Write::write_all(&mut open, bytes))
        .map_err(|error| FilterError::Io(file.display().to_string(), error))
}

fn compile_to(engine: &Engine, module: &[u8], output: &Path) -> Result<(), FilterError> {
    if !module.starts_with(b"\0asm") {
        return Err(FilterError::Refused("not a WebAssembly module: it does not begin with \\0asm".into()));
    }
    let code = engine
        .precompile_module(module)
        .map_err(|error| FilterError::Refused(format!("not a WebAssembly module that can be compiled: {error:#}")))?;
    write_private(output, &code)
}

/// `outrigger-proxy --compile-filter IN OUT`: `main` calls this first thing, with its arguments after the program's name. It
/// is `Some(exit code)` when the process was started to compile a module, and must end with that code.
pub fn compile_main(args: &[OsString]) -> Option<i32> {
    let [flag, input, output] = args else { return None };
    if flag != COMPILE {
        return None;
    }
    match compile_here(Path::new(input), Path::new(output)) {
        Ok(()) => Some(0),
        Err(error) => {
            // The parent reads it.
            let _ = io::Write::write_all(&mut io::stderr(), error.to_string().as_bytes());
            Some(1)
        }
    }
}

fn compile_here(input: &Path, output: &Path) -> Result<(), FilterError> {
    let limit = |resource, value| {
        setrlimit(resource, value, value)
            .map_err(|error| FilterError::Io("limits of the compiler".into(), error.into()))
    };
    limit(Resource::RLIMIT_AS, COMPILE_MEMORY)?;
    limit(Resource::RLIMIT_CPU, COMPILE_CPU_SECONDS)?;
    limit(Resource::RLIMIT_CORE, 0)?;
    let module = std::fs::read(input).map_err(|error| FilterError::Io(input.display().to_string(), error))?;
    let engine = engine::engine().map_err(|error| FilterError::Refused(format!("no WebAssembly engine: {error:#}")))?;
    compile_to(&engine, &module, output)
}

#[cfg(test)]
mod tests;
