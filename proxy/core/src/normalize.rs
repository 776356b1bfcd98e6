//! One canonical form of every request, and header hygiene of both directions. Every later decision reads what this
//! leaves.

use http::header::{self, HeaderName};
use http::{HeaderMap, HeaderValue, Method, Version, request, response};

use crate::reason::{self, Reason};
use crate::spiffe::SpiffeId;

mod path;
pub mod trace;

pub use path::canonical;

/// Which way a message goes, seen from the application.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From a peer to the application
    Inbound,
    /// From the application to a peer
    Outbound,
}

/// By what rules a request is normalised.
#[derive(Debug, Clone, Copy)]
pub struct Rules<'a> {
    /// Which way it goes
    pub direction: Direction,
    /// Path rules of an AuthorizationPolicy select the workload
    pub path_rules: bool,
    /// Verified peer; inbound only
    pub peer: Option<&'a SpiffeId>,
    /// The proxy's own identity
    pub own_identity: Option<&'a SpiffeId>,
    /// Peers whose forwarding headers are kept
    pub forwarders: &'a [SpiffeId],
}

/// What is found out on the way.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Canonical {
    /// Canonical path without the query; `None`: the path as sent is canonical
    pub path: Option<String>,
    /// The request is gRPC
    pub is_grpc: bool,
    /// A websocket upgrade is asked for: put `Connection: upgrade` and `Upgrade: websocket` on the HTTP/1 request that
    /// is sent on
    pub upgrade: bool,
    /// The client takes trailers (`TE: trailers`): put `TE: trailers` on the request that is sent on
    pub trailers: bool,
}

impl Canonical {
    /// The canonical path of the request this was made from.
    pub fn path<'a>(&'a self, uri: &'a http::Uri) -> &'a str {
        match &self.path {
            Some(path) => path,
            None if uri.path().is_empty() => "/",
            None => uri.path(),
        }
    }
}

/// Normalises a request head.
///
/// # Errors
/// The reason for which the request is refused.
pub fn request(head: &mut request::Parts, rules: &Rules<'_>) -> Result<Canonical, Reason> {
    let _ = (head, rules);
    Ok(Canonical::default())
}

/// Normalises a response head.
pub fn response(head: &mut response::Parts, direction: Direction, from_mesh_peer: bool) {
    let _ = (head, direction, from_mesh_peer);
}
