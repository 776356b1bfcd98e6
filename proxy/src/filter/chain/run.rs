//! How a chain runs: what is decided at each filter, and what its answer does.
//!
//! What decides is of [`Data`], in which nothing can re-enter; what runs a filter is of [`Stream`], and lets go of the data meanwhile.

use std::cell::RefMut;
use std::rc::Rc;

use bytes::Bytes;
use http::{StatusCode, request, response};

use super::super::local::is_grpc;
use super::super::stream::{At, Data, REQUEST_PSEUDO, RESPONSE_PSEUDO, Slot, Touch, Waiter};
use super::super::way::{End, Way};
use super::super::{Action, Buffer, Event, Failed, Filter, Flow, LocalResponse, Next, Peer, RequestHead, Stream, View};
use super::Stop;

enum Step {
    Idle,
    Pass,
    Call(Event),
    TooLarge,
}

impl Stream {
    fn view(self: &Rc<Self>, index: usize) -> View {
        View { stream: Rc::clone(self), index }
    }

    /// What comes into a direction behind its head.
    pub(super) fn input(self: &Rc<Self>, flow: Flow, bytes: Bytes, end: bool, trailers: bool) {
        if self.data().take_in(flow, bytes, end, trailers) {
            self.run(flow);
        }
    }

    /// Runs a direction, and the other one if a callback asked for something there.
    pub(in super::super) fn run(self: &Rc<Self>, flow: Flow) {
        self.advance(flow);
        let mut flow = flow;
        while std::mem::take(&mut self.data().again) {
            flow = flow.other();
            self.advance(flow);
            // Another task may wait for what comes out of it.
            self.wake(flow.into());
        }
    }

    /// Does what was asked for from outside the filters' own callbacks.
    pub(in super::super) fn settle(self: &Rc<Self>) {
        if self.signal.replace(false) {
            self.look_for_losses();
            self.run(Flow::Request);
            self.run(Flow::Response);
        }
    }

    /// Moves everything of a direction as far as it goes.
    #[inline(never)] // Of both directions: fetched once.
    pub(super) fn advance(self: &Rc<Self>, flow: Flow) {
        let mut data = self.data();
        if !data.way(flow).begun {
            return;
        }
        let mut step = data.way(flow).first;
        while step < data.slots.len() && !data.halted(flow) && data.way(flow).first <= step {
            let index = data.index(flow, step);
            match data.decide(flow, step, index) {
                Step::Idle => {}
                Step::Pass => self.pass(&mut data, flow, step, index),
                Step::TooLarge => self.stop(&mut data, Stop::TooLarge(flow)),
                Step::Call(event) => {
                    let Some(mut filter) = data.lend(flow, index) else { return };
                    // Nothing is borrowed while a callback runs.
                    drop(data);
                    let action = filter.on(flow, event, &self.view(index));
                    data = self.data();
                    data.give_back(flow, index, filter);
                    if let Some(reply) = self.after(&mut data, flow, step, index, action) {
                        data = self.respond(data, index, *reply);
                    }
                }
            }
            if !data.more(flow, index) {
                step += 1;
            }
        }
    }

    /// What comes next to a filter whose callback let go what it was shown; see [`View::follow`].
    pub(in super::super) fn follow(&self, flow: Flow, index: usize) -> Option<Next> {
        if flow == Flow::Response { self.data().follow(index) } else { None }
    }

    /// Does what a callback said, and what it asked for while it ran. `Some`: it answered.
    fn after(
        &self,
        data: &mut Data,
        flow: Flow,
        step: usize,
        index: usize,
        action: Action,
    ) -> Option<Box<LocalResponse>> {
        let slot = data.slots.get_mut(index)?;
        if matches!(action, Action::Continue) && slot.wishes.none() {
            self.pass(data, flow, step, index);
            return None;
        }
        data.again |= slot.wishes.resume[flow.other() as usize];
        let resumed = std::mem::take(&mut slot.wishes.resume[flow as usize]);
        let (reply, reset) = (slot.wishes.reply.take(), std::mem::take(&mut slot.wishes.reset));
        match action {
            Action::Failed(failed) => self.stop(data, Stop::Failed(failed)),
            Action::Respond(reply) => return Some(reply),
            _ if reply.is_some() => return reply,
            Action::Reset => self.stop(data, Stop::Reset),
            _ if reset => self.stop(data, Stop::Reset),
            Action::Pause if !resumed => {
                let limit = slot.body_limit;
                let stage = slot.stage_mut(flow);
                stage.paused = true;
                if stage.at > At::Headers && stage.body.len() > limit {
                    self.stop(data, Stop::TooLarge(flow));
                }
            }
            Action::Continue | Action::Pause => self.pass(data, flow, step, index),
        }
        None
    }

    /// What a filter held goes on to the next one, or out.
    fn pass(&self, data: &mut Data, flow: Flow, step: usize, index: usize) {
        let slot = data.slots.get(index).filter(|slot| slot.edits[flow as usize].is_lacking());
        match slot.and_then(|slot| lacking(slot, flow)) {
            Some(failed) => self.stop(data, Stop::Failed(failed)),
            None => data.pass(flow, step, index),
        }
    }

    fn stop(&self, data: &mut Data, stop: Stop) {
        // What has gone out cannot be replaced; of TCP nothing is, and why it ends is what counts.
        let sent = data.way(Flow::Response).head_taken && !self.tcp;
        let stop = if sent && stop != Stop::Local { Stop::Reset } else { stop };
        data.way(Flow::Request).cut = true;
        if stop == Stop::Reset {
            data.way(Flow::Response).cut = true;
        }
        data.stop = Some(stop);
        for waiter in [Waiter::Request, Waiter::Response, Waiter::Stop] {
            self.wake(waiter);
        }
    }

    /// A filter answers.
    fn respond<'a>(
        self: &'a Rc<Self>,
        mut data: RefMut<'a, Data>,
        index: usize,
        reply: LocalResponse,
    ) -> RefMut<'a, Data> {
        if data.head_sent {
            self.stop(&mut data, Stop::Reset);
            return data;
        }
        if let Some(slot) = data.slots.get_mut(index) {
            // An answer to the request may still be replaced in its own response phase.
            slot.answered = slot.response.at != At::Waiting;
        }
        let (head, body) = reply.into_head(data.grpc);
        data.answer(index + 1, head, body);
        self.stop(&mut data, Stop::Local);
        drop(data);
        self.advance(Flow::Response);
        self.data()
    }

    fn take_filter(&self, index: usize) -> Option<Box<dyn Filter>> {
        self.data().slots.get_mut(index)?.filter.take()
    }

    /// Instances that ended, and wishes of paused filters.
    fn look_for_losses(self: &Rc<Self>) {
        let count = self.data().slots.len();
        for index in 0..count {
            let Some(mut filter) = self.take_filter(index) else { continue };
            let lost = filter.lost(&self.view(index));
            let mut data = self.data();
            if let Some(slot) = data.slots.get_mut(index) {
                slot.filter = Some(filter);
                if matches!(lost, Some(Action::Continue)) {
                    slot.wishes.resume = [true; 2];
                }
            }
            self.end_by(data, index, lost);
        }
    }

    /// Ends the exchange where a filter failed or asked for its end. What it lets go is left to a run.
    fn end_by<'a>(self: &'a Rc<Self>, mut data: RefMut<'a, Data>, index: usize, action: Option<Action>) {
        let Some(slot) = data.slots.get_mut(index) else { return };
        let (reply, reset) = (slot.wishes.reply.take(), std::mem::take(&mut slot.wishes.reset));
        match (action, reply) {
            (Some(Action::Failed(failed)), _) => self.stop(&mut data, Stop::Failed(failed)),
            (Some(Action::Respond(reply)), _) | (_, Some(reply)) => drop(self.respond(data, index, *reply)),
            (Some(Action::Reset), _) => self.stop(&mut data, Stop::Reset),
            _ if reset => self.stop(&mut data, Stop::Reset),
            _ => {}
        }
    }

    /// Tells every filter that a side is gone.
    pub(super) fn close(self: &Rc<Self>, flow: Flow, peer: Peer) {
        let count = self.data().slots.len();
        for index in 0..count {
            let Some(mut filter) = self.data().lend(flow, index) else { continue };
            let action = filter.on(flow, Event::Closed(peer), &self.view(index));
            let mut data = self.data();
            data.give_back(flow, index, filter);
            if let Some(slot) = data.slots.get_mut(index) {
                // Where it holds nothing there is nothing to let go, now or later.
                slot.wishes.resume[flow as usize] &= slot.stage(flow).paused;
            }
            self.end_by(data, index, Some(action));
        }
        // The client's end is told last: nothing goes on then.
        if flow == Flow::Response {
            self.data().again = true;
            self.run(flow);
        }
    }

    /// Every filter logs and is deleted, once.
    pub(super) fn finish(self: &Rc<Self>) {
        let count = {
            let mut data = self.data();
            if std::mem::replace(&mut data.finished, true) {
                return;
            }
            // A filter that was alone may have seen to it itself.
            if std::mem::replace(&mut data.logging, true) { 0 } else { data.slots.len() }
        };
        let alone = count == 1 && !self.tcp;
        for index in (0..count).filter(|_| !alone && !self.tcp) {
            if let Some(mut filter) = self.take_filter(index) {
                filter.log(&self.view(index));
                if let Some(slot) = self.data().slots.get_mut(index) {
                    slot.filter = Some(filter);
                }
            }
        }
        for index in 0..count {
            let Some(mut filter) = self.take_filter(index) else { continue };
            let view = self.view(index);
            if alone { filter.log_and_done(&view) } else { filter.done(&view) }
        }
        for way in &mut self.data().ways {
            way.cut = true;
        }
        self.wake(Waiter::Request);
    }
}

impl Data {
    pub(super) fn begin_request(&mut self, head: Rc<request::Parts>, end: bool) {
        self.grpc = is_grpc(&head.headers);
        *self.way(Flow::Request) = Way::begun(0, end);
        self.request = Some(head);
    }

    pub(super) fn take_request(&mut self) -> Option<(RequestHead, bool)> {
        let end = self.take_head(Flow::Request)?;
        let keeps = self.slots.iter().any(|slot| slot.interest.keeps_request);
        let head = if keeps { self.request.clone() } else { self.request.take() };
        Some((RequestHead::Shared(head?), end))
    }

    pub(super) fn let_go_response(&mut self) -> Option<bool> {
        let end = self.take_head(Flow::Response)?;
        self.head_sent = true;
        Some(end)
    }

    /// True: the head leaves the chain with this, and nothing follows it. `None`: not now.
    pub(super) fn take_head(&mut self, flow: Flow) -> Option<bool> {
        let filters = self.slots.len();
        let way = self.way(flow);
        way.head_out(filters).then(|| {
            way.head_taken = true;
            way.head_end
        })
    }

    /// A filter whose callback is about to run.
    fn lend(&mut self, flow: Flow, index: usize) -> Option<Box<dyn Filter>> {
        let slot = self.slots.get_mut(index)?;
        let filter = slot.filter.take()?;
        slot.stage_mut(flow).calling = true;
        Some(filter)
    }

    fn give_back(&mut self, flow: Flow, index: usize, filter: Box<dyn Filter>) {
        if let Some(slot) = self.slots.get_mut(index) {
            slot.filter = Some(filter);
            slot.stage_mut(flow).calling = false;
        }
    }

    fn halted(&mut self, flow: Flow) -> bool {
        self.way(flow).cut || matches!(self.stop, Some(Stop::Failed(_) | Stop::TooLarge(_) | Stop::Reset))
    }

    /// There is something behind what a filter was told last.
    fn more(&self, flow: Flow, index: usize) -> bool {
        let stage = self.slots.get(index).map(|slot| slot.stage(flow));
        stage.is_some_and(|stage| stage.at == At::Body && (stage.fresh || stage.trailers))
    }

    /// What a filter has to be told next.
    fn decide(&mut self, flow: Flow, step: usize, index: usize) -> Step {
        let way = self.way(flow);
        let (head_here, head_end) = (way.head_at == step, way.head_end);
        let Some(slot) = self.slots.get_mut(index) else { return Step::Idle };
        let (interest, limit) = (slot.interest, slot.body_limit);
        let resumed = slot.stage(flow).paused && std::mem::take(&mut slot.wishes.resume[flow as usize]);
        let stage = slot.stage_mut(flow);
        match stage.at {
            At::Waiting if head_here => {
                stage.at = At::Headers;
                Step::Call(Event::Headers { end: head_end })
            }
            At::Waiting | At::Done => Step::Idle,
            _ if resumed => Step::Pass,
            At::Headers | At::Trailers => Step::Idle,
            At::Body if stage.fresh => {
                stage.fresh = false;
                let body = if flow == Flow::Request { interest.request_body } else { interest.response_body };
                if !body {
                    return Step::Pass;
                }
                if stage.paused && stage.body.len() > limit {
                    return Step::TooLarge;
                }
                Step::Call(Event::Body { size: stage.body.len(), end: stage.ended })
            }
            At::Body if stage.trailers => {
                stage.at = At::Trailers;
                let trailers =
                    if flow == Flow::Request { interest.request_trailers } else { interest.response_trailers };
                if trailers { Step::Call(Event::Trailers) } else { Step::Pass }
            }
            At::Body => Step::Idle,
        }
    }

    /// Goes on with what came with a response's head, where the filter is the only one to hear of it and nothing else is to be done.
    fn follow(&mut self, index: usize) -> Option<Next> {
        let (flow, filters) = (Flow::Response, self.slots.len());
        let touch = self.touch?;
        let way = self.way(flow);
        let (step, rests, halted) = (way.first, way.has_rest(), way.cut || way.first + 1 != filters);
        let slot = self.slots.get(index)?;
        let asked = self.stop.is_some() || !slot.wishes.none() || slot.edits[flow as usize].is_lacking();
        if halted || asked || !slot.interest.response_body {
            return None;
        }
        if !rests {
            return self.conclude(touch);
        }
        let head = slot.response.at == At::Headers;
        // A filter may have said that there is no body.
        if head && self.response.as_ref()?.status == StatusCode::NOT_MODIFIED {
            return None;
        }
        self.pass(flow, step, index);
        if head {
            self.let_go_response()?;
        }
        while let Some((bytes, end)) = self.way(flow).take_rest() {
            self.push(flow, step, bytes, end, false);
            if let Step::Call(event) = self.decide(flow, step, index) {
                return Some(Next::Event(event));
            }
        }
        None
    }

    /// A filter that is alone has let go the end of a response: the exchange is over, if what comes out is one piece.
    fn conclude(&mut self, touch: Touch) -> Option<Next> {
        let (flow, trailers) = (Flow::Response, self.trailers_mut(Flow::Response).is_some());
        let waits = !self.way(flow).is_clear();
        let [slot] = self.slots.as_slice() else { return None };
        let stage = &slot.response;
        let more = stage.fresh || stage.trailers || trailers || (waits && !stage.body.is_empty());
        if stage.at != At::Body || !stage.ended || more {
            return None;
        }
        self.pass(flow, 0, 0);
        let length = self.way(flow).held_out();
        touch(self.response.as_mut()?, length);
        self.logging = true;
        Some(Next::Over)
    }

    fn pass(&mut self, flow: Flow, step: usize, index: usize) {
        let last = step + 1 >= self.slots.len();
        let Some(stage) = self.slots.get_mut(index).map(|slot| slot.stage_mut(flow)) else { return };
        stage.paused = false;
        if stage.at == At::Headers {
            let way = &mut self.ways[flow as usize];
            way.head_at = step + 1;
            stage.at = if way.head_end { At::Done } else { At::Body };
            if way.head_end && last {
                way.out_end = Some(End::Taken);
            }
            return;
        }
        let (bytes, ended) = (stage.body.take(), stage.ended);
        let through = ended || stage.at == At::Trailers;
        if through {
            stage.at = At::Done;
        }
        // Also those that the filter made itself at the end of a message without any.
        let trailers = through && self.trailers_mut(flow).is_some();
        if last {
            self.way(flow).put_out(bytes, through, trailers);
        } else {
            self.push(flow, step + 1, bytes, through && !trailers, trailers);
        }
    }

    /// What comes into a direction behind its head. False: no filter gets it.
    fn take_in(&mut self, flow: Flow, bytes: Bytes, end: bool, trailers: bool) -> bool {
        let filters = self.slots.len();
        let way = self.way(flow);
        if way.cut || way.out_end.is_some() {
            return false;
        }
        let first = way.first;
        if first >= filters {
            // No filter in this direction: what comes in goes out.
            way.put_out(bytes, end, trailers);
            return false;
        }
        self.push(flow, first, bytes, end, trailers);
        true
    }

    /// Gives something to the filter at a step.
    fn push(&mut self, flow: Flow, step: usize, bytes: Bytes, ended: bool, trailers: bool) {
        let index = self.index(flow, step);
        let Some(stage) = self.slots.get_mut(index).map(|slot| slot.stage_mut(flow)) else { return };
        stage.fresh |= !bytes.is_empty() || ended;
        stage.body.push(bytes);
        stage.ended |= ended;
        stage.trailers |= trailers;
    }

    /// A whole response from inside the filter `below - 1`, in place of whatever was on its way.
    pub(super) fn answer(&mut self, below: usize, head: response::Parts, body: Bytes) {
        let end = body.is_empty();
        self.begin_response(below, head, end);
        let first = self.way(Flow::Response).first;
        if first >= self.slots.len() {
            self.way(Flow::Response).put_out(body, true, false);
        } else if !end {
            self.push(Flow::Response, first, body, true, false);
        }
    }

    /// A response goes to the filters below an index that were reached and have not begun with one.
    pub(super) fn begin_response(&mut self, below: usize, head: response::Parts, end: bool) {
        let reached = self.slots.iter().take_while(|slot| slot.request.at != At::Waiting).count();
        let fresh = self.slots.iter().take_while(|slot| slot.response.at == At::Waiting).count();
        let below = below.min(reached).min(fresh);
        for slot in self.slots.iter_mut().skip(below) {
            slot.response.at = At::Done;
            slot.response.paused = false;
            slot.response.body = Buffer::default();
        }
        self.response = Some(head);
        *self.trailers_mut(Flow::Response) = None;
        let first = self.slots.len() - below;
        let way = self.way(Flow::Response);
        *way = Way::begun(first, end);
        way.out_end = (end && below == 0).then_some(End::Taken);
    }
}

/// A filter took away what the message cannot do without.
#[cold]
fn lacking(slot: &Slot, flow: Flow) -> Option<Box<Failed>> {
    let names = if flow == Flow::Request { REQUEST_PSEUDO } else { RESPONSE_PSEUDO };
    let lacking = slot.edits[flow as usize].lacking(names)?;
    let filter = slot.filter.as_ref().map_or_else(String::new, |filter| filter.name().to_owned());
    Some(Box::new(Failed { filter, reason: format!("it removed {lacking}") }))
}
