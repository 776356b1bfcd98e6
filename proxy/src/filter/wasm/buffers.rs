//! Host functions on buffers.

use std::sync::Arc;

use wasmtime::Linker;

use super::super::Flow;
use super::abi::Status;
use super::calls::{Guest, functions};
use super::host::{Call, Fault, Host, Phase, give, slice, split, write_u32};

/// Number of the last buffer.
const LAST: u32 = 8;

/// Defines them.
pub(super) fn define(linker: &mut Linker<Host>) -> wasmtime::Result<()> {
    functions! { linker,
        "proxy_get_buffer_bytes" => get, (buffer: u32, start: u32, max: u32, ptr: u32, len: u32);
        "proxy_set_buffer_bytes" => set, (buffer: u32, start: u32, max: u32, ptr: u32, len: u32);
        "proxy_get_buffer_status" => status, (buffer: u32, len: u32, flags: u32);
    }
    Ok(())
}

/// Where a buffer is that belongs to a stream: bodies, and the bytes of TCP.
fn flow(buffer: u32) -> Option<Flow> {
    match buffer {
        0 | 2 => Some(Flow::Request),
        1 | 3 => Some(Flow::Response),
        _ => None,
    }
}

/// Does something with a buffer that may be read. The guest's allocator may run meanwhile: it can call nothing that touches it.
fn read(caller: Guest<'_, '_>, buffer: u32, f: impl FnOnce(Guest<'_, '_>, &[u8]) -> Call) -> Call {
    let host = caller.data();
    if let Some(flow) = flow(buffer) {
        let view = host.view().cloned().filter(|view| (buffer > 1) == view.is_tcp()).ok_or(Status::NotFound)?;
        return view.body(flow, |bytes| f(caller, bytes)).unwrap_or(Err(Status::NotFound.into()));
    }
    match (buffer, host.phase, &host.delivery) {
        (4 | 5, _, Some(delivery)) => {
            let body = delivery.body.as_ref().filter(|(of, _)| *of == buffer).map(|(_, body)| body.clone());
            f(caller, &body.ok_or(Status::NotFound)?)
        }
        (6, Phase::VmStart, _) => {
            let spec = Arc::clone(&host.spec);
            f(caller, &spec.vm_configuration)
        }
        (7, Phase::Configure, _) => {
            let spec = Arc::clone(host.plugin());
            f(caller, &spec.configuration)
        }
        // Nobody calls a guest's foreign functions, so that buffer 8 is never there.
        (0..=LAST, _, _) => Err(Status::NotFound.into()),
        _ => Err(Status::BadArgument.into()),
    }
}

fn get(caller: Guest<'_, '_>, buffer: u32, start: u32, max: u32, ptr: u32, len: u32) -> Call {
    if buffer > LAST {
        return Err(Status::BadArgument.into());
    }
    let end = start.checked_add(max).ok_or(Status::BadArgument)?;
    read(caller, buffer, |caller, bytes| {
        // Past the end there is nothing.
        let at = |place: u32| usize::try_from(place).unwrap_or(usize::MAX).min(bytes.len());
        give(caller, bytes.get(at(start)..at(end)).unwrap_or_default(), ptr, len)
    })
}

fn set(caller: Guest<'_, '_>, buffer: u32, start: u32, max: u32, ptr: u32, len: u32) -> Call {
    let (memory, host) = split(caller)?;
    let bytes = slice(memory, ptr, len)?;
    let flow = flow(buffer).ok_or(Status::BadArgument)?;
    let view = host.view().filter(|view| (buffer > 1) == view.is_tcp()).ok_or(Status::BadArgument)?;
    let size = |n: u32| usize::try_from(n).unwrap_or(usize::MAX);
    let done = view.set_body(flow, size(start), size(max), bytes);
    done.then_some(()).ok_or(Fault::Status(Status::BadArgument))
}

fn status(caller: Guest<'_, '_>, buffer: u32, out_len: u32, out_flags: u32) -> Call {
    read(caller, buffer, |caller, bytes| {
        write_u32(caller, out_len, u32::try_from(bytes.len()).map_err(|_| Status::InternalFailure)?)?;
        write_u32(caller, out_flags, 0)
    })
}
