//! The filters of one exchange, in order: a machine without IO. What comes in is pushed, what comes out is taken; see "Filters" in
//! `docs/architecture.md`.

mod run;

use std::rc::Rc;
use std::sync::Arc;
use std::task::Waker;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, StatusCode, request, response};

use super::stream::{At, Waiter};
use super::way::{End, Way};
use super::{Failed, FilterState, Filters, Flow, Peer, Plugin, RequestHead, Rewritten, Stream, StreamInfo};

/// What comes out of a chain behind a head.
#[derive(Debug)]
pub enum Frame {
    /// Body bytes, never empty
    Data(Bytes),
    /// Trailers, and the end
    Trailers(HeaderMap),
    /// The end
    End,
}

/// Why the exchange does not go on as it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stop {
    /// A filter answered: its response comes out of the chain. Nothing (more) of the request does
    Local,
    /// 503 `filter-failed`, made by the caller and given to [`Chain::replace_response`]
    Failed(Box<Failed>),
    /// A filter held more of a body than it may: 413 or 500, likewise
    TooLarge(Flow),
    /// Reset the client's stream
    Reset,
}

/// The filters of one exchange. Lives on one worker: it holds that worker's instances. Clones are handles to the same chain.
///
/// Request filters run in order, response filters in reverse. [`Chain::done`] ends every filter exactly once, and dropping the last handle
/// does the same with what is known by then.
pub struct Chain(pub(super) Rc<Stream>);

impl std::fmt::Debug for Chain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Chain")
    }
}

impl Clone for Chain {
    fn clone(&self) -> Self {
        self.0.handles.set(self.0.handles.get() + 1);
        Self(Rc::clone(&self.0))
    }
}

impl Drop for Chain {
    fn drop(&mut self) {
        let others = self.0.handles.get() - 1;
        self.0.handles.set(others);
        // Views may outlive it; the exchange is over all the same.
        if others == 0 {
            self.0.finish();
        }
    }
}

impl Chain {
    /// The chain of some prepared filters, in the order in which the request meets them.
    pub fn new(plugins: &[Arc<Plugin>], info: StreamInfo) -> Self {
        Self::of(plugins.iter().map(Plugin::filter).collect(), info)
    }

    /// A chain of any filters.
    pub fn of(filters: Filters, info: StreamInfo) -> Self {
        Self(Rc::new(Stream::new(filters, info, false)))
    }

    /// A chain for an opaque connection.
    pub fn tcp(filters: Filters, info: StreamInfo) -> Self {
        Self(Rc::new(Stream::new(filters, info, true)))
    }

    /// Facts that become known later (upstream, route).
    pub fn info<R>(&self, f: impl FnOnce(&mut StreamInfo) -> R) -> R {
        f(&mut self.0.data().info)
    }

    /// Properties that filters set.
    pub fn properties<R>(&self, f: impl FnOnce(&FilterState) -> R) -> R {
        f(&self.0.data().state)
    }

    /// Some filter has something to do with bodies of a direction, or holds one.
    pub fn in_body(&self, flow: Flow) -> bool {
        self.0.data().slots.iter().any(|slot| slot.interest.in_body(flow))
    }

    /// The request begins.
    pub fn request_headers(&self, head: request::Parts, end: bool) {
        self.0.data().begin_request(Rc::new(head), end);
        self.0.advance(Flow::Request);
    }

    /// The request begins; true: its head has passed all filters at once, and is where it was.
    pub async fn pass_request(&self, head: &mut RequestHead, end: bool) -> bool {
        self.0.data().begin_request(head.take(), end);
        self.run(Flow::Request).await;
        let mut data = self.0.data();
        data.stop.is_none() && data.take_request().map(|(passed, _)| *head = passed).is_some()
    }

    /// The request's head, once it has passed all filters; and whether nothing follows it.
    pub fn take_request(&self) -> Option<(RequestHead, bool)> {
        self.0.data().take_request()
    }

    /// What filters could read of the request: they cannot any more.
    pub fn forget_request(&self) -> Option<RequestHead> {
        self.0.data().request.take().map(RequestHead::Shared)
    }

    /// What filters wrote of the request.
    pub fn rewritten(&self) -> Rewritten {
        Rewritten::of(&self.0.data().slots)
    }

    /// The response begins: of the upstream, or made by the mesh.
    pub fn response_headers(&self, head: response::Parts, end: bool) {
        self.begin_response(head, end);
        self.0.run(Flow::Response);
    }

    /// The same; filters hear of it by [`Chain::run`].
    pub fn begin_response(&self, head: response::Parts, end: bool) {
        self.0.data().begin_response(usize::MAX, head, end);
    }

    /// The response begins, and all of its body has come with it: filters hear of it by [`Chain::run`], and [`Chain::end_whole`] says what became
    /// of it. A filter that is alone hears of everything at once, as long as it goes on, and the head has left in between; `touch` is the
    /// mesh's last one of the head then, and is told the length of the body.
    pub fn begin_whole(&self, head: response::Parts, body: Bytes, touch: fn(&mut response::Parts, usize)) {
        let mut data = self.0.data();
        data.begin_response(usize::MAX, head, false);
        data.way(Flow::Response).set_rest(body);
        data.touch = Some(touch);
    }

    /// The body, if the exchange is over with that; its head is for [`Chain::take_response_head`]. Otherwise, what remains is for [`Chain::pour`].
    pub fn end_whole(&self) -> Option<Bytes> {
        let mut data = self.0.data();
        data.touch = None;
        if data.logging { data.way(Flow::Response).take_whole() } else { None }
    }

    /// Gives the filters what came with the response's head.
    pub fn pour(&self) {
        loop {
            let rest = self.0.data().way(Flow::Response).take_rest();
            let Some((bytes, end)) = rest else { return };
            self.0.input(Flow::Response, bytes, end, false);
        }
    }

    /// A whole response of the mesh's own, instead of whatever was on its way. Filters that have begun with a response do not see it. False:
    /// a response's head has been sent.
    pub fn replace_response(&self, head: response::Parts, body: Bytes) -> bool {
        {
            let mut data = self.0.data();
            if data.head_sent {
                return false;
            }
            data.way(Flow::Request).cut = true;
            data.answer(usize::MAX, head, body);
        }
        self.0.run(Flow::Response);
        true
    }

    /// The response's head, once it has passed the filters; and whether nothing follows it. Filters that may read it later have a copy.
    pub fn take_response(&self) -> Option<(response::Parts, bool)> {
        let taken = self.release_response()?;
        self.keep_response(&taken.0);
        Some(taken)
    }

    /// The same without a copy: to be followed by [`Chain::keep_response`] or [`Chain::done_with`].
    pub fn release_response(&self) -> Option<(response::Parts, bool)> {
        let mut data = self.0.data();
        let end = data.let_go_response()?;
        Some((data.response.take()?, end))
    }

    /// The same, but the head stays until [`Chain::take_response_head`]: its status. Again where that has happened since [`Chain::begin_whole`].
    pub fn let_go_response(&self) -> Option<StatusCode> {
        let mut data = self.0.data();
        if !data.head_sent {
            data.let_go_response()?;
        }
        data.response.as_ref().map(|head| head.status)
    }

    /// The head that [`Chain::let_go_response`] left.
    pub fn take_response_head(&self) -> Option<response::Parts> {
        self.0.data().response.take()
    }

    /// The exchange is over before the response's head leaves: with a last touch of the mesh's it is logged. It stays until
    /// [`Chain::take_response_head`].
    pub fn finish_response(&self, touch: impl FnOnce(&mut response::Parts)) {
        self.0.data().response.as_mut().map(touch);
        self.0.finish();
    }

    /// The response's head leaves before the exchange is over.
    pub fn keep_response(&self, head: &response::Parts) {
        let mut data = self.0.data();
        if data.slots.iter().any(|slot| slot.interest.keeps_response) {
            data.response_kept = Some(Box::new(head.clone()));
        }
    }

    /// The exchange is over before the response's head leaves: filters log what there is, and it is given back.
    pub fn done_with(&self, head: response::Parts) -> Option<response::Parts> {
        self.0.data().response = Some(head);
        self.0.finish();
        self.take_response_head()
    }

    /// Body bytes of a message whose head came before; `end`: nothing follows.
    pub fn data(&self, flow: Flow, bytes: Bytes, end: bool) {
        self.0.input(flow, bytes, end, false);
    }

    /// Trailers, which end the message.
    pub fn trailers(&self, flow: Flow, trailers: HeaderMap) {
        *self.0.data().trailers_mut(flow) = Some(Box::new(trailers));
        self.0.input(flow, Bytes::new(), false, true);
    }

    /// What has come out behind the head.
    pub fn next(&self, flow: Flow) -> Option<Frame> {
        let mut data = self.0.data();
        let way = data.way(flow);
        if let Some(bytes) = way.pop() {
            return Some(Frame::Data(bytes));
        }
        let end = way.out_end.filter(|end| *end != End::Taken)?;
        way.out_end = Some(End::Taken);
        let trailers = data.trailers_mut(flow).take();
        match trailers.filter(|trailers| end == End::Trailers && !trailers.is_empty()) {
            Some(trailers) => Some(Frame::Trailers(*trailers)),
            None => Some(Frame::End),
        }
    }

    /// Everything of a direction has come out, or been cut.
    pub fn ended(&self, flow: Flow) -> bool {
        self.0.data().way(flow).ended()
    }

    /// The length of all that is to come out, where nothing more goes in and no trailers follow.
    pub fn length(&self, flow: Flow) -> Option<usize> {
        self.0.data().way(flow).length()
    }

    /// All that is to come out behind the head, where it is one piece and nothing follows it.
    pub fn take_whole(&self, flow: Flow) -> Option<Bytes> {
        let mut data = self.0.data();
        if data.trailers_mut(flow).is_some() { None } else { data.way(flow).take_whole() }
    }

    /// The response's head has left: it cannot be replaced any more.
    pub fn head_sent(&self) -> bool {
        self.0.data().head_sent
    }

    /// All of a direction has passed the filters, or been cut: no filter hears of it again.
    pub fn passed(&self, flow: Flow) -> bool {
        let mut data = self.0.data();
        let way = data.way(flow);
        way.cut || way.out_end.is_some()
    }

    /// Nothing more of a direction comes out: a filter saw to that.
    pub fn is_cut(&self, flow: Flow) -> bool {
        self.0.data().way(flow).cut
    }

    /// No filter holds or has let go anything behind the head of a direction.
    pub fn is_clear(&self, flow: Flow) -> bool {
        let mut data = self.0.data();
        data.slots.iter().all(|slot| slot.stage(flow).body.is_empty()) && data.way(flow).is_clear()
    }

    /// For the `Trailer` header: names of the trailers that are on their way out.
    pub fn trailer_names(&self, flow: Flow) -> Option<HeaderValue> {
        let mut data = self.0.data();
        let names: Vec<&str> = data.trailers_mut(flow).as_ref()?.keys().map(http::HeaderName::as_str).collect();
        HeaderValue::from_str(&names.join(", ")).ok().filter(|names| !names.is_empty())
    }

    /// Room for more: while filters hold as much as they may, nothing should be read.
    pub fn wants(&self, flow: Flow) -> bool {
        self.wants_beside(flow, 0)
    }

    /// The same where up to `most` bytes may wait to be taken out.
    pub fn wants_beside(&self, flow: Flow, most: usize) -> bool {
        let mut data = self.0.data();
        let way = data.way(flow);
        if way.cut || way.held_out() > most || way.out_end.is_some() {
            return false;
        }
        // The first filter that holds something decides: what is behind it waits in it.
        for step in way.first..data.slots.len() {
            let Some(slot) = data.slots.get(data.index(flow, step)) else { continue };
            let stage = slot.stage(flow);
            match stage.at {
                At::Waiting => return stage.body.len() < slot.body_limit,
                At::Headers if stage.paused => return stage.body.len() < slot.body_limit,
                At::Body if stage.paused => return true,
                At::Trailers if stage.paused => return false,
                _ => {}
            }
        }
        true
    }

    /// Why the exchange does not go on, once.
    pub fn stop(&self) -> Option<Stop> {
        self.0.data().stop.take()
    }

    /// Puts back what [`Chain::stop`] gave.
    pub fn stop_again(&self, stop: Stop) {
        self.0.data().stop = Some(stop);
    }

    /// There is something for [`Chain::stop`].
    pub fn stopped(&self) -> bool {
        self.0.data().stop.is_some()
    }

    /// Does what was asked for from outside the filters' own callbacks. Callers do so whenever they are woken.
    pub fn settle(&self) {
        self.0.settle();
    }

    /// Who waits for what comes out of a direction.
    pub fn register(&self, flow: Flow, waker: &Waker) {
        self.0.register(flow.into(), waker);
    }

    /// Settles, and says whether there is something for [`Chain::stop`]; whoever polls is told when there is.
    pub fn poll_stopped(&self, waker: &Waker) -> bool {
        self.settle();
        let stopped = self.stopped();
        if !stopped {
            self.register_stop(waker);
        }
        stopped
    }

    /// Who waits for [`Chain::stop`].
    pub fn register_stop(&self, waker: &Waker) {
        self.0.register(Waiter::Stop, waker);
    }

    /// TCP: the client has connected.
    pub fn connected(&self) {
        {
            let mut data = self.0.data();
            let head_at = data.slots.len();
            *data.way(Flow::Request) = Way::begun(0, false);
            let way = data.way(Flow::Response);
            *way = Way::begun(0, false);
            (way.head_at, way.head_taken) = (head_at, true);
            for slot in &mut data.slots {
                slot.response.at = At::Body;
            }
        }
        self.0.advance(Flow::Request);
    }

    /// TCP: the new connection has passed all filters.
    pub fn take_connected(&self) -> bool {
        self.0.data().take_head(Flow::Request).is_some()
    }

    /// TCP: the side that sends in a direction is gone.
    pub fn closed(&self, flow: Flow, peer: Peer) {
        self.0.close(flow, peer);
    }

    /// The exchange is over: every filter logs and is deleted.
    pub fn done(&self) {
        self.0.finish();
    }
}
