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
use super::{Buffer, Filter, FilterState, Interest, LocalResponse, Stop, StreamInfo};

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
    pub(super) fn open(&self, at: At) -> bool {
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
    /// How the run went that its task left to the [cohort](super::cohort): well, or it panicked
    pub(super) ran: Cell<Option<std::thread::Result<()>>>,
    wakers: RefCell<[Option<Waker>; 4]>,
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
    Turn = 3,
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
            ran: Cell::new(None),
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

impl Data {
    /// The response's head as it stands, or as it left the chain.
    pub(super) fn response(&self) -> Option<&response::Parts> {
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
