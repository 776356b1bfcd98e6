//! The host functions of module `env`.

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use wasmtime::{Caller, Engine, FuncType, Linker, ValType};

use super::super::{Flow, LocalResponse, View};
use super::abi::{Abi, Status, deserialize_pairs};
use super::host::{Call, End, Fault, Host, Phase, give, read, slice, split, write, write_u32};
use super::logging::log_level;
use super::{buffers, callouts, clock, headers, maps, properties, sharing};

/// Largest body of a local response, bytes.
const LOCAL_BODY: usize = 1024 * 1024;

/// The type of a function of 32- and 64-bit parameters.
pub(super) fn signature(engine: &Engine, params: &str, results: bool) -> FuncType {
    let params = params.chars().map(|param| if param == 'I' { ValType::I64 } else { ValType::I32 });
    FuncType::new(engine, params, results.then_some(ValType::I32))
}

/// How host functions get at the guest and the host's data.
pub(super) type Guest<'a, 'b> = &'a mut Caller<'b, Host>;

/// Refuses calls that must not happen now; the guest ends.
pub(super) fn guard(caller: &Caller<'_, Host>, name: &str) -> Call {
    let host = caller.data();
    let when = match (host.phase, host.allocating) {
        (Phase::Start, _) => "during start-up",
        (_, true) => "from the allocator",
        _ => return Ok(()),
    };
    Err(Fault::Trap(wasmtime::Error::msg(format!("{name} was called {when}, where only logging is allowed"))))
}

pub(super) fn finish(result: Call) -> wasmtime::Result<i32> {
    match result {
        Ok(()) => Ok(Status::Ok as i32),
        Err(Fault::Status(status)) => Ok(status as i32),
        Err(Fault::Trap(error)) => Err(error),
    }
}

/// Defines functions of module `env` by name: each gets the caller and its arguments, after the [`guard`].
macro_rules! functions {
    ($linker:ident, $($name:literal => $function:path, ($($arg:ident: $ty:ty),*);)*) => {$(
        $linker.func_wrap("env", $name, |mut caller: wasmtime::Caller<'_, $crate::filter::wasm::host::Host>, $($arg: $ty),*| {
            $crate::filter::wasm::calls::finish(
                $crate::filter::wasm::calls::guard(&caller, $name).and_then(|()| $function(&mut caller, $($arg),*)),
            )
        })?;
    )*};
}
pub(super) use functions;

/// Defines every function that a module of this ABI may import from `env`.
pub(super) fn link(linker: &mut Linker<Host>, abi: Abi) -> wasmtime::Result<()> {
    linker.func_wrap("env", "proxy_log", |mut caller: Caller<'_, Host>, level: u32, ptr: u32, len: u32| {
        finish(log(&mut caller, level, ptr, len))
    })?;
    functions! { linker,
        "proxy_get_current_time_nanoseconds" => current_time, (out: u32);
        "proxy_get_property" => get_property, (p: u32, n: u32, ptr: u32, len: u32);
        "proxy_set_property" => set_property, (p: u32, n: u32, vp: u32, vn: u32);
        "proxy_send_local_response" => local_response, (status: u32, dp: u32, dn: u32, bp: u32, bn: u32, hp: u32, hn: u32, grpc: i32);
        "proxy_set_effective_context" => set_effective_context, (id: u32);
        "proxy_done" => done, ();
    }
    if abi == Abi::V0_1_0 {
        functions! { linker,
            "proxy_get_configuration" => get_configuration, (ptr: u32, len: u32);
            "proxy_continue_request" => continue_request, ();
            "proxy_continue_response" => continue_response, ();
            "proxy_clear_route_cache" => clear_route_cache, ();
        }
    } else {
        functions! { linker,
            "proxy_continue_stream" => continue_stream, (kind: u32);
            "proxy_close_stream" => close_stream, (kind: u32);
        }
    }
    if abi == Abi::V0_2_1 {
        functions! { linker, "proxy_get_log_level" => get_log_level, (out: u32); }
    }
    buffers::define(linker)?;
    maps::define(linker)?;
    sharing::define(linker)?;
    callouts::define(linker)?;
    linker.func_wrap("env", "emscripten_notify_memory_growth", |_: u32| {})?;
    linker.func_wrap("env", "pthread_equal", |a: u32, b: u32| u32::from(a == b))?;
    Ok(())
}

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
    write(caller, out, &u64::try_from(clock::wall().as_nanos()).unwrap_or(u64::MAX).to_le_bytes())
}

fn get_configuration(caller: Guest<'_, '_>, ptr: u32, len: u32) -> Call {
    let host = caller.data();
    let spec = std::sync::Arc::clone(if host.phase == Phase::Configure { host.plugin() } else { &host.spec });
    let configure = host.phase == Phase::Configure;
    give(caller, if configure { &spec.configuration } else { &spec.vm_configuration }, ptr, len)
}

fn get_property(caller: Guest<'_, '_>, p: u32, n: u32, ptr: u32, len: u32) -> Call {
    let (memory, host) = split(caller)?;
    let mut value = std::mem::take(&mut host.scratch);
    value.clear();
    let found = slice(memory, p, n).and_then(|path| properties::get(host, path, &mut value));
    let result = found.map_err(Fault::from).and_then(|()| give(caller, &value, ptr, len));
    caller.data_mut().scratch = value;
    result
}

fn set_property(caller: Guest<'_, '_>, p: u32, n: u32, vp: u32, vn: u32) -> Call {
    let (memory, host) = split(caller)?;
    let (name, value) = (slice(memory, p, n)?, slice(memory, vp, vn)?);
    let view = host.view().ok_or(Status::NotFound)?;
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
    let view = host.view().ok_or(Status::BadArgument)?;
    let size: usize = pairs.iter().map(|(key, value)| key.len() + value.len()).sum();
    if body.len() > LOCAL_BODY || size > headers::BLOCK {
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

/// Ends a root context that put off its end. Streams end by themselves.
fn done(caller: Guest<'_, '_>) -> Call {
    let host = caller.data_mut();
    let id = host.effective;
    let root = host.roots.iter_mut().find(|root| root.id == id && root.end == End::PutOff).ok_or(Status::NotFound)?;
    root.end = End::Done;
    Ok(())
}

fn continue_stream(caller: Guest<'_, '_>, kind: u32) -> Call {
    let view = caller.data().view();
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
    if let Some(view) = caller.data().view() {
        view.close();
    }
    Ok(())
}
