//! The world outside an instance: calls that it makes and their answers, its timer, words from other workers.
//!
//! An instance notes what it wants while a callback runs ([`Order`]); when the callback has returned, tasks of the same worker do it and
//! come back by [`Instance::call`]. They hold instances weakly: who is gone hears nothing.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::{Rc, Weak};
use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};
use futures_util::future::LocalBoxFuture;
use http::{HeaderMap, Response};
use http_body::Body;
use http_body_util::BodyExt as _;

use super::super::Plugin;
use super::callouts::{BODY, Kind, Order, Outgoing};
use super::host::Delivery;
use super::instance::{Failure, Instance};
use crate::http::{Made, Place};

/// Shortest time until an instance is started in the place of one that failed.
const AGAIN: Duration = Duration::from_millis(10);
/// How much later than a gRPC call's time the worker gives up by itself.
const LATE: Duration = Duration::from_secs(1);

/// The body of an answer.
pub type AnswerBody = std::pin::Pin<Box<dyn Body<Data = Bytes, Error = Box<dyn std::error::Error + Send + Sync>>>>;
/// An answer: what a client of the mesh would get. An error: the stream was reset.
pub type Answer = Result<Response<AnswerBody>, Box<dyn std::error::Error + Send + Sync>>;

/// A request that a filter makes.
#[derive(Debug)]
pub struct CallOut {
    /// Name of the upstream, as the filter wrote it
    pub upstream: String,
    /// The service that it stands for
    pub(crate) place: Place,
    /// Head
    pub head: http::request::Parts,
    /// Body
    pub(crate) body: Made,
    /// Until the response's head: one that is late is answered in its place
    pub timeout: Duration,
}

/// Makes the calls of a worker's filters.
pub trait Outside {
    /// Sends a request. Dropping the future, or the answer's body, ends the call.
    fn send(&self, call: CallOut) -> LocalBoxFuture<'static, Answer>;
}

thread_local! {
    static OUTSIDE: RefCell<Option<Rc<dyn Outside>>> = const { RefCell::new(None) };
}

/// Lets the calling thread's filters make calls, and have timers and queues: from now on tasks are spawned on its `LocalRuntime` or
/// `LocalSet`. Without this, what they ask for is never done. `None`: no more.
pub fn connect(outside: Option<Rc<dyn Outside>>) {
    OUTSIDE.set(outside);
}

fn outside() -> Option<Rc<dyn Outside>> {
    OUTSIDE.with_borrow(Clone::clone)
}

/// The tasks of one instance.
#[derive(Debug, Default)]
pub(super) struct Tasks {
    /// Timers by root context
    timers: HashMap<u32, tokio::task::AbortHandle>,
    bell: Option<tokio::task::AbortHandle>,
}

impl Drop for Tasks {
    fn drop(&mut self) {
        // Timers see for themselves, and start another instance if one is wanted.
        if let Some(bell) = &self.bell {
            bell.abort();
        }
    }
}

impl Tasks {
    /// Does what an instance wants.
    pub(super) fn dispatch(&mut self, instance: &Rc<Instance>, orders: Vec<Order>) {
        let Some(outside) = outside() else { return };
        for order in orders {
            match order {
                Order::Tick { root, period } => self.tick(instance, root, period),
                Order::Call(call) => {
                    let id = call.id;
                    let task = make(Rc::downgrade(instance), Rc::clone(&outside), call);
                    let abort = tokio::task::spawn_local(task).abort_handle();
                    instance.calls(|calls| calls.started(id, abort));
                }
            }
        }
    }

    fn tick(&mut self, instance: &Rc<Instance>, root: u32, period: Option<Duration>) {
        if let Some(timer) = self.timers.remove(&root) {
            timer.abort();
        }
        if let Some(period) = period {
            let task = tick(Rc::downgrade(instance), root, period);
            self.timers.insert(root, tokio::task::spawn_local(task).abort_handle());
        }
    }

    /// Hears what other workers leave for the instance.
    pub(super) fn listen(&mut self, instance: &Rc<Instance>) {
        if self.bell.is_none() && outside().is_some() {
            self.bell = Some(tokio::task::spawn_local(listen(Rc::downgrade(instance))).abort_handle());
        }
    }

    /// A root context is gone.
    pub(super) fn forget(&mut self, root: u32) {
        if let Some(timer) = self.timers.remove(&root) {
            timer.abort();
        }
    }
}

async fn tick(instance: Weak<Instance>, root: u32, period: Duration) {
    let plugin = instance.upgrade().map(|instance| instance.plugin(root)).unwrap_or_default();
    loop {
        tokio::time::sleep(period).await;
        if !instance.upgrade().is_some_and(|instance| instance.tick(root)) {
            return restart(plugin).await;
        }
    }
}

/// Starts an instance in the place of one that failed, as soon as it may: what a timer or a queue would do does not wait for a request.
async fn restart(plugin: std::sync::Weak<Plugin>) {
    loop {
        let Some(wait) = plugin.upgrade().map(|plugin| plugin.wait()) else { return };
        tokio::time::sleep(wait.max(AGAIN)).await;
        let Some(plugin) = plugin.upgrade() else { return };
        if super::instances::acquire(&plugin).is_ok() {
            return;
        }
    }
}

async fn listen(instance: Weak<Instance>) {
    let Some(inbox) = instance.upgrade().and_then(|instance| instance.inbox()) else { return };
    loop {
        inbox.bell.notified().await;
        let Some(listening) = instance.upgrade() else { return };
        if listening.dead() {
            let plugins = listening.listeners();
            drop(listening);
            futures_util::future::join_all(plugins.into_iter().map(restart)).await;
            return;
        }
        drop(listening);
        while let Some((root, queue)) = inbox.next() {
            let Some(instance) = instance.upgrade() else { return };
            instance.queue_ready(root, queue);
            drop(instance);
            // Others' turn: whoever enqueues in the callback must not keep the worker.
            tokio::task::yield_now().await;
        }
    }
}

/// Makes a call and tells what comes of it.
async fn make(instance: Weak<Instance>, outside: Rc<dyn Outside>, call: Box<Outgoing>) {
    let Outgoing { id, root, kind, upstream, place, head, body, timeout } = *call;
    let deadline = tokio::time::Instant::now() + timeout;
    // A gRPC call that is late has a status of its own, which is told here: before it comes as a response.
    let head_timeout = if kind == Kind::Call { timeout + LATE } else { timeout };
    let sending = outside.send(CallOut { upstream, place, head, body, timeout: head_timeout });
    let of = Caller { instance, root, id };
    match kind {
        // No head in time is a response too (504), so only the rest is waited for here.
        Kind::Http => {
            let answer = match sending.await {
                Ok(response) => tokio::time::timeout_at(deadline, gather(response)).await.ok().and_then(Result::ok),
                Err(_) => None,
            };
            of.http(answer);
        }
        Kind::Call => {
            let answer = tokio::time::timeout_at(deadline, async { gather(sending.await?).await }).await;
            of.unary(answer.map_err(|_| GrpcStatus::new(4, "the call's time is over")));
        }
        Kind::Stream => of.stream(sending.await).await,
    }
}

type Gathered = (http::response::Parts, Bytes, HeaderMap);
type Error = Box<dyn std::error::Error + Send + Sync>;

/// A whole response, within a megabyte.
async fn gather(response: Response<AnswerBody>) -> Result<Gathered, Error> {
    let (head, mut body) = response.into_parts();
    let (mut data, mut trailers) = (BytesMut::new(), HeaderMap::new());
    while let Some(frame) = body.frame().await {
        match frame?.into_data() {
            Ok(bytes) if data.len() + bytes.len() > BODY => return Err("the response is too long".into()),
            Ok(bytes) => data.extend_from_slice(&bytes),
            Err(frame) => trailers = frame.into_trailers().unwrap_or_default(),
        }
    }
    Ok((head, data.freeze(), trailers))
}

/// How a gRPC call ended.
#[derive(Debug, Clone, PartialEq, Eq)]
struct GrpcStatus {
    code: u32,
    message: String,
}

impl GrpcStatus {
    fn new(code: u32, message: &str) -> Self {
        Self { code, message: message.to_owned() }
    }

    /// What fields say: `grpc-status` and `grpc-message`.
    fn of(fields: &HeaderMap) -> Option<Self> {
        let code = fields.get("grpc-status")?.to_str().ok()?.parse().ok()?;
        let message = fields
            .get("grpc-message")
            .map(|message| percent_encoding::percent_decode(message.as_bytes()).decode_utf8_lossy().into_owned());
        Some(Self { code, message: message.unwrap_or_default() })
    }

    /// Of a response without a status of its own.
    fn of_http(head: &http::response::Parts) -> Self {
        Self { code: super::super::local::grpc_from_http(head.status), message: head.status.to_string() }
    }
}

/// Takes the first whole message out of gRPC's framing. `Err`: compressed or too long.
fn unframe(buffer: &mut BytesMut) -> Result<Option<Bytes>, GrpcStatus> {
    let Some((flag, length)) = buffer.first().copied().zip(buffer.get(1..5)) else { return Ok(None) };
    let length = u32::from_be_bytes(length.try_into().unwrap_or_default());
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    if flag != 0 {
        return Err(GrpcStatus::new(12, "a compressed message, which was not asked for"));
    }
    if length > BODY {
        return Err(GrpcStatus::new(8, "a message above a megabyte"));
    }
    if buffer.len() < 5 + length {
        return Ok(None);
    }
    buffer.advance(5);
    Ok(Some(buffer.split_to(length).freeze()))
}

/// Whose call it is.
struct Caller {
    instance: Weak<Instance>,
    root: u32,
    id: u32,
}

impl Caller {
    /// Tells it, if the call is still waited for. `last`: nothing follows. False: nobody hears it.
    fn tell(
        &self,
        last: bool,
        delivery: Delivery,
        tell: impl FnOnce(&Instance, Delivery) -> Result<(), Failure>,
    ) -> bool {
        let Some(instance) = self.instance.upgrade() else { return false };
        let waited = instance.calls(|calls| if last { calls.ended(self.id) } else { calls.is_pending(self.id) });
        if waited != Some(true) {
            return false;
        }
        match tell(&instance, delivery) {
            Ok(()) => true,
            Err(failure) => {
                instance.report(self.root, failure);
                false
            }
        }
    }

    fn http(&self, answer: Option<Gathered>) {
        let delivery = match answer {
            Some((head, body, trailers)) => {
                let status = u32::from(head.status.as_u16());
                let message = head.status.canonical_reason().unwrap_or_default().to_owned();
                Delivery {
                    head: Some(head),
                    fields: Some((7, trailers)),
                    body: Some((4, body)),
                    status: Some((status, message)),
                }
            }
            None => Delivery { status: Some((0, "reset".into())), ..Delivery::default() },
        };
        self.tell(true, delivery, |instance, delivery| instance.http_answer(self.root, self.id, delivery));
    }

    /// Of a call: its one message, or why there is none.
    fn unary(&self, answer: Result<Result<Gathered, Error>, GrpcStatus>) {
        let outcome = answer.and_then(|answer| {
            let (head, body, trailers) = answer.map_err(|error| GrpcStatus::new(14, &error.to_string()))?;
            let status = GrpcStatus::of(&trailers).or_else(|| GrpcStatus::of(&head.headers));
            match status.unwrap_or_else(|| GrpcStatus::of_http(&head)) {
                GrpcStatus { code: 0, .. } => unframe(&mut BytesMut::from(&body[..]))?
                    .ok_or_else(|| GrpcStatus::new(13, "an answer without a message")),
                failed => Err(failed),
            }
        });
        match outcome {
            Ok(message) => {
                self.message(true, message);
            }
            Err(status) => self.close(status),
        }
    }

    fn message(&self, last: bool, message: Bytes) -> bool {
        let delivery = Delivery { body: Some((5, message)), status: Some((0, String::new())), ..Delivery::default() };
        self.tell(last, delivery, |instance, delivery| instance.grpc_message(self.root, self.id, delivery))
    }

    fn metadata(&self, map: u32, fields: HeaderMap) -> bool {
        let delivery = Delivery { fields: Some((map, fields)), ..Delivery::default() };
        self.tell(false, delivery, |instance, delivery| instance.grpc_metadata(self.root, self.id, map, delivery))
    }

    fn close(&self, status: GrpcStatus) {
        let code = status.code;
        let delivery = Delivery { status: Some((code, status.message)), ..Delivery::default() };
        self.tell(true, delivery, |instance, delivery| instance.grpc_close(self.root, self.id, code, delivery));
    }

    /// Of a stream: everything as it comes.
    async fn stream(&self, answer: Answer) {
        let status = match answer {
            Ok(response) => self.follow(response).await,
            Err(error) => Some(GrpcStatus::new(14, &error.to_string())),
        };
        if let Some(status) = status {
            self.close(status);
        }
    }

    /// `None`: nobody listens any more.
    async fn follow(&self, response: Response<AnswerBody>) -> Option<GrpcStatus> {
        let (head, mut body) = response.into_parts();
        if head.status != http::StatusCode::OK {
            return Some(GrpcStatus::of(&head.headers).unwrap_or_else(|| GrpcStatus::of_http(&head)));
        }
        if let Some(status) = GrpcStatus::of(&head.headers) {
            // Trailers only.
            return self.metadata(5, head.headers).then_some(status);
        }
        if !self.metadata(4, head.headers) {
            return None;
        }
        let mut buffer = BytesMut::new();
        while let Some(frame) = body.frame().await {
            let frame = match frame {
                Ok(frame) => frame,
                Err(error) => return Some(GrpcStatus::new(14, &error.to_string())),
            };
            match frame.into_data() {
                Ok(bytes) => buffer.extend_from_slice(&bytes),
                Err(frame) => {
                    let trailers = frame.into_trailers().unwrap_or_default();
                    let status = GrpcStatus::of(&trailers).unwrap_or_else(|| GrpcStatus::new(2, "no grpc-status"));
                    return self.metadata(5, trailers).then_some(status);
                }
            }
            loop {
                let message = match unframe(&mut buffer) {
                    Ok(None) => break,
                    Ok(Some(message)) => message,
                    Err(status) => return Some(status),
                };
                if !self.message(false, message) {
                    return None;
                }
            }
        }
        Some(GrpcStatus::new(13, "the stream ended without a status"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_cut_out_of_their_frames() {
        let mut buffer = BytesMut::from(&[0, 0, 0, 0, 2, b'a', b'b', 0, 0, 0, 0, 0, 0, 0, 0][..]);
        assert_eq!(unframe(&mut buffer), Ok(Some(Bytes::from_static(b"ab"))));
        assert_eq!(unframe(&mut buffer), Ok(Some(Bytes::new())));
        assert_eq!(unframe(&mut buffer), Ok(None));
        assert_eq!(unframe(&mut BytesMut::from(&[1, 0, 0, 0, 0][..])).unwrap_err().code, 12);
        assert_eq!(unframe(&mut BytesMut::from(&[0, 255, 0, 0, 0][..])).unwrap_err().code, 8);
    }
}
