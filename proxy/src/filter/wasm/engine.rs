//! The one wasmtime engine of a process.

use std::hash::{DefaultHasher, Hash, Hasher};

use wasmtime::{Config, Engine, OptLevel};

/// Stack of a guest, bytes. Threads that call guests need this and room for host frames: at least 2 MiB.
const GUEST_STACK: usize = 512 * 1024;

/// An engine with what filters need and nothing else. The same in the process that compiles and in the one that runs.
pub(super) fn engine() -> wasmtime::Result<Engine> {
    let mut config = Config::new();
    config
        .cranelift_opt_level(OptLevel::Speed)
        .epoch_interruption(true)
        .max_wasm_stack(GUEST_STACK)
        .wasm_backtrace_max_frames(std::num::NonZeroUsize::new(20))
        .wasm_relaxed_simd(false)
        .wasm_memory64(false)
        .wasm_multi_memory(false);
    Engine::new(&config)
}

/// Names the code that this engine can map: part of the file name in the cache.
pub(super) fn compatibility(engine: &Engine) -> u64 {
    // Fixed keys: equal over restarts.
    let mut hasher = DefaultHasher::new();
    engine.precompile_compatibility_hash().hash(&mut hasher);
    hasher.finish()
}
