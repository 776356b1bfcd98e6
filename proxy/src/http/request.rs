//! A request as it goes to an endpoint: its head in the form of the next hop, its body as often as it is needed.

use ::http::header::{EXPECT, HOST, TE};
use ::http::uri::{Authority, PathAndQuery, Scheme};
use ::http::{HeaderMap, HeaderValue, Request, Uri, Version, request};
use http_body::Body;
use hyper::upgrade::OnUpgrade;
use outrigger_core::link::Protocol;
use outrigger_core::normalize::Canonical;

use super::body::{ClientBody, ReplayBuffer, RequestBody, Sent};
use super::made::Made;
use crate::filter::RequestHead;
use crate::upstream::Wire;
use crate::upstream::http1::{self, Head};

/// Bytes of a body that are kept for another attempt.
const REPLAY: usize = 64 * 1024;

/// A request that is about to be sent.
#[derive(Debug)]
pub(super) struct Outgoing {
    pub(super) head: RequestHead,
    pub(super) body: Sendable,
    pub(super) upgrade: Option<OnUpgrade>,
    /// What went of the body, if there is one
    pub(super) sent: Option<Sent>,
    /// There is no other attempt, whatever happens, unless the request comes back unsent
    pub(super) once: bool,
    /// The headers went with an attempt over HTTP/2
    gone: bool,
    trailers: bool,
}

/// A request's body, before and between attempts.
#[derive(Debug)]
pub(super) enum Sendable {
    /// There is none
    Empty,
    /// Can be sent once; `None`: it was
    Once(Option<ClientBody>),
    /// Can be sent again while it fits the buffer
    Replay(ReplayBuffer),
    /// Of a call-out
    Made(Made),
}

impl Sendable {
    pub(super) fn new(body: ClientBody) -> Self {
        if body.is_end_stream() { Self::Empty } else { Self::Once(Some(body)) }
    }

    /// Before the first attempt: whether there may be another one.
    pub(super) fn prepare(&mut self, again: bool) {
        if let Self::Once(body) = self
            && again
            && let Some(body) = body.take()
        {
            *self = Self::Replay(ReplayBuffer::new(body, REPLAY));
        }
    }

    /// Whether an attempt could have the whole body now.
    fn replayable(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Once(body) => body.is_some(),
            Self::Replay(buffer) => buffer.can_replay(),
            Self::Made(body) => body.can_replay(),
        }
    }

    pub(super) fn take_back(&mut self, body: RequestBody) {
        if let Self::Once(place) = self {
            *place = body.into_client();
        }
    }

    fn take(&mut self) -> Option<RequestBody> {
        match self {
            Self::Empty => Some(RequestBody::empty()),
            Self::Once(body) => body.take().map(RequestBody::client),
            Self::Replay(buffer) => buffer.can_replay().then(|| buffer.attempt()),
            Self::Made(body) => body.attempt().map(RequestBody::made),
        }
    }
}

/// What to speak to an endpoint of a declared protocol: where none is declared, what the client speaks.
pub(super) fn wire(protocol: Protocol, client: Version) -> Wire {
    match protocol {
        Protocol::Http1 => Wire::Http1,
        Protocol::Http2 => Wire::Http2,
        Protocol::Detect | Protocol::Tcp if client == Version::HTTP_2 => Wire::Http2,
        Protocol::Detect | Protocol::Tcp => Wire::Http1,
    }
}

impl Outgoing {
    /// From a normalised request.
    pub(super) fn new(head: RequestHead, canonical: &Canonical, body: ClientBody, upgrade: Option<OnUpgrade>) -> Self {
        let upgrade = upgrade.filter(|_| canonical.upgrade);
        Self::of(head, Sendable::new(body), upgrade, canonical)
    }

    /// From a normalised head and a body that the proxy makes.
    pub(super) fn made(head: request::Parts, canonical: &Canonical, body: Made) -> Self {
        let body = if body.is_end() { Sendable::Empty } else { Sendable::Made(body) };
        Self::of(head.into(), body, None, canonical)
    }

    fn of(head: RequestHead, body: Sendable, upgrade: Option<OnUpgrade>, canonical: &Canonical) -> Self {
        let sent = (!matches!(body, Sendable::Empty)).then(Sent::default);
        Self { head, body, upgrade, sent, once: false, gone: false, trailers: canonical.trailers }
    }

    /// Whether an attempt could have the whole request now.
    pub(super) fn replayable(&self) -> bool {
        !self.gone && self.body.replayable()
    }

    /// This one was not sent over HTTP/2.
    pub(super) fn take_back(&mut self, request: Request<RequestBody>) {
        let (mut head, body) = request.into_parts();
        self.body.take_back(body);
        if std::mem::take(&mut self.gone) {
            // HTTP/2 has it in the URI; what else was made for the hop is made again.
            if let Some(host) = head.uri.authority().filter(|_| !head.headers.contains_key(HOST)).and_then(host) {
                head.headers.insert(HOST, host);
            }
            self.head.headers = head.headers;
        }
    }

    /// The body of one attempt. `None`: it is gone.
    pub(super) fn attempt(&mut self) -> Option<RequestBody> {
        let body = if self.gone { None } else { self.body.take() }?;
        let body = match &self.sent {
            Some(sent) => body.counted(sent.clone()),
            None => body,
        };
        // With `Expect: 100-continue` the client's body is asked for only when the endpoint asks for it.
        let expect = self.head.headers.get(EXPECT).filter(|_| !body.is_end_stream());
        let waits = expect.is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"));
        Some(if waits { body.held() } else { body })
    }

    /// The head of an attempt over HTTP/1.
    pub(super) fn http1(&self) -> Head<'_> {
        Head {
            method: &self.head.method,
            uri: &self.head.uri,
            headers: &self.head.headers,
            upgrade: self.upgrade.is_some(),
            trailers: self.trailers,
        }
    }

    /// The request of an attempt over HTTP/2.
    pub(super) fn http2(&mut self, body: RequestBody) -> Request<RequestBody> {
        let mut request = Request::new(body);
        *request.method_mut() = self.head.method.clone();
        *request.headers_mut() = self.headers();
        self.address(&mut request);
        if self.trailers {
            request.headers_mut().insert(TE, HeaderValue::from_static("trailers"));
        }
        request
    }

    /// The headers of one attempt: a copy only where there may be another.
    fn headers(&mut self) -> HeaderMap {
        if self.once || matches!(self.body, Sendable::Once(_)) {
            self.gone = true;
            return self.head.take_headers();
        }
        self.head.headers.clone()
    }

    fn address(&self, request: &mut Request<RequestBody>) {
        *request.version_mut() = Version::HTTP_2;
        let path = self.head.uri.path_and_query().cloned().unwrap_or(PathAndQuery::from_static("/"));
        let mut parts = ::http::uri::Parts::default();
        parts.authority = authority(&self.head.uri, request.headers());
        // Without an authority there can be no scheme in a `Uri`; normalisation has seen to it that there is one.
        parts.scheme = parts.authority.is_some().then_some(Scheme::HTTP);
        parts.path_and_query = Some(path);
        if let Ok(uri) = Uri::from_parts(parts) {
            *request.uri_mut() = uri;
        }
        request.headers_mut().remove(HOST);
    }
}

fn host(authority: &Authority) -> Option<HeaderValue> {
    HeaderValue::from_str(authority.as_str()).ok()
}

/// The authority of a request of either version.
pub(super) fn authority(uri: &Uri, headers: &HeaderMap) -> Option<Authority> {
    let written = headers.get(HOST).and_then(|host| Authority::try_from(host.as_bytes()).ok());
    written.or_else(|| uri.authority().cloned())
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        if let Some(headers) = self.head.spare_headers() {
            http1::keep_headers(headers);
        }
    }
}
