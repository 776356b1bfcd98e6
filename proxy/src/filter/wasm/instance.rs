//! One instance of a module on one worker (a "VM"): start-up, its plugins (root contexts), callbacks within limits, and its end.

use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use wasmtime::{Instance as WasmInstance, InstancePre, Store, Trap, UpdateDeadline, WasmBacktrace};

use super::super::{Event, Flow, Next, View};
use super::callbacks::Callbacks;
use super::entry::Callback;
use super::host::{Context, Counters, End, Host, Phase, Root, Spec};
use super::outside::Tasks;
use super::ticker::{Ticker, Watch};

/// Start-up may take this many times a callback's time.
const START_FACTOR: u32 = 20;
const START_LEAST: Duration = Duration::from_millis(200);
/// Of a guest's backtrace: frames, and characters of a function's name.
const FRAMES: usize = 10;
const FRAME_NAME: usize = 80;

/// Why a guest's call ended early.
#[derive(Debug, Clone)]
pub(in super::super) struct Failure {
    pub(in super::super) message: String,
    pub(in super::super) timeout: bool,
}

/// What a stream context said to what came to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Said {
    Continue,
    Pause,
    /// The exchange is over, and the context with it
    Over,
}

impl From<Box<Failure>> for Failure {
    fn from(failure: Box<Self>) -> Self {
        *failure
    }
}

struct Inner {
    store: Store<Host>,
    callbacks: Rc<Callbacks>,
}

/// An instance. After its first failure it is dead: nothing of it runs again.
pub(in super::super) struct Instance {
    inner: RefCell<Inner>,
    dead: Cell<bool>,
    watch: Watch,
    me: Weak<Self>,
    /// What goes on for it outside of callbacks
    pub(super) tasks: RefCell<Tasks>,
}

fn start_limit(spec: &Spec) -> Duration {
    (spec.call_time * START_FACTOR).max(START_LEAST)
}

impl Instance {
    /// Instantiates and starts a module. An error is what a user reads; nothing is left behind.
    pub(super) fn start(
        pre: &InstancePre<Host>,
        ticker: &Arc<Ticker>,
        spec: &Arc<Spec>,
        counters: Arc<Counters>,
    ) -> Result<Rc<Self>, Failure> {
        let mut store = Store::new(pre.module().engine(), Host::new(Arc::clone(spec), counters));
        store.limiter(|host| &mut host.limiter);
        store.epoch_deadline_callback(|mut context| {
            let host = context.data_mut();
            if host.budget.spent() {
                host.timed_out = true;
                return Ok(UpdateDeadline::Interrupt);
            }
            Ok(UpdateDeadline::Continue(1))
        });
        let ending = || Failure { message: "the thread is ending".into(), timeout: false };
        let watch = Watch::of(ticker).ok_or_else(ending)?;
        let instance = guarded(&watch, &mut store, None, |store| {
            store.data_mut().budget.arm(start_limit(spec));
            let instance = pre.instantiate(&mut *store)?;
            adopt(store, &instance)?;
            run_start(store, &instance)?;
            Ok(instance)
        });
        let instance = match instance {
            Ok(instance) => instance,
            Err(failure) if store.data().limiter.refused => {
                return Err(Failure {
                    message: format!("{} (limits.memory is {} bytes)", failure.message, spec.memory),
                    timeout: false,
                });
            }
            Err(failure) => return Err(Failure { message: format!("start-up: {}", failure.message), ..*failure }),
        };
        let callbacks = Callbacks::of(&mut store, &instance)
            .map_err(|error| Failure { message: format!("{error:#}"), timeout: false })?;
        let inner = Inner { store, callbacks: Rc::new(callbacks) };
        Ok(Rc::new_cyclic(|me| Self {
            inner: RefCell::new(inner),
            dead: Cell::new(false),
            watch,
            me: Weak::clone(me),
            tasks: RefCell::default(),
        }))
    }

    /// True: it failed.
    pub(in super::super) fn dead(&self) -> bool {
        self.dead.get()
    }

    fn with<R>(&self, f: impl FnOnce(&mut Inner) -> Result<R, Box<Failure>>) -> Result<R, Box<Failure>> {
        let gone = |message: &str| Box::new(Failure { message: message.into(), timeout: false });
        if self.dead() {
            return Err(gone("its instance has ended"));
        }
        let mut inner = self.inner.try_borrow_mut().map_err(|_| gone("its instance was entered twice"))?;
        let result = f(&mut inner);
        if result.is_err() {
            self.die(&inner);
        }
        result
    }

    #[cold]
    fn die(&self, inner: &Inner) {
        self.dead.set(true);
        inner.store.data().inbox.close();
        // Those that wait for a resume would wait for ever.
        for context in inner.store.data().contexts.iter() {
            if let Some(stream) = context.stream.as_ref().and_then(|(stream, _)| stream.upgrade()) {
                stream.notify();
            }
        }
    }

    /// Runs a callback of a context of the plugin `root` under its limits; see [`Self::enter`].
    pub(super) fn call<R>(
        &self,
        context: u32,
        root: usize,
        phase: Phase,
        view: Option<View>,
        f: impl FnOnce(&mut Store<Host>, &Callbacks) -> wasmtime::Result<R>,
    ) -> Result<R, Box<Failure>> {
        self.enter(root, view, |store, callbacks| {
            store.data_mut().callback(context, root, phase);
            f(store, callbacks)
        })
    }

    /// Runs callbacks of the plugin `root`, each of them begun by [`Host::callback`]. Whatever the guest asks for of streams is left in them and
    /// done by their exchanges when this has returned.
    fn enter<R>(
        &self,
        root: usize,
        view: Option<View>,
        f: impl FnOnce(&mut Store<Host>, &Callbacks) -> wasmtime::Result<R>,
    ) -> Result<R, Box<Failure>> {
        let (result, orders) = self.with(|Inner { store, callbacks }| {
            store.data_mut().begin(view);
            let result = guarded(&self.watch, store, Some(root), |store| f(store, callbacks));
            let host = store.data_mut();
            host.end();
            result.map(|result| (result, !host.calls.orders.is_empty()))
        })?;
        if orders && let Some(me) = self.me.upgrade() {
            let orders = self.host(|host| std::mem::take(&mut host.calls.orders)).unwrap_or_default();
            self.tasks.borrow_mut().dispatch(&me, orders);
        }
        Ok(result)
    }

    /// The host's data, between callbacks.
    pub(super) fn host<R>(&self, f: impl FnOnce(&mut Host) -> R) -> Option<R> {
        let mut inner = self.inner.try_borrow_mut().ok()?;
        Some(f(inner.store.data_mut()))
    }

    /// Adds a plugin: a root context, created, started and configured. Its index.
    pub(super) fn add_root(&self, spec: &Arc<Spec>, counters: Arc<Counters>) -> Result<usize, Failure> {
        let (id, root) = self.with(|inner| {
            let host = inner.store.data_mut();
            let index = host.roots.iter().position(|root| root.id == 0).unwrap_or(host.roots.len());
            let id = host.contexts.add(Context { root: index, stream: None });
            let plugin = std::sync::Weak::new();
            let root = Root { id, spec: Arc::clone(spec), counters, end: End::No, plugin, listens: false };
            match host.roots.get_mut(index) {
                Some(free) => *free = root,
                None => host.roots.push(root),
            }
            Ok((id, index))
        })?;
        // Others may live in the same VM: nothing of a plugin that does not start stays in it.
        self.start_root(id, root, spec).inspect_err(|_| self.remove_root(id, root))?;
        Ok(root)
    }

    fn start_root(&self, id: u32, root: usize, spec: &Arc<Spec>) -> Result<(), Failure> {
        let size = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        type Step<'a> = &'a dyn Fn(&mut Store<Host>, &Callbacks) -> wasmtime::Result<bool>;
        let step = |name: &str, phase, f: Step<'_>| {
            let accepted = self.call(id, root, phase, None, |store, callbacks| {
                store.data_mut().budget.arm(start_limit(spec));
                f(store, callbacks)
            });
            match accepted {
                Ok(true) => Ok(()),
                Ok(false) => Err(Failure {
                    message: format!("{name} returned false: it refuses its configuration"),
                    timeout: false,
                }),
                Err(failure) => Err(Failure { message: format!("{name}: {}", failure.message), ..*failure }),
            }
        };
        let accepts = |callback: &Option<Callback<(u32, u32), u32>>, store: &mut Store<Host>, bytes: &[u8]| {
            callback.as_ref().map_or(Ok(true), |callback| Ok(callback.call(store, (id, size(bytes)))? != 0))
        };
        step("proxy_on_context_create", Phase::Root, &|store, callbacks| {
            callbacks.create.as_ref().map_or(Ok(()), |create| create.call(store, (id, 0))).map(|()| true)
        })?;
        step("proxy_on_vm_start", Phase::VmStart, &|store, callbacks| {
            accepts(&callbacks.vm_start, store, &spec.vm_configuration)
        })?;
        step("proxy_on_configure", Phase::Configure, &|store, callbacks| {
            accepts(&callbacks.configure, store, &spec.configuration)
        })
    }

    /// `on_done` of a plugin. False: it wants to go on until it calls `proxy_done`.
    pub(super) fn finish_root(&self, root: usize) -> Result<bool, Failure> {
        let Some(id) = self.root_id(root) else { return Ok(true) };
        let done = self.call(id, root, Phase::Done, None, |store, callbacks| match &callbacks.done {
            Some(done) => done.call(store, id).map(|done| done != 0),
            None => Ok(true),
        })?;
        if !done {
            self.host(|host| host.roots.get_mut(root).map(|root| root.end = End::PutOff));
        }
        Ok(done)
    }

    /// The plugin called `proxy_done`.
    pub(super) fn root_done(&self, root: usize) -> bool {
        let Ok(inner) = self.inner.try_borrow() else { return false };
        inner.store.data().roots.get(root).is_none_or(|root| root.end == End::Done)
    }

    /// `on_delete` of a plugin.
    pub(super) fn delete_root(&self, root: usize) -> Result<(), Failure> {
        let Some(id) = self.root_id(root) else { return Ok(()) };
        let result = self.call(id, root, Phase::Done, None, |store, callbacks| {
            callbacks.delete.as_ref().map_or(Ok(()), |delete| delete.call(store, id))
        });
        self.remove_root(id, root);
        Ok(result?)
    }

    fn remove_root(&self, id: u32, root: usize) {
        if let Ok(mut inner) = self.inner.try_borrow_mut() {
            let host = inner.store.data_mut();
            host.contexts.remove(id);
            if let Some(root) = host.roots.get_mut(root) {
                root.id = 0;
                root.spec.vm.unregister(&host.inbox, id);
            }
        }
        self.tasks.borrow_mut().forget(id);
    }

    fn root_id(&self, root: usize) -> Option<u32> {
        let inner = self.inner.try_borrow().ok()?;
        inner.store.data().roots.get(root).map(|root| root.id).filter(|id| *id != 0)
    }

    /// Something comes to a stream's context, and what follows while it goes on. Nothing happens where the guest has no callback for it. A stream
    /// that has no context yet gets one: its id is in the answer. `None`: it does not, as the plugin has used up its share of the worker's time.
    pub(super) fn on(
        &self,
        (context, root): (Option<u32>, usize),
        what: Option<(Flow, Event)>,
        view: &View,
    ) -> Result<Option<(u32, Said)>, Box<Failure>> {
        self.enter(root, Some(view.clone()), |store, callbacks| {
            let context = match context {
                Some(context) => context,
                None if store.data().meter(Some(root)).over() => return Ok(None),
                None => open(store, callbacks, root, view)?,
            };
            let said = match what {
                Some((flow, event)) => on(store, callbacks, (context, root), flow, event, view)?,
                None => Said::Continue,
            };
            Ok(Some((context, said)))
        })
    }

    /// `on_log`.
    pub(super) fn log(&self, (context, root): (u32, usize), view: &View) -> Result<(), Box<Failure>> {
        self.enter(root, Some(view.clone()), |store, callbacks| log(store, callbacks, (context, root)))
    }

    /// `on_done` and `on_delete` of a stream context. With `logs`, `on_log` as well: in front of them, of TCP between them.
    pub(super) fn end(&self, (context, root): (u32, usize), view: &View, logs: bool) -> Result<(), Box<Failure>> {
        self.enter(root, Some(view.clone()), |store, callbacks| {
            end(store, callbacks, (context, root), view.is_tcp(), logs)
        })
    }
}

/// Makes a stream's context.
fn open(store: &mut Store<Host>, callbacks: &Callbacks, root: usize, view: &View) -> wasmtime::Result<u32> {
    let host = store.data_mut();
    let stream = Some((Rc::downgrade(&view.stream), view.index));
    let context = host.contexts.add(Context { root, stream });
    let mut parent = 0;
    if let Some(root) = host.roots.get(root) {
        Counters::bump(&root.counters.requests, 1);
        parent = root.id;
    }
    host.callback(context, root, Phase::Stream);
    callbacks.create.as_ref().map_or(Ok(()), |create| create.call(store, (context, parent)))?;
    Ok(context)
}

fn on(
    store: &mut Store<Host>,
    callbacks: &Callbacks,
    (context, root): (u32, usize),
    flow: Flow,
    event: Event,
    view: &View,
) -> wasmtime::Result<Said> {
    let mut event = event;
    loop {
        if callbacks.call(store, (context, root), flow, event, view)? != 0 {
            return Ok(Said::Pause);
        }
        match view.follow(flow) {
            Some(Next::Event(next)) => event = next,
            Some(Next::Over) => return end(store, callbacks, (context, root), false, true).map(|()| Said::Over),
            None => return Ok(Said::Continue),
        }
    }
}

fn end(
    store: &mut Store<Host>,
    callbacks: &Callbacks,
    (context, root): (u32, usize),
    tcp: bool,
    logs: bool,
) -> wasmtime::Result<()> {
    if logs && !tcp {
        log(store, callbacks, (context, root))?;
    }
    if let Some(done) = &callbacks.done {
        store.data_mut().callback(context, root, Phase::Done);
        // A stream ends whatever the guest says.
        done.call(&mut *store, context)?;
    }
    if logs && tcp {
        log(store, callbacks, (context, root))?;
    }
    if let Some(delete) = &callbacks.delete {
        store.data_mut().callback(context, root, Phase::Done);
        delete.call(&mut *store, context)?;
    }
    store.data_mut().contexts.remove(context);
    Ok(())
}

fn log(store: &mut Store<Host>, callbacks: &Callbacks, (context, root): (u32, usize)) -> wasmtime::Result<()> {
    let Some(log) = &callbacks.log else { return Ok(()) };
    store.data_mut().callback(context, root, Phase::Log);
    log.call(store, context)
}

impl Drop for Instance {
    fn drop(&mut self) {
        let host = self.inner.get_mut().store.data();
        host.limiter.counters.memory.store(0, Ordering::Relaxed);
        host.inbox.close();
    }
}

/// Runs guest code under the ticker. Any trap, and any panic of a host function, is a failure.
fn guarded<R>(
    watch: &Watch,
    store: &mut Store<Host>,
    root: Option<usize>,
    f: impl FnOnce(&mut Store<Host>) -> wasmtime::Result<R>,
) -> Result<R, Box<Failure>> {
    let _in_call = watch.enter(store.data().meter(root));
    store.set_epoch_deadline(1);
    match catch_unwind(AssertUnwindSafe(|| f(store))) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(Box::new(explain(&error, store.data()))),
        Err(_) => {
            let message = "a host function panicked; this is a fault of the proxy".into();
            Err(Box::new(Failure { message, timeout: false }))
        }
    }
}

fn explain(error: &wasmtime::Error, host: &Host) -> Failure {
    let message = match error.downcast_ref::<Trap>() {
        Some(Trap::Interrupt) => format!("it ran longer than its limit of {:?} (limits.callTime)", host.budget.limit),
        Some(trap) => format!("it trapped: {trap}"),
        None => error.root_cause().to_string(),
    };
    let memory = if host.limiter.refused { "; it had been refused memory above limits.memory" } else { "" };
    Failure { message: format!("{message}{memory}{}", backtrace(error)), timeout: host.timed_out }
}

/// Where in the guest it happened, innermost first: `; in f+0x1a < g+0x2b`, each with the offset in the module.
fn backtrace(error: &wasmtime::Error) -> String {
    let Some(trace) = error.downcast_ref::<WasmBacktrace>() else { return String::new() };
    let frames = trace.frames().iter().take(FRAMES).map(|frame| {
        let name = match frame.func_name() {
            // The guest chose it.
            Some(name) => name.escape_debug().take(FRAME_NAME).collect(),
            None => format!("function {}", frame.func_index()),
        };
        format!("{name}+{:#x}", frame.module_offset().unwrap_or_default())
    });
    let frames: Vec<String> = frames.collect();
    if frames.is_empty() { String::new() } else { format!("; in {}", frames.join(" < ")) }
}

/// Caches what host functions need of the instance.
fn adopt(store: &mut Store<Host>, instance: &WasmInstance) -> wasmtime::Result<()> {
    let memory = instance.get_memory(&mut *store, "memory");
    let allocator = ["proxy_on_memory_allocate", "malloc"].into_iter().find_map(|name| {
        let function = instance.get_func(&mut *store, name)?;
        Callback::new(store, function).ok()
    });
    let host = store.data_mut();
    host.memory = memory;
    host.allocator = allocator;
    Ok(())
}

/// `_initialize` and then `main`, or `_start`: never both.
fn run_start(store: &mut Store<Host>, instance: &WasmInstance) -> wasmtime::Result<()> {
    let function = |store: &mut Store<Host>, name: &str| instance.get_typed_func::<(), ()>(store, name).ok();
    if let Some(initialize) = function(store, "_initialize") {
        initialize.call(&mut *store, ())?;
        if let Ok(main) = instance.get_typed_func::<(u32, u32), u32>(&mut *store, "main") {
            main.call(&mut *store, (0, 0))?;
        } else if let Ok(main) = instance.get_typed_func::<(), u32>(&mut *store, "__main_void") {
            main.call(&mut *store, ())?;
        }
    } else if let Some(start) = function(store, "_start") {
        start.call(&mut *store, ())?;
    }
    Ok(())
}
