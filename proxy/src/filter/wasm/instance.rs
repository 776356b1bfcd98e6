//! One instance of a filter on one worker: start-up, callbacks within limits, and its end.

use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use http::{request, response};
use wasmtime::{Instance as WasmInstance, InstancePre, Store, Trap, TypedFunc, UpdateDeadline};

use super::super::{Action, Stream};
use super::calls::lacking;
use super::headers;
use super::host::{Counters, Effects, Host, Phase, Spec, empty_request, empty_response};
use super::ticker::{InCall, Ticker};

/// Start-up may take this many times a callback's time.
const START_FACTOR: u32 = 20;
const START_LEAST: Duration = Duration::from_millis(200);

/// Why a guest's call ended early.
#[derive(Debug)]
pub(in super::super) struct Failure {
    pub(in super::super) message: String,
    pub(in super::super) timeout: bool,
}

type Words1 = TypedFunc<u32, ()>;

enum OnHeaders {
    Old(TypedFunc<(u32, u32), u32>),
    New(TypedFunc<(u32, u32, u32), u32>),
}

impl OnHeaders {
    fn call(&self, store: &mut Store<Host>, context: u32, count: u32, end: bool) -> wasmtime::Result<u32> {
        match self {
            Self::Old(function) => function.call(store, (context, count)),
            Self::New(function) => function.call(store, (context, count, u32::from(end))),
        }
    }
}

/// The guest's callbacks, looked up once.
struct Callbacks {
    create: Option<TypedFunc<(u32, u32), ()>>,
    vm_start: Option<TypedFunc<(u32, u32), u32>>,
    configure: Option<TypedFunc<(u32, u32), u32>>,
    request: Option<OnHeaders>,
    response: Option<OnHeaders>,
    done: Option<TypedFunc<u32, u32>>,
    log: Option<Words1>,
    delete: Option<Words1>,
}

struct Inner {
    store: Store<Host>,
    callbacks: Callbacks,
    next: u32,
}

/// An instance. After its first failure it is dead: nothing of it runs again.
pub(in super::super) struct Instance {
    inner: RefCell<Inner>,
    dead: Cell<bool>,
    ticker: Arc<Ticker>,
}

/// What a header callback says, before the filter's policy.
pub(super) enum Verdict {
    Act(Action),
    /// The guest failed; whether the head had been changed by it
    Failed(Failure, bool),
}

impl Instance {
    /// Instantiates, starts and configures. An error is what a user reads; nothing is left behind.
    pub(super) fn start(
        pre: &InstancePre<Host>,
        ticker: &Arc<Ticker>,
        spec: &Arc<Spec>,
        counters: Arc<Counters>,
    ) -> Result<Self, Failure> {
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
        let limit = (spec.call_time * START_FACTOR).max(START_LEAST);
        let instance = guarded(ticker, &mut store, |store| {
            store.data_mut().budget.arm(limit);
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
            Err(failure) => return Err(Failure { message: format!("start-up: {}", failure.message), ..failure }),
        };
        let callbacks = callbacks(&mut store, &instance)
            .map_err(|error| Failure { message: format!("{error:#}"), timeout: false })?;
        let mut inner = Inner { store, callbacks, next: 2 };
        configure(ticker, &mut inner, spec, limit)?;
        Ok(Self { inner: RefCell::new(inner), dead: Cell::new(false), ticker: Arc::clone(ticker) })
    }

    /// True: it failed.
    pub(super) fn dead(&self) -> bool {
        self.dead.get()
    }

    fn with<R>(&self, f: impl FnOnce(&mut Inner) -> Result<R, Failure>) -> Result<R, Failure> {
        let gone = |message: &str| Failure { message: message.into(), timeout: false };
        if self.dead() {
            return Err(gone("its instance has ended"));
        }
        let mut inner = self.inner.try_borrow_mut().map_err(|_| gone("its instance was entered twice"))?;
        let result = f(&mut inner);
        if result.is_err() {
            self.dead.set(true);
        }
        result
    }

    /// Makes a stream context; its id.
    pub(super) fn create(&self, stream: &mut Stream<'_>) -> Result<u32, Failure> {
        self.with(|inner| {
            let context = inner.next;
            // Wraps after four billion streams of one instance; 0 and the root's 1 are never given out.
            inner.next = inner.next.checked_add(1).unwrap_or(2);
            let Inner { store, callbacks, .. } = inner;
            let host = store.data_mut();
            Counters::bump(&host.counters.requests, 1);
            host.contexts.insert(context);
            lend(host, stream);
            let result = guarded(&self.ticker, store, |store| {
                store.data_mut().begin(context, Phase::Done);
                callbacks.create.as_ref().map_or(Ok(()), |create| create.call(store, (context, 1)))
            });
            take_back(store.data_mut(), stream);
            result.map(|()| context)
        })
    }

    /// `on_request_headers`.
    pub(super) fn request(
        &self,
        context: u32,
        head: &mut request::Parts,
        end: bool,
        stream: &mut Stream<'_>,
    ) -> Verdict {
        let mut changed = false;
        let result = self.with(|inner| {
            let Inner { store, callbacks, .. } = inner;
            let Some(callback) = &callbacks.request else { return Ok(Action::Continue) };
            lend(store.data_mut(), stream);
            store.data_mut().request = std::mem::replace(head, empty_request());
            let count = u32::try_from(headers::count(&store.data().request)).unwrap_or(u32::MAX);
            let result = guarded(&self.ticker, store, |store| {
                store.data_mut().begin(context, Phase::Request);
                callback.call(store, context, count, end)
            });
            let host = store.data_mut();
            *head = std::mem::replace(&mut host.request, empty_request());
            let lacking = lacking::<request::Parts>(host);
            let effects = take_back(host, stream);
            changed = effects.modified;
            result.map(|returned| decide(effects, returned, lacking, &host.spec.name))
        });
        result.map_or_else(|failure| Verdict::Failed(failure, changed), Verdict::Act)
    }

    /// `on_response_headers`.
    pub(super) fn response(
        &self,
        context: u32,
        head: &mut response::Parts,
        end: bool,
        stream: &mut Stream<'_>,
    ) -> Verdict {
        let mut changed = false;
        let result = self.with(|inner| {
            let Inner { store, callbacks, .. } = inner;
            let Some(callback) = &callbacks.response else { return Ok(Action::Continue) };
            lend(store.data_mut(), stream);
            store.data_mut().response = std::mem::replace(head, empty_response());
            let count = u32::try_from(headers::count(&store.data().response)).unwrap_or(u32::MAX);
            let result = guarded(&self.ticker, store, |store| {
                store.data_mut().begin(context, Phase::Response);
                callback.call(store, context, count, end)
            });
            let host = store.data_mut();
            *head = std::mem::replace(&mut host.response, empty_response());
            let lacking = lacking::<response::Parts>(host);
            let effects = take_back(host, stream);
            changed = effects.modified;
            result.map(|returned| decide(effects, returned, lacking, &host.spec.name))
        });
        result.map_or_else(|failure| Verdict::Failed(failure, changed), Verdict::Act)
    }

    /// `on_log`.
    pub(super) fn log(&self, context: u32, stream: &mut Stream<'_>) -> Result<(), Failure> {
        self.with(|inner| {
            let Inner { store, callbacks, .. } = inner;
            let Some(log) = &callbacks.log else { return Ok(()) };
            lend(store.data_mut(), stream);
            let result = guarded(&self.ticker, store, |store| {
                store.data_mut().begin(context, Phase::Log);
                log.call(store, context)
            });
            take_back(store.data_mut(), stream);
            result
        })
    }

    /// `on_done`, `on_delete`.
    pub(super) fn delete(&self, context: u32) -> Result<(), Failure> {
        self.with(|inner| {
            let Inner { store, callbacks, .. } = inner;
            let result = guarded(&self.ticker, store, |store| {
                if let Some(done) = &callbacks.done {
                    store.data_mut().begin(context, Phase::Done);
                    done.call(&mut *store, context)?;
                }
                if let Some(delete) = &callbacks.delete {
                    store.data_mut().begin(context, Phase::Done);
                    delete.call(&mut *store, context)?;
                }
                Ok(())
            });
            store.data_mut().contexts.remove(&context);
            result
        })
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        if !self.dead() {
            // The root context ends with the instance; what it says about that changes nothing.
            let _ = self.delete(1);
        }
        self.inner.get_mut().store.data().counters.memory.store(0, std::sync::atomic::Ordering::Relaxed);
    }
}

/// Gives the host what the callback may read and write beside the head.
fn lend(host: &mut Host, stream: &mut Stream<'_>) {
    host.info = Some(Rc::clone(stream.info));
    host.heads = Some(Rc::clone(stream.heads));
    host.state = std::mem::take(stream.state);
    host.effects = Effects::default();
}

fn take_back(host: &mut Host, stream: &mut Stream<'_>) -> Effects {
    host.info = None;
    host.heads = None;
    *stream.state = std::mem::take(&mut host.state);
    std::mem::take(&mut host.effects)
}

/// A local response wins over everything, then a reset; a pause that nothing can end is a failure.
fn decide(effects: Effects, returned: u32, lacking: Option<&'static str>, filter: &str) -> Action {
    let failed = |reason: String| Action::Failed { filter: filter.to_owned(), reason };
    match effects {
        Effects { reply: Some(reply), .. } => Action::Respond(reply),
        Effects { reset: true, .. } => Action::Reset,
        _ if lacking.is_some() => failed(format!("it removed {}", lacking.unwrap_or_default())),
        Effects { resumed: false, .. } if returned != 0 => {
            failed("it paused the exchange with nothing pending that could resume it".into())
        }
        _ => Action::Continue,
    }
}

/// Runs guest code under the ticker. Any trap, and any panic of a host function, is a failure.
fn guarded<R>(
    ticker: &Arc<Ticker>,
    store: &mut Store<Host>,
    f: impl FnOnce(&mut Store<Host>) -> wasmtime::Result<R>,
) -> Result<R, Failure> {
    let Some(_in_call) = InCall::enter(ticker) else {
        return Err(Failure { message: "the thread is ending".into(), timeout: false });
    };
    store.set_epoch_deadline(1);
    let result = catch_unwind(AssertUnwindSafe(|| f(store)));
    match result {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(explain(&error, store.data())),
        Err(_) => {
            Err(Failure { message: "a host function panicked; this is a fault of the proxy".into(), timeout: false })
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
    Failure { message: format!("{message}{memory}"), timeout: host.timed_out }
}

/// Caches what host functions need of the instance.
fn adopt(store: &mut Store<Host>, instance: &WasmInstance) -> wasmtime::Result<()> {
    let memory = instance.get_memory(&mut *store, "memory");
    let allocator = ["proxy_on_memory_allocate", "malloc"]
        .into_iter()
        .find_map(|name| instance.get_typed_func::<u32, u32>(&mut *store, name).ok());
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

fn callbacks(store: &mut Store<Host>, instance: &WasmInstance) -> wasmtime::Result<Callbacks> {
    fn find<P: wasmtime::WasmParams, R: wasmtime::WasmResults>(
        store: &mut Store<Host>,
        instance: &WasmInstance,
        name: &str,
    ) -> wasmtime::Result<Option<TypedFunc<P, R>>> {
        if instance.get_func(&mut *store, name).is_none() {
            return Ok(None);
        }
        instance.get_typed_func(store, name).map(Some)
    }
    let headers = |store: &mut Store<Host>, name: &str| -> wasmtime::Result<Option<OnHeaders>> {
        if let Ok(new) = find(&mut *store, instance, name) {
            return Ok(new.map(OnHeaders::New));
        }
        Ok(find(store, instance, name)?.map(OnHeaders::Old))
    };
    Ok(Callbacks {
        request: headers(store, "proxy_on_request_headers")?,
        response: headers(store, "proxy_on_response_headers")?,
        create: find(store, instance, "proxy_on_context_create")?,
        vm_start: find(store, instance, "proxy_on_vm_start")?,
        configure: find(store, instance, "proxy_on_configure")?,
        done: find(store, instance, "proxy_on_done")?,
        log: find(store, instance, "proxy_on_log")?,
        delete: find(store, instance, "proxy_on_delete")?,
    })
}

/// The root context: created, started, configured.
fn configure(ticker: &Arc<Ticker>, inner: &mut Inner, spec: &Arc<Spec>, limit: Duration) -> Result<(), Failure> {
    let Inner { store, callbacks, .. } = inner;
    store.data_mut().contexts.insert(1);
    let size = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    let mut step = |name: &str, phase, f: &mut dyn FnMut(&mut Store<Host>) -> wasmtime::Result<bool>| {
        let accepted = guarded(ticker, store, |store| {
            store.data_mut().begin(1, phase);
            store.data_mut().budget.arm(limit);
            f(store)
        });
        match accepted {
            Ok(true) => Ok(()),
            Ok(false) => {
                Err(Failure { message: format!("{name} returned false: it refuses its configuration"), timeout: false })
            }
            Err(failure) => Err(Failure { message: format!("{name}: {}", failure.message), ..failure }),
        }
    };
    step("proxy_on_context_create", Phase::Root, &mut |store| {
        callbacks.create.as_ref().map_or(Ok(()), |create| create.call(store, (1, 0))).map(|()| true)
    })?;
    step("proxy_on_vm_start", Phase::VmStart, &mut |store| {
        let call = |start: &TypedFunc<_, _>| start.call(store, (1, size(&spec.vm_configuration)));
        callbacks.vm_start.as_ref().map_or(Ok(1), call).map(|accepted: u32| accepted != 0)
    })?;
    step("proxy_on_configure", Phase::Configure, &mut |store| {
        let call = |configure: &TypedFunc<_, _>| configure.call(store, (1, size(&spec.configuration)));
        callbacks.configure.as_ref().map_or(Ok(1), call).map(|accepted: u32| accepted != 0)
    })
}
