//! The Proxy-Wasm host: ABI 0.2.0 and 0.2.1 on wasmtime.

/// `outrigger-proxy --compile-filter IN OUT`: `main` calls this first thing, with its arguments. `Some(exit code)` when the
/// process was started to compile a module, and must end with that code.
pub fn compile_main(_args: &[std::ffi::OsString]) -> Option<i32> {
    None
}
