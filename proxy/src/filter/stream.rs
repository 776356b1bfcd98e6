//! What the filters of one exchange share: the message, and where each filter stands in it.
//!
//! One cell per exchange (HTTP) or connection (TCP), on one worker. The chain moves things through it and lends it to filters while a
//! callback runs; a callback of another context (a timer, a call's answer) may come in by it while a filter is paused. Nothing here runs
//! a filter, so nothing here can re-enter one: what a callback asks for is left in [`Wishes`] and done when it has returned.

use std::cell::{Cell, RefCell, RefMut};
use std::rc::Rc;
use std::task::Waker;

use http::{HeaderMap, request, response};

use super::way::Way;
use super::{Buffer, Event, Filter, FilterState, Interest, LocalResponse, Stop, StreamInfo};

/// A direction. For TCP, `Request` is what the client sends and `Response` what the server sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// From the client
    Request,
    /// To the client
    Response,
}

impl Flow {
    /// The other one.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::Request => Self::Response,
            Self::Response => Self::Request,
        }
    }
}

/// Which part of a message a filter is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum At {
    /// Nothing reached it yet
    #[default]
    Waiting,
    /// Headers; of TCP, the new connection
    Headers,
    /// Behind the headers
    Body,
    /// Trailers
    Trailers,
    /// The message is through
    Done,
}

/// Where one filter stands in one direction.
#[derive(Debug, Default)]
pub(crate) struct Stage {
    pub(crate) at: At,
    /// Its callback runs
    pub(crate) calling: bool,
    /// It holds what it was shown last
    pub(crate) paused: bool,
    /// Body bytes that it has not let go
    pub(crate) body: Buffer,
    /// There is something that it was not shown yet
    pub(crate) fresh: bool,
    /// Nothing follows
    pub(crate) ended: bool,
    /// Trailers have come to it
    pub(crate) trailers: bool,
}

impl Stage {
    /// The filter may read and write what it is at: in that callback, and for as long as it pauses there.
    fn open(&self, at: At) -> bool {
        self.at == at && (self.calling || self.paused)
    }
}

/// Pseudo headers of requests, by their numbers in [`Edits`].
pub(crate) const REQUEST_PSEUDO: &[&str] = &[":method", ":path", ":authority", ":scheme"];
/// The same of responses.
pub(crate) const RESPONSE_PSEUDO: &[&str] = &[":status"];

/// What a filter did to a head that others have to know.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Edits {
    /// Pseudo headers that a message cannot do without and that it took away; a bit each
    lacking: u8,
    /// Those that it gave another value
    pub(crate) rewritten: u8,
    /// Bytes of names and values that it wrote
    pub written: usize,
}

impl Edits {
    /// Notes that the pseudo header of this number was taken away.
    pub fn removes(&mut self, index: usize) {
        self.lacking |= 1 << index;
    }

    /// Notes that the pseudo header of this number was written, with a value that it had not.
    pub fn writes(&mut self, index: usize, new: bool) {
        self.lacking &= !(1 << index);
        self.rewritten |= u8::from(new) << index;
    }

    /// Something was taken away.
    pub fn is_lacking(self) -> bool {
        self.lacking != 0
    }

    /// The first one of these names that was taken away.
    pub fn lacking(self, names: &[&'static str]) -> Option<&'static str> {
        names.iter().enumerate().find(|(index, _)| self.lacking >> index & 1 == 1).map(|(_, name)| *name)
    }
}

/// What filters wrote of a request that its route and policies are chosen by.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Rewritten {
    /// Its method, path or authority
    pub any: bool,
    /// Its authority
    pub authority: bool,
}

impl Rewritten {
    pub(crate) fn of(slots: &[Slot]) -> Self {
        let bits = slots.iter().fold(0, |bits, slot| bits | slot.edits[Flow::Request as usize].rewritten);
        let written = |name| REQUEST_PSEUDO.iter().position(|one| *one == name).is_some_and(|at| bits >> at & 1 == 1);
        Self { any: bits != 0, authority: bits != 0 && written(":authority") }
    }
}

/// What a filter asked for and the chain has not done yet.
#[derive(Debug, Default)]
pub(crate) struct Wishes {
    pub(crate) resume: [bool; 2],
    pub(crate) reply: Option<Box<LocalResponse>>,
    pub(crate) reset: bool,
}

impl Wishes {
    /// Nothing.
    pub(crate) fn none(&self) -> bool {
        !self.reset && self.reply.is_none() && self.resume == [false; 2]
    }
}

/// One filter of the exchange.
pub(crate) struct Slot {
    pub(crate) interest: Interest,
    /// Bytes of a body that are held while it pauses
    pub(crate) body_limit: usize,
    /// Away while its callback runs
    pub(crate) filter: Option<Box<dyn Filter>>,
    pub(crate) request: Stage,
    pub(crate) response: Stage,
    pub(crate) wishes: Wishes,
    pub(crate) edits: [Edits; 2],
    /// It wrote to the message
    pub(crate) changed: bool,
    /// It has answered: it cannot again
    pub(crate) answered: bool,
}

impl Slot {
    fn new(filter: Box<dyn Filter>) -> Self {
        Self {
            interest: filter.interest(),
            body_limit: filter.body_limit(),
            filter: Some(filter),
            request: Stage::default(),
            response: Stage::default(),
            wishes: Wishes::default(),
            edits: <[Edits; 2]>::default(),
            changed: false,
            answered: false,
        }
    }

    pub(crate) fn stage(&self, flow: Flow) -> &Stage {
        match flow {
            Flow::Request => &self.request,
            Flow::Response => &self.response,
        }
    }

    pub(crate) fn stage_mut(&mut self, flow: Flow) -> &mut Stage {
        match flow {
            Flow::Request => &mut self.request,
            Flow::Response => &mut self.response,
        }
    }
}

/// The filters of an exchange to be, in the order in which the request meets them.
#[derive(Default)]
pub struct Filters(Vec<Slot>);

impl Filters {
    /// None yet, with room for so many.
    pub fn with_capacity(filters: usize) -> Self {
        Self(Vec::with_capacity(filters))
    }

    /// One more.
    pub fn push(&mut self, filter: Box<dyn Filter>) {
        self.0.push(Slot::new(filter));
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}

impl FromIterator<Box<dyn Filter>> for Filters {
    fn from_iter<I: IntoIterator<Item = Box<dyn Filter>>>(filters: I) -> Self {
        Self(filters.into_iter().map(Slot::new).collect())
    }
}

impl std::fmt::Debug for Filters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Filters").field(&self.len()).finish()
    }
}

/// See the module.
pub(crate) struct Data {
    pub(crate) info: StreamInfo,
    pub(crate) state: FilterState,
    /// The request's head. Shared once it has left the chain, and then here only where a filter may still read it
    pub(crate) request: Option<Rc<request::Parts>>,
    /// The response's, from the time it enters the chain until it leaves
    pub(crate) response: Option<response::Parts>,
    /// A copy, as it left the chain, where a filter may still read it
    pub(crate) response_kept: Option<Box<response::Parts>>,
    pub(crate) trailers: [Option<Box<HeaderMap>>; 2],
    pub(crate) slots: Vec<Slot>,
    /// How far each direction has come
    pub(crate) ways: [Way; 2],
    /// The request is gRPC
    pub(crate) grpc: bool,
    /// Why the exchange does not go on, until it is told
    pub(crate) stop: Option<Stop>,
    /// A callback asked for something in the other direction
    pub(crate) again: bool,
    /// The exchange is over and its filters log: heads are read-only
    pub(crate) logging: bool,
    /// All of that is done
    pub(crate) finished: bool,
    /// The response's head has left the chain
    pub(crate) head_sent: bool,
    /// The exchange is over with the end of the response: what is done to its head then, given the length of its body
    pub(crate) touch: Option<Touch>,
}

/// The mesh's last touch of a response's head: it is told the length of the body.
pub(crate) type Touch = fn(&mut response::Parts, usize);

/// The cell; see the module.
pub struct Stream {
    pub(crate) data: RefCell<Data>,
    /// Of an opaque connection
    pub(crate) tcp: bool,
    /// Handles of its chain: the last one ends it
    pub(crate) handles: Cell<u32>,
    /// Something was asked for from outside the chain's own callbacks
    pub(crate) signal: Cell<bool>,
    wakers: RefCell<[Option<Waker>; 3]>,
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Stream")
    }
}

/// Who waits for a stream.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Waiter {
    Request = 0,
    Response = 1,
    Stop = 2,
}

impl From<Flow> for Waiter {
    fn from(flow: Flow) -> Self {
        match flow {
            Flow::Request => Self::Request,
            Flow::Response => Self::Response,
        }
    }
}

impl Stream {
    pub(crate) fn new(filters: Filters, info: StreamInfo, tcp: bool) -> Self {
        // In one piece: it is large, and moved as often as it has names.
        Self {
            data: RefCell::new(Data {
                info,
                state: FilterState::default(),
                request: None,
                response: None,
                response_kept: None,
                trailers: [None, None],
                slots: filters.0,
                ways: Default::default(),
                grpc: false,
                stop: None,
                again: false,
                logging: false,
                finished: false,
                head_sent: false,
                touch: None,
            }),
            tcp,
            handles: Cell::new(1),
            signal: Cell::new(false),
            wakers: RefCell::default(),
        }
    }

    /// Who polls next is told when something happens.
    pub(crate) fn register(&self, waiter: Waiter, waker: &Waker) {
        let mut wakers = self.wakers.borrow_mut();
        if let Some(place) = wakers.get_mut(waiter as usize) {
            match place {
                Some(old) => old.clone_from(waker),
                None => *place = Some(waker.clone()),
            }
        }
    }

    pub(crate) fn wake(&self, waiter: Waiter) {
        let waker = self.wakers.borrow_mut().get_mut(waiter as usize).and_then(Option::take);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Something was asked for of this stream from outside its own callbacks, or an instance in it ended: its exchange looks at it soon.
    pub fn notify(&self) {
        self.signal.set(true);
        for waiter in [Waiter::Request, Waiter::Response, Waiter::Stop] {
            self.wake(waiter);
        }
    }
}

/// One filter's view of its stream: what a callback may read and write. Cheap to clone; also from other contexts of the same filter, by
/// the rules of the stage that the filter is at.
#[derive(Debug, Clone)]
pub struct View {
    pub(crate) stream: Rc<Stream>,
    /// Which filter of the chain
    pub(crate) index: usize,
}

/// A head that may be read.
#[derive(Debug, Clone, Copy)]
pub enum HeadRef<'a> {
    /// Of the request
    Request(&'a request::Parts),
    /// Of the response
    Response(&'a response::Parts),
    /// Trailers
    Trailers(&'a HeaderMap),
}

/// A head that may be written, and where to note what was done to it.
#[derive(Debug)]
pub enum HeadMut<'a> {
    /// Of the request
    Request(&'a mut request::Parts, &'a mut Edits),
    /// Of the response
    Response(&'a mut response::Parts, &'a mut Edits),
    /// Trailers
    Trailers(&'a mut HeaderMap, &'a mut Edits),
}

/// What comes next to a filter that has not returned yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// Something more
    Event(Event),
    /// The end of the exchange: what [`Filter::log_and_done`] does, which is not called then
    Over,
}

/// Which head of a direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// In front of the body
    Headers,
    /// Behind it
    Trailers,
}

impl View {
    /// A head, if the filter may read it now.
    pub fn read<R>(&self, flow: Flow, which: Which, f: impl FnOnce(HeadRef<'_>) -> R) -> Option<R> {
        let data = self.stream.data.borrow();
        let stage = data.slots.get(self.index)?.stage(flow);
        let at = if which == Which::Headers { At::Headers } else { At::Trailers };
        if !(stage.open(at) || data.logging) || self.stream.tcp {
            return None;
        }
        let head = match (flow, which) {
            (Flow::Request, Which::Headers) => HeadRef::Request(data.request.as_deref()?),
            (Flow::Response, Which::Headers) => HeadRef::Response(data.response()?),
            (_, Which::Trailers) => HeadRef::Trailers(data.trailers[flow as usize].as_deref()?),
        };
        Some(f(head))
    }

    /// A head, if the filter may write it now. Trailers come into being where the message has none and the filter sees its end. An
    /// `Err` says that nothing was changed.
    pub fn write<T, E>(
        &self,
        flow: Flow,
        which: Which,
        f: impl FnOnce(HeadMut<'_>) -> Result<T, E>,
    ) -> Option<Result<T, E>> {
        let mut data = self.stream.data.borrow_mut();
        let data = &mut *data;
        if data.logging || self.stream.tcp {
            return None;
        }
        let slot = data.slots.get_mut(self.index)?;
        let (stage, edits) = match flow {
            Flow::Request => (&slot.request, slot.edits.first_mut()?),
            Flow::Response => (&slot.response, slot.edits.last_mut()?),
        };
        let at = if which == Which::Headers { At::Headers } else { At::Trailers };
        let last = which == Which::Trailers && stage.open(At::Body) && stage.ended;
        if !(stage.open(at) || last) {
            return None;
        }
        let head = match (flow, which) {
            (Flow::Request, Which::Headers) => HeadMut::Request(Rc::get_mut(data.request.as_mut()?)?, edits),
            (Flow::Response, Which::Headers) => HeadMut::Response(data.response.as_mut()?, edits),
            (_, Which::Trailers) => HeadMut::Trailers(data.trailers[flow as usize].get_or_insert_default(), edits),
        };
        let result = f(head);
        slot.changed |= result.is_ok();
        Some(result)
    }

    /// Body bytes, if the filter may see them now: in their callback, while it pauses there, and at the trailers.
    pub fn body<R>(&self, flow: Flow, f: impl FnOnce(&[u8]) -> R) -> Option<R> {
        let data = self.stream.data.borrow();
        let stage = data.slots.get(self.index)?.stage(flow);
        (stage.open(At::Body) || stage.open(At::Trailers)).then(|| f(stage.body.as_slice()))
    }

    /// Replaces body bytes (see [`Buffer::splice`]). False: not now, or more than the filter may hold.
    pub fn set_body(&self, flow: Flow, start: usize, len: usize, with: &[u8]) -> bool {
        let mut data = self.stream.data.borrow_mut();
        let Some(slot) = data.slots.get_mut(self.index) else { return false };
        let stage = slot.stage_mut(flow);
        if !(stage.open(At::Body) || stage.open(At::Trailers)) {
            return false;
        }
        // Also in many small steps: a paused stream's filter may come again and again.
        let size = stage.body.len();
        let cut = len.min(size - start.min(size));
        if with.len() > cut && size - cut + with.len() > super::WRITE_LIMIT {
            return false;
        }
        stage.body.splice(start, len, with);
        slot.changed = true;
        true
    }

    /// For a filter whose callback says [`Continue`](super::Action::Continue): what it is to be told next before it returns, if anything. What it
    /// was shown has gone on then.
    pub(crate) fn follow(&self, flow: Flow) -> Option<Next> {
        self.stream.follow(flow, self.index)
    }

    /// The exchange is over.
    pub(crate) fn is_over(&self) -> bool {
        self.stream.data.borrow().logging
    }

    /// Lets go what the filter holds, once its callback has returned. Nothing if it holds nothing.
    pub fn resume(&self, flow: Flow) {
        self.ask(|slot| {
            let stage = slot.stage(flow);
            if stage.calling || stage.paused {
                slot.wishes.resume[flow as usize] = true;
            }
        });
    }

    /// Answers the request; of several answers the first counts. False: the response has begun.
    pub fn respond(&self, response: LocalResponse) -> bool {
        let data = self.stream.data.borrow();
        // What comes too late resets the stream, as it does in other hosts: the filter wants the client not to get what it is getting.
        if data.logging || self.stream.tcp {
            return false;
        }
        drop(data);
        self.ask(|slot| {
            if !slot.answered && slot.wishes.reply.is_none() {
                slot.wishes.reply = Some(Box::new(response));
            }
        });
        true
    }

    /// Resets the client's stream, or closes its connection.
    pub fn close(&self) {
        self.ask(|slot| slot.wishes.reset = true);
    }

    /// An opaque connection.
    pub fn is_tcp(&self) -> bool {
        self.stream.tcp
    }

    /// Facts of the exchange, the properties that filters set, and the heads as far as they are known now.
    pub fn facts<R>(&self, f: impl FnOnce(&Facts<'_>) -> R) -> R {
        let data = self.stream.data.borrow();
        f(&Facts { info: &data.info, state: &data.state, request: data.request.as_deref(), response: data.response() })
    }

    /// Sets a property for the rest of the exchange. False: too much.
    pub fn set_property(&self, name: &[u8], value: &[u8]) -> bool {
        self.stream.data.borrow_mut().state.set(name, value)
    }

    /// True: the filter wrote to the message, or holds something of it.
    pub(crate) fn touched(&self) -> bool {
        let data = self.stream.data.borrow();
        data.slots.get(self.index).is_some_and(|slot| slot.changed || slot.request.paused || slot.response.paused)
    }

    fn ask(&self, f: impl FnOnce(&mut Slot)) {
        let calling = {
            let mut data = self.stream.data.borrow_mut();
            if data.logging {
                return;
            }
            let Some(slot) = data.slots.get_mut(self.index) else { return };
            f(slot);
            slot.request.calling || slot.response.calling
        };
        // In the filter's own callback the chain looks when it returns.
        if !calling {
            self.stream.notify();
        }
    }
}

/// What properties are made of.
pub struct Facts<'a> {
    /// Of the connection and the route
    pub info: &'a StreamInfo,
    /// Set by filters
    pub state: &'a FilterState,
    request: Option<&'a request::Parts>,
    response: Option<&'a response::Parts>,
}

impl std::fmt::Debug for Facts<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Facts").field("info", self.info).finish_non_exhaustive()
    }
}

impl<'a> Facts<'a> {
    /// As it stands, or as it left the chain where a filter may still want it
    pub fn request(&self) -> Option<&'a request::Parts> {
        self.request
    }

    /// The same
    pub fn response(&self) -> Option<&'a response::Parts> {
        self.response
    }
}

impl Data {
    /// The response's head as it stands, or as it left the chain.
    fn response(&self) -> Option<&response::Parts> {
        self.response.as_ref().or(self.response_kept.as_deref())
    }

    pub(crate) fn trailers_mut(&mut self, flow: Flow) -> &mut Option<Box<HeaderMap>> {
        &mut self.trailers[flow as usize]
    }

    pub(crate) fn way(&mut self, flow: Flow) -> &mut Way {
        &mut self.ways[flow as usize]
    }

    /// The filter that is met at a step: responses meet them in reverse.
    pub(crate) fn index(&self, flow: Flow, step: usize) -> usize {
        match flow {
            Flow::Request => step,
            Flow::Response => self.slots.len().saturating_sub(step + 1),
        }
    }
}

impl Stream {
    pub(crate) fn data(&self) -> RefMut<'_, Data> {
        self.data.borrow_mut()
    }
}
