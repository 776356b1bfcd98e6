//! Filters in the path of a request.

mod body;

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use ::http::header::{CONTENT_LENGTH, EXPECT, TRAILER};
use ::http::{HeaderMap, HeaderValue, Method, Response, StatusCode, Version, request, response};
use bytes::Bytes;
use http_body::Body as _;
use outrigger_core::reason::Reason;

pub(super) use self::body::{FilteredRequest, FilteredResponse};
use self::body::{Inlet, Lost, Outlet};
use super::attempt::Attempt;
use super::body::{BodyError, ClientBody, ResponseBody, Tail};
use super::exchange::{Answer, BROKEN_OFF, Exchange, ExchangeTail, Failure, Incomer, Running};
use super::respond;
use super::response::Hops;
use crate::filter::{Chain, Flow, Rewritten, Stop};
use crate::upstream::{self, Received};

/// Does something that needs a task, without waiting.
async fn at_once(mut f: impl FnMut(&mut Context<'_>)) {
    std::future::poll_fn(|cx| {
        f(cx);
        Poll::Ready(())
    })
    .await;
}

/// Waits for an answer, or for a filter that ends the exchange first.
pub(super) async fn unless_stopped(
    chain: Option<Chain>,
    mut answer: Pin<&mut impl Future<Output = Result<Answer, Failure>>>,
) -> Result<Answer, Failure> {
    std::future::poll_fn(|cx| {
        if chain.as_ref().is_some_and(|chain| chain.poll_stopped(cx.waker())) {
            return Poll::Ready(Ok(Answer::Filters));
        }
        let polled = answer.as_mut().poll(cx);
        // The same poll may have given the filters more of the request.
        if chain.as_ref().is_some_and(Chain::stopped) { Poll::Ready(Ok(Answer::Filters)) } else { polled }
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
        let passed = chain.pass_request(&mut incomer.head, end).await;
        if passed && (end || !chain.in_body(Flow::Request)) {
            return Ok(None);
        }
        if !passed && chain.stopped() {
            return Ok(Some(Answer::Filters));
        }
        // Boxed: every exchange would carry its state, most of them without a filter that wants a body or waits.
        Box::pin(self.filter_body(incomer, passed, end)).await
    }

    /// What the filters changed of the request that its route and policies were chosen by.
    pub(super) fn rewritten(&self) -> Rewritten {
        self.chain.as_ref().map(Chain::rewritten).unwrap_or_default()
    }

    /// Runs them on what follows a head that has passed, or that one of them holds.
    async fn filter_body(&self, incomer: &mut Incomer, passed: bool, end: bool) -> Result<Option<Answer>, Failure> {
        // A body is asked for, unless the client waits for a word of ours.
        let reads = !self.expects;
        let Some(chain) = self.chain.clone() else { return Ok(None) };
        let Some(body) = incomer.through(chain.clone(), self.version) else { return Ok(None) };
        if !passed {
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
        } else if reads {
            at_once(|cx| body.fetch(cx)).await;
        }
        if !end {
            frame_headers(&mut incomer.head.headers, &chain, Flow::Request);
        }
        Ok(None)
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

    /// Gives a response to the filters: what the exchange came to.
    ///
    /// # Errors
    /// The client's stream is to be reset.
    pub(super) fn enter(&mut self, chain: &Chain, answer: Result<Answer, Failure>) -> Result<Begun, BodyError> {
        let upstream_address = self.upstream;
        chain.info(|info| info.upstream = upstream_address);
        match answer {
            Ok(Answer::Upstream(response, attempt)) => match self.received(response, &attempt) {
                Ok(response) => return Ok(Begun::of(chain, response, attempt)),
                Err(failure) => {
                    attempt.failed();
                    self.made(chain, failure);
                }
            },
            Ok(Answer::Local { response, reason }) => {
                let (head, body) = response.into_parts();
                self.begin_local(chain, head, body, reason);
            }
            // Theirs is in the chain already.
            Ok(Answer::Filters) => {}
            Err(failure) => self.made(chain, failure),
        }
        let outlet = Outlet::of(chain.clone());
        let deadline = self.deadline;
        let passing = Passing { outlet, attempt: None, head: None, local: true, upgraded: false, deadline };
        Ok(Begun::Made(Box::new(passing)))
    }

    /// The response's head, as the filters let it go, or one of the mesh's own in its place; and whether nothing follows it. What has become of
    /// the attempt by then is told.
    async fn let_go(
        &mut self,
        outlet: &mut Outlet,
        attempt: &mut Option<Box<Attempt>>,
        mut local: bool,
        deadline: Option<Instant>,
    ) -> Result<(response::Parts, bool), BodyError> {
        let chain = outlet.chain.clone();
        let (mut head, end) = loop {
            let head = outlet.head(deadline).await;
            if let Some(trailers) = outlet.ended.take() {
                outlet.inlet = None;
                if let Some(attempt) = attempt.take() {
                    attempt.succeeded(trailers.as_ref(), Instant::now());
                }
            }
            let lost = match head {
                Ok(head) => break head,
                Err(lost) => lost,
            };
            outlet.inlet = None;
            local = true;
            match (attempt.take(), &lost) {
                (Some(attempt), Lost::Broken(error)) if !upstream::is_of_the_request(error) => attempt.failed(),
                // The endpoint's response is not wanted any more; that says nothing of the endpoint.
                (attempt, _) => drop(attempt),
            }
            match lost {
                Lost::Stopped(stop) => self.stopped(&chain, stop)?,
                Lost::Late => self.made(&chain, Reason::RequestTimeout.into()),
                Lost::Broken(_) => self.made(&chain, Failure::new(Reason::UpstreamReset, BROKEN_OFF)),
            }
        };
        if local
            && !head.headers.contains_key(&respond::REASON)
            && let Some(reason) = self.reason
        {
            head.headers.insert(respond::REASON, HeaderValue::from_static(reason));
        }
        Ok((head, end))
    }

    /// A response that the filters passed at once.
    ///
    /// # Errors
    /// None that can be: the head is where the filters left it.
    pub(super) fn respond_whole(
        mut self: Box<Self>,
        chain: &Chain,
        bytes: Bytes,
        hops: &Hops,
        running: Running,
    ) -> Result<Response<ResponseBody>, BodyError> {
        let head = chain.take_response_head().ok_or("the response's head is gone")?;
        self.status = Some(head.status);
        self.received += bytes.len() as u64;
        let mut response = Response::from_parts(head, ResponseBody::full(bytes).holding(running));
        hops.restore(&mut response);
        Ok(response)
    }

    /// A response on its way through the filters.
    pub(super) async fn respond_through(
        mut self: Box<Self>,
        passing: Box<Passing>,
        hops: &Hops,
        running: Running,
    ) -> Result<Response<ResponseBody>, BodyError> {
        let Passing { mut outlet, mut attempt, head, local, upgraded, deadline } = *passing;
        let chain = outlet.chain.clone();
        let (mut head, end) = match head {
            Some(head) => head,
            None => self.let_go(&mut outlet, &mut attempt, local, deadline).await?,
        };
        self.status = Some(head.status);
        let bodiless = self.method == Method::HEAD || head.status == StatusCode::NOT_MODIFIED;
        let response = |head, hops: &Hops| {
            let mut response = Response::from_parts(head, ());
            hops.restore(&mut response);
            response
        };
        if upgraded && let Some(attempt) = attempt.take() {
            chain.keep_response(&head);
            return Ok(self.upgrade(response(head, hops), attempt, running));
        }
        if end || bodiless {
            if let Some(attempt) = attempt {
                attempt.succeeded(None, Instant::now());
            }
            let head = chain.done_with(head).ok_or("the response's head is gone")?;
            return Ok(response(head, hops).map(|()| ResponseBody::full(Bytes::new()).holding(running)));
        }
        if outlet.inlet.is_none() {
            frame_headers(&mut head.headers, &chain, Flow::Response);
            if let Some(bytes) = chain.take_whole(Flow::Response) {
                self.received += bytes.len() as u64;
                let head = chain.done_with(head).ok_or("the response's head is gone")?;
                return Ok(response(head, hops).map(|()| ResponseBody::full(bytes).holding(running)));
            }
        }
        chain.keep_response(&head);
        // The last filter may have let go more than the head: the rest is what the body is for. And one that still hears of the request may
        // end the response.
        let uploading = chain.in_body(Flow::Request) && !chain.passed(Flow::Request);
        if !uploading
            && !chain.in_body(Flow::Response)
            && let Some(Inlet { source: Some(body), .. }) =
                outlet.inlet.take_if(|inlet| inlet.source.is_some() && chain.is_clear(Flow::Response))
        {
            let tail = ExchangeTail::new(self, attempt);
            return Ok(response(head, hops).map(|()| ResponseBody::upstream(body, tail, deadline).holding(running)));
        }
        let tail: Box<dyn Tail> = Box::new(ExchangeTail::new(self, attempt));
        let mut body = FilteredResponse { outlet, tail: Some(tail), failed: None, cut: false };
        at_once(|cx| body.fetch(cx)).await;
        if chain.in_body(Flow::Response) {
            frame_headers(&mut head.headers, &chain, Flow::Response);
        }
        let response = response(head, hops);
        if let Some(bytes) = body.whole() {
            return Ok(response.map(|()| ResponseBody::full(bytes).holding(running)));
        }
        body.outlet.deadline = deadline.map(|deadline| Box::pin(tokio::time::sleep_until(deadline.into())));
        Ok(response.map(|()| ResponseBody::filtered(body).holding(running)))
    }
}

impl Begun {
    /// Gives an endpoint's response to the filters.
    fn of(chain: &Chain, response: Response<Received>, attempt: Box<Attempt>) -> Self {
        let deadline = attempt.deadline;
        let (head, mut body) = response.into_parts();
        let upgraded = head.status == StatusCode::SWITCHING_PROTOCOLS;
        let end = body.is_end_stream();
        // As a rule all of a short response has come with its head.
        let whole = if end || !chain.in_body(Flow::Response) { None } else { body.take_whole() };
        if let Some(whole) = whole {
            attempt.succeeded(None, Instant::now());
            chain.begin_whole(head, whole, frame);
            return Self::Whole { upgraded, deadline };
        }
        let inlet = Some(Inlet::new(Flow::Response, body, head.version));
        let outlet = Outlet { inlet, ..Outlet::of(chain.clone()) };
        chain.begin_response(head, end);
        Self::Head(Box::new(Passing { outlet, attempt: Some(attempt), head: None, local: false, upgraded, deadline }))
    }

    /// Once the filters have heard of it.
    pub(super) async fn heard(self, chain: &Chain) -> Entered {
        if !matches!(self, Self::Made(_)) {
            chain.run(Flow::Response).await;
        }
        let (upgraded, deadline) = match self {
            Self::Head(passing) | Self::Made(passing) => return Entered::Passing(passing),
            Self::Whole { upgraded, deadline } => (upgraded, deadline),
        };
        // As a rule all of it is through: the exchange is over before the head leaves, and no filter needs a copy of that.
        if let Some(bytes) = chain.end_whole() {
            return Entered::Whole(bytes);
        }
        let left = if chain.stopped() && !chain.head_sent() { None } else { chain.let_go_response() };
        // Unless a filter said that there is no body.
        if left.is_some_and(|status| status != StatusCode::NOT_MODIFIED) {
            chain.pour();
            if let Some(bytes) = chain.take_whole(Flow::Response) {
                chain.finish_response(|head| frame(head, bytes.len()));
                return Entered::Whole(bytes);
            }
        }
        let head = left.and_then(|_| chain.take_response_head()).map(|head| (head, false));
        let outlet = Outlet::of(chain.clone());
        Entered::Passing(Box::new(Passing { outlet, attempt: None, head, local: false, upgraded, deadline }))
    }
}

fn frame(head: &mut response::Parts, length: usize) {
    set_length(&mut head.headers, length);
}

/// The length where all of the body is known, else none; HTTP/1 sends only the trailers that are announced, and with a length none.
fn frame_headers(headers: &mut HeaderMap, chain: &Chain, flow: Flow) {
    if let Some(length) = chain.length(flow) {
        set_length(headers, length);
        return;
    }
    headers.remove(CONTENT_LENGTH);
    if let Some(names) = chain.trailer_names(flow) {
        headers.insert(TRAILER, names);
    }
}

fn set_length(headers: &mut HeaderMap, length: usize) {
    let stated = headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
    if stated != Some(length) {
        headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    }
}

/// A response that the filters are given.
pub(super) enum Begun {
    /// An endpoint's, with its body; they have not heard of it yet
    Whole { upgraded: bool, deadline: Option<Instant> },
    /// An endpoint's, with its head; likewise
    Head(Box<Passing>),
    /// Of the mesh or of a filter: it has been through those that hear of it
    Made(Box<Passing>),
}

/// What has become of a response that the filters were given.
pub(super) enum Entered {
    /// They passed all of it at once, and the exchange is over; its head is still in the chain
    Whole(Bytes),
    /// It is still on its way
    Passing(Box<Passing>),
}

/// A response on its way through the filters.
pub(super) struct Passing {
    outlet: Outlet,
    attempt: Option<Box<Attempt>>,
    /// It has left already; and whether nothing follows it
    head: Option<(response::Parts, bool)>,
    /// Of the mesh or of a filter
    local: bool,
    upgraded: bool,
    deadline: Option<Instant>,
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
