//! Guests of the conformance suite: WAT with a few abbreviations, put together here.
//!
//! A file with a line that begins with `(module` is WAT as it is. Others are the inside of a module that has every function of the ABI as
//! `$name` (for `proxy_name`), an allocator, and functions that write lines to the log. Their first line may be
//! `;; abi 0_1_0`; without it the ABI is 0.2.1. The abbreviations:
//!
//! | written | means |
//! |---|---|
//! | `@text@` | address and length of the text |
//! | `%a=b;c=d%` | address and length of the serialized pairs |
//! | `#5` | `(i32.const 5)` |
//! | `OUT` | `#0 #4`: where host calls put the address and the length of what they give |
//! | `(on request_headers …)` | the callback, with `$id`, and `$n` and `$eos` where it has them; its result is the last value |
//!
//! | function | logs, at level info |
//! |---|---|
//! | `$log text` | the text |
//! | `$say text status` | `text=status` |
//! | `$show text status` | `text=status`, and what `OUT` points at if the status is 0 |
//! | `$num text i32`, `$num64 text i64` | `text number` |
//! | `$two text i32 i32` | `text number number` |
//! | `$list text` | of the serialized pairs that `OUT` points at, those whose key begins with the text, as `key: value` |
//!
//! `$path text` is whether the request being handled is for this path, `$is text` whether `OUT` points at this text, `$body max`
//! reads the request's (0) or response's (1) body into `OUT`, `$set buffer start len text` edits one, `$reply status body`
//! answers, `$fetch service pairs` calls a service.

use std::fmt::Write as _;
use std::sync::LazyLock;

/// Functions of the ABI: name without `proxy_`, parameters (`i` 32 bits, `I` 64 bits).
const FUNCTIONS: &[(&str, &str)] = &[
    ("log", "iii"),
    ("get_current_time_nanoseconds", "i"),
    ("set_tick_period_milliseconds", "i"),
    ("get_buffer_bytes", "iiiii"),
    ("set_buffer_bytes", "iiiii"),
    ("get_buffer_status", "iii"),
    ("get_header_map_size", "ii"),
    ("get_header_map_pairs", "iii"),
    ("set_header_map_pairs", "iii"),
    ("get_header_map_value", "iiiii"),
    ("add_header_map_value", "iiiii"),
    ("replace_header_map_value", "iiiii"),
    ("remove_header_map_value", "iii"),
    ("get_property", "iiii"),
    ("set_property", "iiii"),
    ("send_local_response", "iiiiiiii"),
    ("set_effective_context", "i"),
    ("done", ""),
    ("get_status", "iii"),
    ("http_call", "iiiiiiiiii"),
    ("grpc_call", "iiiiiiiiiiii"),
    ("grpc_stream", "iiiiiiiii"),
    ("grpc_send", "iiii"),
    ("grpc_cancel", "i"),
    ("grpc_close", "i"),
    ("get_shared_data", "iiiii"),
    ("set_shared_data", "iiiii"),
    ("register_shared_queue", "iii"),
    ("resolve_shared_queue", "iiiii"),
    ("enqueue_shared_queue", "iii"),
    ("dequeue_shared_queue", "iii"),
    ("define_metric", "iiii"),
    ("increment_metric", "iI"),
    ("record_metric", "iI"),
    ("get_metric", "ii"),
    ("call_foreign_function", "iiiiii"),
];

const OLD: &[(&str, &str)] =
    &[("get_configuration", "ii"), ("continue_request", ""), ("continue_response", ""), ("clear_route_cache", "")];
const NEW: &[(&str, &str)] = &[("continue_stream", "i"), ("close_stream", "i")];
const NEWEST: &[(&str, &str)] = &[("get_log_level", "i")];

/// Callbacks: name, parameters after the context's id, whether there is a result.
const CALLBACKS: &[(&str, &str, bool)] = &[
    ("context_create", "$parent", false),
    ("vm_start", "$n", true),
    ("configure", "$n", true),
    ("tick", "", false),
    ("queue_ready", "$queue", false),
    ("request_headers", "$n $eos", true),
    ("request_body", "$n $eos", true),
    ("request_trailers", "$n", true),
    ("response_headers", "$n $eos", true),
    ("response_body", "$n $eos", true),
    ("response_trailers", "$n", true),
    ("http_call_response", "$call $n $size $trailers", false),
    ("done", "", true),
    ("log", "", false),
    ("delete", "", false),
];

const PRELUDE: &str = r#"
(memory (export "memory") 64)
(global $top (mut i32) (i32.const 0x20000))
(global $at (mut i32) (i32.const 0x8000))
(func $allocate (export "proxy_on_memory_allocate") (param $size i32) (result i32)
  (local $from i32)
  (if (i32.gt_u (i32.add (global.get $top) (local.get $size)) (i32.const 0x3fff00))
    (then (global.set $top (i32.const 0x20000))))
  (local.set $from (global.get $top))
  (global.set $top (i32.and (i32.add (i32.add (global.get $top) (local.get $size)) (i32.const 15)) (i32.const -16)))
  (local.get $from))
(func $log (param $text i32) (param $size i32)
  (drop (call $proxy_log (i32.const 2) (local.get $text) (local.get $size))))
(func $put (param $text i32) (param $size i32)
  (memory.copy (global.get $at) (local.get $text) (local.get $size))
  (global.set $at (i32.add (global.get $at) (local.get $size))))
(func $char (param $char i32)
  (i32.store8 (global.get $at) (local.get $char))
  (global.set $at (i32.add (global.get $at) (i32.const 1))))
(func $digits (param $n i64)
  (if (i64.lt_s (local.get $n) (i64.const 0)) (then
    (call $char (i32.const 45))
    (local.set $n (i64.sub (i64.const 0) (local.get $n)))))
  (if (i64.ge_u (local.get $n) (i64.const 10)) (then (call $digits (i64.div_u (local.get $n) (i64.const 10)))))
  (call $char (i32.add (i32.const 48) (i32.wrap_i64 (i64.rem_u (local.get $n) (i64.const 10))))))
(func $flush
  (call $log (i32.const 0x8000) (i32.sub (global.get $at) (i32.const 0x8000)))
  (global.set $at (i32.const 0x8000)))
(func $say (param $text i32) (param $size i32) (param $status i32)
  (call $put (local.get $text) (local.get $size)) (call $char (i32.const 61))
  (call $digits (i64.extend_i32_s (local.get $status))) (call $flush))
(func $show (param $text i32) (param $size i32) (param $status i32)
  (call $put (local.get $text) (local.get $size)) (call $char (i32.const 61))
  (call $digits (i64.extend_i32_s (local.get $status)))
  (if (i32.eqz (local.get $status)) (then
    (call $char (i32.const 32))
    (call $put (i32.load (i32.const 0)) (i32.load (i32.const 4)))))
  (call $flush))
(func $num (param $text i32) (param $size i32) (param $n i32)
  (call $num64 (local.get $text) (local.get $size) (i64.extend_i32_s (local.get $n))))
(func $num64 (param $text i32) (param $size i32) (param $n i64)
  (call $put (local.get $text) (local.get $size)) (call $char (i32.const 32))
  (call $digits (local.get $n)) (call $flush))
(func $two (param $text i32) (param $size i32) (param $n i32) (param $m i32)
  (call $put (local.get $text) (local.get $size)) (call $char (i32.const 32))
  (call $digits (i64.extend_i32_s (local.get $n))) (call $char (i32.const 32))
  (call $digits (i64.extend_i32_s (local.get $m))) (call $flush))
(func $list (param $text i32) (param $size i32)
  (local $from i32) (local $count i32) (local $i i32) (local $key i32) (local $kn i32) (local $vn i32)
  (local.set $from (i32.load (i32.const 0)))
  (if (i32.eqz (i32.load (i32.const 4))) (then (return)))
  (local.set $count (i32.load (local.get $from)))
  (local.set $key (i32.add (local.get $from) (i32.add (i32.const 4) (i32.mul (i32.const 8) (local.get $count)))))
  (loop $next
    (if (i32.lt_u (local.get $i) (local.get $count)) (then
      (local.set $kn (i32.load offset=4 (i32.add (local.get $from) (i32.mul (i32.const 8) (local.get $i)))))
      (local.set $vn (i32.load offset=8 (i32.add (local.get $from) (i32.mul (i32.const 8) (local.get $i)))))
      (if (call $begins (local.get $key) (local.get $kn) (local.get $text) (local.get $size)) (then
        (call $put (local.get $key) (local.get $kn)) (call $char (i32.const 58)) (call $char (i32.const 32))
        (call $put (i32.add (local.get $key) (i32.add (i32.const 1) (local.get $kn))) (local.get $vn))
        (call $flush)))
      (local.set $key (i32.add (local.get $key) (i32.add (i32.const 2) (i32.add (local.get $kn) (local.get $vn)))))
      (local.set $i (i32.add (local.get $i) (i32.const 1)))
      (br $next)))))
(func $begins (param $a i32) (param $an i32) (param $b i32) (param $bn i32) (result i32)
  (local $i i32)
  (if (i32.lt_u (local.get $an) (local.get $bn)) (then (return (i32.const 0))))
  (loop $next
    (if (i32.eq (local.get $i) (local.get $bn)) (then (return (i32.const 1))))
    (if (i32.eq (i32.load8_u (i32.add (local.get $a) (local.get $i))) (i32.load8_u (i32.add (local.get $b) (local.get $i))))
      (then (local.set $i (i32.add (local.get $i) (i32.const 1))) (br $next))))
  (i32.const 0))
(func $body (param $buffer i32) (param $max i32) (result i32)
  (call $get_buffer_bytes (local.get $buffer) (i32.const 0) (local.get $max) (i32.const 0) (i32.const 4)))
(func $set (param $buffer i32) (param $start i32) (param $len i32) (param $text i32) (param $size i32) (result i32)
  (call $set_buffer_bytes (local.get $buffer) (local.get $start) (local.get $len) (local.get $text) (local.get $size)))
(func $reply (param $status i32) (param $text i32) (param $size i32) (result i32)
  (call $send_local_response (local.get $status) (i32.const 0) (i32.const 0) (local.get $text) (local.get $size)
    (i32.const 0) (i32.const 0) (i32.const -1)))
;; The call's id is then at 8.
(func $fetch (param $service i32) (param $n i32) (param $pairs i32) (param $size i32) (result i32)
  (call $http_call (local.get $service) (local.get $n) (local.get $pairs) (local.get $size)
    (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 1000) (i32.const 8)))
;; Whether OUT points at this text.
(func $is (param $text i32) (param $size i32) (result i32)
  (local $i i32)
  (if (i32.ne (i32.load (i32.const 4)) (local.get $size)) (then (return (i32.const 0))))
  (loop $next
    (if (i32.eq (local.get $i) (local.get $size)) (then (return (i32.const 1))))
    (if (i32.eq (i32.load8_u (i32.add (i32.load (i32.const 0)) (local.get $i)))
                (i32.load8_u (i32.add (local.get $text) (local.get $i))))
      (then (local.set $i (i32.add (local.get $i) (i32.const 1))) (br $next))))
  (i32.const 0))
;; Whether the request being handled is for this path.
(func $path (param $text i32) (param $size i32) (result i32)
  (i32.store (i32.const 4) (i32.const 0))
  (drop (call $get_header_map_value (i32.const 0) (i32.const 1000) (i32.const 5) (i32.const 0) (i32.const 4)))
  (call $is (local.get $text) (local.get $size)))
(data (i32.const 1000) ":path")
"#;

/// Every function of every ABI, as modules import it.
pub fn host_functions() -> Vec<&'static str> {
    static NAMES: LazyLock<Vec<String>> = LazyLock::new(|| {
        [FUNCTIONS, OLD, NEW, NEWEST].iter().copied().flatten().map(|(name, _)| format!("proxy_{name}")).collect()
    });
    NAMES.iter().map(String::as_str).collect()
}

/// The module of a guest's source.
///
/// # Errors
/// Where the source is wrong, with the text that was put together.
pub(super) fn assemble(source: &str) -> Result<Vec<u8>, String> {
    let text = if source.lines().any(|line| line.starts_with("(module")) { source.to_owned() } else { expand(source)? };
    wat::parse_str(&text).map_err(|error| error.to_string())
}

fn expand(source: &str) -> Result<String, String> {
    let abi = source.lines().next().and_then(|line| line.strip_prefix(";; abi ")).unwrap_or("0_2_1").trim();
    let later: &[&[(&str, &str)]] = match abi {
        "0_1_0" => &[OLD],
        "0_2_0" => &[NEW],
        _ => &[NEW, NEWEST],
    };
    let mut out = String::from("(module\n");
    for (name, params) in FUNCTIONS.iter().chain(later.iter().copied().flatten()) {
        let wasm: String = params.chars().map(|param| if param == 'I' { "i64 " } else { "i32 " }).collect();
        let local = if *name == "log" { "proxy_log" } else { name };
        let _ = writeln!(out, "(import \"env\" \"proxy_{name}\" (func ${local} (param {wasm}) (result i32)))");
    }
    // WASI and whatever else it imports itself.
    let (imports, body): (Vec<&str>, Vec<&str>) = source.lines().partition(|line| line.starts_with("(import "));
    out += &imports.join("\n");
    let _ = writeln!(out, "\n(func (export \"proxy_abi_version_{abi}\"))");
    out += PRELUDE;
    out += &words(&callbacks(&body.join("\n"))?)?;
    out.push(')');
    Ok(out)
}

/// `(on name` becomes the export with its parameters.
fn callbacks(body: &str) -> Result<String, String> {
    let mut parts = body.split("(on ");
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let end = part.find(|c: char| !c.is_ascii_lowercase() && c != '_').unwrap_or(part.len());
        let (name, rest) = part.split_at(end);
        let known = CALLBACKS.iter().find(|(of, ..)| *of == name);
        let (_, params, result) = known.ok_or_else(|| format!("no callback is called {name}"))?;
        let _ = write!(out, "(func (export \"proxy_on_{name}\") (param $id i32)");
        for param in params.split_whitespace() {
            let _ = write!(out, " (param {param} i32)");
        }
        if *result {
            out += " (result i32)";
        }
        out += rest;
    }
    Ok(out)
}

/// Texts and numbers.
fn words(body: &str) -> Result<String, String> {
    let (mut code, mut data) = (String::new(), String::new());
    let mut at = 0x1000;
    for (index, part) in pairs(body).split('@').enumerate() {
        if index % 2 == 0 {
            code += &constants(&part.replace("OUT", "#0 #4"));
            continue;
        }
        let escapes = part.matches('\\').count();
        let size = part.len() - 2 * escapes;
        let _ = writeln!(data, "(data (i32.const {at}) \"{part}\")");
        let _ = write!(code, "(i32.const {at}) (i32.const {size})");
        at += size + 1;
    }
    if at > 0x8000 {
        return Err("too much text".into());
    }
    Ok(code + &data)
}

/// `%a=b;c=d%` becomes the text of the serialized pairs.
fn pairs(body: &str) -> String {
    let mut out = String::new();
    for (index, part) in body.split('%').enumerate() {
        if index % 2 == 0 {
            out += part;
            continue;
        }
        let pairs: Vec<(&str, &str)> = part.split(';').filter_map(|pair| pair.split_once('=')).collect();
        let word = |n: usize| format!("\\{:02x}\\{:02x}\\00\\00", n % 256, n / 256);
        out += "@";
        out += &word(pairs.len());
        // The texts may have escapes of their own.
        let size = |text: &str| text.len() - 2 * text.matches('\\').count();
        out.extend(pairs.iter().map(|(key, value)| word(size(key)) + &word(size(value))));
        out.extend(pairs.iter().map(|(key, value)| format!("{key}\\00{value}\\00")));
        out += "@";
    }
    out
}

/// `#5` becomes `(i32.const 5)`.
fn constants(code: &str) -> String {
    let mut parts = code.split('#');
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let end = part.find(|c: char| !c.is_ascii_alphanumeric() && c != '-' && c != '_').unwrap_or(part.len());
        let (number, rest) = part.split_at(end);
        let _ = write!(out, "(i32.const {number}){rest}");
    }
    out
}
