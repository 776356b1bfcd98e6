//! Maps compiled modules. With the way into guests, the only unsafe code of the filter host.
#![allow(unsafe_code)]

use std::path::Path;

use wasmtime::{Engine, Module};

/// Maps a file of the private cache.
///
/// # Errors
/// When the file is of another version of wasmtime or of another configuration, or cannot be read.
pub(super) fn module(engine: &Engine, file: &Path) -> wasmtime::Result<Module> {
    // SAFETY: the file is machine code that this program itself compiled from a module whose digest is in its name; it lies
    // in a directory that only this user may write to (`cache::Cache::prepare` refuses any other), it was put there by a rename
    // and is never changed in place.
    unsafe { Module::deserialize_file(engine, file) }
}
