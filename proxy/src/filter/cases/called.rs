//! The services that filters call, played by the case: what they answer, and what they were asked.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::LocalBoxFuture;
use http::{HeaderMap, Response, header, request};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use outrigger_core::reason::Reason;

use super::drive::{fields, response_head, seen_fields};
use super::model::{Reply, Service};
use super::observe::SeenRequest;
use crate::filter::{Answer, AnswerBody, CallOut, Outside};
use crate::http::{Made, is_grpc, respond};

/// Services, and what came to them, in order.
#[derive(Default)]
pub(super) struct Called {
    services: RefCell<BTreeMap<String, Service>>,
    seen: RefCell<Vec<Rc<RefCell<SeenRequest>>>>,
}

impl Called {
    /// From now on these answer.
    pub(super) fn play(&self, services: &BTreeMap<String, Service>) {
        self.services.borrow_mut().clone_from(services);
    }

    /// How many requests came so far.
    pub(super) fn count(&self) -> usize {
        self.seen.borrow().len()
    }

    /// The requests that came since the last time.
    pub(super) fn take(&self) -> Vec<SeenRequest> {
        self.seen.take().iter().map(|seen| seen.borrow().clone()).collect()
    }

    fn note(&self, upstream: &str, head: &request::Parts, body: Made) {
        let mut headers = head.headers.clone();
        let authority = headers.get(header::HOST).map(|host| String::from_utf8_lossy(host.as_bytes()).into_owned());
        // Framing, as a client writes it.
        let (data, trailers) = match &body {
            Made::Whole { data, trailers } => (data.clone(), trailers.clone()),
            Made::Fed(_) => (Bytes::new(), None),
        };
        if trailers.is_none() && !data.is_empty() {
            headers.insert(header::CONTENT_LENGTH, data.len().into());
        }
        let seen = Rc::new(RefCell::new(SeenRequest {
            server: Some(upstream.to_owned()),
            method: head.method.to_string(),
            path: head.uri.path_and_query().map(ToString::to_string).unwrap_or_default(),
            authority: authority.unwrap_or_default(),
            headers: seen_fields(&headers),
            body: data.to_vec(),
            trailers: trailers.as_ref().map(seen_fields).unwrap_or_default(),
        }));
        self.seen.borrow_mut().push(Rc::clone(&seen));
        // What a stream sends comes while the case goes on.
        if let Made::Fed(Some(feed)) = body {
            tokio::task::spawn_local(async move {
                let mut body = Made::Fed(Some(feed));
                while let Some(frame) = std::future::poll_fn(|cx| body.poll_frame(cx)).await {
                    if let Ok(data) = frame.into_data() {
                        seen.borrow_mut().body.extend_from_slice(&data);
                    }
                }
            });
        }
    }
}

impl Outside for Called {
    fn send(&self, call: CallOut) -> LocalBoxFuture<'static, Answer> {
        let CallOut { upstream, head, body, timeout, .. } = call;
        let service = self.services.borrow().get(&upstream).cloned();
        // Where nobody listens nothing arrives.
        if matches!(service, Some(Service::Reply(_) | Service::Reset)) {
            self.note(&upstream, &head, body);
        }
        let grpc = is_grpc(&head.headers);
        Box::pin(async move {
            let reason = match service {
                Some(Service::Reply(reply)) if !reply.hang => return Ok(answer(&reply)),
                Some(Service::Reply(_)) => {
                    tokio::time::sleep(timeout.min(Duration::from_secs(3600))).await;
                    Reason::RequestTimeout
                }
                Some(Service::Refused) => Reason::ConnectFailure,
                Some(Service::Reset) => Reason::UpstreamReset,
                None => Reason::UnknownService,
            };
            Ok(respond(reason, grpc, "").map(|body| stream(vec![Frame::data(body)])))
        })
    }
}

fn answer(reply: &Reply) -> Response<AnswerBody> {
    let mut frames: Vec<Frame<Bytes>> =
        reply.body.iter().map(|chunk| Frame::data(Bytes::from(chunk.bytes()))).collect();
    let trailers: HeaderMap = fields(&reply.trailers);
    if !trailers.is_empty() {
        frames.push(Frame::trailers(trailers));
    }
    Response::from_parts(response_head(reply), stream(frames))
}

fn stream(frames: Vec<Frame<Bytes>>) -> AnswerBody {
    let frames = frames.into_iter().filter(|frame| frame.data_ref().is_none_or(|data| !data.is_empty()));
    let frames = futures_util::stream::iter(frames.map(Ok::<_, Infallible>));
    Box::pin(StreamBody::new(frames).map_err(|never| match never {}))
}
