//! The host functions of module `env`.

use std::time::{SystemTime, UNIX_EPOCH};

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use wasmtime::{Caller, Engine, FuncType, Linker, Val, ValType};

use super::super::LocalResponse;
use super::abi::{Abi, Status, deserialize_pairs, serialize_pairs};
use super::headers::{self, Head};
use super::host::{Call, Fault, Host, Phase, give, log_level, read, slice, split, write, write_u32};
use super::properties;

/// Largest body of a local response, bytes.
const LOCAL_BODY: usize = 1024 * 1024;

/// Linked, so that modules of every SDK load, but not served yet: name, and parameters (`i` 32 bits, `I` 64 bits).
const UNSERVED: [(&str, &str); 21] = [
    ("proxy_set_buffer_bytes", "iiiii"),
    ("proxy_set_tick_period_milliseconds", "i"),
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
    ("proxy_get_buffer_status", "iii"),
];

/// The type of a function of 32- and 64-bit parameters.
pub(super) fn signature(engine: &Engine, params: &str, results: bool) -> FuncType {
    let params = params.chars().map(|param| if param == 'I' { ValType::I64 } else { ValType::I32 });
    FuncType::new(engine, params, results.then_some(ValType::I32))
}

/// Refuses calls that must not happen now; the guest ends.
fn guard(caller: &Caller<'_, Host>, name: &str) -> Call {
    let host = caller.data();
    let when = match (host.phase, host.allocating) {
        (Phase::Start, _) => "during start-up",
        (_, true) => "from the allocator",
        _ => return Ok(()),
    };
    Err(Fault::Trap(wasmtime::Error::msg(format!("{name} was called {when}, where only logging is allowed"))))
}

fn finish(result: Call) -> wasmtime::Result<i32> {
    match result {
        Ok(()) => Ok(Status::Ok as i32),
        Err(Fault::Status(status)) => Ok(status as i32),
        Err(Fault::Trap(error)) => Err(error),
    }
}

macro_rules! link {
    ($linker:ident, $($name:literal => $function:path, ($($arg:ident: $ty:ty),*);)*) => {$(
        $linker.func_wrap("env", $name, |mut caller: Caller<'_, Host>, $($arg: $ty),*| {
            finish(guard(&caller, $name).and_then(|()| $function(&mut caller, $($arg),*)))
        })?;
    )*};
}

/// Defines every function that a module of this ABI may import from `env`.
pub(super) fn link(linker: &mut Linker<Host>, abi: Abi) -> wasmtime::Result<()> {
    linker.func_wrap("env", "proxy_log", |mut caller: Caller<'_, Host>, level: u32, ptr: u32, len: u32| {
        finish(log(&mut caller, level, ptr, len))
    })?;
    link! { linker,
        "proxy_get_current_time_nanoseconds" => current_time, (out: u32);
        "proxy_get_buffer_bytes" => get_buffer, (buffer: u32, start: u32, max: u32, ptr: u32, len: u32);
        "proxy_get_header_map_size" => map_size, (map: u32, out: u32);
        "proxy_get_header_map_pairs" => map_pairs, (map: u32, ptr: u32, len: u32);
        "proxy_set_header_map_pairs" => set_map_pairs, (map: u32, ptr: u32, len: u32);
        "proxy_get_header_map_value" => map_value, (map: u32, kp: u32, kn: u32, ptr: u32, len: u32);
        "proxy_add_header_map_value" => add_value, (map: u32, kp: u32, kn: u32, vp: u32, vn: u32);
        "proxy_replace_header_map_value" => replace_value, (map: u32, kp: u32, kn: u32, vp: u32, vn: u32);
        "proxy_remove_header_map_value" => remove_value, (map: u32, kp: u32, kn: u32);
        "proxy_get_property" => get_property, (p: u32, n: u32, ptr: u32, len: u32);
        "proxy_set_property" => set_property, (p: u32, n: u32, vp: u32, vn: u32);
        "proxy_send_local_response" => local_response, (status: u32, dp: u32, dn: u32, bp: u32, bn: u32, hp: u32, hn: u32, grpc: i32);
        "proxy_set_effective_context" => set_effective_context, (id: u32);
        "proxy_done" => done, ();
    }
    if abi == Abi::V0_1_0 {
        link! { linker,
            "proxy_get_configuration" => get_configuration, (ptr: u32, len: u32);
            "proxy_continue_request" => continue_request, ();
            "proxy_continue_response" => continue_response, ();
            "proxy_clear_route_cache" => clear_route_cache, ();
        }
    } else {
        link! { linker,
            "proxy_continue_stream" => continue_stream, (kind: u32);
            "proxy_close_stream" => close_stream, (kind: u32);
        }
    }
    if abi == Abi::V0_2_1 {
        link! { linker, "proxy_get_log_level" => get_log_level, (out: u32); }
    }
    for (name, params) in UNSERVED {
        let ty = signature(linker.engine(), params, true);
        linker.func_new("env", name, ty, move |mut caller, _, results| {
            finish(guard(&caller, name)).map(drop)?;
            caller.data_mut().log(3, format!("{name} is not served by this version of Outrigger").as_bytes());
            if let Some(result) = results.first_mut() {
                *result = Val::I32(Status::Unimplemented as i32);
            }
            Ok(())
        })?;
    }
    linker.func_wrap("env", "emscripten_notify_memory_growth", |_: u32| {})?;
    linker.func_wrap("env", "pthread_equal", |a: u32, b: u32| u32::from(a == b))?;
    Ok(())
}

type Guest<'a, 'b> = &'a mut Caller<'b, Host>;

fn log(caller: Guest<'_, '_>, level: u32, ptr: u32, len: u32) -> Call {
    if level > 5 {
        return Err(Status::BadArgument.into());
    }
    let (memory, host) = split(caller)?;
    host.log(level, slice(memory, ptr, len)?);
    Ok(())
}

fn get_log_level(caller: Guest<'_, '_>, out: u32) -> Call {
    write_u32(caller, out, log_level())
}

fn current_time(caller: Guest<'_, '_>, out: u32) -> Call {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    write(caller, out, &u64::try_from(now).unwrap_or(u64::MAX).to_le_bytes())
}

fn get_buffer(caller: Guest<'_, '_>, buffer: u32, start: u32, max: u32, ptr: u32, len: u32) -> Call {
    let host = caller.data();
    let bytes = match (buffer, host.phase) {
        (6, Phase::VmStart) => &host.spec.vm_configuration,
        (7, Phase::Configure) => &host.spec.configuration,
        (0..=8, _) => return Err(Status::NotFound.into()),
        _ => return Err(Status::BadArgument.into()),
    };
    let end = start.checked_add(max).ok_or(Status::BadArgument)?;
    let size = u32::try_from(bytes.len()).map_err(|_| Status::InternalFailure)?;
    let part = slice(bytes, start.min(size), end.min(size) - start.min(size))?.to_vec();
    give(caller, &part, ptr, len)
}

fn get_configuration(caller: Guest<'_, '_>, ptr: u32, len: u32) -> Call {
    let spec = std::sync::Arc::clone(&caller.data().spec);
    let configure = caller.data().phase == Phase::Configure;
    give(caller, if configure { &spec.configuration } else { &spec.vm_configuration }, ptr, len)
}

/// The head that a map number means now, for reading: given to `$use` as `$head`; `$none` if it cannot be read now.
macro_rules! with_map {
    ($host:expr, $map:expr, $head:ident => $use:expr, $none:expr) => {
        match ($map, $host.phase, $host.on_stream()) {
            (0, Phase::Request, true) => {
                let $head = &$host.request;
                $use
            }
            (2, Phase::Response, true) => {
                let $head = &$host.response;
                $use
            }
            (0, Phase::Log, true) => match $host.heads.as_deref().and_then(|heads| heads.request.as_deref()) {
                Some($head) => $use,
                None => $none,
            },
            (2, Phase::Log, true) => match $host.heads.as_deref().and_then(|heads| heads.response.as_deref()) {
                Some($head) => $use,
                None => $none,
            },
            _ => $none,
        }
    };
}

/// The same for writing: only in the head's own callback.
macro_rules! with_map_mut {
    ($host:expr, $map:expr, ($head:ident, $lacking:ident) => $use:expr) => {{
        let host = $host;
        let result = match ($map, host.phase, host.on_stream()) {
            (0, Phase::Request, true) => {
                let ($head, $lacking) = (&mut host.request, &mut host.effects.lacking);
                $use
            }
            (2, Phase::Response, true) => {
                let ($head, $lacking) = (&mut host.response, &mut host.effects.lacking);
                $use
            }
            _ => Err(Status::BadArgument),
        };
        host.effects.modified |= result.is_ok();
        result
    }};
}

fn map_size(caller: Guest<'_, '_>, map: u32, out: u32) -> Call {
    let host = caller.data();
    let size = with_map!(host, map, head => headers::size(head), return Err(Status::BadArgument.into()));
    write_u32(caller, out, u32::try_from(size).map_err(|_| Status::InternalFailure)?)
}

fn map_pairs(caller: Guest<'_, '_>, map: u32, ptr: u32, len: u32) -> Call {
    if map > 7 {
        return Err(Status::BadArgument.into());
    }
    let host = caller.data();
    let bytes = with_map!(host, map, head => serialize_pairs(&headers::pairs(head)), Vec::new());
    give(caller, &bytes, ptr, len)
}

fn map_value(caller: Guest<'_, '_>, map: u32, kp: u32, kn: u32, ptr: u32, len: u32) -> Call {
    let (memory, host) = split(caller)?;
    let key = slice(memory, kp, kn)?;
    let value = with_map!(host, map, head => headers::get(head, key), return Err(Status::BadArgument.into()));
    let value = match value {
        Some(value) => value.to_vec(),
        // ABI 0.1.0 knew no missing values.
        None if host.spec.abi == Abi::V0_1_0 => Vec::new(),
        None => return Err(Status::NotFound.into()),
    };
    give(caller, &value, ptr, len)
}

fn set_map_pairs(caller: Guest<'_, '_>, map: u32, ptr: u32, len: u32) -> Call {
    let (memory, host) = split(caller)?;
    let pairs = deserialize_pairs(slice(memory, ptr, len)?).ok_or(Status::BadArgument)?;
    with_map_mut!(host, map, (head, lacking) => headers::replace_all(head, lacking, &pairs))?;
    Ok(())
}

fn add_value(caller: Guest<'_, '_>, map: u32, kp: u32, kn: u32, vp: u32, vn: u32) -> Call {
    let (memory, host) = split(caller)?;
    let (key, value) = (slice(memory, kp, kn)?, slice(memory, vp, vn)?);
    with_map_mut!(host, map, (head, lacking) => headers::add(head, lacking, key, value))?;
    Ok(())
}

fn replace_value(caller: Guest<'_, '_>, map: u32, kp: u32, kn: u32, vp: u32, vn: u32) -> Call {
    let (memory, host) = split(caller)?;
    let (key, value) = (slice(memory, kp, kn)?, slice(memory, vp, vn)?);
    with_map_mut!(host, map, (head, lacking) => headers::replace(head, lacking, key, value))?;
    Ok(())
}

fn remove_value(caller: Guest<'_, '_>, map: u32, kp: u32, kn: u32) -> Call {
    let (memory, host) = split(caller)?;
    let key = slice(memory, kp, kn)?;
    with_map_mut!(host, map, (head, lacking) => headers::remove(head, lacking, key))?;
    Ok(())
}

fn get_property(caller: Guest<'_, '_>, p: u32, n: u32, ptr: u32, len: u32) -> Call {
    let (memory, host) = split(caller)?;
    let value = properties::get(host, slice(memory, p, n)?)?;
    give(caller, &value, ptr, len)
}

fn set_property(caller: Guest<'_, '_>, p: u32, n: u32, vp: u32, vn: u32) -> Call {
    let (memory, host) = split(caller)?;
    let (name, value) = (slice(memory, p, n)?, slice(memory, vp, vn)?);
    if !host.on_stream() {
        return Err(Status::NotFound.into());
    }
    let name = name.strip_suffix(&[0]).unwrap_or(name);
    if name.is_empty() || !host.state.set(name, value) {
        return Err(Status::BadArgument.into());
    }
    Ok(())
}

#[allow(clippy::too_many_arguments, reason = "the ABI's")]
fn local_response(
    caller: Guest<'_, '_>,
    status: u32,
    dp: u32,
    dn: u32,
    bp: u32,
    bn: u32,
    hp: u32,
    hn: u32,
    grpc: i32,
) -> Call {
    let details = read(caller, dp, dn)?;
    let (memory, host) = split(caller)?;
    let status = u16::try_from(status).ok().filter(|status| (200..600).contains(status)).ok_or(Status::BadArgument)?;
    let status = StatusCode::from_u16(status).map_err(|_| Status::BadArgument)?;
    let body = slice(memory, bp, bn)?;
    let pairs = deserialize_pairs(slice(memory, hp, hn)?).ok_or(Status::BadArgument)?;
    if body.len() > LOCAL_BODY || !host.on_stream() || !matches!(host.phase, Phase::Request | Phase::Response) {
        return Err(Status::BadArgument.into());
    }
    let mut fields = HeaderMap::with_capacity(pairs.len() + 2);
    for (key, value) in pairs.into_iter().filter(|(key, _)| !key.starts_with(b":")) {
        let name = HeaderName::from_bytes(key).map_err(|_| Status::BadArgument)?;
        let value = HeaderValue::from_bytes(value).map_err(|_| Status::BadArgument)?;
        if !matches!(name.as_str(), "connection" | "transfer-encoding" | "upgrade" | "keep-alive" | "content-length") {
            fields.try_append(name, value).map_err(|_| Status::BadArgument)?;
        }
    }
    if host.effects.reply.is_none() {
        let body = bytes::Bytes::copy_from_slice(body);
        host.effects.reply =
            Some(LocalResponse { status, headers: fields, body, grpc_status: u32::try_from(grpc).ok() });
    }
    if !details.is_empty() {
        host.log(1, &details);
    }
    Ok(())
}

fn set_effective_context(caller: Guest<'_, '_>, id: u32) -> Call {
    let host = caller.data_mut();
    let id = if id == 0 { host.current } else { id };
    if !host.contexts.contains(&id) {
        return Err(Status::BadArgument.into());
    }
    host.effective = id;
    Ok(())
}

/// Nothing defers the end of a context yet, so nothing is ever pending.
fn done(_: Guest<'_, '_>) -> Call {
    Err(Status::NotFound.into())
}

fn continue_stream(caller: Guest<'_, '_>, kind: u32) -> Call {
    let host = caller.data_mut();
    match (kind, host.phase) {
        (0, Phase::Request) | (1, Phase::Response) => host.effects.resumed |= host.on_stream(),
        (0..=2, _) => {}
        (3, _) => return Err(Status::Unimplemented.into()),
        _ => return Err(Status::BadArgument.into()),
    }
    Ok(())
}

fn continue_request(caller: Guest<'_, '_>) -> Call {
    continue_stream(caller, 0)
}

fn continue_response(caller: Guest<'_, '_>) -> Call {
    continue_stream(caller, 1)
}

/// Routes are chosen again whenever filters changed what they depend on.
fn clear_route_cache(_: Guest<'_, '_>) -> Call {
    Ok(())
}

fn close_stream(caller: Guest<'_, '_>, kind: u32) -> Call {
    if kind > 3 {
        return Err(Status::BadArgument.into());
    }
    let host = caller.data_mut();
    host.effects.reset |= host.on_stream() && matches!(host.phase, Phase::Request | Phase::Response);
    Ok(())
}

/// The first pseudo header that the guest took away.
pub(super) fn lacking<H: Head>(host: &Host) -> Option<&'static str> {
    host.effects.lacking.first::<H>()
}
