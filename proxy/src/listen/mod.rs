//! From a listening socket to a connection whose protocol, destination and peer are known.

mod accept;
mod handoff;
mod inbound;
mod original;
mod outbound;
mod peek;

pub use accept::{Accepted, Way, bind};
pub(crate) use accept::{Count, accept, adopt};

use std::net::SocketAddr;
use std::sync::Arc;

use outrigger_core::spiffe::SpiffeId;

use crate::flags::App;
use crate::tls::Peer;

/// What is known of an outbound connection before its first request.
#[derive(Debug, Clone)]
pub struct Outbound {
    /// The application's side
    pub client: SocketAddr,
    /// With interception, where the application meant to connect to: this alone selects the service. Without, each
    /// request's authority does
    pub destination: Option<SocketAddr>,
}

/// What is known of an inbound connection before its first request.
#[derive(Debug, Clone)]
pub struct Inbound {
    /// The caller's side
    pub client: SocketAddr,
    /// The application's port that is meant; declared with --app
    pub app: App,
    /// Who the caller proved to be; `None`: plaintext, or foreign TLS passed through
    pub peer: Option<Arc<Peer>>,
}

impl Inbound {
    /// Identity that the caller proved.
    pub fn identity(&self) -> Option<&SpiffeId> {
        self.peer.as_ref().map(|peer| &peer.identity)
    }
}

/// How an accepted stream is to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// HTTP/1.1
    Http1,
    /// HTTP/2, prior knowledge or ALPN
    Http2,
}
