//! How a chain runs: what is decided at each filter, and what its answer does.

use std::rc::Rc;

use bytes::Bytes;
use http::response;

use super::super::stream::{At, Slot, Waiter};
use super::super::{Action, Buffer, Event, Failed, Flow, LocalResponse, Peer, View};
use super::{Direction, End, Inner, Stop};

enum Next {
    Idle,
    Pass,
    Call(Event),
    TooLarge,
}

impl Inner {
    pub(super) fn index(&self, flow: Flow, step: usize) -> usize {
        match flow {
            Flow::Request => step,
            Flow::Response => self.count.saturating_sub(step + 1),
        }
    }

    pub(super) fn view(&self, index: usize) -> View {
        View { stream: Rc::clone(&self.stream), index }
    }

    pub(super) fn take_head(&self, flow: Flow) -> Option<bool> {
        let mut state = self.state.borrow_mut();
        let direction = state.of(flow);
        let out = direction.begun && !direction.cut && direction.head_at >= self.count && !direction.head_taken;
        out.then(|| {
            direction.head_taken = true;
            direction.head_end
        })
    }

    pub(super) fn input(&self, flow: Flow, f: impl FnOnce(&mut Slot)) {
        let first = {
            let mut state = self.state.borrow_mut();
            let direction = state.of(flow);
            if direction.cut || direction.out_end.is_some() {
                return;
            }
            direction.first
        };
        if first >= self.count {
            // No filter in this direction: what comes in goes out.
            self.around(flow, f);
            return;
        }
        if let Some(slot) = self.stream.data().slots.get_mut(self.index(flow, first)) {
            f(slot);
        }
        self.run(flow);
    }

    pub(super) fn around(&self, flow: Flow, f: impl FnOnce(&mut Slot)) {
        let mut slot = Slot::none();
        f(&mut slot);
        let stage = slot.stage_mut(flow);
        let (bytes, ended, trailers) = (stage.body.take(), stage.ended, stage.trailers);
        self.put_out(flow, bytes, ended, trailers);
    }

    pub(super) fn put_out(&self, flow: Flow, bytes: Bytes, ended: bool, trailers: bool) {
        let mut state = self.state.borrow_mut();
        let direction = state.of(flow);
        direction.held_out += bytes.len();
        direction.out.push(bytes);
        if trailers {
            direction.out_end = Some(End::Trailers);
        } else if ended {
            direction.out_end = Some(End::Plain);
        }
    }

    /// Runs a direction, and the other one if a callback asked for something there.
    pub(super) fn run(&self, flow: Flow) {
        self.advance(flow);
        let mut flow = flow;
        while std::mem::take(&mut self.state.borrow_mut().again) {
            flow = flow.other();
            self.advance(flow);
            // Another task may wait for what comes out of it.
            self.stream.wake(flow.into());
        }
    }

    pub(super) fn halted(&self, flow: Flow) -> bool {
        let mut state = self.state.borrow_mut();
        state.of(flow).cut || matches!(state.stop, Some(Stop::Failed(_) | Stop::TooLarge(_) | Stop::Reset))
    }

    /// Moves everything of a direction as far as it goes.
    pub(super) fn advance(&self, flow: Flow) {
        let first = {
            let mut state = self.state.borrow_mut();
            let direction = state.of(flow);
            if !direction.begun {
                return;
            }
            direction.first
        };
        for step in first..self.count {
            loop {
                if self.halted(flow) || self.state.borrow_mut().of(flow).first > step {
                    return;
                }
                let index = self.index(flow, step);
                match self.decide(flow, step, index) {
                    Next::Idle => break,
                    Next::Pass => self.pass(flow, step, index),
                    Next::TooLarge => self.stop(Stop::TooLarge(flow)),
                    Next::Call(event) => {
                        let action = self.call(index, flow, event);
                        self.after(flow, step, index, action);
                    }
                }
                if !self.more(flow, index) {
                    break;
                }
            }
        }
    }

    /// There is something behind what a filter was told last.
    fn more(&self, flow: Flow, index: usize) -> bool {
        let data = self.stream.data();
        let stage = data.slots.get(index).map(|slot| slot.stage(flow));
        stage.is_some_and(|stage| stage.at == At::Body && (stage.fresh || stage.trailers))
    }

    /// What a filter has to be told next.
    fn decide(&self, flow: Flow, step: usize, index: usize) -> Next {
        let (head_here, head_end) = {
            let mut state = self.state.borrow_mut();
            let direction = state.of(flow);
            (direction.head_at == step, direction.head_end)
        };
        let mut data = self.stream.data();
        let Some(slot) = data.slots.get_mut(index) else { return Next::Idle };
        let (interest, limit) = (slot.interest, slot.body_limit);
        let resumed = slot.stage(flow).paused && std::mem::take(&mut slot.wishes.resume[flow as usize]);
        let stage = slot.stage_mut(flow);
        match stage.at {
            At::Waiting if head_here => {
                stage.at = At::Headers;
                Next::Call(Event::Headers { end: head_end })
            }
            At::Waiting | At::Done => Next::Idle,
            _ if resumed => Next::Pass,
            At::Headers | At::Trailers => Next::Idle,
            At::Body if stage.fresh => {
                stage.fresh = false;
                let body = if flow == Flow::Request { interest.request_body } else { interest.response_body };
                if !body {
                    return Next::Pass;
                }
                if stage.paused && stage.body.len() > limit {
                    return Next::TooLarge;
                }
                Next::Call(Event::Body { size: stage.body.len(), end: stage.ended })
            }
            At::Body if stage.trailers => {
                stage.at = At::Trailers;
                let trailers =
                    if flow == Flow::Request { interest.request_trailers } else { interest.response_trailers };
                if trailers { Next::Call(Event::Trailers) } else { Next::Pass }
            }
            At::Body => Next::Idle,
        }
    }

    /// Runs a callback. Nothing is borrowed meanwhile.
    pub(super) fn call(&self, index: usize, flow: Flow, event: Event) -> Action {
        let filter = {
            let mut data = self.stream.data();
            let Some(slot) = data.slots.get_mut(index) else { return Action::Continue };
            slot.stage_mut(flow).calling = true;
            slot.filter.take()
        };
        let Some(mut filter) = filter else { return Action::Continue };
        let action = filter.on(flow, event, &self.view(index));
        let mut data = self.stream.data();
        if let Some(slot) = data.slots.get_mut(index) {
            slot.filter = Some(filter);
            slot.stage_mut(flow).calling = false;
        }
        action
    }

    /// Does what a callback said, and what it asked for while it ran.
    pub(super) fn after(&self, flow: Flow, step: usize, index: usize, action: Action) {
        let (reply, reset, resumed, limit) = {
            let mut data = self.stream.data();
            let Some(slot) = data.slots.get_mut(index) else { return };
            if slot.wishes.resume[flow.other() as usize] {
                self.state.borrow_mut().again = true;
            }
            let resumed = std::mem::take(&mut slot.wishes.resume[flow as usize]);
            (slot.wishes.reply.take(), std::mem::take(&mut slot.wishes.reset), resumed, slot.body_limit)
        };
        match action {
            Action::Failed(failed) => self.fail(failed),
            Action::Respond(reply) => self.respond(index, *reply),
            _ if reply.is_some() => {
                if let Some(reply) = reply {
                    self.respond(index, *reply);
                }
            }
            Action::Reset => self.stop(Stop::Reset),
            _ if reset => self.stop(Stop::Reset),
            Action::Pause if !resumed => {
                let mut data = self.stream.data();
                let Some(slot) = data.slots.get_mut(index) else { return };
                let stage = slot.stage_mut(flow);
                stage.paused = true;
                if stage.at > At::Headers && stage.body.len() > limit {
                    drop(data);
                    self.stop(Stop::TooLarge(flow));
                }
            }
            Action::Continue | Action::Pause => self.pass(flow, step, index),
        }
    }

    /// What a filter held goes on to the next one, or out.
    pub(super) fn pass(&self, flow: Flow, step: usize, index: usize) {
        let mut data = self.stream.data();
        let data = &mut *data;
        let Some(slot) = data.slots.get_mut(index) else { return };
        if let Some(failed) = lacking(slot, flow) {
            self.stop(Stop::Failed(failed));
            return;
        }
        let stage = slot.stage_mut(flow);
        stage.paused = false;
        if stage.at == At::Headers {
            let mut state = self.state.borrow_mut();
            let direction = state.of(flow);
            direction.head_at = step + 1;
            stage.at = if direction.head_end { At::Done } else { At::Body };
            if direction.head_end && step + 1 == self.count {
                direction.out_end = Some(End::Taken);
            }
            return;
        }
        let (bytes, ended) = (stage.body.take(), stage.ended);
        let through = ended || stage.at == At::Trailers;
        if through {
            stage.at = At::Done;
        }
        // Also those that the filter made itself at the end of a message without any.
        let trailers = through && data.trailers_mut(flow).is_some();
        if step + 1 >= self.count {
            self.put_out(flow, bytes, through, trailers);
            return;
        }
        let Some(next) = data.slots.get_mut(self.index(flow, step + 1)) else { return };
        let next = next.stage_mut(flow);
        let ended = through && !trailers;
        next.fresh |= !bytes.is_empty() || ended;
        next.body.push(bytes);
        next.ended |= ended;
        next.trailers |= trailers;
    }

    pub(super) fn stop(&self, stop: Stop) {
        let mut state = self.state.borrow_mut();
        // What has gone out cannot be replaced; of TCP nothing is, and why it ends is what counts.
        let sent = state.response.head_taken && !self.stream.tcp;
        let stop = if sent && stop != Stop::Local { Stop::Reset } else { stop };
        state.request.cut = true;
        if stop == Stop::Reset {
            state.response.cut = true;
        }
        state.stop = Some(stop);
        drop(state);
        for waiter in [Waiter::Request, Waiter::Response, Waiter::Stop] {
            self.stream.wake(waiter);
        }
    }

    pub(super) fn fail(&self, failed: Failed) {
        self.stop(Stop::Failed(failed));
    }

    /// A filter answers.
    pub(super) fn respond(&self, index: usize, reply: LocalResponse) {
        let grpc = {
            let mut data = self.stream.data();
            if data.head_sent {
                drop(data);
                self.stop(Stop::Reset);
                return;
            }
            if let Some(slot) = data.slots.get_mut(index) {
                // An answer to the request may still be replaced in its own response phase.
                slot.answered = slot.response.at != At::Waiting;
            }
            self.state.borrow().grpc
        };
        let (head, body) = reply.into_head(grpc);
        self.answer(index + 1, head, body);
        self.stop(Stop::Local);
        self.advance(Flow::Response);
    }

    /// A whole response from inside the filter `below - 1`, in place of whatever was on its way.
    pub(super) fn answer(&self, below: usize, head: response::Parts, body: Bytes) {
        let end = body.is_empty();
        self.begin_response(below, head, end);
        let first = self.state.borrow().response.first;
        if first >= self.count {
            self.put_out(Flow::Response, body, true, false);
            return;
        }
        if end {
            return;
        }
        if let Some(slot) = self.stream.data().slots.get_mut(self.index(Flow::Response, first)) {
            slot.response.body.push(body);
            slot.response.fresh = true;
            slot.response.ended = true;
        }
    }

    /// A response goes to the filters below an index that were reached and have not begun with one.
    pub(super) fn begin_response(&self, below: usize, head: response::Parts, end: bool) {
        let mut data = self.stream.data();
        let reached = data.slots.iter().take_while(|slot| slot.request.at != At::Waiting).count();
        let fresh = data.slots.iter().take_while(|slot| slot.response.at == At::Waiting).count();
        let below = below.min(reached).min(fresh);
        for slot in data.slots.iter_mut().skip(below) {
            slot.response.at = At::Done;
            slot.response.paused = false;
            slot.response.body = Buffer::default();
        }
        data.response.head = Some(head);
        data.response.trailers = None;
        let first = self.count - below;
        let out_end = (end && below == 0).then_some(End::Taken);
        let response = Direction { begun: true, first, head_at: first, head_end: end, out_end, ..Direction::default() };
        self.state.borrow_mut().response = response;
    }

    /// Instances that ended, and wishes of paused filters.
    pub(super) fn look_for_losses(&self) {
        for index in 0..self.count {
            let filter = {
                let mut data = self.stream.data();
                data.slots.get_mut(index).and_then(|slot| slot.filter.take())
            };
            let Some(mut filter) = filter else { continue };
            let lost = filter.lost(&self.view(index));
            if let Some(slot) = self.stream.data().slots.get_mut(index) {
                slot.filter = Some(filter);
                if matches!(lost, Some(Action::Continue)) {
                    slot.wishes.resume = [true; 2];
                }
            }
            self.end_by(index, lost);
        }
    }

    /// Ends the exchange where a filter failed or asked for its end. What it lets go is left to a run.
    fn end_by(&self, index: usize, action: Option<Action>) {
        let (reply, reset) = {
            let mut data = self.stream.data();
            let Some(slot) = data.slots.get_mut(index) else { return };
            (slot.wishes.reply.take(), std::mem::take(&mut slot.wishes.reset))
        };
        match (action, reply) {
            (Some(Action::Failed(failed)), _) => self.fail(failed),
            (Some(Action::Respond(reply)), _) | (_, Some(reply)) => self.respond(index, *reply),
            (Some(Action::Reset), _) => self.stop(Stop::Reset),
            _ if reset => self.stop(Stop::Reset),
            _ => {}
        }
    }

    /// Tells every filter that a side is gone.
    pub(super) fn close(&self, flow: Flow, peer: Peer) {
        for index in 0..self.count {
            let action = self.call(index, flow, Event::Closed(peer));
            if let Some(slot) = self.stream.data().slots.get_mut(index) {
                // Where it holds nothing there is nothing to let go, now or later.
                slot.wishes.resume[flow as usize] &= slot.stage(flow).paused;
            }
            self.end_by(index, Some(action));
        }
        // The client's end is told last: nothing goes on then.
        if flow == Flow::Response {
            self.state.borrow_mut().again = true;
            self.run(flow);
        }
    }

    pub(super) fn finish(&self) {
        if std::mem::replace(&mut self.state.borrow_mut().done, true) {
            return;
        }
        let tcp = self.stream.tcp;
        self.stream.data().logging = true;
        let take = |index: usize| self.stream.data().slots.get_mut(index).and_then(|slot| slot.filter.take());
        for index in (0..self.count).filter(|_| !tcp) {
            if let Some(mut filter) = take(index) {
                filter.log(&self.view(index));
                if let Some(slot) = self.stream.data().slots.get_mut(index) {
                    slot.filter = Some(filter);
                }
            }
        }
        for index in 0..self.count {
            if let Some(mut filter) = take(index) {
                filter.done(&self.view(index));
            }
        }
        let mut state = self.state.borrow_mut();
        state.request.cut = true;
        state.response.cut = true;
        drop(state);
        self.stream.wake(Waiter::Request);
    }
}

/// A filter took away what the message cannot do without.
fn lacking(slot: &Slot, flow: Flow) -> Option<Failed> {
    const REQUEST: [&str; 4] = [":method", ":path", ":authority", ":scheme"];
    let lacking = slot.edits[flow as usize].lacking(if flow == Flow::Request { &REQUEST } else { &[":status"] })?;
    let filter = slot.filter.as_ref().map_or_else(String::new, |filter| filter.name().to_owned());
    Some(Failed { filter, reason: format!("it removed {lacking}") })
}
