//! Each callback and each host call as a line, for authors.
//!
//! They are functions that stand between guest and host, put there when a module is linked and its callbacks are looked up: where nobody
//! asked for a trace there is nothing, not even a question.

use std::fmt::Write as _;
use std::sync::Arc;

use wasmtime::{Caller, ExternType, Func, Linker, Module, Store, Val};

use super::abi::{Pair, deserialize_pairs};
use super::host::{Host, split};

/// Target of the events, at level trace.
const TARGET: &str = "filter_call";
/// Longest text that is shown, bytes.
const SHOWN: usize = 160;

/// What parameters mean. Most texts are two of them, an address and a length; what begins with `Gives` is where the host puts its answer.
#[derive(Clone, Copy)]
enum Kind {
    Number(&'static str),
    Map,
    Buffer,
    Level,
    Metric,
    Stream,
    Text(&'static str),
    Path(&'static str),
    Pairs(&'static str),
    GivesText,
    GivesPairs,
    GivesWord,
    GivesLong,
}
use Kind::{
    Buffer, GivesLong, GivesPairs, GivesText, GivesWord, Level, Map, Metric, Number, Pairs, Path, Stream, Text,
};

/// Functions of module `env`. Others are shown with numbers.
const FUNCTIONS: &[(&str, &[Kind])] = &[
    ("proxy_log", &[Level, Text("")]),
    ("proxy_get_log_level", &[GivesWord]),
    ("proxy_get_current_time_nanoseconds", &[GivesLong]),
    ("proxy_set_tick_period_milliseconds", &[Number("ms")]),
    ("proxy_get_configuration", &[GivesText]),
    ("proxy_get_property", &[Path(""), GivesText]),
    ("proxy_set_property", &[Path(""), Text("value")]),
    ("proxy_get_buffer_bytes", &[Buffer, Number("start"), Number("length"), GivesText]),
    ("proxy_get_buffer_status", &[Buffer, GivesWord, GivesWord]),
    ("proxy_set_buffer_bytes", &[Buffer, Number("start"), Number("length"), Text("bytes")]),
    ("proxy_get_header_map_size", &[Map, GivesWord]),
    ("proxy_get_header_map_pairs", &[Map, GivesPairs]),
    ("proxy_set_header_map_pairs", &[Map, Pairs("")]),
    ("proxy_get_header_map_value", &[Map, Text(""), GivesText]),
    ("proxy_add_header_map_value", &[Map, Text(""), Text("value")]),
    ("proxy_replace_header_map_value", &[Map, Text(""), Text("value")]),
    ("proxy_remove_header_map_value", &[Map, Text("")]),
    ("proxy_continue_stream", &[Stream]),
    ("proxy_close_stream", &[Stream]),
    (
        "proxy_send_local_response",
        &[Number("status"), Text("details"), Text("body"), Pairs("headers"), Number("grpc_status")],
    ),
    (
        "proxy_http_call",
        &[Text("upstream"), Pairs("headers"), Text("body"), Pairs("trailers"), Number("timeout_ms"), GivesWord],
    ),
    (
        "proxy_grpc_call",
        &[
            Text("upstream"),
            Text("service"),
            Text("method"),
            Pairs("metadata"),
            Text("message"),
            Number("timeout_ms"),
            GivesWord,
        ],
    ),
    ("proxy_grpc_stream", &[Text("upstream"), Text("service"), Text("method"), Pairs("metadata"), GivesWord]),
    ("proxy_grpc_send", &[Number("id"), Text("message"), Number("end")]),
    ("proxy_grpc_cancel", &[Number("id")]),
    ("proxy_grpc_close", &[Number("id")]),
    ("proxy_get_status", &[GivesWord, GivesText]),
    ("proxy_get_shared_data", &[Text(""), GivesText, GivesWord]),
    ("proxy_set_shared_data", &[Text(""), Text("value"), Number("cas")]),
    ("proxy_register_shared_queue", &[Text(""), GivesWord]),
    ("proxy_resolve_shared_queue", &[Text("vm_id"), Text("name"), GivesWord]),
    ("proxy_enqueue_shared_queue", &[Number("queue"), Text("item")]),
    ("proxy_dequeue_shared_queue", &[Number("queue"), GivesText]),
    ("proxy_define_metric", &[Metric, Text(""), GivesWord]),
    ("proxy_increment_metric", &[Number("metric"), Number("by")]),
    ("proxy_record_metric", &[Number("metric"), Number("value")]),
    ("proxy_get_metric", &[Number("metric"), GivesLong]),
    ("proxy_set_effective_context", &[Number("context")]),
    ("proxy_call_foreign_function", &[Text(""), Text("argument"), GivesText]),
];

/// What callbacks are told after the context's number.
const CALLBACKS: &[(&str, &[&str])] = &[
    ("proxy_on_context_create", &["parent"]),
    ("proxy_on_vm_start", &["configuration_bytes"]),
    ("proxy_on_configure", &["configuration_bytes"]),
    ("proxy_on_request_headers", &["headers", "end"]),
    ("proxy_on_response_headers", &["headers", "end"]),
    ("proxy_on_request_body", &["bytes", "end"]),
    ("proxy_on_response_body", &["bytes", "end"]),
    ("proxy_on_downstream_data", &["bytes", "end"]),
    ("proxy_on_upstream_data", &["bytes", "end"]),
    ("proxy_on_request_trailers", &["trailers"]),
    ("proxy_on_response_trailers", &["trailers"]),
    ("proxy_on_http_call_response", &["call", "headers", "body_bytes", "trailers"]),
    ("proxy_on_queue_ready", &["queue"]),
];

const MAPS: [&str; 8] = [
    "request headers",
    "request trailers",
    "response headers",
    "response trailers",
    "gRPC initial metadata",
    "gRPC trailing metadata",
    "call response headers",
    "call response trailers",
];
const BUFFERS: [&str; 9] = [
    "request body",
    "response body",
    "downstream data",
    "upstream data",
    "call response body",
    "gRPC message",
    "VM configuration",
    "configuration",
    "call data",
];
const LEVELS: [&str; 6] = ["trace", "debug", "info", "warn", "error", "critical"];
const METRICS: [&str; 3] = ["counter", "gauge", "histogram"];
const STREAMS: [&str; 4] = ["request", "response", "downstream", "upstream"];
const STATUSES: [&str; 13] = [
    "Ok",
    "NotFound",
    "BadArgument",
    "SerializationFailure",
    "ParseFailure",
    "5",
    "InvalidMemoryAccess",
    "Empty",
    "CasMismatch",
    "9",
    "InternalFailure",
    "11",
    "Unimplemented",
];

/// Puts a function that tells before each one that a module imports. All of them are there: the module has been resolved.
pub(super) fn imports(linker: &Linker<Host>, module: &Module) -> wasmtime::Result<Linker<Host>> {
    let mut traced = linker.clone();
    traced.allow_shadowing(true);
    let own = Arc::new(linker.clone());
    for (index, import) in module.imports().enumerate() {
        let ExternType::Func(ty) = import.ty() else { continue };
        let (own, of, name) = (Arc::clone(&own), import.module().to_owned(), import.name().to_owned());
        traced.func_new(import.module(), import.name(), ty, move |mut caller, args, results| {
            let function = original(&mut caller, &own, index, &of, &name)?;
            let kinds = FUNCTIONS.iter().find(|(known, _)| of == "env" && *known == name).map(|(_, kinds)| *kinds);
            let mut line = format!("  {name}(");
            arguments(&mut caller, kinds, args, &mut line);
            line.push(')');
            let result = function.call(&mut caller, args, results);
            match (&result, results.first()) {
                (Err(error), _) => push(&mut line, format_args!(" → trap: {}", error.root_cause())),
                (Ok(()), Some(Val::I32(status))) if kinds.is_some() || (of == "env" && name.starts_with("proxy_")) => {
                    push(&mut line, format_args!(" → {}", named(&STATUSES, *status)));
                    if *status == 0 {
                        given(&mut caller, kinds.unwrap_or_default(), args, &mut line);
                    }
                }
                (Ok(()), Some(Val::I32(errno))) => push(&mut line, format_args!(" → {errno}")),
                (Ok(()), _) => {}
            }
            say(caller.data(), &line);
            result
        })?;
    }
    Ok(traced)
}

/// The host's own function, in this store.
fn original(
    caller: &mut Caller<'_, Host>,
    own: &Linker<Host>,
    index: usize,
    of: &str,
    name: &str,
) -> wasmtime::Result<Func> {
    // A host function that is called by another finds no export: what the start section may need of them is remembered here.
    if caller.data().memory.is_none() {
        let memory = caller.get_export("memory").and_then(wasmtime::Extern::into_memory);
        caller.data_mut().memory = memory;
    }
    if let Some(Some(known)) = caller.data().traced.get(index) {
        return Ok(*known);
    }
    let found = own.get(&mut *caller, of, name)?.into_func();
    let found = found.ok_or_else(|| wasmtime::Error::msg(format!("{of}.{name} is no function")))?;
    let traced = &mut caller.data_mut().traced;
    if traced.len() <= index {
        traced.resize(index + 1, None);
    }
    if let Some(place) = traced.get_mut(index) {
        *place = Some(found);
    }
    Ok(found)
}

/// A function that tells before a callback.
pub(super) fn callback(store: &mut Store<Host>, name: &str, function: Func) -> Func {
    let (name, ty) = (name.to_owned(), function.ty(&*store));
    Func::new(store, ty, move |mut caller, args, results| {
        let labels = CALLBACKS.iter().find(|(known, _)| *known == name).map(|(_, labels)| *labels).unwrap_or_default();
        let mut line = format!("{name}(");
        for (index, arg) in args.iter().skip(1).enumerate() {
            let label = labels.get(index).map_or(String::new(), |label| format!("{label}: "));
            let comma = if index == 0 { "" } else { ", " };
            push(&mut line, format_args!("{comma}{label}{}", word(arg)));
        }
        line.push(')');
        say(caller.data(), &line);
        let result = function.call(&mut caller, args, results);
        let told = match (&result, results.first().map(word)) {
            (Err(error), _) => Some(format!("trap: {}", error.root_cause())),
            (Ok(()), Some(0)) if ["proxy_on_vm_start", "proxy_on_configure", "proxy_on_done"].contains(&&*name) => {
                Some("false".to_owned())
            }
            (Ok(()), Some(1))
                if !name.ends_with("start") && !name.ends_with("configure") && !name.ends_with("done") =>
            {
                Some("Pause".to_owned())
            }
            (Ok(()), _) => None,
        };
        if let Some(told) = told {
            say(caller.data(), &format!("{name} → {told}"));
        }
        result
    })
}

fn say(host: &Host, line: &str) {
    // A trial says nothing: what is tried runs again in an instance that serves.
    if !host.spec.trace {
        return;
    }
    tracing::trace!(target: TARGET, filter = host.plugin().name.as_str(), "#{:<3} {line}", host.effective);
}

/// Writing to a String cannot fail.
fn push(line: &mut String, text: std::fmt::Arguments<'_>) {
    let _ = line.write_fmt(text);
}

fn word(value: &Val) -> i64 {
    match value {
        Val::I32(word) => i64::from(*word),
        Val::I64(word) => *word,
        _ => 0,
    }
}

/// As the ABI means it: unsigned, or the name of a value.
fn named(names: &[&str], value: i32) -> String {
    let name = usize::try_from(value).ok().and_then(|value| names.get(value));
    name.map_or_else(|| value.to_string(), |name| (*name).to_owned())
}

fn width(kind: Kind) -> usize {
    match kind {
        Text(_) | Path(_) | Pairs(_) | GivesText | GivesPairs => 2,
        _ => 1,
    }
}

fn unsigned(args: &[Val], at: usize) -> u32 {
    args.get(at).map_or(0, |value| u32::try_from(word(value) & 0xffff_ffff).unwrap_or(0))
}

/// What a guest's memory holds there; nothing where there is no memory.
fn bytes(caller: &mut Caller<'_, Host>, at: u32, len: u32) -> Option<Vec<u8>> {
    let (memory, _) = split(caller).ok()?;
    super::host::slice(memory, at, len).ok().map(<[u8]>::to_vec)
}

fn arguments(caller: &mut Caller<'_, Host>, kinds: Option<&[Kind]>, args: &[Val], line: &mut String) {
    let Some(kinds) = kinds else {
        let all: Vec<String> = args.iter().map(|arg| word(arg).to_string()).collect();
        line.push_str(&all.join(", "));
        return;
    };
    let mut at = 0;
    let begin = line.len();
    for kind in kinds {
        let number = unsigned(args, at);
        let signed = args.get(at).map_or(0, word);
        let enumerated = |names: &[&str]| named(names, i32::try_from(signed).unwrap_or(-1));
        let shown = match kind {
            Number(label) => Some(format!("{label}: {signed}")),
            Map => Some(enumerated(&MAPS)),
            Buffer => Some(enumerated(&BUFFERS)),
            Level => Some(enumerated(&LEVELS)),
            Metric => Some(enumerated(&METRICS)),
            Stream => Some(enumerated(&STREAMS)),
            Text(label) | Path(label) | Pairs(label) => {
                let found = bytes(caller, number, unsigned(args, at + 1));
                let text = found.map_or_else(|| "no memory there".to_owned(), |bytes| show(*kind, &bytes));
                Some(if label.is_empty() { text } else { format!("{label}: {text}") })
            }
            GivesText | GivesPairs | GivesWord | GivesLong => None,
        };
        if let Some(shown) = shown {
            if line.len() > begin {
                line.push_str(", ");
            }
            line.push_str(&shown);
        }
        at += width(*kind);
    }
}

/// Appends what the host answered with.
fn given(caller: &mut Caller<'_, Host>, kinds: &[Kind], args: &[Val], line: &mut String) {
    let mut at = 0;
    for kind in kinds {
        let place = unsigned(args, at);
        let read = |caller: &mut Caller<'_, Host>, place| {
            let found: [u8; 4] = bytes(caller, place, 4)?.try_into().ok()?;
            Some(u32::from_le_bytes(found))
        };
        let shown = match kind {
            GivesText | GivesPairs => {
                let ends = (read(caller, place), read(caller, unsigned(args, at + 1)));
                let (Some(begin), Some(len)) = ends else { continue };
                bytes(caller, begin, len).map(|bytes| show(*kind, &bytes))
            }
            GivesWord => read(caller, place).map(|word| word.to_string()),
            GivesLong => bytes(caller, place, 8)
                .and_then(|bytes| Some(u64::from_le_bytes(bytes.try_into().ok()?)))
                .map(|long| long.to_string()),
            _ => None,
        };
        if let Some(shown) = shown {
            push(line, format_args!(" {shown}"));
        }
        at += width(*kind);
    }
}

fn show(kind: Kind, bytes: &[u8]) -> String {
    match kind {
        Pairs(_) | GivesPairs => match deserialize_pairs(bytes) {
            Some(pairs) => {
                let one = |(key, value): &Pair<'_>| format!("{}: {}", plain(key), plain(value));
                shorten(&format!("{{{}}}", pairs.iter().map(one).collect::<Vec<_>>().join(", ")), bytes.len())
            }
            None => format!("{} bytes that are no pairs", bytes.len()),
        },
        Path(_) => plain(&bytes.iter().map(|byte| if *byte == 0 { b'.' } else { *byte }).collect::<Vec<_>>()),
        _ => shorten(&format!("{:?}", String::from_utf8_lossy(bytes)), bytes.len()),
    }
}

fn plain(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).escape_debug().to_string()
}

fn shorten(text: &str, len: usize) -> String {
    if text.len() <= SHOWN {
        return text.to_owned();
    }
    let cut = (0..=SHOWN).rev().find(|at| text.is_char_boundary(*at)).unwrap_or_default();
    format!("{}… ({len} bytes)", text.get(..cut).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::super::abi::serialize_pairs;
    use super::*;

    #[test]
    fn values_are_shown_as_what_they_are() {
        let pairs = serialize_pairs(&[(b":path", b"/a"), (b"x", b"1\n")]);
        assert_eq!(show(Pairs(""), &pairs), "{:path: /a, x: 1\\n}");
        assert_eq!(show(Pairs(""), b"xyz"), "3 bytes that are no pairs");
        assert_eq!(show(Path(""), b"request\0path"), "request.path");
        assert_eq!(show(Text(""), b"a\"\n"), "\"a\\\"\\n\"");
        assert!(show(Text(""), &[b'a'; 1000]).ends_with("… (1000 bytes)"));
        assert_eq!((named(&STATUSES, 8), named(&MAPS, -1)), ("CasMismatch".to_owned(), "-1".to_owned()));
    }

    #[test]
    fn every_function_has_as_many_parameters_as_the_host_links() {
        use super::super::abi::Abi;
        use super::super::counting::FilterMetrics;
        use super::super::host::{Counters, Spec};
        use super::super::shared::Vm;
        use super::super::{calls, engine};
        use outrigger_proto::mesh;
        let engine = engine::engine().unwrap();
        let mut linker = Linker::new(&engine);
        calls::link(&mut linker, Abi::V0_2_1).unwrap();
        let mut old = Linker::new(&engine);
        calls::link(&mut old, Abi::V0_1_0).unwrap();
        let (vm, metrics) = (Vm::alone(), Arc::new(FilterMetrics::alone("demo/f")));
        let spec = Arc::new(Spec::of(&mesh::Filter::default(), Abi::V0_2_1, vm, metrics));
        let mut store = Store::new(&engine, Host::new(spec, Arc::new(Counters::new(0))));
        for (name, kinds) in FUNCTIONS {
            let found = linker.get(&mut store, "env", name).or_else(|_| old.get(&mut store, "env", name));
            let function = found.unwrap_or_else(|_| panic!("{name}")).into_func().unwrap();
            let params = function.ty(&store).params().len();
            assert_eq!(params, kinds.iter().map(|kind| width(*kind)).sum::<usize>(), "{name}");
        }
    }
}
