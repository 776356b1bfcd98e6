//! One exchange through a chain, without sockets: what the client sends and the application answers goes in, and what comes out is
//! noted.

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::{Wake, Waker};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header, request, response};
use tokio::sync::Notify;

use super::model::{Chunk, Reply, Request};
use super::observe::{Headers, Seen, SeenRequest, SeenResponse, pair};
use crate::filter::{Chain, Flow, Frame, Stop};

pub(super) enum Input {
    Data(Bytes),
    Trailers(HeaderMap),
    End,
}

/// What goes into a direction behind its head. HTTP says the end by itself, after the last byte.
pub(super) fn inputs(body: &[Chunk], trailers: &[String]) -> VecDeque<Input> {
    let mut all: VecDeque<Input> = body.iter().map(|chunk| Input::Data(chunk.bytes().into())).collect();
    all.push_back(if trailers.is_empty() { Input::End } else { Input::Trailers(fields(trailers)) });
    all
}

pub(super) fn push(chain: &Chain, flow: Flow, inputs: &mut VecDeque<Input>) -> bool {
    if inputs.is_empty() || !chain.wants(flow) {
        return false;
    }
    match inputs.pop_front() {
        Some(Input::Data(bytes)) => chain.data(flow, bytes, false),
        Some(Input::Trailers(trailers)) => chain.trailers(flow, trailers),
        Some(Input::End) => chain.data(flow, Bytes::new(), true),
        None => return false,
    }
    true
}

/// `name: value` lines as fields; what is none is left out.
pub(super) fn fields(lines: &[String]) -> HeaderMap {
    let field = |line: &String| {
        let (name, value) = pair(line);
        Some((HeaderName::try_from(name).ok()?, HeaderValue::from_str(value?).ok()?))
    };
    lines.iter().filter_map(field).collect()
}

pub(super) fn seen_fields(fields: &HeaderMap) -> Headers {
    let text = |value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    fields.iter().map(|(name, value)| (name.as_str().to_owned(), text(value))).collect()
}

pub(super) fn request_head(request: &Request) -> request::Parts {
    let (mut head, ()) = http::Request::new(()).into_parts();
    head.method = Method::from_bytes(request.method.as_bytes()).unwrap_or_default();
    head.uri = request.path.parse().unwrap_or_default();
    head.headers = fields(&request.headers);
    if let Ok(authority) = HeaderValue::from_str(&request.authority) {
        head.headers.insert(header::HOST, authority);
    }
    head
}

pub(super) fn response_head(reply: &Reply) -> response::Parts {
    let (mut head, ()) = http::Response::new(()).into_parts();
    head.status = StatusCode::from_u16(reply.status).unwrap_or_default();
    head.headers = fields(&reply.headers);
    head
}

pub(super) fn has_body(headers: &HeaderMap, body: &[Chunk], trailers: &[String]) -> bool {
    let something = !body.is_empty() || !trailers.is_empty();
    something && headers.get(header::CONTENT_LENGTH).is_none_or(|length| length.as_bytes() != b"0")
}

struct Exchange<'a> {
    chain: &'a Chain,
    request: VecDeque<Input>,
    response: VecDeque<Input>,
    upstream: Option<SeenRequest>,
    upstream_done: bool,
    answered: bool,
    client: SeenResponse,
    over: bool,
    /// Why filters failed
    notes: Vec<String>,
}

/// Drives an exchange to its end; one that stands `still` for so long is over. `during` runs when the application has the request, before it answers.
pub(super) async fn drive(
    chain: &Chain,
    request: &Request,
    reply: &Reply,
    during: impl Future<Output = ()>,
    still: Duration,
    seen: &mut Seen,
) {
    let mut exchange = Exchange {
        chain,
        request: inputs(&request.body, &request.trailers),
        response: VecDeque::new(),
        upstream: None,
        upstream_done: false,
        answered: false,
        client: SeenResponse::default(),
        over: false,
        notes: Vec::new(),
    };
    let head = request_head(request);
    let body = has_body(&head.headers, &request.body, &request.trailers);
    if !body {
        exchange.request.clear();
    }
    chain.request_headers(head, !body);
    let mut during = Some(during);
    let bell = Arc::<Bell>::default();
    let waker = Waker::from(Arc::clone(&bell));
    let mut gone = false;
    while !exchange.over {
        let mut moved = exchange.request_side() | exchange.response_side();
        if exchange.upstream_done && !exchange.answered {
            if let Some(during) = during.take() {
                during.await;
            }
            exchange.answered = true;
            if !reply.hang {
                exchange.answer(request, reply);
                moved = true;
            }
        }
        moved |= exchange.stopped();
        if moved || exchange.over {
            continue;
        }
        if request.disconnect && exchange.request.is_empty() {
            gone = true;
            break;
        }
        chain.register(Flow::Request, &waker);
        chain.register(Flow::Response, &waker);
        chain.register_stop(&waker);
        if tokio::time::timeout(still, bell.0.notified()).await.is_err() {
            exchange.client.reset = true;
            break;
        }
        chain.settle();
    }
    seen.notes.append(&mut exchange.notes);
    seen.upstream.extend(exchange.upstream.take().filter(|_| exchange.upstream_done));
    if request.method == "HEAD" {
        exchange.client.body.clear();
    }
    seen.response = (!gone).then_some(exchange.client);
}

/// Rings when something may have changed in the chain.
#[derive(Default)]
struct Bell(Notify);

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.0.notify_one();
    }
}

impl Exchange<'_> {
    fn request_side(&mut self) -> bool {
        let mut moved = push(self.chain, Flow::Request, &mut self.request);
        if self.upstream.is_none()
            && let Some((head, end)) = self.chain.take_request()
        {
            let authority = head.headers.get(header::HOST).map(HeaderValue::as_bytes).unwrap_or_default();
            let authority = String::from_utf8_lossy(authority).into_owned();
            self.upstream_done = end;
            self.upstream = Some(SeenRequest {
                server: None,
                method: head.method.to_string(),
                path: head.uri.path_and_query().map(ToString::to_string).unwrap_or_default(),
                authority: head.uri.authority().map_or(authority, ToString::to_string),
                headers: seen_fields(&head.headers),
                ..SeenRequest::default()
            });
            moved = true;
        }
        let Some(upstream) = &mut self.upstream else { return moved };
        while !self.upstream_done
            && let Some(frame) = self.chain.next(Flow::Request)
        {
            moved = true;
            match frame {
                Frame::Data(bytes) => upstream.body.extend_from_slice(&bytes),
                Frame::Trailers(trailers) => {
                    upstream.trailers = seen_fields(&trailers);
                    self.upstream_done = true;
                }
                Frame::End => self.upstream_done = true,
            }
        }
        moved
    }

    fn answer(&mut self, request: &Request, reply: &Reply) {
        let head = response_head(reply);
        let bodiless = request.method == "HEAD" || [204, 304].contains(&reply.status);
        let body = !bodiless && has_body(&head.headers, &reply.body, &reply.trailers);
        if body {
            self.response = inputs(&reply.body, &reply.trailers);
        }
        self.chain.info(|info| info.upstream = Some(([127, 0, 0, 1], 8080).into()));
        self.chain.response_headers(head, !body);
    }

    fn response_side(&mut self) -> bool {
        let mut moved = false;
        if self.client.status == 0
            && let Some((head, end)) = self.chain.take_response()
        {
            self.client.status = head.status.as_u16();
            self.client.headers = seen_fields(&head.headers);
            self.over = end;
            moved = true;
        }
        while !self.over
            && self.client.status != 0
            && let Some(frame) = self.chain.next(Flow::Response)
        {
            moved = true;
            match frame {
                Frame::Data(bytes) => self.client.body.extend_from_slice(&bytes),
                Frame::Trailers(trailers) => {
                    self.client.trailers = seen_fields(&trailers);
                    self.over = true;
                }
                Frame::End => self.over = true,
            }
        }
        // The head goes out before the body comes in, as on a wire.
        moved | push(self.chain, Flow::Response, &mut self.response)
    }

    /// What a proxy does when the exchange cannot go on.
    fn stopped(&mut self) -> bool {
        let status = match self.chain.stop() {
            None => return false,
            Some(Stop::Local) => {
                // What the application had to say is not asked for any more.
                self.response.clear();
                self.request.clear();
                self.answered = true;
                return true;
            }
            Some(Stop::Reset) => {
                self.client.reset = true;
                self.over = true;
                return true;
            }
            Some(Stop::Failed(failed)) => {
                self.notes.push(format!("{} failed: {}", failed.filter, failed.reason));
                StatusCode::SERVICE_UNAVAILABLE
            }
            Some(Stop::TooLarge(Flow::Request)) => StatusCode::PAYLOAD_TOO_LARGE,
            Some(Stop::TooLarge(Flow::Response)) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let (mut head, ()) = http::Response::new(()).into_parts();
        head.status = status;
        self.response.clear();
        self.request.clear();
        self.answered = true;
        if !self.chain.replace_response(head, Bytes::new()) {
            self.client.reset = true;
            self.over = true;
        }
        true
    }
}
