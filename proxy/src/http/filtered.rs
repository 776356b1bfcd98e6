//! Filters in the path of a request: heads that may have to wait, and bodies that pass through a chain.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use ::http::header::{CONTENT_LENGTH, EXPECT, TRAILER};
use ::http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version, request, response};
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use outrigger_core::reason::Reason;
use tokio::time::Sleep;

use super::attempt::Attempt;
use super::body::{BodyError, ClientBody, ResponseBody, Tail};
use super::exchange::{Answer, Exchange, ExchangeTail, Failure, Incomer, Running};
use super::respond;
use super::response::Hops;
use crate::filter::{self, Chain, Flow, Stop};
use crate::upstream::Received;

/// Bytes of a body that are taken ahead where they are there when the head leaves.
const AHEAD: usize = 64 * 1024;

type Polled = Poll<Option<Result<Frame<Bytes>, BodyError>>>;

/// A message's body on its way into a chain.
#[derive(Debug)]
struct Inlet<B> {
    flow: Flow,
    source: Option<B>,
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
    fn new(flow: Flow, source: B, version: Version) -> Self {
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

/// Does something that needs a task, without waiting.
async fn at_once(mut f: impl FnMut(&mut Context<'_>)) {
    std::future::poll_fn(|cx| {
        f(cx);
        Poll::Ready(())
    })
    .await;
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
    chain: Chain,
    inlet: Inlet<Incoming>,
    /// How the client's body broke off, to be told after what came before
    failed: Option<BodyError>,
}

impl FilteredRequest {
    pub(super) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Polled {
        loop {
            self.chain.settle();
            if self.chain.stopped() {
                // The answer is the filters', and ends the attempt: the endpoint is not to be blamed for half a body.
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

    pub(super) fn is_end_stream(&self) -> bool {
        self.chain.ended(Flow::Request) && !self.chain.is_cut(Flow::Request)
    }

    pub(super) fn size_hint(&self) -> SizeHint {
        size(&self.chain, Flow::Request)
    }

    /// Takes what of the body is there already: a short one is sent with its length then. A failure shows at the next poll.
    fn fetch(&mut self, cx: &mut Context<'_>) {
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
    async fn head(&mut self, reads: bool) -> Result<request::Parts, Stop> {
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
                match self.inlet.poll(&self.chain, cx) {
                    _ if !reads => return Poll::Pending,
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(Ok(_)) => {}
                    Poll::Ready(Err(_)) => return Poll::Ready(Err(Stop::Reset)),
                }
            }
        })
        .await
    }
}

/// Waits for an answer, or for a filter that ends the exchange first.
pub(super) async fn unless_stopped(
    chain: Chain,
    mut answer: Pin<&mut impl Future<Output = Result<Answer, Failure>>>,
) -> Result<Answer, Failure> {
    std::future::poll_fn(|cx| {
        chain.settle();
        if chain.stopped() {
            return Poll::Ready(Ok(Answer::Filters));
        }
        chain.register_stop(cx.waker());
        answer.as_mut().poll(cx)
    })
    .await
}

impl Exchange {
    /// Runs the request filters. `Some`: they answered.
    ///
    /// # Errors
    /// The route's time is over while they wait.
    pub(super) async fn filter_request(&mut self, incomer: &mut Incomer) -> Result<Option<Answer>, Failure> {
        let Some(chain) = &self.chain else { return Ok(None) };
        let ClientBody::Plain(body) = &incomer.body else { return Ok(None) };
        let end = body.is_end_stream();
        let version = incomer.head.version;
        let (empty, ()) = Request::new(()).into_parts();
        chain.request_headers(std::mem::replace(&mut incomer.head, empty), end);
        if !chain.stopped()
            && let Some((head, _)) = chain.take_request()
        {
            incomer.head = head;
            if !end && chain.in_body(Flow::Request) {
                let (chain, fetch) = (chain.clone(), !self.expects);
                if let Some(body) = incomer.through(chain.clone(), version).filter(|_| fetch) {
                    at_once(|cx| body.fetch(cx)).await;
                }
                frame_request(&mut incomer.head, &chain);
            }
            return Ok(None);
        }
        if chain.stopped() {
            return Ok(Some(Answer::Filters));
        }
        // A filter waits. The body is asked for meanwhile, unless the client waits for a word of ours.
        let reads = !self.expects;
        let chain = chain.clone();
        let body = incomer.through(chain.clone(), version);
        let Some(body) = body else { return Ok(None) };
        let head = match self.deadline {
            Some(deadline) => tokio::time::timeout_at(deadline.into(), body.head(reads)).await,
            None => Ok(body.head(reads).await),
        };
        match head {
            Ok(Ok(head)) => incomer.head = head,
            Ok(Err(stop)) => {
                chain.stop_again(stop);
                return Ok(Some(Answer::Filters));
            }
            Err(_) => return Err(Reason::RequestTimeout.into()),
        }
        if !end {
            frame_request(&mut incomer.head, &chain);
        }
        Ok(None)
    }

    /// A response of the mesh's own, or of a filter, by the filters that are still to see it.
    pub(super) async fn local_through(
        mut self: Box<Self>,
        chain: Chain,
        local: Option<(Response<Bytes>, Reason)>,
        hops: &Hops,
        running: Running,
    ) -> Result<Response<ResponseBody>, BodyError> {
        if let Some((response, reason)) = local {
            let (head, body) = response.into_parts();
            self.begin_local(&chain, head, body, reason);
        }
        self.respond_through(chain, None, hops, running).await
    }

    fn begin_local(&mut self, chain: &Chain, mut head: response::Parts, body: Bytes, reason: Reason) {
        head.headers.insert(respond::REASON, HeaderValue::from_static(reason.code()));
        self.reason = Some(reason.code());
        chain.replace_response(head, body);
    }

    /// Why the filters stopped the exchange; what is answered then is on its way out of the chain.
    fn stopped(&mut self, chain: &Chain, stop: Stop) -> Result<(), BodyError> {
        let failure = match stop {
            Stop::Local => {
                self.reason = Some(Reason::FilterResponse.code());
                return Ok(());
            }
            Stop::Failed(failed) => {
                tracing::warn!(filter = failed.filter, reason = failed.reason, "a FailClosed filter failed");
                Failure::new(Reason::FilterFailed, format!("filter {}", failed.filter))
            }
            Stop::TooLarge(Flow::Request) => Reason::FilterRequestTooLarge.into(),
            Stop::TooLarge(Flow::Response) => Reason::FilterResponseTooLarge.into(),
            Stop::Reset => return Err("a filter reset the stream".into()),
        };
        self.made(chain, failure);
        Ok(())
    }

    fn made(&mut self, chain: &Chain, failure: Failure) {
        let (head, body) = respond::respond(failure.reason, self.grpc, &failure.detail).into_parts();
        self.detail = failure.detail;
        self.begin_local(chain, head, body, failure.reason);
    }

    /// A response through the filters: of an endpoint, or one that is in the chain already.
    pub(super) async fn respond_through(
        mut self: Box<Self>,
        chain: Chain,
        upstream: Option<(Response<Received>, Box<Attempt>)>,
        hops: &Hops,
        running: Running,
    ) -> Result<Response<ResponseBody>, BodyError> {
        let upgraded =
            upstream.as_ref().is_some_and(|(response, _)| response.status() == StatusCode::SWITCHING_PROTOCOLS);
        let mut outlet = Outlet { chain: chain.clone(), inlet: None, deadline: None };
        let mut attempt = None;
        let upstream_address = self.upstream;
        chain.info(|info| info.upstream = upstream_address);
        let deadline = upstream.as_ref().map_or(self.deadline, |(_, attempt)| attempt.deadline);
        if let Some((response, of)) = upstream {
            let (head, body) = response.into_parts();
            let end = body.is_end_stream();
            outlet.inlet = Some(Inlet::new(Flow::Response, body, head.version));
            chain.response_headers(head, end);
            attempt = Some(of);
        }
        let (mut head, end) = loop {
            match outlet.head(deadline).await {
                Ok(head) => break head,
                Err(stop) => {
                    // The endpoint's response is not wanted any more; that says nothing of the endpoint.
                    outlet.inlet = None;
                    if let Some(attempt) = attempt.take() {
                        attempt.cancelled();
                    }
                    match stop {
                        Some(stop) => self.stopped(&chain, stop)?,
                        None => self.made(&chain, Reason::RequestTimeout.into()),
                    }
                }
            }
        };
        if attempt.is_none()
            && !head.headers.contains_key(&respond::REASON)
            && let Some(reason) = self.reason
        {
            head.headers.insert(respond::REASON, HeaderValue::from_static(reason));
        }
        self.status = Some(head.status);
        let bodiless = self.method == Method::HEAD || head.status == StatusCode::NOT_MODIFIED;
        let response = |head, hops: &Hops| {
            let mut response = Response::from_parts(head, ());
            hops.restore(&mut response);
            response
        };
        if upgraded && let Some(attempt) = attempt.take() {
            return Ok(self.upgrade(response(head, hops), attempt, running));
        }
        if end || bodiless {
            if let Some(attempt) = attempt {
                attempt.succeeded(None, Instant::now());
            }
            return Ok(response(head, hops).map(|()| ResponseBody::full(Bytes::new()).holding(running)));
        }
        // The last filter may have let go more than the head: the rest is what the body is for.
        if !chain.in_body(Flow::Response)
            && let Some(Inlet { source: Some(body), .. }) =
                outlet.inlet.take_if(|inlet| inlet.source.is_some() && chain.is_clear(Flow::Response))
        {
            let tail = ExchangeTail::new(self, attempt);
            return Ok(response(head, hops).map(|()| ResponseBody::upstream(body, tail, deadline).holding(running)));
        }
        let tail: Box<dyn Tail> = Box::new(ExchangeTail::new(self, attempt));
        let mut body = FilteredResponse { outlet, tail: Some(tail), failed: None, cut: false };
        at_once(|cx| body.fetch(cx)).await;
        frame(&mut head, &chain, body.outlet.inlet.is_none());
        let response = response(head, hops);
        if let Some(bytes) = body.whole() {
            return Ok(response.map(|()| ResponseBody::full(bytes).holding(running)));
        }
        body.outlet.deadline = deadline.map(|deadline| Box::pin(tokio::time::sleep_until(deadline.into())));
        Ok(response.map(|()| ResponseBody::filtered(body).holding(running)))
    }
}

/// Framing of a request whose body filters may have changed.
fn frame_request(head: &mut request::Parts, chain: &Chain) {
    frame_headers(&mut head.headers, chain, Flow::Request);
}

/// Framing of a body that filters may have changed.
fn frame(head: &mut response::Parts, chain: &Chain, whole: bool) {
    if whole || chain.in_body(Flow::Response) {
        frame_headers(&mut head.headers, chain, Flow::Response);
    }
}

/// The length where all of the body is known, else none; HTTP/1 sends only the trailers that are announced, and with a length none.
fn frame_headers(headers: &mut HeaderMap, chain: &Chain, flow: Flow) {
    headers.remove(CONTENT_LENGTH);
    if let Some(length) = chain.length(flow) {
        headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    } else if let Some(names) = chain.trailer_names(flow) {
        headers.insert(TRAILER, names);
    }
}

impl Incomer {
    /// The body goes through the filters.
    fn through(&mut self, chain: Chain, version: Version) -> Option<&mut FilteredRequest> {
        if let ClientBody::Plain(_) = &self.body
            && let ClientBody::Plain(source) = std::mem::replace(&mut self.body, ClientBody::Taken)
        {
            let inlet = Inlet::new(Flow::Request, source, version);
            self.body = ClientBody::Filtered(Box::new(FilteredRequest { chain, inlet, failed: None }));
        }
        match &mut self.body {
            ClientBody::Filtered(body) => Some(body),
            ClientBody::Plain(_) | ClientBody::Taken => None,
        }
    }
}

/// Whether the client waits for `100 Continue`.
pub(super) fn expects(head: &request::Parts) -> bool {
    head.headers.contains_key(EXPECT)
}

/// The response's way out of a chain.
#[derive(Debug)]
struct Outlet {
    chain: Chain,
    inlet: Option<Inlet<Received>>,
    deadline: Option<Pin<Box<Sleep>>>,
}

impl Outlet {
    /// The response's head, when the filters have let it go. An error is why not; `None`: the time is over.
    async fn head(&mut self, deadline: Option<Instant>) -> Result<(response::Parts, bool), Option<Stop>> {
        // As a rule nothing waits, and no timer is needed.
        if let Some(head) = self.ready()? {
            return Ok(head);
        }
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
                    Poll::Ready(Ok(_)) => {}
                    Poll::Ready(Err(_)) => return Poll::Ready(Err(Some(Stop::Reset))),
                }
            }
        });
        match deadline {
            Some(deadline) => tokio::time::timeout_at(deadline.into(), waiting).await.unwrap_or(Err(None)),
            None => waiting.await,
        }
    }

    fn ready(&self) -> Result<Option<(response::Parts, bool)>, Option<Stop>> {
        match self.chain.stop() {
            Some(stop) => Err(Some(stop)),
            None => Ok(self.chain.take_response()),
        }
    }
}

/// A response's body behind the filters.
pub(super) struct FilteredResponse {
    outlet: Outlet,
    /// Dropped without an end: the client went away
    tail: Option<Box<dyn Tail>>,
    /// How the endpoint's body broke off, to be told after what came before
    failed: Option<BodyError>,
    /// A filter has ended it; what came before has been sent
    cut: bool,
}

impl FilteredResponse {
    /// Takes what of the body is there already, so that a short one is sent with its length.
    fn fetch(&mut self, cx: &mut Context<'_>) {
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
    fn whole(&mut self) -> Option<Bytes> {
        let bytes = self.outlet.chain.take_whole(Flow::Response)?;
        if let Some(mut tail) = self.tail.take() {
            tail.data(bytes.len());
        }
        Some(bytes)
    }

    pub(super) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Polled {
        let chain = self.outlet.chain.clone();
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
                    tail.broken();
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
                        tail.broken();
                    }
                    return Poll::Ready(Some(Err(error)));
                }
                (Poll::Pending, tail) => {
                    let Some(deadline) = &mut self.outlet.deadline else { return Poll::Pending };
                    std::task::ready!(deadline.as_mut().poll(cx));
                    if let Some(mut tail) = tail.take() {
                        tail.timed_out();
                    }
                    return Poll::Ready(Some(Err("the request's timeout passed".into())));
                }
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

    pub(super) fn is_end_stream(&self) -> bool {
        self.outlet.chain.ended(Flow::Response) && !self.outlet.chain.is_cut(Flow::Response)
    }

    pub(super) fn size_hint(&self) -> SizeHint {
        size(&self.outlet.chain, Flow::Response)
    }
}
