//! One request and its response: what is known of them, from the head to the end of the body.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use ::http::header::HOST;
use ::http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, Version, request};
use bytes::Bytes;
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use outrigger_core::link::{AccessLog, InboundPort, Mesh, Rule};
use outrigger_core::normalize::{self, Direction, trace};
use outrigger_core::reason::Reason;

use super::attempt::Attempt;
use super::body::{BodyError, ClientBody, ResponseBody, Sent, Tail};
use super::filtered::Entered;
use super::{
    Connection, ConnectionInfo, Way, filtered, head, inbound, outbound, respond, response as reply, serve, upgrade,
};
use crate::filter::{Chain, RequestHead, StreamInfo};
use crate::log::Entry;
use crate::metrics::{Known, Metric};
use crate::shed::{self, Refusal};
use crate::snapshot::Snapshot;
use crate::state::Busy;
use crate::upstream::{self, Received, http1};

/// The state of one request. Metrics and the access log get it when it is dropped, which is at the end of the response's body,
/// or when the client went away.
#[derive(Debug)]
pub(super) struct Exchange {
    pub(super) connection: Rc<Connection>,
    pub(super) start: Instant,
    /// When the response's body ended; `None`: it has not, or nobody saw it
    pub(super) end: Option<Instant>,
    pub(super) method: Method,
    uri: Uri,
    host: Option<HeaderValue>,
    pub(super) version: Version,
    /// `content-type: application/grpc`
    pub(super) grpc: bool,
    /// `<namespace>/<name>`
    pub(super) service: Arc<str>,
    /// Version label of the endpoint; inbound, of the own workload
    pub(super) endpoint_version: Arc<str>,
    pub(super) route: Arc<str>,
    pub(super) upstream: Option<std::net::SocketAddr>,
    pub(super) attempts: u32,
    pub(super) chain: Option<Chain>,
    /// When the whole request has to be over, by its route
    pub(super) deadline: Option<Instant>,
    /// The client waits for `100 Continue`
    pub(super) expects: bool,
    /// Why the mesh itself answered, or an upstream proxy did
    pub(super) reason: Option<&'static str>,
    pub(super) detail: String,
    pub(super) status: Option<StatusCode>,
    /// Of an upgraded connection
    sent: u64,
    pub(super) received: u64,
    /// Of the request's body
    pub(super) uploaded: Option<Sent>,
    pub(super) access_log: AccessLog,
    trace: Option<u128>,
}

/// Why an exchange gets a response of the mesh's own.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) reason: Reason,
    /// What exactly; may be empty
    pub(super) detail: String,
}

impl Failure {
    pub(super) fn new(reason: Reason, detail: impl Into<String>) -> Self {
        Self { reason, detail: detail.into() }
    }
}

impl From<Reason> for Failure {
    fn from(reason: Reason) -> Self {
        Self { reason, detail: String::new() }
    }
}

/// What an exchange comes to.
#[derive(Debug)]
pub(super) enum Answer {
    /// An endpoint's response, and what is held until its body ends
    Upstream(Response<Received>, Box<Attempt>),
    /// A response without an endpoint
    Local { response: Response<Bytes>, reason: Reason },
    /// What the filters say
    Filters,
}

/// A request of a client, with everything that came with it.
#[derive(Debug)]
pub(super) struct Incomer {
    pub(super) head: RequestHead,
    pub(super) body: ClientBody,
    pub(super) upgrade: Option<OnUpgrade>,
}

/// Detail of an endpoint that did not finish.
pub(super) const BROKEN_OFF: &str = "the endpoint broke off the response's body";

/// Keeps the connection from being idle.
#[derive(Debug)]
pub(super) struct Running {
    connection: Rc<Connection>,
    _mark: head::Mark,
    _busy: Busy,
}

impl Running {
    pub(super) fn new(connection: &Rc<Connection>) -> Self {
        connection.requests.set(connection.requests.get() + 1);
        connection.running.set(connection.running.get() + 1);
        connection.worker.gate.enter();
        let busy = Busy::request(&connection.worker.load, connection.way() == Way::Inbound);
        Self { connection: connection.clone(), _mark: connection.phase.exchange(), _busy: busy }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.connection.running.set(self.connection.running.get() - 1);
        self.connection.worker.gate.leave();
    }
}

/// Handles one request. An error resets the client's stream.
pub(super) async fn handle(
    connection: Rc<Connection>,
    request: Request<Incoming>,
) -> Result<Response<ResponseBody>, BodyError> {
    let running = Running::new(&connection);
    if connection.phase.take_ambiguous() {
        connection.worker.metrics.add(Metric::Ambiguous, &[connection.way().name()], 1);
    }
    let (mut head, body) = request.into_parts();
    let upgrade = head.extensions.remove::<OnUpgrade>();
    let mut exchange = Box::new(Exchange::new(connection, &head));
    let hops = reply::Hops::of(&head);
    let incomer = Incomer { head: head.into(), body: ClientBody::Plain(body), upgrade };
    let connection = exchange.connection.clone();
    let refusal = shed::refuses(&connection.worker);
    // A sidecar hears it at once: its timers run, and what it has open to us is needed elsewhere. It has its own client wait.
    if refusal == Some(Refusal::Late) && connection.peer().is_none() {
        Box::pin(shed::hold(&connection.worker, None)).await;
    }
    let mut answer = match &connection.info {
        _ if refusal.is_some() => Err(exchange.refuse()),
        _ if too_large(&incomer.head) => Err(Reason::HeadersTooLarge.into()),
        ConnectionInfo::Outbound(info) => outbound::handle(&mut exchange, info, incomer).await,
        ConnectionInfo::Inbound(info) => inbound::handle(&mut exchange, info, incomer).await,
    };
    if let Ok(Answer::Upstream(response, attempt)) = &answer
        && attempt.overloaded(response)
    {
        answer = Err(Box::pin(exchange.refused(answer)).await);
    }
    let Some(chain) = exchange.chain.clone() else { return exchange.conclude(answer, &hops, running) };
    match exchange.enter(&chain, answer)?.heard(&chain).await {
        Entered::Whole(bytes) => exchange.respond_whole(&chain, bytes, &hops, running),
        Entered::Passing(passing) => Box::pin(exchange.respond_through(passing, &hops, running)).await,
    }
}

/// HTTP/2: the header list as RFC 9113 6.5.2 counts it. Of HTTP/1 hyper has seen to that.
fn too_large(head: &request::Parts) -> bool {
    let size = |(name, value): (&HeaderName, &HeaderValue)| name.as_str().len() + value.len() + 32;
    head.version == Version::HTTP_2 && head.headers.iter().map(size).sum::<usize>() > serve::MAX_HEAD
}

impl Exchange {
    pub(super) fn new(connection: Rc<Connection>, head: &request::Parts) -> Self {
        let labels = &connection.worker.labels;
        Self {
            start: Instant::now(),
            end: None,
            method: head.method.clone(),
            uri: head.uri.clone(),
            host: head.headers.get(HOST).cloned(),
            version: head.version,
            grpc: respond::is_grpc(&head.headers),
            service: labels.unknown.clone(),
            endpoint_version: labels.unknown.clone(),
            route: labels.unknown.clone(),
            upstream: None,
            attempts: 0,
            chain: None,
            deadline: None,
            expects: filtered::expects(head),
            reason: None,
            detail: String::new(),
            status: None,
            sent: 0,
            received: 0,
            uploaded: None,
            access_log: AccessLog::Errors,
            trace: None,
            connection,
        }
    }

    /// The response for what the exchange came to. An error resets the client's stream.
    pub(super) fn conclude(
        self: Box<Self>,
        answer: Result<Answer, Failure>,
        hops: &reply::Hops,
        running: Running,
    ) -> Result<Response<ResponseBody>, BodyError> {
        let mut response = match answer {
            Ok(Answer::Upstream(response, attempt)) => {
                return Ok(self.finish_upstream(response, attempt, hops, running));
            }
            Ok(Answer::Local { response, reason }) => self.local(response, reason),
            Ok(Answer::Filters) => return Err("a filter reset the stream".into()),
            Err(failure) => self.fail(failure),
        };
        hops.restore(&mut response);
        Ok(response.map(|body| ResponseBody::full(body).holding(running)))
    }

    /// The endpoint's proxy has no time for the request: so it is told, once nothing is held that others could use, after a while.
    async fn refused(&self, answer: Result<Answer, Failure>) -> Failure {
        if let Ok(Answer::Upstream(response, attempt)) = answer {
            let deadline = attempt.deadline;
            match response.into_body().take_whole() {
                Some(_) => attempt.succeeded(None, Instant::now()),
                None => drop(attempt),
            }
            shed::hold(&self.connection.worker, deadline).await;
        }
        Reason::Overloaded.into()
    }

    /// The worker has no time for it. It is counted, but not in the access log: that would cost more than the refusal.
    fn refuse(&mut self) -> Failure {
        self.access_log = AccessLog::Off;
        Reason::Overloaded.into()
    }

    /// What an inbound exchange is counted under.
    pub(super) fn begin_inbound(&mut self, snapshot: &Snapshot, port: &InboundPort) {
        let labels = &self.connection.worker.labels;
        self.service = match port.services.first() {
            Some(service) => service.clone(),
            None => labels.workload.clone(),
        };
        self.endpoint_version = labels.version.clone();
        self.begin_outbound(snapshot);
    }

    /// What the mesh says about logging.
    pub(super) fn begin_outbound(&mut self, snapshot: &Snapshot) {
        self.access_log = snapshot.mesh.as_ref().map_or(AccessLog::Errors, |mesh| mesh.access_log);
    }

    /// Continues the trace, or begins one.
    pub(super) fn begin_trace(&mut self, headers: &mut HeaderMap, mesh: Option<&Mesh>) {
        let sampling = mesh.map_or(0, |mesh| mesh.sampling_ppm);
        let worker = &self.connection.worker;
        self.trace = Some(trace::propagate(headers, &mut worker.rng.borrow_mut(), sampling).context.trace);
        match self.connection.way() {
            Way::Inbound => worker.load.inbound_traced.count(),
            Way::Outbound => worker.load.outbound_traced.count(),
        }
    }

    /// Readies the filters of these keys.
    ///
    /// # Errors
    /// A FailClosed one is not ready.
    pub(super) fn chain(&mut self, snapshot: &Snapshot, keys: &[String]) -> Result<(), Failure> {
        if keys.is_empty() {
            return Ok(());
        }
        let missing = |name| Failure::new(Reason::FilterFailed, format!("filter {name} is not ready"));
        let filters = snapshot.filters(keys).map_err(missing)?;
        let mut info = StreamInfo::new(self.connection.clone(), self.start);
        info.service = Some(self.service.clone());
        info.route = Some(self.route.clone());
        self.chain = Some(Chain::of(filters, info));
        Ok(())
    }

    /// Bytes of an upgraded connection.
    pub(super) fn count(&mut self, sent: u64, received: u64) {
        self.sent += sent;
        self.received += received;
    }

    /// Why an exchange ended that had its response already.
    pub(super) fn end_with(&mut self, reason: Reason) {
        self.reason = Some(reason.code());
    }

    /// The mesh's response for a failure.
    fn fail(mut self: Box<Self>, failure: Failure) -> Response<Bytes> {
        let response = respond::respond(failure.reason, self.grpc, &failure.detail);
        self.detail = failure.detail;
        self.local(response, failure.reason)
    }

    fn local(mut self: Box<Self>, response: Response<Bytes>, reason: Reason) -> Response<Bytes> {
        let (mut head, body) = response.into_parts();
        head.headers.insert(respond::REASON, HeaderValue::from_static(reason.code()));
        self.reason = Some(reason.code());
        self.status = Some(head.status);
        self.received = body.len() as u64;
        let response = Response::from_parts(head, body);
        if self.method == Method::HEAD { response.map(|_| Bytes::new()) } else { response }
    }

    /// An endpoint's response as policy lets it in.
    pub(super) fn received(
        &mut self,
        response: Response<Received>,
        attempt: &Attempt,
    ) -> Result<Response<Received>, Failure> {
        let (mut head, body) = response.into_parts();
        let direction = match self.connection.way() {
            Way::Outbound => Direction::Outbound,
            Way::Inbound => Direction::Inbound,
        };
        normalize::response(&mut head, direction, attempt.trusted())
            .map_err(|reason| Failure::new(reason, "its Transfer-Encoding is not `chunked`"))?;
        if head.status == StatusCode::SWITCHING_PROTOCOLS && attempt.upgrade.is_none() {
            return Err(Failure::new(Reason::UpstreamProtocol, "the endpoint switched protocols unasked"));
        }
        self.reason = reply::reason(&head);
        attempt.modify(&mut head);
        Ok(Response::from_parts(head, body))
    }

    fn finish_upstream(
        mut self: Box<Self>,
        response: Response<Received>,
        attempt: Box<Attempt>,
        hops: &reply::Hops,
        running: Running,
    ) -> Response<ResponseBody> {
        let response = match self.received(response, &attempt) {
            Ok(response) => response,
            Err(failure) => {
                attempt.failed();
                return self.fail(failure).map(|body| ResponseBody::full(body).holding(running));
            }
        };
        self.status = Some(response.status());
        let (head, body) = response.into_parts();
        let mut response = Response::from_parts(head, ());
        hops.restore(&mut response);
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            return self.upgrade(response, attempt, running);
        }
        let deadline = attempt.deadline;
        let tail = ExchangeTail::new(self, Some(attempt));
        response.map(|()| ResponseBody::upstream(body, tail, deadline).holding(running))
    }

    /// Both sides have agreed to speak something else.
    pub(super) fn upgrade(
        self: Box<Self>,
        response: Response<()>,
        mut attempt: Box<Attempt>,
        running: Running,
    ) -> Response<ResponseBody> {
        if let Some(client) = attempt.upgrade.take()
            && let Some(server) = attempt.switch()
        {
            upgrade::start(self, attempt, (client, server), running);
        }
        response.map(|()| ResponseBody::full(Bytes::new()))
    }

    fn authority(&self) -> &str {
        let uri = self.uri.authority().map(::http::uri::Authority::as_str);
        uri.or_else(|| self.host.as_ref()?.to_str().ok()).unwrap_or_default()
    }

    /// The rule that a request is sent by.
    pub(super) fn select(&mut self, rule: &Rule) {
        self.deadline = rule.policy.request_timeout.map(|timeout| self.start + timeout);
        // Behind filters it is chosen again, as a rule the same one.
        if Arc::ptr_eq(&self.route, &rule.name) {
            return;
        }
        self.route = rule.name.clone();
        if let Some(chain) = &self.chain {
            chain.info(|info| info.route = Some(rule.name.clone()));
        }
    }

    fn write_log(&self, status: u16, reason: &str, now: Instant) {
        let wanted = match self.access_log {
            AccessLog::Off => false,
            AccessLog::All => true,
            AccessLog::Errors => status >= 500 || status == 0 || !reason.is_empty(),
        };
        if !wanted {
            return;
        }
        let connection = &self.connection;
        let entry = Entry {
            direction: connection.way().name(),
            protocol: respond::version(self.version),
            method: self.method.as_str(),
            authority: self.authority(),
            path: self.uri.path(),
            status,
            reason,
            detail: &self.detail,
            service: &self.service,
            version: &self.endpoint_version,
            upstream: self.upstream,
            client: Some(connection.client()),
            peer: connection.peer().map_or("", |peer| peer.as_str()),
            route: &self.route,
            attempts: self.attempts,
            duration: now.saturating_duration_since(self.start),
            sent: self.sent + self.uploaded.as_ref().map_or(0, |sent| sent.get()),
            received: self.received,
            trace: self.trace,
        };
        connection.worker.log.write(&entry, now);
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        if let Some(chain) = self.chain.take() {
            chain.done();
            // Its fields are cleared for another message.
            if let Some(headers) = chain.forget_request().and_then(|mut head| head.spare_headers()) {
                http1::keep_headers(headers);
            }
        }
        // The end of the response's body, or this moment.
        let now = self.end.unwrap_or_else(Instant::now);
        let metrics = &self.connection.worker.metrics;
        let reason = self.reason.unwrap_or_default();
        let way = Known::Word(self.connection.way().name());
        let (service, version) = (Known::Shared(&self.service), Known::Shared(&self.endpoint_version));
        // Without a status the client went away first.
        let labels = [way, service, version, Known::Status(self.status), Known::Word(reason)];
        metrics.add_known(Metric::Requests, labels, 1);
        if self.connection.way() == Way::Inbound {
            let peer = self.connection.peer().map_or("none", |peer| peer.as_str());
            metrics.add(Metric::PeerRequests, &[peer], 1);
        }
        // An upgraded connection's life is no latency.
        if self.status != Some(StatusCode::SWITCHING_PROTOCOLS) {
            let took = now.saturating_duration_since(self.start);
            metrics.record_known(Metric::Duration, [way, service, version], took);
        }
        let status = self.status.map_or(0, |status| status.as_u16());
        self.write_log(status, reason, now);
    }
}

/// Watches the response's body for the exchange and its last attempt.
pub(super) struct ExchangeTail {
    /// Until it ends. Dropped before the exchange, which counts the request
    attempt: Option<Box<Attempt>>,
    exchange: Box<Exchange>,
}

impl ExchangeTail {
    pub(super) fn new(exchange: Box<Exchange>, attempt: Option<Box<Attempt>>) -> Self {
        Self { attempt, exchange }
    }
}

impl Tail for ExchangeTail {
    fn data(&mut self, bytes: usize) {
        self.exchange.received += bytes as u64;
    }

    fn end(&mut self, trailers: Option<&HeaderMap>) {
        let now = Instant::now();
        self.exchange.end = Some(now);
        if let Some(attempt) = self.attempt.take() {
            attempt.succeeded(trailers, now);
        }
    }

    fn broken(&mut self, error: &BodyError) {
        if upstream::is_of_the_request(error) {
            // What the client broke off itself ends as what it gives up.
            return;
        }
        self.exchange.reason = Some(Reason::UpstreamReset.code());
        self.exchange.detail.push_str(BROKEN_OFF);
        if let Some(attempt) = self.attempt.take() {
            attempt.failed();
        }
    }

    fn timed_out(&mut self) {
        self.exchange.reason = Some(Reason::RequestTimeout.code());
        if let Some(attempt) = self.attempt.take() {
            attempt.failed();
        }
    }
}
