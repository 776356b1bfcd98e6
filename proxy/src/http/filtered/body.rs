//! Bodies on their way through a chain, and heads that wait for the filters.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use ::http::{HeaderMap, Version, response};
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::Sleep;

use super::super::body::{BodyError, Tail};
use crate::filter::{self, Chain, Flow, RequestHead, Stop};
use crate::upstream::Received;

/// Bytes of a body that are taken ahead where they are there when the head leaves.
const AHEAD: usize = 64 * 1024;

type Polled = Poll<Option<Result<Frame<Bytes>, BodyError>>>;

/// A message's body on its way into a chain.
#[derive(Debug)]
pub(super) struct Inlet<B> {
    flow: Flow,
    pub(super) source: Option<B>,
    /// Whether the last frame says so itself: of HTTP/1 the end comes by itself, as in other hosts
    telling: bool,
}

/// What an inlet has come to.
enum Inflow {
    /// Something went into the chain
    Moved,
    /// The message has ended, well; with these trailers
    Ended(Option<HeaderMap>),
}

impl<B> Inlet<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BodyError>,
{
    pub(super) fn new(flow: Flow, source: B, version: Version) -> Self {
        let source = (!source.is_end_stream()).then_some(source);
        Self { flow, source, telling: version == Version::HTTP_2 }
    }

    /// Moves a frame, if the chain has room.
    fn poll(&mut self, chain: &Chain, cx: &mut Context<'_>) -> Poll<Result<Inflow, BodyError>> {
        self.poll_beside(chain, 0, cx)
    }

    /// The same while no more than `most` bytes wait to be taken out of the chain.
    fn poll_beside(&mut self, chain: &Chain, most: usize, cx: &mut Context<'_>) -> Poll<Result<Inflow, BodyError>> {
        let wanted = |_: &&mut B| chain.wants_beside(self.flow, most);
        let Some(source) = self.source.as_mut().filter(wanted) else { return Poll::Pending };
        if source.is_end_stream() {
            self.source = None;
            chain.data(self.flow, Bytes::new(), true);
            return Poll::Ready(Ok(Inflow::Ended(None)));
        }
        match std::task::ready!(Pin::new(&mut *source).poll_frame(cx)) {
            Some(Ok(frame)) => {
                let frame = match frame.into_data() {
                    Ok(bytes) => {
                        let end = self.telling && source.is_end_stream();
                        if end {
                            self.source = None;
                        }
                        chain.data(self.flow, bytes, end);
                        return Poll::Ready(Ok(if end { Inflow::Ended(None) } else { Inflow::Moved }));
                    }
                    Err(frame) => frame,
                };
                let Ok(trailers) = frame.into_trailers() else { return Poll::Ready(Ok(Inflow::Moved)) };
                self.source = None;
                chain.trailers(self.flow, trailers.clone());
                Poll::Ready(Ok(Inflow::Ended(Some(trailers))))
            }
            Some(Err(error)) => {
                self.source = None;
                Poll::Ready(Err(error.into()))
            }
            None => {
                self.source = None;
                chain.data(self.flow, Bytes::new(), true);
                Poll::Ready(Ok(Inflow::Ended(None)))
            }
        }
    }
}

/// What comes out of a chain as a body; `None`: nothing yet.
fn outflow(chain: &Chain, flow: Flow) -> Option<Option<Result<Frame<Bytes>, BodyError>>> {
    match chain.next(flow) {
        Some(filter::Frame::Data(bytes)) => Some(Some(Ok(Frame::data(bytes)))),
        Some(filter::Frame::Trailers(trailers)) => Some(Some(Ok(Frame::trailers(trailers)))),
        Some(filter::Frame::End) => Some(None),
        None if chain.is_cut(flow) => Some(Some(Err("a filter ended the message".into()))),
        None if chain.ended(flow) => Some(None),
        None => None,
    }
}

fn size(chain: &Chain, flow: Flow) -> SizeHint {
    chain.length(flow).map_or_else(SizeHint::default, |length| SizeHint::with_exact(length as u64))
}

/// A client's body behind the filters.
#[derive(Debug)]
pub struct FilteredRequest {
    pub(super) chain: Chain,
    pub(super) inlet: Inlet<Incoming>,
    /// How the client's body broke off, to be told after what came before
    pub(super) failed: Option<BodyError>,
}

impl FilteredRequest {
    pub(in crate::http) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Polled {
        loop {
            self.chain.settle();
            if self.chain.stopped() && !self.chain.head_sent() {
                // The answer is the filters', and ends the attempt: the endpoint is not to be blamed for half a body. Behind a head
                // that has been sent there is none.
                self.chain.register(Flow::Request, cx.waker());
                return Poll::Pending;
            }
            if let Some(frame) = outflow(&self.chain, Flow::Request) {
                return Poll::Ready(frame);
            }
            if let Some(error) = self.failed.take() {
                return Poll::Ready(Some(Err(error)));
            }
            self.chain.register(Flow::Request, cx.waker());
            if let Err(error) = std::task::ready!(self.inlet.poll(&self.chain, cx)) {
                return Poll::Ready(Some(Err(error)));
            }
        }
    }

    pub(in crate::http) fn is_end_stream(&self) -> bool {
        self.chain.ended(Flow::Request) && !self.chain.is_cut(Flow::Request)
    }

    pub(in crate::http) fn size_hint(&self) -> SizeHint {
        size(&self.chain, Flow::Request)
    }

    /// Takes what of the body is there already: a short one is sent with its length then. A failure shows at the next poll.
    pub(super) fn fetch(&mut self, cx: &mut Context<'_>) {
        loop {
            match self.inlet.poll_beside(&self.chain, AHEAD, cx) {
                Poll::Ready(Ok(Inflow::Moved)) => {}
                Poll::Ready(Ok(Inflow::Ended(_))) | Poll::Pending => return,
                Poll::Ready(Err(error)) => {
                    self.failed = Some(error);
                    return;
                }
            }
        }
    }

    /// The head, when all filters have let it go; meanwhile as much of the body is read as they may hold.
    pub(super) async fn head(&mut self, reads: bool) -> Result<RequestHead, Stop> {
        std::future::poll_fn(|cx| {
            loop {
                self.chain.settle();
                if let Some(stop) = self.chain.stop() {
                    return Poll::Ready(Err(stop));
                }
                if let Some((head, _)) = self.chain.take_request() {
                    return Poll::Ready(Ok(head));
                }
                self.chain.register(Flow::Request, cx.waker());
                if !reads {
                    // To ask for the body is to say `100 Continue`.
                    return Poll::Pending;
                }
                match self.inlet.poll(&self.chain, cx) {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(Ok(_)) => {}
                    Poll::Ready(Err(_)) => return Poll::Ready(Err(Stop::Reset)),
                }
            }
        })
        .await
    }
}

/// Why a response's head does not come out of a chain.
pub(super) enum Lost {
    /// A filter saw to that
    Stopped(Stop),
    /// The time is over
    Late,
    /// The body broke off that a filter waited for
    Broken(BodyError),
}

/// The response's way out of a chain.
#[derive(Debug)]
pub(super) struct Outlet {
    pub(super) chain: Chain,
    pub(super) inlet: Option<Inlet<Received>>,
    /// All of the body went in before the head came out; with these trailers
    pub(super) ended: Option<Option<HeaderMap>>,
    pub(super) deadline: Option<Pin<Box<Sleep>>>,
}

impl Outlet {
    /// Of a response that nothing more comes in of.
    pub(super) fn of(chain: Chain) -> Self {
        Self { chain, inlet: None, ended: None, deadline: None }
    }

    /// The response's head, when the filters have let it go; and whether nothing follows it.
    pub(super) async fn head(&mut self, deadline: Option<Instant>) -> Result<(response::Parts, bool), Lost> {
        // As a rule nothing waits, and no timer is needed.
        if let Some(head) = self.ready()? {
            return Ok(head);
        }
        self.chain.pour();
        let waiting = std::future::poll_fn(|cx| {
            loop {
                self.chain.settle();
                match self.ready() {
                    Ok(Some(head)) => return Poll::Ready(Ok(head)),
                    Err(stop) => return Poll::Ready(Err(stop)),
                    Ok(None) => {}
                }
                self.chain.register(Flow::Response, cx.waker());
                let inflow = self.inlet.as_mut().map_or(Poll::Pending, |inlet| inlet.poll(&self.chain, cx));
                match inflow {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(Ok(Inflow::Moved)) => {}
                    Poll::Ready(Ok(Inflow::Ended(trailers))) => self.ended = Some(trailers),
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(Lost::Broken(error))),
                }
            }
        });
        match deadline {
            Some(deadline) => tokio::time::timeout_at(deadline.into(), waiting).await.unwrap_or(Err(Lost::Late)),
            None => waiting.await,
        }
    }

    fn ready(&self) -> Result<Option<(response::Parts, bool)>, Lost> {
        match self.chain.stop() {
            Some(stop) => Err(Lost::Stopped(stop)),
            None => Ok(self.chain.release_response()),
        }
    }
}

/// A response's body behind the filters.
pub(in crate::http) struct FilteredResponse {
    pub(super) outlet: Outlet,
    /// Dropped without an end: the client went away
    pub(super) tail: Option<Box<dyn Tail>>,
    /// How the endpoint's body broke off, to be told after what came before
    pub(super) failed: Option<BodyError>,
    /// A filter has ended it; what came before has been sent
    pub(super) cut: bool,
}

impl FilteredResponse {
    /// Takes what of the body is there already, so that a short one is sent with its length.
    pub(super) fn fetch(&mut self, cx: &mut Context<'_>) {
        let chain = &self.outlet.chain;
        while let Some(inlet) = &mut self.outlet.inlet {
            match inlet.poll_beside(chain, AHEAD, cx) {
                Poll::Ready(Ok(Inflow::Moved)) => {}
                Poll::Ready(Ok(Inflow::Ended(trailers))) => {
                    if let Some(tail) = &mut self.tail {
                        tail.end(trailers.as_ref());
                    }
                    return;
                }
                Poll::Ready(Err(error)) => {
                    self.failed = Some(error);
                    return;
                }
                Poll::Pending => return,
            }
        }
    }

    /// All of the body, where it has come out in one piece and nothing follows.
    pub(super) fn whole(&mut self) -> Option<Bytes> {
        let bytes = self.outlet.chain.take_whole(Flow::Response)?;
        if let Some(mut tail) = self.tail.take() {
            tail.data(bytes.len());
        }
        Some(bytes)
    }

    pub(in crate::http) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Polled {
        let chain = self.outlet.chain.clone();
        // First, as of bodies without filters: a client that reads slowly would never find this one pending.
        if let Some(deadline) = &mut self.outlet.deadline
            && deadline.as_mut().poll(cx).is_ready()
        {
            if let Some(mut tail) = self.tail.take() {
                tail.timed_out();
            }
            return Poll::Ready(Some(Err("the request's timeout passed".into())));
        }
        loop {
            chain.settle();
            if let Some(frame) = outflow(&chain, Flow::Response) {
                if matches!(frame, Some(Err(_))) && !std::mem::replace(&mut self.cut, true) {
                    // An error ends the connection at once. The client is to see how far the response came: its head, at least.
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                self.watch(frame.as_ref());
                return Poll::Ready(frame);
            }
            if let Some(error) = self.failed.take() {
                if let Some(mut tail) = self.tail.take() {
                    tail.broken(&error);
                }
                return Poll::Ready(Some(Err(error)));
            }
            chain.register(Flow::Response, cx.waker());
            let inflow = self.outlet.inlet.as_mut().map_or(Poll::Pending, |inlet| inlet.poll(&chain, cx));
            match (inflow, &mut self.tail) {
                (Poll::Ready(Ok(Inflow::Moved)), _) => {}
                (Poll::Ready(Ok(Inflow::Ended(trailers))), tail) => {
                    if let Some(tail) = tail {
                        tail.end(trailers.as_ref());
                    }
                }
                (Poll::Ready(Err(error)), tail) => {
                    if let Some(mut tail) = tail.take() {
                        tail.broken(&error);
                    }
                    return Poll::Ready(Some(Err(error)));
                }
                (Poll::Pending, _) => return Poll::Pending,
            }
        }
    }

    fn watch(&mut self, frame: Option<&Result<Frame<Bytes>, BodyError>>) {
        match (frame, &mut self.tail) {
            (Some(Ok(frame)), Some(tail)) if frame.is_data() => {
                tail.data(frame.data_ref().map_or(0, Bytes::len));
            }
            // The end of what the client gets is the end of the exchange.
            (_, tail) => *tail = None,
        }
    }

    pub(in crate::http) fn is_end_stream(&self) -> bool {
        self.outlet.chain.ended(Flow::Response) && !self.outlet.chain.is_cut(Flow::Response)
    }

    pub(in crate::http) fn size_hint(&self) -> SizeHint {
        size(&self.outlet.chain, Flow::Response)
    }
}
