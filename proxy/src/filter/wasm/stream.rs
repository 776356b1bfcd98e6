//! A WASM filter's part in one exchange.

use std::sync::Arc;

use super::super::{Action, Event, Failed, Filter, Flow, Interest, Plugin, View};
use super::instance::Failure;
use super::instances::{Entered, acquire};

enum State {
    /// Not reached yet
    New,
    /// In an instance, as this context
    In(Entered, u32),
    /// Without the filter from here on
    Out,
}

/// See [`Filter`].
pub(in super::super) struct WasmFilter {
    plugin: Arc<Plugin>,
    state: State,
}

impl WasmFilter {
    pub(in super::super) fn new(plugin: Arc<Plugin>) -> Self {
        Self { plugin, state: State::New }
    }

    /// The filter's context, made when it is first needed.
    fn enter(&mut self, view: &View) -> Result<(&Entered, u32), String> {
        if matches!(self.state, State::New) {
            let entered = acquire(&self.plugin)?;
            if entered.instance.over(entered.root) {
                self.plugin.throttled();
                return Err("it has used up its share of the worker's time (limits.cpuShare)".into());
            }
            let context = entered.instance.create(entered.root, view).map_err(|failure| self.report(failure))?;
            self.state = State::In(entered, context);
        }
        match &self.state {
            State::In(entered, _) if entered.instance.dead() => Err("its instance ended under the exchange".into()),
            State::In(entered, context) => Ok((entered, *context)),
            State::New | State::Out => Err("it is not in this exchange".into()),
        }
    }

    /// Counts and logs a failure of the guest; its message.
    fn report(&self, failure: Failure) -> String {
        self.plugin.failed(failure.message.clone(), failure.timeout);
        failure.message
    }

    /// What the exchange does without this filter, which has just failed, or could not start.
    fn without(&mut self, view: &View, reason: String) -> Action {
        self.state = State::Out;
        if self.plugin.fail_open() && !view.touched() { Action::Continue } else { self.closed(reason) }
    }

    fn closed(&self, reason: String) -> Action {
        Action::Failed(Failed { filter: self.plugin.name().to_owned(), reason })
    }
}

impl Filter for WasmFilter {
    fn on(&mut self, flow: Flow, event: Event, view: &View) -> Action {
        if matches!(self.state, State::Out) {
            return Action::Continue;
        }
        let tcp = view.is_tcp();
        let (entered, context) = match self.enter(view) {
            Ok(entered) => entered,
            Err(reason) => return self.without(view, reason),
        };
        if !entered.instance.has(flow, event, tcp) {
            return Action::Continue;
        }
        match entered.instance.on((context, entered.root), flow, event, view) {
            Ok(false) => Action::Continue,
            Ok(true) => Action::Pause,
            Err(failure) => {
                let reason = self.report(failure);
                self.without(view, reason)
            }
        }
    }

    fn log(&mut self, view: &View) {
        let Ok((entered, context)) = self.enter(view) else { return };
        if let Err(failure) = entered.instance.log((context, entered.root), view) {
            self.report(failure);
        }
    }

    fn done(&mut self, view: &View) {
        if matches!(self.state, State::New) && self.enter(view).is_err() {
            return;
        }
        let State::In(entered, context) = std::mem::replace(&mut self.state, State::Out) else { return };
        if entered.instance.dead() {
            return;
        }
        if let Err(failure) = entered.instance.end((context, entered.root), view) {
            self.report(failure);
        }
    }

    fn name(&self) -> &str {
        self.plugin.name()
    }

    fn interest(&self) -> Interest {
        self.plugin.interest()
    }

    fn body_limit(&self) -> usize {
        self.plugin.body_limit()
    }

    fn lost(&mut self, _view: &View) -> Option<Action> {
        let State::In(entered, _) = &self.state else { return None };
        if !entered.instance.dead() {
            return None;
        }
        self.state = State::Out;
        // Another stream's fault: nothing says that what this filter did here was wrong.
        let reason = "its instance ended in another exchange".to_owned();
        Some(if self.plugin.fail_open() { Action::Continue } else { self.closed(reason) })
    }
}
