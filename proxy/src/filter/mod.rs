//! Filters: what stands between a message and its way. One trait for native and WASM filters, a [`Chain`] per exchange, and the
//! registry of prepared WASM filters ([`Plugins`]).
//!
//! Callbacks are synchronous and never block; waiting is a pause and a resume. See "Filters" in `docs/architecture.md`.

mod buffer;
pub mod cases;
mod chain;
mod cohort;
mod head;
mod info;
mod local;
mod plugin;
mod report;
mod stream;
#[cfg(test)]
mod tests;
mod view;
pub mod wasm;
mod way;

pub use buffer::Buffer;
pub use chain::{Chain, Frame, Stop};
pub use cohort::next_turn;
pub use head::RequestHead;
pub use info::{ConnectionFacts, FilterState, StaticConnection, StreamInfo};
pub use local::LocalResponse;
pub use plugin::{Compiler, FilterError, Plugin, Plugins, Settings};
pub use report::{Health, StatusRow, prometheus};
pub use stream::{At, Edits, Filters, Flow, Rewritten, Stream};
pub(crate) use view::Next;
pub use view::{Facts, HeadMut, HeadRef, View, Which};
pub use wasm::{Answer, AnswerBody, CallOut, Outside, connect, release_unused, warm};

/// Bytes that a filter may make of a body, in one write or in many.
pub const WRITE_LIMIT: usize = 16 * 1024 * 1024;
/// Bytes of a body that are held for a filter that does not say otherwise.
pub const BODY_LIMIT: usize = 64 * 1024;

/// What comes to a filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A head; of TCP (only in the direction of the request) the new connection
    Headers {
        /// Nothing follows it
        end: bool,
    },
    /// Body bytes: a chunk, or all that was gathered since the filter paused
    Body {
        /// How many may be read now
        size: usize,
        /// Nothing follows them
        end: bool,
    },
    /// Trailers, which are the end
    Trailers,
    /// TCP: the side that sends in this direction is gone
    Closed(Peer),
}

/// Who closed a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// Nobody knows
    Unknown = 0,
    /// This proxy
    Local = 1,
    /// The other end
    Remote = 2,
}

/// What one filter says after a callback.
#[derive(Debug)]
pub enum Action {
    /// The message goes on
    Continue,
    /// It stays until [`View::resume`], and body bytes until the next callback continues
    Pause,
    /// This is the response
    Respond(Box<LocalResponse>),
    /// The filter failed and its policy is FailClosed
    Failed(Box<Failed>),
    /// The filter wants the client's stream reset
    Reset,
}

/// A FailClosed filter that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failed {
    /// `<namespace>/<name>` of the filter
    pub filter: String,
    /// What went wrong, for the log
    pub reason: String,
}

/// Which callbacks a filter has: what it does not have is not made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools, reason = "one per callback")]
pub struct Interest {
    /// [`Event::Body`] of requests, or what the client sends
    pub request_body: bool,
    /// [`Event::Trailers`] of requests
    pub request_trailers: bool,
    /// [`Event::Body`] of responses, or what the server sends
    pub response_body: bool,
    /// [`Event::Trailers`] of responses
    pub response_trailers: bool,
    /// It reads the request's head after the request phase (the chain then shares it with those who send it)
    pub keeps_request: bool,
    /// It reads the response's head when it logs
    pub keeps_response: bool,
}

impl Interest {
    /// The filter has something to do with bodies (or their end) of a direction.
    pub fn in_body(self, flow: Flow) -> bool {
        match flow {
            Flow::Request => self.request_body || self.request_trailers,
            Flow::Response => self.response_body || self.response_trailers,
        }
    }
}

/// One filter's part in one exchange or connection.
///
/// In each direction come headers, body any number of times, trailers; any of it may be missing. `log` and `done` come exactly once, in
/// this order, whatever happened before: also to a filter that the exchange never reached.
pub trait Filter {
    /// Something comes to the filter. The message is in `view`.
    fn on(&mut self, flow: Flow, event: Event, view: &View) -> Action;

    /// The exchange is over. Heads are read-only.
    fn log(&mut self, view: &View);

    /// The last call: gives back what the filter held for this exchange.
    fn done(&mut self, view: &View);

    /// Both at once, of a filter that is alone in its exchange.
    fn log_and_done(&mut self, view: &View) {
        self.log(view);
        self.done(view);
    }

    /// `<namespace>/<name>`
    fn name(&self) -> &str;

    /// Which callbacks it has.
    fn interest(&self) -> Interest {
        Interest::default()
    }

    /// Bytes of a body that are held while it pauses.
    fn body_limit(&self) -> usize {
        BODY_LIMIT
    }

    /// What it runs in has ended since its last callback: what the exchange does without it. Asked after [`Stream::notify`].
    fn lost(&mut self, _view: &View) -> Option<Action> {
        None
    }
}
