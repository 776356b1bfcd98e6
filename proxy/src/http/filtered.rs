//! Filters in the path of a request.

mod body;

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use ::http::header::{CONTENT_LENGTH, EXPECT, TRAILER};
use ::http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version, request, response};
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
use crate::filter::{Chain, Flow, Stop};
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
        if let Some(chain) = &chain {
            chain.settle();
            if chain.stopped() {
                return Poll::Ready(Ok(Answer::Filters));
            }
            chain.register_stop(cx.waker());
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

    /// Gives the head of an endpoint's response to the filters.
    fn enter(
        &mut self,
        chain: &Chain,
        upstream: Option<(Response<Received>, Box<Attempt>)>,
    ) -> (Outlet, Option<Box<Attempt>>) {
        let mut outlet = Outlet { chain: chain.clone(), inlet: None, whole: None, ended: None, deadline: None };
        let upstream_address = self.upstream;
        chain.info(|info| info.upstream = upstream_address);
        let Some((response, attempt)) = upstream else { return (outlet, None) };
        let (head, mut body) = response.into_parts();
        let end = body.is_end_stream();
        // As a rule all of a short response has come with its head.
        outlet.whole = if end || !chain.in_body(Flow::Response) { None } else { body.take_whole() };
        let attempt = if outlet.whole.is_some() {
            attempt.succeeded(None, Instant::now());
            None
        } else {
            outlet.inlet = Some(Inlet::new(Flow::Response, body, head.version));
            Some(attempt)
        };
        chain.response_headers(head, end);
        (outlet, attempt)
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
            outlet.whole = None;
            local = true;
            match (attempt.take(), &lost) {
                (Some(attempt), Lost::Broken(error)) if !upstream::is_of_the_request(error) => attempt.failed(),
                // The endpoint's response is not wanted any more; that says nothing of the endpoint.
                (Some(attempt), _) => attempt.cancelled(),
                (None, _) => {}
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
        let deadline = upstream.as_ref().map_or(self.deadline, |(_, attempt)| attempt.deadline);
        let local = upstream.is_none();
        let (mut outlet, mut attempt) = self.enter(&chain, upstream);
        let (mut head, end) = self.let_go(&mut outlet, &mut attempt, local, deadline).await?;
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
        if outlet.whole.is_some() {
            head = chain.lend(head, || outlet.pour()).ok_or("the response's head is gone")?;
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

/// Framing of a request whose body filters may have changed.
fn frame_request(head: &mut request::Parts, chain: &Chain) {
    frame_headers(&mut head.headers, chain, Flow::Request);
}

/// The length where all of the body is known, else none; HTTP/1 sends only the trailers that are announced, and with a length none.
fn frame_headers(headers: &mut HeaderMap, chain: &Chain, flow: Flow) {
    let length = chain.length(flow);
    let stated = headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
    if length.is_some() && length == stated {
        return;
    }
    headers.remove(CONTENT_LENGTH);
    if let Some(length) = length {
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
