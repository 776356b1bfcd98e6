//! The path of a request: one [`serve`] per connection of a client, one `Exchange` per request.

mod attempt;
mod body;
mod callout;
mod calls;
mod exchange;
mod facts;
mod filtered;
mod head;
mod idle;
mod inbound;
mod made;
mod outbound;
mod request;
mod respond;
mod response;
mod serve;
#[cfg(test)]
mod tests;
mod upgrade;

pub(crate) use callout::{Callouts, Place};
pub(crate) use made::{Feed, Made};
pub(crate) use respond::{is_grpc, respond};

pub use body::{ReplayBuffer, RequestBody, ResponseBody};
pub use calls::Calls;
pub use idle::Connections;
pub use serve::serve;

use std::cell::{Cell, OnceCell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};

use ::http::HeaderValue;
use outrigger_core::key::Key;
use outrigger_core::normalize;
use outrigger_core::spiffe::SpiffeId;

use crate::listen::{self, Version};
use crate::tls::Peer;
use crate::worker::Worker;

/// From the application, or to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// From the own application to others
    Outbound,
    /// From others to the own application
    Inbound,
}

impl Way {
    /// In metrics and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
        }
    }
}

/// What is known of a connection before its first request.
#[derive(Debug, Clone)]
pub enum ConnectionInfo {
    /// From the application
    Outbound(listen::Outbound),
    /// To the application
    Inbound(listen::Inbound),
}

/// A connection while it is served.
#[derive(Debug)]
pub(crate) struct Connection {
    info: ConnectionInfo,
    version: Version,
    /// Number in this process
    id: u64,
    worker: Rc<Worker>,
    /// HTTP/1: what the guard has to know
    phase: head::Phase,
    /// What the worker's sweep asks of it
    seat: idle::Seat,
    /// Requests so far
    requests: Cell<u64>,
    /// Exchanges that have not ended
    running: Cell<u32>,
    /// `x-forwarded-client-cert`, made at the first request
    xfcc: OnceCell<Option<HeaderValue>>,
    /// Explicit mode: the last request's `Host`, and what it named
    asked: RefCell<Option<(HeaderValue, Rc<Asked>)>>,
}

/// A destination, and the port that was written with it.
type Asked = (Key, Option<u16>);

/// The number of a client's connection, unique in this process.
pub(crate) fn connection_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl Connection {
    fn new(info: ConnectionInfo, version: Version, worker: Rc<Worker>) -> Self {
        let id = connection_id();
        Self {
            info,
            version,
            id,
            worker,
            phase: head::Phase::default(),
            seat: idle::Seat::default(),
            requests: Cell::new(0),
            running: Cell::new(0),
            xfcc: OnceCell::new(),
            asked: RefCell::default(),
        }
    }

    fn way(&self) -> Way {
        match &self.info {
            ConnectionInfo::Outbound(_) => Way::Outbound,
            ConnectionInfo::Inbound(_) => Way::Inbound,
        }
    }

    fn client(&self) -> SocketAddr {
        match &self.info {
            ConnectionInfo::Outbound(info) => info.client,
            ConnectionInfo::Inbound(info) => info.client,
        }
    }

    /// What the application is told of the peer.
    fn xfcc(&self) -> Option<&HeaderValue> {
        let made = self.xfcc.get_or_init(|| {
            let own = self.worker.proxy.identity.current()?;
            Some(normalize::xfcc(own.spiffe(), self.peer()?))
        });
        made.as_ref()
    }

    /// Where the client meant to go, as far as the connection says.
    fn destination(&self) -> Option<SocketAddr> {
        match &self.info {
            ConnectionInfo::Outbound(info) => info.destination,
            ConnectionInfo::Inbound(info) => Some(info.app.address),
        }
    }

    /// The identity that the client proved.
    fn peer(&self) -> Option<&SpiffeId> {
        match &self.info {
            ConnectionInfo::Outbound(_) => None,
            ConnectionInfo::Inbound(info) => info.identity(),
        }
    }

    /// The same with what it rests on.
    fn proof(&self) -> Option<&Peer> {
        match &self.info {
            ConnectionInfo::Outbound(_) => None,
            ConnectionInfo::Inbound(info) => info.peer.as_deref(),
        }
    }
}
