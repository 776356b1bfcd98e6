//! Host functions on header maps: of the exchange (0 to 3), and of what a root context is told (4 to 7).

use wasmtime::Linker;

use super::super::{Flow, HeadMut, HeadRef, Which};
use super::abi::{Abi, Status, deserialize_pairs, serialize_pairs};
use super::calls::{Guest, functions};
use super::headers::{self, Head};
use super::host::{Call, Host, give, slice, split, write_u32};

/// Number of the last map.
const LAST: u32 = 7;

/// Defines them.
pub(super) fn define(linker: &mut Linker<Host>) -> wasmtime::Result<()> {
    functions! { linker,
        "proxy_get_header_map_size" => size, (map: u32, out: u32);
        "proxy_get_header_map_pairs" => pairs, (map: u32, ptr: u32, len: u32);
        "proxy_set_header_map_pairs" => set_pairs, (map: u32, ptr: u32, len: u32);
        "proxy_get_header_map_value" => value, (map: u32, kp: u32, kn: u32, ptr: u32, len: u32);
        "proxy_add_header_map_value" => add, (map: u32, kp: u32, kn: u32, vp: u32, vn: u32);
        "proxy_replace_header_map_value" => replace, (map: u32, kp: u32, kn: u32, vp: u32, vn: u32);
        "proxy_remove_header_map_value" => remove, (map: u32, kp: u32, kn: u32);
    }
    Ok(())
}

/// The direction and the place of a map that belongs to an exchange.
fn place(map: u32) -> Option<(Flow, Which)> {
    match map {
        0 => Some((Flow::Request, Which::Headers)),
        1 => Some((Flow::Request, Which::Trailers)),
        2 => Some((Flow::Response, Which::Headers)),
        3 => Some((Flow::Response, Which::Trailers)),
        _ => None,
    }
}

/// What is done with a map that may be read. The guest's allocator may run meanwhile: it can call nothing that touches the map.
trait Visit {
    fn visit<H: Head>(self, caller: Guest<'_, '_>, head: &H) -> Call;
}

/// Reads a map. `None`: it cannot be read now.
fn visit(caller: Guest<'_, '_>, map: u32, visit: impl Visit) -> Option<Call> {
    if let Some((flow, which)) = place(map) {
        let view = caller.data().view().cloned()?;
        return view.read(flow, which, |head| match head {
            HeadRef::Request(head) => visit.visit(caller, head),
            HeadRef::Response(head) => visit.visit(caller, head),
            HeadRef::Trailers(head) => visit.visit(caller, head),
        });
    }
    let delivery = caller.data_mut().delivery.take()?;
    let result = match (&delivery.head, &delivery.fields) {
        (Some(head), _) if map == 6 => Some(visit.visit(caller, head)),
        (_, Some((of, fields))) if map == *of => Some(visit.visit(caller, fields)),
        _ => None,
    };
    caller.data_mut().delivery = Some(delivery);
    result
}

/// A map's number.
fn check(map: u32) -> Call {
    if map > LAST { Err(Status::BadArgument.into()) } else { Ok(()) }
}

struct Size(u32);

impl Visit for Size {
    fn visit<H: Head>(self, caller: Guest<'_, '_>, head: &H) -> Call {
        write_u32(caller, self.0, u32::try_from(headers::size(head)).map_err(|_| Status::InternalFailure)?)
    }
}

fn size(caller: Guest<'_, '_>, map: u32, out: u32) -> Call {
    check(map)?;
    visit(caller, map, Size(out)).unwrap_or(Err(Status::BadArgument.into()))
}

struct Pairs(u32, u32);

impl Visit for Pairs {
    fn visit<H: Head>(self, caller: Guest<'_, '_>, head: &H) -> Call {
        let pairs: Vec<_> = headers::pairs(head).collect();
        give(caller, &serialize_pairs(&pairs), self.0, self.1)
    }
}

fn pairs(caller: Guest<'_, '_>, map: u32, ptr: u32, len: u32) -> Call {
    check(map)?;
    // One that cannot be read is empty here, and here alone.
    visit(caller, map, Pairs(ptr, len)).unwrap_or_else(|| give(caller, &[], ptr, len))
}

struct Value {
    key: (u32, u32),
    to: (u32, u32),
}

impl Visit for Value {
    fn visit<H: Head>(self, caller: Guest<'_, '_>, head: &H) -> Call {
        let (memory, host) = split(caller)?;
        let value = match headers::get(head, slice(memory, self.key.0, self.key.1)?) {
            Some(value) => value,
            // ABI 0.1.0 knew no missing values.
            None if host.spec.abi == Abi::V0_1_0 => &[],
            None => return Err(Status::NotFound.into()),
        };
        give(caller, value, self.to.0, self.to.1)
    }
}

fn value(caller: Guest<'_, '_>, map: u32, kp: u32, kn: u32, ptr: u32, len: u32) -> Call {
    check(map)?;
    let (memory, _) = split(caller)?;
    slice(memory, kp, kn)?;
    visit(caller, map, Value { key: (kp, kn), to: (ptr, len) }).unwrap_or(Err(Status::BadArgument.into()))
}

/// The head that a map number means now, for writing: what a root context is told is read-only.
macro_rules! writing {
    ($host:expr, $map:expr, ($head:ident, $edits:ident) => $use:expr) => {
        place($map)
            .zip($host.view())
            .and_then(|((flow, which), view)| {
                view.write(flow, which, |head| match head {
                    HeadMut::Request($head, $edits) => $use,
                    HeadMut::Response($head, $edits) => $use,
                    HeadMut::Trailers($head, $edits) => $use,
                })
            })
            .unwrap_or(Err(Status::BadArgument))
    };
}

fn set_pairs(caller: Guest<'_, '_>, map: u32, ptr: u32, len: u32) -> Call {
    let (memory, host) = split(caller)?;
    let pairs = deserialize_pairs(slice(memory, ptr, len)?).ok_or(Status::BadArgument)?;
    writing!(host, map, (head, edits) => headers::replace_all(head, edits, &pairs))?;
    Ok(())
}

fn add(caller: Guest<'_, '_>, map: u32, kp: u32, kn: u32, vp: u32, vn: u32) -> Call {
    let (memory, host) = split(caller)?;
    let (key, value) = (slice(memory, kp, kn)?, slice(memory, vp, vn)?);
    writing!(host, map, (head, edits) => headers::add(head, edits, key, value))?;
    Ok(())
}

fn replace(caller: Guest<'_, '_>, map: u32, kp: u32, kn: u32, vp: u32, vn: u32) -> Call {
    let (memory, host) = split(caller)?;
    let (key, value) = (slice(memory, kp, kn)?, slice(memory, vp, vn)?);
    writing!(host, map, (head, edits) => headers::replace(head, edits, key, value))?;
    Ok(())
}

fn remove(caller: Guest<'_, '_>, map: u32, kp: u32, kn: u32) -> Call {
    let (memory, host) = split(caller)?;
    let key = slice(memory, kp, kn)?;
    writing!(host, map, (head, edits) => headers::remove(head, edits, key))?;
    Ok(())
}
