//! Bodies: what goes up, what comes down, and the buffer from which an attempt is repeated.

use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use ::http::HeaderMap;
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::Sleep;

use super::exchange::Running;
use super::filtered::{FilteredRequest, FilteredResponse};
use super::made::Made;
use crate::upstream::Received;

/// Any failure of a body; hyper closes or resets what it was part of.
pub(super) type BodyError = Box<dyn std::error::Error + Send + Sync>;

/// How long a client that sent `Expect: 100-continue` is kept waiting for the upstream's word.
const CONTINUE_AFTER: Duration = Duration::from_secs(1);

/// What is sent to an endpoint.
#[derive(Debug)]
pub struct RequestBody {
    source: Source,
    count: Option<Count>,
    /// Holds the body back: `Expect: 100-continue`
    gate: Option<Pin<Box<Sleep>>>,
}

/// Bytes of a request's body that went to endpoints: the most that an attempt had.
pub(super) type Sent = Rc<Cell<u64>>;

/// What one attempt had of it.
#[derive(Debug)]
struct Count {
    sent: Sent,
    passed: u64,
}

/// A client's body.
#[derive(Debug)]
pub enum ClientBody {
    /// As it came
    Plain(Incoming),
    /// Through filters
    Filtered(Box<FilteredRequest>),
    /// It was taken elsewhere
    Taken,
}

impl ClientBody {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self {
            Self::Plain(body) => Pin::new(body).poll_frame(cx).map_err(Into::into),
            Self::Filtered(body) => body.poll_frame(cx),
            Self::Taken => Poll::Ready(None),
        }
    }

    /// There is nothing more.
    pub(super) fn is_end_stream(&self) -> bool {
        match self {
            Self::Plain(body) => body.is_end_stream(),
            Self::Filtered(body) => body.is_end_stream(),
            Self::Taken => true,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Plain(body) => body.size_hint(),
            Self::Filtered(body) => body.size_hint(),
            Self::Taken => SizeHint::with_exact(0),
        }
    }
}

#[derive(Debug)]
enum Source {
    Empty,
    Client(ClientBody),
    /// Of a call-out
    Made(Made),
    Replay {
        buffer: ReplayBuffer,
        position: usize,
        trailers_sent: bool,
        attempt: u64,
    },
}

impl RequestBody {
    /// No body.
    pub fn empty() -> Self {
        Self { source: Source::Empty, count: None, gate: None }
    }

    /// The client's body, passed through untouched.
    pub(super) fn client(body: ClientBody) -> Self {
        Self { source: Source::Client(body), count: None, gate: None }
    }

    /// A body that the proxy makes itself.
    pub(super) fn made(body: Made) -> Self {
        Self { source: Source::Made(body), count: None, gate: None }
    }

    /// Counts what is sent of it.
    #[must_use]
    pub(super) fn counted(mut self, sent: Sent) -> Self {
        self.count = Some(Count { sent, passed: 0 });
        self
    }

    /// The client's body, if this is it.
    pub(super) fn into_client(self) -> Option<ClientBody> {
        match self.source {
            Source::Client(body) => Some(body),
            Source::Empty | Source::Made(_) | Source::Replay { .. } => None,
        }
    }

    /// The body is not asked of the client before it is opened, or [`CONTINUE_AFTER`] has passed: some servers never say that
    /// they want it.
    #[must_use]
    pub(super) fn held(mut self) -> Self {
        self.gate = Some(Box::pin(tokio::time::sleep(CONTINUE_AFTER)));
        self
    }

    /// The endpoint wants it.
    pub(crate) fn open(&mut self) {
        self.gate = None;
    }

    /// Nothing of it was asked of the client.
    pub(crate) fn is_held(&self) -> bool {
        self.gate.is_some()
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if let Some(gate) = &mut self.gate {
            std::task::ready!(gate.as_mut().poll(cx));
            self.gate = None;
        }
        let frame = match &mut self.source {
            Source::Empty => Poll::Ready(None),
            Source::Client(body) => body.poll_frame(cx),
            Source::Made(body) => body.poll_frame(cx).map(|frame| frame.map(Ok)),
            Source::Replay { buffer, position, trailers_sent, attempt } => {
                buffer.poll_frame(cx, *attempt, position, trailers_sent)
            }
        };
        if let (Poll::Ready(Some(Ok(frame))), Some(count)) = (&frame, &mut self.count)
            && let Some(data) = frame.data_ref()
        {
            count.passed += data.len() as u64;
            count.sent.set(count.sent.get().max(count.passed));
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            Source::Empty => true,
            Source::Client(body) => body.is_end_stream(),
            Source::Made(body) => body.is_end(),
            Source::Replay { buffer, position, trailers_sent, .. } => buffer.is_end(*position, *trailers_sent),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Empty => SizeHint::with_exact(0),
            Source::Client(body) => body.size_hint(),
            Source::Made(body) => body.size_hint(),
            Source::Replay { buffer, .. } => buffer.0.borrow().size,
        }
    }
}

/// A request body that can be sent more than once, as long as it fits its limit. Clones are handles to the same buffer.
#[derive(Debug, Clone)]
pub struct ReplayBuffer(Rc<RefCell<Replay>>);

#[derive(Debug)]
struct Replay {
    source: Option<ClientBody>,
    chunks: Vec<Bytes>,
    trailers: Option<HeaderMap>,
    buffered: usize,
    limit: usize,
    /// Bytes went out that were not kept: no other attempt can have them.
    lost: bool,
    /// The attempt that may read; earlier ones end with an error.
    attempt: u64,
    size: SizeHint,
}

impl ReplayBuffer {
    /// A buffer over the client's body that keeps at most `limit` bytes.
    pub fn new(source: ClientBody, limit: usize) -> Self {
        let size = source.size_hint();
        Self(Rc::new(RefCell::new(Replay {
            source: Some(source),
            chunks: Vec::new(),
            trailers: None,
            buffered: 0,
            limit,
            lost: false,
            attempt: 0,
            size,
        })))
    }

    /// Whether another attempt could have the whole body.
    pub fn can_replay(&self) -> bool {
        !self.0.borrow().lost
    }

    /// The body of the next attempt; the previous attempt's ends with an error.
    pub fn attempt(&self) -> RequestBody {
        let mut replay = self.0.borrow_mut();
        replay.attempt += 1;
        let source =
            Source::Replay { buffer: self.clone(), position: 0, trailers_sent: false, attempt: replay.attempt };
        RequestBody { source, count: None, gate: None }
    }

    fn is_end(&self, position: usize, trailers_sent: bool) -> bool {
        let replay = self.0.borrow();
        let source_ended = replay.source.as_ref().is_none_or(ClientBody::is_end_stream);
        source_ended && position == replay.chunks.len() && (trailers_sent || replay.trailers.is_none())
    }

    fn poll_frame(
        &self,
        cx: &mut Context<'_>,
        attempt: u64,
        position: &mut usize,
        trailers_sent: &mut bool,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let mut replay = self.0.borrow_mut();
        if attempt != replay.attempt {
            return Poll::Ready(Some(Err("a later attempt has taken over the body".into())));
        }
        if let Some(chunk) = replay.chunks.get(*position) {
            *position += 1;
            return Poll::Ready(Some(Ok(Frame::data(chunk.clone()))));
        }
        let frame = match &mut replay.source {
            Some(source) => std::task::ready!(source.poll_frame(cx)),
            None => None,
        };
        let frame = match frame {
            Some(Ok(frame)) => frame,
            Some(Err(error)) => {
                replay.lost = true;
                return Poll::Ready(Some(Err(error)));
            }
            None => {
                replay.source = None;
                let again = replay.trailers.clone().filter(|_| !*trailers_sent);
                *trailers_sent = true;
                return Poll::Ready(again.map(|trailers| Ok(Frame::trailers(trailers))));
            }
        };
        if let Some(data) = frame.data_ref() {
            if replay.keep(data) {
                *position += 1;
            } else {
                *position = 0;
            }
        } else if let Some(trailers) = frame.trailers_ref() {
            replay.trailers = Some(trailers.clone());
            *trailers_sent = true;
        }
        Poll::Ready(Some(Ok(frame)))
    }
}

impl Replay {
    /// Keeps a chunk, or gives the buffer up for good.
    fn keep(&mut self, data: &Bytes) -> bool {
        self.buffered = self.buffered.saturating_add(data.len());
        if self.lost || self.buffered > self.limit {
            self.lost = true;
            self.chunks = Vec::new();
            return false;
        }
        self.chunks.push(data.clone());
        true
    }
}

/// Is told what passed and how it ended: the end of an exchange is the end of its body.
pub(super) trait Tail {
    /// Bytes of one data frame
    fn data(&mut self, bytes: usize);
    /// The body ended well; with trailers where there were some
    fn end(&mut self, trailers: Option<&HeaderMap>);
    /// The body broke off
    fn broken(&mut self, error: &BodyError);
    /// The request's deadline passed
    fn timed_out(&mut self);
}

/// What is sent to a client.
pub struct ResponseBody {
    source: Response,
    /// Until the body is dropped, the connection is not idle.
    running: Option<Running>,
}

enum Response {
    Full(Option<Bytes>),
    /// Boxed: hyper keeps a body in each connection, and most of them are idle.
    Upstream(Box<Upstream>),
    /// The same through filters
    Filtered(Box<FilteredResponse>),
}

struct Upstream {
    body: Received,
    deadline: Option<Pin<Box<Sleep>>>,
    /// Dropped without an end: the client went away.
    tail: Option<Box<dyn Tail>>,
}

impl std::fmt::Debug for ResponseBody {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ResponseBody")
    }
}

impl ResponseBody {
    /// A whole body.
    pub fn full(bytes: Bytes) -> Self {
        Self { source: Response::Full((!bytes.is_empty()).then_some(bytes)), running: None }
    }

    /// An endpoint's body, watched by a tail. A body that has ended already ends the tail at once, and so does one that is here
    /// as a whole: there is nothing to watch.
    pub(super) fn upstream(mut body: Received, mut tail: impl Tail + 'static, deadline: Option<Instant>) -> Self {
        if let Some(whole) = body.take_whole() {
            tail.data(whole.len());
            tail.end(None);
            return Self::full(whole);
        }
        if body.is_end_stream() {
            tail.end(None);
            return Self::full(Bytes::new());
        }
        let tail: Box<dyn Tail> = Box::new(tail);
        let deadline = deadline.map(|deadline| Box::pin(tokio::time::sleep_until(deadline.into())));
        Self { source: Response::Upstream(Box::new(Upstream { body, deadline, tail: Some(tail) })), running: None }
    }

    /// A body that comes out of a chain.
    pub(super) fn filtered(body: FilteredResponse) -> Self {
        Self { source: Response::Filtered(Box::new(body)), running: None }
    }

    /// Keeps the connection busy for as long as the body lives.
    #[must_use]
    pub(super) fn holding(mut self, running: Running) -> Self {
        self.running = Some(running);
        self
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let upstream = match &mut self.source {
            Response::Full(bytes) => return Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Response::Upstream(upstream) => upstream,
            Response::Filtered(body) => return body.poll_frame(cx),
        };
        // First: a client that reads more slowly than the endpoint sends would never find the body pending.
        if let Some(deadline) = &mut upstream.deadline
            && deadline.as_mut().poll(cx).is_ready()
        {
            if let Some(mut tail) = upstream.tail.take() {
                tail.timed_out();
            }
            return Poll::Ready(Some(Err("the request's timeout passed".into())));
        }
        let frame = std::task::ready!(Pin::new(&mut upstream.body).poll_frame(cx));
        upstream.watch(frame.as_ref());
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            Response::Full(bytes) => bytes.is_none(),
            Response::Upstream(upstream) => upstream.body.is_end_stream(),
            Response::Filtered(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Response::Full(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Response::Upstream(upstream) => upstream.body.size_hint(),
            Response::Filtered(body) => body.size_hint(),
        }
    }
}

impl Upstream {
    fn watch(&mut self, frame: Option<&Result<Frame<Bytes>, BodyError>>) {
        let Some(tail) = &mut self.tail else { return };
        let ended = match frame {
            None => true,
            Some(Err(error)) => {
                tail.broken(error);
                self.tail = None;
                return;
            }
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    tail.data(data.len());
                }
                if let Some(trailers) = frame.trailers_ref() {
                    tail.end(Some(trailers));
                    self.tail = None;
                    return;
                }
                // hyper does not poll again after the last byte of a known length.
                self.body.is_end_stream()
            }
        };
        if ended {
            tail.end(None);
            self.tail = None;
        }
    }
}
