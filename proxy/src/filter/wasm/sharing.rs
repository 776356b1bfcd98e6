//! Host functions on what instances share: data, queues, metrics; and foreign functions.

use wasmtime::Linker;

use super::abi::Status;
use super::calls::{Guest, functions};
use super::foreign;
use super::host::{Call, Host, check, give, slice, split, write, write_u32};

/// Longest value of shared data, and longest item of a queue, bytes.
const VALUE: usize = 1 << 20;

/// Defines them.
pub(super) fn define(linker: &mut Linker<Host>) -> wasmtime::Result<()> {
    functions! { linker,
        "proxy_get_shared_data" => get_data, (kp: u32, kn: u32, ptr: u32, len: u32, cas: u32);
        "proxy_set_shared_data" => set_data, (kp: u32, kn: u32, vp: u32, vn: u32, cas: u32);
        "proxy_register_shared_queue" => register_queue, (np: u32, nn: u32, out: u32);
        "proxy_resolve_shared_queue" => resolve_queue, (vp: u32, vn: u32, np: u32, nn: u32, out: u32);
        "proxy_enqueue_shared_queue" => enqueue, (id: u32, p: u32, n: u32);
        "proxy_dequeue_shared_queue" => dequeue, (id: u32, ptr: u32, len: u32);
        "proxy_define_metric" => define_metric, (kind: u32, np: u32, nn: u32, out: u32);
        "proxy_increment_metric" => increment_metric, (id: u32, by: i64);
        "proxy_record_metric" => record_metric, (id: u32, value: u64);
        "proxy_get_metric" => get_metric, (id: u32, out: u32);
        "proxy_call_foreign_function" => call_foreign, (np: u32, nn: u32, ap: u32, an: u32, ptr: u32, len: u32);
    }
    Ok(())
}

fn get_data(caller: Guest<'_, '_>, kp: u32, kn: u32, ptr: u32, len: u32, cas: u32) -> Call {
    let (memory, host) = split(caller)?;
    let (value, version) = host.plugin().vm.get(slice(memory, kp, kn)?)?;
    give(caller, &value, ptr, len)?;
    write_u32(caller, cas, version)
}

fn set_data(caller: Guest<'_, '_>, kp: u32, kn: u32, vp: u32, vn: u32, cas: u32) -> Call {
    let (memory, host) = split(caller)?;
    let (key, value) = (slice(memory, kp, kn)?, slice(memory, vp, vn)?);
    if value.len() > VALUE {
        return Err(Status::BadArgument.into());
    }
    let plugin = host.plugin();
    Ok(plugin.vm.set(key, value, cas, plugin.memory)?)
}

fn register_queue(caller: Guest<'_, '_>, np: u32, nn: u32, out: u32) -> Call {
    check(caller, out, 4)?;
    let (memory, host) = split(caller)?;
    let id = host.plugin().vm.register(slice(memory, np, nn)?, &host.inbox, host.root_id())?;
    if let Some(root) = host.roots.get_mut(host.root) {
        root.listens = true;
    }
    write_u32(caller, out, id)
}

fn resolve_queue(caller: Guest<'_, '_>, vp: u32, vn: u32, np: u32, nn: u32, out: u32) -> Call {
    let (memory, host) = split(caller)?;
    let (vm_id, name) = (slice(memory, vp, vn)?, slice(memory, np, nn)?);
    let vm_id = std::str::from_utf8(vm_id).map_err(|_| Status::NotFound)?;
    let id = host.plugin().vm.resolve(vm_id, name)?;
    write_u32(caller, out, id)
}

fn enqueue(caller: Guest<'_, '_>, id: u32, p: u32, n: u32) -> Call {
    let (memory, host) = split(caller)?;
    let item = slice(memory, p, n)?;
    if item.len() > VALUE {
        return Err(Status::BadArgument.into());
    }
    let plugin = host.plugin();
    Ok(plugin.vm.enqueue(id, item, plugin.memory)?)
}

fn dequeue(caller: Guest<'_, '_>, id: u32, ptr: u32, len: u32) -> Call {
    // Looked at first, so that nothing is lost for a bad address.
    check(caller, ptr, 4)?;
    check(caller, len, 4)?;
    let item = caller.data().plugin().vm.dequeue(id)?;
    give(caller, &item, ptr, len)
}

fn define_metric(caller: Guest<'_, '_>, kind: u32, np: u32, nn: u32, out: u32) -> Call {
    check(caller, out, 4)?;
    let (memory, host) = split(caller)?;
    let metrics = std::sync::Arc::clone(&host.plugin().metrics);
    let id = host.metrics.define(&metrics, kind, slice(memory, np, nn)?)?;
    write_u32(caller, out, id)
}

fn increment_metric(caller: Guest<'_, '_>, id: u32, by: i64) -> Call {
    Ok(caller.data().metrics.increment(id, by)?)
}

fn record_metric(caller: Guest<'_, '_>, id: u32, value: u64) -> Call {
    Ok(caller.data().metrics.record(id, value)?)
}

fn get_metric(caller: Guest<'_, '_>, id: u32, out: u32) -> Call {
    let value = caller.data().metrics.get(id)?;
    write(caller, out, &value.to_le_bytes())
}

fn call_foreign(caller: Guest<'_, '_>, np: u32, nn: u32, ap: u32, an: u32, ptr: u32, len: u32) -> Call {
    let (memory, _) = split(caller)?;
    let result = foreign::call(slice(memory, np, nn)?, slice(memory, ap, an)?)?;
    // A guest that does not want the result gives no place for it.
    if ptr == 0 || len == 0 {
        return Ok(());
    }
    give(caller, &result, ptr, len)
}
