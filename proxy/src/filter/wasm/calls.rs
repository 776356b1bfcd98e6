//! The host functions of module `env`.

use std::time::{SystemTime, UNIX_EPOCH};

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use wasmtime::{Caller, Engine, FuncType, Linker, Val, ValType};

use super::super::{Flow, HeadMut, HeadRef, LocalResponse, View, Which};
use super::abi::{Abi, Status, deserialize_pairs, serialize_pairs};
use super::headers;
use super::host::{Call, Fault, Host, Phase, give, log_level, read, slice, split, write, write_u32};
use super::properties;

/// Largest body of a local response, bytes.
const LOCAL_BODY: usize = 1024 * 1024;

/// Linked, so that modules of every SDK load, but not served yet: name, and parameters (`i` 32 bits, `I` 64 bits).
const UNSERVED: [(&str, &str); 19] = [
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
        "proxy_set_buffer_bytes" => set_buffer, (buffer: u32, start: u32, max: u32, ptr: u32, len: u32);
        "proxy_get_buffer_status" => get_buffer_status, (buffer: u32, len: u32, flags: u32);
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

/// Where a buffer is that belongs to a stream.
fn body_of(buffer: u32) -> Option<Flow> {
    match buffer {
        0 | 2 => Some(Flow::Request),
        1 | 3 => Some(Flow::Response),
        _ => None,
    }
}

/// The part of a buffer that a guest asks for; past the end there is nothing.
fn part(bytes: &[u8], start: u32, end: u32) -> Vec<u8> {
    let at = |place: u32| usize::try_from(place).unwrap_or(usize::MAX).min(bytes.len());
    bytes.get(at(start)..at(end)).unwrap_or_default().to_vec()
}

fn get_buffer(caller: Guest<'_, '_>, buffer: u32, start: u32, max: u32, ptr: u32, len: u32) -> Call {
    let host = caller.data();
    if buffer > 8 {
        return Err(Status::BadArgument.into());
    }
    let end = start.checked_add(max).ok_or(Status::BadArgument)?;
    let bytes = match (buffer, host.phase, &host.view) {
        (6, Phase::VmStart, _) => part(&host.spec.vm_configuration, start, end),
        (7, Phase::Configure, _) => part(&host.plugin().configuration, start, end),
        (0..=3, _, Some(view)) if (buffer > 1) == view.is_tcp() => {
            let flow = body_of(buffer).ok_or(Status::NotFound)?;
            view.body(flow, |bytes| part(bytes, start, end)).ok_or(Status::NotFound)?
        }
        _ => return Err(Status::NotFound.into()),
    };
    give(caller, &bytes, ptr, len)
}

fn set_buffer(caller: Guest<'_, '_>, buffer: u32, start: u32, max: u32, ptr: u32, len: u32) -> Call {
    let (memory, host) = split(caller)?;
    let bytes = slice(memory, ptr, len)?;
    let flow = body_of(buffer).ok_or(Status::BadArgument)?;
    let view = host.view.as_ref().filter(|view| (buffer > 1) == view.is_tcp()).ok_or(Status::BadArgument)?;
    let size = |n: u32| usize::try_from(n).unwrap_or(usize::MAX);
    let done = view.set_body(flow, size(start), size(max), bytes);
    done.then_some(()).ok_or(Fault::Status(Status::BadArgument))
}

fn get_buffer_status(caller: Guest<'_, '_>, buffer: u32, out_len: u32, out_flags: u32) -> Call {
    let host = caller.data();
    let length = match (buffer, host.phase, &host.view) {
        (6, Phase::VmStart, _) => host.spec.vm_configuration.len(),
        (7, Phase::Configure, _) => host.plugin().configuration.len(),
        (0..=3, _, Some(view)) if (buffer > 1) == view.is_tcp() => {
            let flow = body_of(buffer).ok_or(Status::NotFound)?;
            view.body(flow, <[u8]>::len).ok_or(Status::NotFound)?
        }
        (0..=8, _, _) => return Err(Status::NotFound.into()),
        _ => return Err(Status::BadArgument.into()),
    };
    write_u32(caller, out_len, u32::try_from(length).map_err(|_| Status::InternalFailure)?)?;
    write_u32(caller, out_flags, 0)
}

fn get_configuration(caller: Guest<'_, '_>, ptr: u32, len: u32) -> Call {
    let host = caller.data();
    let spec = std::sync::Arc::clone(if host.phase == Phase::Configure { host.plugin() } else { &host.spec });
    let configure = host.phase == Phase::Configure;
    give(caller, if configure { &spec.configuration } else { &spec.vm_configuration }, ptr, len)
}

/// The direction and the place of a map that belongs to a stream.
fn map_of(map: u32) -> Option<(Flow, Which)> {
    match map {
        0 => Some((Flow::Request, Which::Headers)),
        1 => Some((Flow::Request, Which::Trailers)),
        2 => Some((Flow::Response, Which::Headers)),
        3 => Some((Flow::Response, Which::Trailers)),
        _ => None,
    }
}

/// The head that a map number means now, for reading: given to `$use` as `$head`; `None` if it cannot be read now.
macro_rules! with_map {
    ($host:expr, $map:expr, $head:ident => $use:expr) => {
        map_of($map).zip($host.view.as_ref()).and_then(|((flow, which), view)| {
            view.read(flow, which, |head| match head {
                HeadRef::Request($head) => $use,
                HeadRef::Response($head) => $use,
                HeadRef::Trailers($head) => $use,
            })
        })
    };
}

/// The same for writing.
macro_rules! with_map_mut {
    ($host:expr, $map:expr, ($head:ident, $lacking:ident) => $use:expr) => {
        map_of($map)
            .zip($host.view.as_ref())
            .and_then(|((flow, which), view)| {
                view.write(flow, which, |head| match head {
                    HeadMut::Request($head, $lacking) => $use,
                    HeadMut::Response($head, $lacking) => $use,
                    HeadMut::Trailers($head, $lacking) => $use,
                })
            })
            .unwrap_or(Err(Status::BadArgument))
    };
}

fn map_size(caller: Guest<'_, '_>, map: u32, out: u32) -> Call {
    let host = caller.data();
    let size = with_map!(host, map, head => headers::size(head)).ok_or(Status::BadArgument)?;
    write_u32(caller, out, u32::try_from(size).map_err(|_| Status::InternalFailure)?)
}

fn map_pairs(caller: Guest<'_, '_>, map: u32, ptr: u32, len: u32) -> Call {
    if map > 7 {
        return Err(Status::BadArgument.into());
    }
    let host = caller.data();
    let bytes = with_map!(host, map, head => serialize_pairs(&headers::pairs(head))).unwrap_or_default();
    give(caller, &bytes, ptr, len)
}

fn map_value(caller: Guest<'_, '_>, map: u32, kp: u32, kn: u32, ptr: u32, len: u32) -> Call {
    let (memory, host) = split(caller)?;
    let key = slice(memory, kp, kn)?;
    let value = with_map!(host, map, head => headers::get(head, key).map(<[u8]>::to_vec)).ok_or(Status::BadArgument)?;
    let value = match value {
        Some(value) => value,
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
    let view = host.view.as_ref().ok_or(Status::NotFound)?;
    let name = name.strip_suffix(&[0]).unwrap_or(name);
    if name.is_empty() || !view.set_property(name, value) {
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
    let view = host.view.as_ref().ok_or(Status::BadArgument)?;
    if body.len() > LOCAL_BODY {
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
    let body = bytes::Bytes::copy_from_slice(body);
    let response = LocalResponse { status, headers: fields, body, grpc_status: u32::try_from(grpc).ok() };
    if !view.respond(response) {
        return Err(Status::BadArgument.into());
    }
    if !details.is_empty() {
        host.log(1, &details);
    }
    Ok(())
}

fn set_effective_context(caller: Guest<'_, '_>, id: u32) -> Call {
    caller.data_mut().select(id).then_some(()).ok_or(Fault::Status(Status::BadArgument))
}

/// Nothing defers the end of a context yet, so nothing is ever pending.
fn done(_: Guest<'_, '_>) -> Call {
    Err(Status::NotFound.into())
}

fn continue_stream(caller: Guest<'_, '_>, kind: u32) -> Call {
    let view = caller.data().view.as_ref();
    match (kind, view, view.is_some_and(View::is_tcp)) {
        (0, Some(view), false) | (2, Some(view), true) => view.resume(Flow::Request),
        (1, Some(view), false) | (3, Some(view), true) => view.resume(Flow::Response),
        (3, _, false) => return Err(Status::Unimplemented.into()),
        (0..=3, _, _) => {}
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
    if let Some(view) = &caller.data().view {
        view.close();
    }
    Ok(())
}
