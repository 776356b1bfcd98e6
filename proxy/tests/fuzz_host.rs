//! The filters' host under arbitrary modules and arbitrary host calls. `make fuzz SECS=60` runs it for longer, `SEED=` replays.
//!
//! Whatever a guest does, nothing of the host may panic, and a well-behaved filter beside it must not notice.
#![allow(clippy::unwrap_used, clippy::panic, clippy::missing_panics_doc)]
#![allow(clippy::print_stdout, reason = "the seed is what replays a run")]
#![allow(clippy::too_many_lines, reason = "a guest in one piece")]

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use fastrand::Rng;
use outrigger_proto::mesh;
use outrigger_proxy::filter::{Chain, Compiler, Flow, Plugin, Plugins, Settings, StreamInfo};
use sha2::{Digest, Sha256};

/// Functions of ABI 0.2.1: name and parameters (`i` 32 bits, `I` 64 bits). Numbers index this in scripts.
const CALLS: [(&str, &str); 44] = [
    ("proxy_log", "iii"),
    ("proxy_get_log_level", "i"),
    ("proxy_get_current_time_nanoseconds", "i"),
    ("proxy_set_tick_period_milliseconds", "i"),
    ("proxy_get_buffer_bytes", "iiiii"),
    ("proxy_set_buffer_bytes", "iiiii"),
    ("proxy_get_buffer_status", "iii"),
    ("proxy_get_header_map_size", "ii"),
    ("proxy_get_header_map_pairs", "iii"),
    ("proxy_set_header_map_pairs", "iii"),
    ("proxy_get_header_map_value", "iiiii"),
    ("proxy_add_header_map_value", "iiiii"),
    ("proxy_replace_header_map_value", "iiiii"),
    ("proxy_remove_header_map_value", "iii"),
    ("proxy_get_property", "iiii"),
    ("proxy_set_property", "iiii"),
    ("proxy_continue_stream", "i"),
    ("proxy_close_stream", "i"),
    ("proxy_send_local_response", "iiiiiiii"),
    ("proxy_set_effective_context", "i"),
    ("proxy_done", ""),
    ("proxy_get_status", "iii"),
    ("proxy_http_call", "iiiiiiiiii"),
    ("proxy_grpc_call", "iiiiiiiiiiii"),
    ("proxy_grpc_stream", "iiiiiiiii"),
    ("proxy_grpc_send", "iiii"),
    ("proxy_grpc_cancel", "i"),
    ("proxy_grpc_close", "i"),
    ("proxy_get_shared_data", "iiiii"),
    ("proxy_set_shared_data", "iiiii"),
    ("proxy_register_shared_queue", "iii"),
    ("proxy_resolve_shared_queue", "iiiii"),
    ("proxy_enqueue_shared_queue", "iii"),
    ("proxy_dequeue_shared_queue", "iii"),
    ("proxy_define_metric", "iiii"),
    ("proxy_increment_metric", "iI"),
    ("proxy_record_metric", "iI"),
    ("proxy_get_metric", "ii"),
    ("proxy_call_foreign_function", "iiiiii"),
    ("fd_write", "iiii"),
    ("environ_get", "ii"),
    ("environ_sizes_get", "ii"),
    ("random_get", "ii"),
    ("clock_time_get", "iIi"),
];

/// Words in the guest's memory, each 128 bytes on from the one before; what scripts point at.
const WORDS: [&str; 16] = [
    "x-foo",
    ":path",
    ":status",
    "content-length",
    "/a?b=c",
    "GET",
    "request\\00path",
    "wasm_state",
    "authz",
    "queue",
    "compress",
    "\\01\\00\\00\\00\\01\\00\\00\\00\\01\\00\\00\\00a\\00b\\00",
    "\\ff\\ff\\ff\\ff",
    "a\\0d\\0ab",
    "source\\00address",
    "uncompress",
];
const WORDS_AT: u32 = 1024;
/// Where the guest's script begins, and its allocator's memory.
const SCRIPT_AT: u32 = 16_384;
const HEAP_AT: u32 = 131_072;

/// A guest whose callbacks do what their script, the plugin's configuration, says: the number of a function, then a word for each
/// parameter (two for one of 64 bits). 0xff ends a callback; the next byte is what it returns.
fn interpreter() -> String {
    let mut imports = String::new();
    let mut cases = String::new();
    for (index, (name, params)) in CALLS.iter().enumerate() {
        let module = if name.starts_with("proxy_") { "env" } else { "wasi_snapshot_preview1" };
        let types: String = params.chars().map(|p| if p == 'I' { "i64 " } else { "i32 " }).collect();
        let _ = writeln!(imports, "(import \"{module}\" \"{name}\" (func $f{index} (param {types}) (result i32)))");
        let arguments: String =
            params.chars().map(|p| if p == 'I' { "(call $long) " } else { "(call $word) " }).collect();
        let _ = writeln!(
            cases,
            "(if (i32.eq (local.get 0) (i32.const {index})) (then (drop (call $f{index} {arguments}))))"
        );
    }
    let mut words = String::new();
    for (index, word) in WORDS.iter().enumerate() {
        let _ = writeln!(words, "(data (i32.const {}) \"{word}\")", WORDS_AT + 128 * u32::try_from(index).unwrap());
    }
    let mut callbacks = String::new();
    for (name, params, result) in [
        ("context_create", 2, false),
        ("vm_start", 2, false),
        ("request_headers", 3, true),
        ("request_body", 3, true),
        ("request_trailers", 2, true),
        ("response_headers", 3, true),
        ("response_body", 3, true),
        ("response_trailers", 2, true),
        ("new_connection", 1, true),
        ("downstream_data", 3, true),
        ("upstream_data", 3, true),
        ("done", 1, true),
        ("log", 1, false),
        ("delete", 1, false),
        ("tick", 1, false),
    ] {
        let params = "i32 ".repeat(params);
        let result = match (name, result) {
            ("vm_start", _) => "(result i32) (i32.const 1)",
            (_, true) => "(result i32) (call $run)",
            (_, false) => "(drop (call $run))",
        };
        let _ = writeln!(callbacks, "(func (export \"proxy_on_{name}\") (param {params}) {result})");
    }
    format!(
        r#"(module {imports}
        (memory (export "memory") 4)
        (global $pc (mut i32) (i32.const {SCRIPT_AT}))
        (global $end (mut i32) (i32.const {SCRIPT_AT}))
        (global $top (mut i32) (i32.const {HEAP_AT}))
        (func (export "proxy_abi_version_0_2_1"))
        {words}
        ;; Mostly an honest allocator; sometimes it answers what the script says.
        (func (export "proxy_on_memory_allocate") (param i32) (result i32)
            (if (i32.eq (i32.rem_u (global.get $pc) (i32.const 7)) (i32.const 3)) (then (return (call $word))))
            (if (i32.gt_u (global.get $top) (i32.const 250000)) (then (global.set $top (i32.const {HEAP_AT}))))
            (global.get $top)
            (global.set $top (i32.add (global.get $top) (local.get 0))))
        (func $byte (result i32)
            (if (i32.ge_u (global.get $pc) (global.get $end)) (then (return (i32.const 255))))
            (i32.load8_u (global.get $pc))
            (global.set $pc (i32.add (global.get $pc) (i32.const 1))))
        (func $word (result i32)
            (if (i32.ge_u (i32.add (global.get $pc) (i32.const 4)) (global.get $end)) (then (return (i32.const 0))))
            (i32.load (global.get $pc))
            (global.set $pc (i32.add (global.get $pc) (i32.const 4))))
        (func $long (result i64)
            (i64.or (i64.extend_i32_u (call $word)) (i64.shl (i64.extend_i32_u (call $word)) (i64.const 32))))
        (func $step (param i32) {cases})
        (func $run (result i32) (local i32)
            (loop $more
                (local.set 0 (call $byte))
                (if (i32.ne (local.get 0) (i32.const 255)) (then (call $step (local.get 0)) (br $more))))
            (i32.and (call $byte) (i32.const 1)))
        (func (export "proxy_on_configure") (param i32 i32) (result i32)
            ;; The script is copied in by the host, through the allocator, which is honest so far.
            (global.set $top (i32.const {SCRIPT_AT}))
            (drop (call $f4 (i32.const 7) (i32.const 0) (i32.const 60000) (i32.const 0) (i32.const 4)))
            (global.set $top (i32.const {HEAP_AT}))
            (global.set $end (i32.add (i32.const {SCRIPT_AT}) (i32.load (i32.const 4))))
            (i32.const 1))
        {callbacks})"#
    )
}

/// A number as a guest might pass it: mostly one that means something.
fn argument(rng: &mut Rng) -> u32 {
    match rng.u8(0..16) {
        0..=4 => rng.u32(0..9),
        5..=9 => WORDS_AT + 128 * rng.u32(0..16),
        10 => rng.u32(0..64),
        11 => rng.u32(0..200_000),
        12 => u32::MAX - rng.u32(0..9),
        13 => 4 * 65_536 - rng.u32(0..9),
        14 => 1 << rng.u32(0..32),
        _ => rng.u32(..),
    }
}

fn script(rng: &mut Rng) -> Vec<u8> {
    let mut script = Vec::new();
    for _ in 0..rng.usize(1..60) {
        if rng.u8(0..4) == 0 {
            script.extend([0xff, rng.u8(..)]);
            continue;
        }
        let index = rng.usize(0..CALLS.len());
        script.push(u8::try_from(index).unwrap());
        for kind in CALLS[index].1.chars() {
            script.extend(argument(rng).to_le_bytes());
            if kind == 'I' {
                script.extend(argument(rng).to_le_bytes());
            }
        }
    }
    script
}

struct Bench {
    plugins: Plugins,
    runtime: tokio::runtime::Runtime,
    _cache: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let cache = tempfile::tempdir().unwrap();
        let settings = Settings { compiler: Compiler::InProcess, cache: cache.path().join("filters") };
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        Self { plugins: Plugins::new(settings).unwrap(), runtime, _cache: cache }
    }

    fn prepare(&self, name: &str, module: &[u8], configuration: Vec<u8>) -> Result<Arc<Plugin>, String> {
        let upstream = mesh::filter::Upstream { namespace: "demo".into(), name: "authz".into(), port: 80 };
        let spec = mesh::Filter {
            namespace: "demo".into(),
            name: name.into(),
            sha256: hex::encode(Sha256::digest(module)),
            vm_id: "fuzz".into(),
            configuration: configuration.into(),
            fail_open: true,
            call_time_ms: 200,
            memory: 4 << 20,
            upstreams: [("authz".to_owned(), upstream)].into(),
            ..Default::default()
        };
        let module = Bytes::copy_from_slice(module);
        self.runtime.block_on(self.plugins.prepare(&spec, Some(module))).map_err(|error| error.to_string())
    }

    /// No filter's failure is the host's.
    fn judge(&self, seed: u64) {
        for row in self.plugins.status() {
            let texts = row.last_error.iter().chain(&row.refused);
            assert!(
                !texts.clone().any(|text| text.contains("panicked")),
                "seed {seed}: {:?}",
                texts.collect::<Vec<_>>()
            );
        }
    }
}

/// Whole exchanges through some plugins; what comes out does not matter.
fn exchange(plugins: &[Arc<Plugin>], rng: &mut Rng) {
    let chain = Chain::new(plugins, StreamInfo::default());
    let request = http::Request::post("/a?b=c").header("host", "reviews").header("x-foo", "bar");
    let response = http::Response::builder().header("x-up", "stream");
    let body = rng.bool();
    chain.request_headers(request.body(()).unwrap().into_parts().0, !body);
    chain.take_request();
    if body {
        for end in [false, true] {
            chain.data(Flow::Request, Bytes::from(vec![b'a'; rng.usize(0..300)]), end);
            while chain.next(Flow::Request).is_some() {}
        }
    }
    if !chain.stopped() {
        chain.response_headers(response.body(()).unwrap().into_parts().0, false);
        chain.take_response();
        chain.data(Flow::Response, Bytes::from_static(b"response"), false);
        chain.trailers(Flow::Response, http::HeaderMap::new());
        while chain.next(Flow::Response).is_some() {}
    }
    chain.settle();
    chain.done();
}

fn limits() -> (Duration, u64) {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    (Duration::from_secs(number("FUZZ_SECS").unwrap_or(3)), number("FUZZ_SEED").unwrap_or_else(|| fastrand::u64(..)))
}

#[test]
fn arbitrary_host_calls_harm_nobody() {
    let (time, first) = limits();
    println!("scripts from seed {first}");
    let (bench, module) = (Bench::new(), wat::parse_str(interpreter()).unwrap());
    let healthy = bench.prepare("healthy", &module, vec![0xff, 0]).unwrap();
    let (start, mut seed, mut runs, mut started) = (Instant::now(), first, 0, 0);
    while start.elapsed() < time || runs < 20 {
        let mut rng = Rng::with_seed(seed);
        match bench.prepare("fuzzed", &module, script(&mut rng)) {
            Ok(fuzzed) => {
                started += 1;
                exchange(&[fuzzed.clone(), healthy.clone()], &mut rng);
                exchange(&[healthy.clone(), fuzzed], &mut rng);
            }
            Err(refused) => assert!(!refused.contains("panicked"), "seed {seed}: {refused}"),
        }
        bench.judge(seed);
        outrigger_proxy::filter::release_unused();
        seed = seed.wrapping_add(1);
        runs += 1;
    }
    assert!(started * 2 > runs, "of {runs} scripts only {started} got past the start");
    let row = bench.plugins.status().into_iter().find(|row| row.name == "healthy").unwrap();
    assert_eq!((row.failures, row.requests > 0), (0, true), "{row:?}");
    println!("{runs} scripts");
}

#[test]
fn arbitrary_modules_are_refused_or_run() {
    let (time, first) = limits();
    println!("modules from seed {first}");
    let (bench, module) = (Bench::new(), wat::parse_str(interpreter()).unwrap());
    let (start, mut seed, mut runs) = (Instant::now(), first, 0);
    while start.elapsed() < time || runs < 5 {
        let mut rng = Rng::with_seed(seed);
        let mut bytes = module.clone();
        for _ in 0..rng.usize(1..4) {
            let at = rng.usize(0..bytes.len());
            match rng.u8(0..4) {
                0 => bytes[at] = rng.u8(..),
                1 => bytes[at] ^= 1 << rng.u8(0..8),
                2 => bytes.truncate(at.max(8)),
                _ => bytes.insert(at, rng.u8(..)),
            }
        }
        if let Ok(plugin) = bench.prepare("mutated", &bytes, script(&mut rng)) {
            exchange(&[plugin], &mut rng);
        }
        bench.judge(seed);
        outrigger_proxy::filter::release_unused();
        seed = seed.wrapping_add(1);
        runs += 1;
    }
    println!("{runs} modules");
}
