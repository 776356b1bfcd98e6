//! The filters of one exchange, in order.

use std::rc::Rc;
use std::sync::Arc;

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, Response, request, response};

use super::{Action, Filter, FilterState, Heads, Outcome, Plugin, Stream, StreamInfo};

/// The filters of one exchange. Lives on one worker: it holds that worker's instances.
///
/// Request filters run in order, response filters in reverse; [`Chain::done`] ends every filter exactly once, and dropping
/// the chain does the same with what is known by then. A chain of no filters allocates nothing.
pub struct Chain {
    filters: Vec<Box<dyn Filter>>,
    /// Filters whose request callback ran: only these see the response when the request phase was cut short.
    reached: usize,
    /// The request phase ended early: later filters never saw the request.
    cut: bool,
    grpc: bool,
    info: Rc<StreamInfo>,
    heads: Rc<Heads>,
    state: FilterState,
    done: bool,
}

impl std::fmt::Debug for Chain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Chain")
            .field("filters", &self.filters.len())
            .field("reached", &self.reached)
            .finish_non_exhaustive()
    }
}

impl Chain {
    /// The chain of some prepared filters, in the order in which the request meets them.
    pub fn new(plugins: &[Arc<Plugin>], info: StreamInfo) -> Self {
        Self::of(plugins.iter().map(Plugin::filter).collect(), info)
    }

    /// A chain of any filters.
    pub fn of(filters: Vec<Box<dyn Filter>>, info: StreamInfo) -> Self {
        Self {
            filters,
            reached: 0,
            cut: false,
            grpc: false,
            info: Rc::new(info),
            heads: Rc::default(),
            state: FilterState::default(),
            done: false,
        }
    }

    /// True: every call is a no-op.
    pub fn is_empty(&self) -> bool {
        self.filters.is_empty()
    }

    /// Facts that become known later (upstream, route).
    pub fn info_mut(&mut self) -> &mut StreamInfo {
        Rc::make_mut(&mut self.info)
    }

    /// Runs the request filters. `Respond`, `Failed` and `Reset` end the request phase: nothing goes upstream, and
    /// [`Chain::response_headers`] must not be called for a `Respond`, whose response filters have run already.
    pub fn request_headers(&mut self, head: &mut request::Parts, end_of_stream: bool) -> Outcome {
        if self.filters.is_empty() {
            return Outcome::Continue;
        }
        self.grpc = is_grpc(&head.headers);
        let mut action = Action::Continue;
        for filter in &mut self.filters {
            self.reached += 1;
            let mut stream = Stream { info: &self.info, heads: &self.heads, state: &mut self.state };
            action = filter.request_headers(head, end_of_stream, &mut stream);
            if !matches!(action, Action::Continue) {
                self.cut = true;
                break;
            }
        }
        if self.filters.iter().any(|filter| filter.keeps_request()) {
            self.keep(|heads| heads.request = Some(Box::new(copy_request(head))));
        }
        match action {
            Action::Respond(local) => {
                let (mut head, body) = local.into_head(self.grpc);
                let end = body.is_empty();
                self.respond(&mut head, end, Some(body))
            }
            Action::Continue => Outcome::Continue,
            Action::Failed { filter, reason } => Outcome::Failed { filter, reason },
            Action::Reset => Outcome::Reset,
        }
    }

    /// Runs the response filters, last first, on the response that is about to be sent. `Respond` replaces it.
    pub fn response_headers(&mut self, head: &mut response::Parts, end_of_stream: bool) -> Outcome {
        if self.filters.is_empty() {
            return Outcome::Continue;
        }
        self.respond(head, end_of_stream, None)
    }

    fn respond(&mut self, head: &mut response::Parts, end_of_stream: bool, mut local: Option<Bytes>) -> Outcome {
        let mut end = end_of_stream;
        for filter in self.filters.iter_mut().take(self.reached).rev() {
            let mut stream = Stream { info: &self.info, heads: &self.heads, state: &mut self.state };
            match filter.response_headers(head, end, &mut stream) {
                Action::Continue => {}
                Action::Respond(response) => {
                    let (replacement, body) = response.into_head(self.grpc);
                    *head = replacement;
                    end = body.is_empty();
                    local = Some(body);
                }
                Action::Failed { filter, reason } => return Outcome::Failed { filter, reason },
                Action::Reset => return Outcome::Reset,
            }
        }
        if self.filters.iter().any(|filter| filter.keeps_response()) {
            self.keep(|heads| heads.response = Some(Box::new(copy_response(head))));
        }
        let Some(body) = local else { return Outcome::Continue };
        let mut response = Response::new(body);
        *response.status_mut() = head.status;
        *response.headers_mut() = std::mem::take(&mut head.headers);
        Outcome::Respond(response)
    }

    /// Callbacks share the copies only while they run.
    fn keep(&mut self, set: impl FnOnce(&mut Heads)) {
        if let Some(heads) = Rc::get_mut(&mut self.heads) {
            set(heads);
        }
    }

    /// True: a filter cut the request phase short.
    pub fn was_cut(&self) -> bool {
        self.cut
    }

    /// The exchange is over: every filter logs and is deleted.
    pub fn done(mut self) {
        self.finish();
    }

    fn finish(&mut self) {
        if std::mem::replace(&mut self.done, true) {
            return;
        }
        for filter in &mut self.filters {
            filter.log(&mut Stream { info: &self.info, heads: &self.heads, state: &mut self.state });
        }
        for filter in &mut self.filters {
            filter.done();
        }
    }
}

impl Drop for Chain {
    fn drop(&mut self) {
        self.finish();
    }
}

/// Whether a request is gRPC: `content-type: application/grpc`, with or without a suffix.
fn is_grpc(headers: &HeaderMap) -> bool {
    let Some(rest) = headers.get(CONTENT_TYPE).and_then(|value| value.as_bytes().strip_prefix(b"application/grpc"))
    else {
        return false;
    };
    matches!(rest.first(), None | Some(b'+' | b';'))
}

fn copy_request(head: &request::Parts) -> request::Parts {
    let (mut copy, ()) = http::Request::new(()).into_parts();
    copy.method = head.method.clone();
    copy.uri = head.uri.clone();
    copy.version = head.version;
    copy.headers = head.headers.clone();
    copy
}

fn copy_response(head: &response::Parts) -> response::Parts {
    let (mut copy, ()) = http::Response::new(()).into_parts();
    copy.status = head.status;
    copy.version = head.version;
    copy.headers = head.headers.clone();
    copy
}
