//! A WASM filter's part in one exchange, and the instances of each worker.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::{Arc, Weak};
use std::time::Instant;

use http::{request, response};

use super::super::{Action, Filter, Plugin, Stream};
use super::instance::{Failure, Instance, Verdict};

/// Instances by plugin. The plugin is not kept alive by them: who uses it is what says whether they are still wanted.
type Instances = HashMap<u64, (Weak<Plugin>, Rc<Instance>)>;

thread_local! {
    static INSTANCES: RefCell<Instances> = RefCell::new(HashMap::new());
}

/// This worker's instance of a plugin, started if there is none; or why there is none.
fn acquire(plugin: &Arc<Plugin>) -> Result<Rc<Instance>, String> {
    let known = INSTANCES.with_borrow(|all| all.get(&plugin.id()).map(|(_, instance)| Rc::clone(instance)));
    if let Some(instance) = known.filter(|instance| !instance.dead()) {
        return Ok(instance);
    }
    plugin.may_start(Instant::now())?;
    let instance = plugin.start().map(Rc::new).map_err(|failure| {
        let message = failure.message.clone();
        plugin.failed(failure.message, failure.timeout);
        message
    })?;
    INSTANCES.with_borrow_mut(|all| {
        all.insert(plugin.id(), (Arc::downgrade(plugin), Rc::clone(&instance)));
    });
    // A new version most likely replaces an old one.
    release_unused();
    Ok(instance)
}

/// Starts the calling worker's instance of a plugin ahead of the first request. Failures are counted and reported as at a request.
pub fn warm(plugin: &Arc<Plugin>) {
    let _ = acquire(plugin);
}

/// Drops the calling worker's instances of filters that no snapshot and no exchange uses any more, and returns how many it
/// still has. Workers call it after a swap, and again while they have more than the snapshot names: what another worker or an
/// exchange held a moment ago is free soon.
pub fn release_unused() -> usize {
    let unused: Vec<_> = INSTANCES.with_borrow_mut(|all| {
        let ids: Vec<u64> =
            all.iter().filter(|(_, (plugin, _))| plugin.strong_count() == 0).map(|(id, _)| *id).collect();
        ids.into_iter().filter_map(|id| all.remove(&id)).collect()
    });
    // Outside the borrow: an instance's end runs guest code.
    drop(unused);
    INSTANCES.with_borrow(HashMap::len)
}

enum State {
    /// Not reached yet
    New,
    /// In an instance, as this context
    In(Rc<Instance>, u32),
    /// Without the filter from here on
    Out,
}

/// See [`Filter`].
pub(in super::super) struct WasmFilter {
    plugin: Arc<Plugin>,
    state: State,
    /// Something of the exchange was changed by this filter.
    changed: bool,
}

impl WasmFilter {
    pub(in super::super) fn new(plugin: Arc<Plugin>) -> Self {
        Self { plugin, state: State::New, changed: false }
    }

    fn enter(&mut self, stream: &mut Stream<'_>) -> Result<(Rc<Instance>, u32), String> {
        match &self.state {
            State::In(instance, context) if instance.dead() => {
                Err(format!("its instance ended under context {context}"))
            }
            State::In(instance, context) => Ok((Rc::clone(instance), *context)),
            State::Out => Err("it is not in this exchange".into()),
            State::New => {
                let instance = acquire(&self.plugin)?;
                let context = instance.create(stream).map_err(|failure| self.report(failure))?;
                self.state = State::In(Rc::clone(&instance), context);
                Ok((instance, context))
            }
        }
    }

    /// Counts and logs a failure of the guest; its message.
    fn report(&self, failure: Failure) -> String {
        self.plugin.failed(failure.message.clone(), failure.timeout);
        failure.message
    }

    /// What the exchange does without this filter.
    fn without(&mut self, reason: String) -> Action {
        self.state = State::Out;
        if self.plugin.fail_open() && !self.changed {
            return Action::Continue;
        }
        Action::Failed { filter: self.plugin.name().to_owned(), reason }
    }

    fn settle(&mut self, verdict: Verdict) -> Action {
        match verdict {
            Verdict::Act(action) => action,
            Verdict::Failed(failure, changed) => {
                self.changed |= changed;
                let reason = self.report(failure);
                self.without(reason)
            }
        }
    }
}

impl Filter for WasmFilter {
    fn request_headers(&mut self, head: &mut request::Parts, end_of_stream: bool, stream: &mut Stream<'_>) -> Action {
        match self.enter(stream) {
            Ok((instance, context)) => {
                let verdict = instance.request(context, head, end_of_stream, stream);
                self.settle(verdict)
            }
            Err(reason) => self.without(reason),
        }
    }

    fn response_headers(&mut self, head: &mut response::Parts, end_of_stream: bool, stream: &mut Stream<'_>) -> Action {
        if matches!(self.state, State::Out) {
            return Action::Continue;
        }
        match self.enter(stream) {
            Ok((instance, context)) => {
                let verdict = instance.response(context, head, end_of_stream, stream);
                self.settle(verdict)
            }
            Err(reason) => {
                // What the request part changed is upstream's business by now; the response is untouched.
                self.changed = false;
                self.without(reason)
            }
        }
    }

    fn log(&mut self, stream: &mut Stream<'_>) {
        let Ok((instance, context)) = self.enter(stream) else { return };
        if let Err(failure) = instance.log(context, stream) {
            self.report(failure);
        }
    }

    fn done(&mut self) {
        let State::In(instance, context) = std::mem::replace(&mut self.state, State::Out) else { return };
        if instance.dead() {
            return;
        }
        if let Err(failure) = instance.delete(context) {
            self.report(failure);
        }
    }

    fn keeps_request(&self) -> bool {
        self.plugin.keeps_heads()
    }

    fn keeps_response(&self) -> bool {
        self.plugin.keeps_heads()
    }
}
