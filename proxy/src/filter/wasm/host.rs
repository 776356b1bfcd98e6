//! What the host keeps for one instance: the data of its store.

use std::collections::HashMap;
use std::rc::Weak;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, response};
use outrigger_core::key::ServiceKey;
use outrigger_proto::mesh;
use wasmtime::{Caller, Memory, ResourceLimiter};

use super::super::{Plugin, Stream, View};
use super::abi::{Abi, Status};
use super::callouts::Calls;
use super::contexts::Contexts;
use super::counting::{FilterMetrics, MetricIds};
use super::entry::Callback;
use super::logging::LogLimit;
use super::shared::{Inbox, Vm};
use super::ticker::{Budget, Meter};
use crate::http::Place;

/// What a plugin's instances have in common.
#[derive(Debug, Clone)]
pub(in super::super) struct Spec {
    /// `<namespace>/<name>`
    pub(in super::super) name: String,
    pub(in super::super) root_id: String,
    pub(in super::super) vm_id: String,
    pub(in super::super) configuration: Vec<u8>,
    pub(in super::super) vm_configuration: Vec<u8>,
    pub(in super::super) environment: Vec<(String, String)>,
    pub(in super::super) fail_open: bool,
    /// Bytes of a body that are held while it pauses
    pub(in super::super) body: usize,
    /// Bytes of linear memory
    pub(in super::super) memory: usize,
    /// CPU time of a callback
    pub(in super::super) call_time: Duration,
    /// Millionths of a worker's time; 0: all
    pub(in super::super) cpu_share: u32,
    /// Calls outstanding in one instance
    pub(super) callouts: usize,
    /// Services that calls reach, by the names they use
    pub(super) upstreams: HashMap<String, Place>,
    /// What instances share
    pub(super) vm: Arc<Vm>,
    pub(super) metrics: Arc<FilterMetrics>,
    pub(super) abi: Abi,
    /// Host calls and callbacks are told
    pub(super) trace: bool,
}

/// Limits where a specification has 0: bytes, milliseconds.
const MEMORY: u64 = 64 * 1024 * 1024;
const CALL_TIME: u64 = 5;
const BODY: u64 = 64 * 1024;
const CALLOUTS: u32 = 16;

impl Spec {
    pub(super) fn of(source: &mesh::Filter, abi: Abi, vm: Arc<Vm>, metrics: Arc<FilterMetrics>) -> Self {
        let or = |value: u64, default: u64| if value == 0 { default } else { value };
        let mut environment: Vec<_> = source.environment.clone().into_iter().collect();
        environment.sort();
        let place = |upstream: &mesh::filter::Upstream| Place {
            service: ServiceKey { namespace: upstream.namespace.clone(), name: upstream.name.clone() },
            port: u16::try_from(upstream.port).ok().filter(|port| *port != 0),
        };
        let callouts = if source.callouts == 0 { CALLOUTS } else { source.callouts };
        Self {
            name: format!("{}/{}", source.namespace, source.name),
            root_id: source.root_id.clone(),
            vm_id: source.vm_id.clone(),
            configuration: source.configuration.to_vec(),
            vm_configuration: source.vm_configuration.to_vec(),
            environment,
            fail_open: source.fail_open,
            body: usize::try_from(or(source.body, BODY)).unwrap_or(usize::MAX),
            memory: usize::try_from(or(source.memory, MEMORY)).unwrap_or(usize::MAX),
            call_time: Duration::from_millis(or(source.call_time_ms, CALL_TIME)),
            cpu_share: source.cpu_share_ppm,
            callouts: usize::try_from(callouts).unwrap_or(usize::MAX),
            upstreams: source.upstreams.iter().map(|(name, upstream)| (name.clone(), place(upstream))).collect(),
            vm,
            metrics,
            abi,
            trace: false,
        }
    }

    /// The same for a throw-away instance: what it shares and counts is seen by nobody.
    pub(super) fn for_trial(&self) -> Self {
        Self { vm: Vm::alone(), metrics: Arc::new(FilterMetrics::alone(&self.name)), trace: false, ..self.clone() }
    }

    /// What has to be equal in plugins that share an instance.
    pub(super) fn vm_key(&self, sha256: &str) -> String {
        let namespace = self.name.split('/').next().unwrap_or_default();
        format!(
            "{namespace}\0{}\0{sha256}\0{:?}\0{:?}\0{}",
            self.vm_id, self.vm_configuration, self.environment, self.memory
        )
    }
}

/// Counters of one instance; written by its worker only, read by anyone.
#[derive(Debug)]
#[repr(align(64))]
pub(in super::super) struct Counters {
    pub(in super::super) requests: AtomicU64,
    pub(in super::super) calls: AtomicU64,
    pub(in super::super) memory: AtomicU64,
    /// The time it uses
    pub(in super::super) meter: Arc<Meter>,
}

impl Counters {
    /// Of an instance that may use this share of its worker's time: millionths; 0: all.
    pub(in super::super) fn new(share: u32) -> Self {
        Self {
            requests: AtomicU64::new(0),
            calls: AtomicU64::new(0),
            memory: AtomicU64::new(0),
            meter: Meter::new(share),
        }
    }

    /// Adds to a counter that only this thread writes.
    pub(super) fn bump(counter: &AtomicU64, by: u64) {
        counter.store(counter.load(Ordering::Relaxed).wrapping_add(by), Ordering::Relaxed);
    }
}

/// What is going on while a guest runs: decides what its host calls may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Instantiation, `_initialize`, `_start`: nothing but logging and WASI
    Start,
    /// Callbacks of the root context with no configuration to read
    Root,
    /// `on_vm_start`
    VmStart,
    /// `on_configure`
    Configure,
    /// Callbacks of a stream context, but its end
    Stream,
    /// `on_log`: heads are read-only copies
    Log,
    /// `on_done`, `on_delete`
    Done,
}

/// Linear memory and tables within the filter's limit.
#[derive(Debug)]
pub(super) struct Limiter {
    limit: usize,
    /// An instantiation or a growth was refused
    pub(super) refused: bool,
    pub(super) counters: Arc<Counters>,
}

const TABLE_ELEMENTS: usize = 100_000;

impl ResourceLimiter for Limiter {
    fn memory_growing(&mut self, _current: usize, desired: usize, _maximum: Option<usize>) -> wasmtime::Result<bool> {
        let fits = desired <= self.limit;
        if fits {
            self.counters.memory.store(desired as u64, Ordering::Relaxed);
        }
        self.refused |= !fits;
        Ok(fits)
    }

    fn table_growing(&mut self, _current: usize, desired: usize, _maximum: Option<usize>) -> wasmtime::Result<bool> {
        Ok(desired <= TABLE_ELEMENTS)
    }

    fn instances(&self) -> usize {
        1
    }

    fn memories(&self) -> usize {
        1
    }

    fn tables(&self) -> usize {
        16
    }
}

/// A root context: a plugin in this VM.
#[derive(Debug)]
pub(super) struct Root {
    pub(super) id: u32,
    pub(super) spec: Arc<Spec>,
    pub(super) counters: Arc<Counters>,
    /// Whether it ends
    pub(super) end: End,
    /// To whom its failures are told
    pub(super) plugin: std::sync::Weak<Plugin>,
    /// It has registered a queue
    pub(super) listens: bool,
}

/// How far the end of a root context is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// Not in sight
    No,
    /// Its `on_done` said that it needs longer
    PutOff,
    /// Then it called `proxy_done`
    Done,
}

/// A live context.
#[derive(Debug)]
pub(super) struct Context {
    /// Its root: index into [`Host::roots`]
    pub(super) root: usize,
    /// The exchange that it is in, and which filter of it; `None`: a root context
    pub(super) stream: Option<(Weak<Stream>, usize)>,
}

impl Context {
    fn view(&self) -> Option<View> {
        let (stream, index) = self.stream.as_ref()?;
        Some(View { stream: stream.upgrade()?, index: *index })
    }
}

/// What a callback of a root context is told, readable while it runs.
#[derive(Debug, Default)]
pub(super) struct Delivery {
    /// Map 6: the head of an answer
    pub(super) head: Option<response::Parts>,
    /// Map 4, 5 or 7, by its number
    pub(super) fields: Option<(u32, HeaderMap)>,
    /// Buffer 4 or 5, by its number
    pub(super) body: Option<(u32, Bytes)>,
    /// Status and its message
    pub(super) status: Option<(u32, String)>,
}

/// The data of a store.
pub(super) struct Host {
    /// What all plugins in this VM have in common: those fields of the first one's
    pub(super) spec: Arc<Spec>,
    pub(super) memory: Option<Memory>,
    pub(super) allocator: Option<Callback<u32, u32>>,
    pub(super) limiter: Limiter,
    pub(super) budget: Budget,
    pub(super) timed_out: bool,
    pub(super) phase: Phase,
    /// The guest's allocator runs inside a host call
    pub(super) allocating: bool,
    /// Plugins in this VM
    pub(super) roots: Vec<Root>,
    /// The one that the effective context belongs to: index into `roots`
    pub(super) root: usize,
    /// Live contexts, the roots among them
    pub(super) contexts: Contexts,
    /// The context of the callback
    pub(super) current: u32,
    /// What `set_effective_context` chose
    pub(super) effective: u32,
    /// The stream of the effective context, where that is not the callback's own
    chosen: Option<Option<View>>,
    /// The stream of the callback's own context
    pub(super) own: Option<View>,
    pub(super) log: LogLimit,
    pub(super) metrics: MetricIds,
    pub(super) calls: Calls,
    /// What the callback is told
    pub(super) delivery: Option<Delivery>,
    /// Words of other workers
    pub(super) inbox: Arc<Inbox>,
    /// Values of properties are made here
    pub(super) scratch: Vec<u8>,
    /// The functions behind those of a trace, by the number of the import; nothing where there is none
    pub(super) traced: Vec<Option<wasmtime::Func>>,
}

impl Host {
    pub(super) fn new(spec: Arc<Spec>, counters: Arc<Counters>) -> Self {
        Self {
            limiter: Limiter { limit: spec.memory, refused: false, counters },
            spec,
            memory: None,
            allocator: None,
            budget: Budget::default(),
            timed_out: false,
            phase: Phase::Start,
            allocating: false,
            roots: Vec::new(),
            root: 0,
            contexts: Contexts::default(),
            current: 0,
            effective: 0,
            chosen: None,
            own: None,
            log: LogLimit::default(),
            metrics: MetricIds::default(),
            calls: Calls::default(),
            delivery: None,
            inbox: Arc::default(),
            scratch: Vec::new(),
            traced: Vec::new(),
        }
    }

    /// The plugin that the current callback belongs to.
    pub(super) fn plugin(&self) -> &Arc<Spec> {
        self.roots.get(self.root).map_or(&self.spec, |root| &root.spec)
    }

    /// The root context that the current callback belongs to.
    pub(super) fn root_id(&self) -> u32 {
        self.roots.get(self.root).map_or(0, |root| root.id)
    }

    /// What counts the time of the plugin `root`; `None`: of the start.
    pub(super) fn meter(&self, root: Option<usize>) -> &Meter {
        let counters = root.and_then(|root| self.roots.get(root)).map_or(&self.limiter.counters, |root| &root.counters);
        &counters.meter
    }

    /// The stream of the effective context.
    pub(super) fn view(&self) -> Option<&View> {
        self.chosen.as_ref().unwrap_or(&self.own).as_ref()
    }

    /// The instance is entered, in a stream or not. Callbacks follow, each of them begun by [`Self::callback`].
    pub(super) fn begin(&mut self, view: Option<View>) {
        self.own = view;
        self.allocating = false;
        self.timed_out = false;
    }

    /// Begins a callback of a context of the plugin `root`.
    #[inline(never)] // Of all callbacks of a request: fetched once.
    pub(super) fn callback(&mut self, context: u32, root: usize, phase: Phase) {
        self.root = root;
        self.current = context;
        self.effective = context;
        self.phase = phase;
        self.chosen = None;
        let limit = match self.roots.get(root) {
            Some(root) => {
                Counters::bump(&root.counters.calls, 1);
                root.spec.call_time
            }
            None => self.spec.call_time,
        };
        self.budget.arm(limit);
    }

    /// The instance is left.
    pub(super) fn end(&mut self) {
        self.chosen = None;
        self.own = None;
        self.delivery = None;
    }

    /// Chooses the context that the following host calls are about; 0 is the callback's own. False: there is none of this number, or
    /// its stream is gone.
    pub(super) fn select(&mut self, context: u32) -> bool {
        if context == 0 || context == self.current {
            self.effective = self.current;
            self.root = self.contexts.get(self.current).map_or(self.root, |own| own.root);
            self.chosen = None;
            return true;
        }
        let Some(chosen) = self.contexts.get(context) else { return false };
        let view = chosen.view();
        if chosen.stream.is_some() && view.is_none() {
            return false;
        }
        self.effective = context;
        self.root = chosen.root;
        self.chosen = Some(view);
        true
    }
}

/// Why a host call does not return Ok: a status for the guest, or the end of the guest.
#[derive(Debug)]
pub(super) enum Fault {
    Status(Status),
    Trap(wasmtime::Error),
}

impl From<Status> for Fault {
    fn from(status: Status) -> Self {
        Self::Status(status)
    }
}

pub(super) type Call<T = ()> = Result<T, Fault>;

/// Of an instance that still starts: it is not known yet.
#[cold]
fn exported_memory(caller: &mut Caller<'_, Host>) -> Call<Memory> {
    let memory = caller.get_export("memory").and_then(wasmtime::Extern::into_memory);
    memory.ok_or(Fault::Status(Status::InvalidMemoryAccess))
}

/// The guest's memory and the host's data, side by side.
pub(super) fn split<'a>(caller: &'a mut Caller<'_, Host>) -> Call<(&'a mut [u8], &'a mut Host)> {
    let memory = match caller.data().memory {
        Some(memory) => memory,
        None => exported_memory(caller)?,
    };
    Ok(memory.data_and_store_mut(caller))
}

/// `len` bytes at `ptr`; no sum that could overflow.
pub(super) fn slice(memory: &[u8], ptr: u32, len: u32) -> Result<&[u8], Status> {
    let (Ok(ptr), Ok(len)) = (usize::try_from(ptr), usize::try_from(len)) else {
        return Err(Status::InvalidMemoryAccess);
    };
    memory.get(ptr..).and_then(|behind| behind.get(..len)).ok_or(Status::InvalidMemoryAccess)
}

/// Whether the guest has memory for a result there.
pub(super) fn check(caller: &mut Caller<'_, Host>, ptr: u32, len: u32) -> Call {
    let (memory, _) = split(caller)?;
    slice(memory, ptr, len)?;
    Ok(())
}

/// A copy of guest memory.
pub(super) fn read(caller: &mut Caller<'_, Host>, ptr: u32, len: u32) -> Call<Vec<u8>> {
    let (memory, _) = split(caller)?;
    Ok(slice(memory, ptr, len)?.to_vec())
}

/// Writes bytes at an address.
pub(super) fn write(caller: &mut Caller<'_, Host>, ptr: u32, bytes: &[u8]) -> Call {
    let (memory, _) = split(caller)?;
    Ok(put(memory, ptr, bytes)?)
}

fn put(memory: &mut [u8], ptr: u32, bytes: &[u8]) -> Result<(), Status> {
    let start = usize::try_from(ptr).map_err(|_| Status::InvalidMemoryAccess)?;
    let end = start.checked_add(bytes.len()).ok_or(Status::InvalidMemoryAccess)?;
    memory.get_mut(start..end).ok_or(Status::InvalidMemoryAccess)?.copy_from_slice(bytes);
    Ok(())
}

/// Writes a result word.
pub(super) fn write_u32(caller: &mut Caller<'_, Host>, ptr: u32, value: u32) -> Call {
    write(caller, ptr, &value.to_le_bytes())
}

/// Gives bytes to the guest: allocated by it, address and length stored at `out_ptr` and `out_len`. Nothing is allocated for
/// no bytes.
pub(super) fn give(caller: &mut Caller<'_, Host>, bytes: &[u8], out_ptr: u32, out_len: u32) -> Call {
    // Both result addresses first, so that a bad one does not leak the guest's memory.
    let (memory, _) = split(caller)?;
    put(memory, out_ptr, &[0; 4])?;
    put(memory, out_len, &[0; 4])?;
    if bytes.is_empty() {
        return Ok(());
    }
    let len = u32::try_from(bytes.len()).map_err(|_| Status::InternalFailure)?;
    let at = allocate(caller, len)?;
    let (memory, _) = split(caller)?;
    put(memory, at, bytes)?;
    put(memory, out_ptr, &at.to_le_bytes())?;
    Ok(put(memory, out_len, &len.to_le_bytes())?)
}

fn allocate(caller: &mut Caller<'_, Host>, len: u32) -> Call<u32> {
    let host = caller.data_mut();
    let allocator = host.allocator.ok_or(Status::InternalFailure)?;
    host.allocating = true;
    let at = allocator.call(&mut *caller, len);
    caller.data_mut().allocating = false;
    match at.map_err(Fault::Trap)? {
        0 => Err(Status::InvalidMemoryAccess.into()),
        at => Ok(at),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_are_checked_without_overflow() {
        let memory = [1, 2, 3];
        assert_eq!(slice(&memory, 1, 2), Ok(&[2, 3][..]));
        assert_eq!(slice(&memory, u32::MAX, u32::MAX), Err(Status::InvalidMemoryAccess));
        assert_eq!(slice(&memory, 3, 0), Ok(&[][..]));
        assert_eq!(slice(&memory, 4, 0), Err(Status::InvalidMemoryAccess));
    }
}
