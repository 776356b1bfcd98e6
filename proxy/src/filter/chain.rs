//! The filters of one exchange, in order: a machine without IO. What comes in is pushed, what comes out is taken; see "Filters" in
//! `docs/architecture.md`.

mod run;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Waker;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, request, response};

use super::kept::Kept;
use super::local::is_grpc;
use super::stream::{At, Waiter};
use super::{Failed, FilterState, Filters, Flow, Peer, Plugin, Stream, StreamInfo};

/// What comes out of a chain behind a head.
#[derive(Debug)]
pub enum Frame {
    /// Body bytes, never empty
    Data(Bytes),
    /// Trailers, and the end
    Trailers(HeaderMap),
    /// The end
    End,
}

/// Why the exchange does not go on as it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stop {
    /// A filter answered: its response comes out of the chain. Nothing (more) of the request does
    Local,
    /// 503 `filter-failed`, made by the caller and given to [`Chain::replace_response`]
    Failed(Failed),
    /// A filter held more of a body than it may: 413 or 500, likewise
    TooLarge(Flow),
    /// Reset the client's stream
    Reset,
}

/// The filters of one exchange. Lives on one worker: it holds that worker's instances. Clones are handles to the same chain.
///
/// Request filters run in order, response filters in reverse. [`Chain::done`] ends every filter exactly once, and dropping the last handle
/// does the same with what is known by then.
#[derive(Clone)]
pub struct Chain(Rc<Inner>);

impl std::fmt::Debug for Chain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Chain").field("filters", &self.0.count).finish_non_exhaustive()
    }
}

struct Inner {
    stream: Rc<Stream>,
    count: usize,
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    request: Direction,
    response: Direction,
    grpc: bool,
    stop: Option<Stop>,
    /// A callback asked for something in the other direction.
    again: bool,
    done: bool,
}

/// Steps are counted in the order in which the direction passes the filters.
#[derive(Default)]
struct Direction {
    begun: bool,
    /// The step that gets what comes in
    first: usize,
    /// The step that has the head
    head_at: usize,
    head_end: bool,
    head_taken: bool,
    /// Nothing more of it comes out
    cut: bool,
    out: Queue,
    held_out: usize,
    out_end: Option<End>,
}

/// Chunks, none of them empty. As a rule there is one, which takes no memory of its own.
#[derive(Default)]
struct Queue {
    next: Bytes,
    rest: VecDeque<Bytes>,
}

impl Queue {
    fn push(&mut self, bytes: Bytes) {
        if self.next.is_empty() {
            self.next = bytes;
        } else if !bytes.is_empty() {
            self.rest.push_back(bytes);
        }
    }

    fn pop(&mut self) -> Option<Bytes> {
        let rest = self.rest.pop_front().unwrap_or_default();
        Some(std::mem::replace(&mut self.next, rest)).filter(|bytes| !bytes.is_empty())
    }

    fn is_empty(&self) -> bool {
        self.next.is_empty()
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Plain,
    Trailers,
    Taken,
}

impl State {
    fn of(&mut self, flow: Flow) -> &mut Direction {
        match flow {
            Flow::Request => &mut self.request,
            Flow::Response => &mut self.response,
        }
    }
}

impl Chain {
    /// The chain of some prepared filters, in the order in which the request meets them.
    pub fn new(plugins: &[Arc<Plugin>], info: StreamInfo) -> Self {
        Self::of(plugins.iter().map(Plugin::filter).collect(), info)
    }

    /// A chain of any filters.
    pub fn of(filters: Filters, info: StreamInfo) -> Self {
        Self::make(filters, info, false)
    }

    /// A chain for an opaque connection.
    pub fn tcp(filters: Filters, info: StreamInfo) -> Self {
        Self::make(filters, info, true)
    }

    fn make(filters: Filters, info: StreamInfo, tcp: bool) -> Self {
        let count = filters.len();
        let stream = Rc::new(Stream::new(filters, info, tcp));
        Self(Rc::new(Inner { stream, count, state: RefCell::default() }))
    }

    /// Facts that become known later (upstream, route).
    pub fn info<R>(&self, f: impl FnOnce(&mut StreamInfo) -> R) -> R {
        f(&mut self.0.stream.data().info)
    }

    /// Properties that filters set.
    pub fn properties<R>(&self, f: impl FnOnce(&FilterState) -> R) -> R {
        f(&self.0.stream.data().state)
    }

    /// Some filter has something to do with bodies of a direction, or holds one.
    pub fn in_body(&self, flow: Flow) -> bool {
        self.0.stream.data().slots.iter().any(|slot| slot.interest.in_body(flow))
    }

    /// The request begins.
    pub fn request_headers(&self, head: request::Parts, end: bool) {
        {
            let mut state = self.0.state.borrow_mut();
            state.grpc = is_grpc(&head.headers);
            state.request = Direction { begun: true, head_end: end, ..Direction::default() };
            self.0.stream.data().request.head = Some(head);
        }
        self.0.advance(Flow::Request);
    }

    /// The request's head, once it has passed all filters; and whether nothing follows it.
    pub fn take_request(&self) -> Option<(request::Parts, bool)> {
        let mut data = self.0.stream.data();
        let end = self.0.take_head(Flow::Request)?;
        let head = data.request.head.take()?;
        if data.slots.iter().any(|slot| slot.interest.keeps_request) {
            data.request.kept = Some(Kept::copy(&head));
        }
        Some((head, end))
    }

    /// The response begins: of the upstream, or made by the mesh.
    pub fn response_headers(&self, head: response::Parts, end: bool) {
        self.0.begin_response(self.0.count, head, end);
        self.0.run(Flow::Response);
    }

    /// A whole response of the mesh's own, instead of whatever was on its way. Filters that have begun with a response do not see it. False:
    /// a response's head has been sent.
    pub fn replace_response(&self, head: response::Parts, body: Bytes) -> bool {
        if self.0.stream.data().head_sent {
            return false;
        }
        self.0.state.borrow_mut().request.cut = true;
        self.0.answer(self.0.count, head, body);
        self.0.run(Flow::Response);
        true
    }

    /// The response's head, once it has passed the filters; and whether nothing follows it. Filters that may read it later have a copy.
    pub fn take_response(&self) -> Option<(response::Parts, bool)> {
        let taken = self.release_response()?;
        self.keep_response(&taken.0);
        Some(taken)
    }

    /// The same without a copy: to be followed by [`Chain::keep_response`], [`Chain::lend`] or [`Chain::done_with`].
    pub fn release_response(&self) -> Option<(response::Parts, bool)> {
        let mut data = self.0.stream.data();
        let end = self.0.take_head(Flow::Response)?;
        let head = data.response.head.take()?;
        data.head_sent = true;
        Some((head, end))
    }

    /// The response's head leaves before the exchange is over.
    pub fn keep_response(&self, head: &response::Parts) {
        let mut data = self.0.stream.data();
        if data.slots.iter().any(|slot| slot.interest.keeps_response) {
            data.response.kept = Some(Kept::copy(head));
        }
    }

    /// Filters may read a head that was released while something is done; it is given back.
    pub fn lend(&self, head: response::Parts, meanwhile: impl FnOnce()) -> Option<response::Parts> {
        self.0.stream.data().response.head = Some(head);
        meanwhile();
        self.0.stream.data().response.head.take()
    }

    /// The exchange is over before the response's head leaves: filters log what there is, and it is given back.
    pub fn done_with(&self, head: response::Parts) -> Option<response::Parts> {
        self.lend(head, || self.0.finish())
    }

    /// Body bytes of a message whose head came before; `end`: nothing follows.
    pub fn data(&self, flow: Flow, bytes: Bytes, end: bool) {
        self.0.input(flow, |slot| {
            let stage = slot.stage_mut(flow);
            stage.fresh |= !bytes.is_empty() || end;
            stage.ended |= end;
            stage.body.push(bytes);
        });
    }

    /// Trailers, which end the message.
    pub fn trailers(&self, flow: Flow, trailers: HeaderMap) {
        *self.0.stream.data().trailers_mut(flow) = Some(trailers);
        self.0.input(flow, |slot| slot.stage_mut(flow).trailers = true);
    }

    /// What has come out behind the head.
    pub fn next(&self, flow: Flow) -> Option<Frame> {
        let mut state = self.0.state.borrow_mut();
        let direction = state.of(flow);
        if let Some(bytes) = direction.out.pop() {
            direction.held_out -= bytes.len();
            return Some(Frame::Data(bytes));
        }
        match direction.out_end {
            None | Some(End::Taken) => None,
            Some(end) => {
                direction.out_end = Some(End::Taken);
                let trailers = self.0.stream.data().trailers_mut(flow).take();
                match trailers.filter(|trailers| end == End::Trailers && !trailers.is_empty()) {
                    Some(trailers) => Some(Frame::Trailers(trailers)),
                    None => Some(Frame::End),
                }
            }
        }
    }

    /// Everything of a direction has come out, or been cut.
    pub fn ended(&self, flow: Flow) -> bool {
        let mut state = self.0.state.borrow_mut();
        let direction = state.of(flow);
        direction.cut || (direction.out.is_empty() && direction.out_end == Some(End::Taken))
    }

    /// The length of all that is to come out, where nothing more goes in and no trailers follow.
    pub fn length(&self, flow: Flow) -> Option<usize> {
        let mut state = self.0.state.borrow_mut();
        let direction = state.of(flow);
        direction.out_end.filter(|end| *end != End::Trailers).map(|_| direction.held_out)
    }

    /// All that is to come out behind the head, where it is one piece and nothing follows it.
    pub fn take_whole(&self, flow: Flow) -> Option<Bytes> {
        let mut state = self.0.state.borrow_mut();
        let direction = state.of(flow);
        let plain = direction.out_end == Some(End::Plain) && !direction.cut && direction.out.rest.is_empty();
        if !plain || self.0.stream.data().trailers_mut(flow).is_some() {
            return None;
        }
        direction.out_end = Some(End::Taken);
        direction.held_out = 0;
        Some(std::mem::take(&mut direction.out.next))
    }

    /// The response's head has left: it cannot be replaced any more.
    pub fn head_sent(&self) -> bool {
        self.0.stream.data().head_sent
    }

    /// All of a direction has passed the filters, or been cut: no filter hears of it again.
    pub fn passed(&self, flow: Flow) -> bool {
        let mut state = self.0.state.borrow_mut();
        let direction = state.of(flow);
        direction.cut || direction.out_end.is_some()
    }

    /// Nothing more of a direction comes out: a filter saw to that.
    pub fn is_cut(&self, flow: Flow) -> bool {
        self.0.state.borrow_mut().of(flow).cut
    }

    /// No filter holds or has let go anything behind the head of a direction.
    pub fn is_clear(&self, flow: Flow) -> bool {
        let empty = self.0.stream.data().slots.iter().all(|slot| slot.stage(flow).body.is_empty());
        let mut state = self.0.state.borrow_mut();
        let direction = state.of(flow);
        empty && direction.out.is_empty() && direction.out_end.is_none()
    }

    /// For the `Trailer` header: names of the trailers that are on their way out.
    pub fn trailer_names(&self, flow: Flow) -> Option<HeaderValue> {
        let mut data = self.0.stream.data();
        let names: Vec<&str> = data.trailers_mut(flow).as_ref()?.keys().map(http::HeaderName::as_str).collect();
        HeaderValue::from_str(&names.join(", ")).ok().filter(|names| !names.is_empty())
    }

    /// Room for more: while filters hold as much as they may, nothing should be read.
    pub fn wants(&self, flow: Flow) -> bool {
        self.wants_beside(flow, 0)
    }

    /// The same where up to `most` bytes may wait to be taken out.
    pub fn wants_beside(&self, flow: Flow, most: usize) -> bool {
        let mut state = self.0.state.borrow_mut();
        let direction = state.of(flow);
        if direction.cut || direction.held_out > most || direction.out_end.is_some() {
            return false;
        }
        let data = self.0.stream.data();
        // The first filter that holds something decides: what is behind it waits in it.
        for step in direction.first..self.0.count {
            let Some(slot) = data.slots.get(self.0.index(flow, step)) else { continue };
            let stage = slot.stage(flow);
            match stage.at {
                At::Waiting => return stage.body.len() < slot.body_limit,
                At::Headers if stage.paused => return stage.body.len() < slot.body_limit,
                At::Body if stage.paused => return true,
                At::Trailers if stage.paused => return false,
                _ => {}
            }
        }
        true
    }

    /// Why the exchange does not go on, once.
    pub fn stop(&self) -> Option<Stop> {
        self.0.state.borrow_mut().stop.take()
    }

    /// Puts back what [`Chain::stop`] gave.
    pub fn stop_again(&self, stop: Stop) {
        self.0.state.borrow_mut().stop = Some(stop);
    }

    /// There is something for [`Chain::stop`].
    pub fn stopped(&self) -> bool {
        self.0.state.borrow().stop.is_some()
    }

    /// Does what was asked for from outside the filters' own callbacks. Callers do so whenever they are woken.
    pub fn settle(&self) {
        if self.0.stream.signal.replace(false) {
            self.0.look_for_losses();
            self.0.run(Flow::Request);
            self.0.run(Flow::Response);
        }
    }

    /// Who waits for what comes out of a direction.
    pub fn register(&self, flow: Flow, waker: &Waker) {
        self.0.stream.register(flow.into(), waker);
    }

    /// Who waits for [`Chain::stop`].
    pub fn register_stop(&self, waker: &Waker) {
        self.0.stream.register(Waiter::Stop, waker);
    }

    /// TCP: the client has connected.
    pub fn connected(&self) {
        {
            let mut state = self.0.state.borrow_mut();
            state.request = Direction { begun: true, ..Direction::default() };
            state.response = Direction { begun: true, head_at: self.0.count, head_taken: true, ..Direction::default() };
            for slot in self.0.stream.data().slots_mut() {
                slot.response.at = At::Body;
            }
        }
        self.0.advance(Flow::Request);
    }

    /// TCP: the new connection has passed all filters.
    pub fn take_connected(&self) -> bool {
        self.0.take_head(Flow::Request).is_some()
    }

    /// TCP: the side that sends in a direction is gone.
    pub fn closed(&self, flow: Flow, peer: Peer) {
        self.0.close(flow, peer);
    }

    /// The exchange is over: every filter logs and is deleted.
    pub fn done(&self) {
        self.0.finish();
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.finish();
    }
}
