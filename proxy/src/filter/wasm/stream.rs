//! A WASM filter's part in one exchange.

use std::sync::Arc;

use super::super::{Action, Event, Failed, Filter, Flow, Interest, Plugin, View};
use super::instance::{Failure, Said};
use super::instances::{Entered, acquire};

enum State {
    /// Not reached yet
    New,
    /// In an instance, as this context, once it has one
    In(Entered, Option<u32>),
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

    /// Tells the filter's context what comes to it. It is made when it is first needed: then, or at its end.
    fn tell(&mut self, what: Option<(Flow, Event)>, view: &View) -> Result<Said, String> {
        if let State::New = self.state {
            self.state = State::In(acquire(&self.plugin)?, None);
        }
        let State::In(entered, context) = &mut self.state else { return Ok(Said::Continue) };
        if entered.instance.dead() {
            return Err("its instance ended under the exchange".into());
        }
        match entered.instance.on((*context, entered.root), what, view) {
            Ok(Some((id, said))) => {
                *context = Some(id);
                Ok(said)
            }
            Ok(None) => {
                self.plugin.throttled();
                Err("it has used up its share of the worker's time (limits.cpuShare)".into())
            }
            Err(failure) => Err(self.report(*failure)),
        }
    }

    /// The context of a filter at its end, also of one that the exchange never reached. `None`: it is not to be had, or has ended.
    fn end(&mut self, view: &View) -> Option<(&Entered, u32)> {
        if matches!(self.state, State::New) && self.tell(None, view).is_err() {
            self.state = State::Out;
        }
        match &self.state {
            State::In(entered, Some(context)) if !entered.instance.dead() => Some((entered, *context)),
            State::In(..) | State::New | State::Out => None,
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
        Action::Failed(Box::new(Failed { filter: self.plugin.name().to_owned(), reason }))
    }

    fn over(&mut self, view: &View, log: bool) {
        let Some((entered, context)) = self.end(view) else { return };
        let result = entered.instance.end((context, entered.root), view, log);
        self.state = State::Out;
        if let Err(failure) = result {
            self.report(*failure);
        }
    }
}

impl Filter for WasmFilter {
    fn on(&mut self, flow: Flow, event: Event, view: &View) -> Action {
        match self.tell(Some((flow, event)), view) {
            Ok(Said::Continue) => return Action::Continue,
            Ok(Said::Pause) => return Action::Pause,
            // It said everything, and failed only in its log or its end.
            Err(_) if view.is_over() => {}
            Err(reason) => return self.without(view, reason),
            Ok(Said::Over) => {}
        }
        self.state = State::Out;
        Action::Continue
    }

    fn log(&mut self, view: &View) {
        let Some((entered, context)) = self.end(view) else { return };
        if let Err(failure) = entered.instance.log((context, entered.root), view) {
            self.report(*failure);
        }
    }

    fn done(&mut self, view: &View) {
        // Of TCP nothing has logged yet.
        self.over(view, view.is_tcp());
    }

    fn log_and_done(&mut self, view: &View) {
        self.over(view, true);
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
