//! Filters: what stands between a request and its route. One trait for native and WASM filters, a [`Chain`] per
//! exchange, and the registry of prepared WASM filters ([`Plugins`]).
//!
//! Callbacks are synchronous and never block. Bodies and trailers are not given to filters yet.

mod chain;
mod info;
mod local;
mod plugin;
mod report;
pub mod wasm;

pub use chain::Chain;
pub use info::{FilterState, Heads, StreamInfo};
pub use local::LocalResponse;
pub use plugin::{Compiler, FilterError, Plugin, Plugins, Settings};
pub use report::{Health, StatusRow, prometheus};
pub use wasm::{release_unused, warm};

use std::rc::Rc;

use bytes::Bytes;
use http::{Response, request, response};

/// What one filter says after a callback.
#[derive(Debug)]
pub enum Action {
    /// The exchange goes on
    Continue,
    /// This is the response
    Respond(LocalResponse),
    /// The filter failed and its policy is FailClosed
    Failed {
        /// `<namespace>/<name>` of the filter
        filter: String,
        /// What went wrong, for the log
        reason: String,
    },
    /// The filter wants the client's stream reset
    Reset,
}

/// What becomes of the exchange after the chain ran.
#[derive(Debug)]
pub enum Outcome {
    /// It goes on
    Continue,
    /// Send this instead: framing headers are right (for a GET), gRPC mapping is done, and response filters have run
    Respond(Response<Bytes>),
    /// 503 `filter-failed`
    Failed {
        /// `<namespace>/<name>` of the filter
        filter: String,
        /// What went wrong, for the log
        reason: String,
    },
    /// Reset the client's stream
    Reset,
}

/// One filter's part in one exchange.
///
/// The order of calls is `request_headers`, `response_headers`, `log`, `done`; any of the first two may be missing, the last
/// two come exactly once.
pub trait Filter {
    /// The request head, before it is routed to an endpoint. `end_of_stream`: there is no body.
    fn request_headers(&mut self, head: &mut request::Parts, end_of_stream: bool, stream: &mut Stream<'_>) -> Action;

    /// The head of the final response, also of responses that the mesh makes.
    fn response_headers(&mut self, head: &mut response::Parts, end_of_stream: bool, stream: &mut Stream<'_>) -> Action;

    /// The exchange is over; all filters log before the first is [`done`](Filter::done). Heads are copies.
    fn log(&mut self, stream: &mut Stream<'_>);

    /// The last call: gives back what the filter held for this exchange.
    fn done(&mut self);

    /// Whether this filter reads the request head after the request phase (the chain then keeps a copy).
    fn keeps_request(&self) -> bool {
        false
    }

    /// Whether this filter reads the response head in [`Filter::log`] (the chain then keeps a copy).
    fn keeps_response(&self) -> bool {
        false
    }
}

/// What a callback may read beside the head it is given, and the properties that filters of one exchange share.
#[derive(Debug)]
pub struct Stream<'a> {
    /// Facts of the exchange
    pub info: &'a Rc<StreamInfo>,
    /// Copies of the heads, where a filter of the chain asked for them
    pub heads: &'a Rc<Heads>,
    /// Properties that filters set
    pub state: &'a mut FilterState,
}
