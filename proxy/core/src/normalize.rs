//! One canonical form of every request, and header hygiene of both directions. Every later decision reads what this
//! leaves.

use http::header::{self, HeaderName};
use http::uri::{Authority, PathAndQuery};
use http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, Version, request, response};

use crate::reason::Reason;
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
    /// The peer for the application, see [`xfcc`]; inbound only
    pub xfcc: Option<&'a HeaderValue>,
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
    /// A websocket is asked for
    pub upgrade: bool,
    /// The client takes trailers
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

/// `traceparent` and the like are end to end, and so is what frames or addresses the message: a `Connection` header
/// that names one of these is a mistake or an attack, and is not obeyed.
const KEPT: [&str; 12] = [
    "authorization",
    "content-encoding",
    "content-length",
    "content-type",
    "cookie",
    "expect",
    "host",
    "set-cookie",
    "te",
    "traceparent",
    "tracestate",
    "trailer",
];

/// Hop-by-hop in both directions. `Connection`, `Upgrade`, `TE` and `Transfer-Encoding` have rules of their own;
/// `Trailer` stays, since trailers pass and hyper writes only those that are announced.
static HOP: [HeaderName; 3] = [
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    HeaderName::from_static("http2-settings"),
];

const XFCC: HeaderName = HeaderName::from_static("x-forwarded-client-cert");

/// Normalises a request head. Afterwards:
/// - there is exactly one `Host`; the URI is in origin form (HTTP/1) or has an authority equal to `Host` (HTTP/2);
/// - hop-by-hop headers and those that `Connection` names are gone, but for `TE: trailers` where the client takes
///   trailers, and `Connection: upgrade` with `Upgrade: websocket` where it asks for that;
/// - `Transfer-Encoding` is gone: the framing of the next hop is its own;
/// - inbound, what only the mesh may say is gone, and `x-forwarded-client-cert` is the verified peer;
/// - with [`Rules::path_rules`] the path is canonical.
///
/// # Errors
/// The reason for which the request is refused.
pub fn request(head: &mut request::Parts, rules: &Rules<'_>) -> Result<Canonical, Reason> {
    if head.method == Method::CONNECT {
        return Err(Reason::ConnectRefused);
    }
    host(head)?;
    let present = Present::of(&head.headers);
    if present.has(Present::TRANSFER_ENCODING) {
        transfer_encoding(head.version, &mut head.headers).map_err(|()| Reason::BadRequest)?;
    }
    if present.has(Present::CONTENT_LENGTH) {
        content_length(&mut head.headers)?;
    }
    let upgrade = present.has(Present::UPGRADE) && upgrade(head)?;
    let trailers = present.has(Present::TE) && te(&mut head.headers);
    hop_by_hop(&mut head.headers, present);
    if upgrade {
        head.headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        head.headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    }
    if rules.direction == Direction::Inbound {
        inbound(&mut head.headers, rules, present);
    }
    let path = canonical_path(head, rules.path_rules)?;
    Ok(Canonical { path, is_grpc: is_grpc(head), upgrade, trailers })
}

/// Which headers that rules are about a message came with: one pass over its names tells which rules need not look.
#[derive(Debug, Clone, Copy)]
struct Present(u16);

impl Present {
    const CONNECTION: u16 = 1;
    const UPGRADE: u16 = 1 << 1;
    const TE: u16 = 1 << 2;
    const TRANSFER_ENCODING: u16 = 1 << 3;
    const CONTENT_LENGTH: u16 = 1 << 4;
    /// One of [`HOP`]
    const HOP: u16 = 1 << 5;
    /// One of the mesh's own
    const OURS: u16 = 1 << 6;
    /// What says who called whom, and on whose behalf
    const ORIGIN: u16 = 1 << 7;

    fn of(headers: &HeaderMap) -> Self {
        let bit = |name: &HeaderName| match name.as_str() {
            "connection" => Self::CONNECTION,
            "upgrade" => Self::UPGRADE,
            "te" => Self::TE,
            "transfer-encoding" => Self::TRANSFER_ENCODING,
            "content-length" => Self::CONTENT_LENGTH,
            "keep-alive" | "proxy-connection" | "http2-settings" => Self::HOP,
            "forwarded" | "l5d-client-id" => Self::ORIGIN,
            name if name.starts_with(OURS) => Self::OURS,
            name if name.starts_with(FORWARDED) => Self::ORIGIN,
            _ => 0,
        };
        Self(headers.keys().fold(0, |bits, name| bits | bit(name)))
    }

    fn has(self, any: u16) -> bool {
        self.0 & any != 0
    }
}

/// Normalises a request head again, of which filters changed method, path or authority. Headers are left alone: what the first
/// time took away came from outside, what is there now comes from filters of one's own.
///
/// # Errors
/// The reason for which the request is refused.
pub fn again(head: &mut request::Parts, path_rules: bool, before: &Canonical) -> Result<Canonical, Reason> {
    if head.method == Method::CONNECT {
        return Err(Reason::ConnectRefused);
    }
    if before.upgrade && head.method != Method::GET {
        return Err(Reason::BadRequest);
    }
    host(head)?;
    let path = canonical_path(head, path_rules)?;
    Ok(Canonical { path, is_grpc: is_grpc(head), ..*before })
}

/// The canonical path, unless the path is it already or, with path rules, has been made it.
fn canonical_path(head: &mut request::Parts, path_rules: bool) -> Result<Option<String>, Reason> {
    let mut path = path::canonical(head.uri.path(), path_rules)?;
    if path_rules && let Some(new) = path.take() {
        set_path(&mut head.uri, new)?;
    }
    Ok(path)
}

/// Normalises a response head: hop-by-hop headers go; so does `x-outrigger-*`, unless a proxy of the mesh says it.
///
/// # Errors
/// [`Reason::UpstreamProtocol`] for a transfer coding other than `chunked`.
pub fn response(head: &mut response::Parts, direction: Direction, from_mesh_peer: bool) -> Result<(), Reason> {
    let present = Present::of(&head.headers);
    if present.has(Present::TRANSFER_ENCODING) {
        transfer_encoding(head.version, &mut head.headers).map_err(|()| Reason::UpstreamProtocol)?;
    }
    hop_by_hop(&mut head.headers, present);
    if head.status == StatusCode::SWITCHING_PROTOCOLS {
        head.headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        head.headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    }
    if present.has(Present::OURS) && (direction == Direction::Inbound || !from_mesh_peer) {
        remove_where(&mut head.headers, |name| name.starts_with(OURS));
    }
    Ok(())
}

/// The prefix of headers that only the mesh writes.
const OURS: &str = "x-outrigger-";
/// The prefix of what proxies say of where a request came from; [`XFCC`] begins with it too.
const FORWARDED: &str = "x-forwarded-";

/// The value of `x-forwarded-client-cert` for a verified peer; made once per connection.
pub fn xfcc(own: &SpiffeId, peer: &SpiffeId) -> HeaderValue {
    // A SPIFFE ID has no character that a header must not have.
    HeaderValue::try_from(format!("By={own};URI={peer}")).unwrap_or(HeaderValue::from_static(""))
}

fn host(head: &mut request::Parts) -> Result<(), Reason> {
    let mut hosts = head.headers.get_all(header::HOST).iter();
    let (first, second) = (hosts.next(), hosts.next());
    if second.is_some() {
        return Err(Reason::BadRequest);
    }
    match (first, head.uri.authority()) {
        (Some(host), authority) => {
            let equal = |one: &Authority| one.as_str().as_bytes().eq_ignore_ascii_case(host.as_bytes());
            if !is_authority(host.as_bytes()) || !authority.is_none_or(equal) {
                return Err(Reason::BadRequest);
            }
        }
        // HTTP/2 has the authority in the URI; HTTP/1 must say Host.
        (None, Some(authority)) if head.version == Version::HTTP_2 && is_authority(authority.as_str().as_bytes()) => {
            let host = HeaderValue::from_str(authority.as_str()).map_err(|_| Reason::BadRequest)?;
            head.headers.insert(header::HOST, host);
        }
        _ => return Err(Reason::BadRequest),
    }
    if head.version != Version::HTTP_2 && head.uri.authority().is_some() {
        // Without a scheme it is the authority form, which only CONNECT has.
        if head.uri.scheme().is_none() {
            return Err(Reason::BadRequest);
        }
        let path = head.uri.path_and_query().cloned().unwrap_or(PathAndQuery::from_static("/"));
        head.uri = Uri::from(path);
    }
    Ok(())
}

/// Host and port, without user information. Anything that two readers could read differently is refused.
fn is_authority(text: &[u8]) -> bool {
    !text.is_empty() && text.iter().all(|b| b.is_ascii_alphanumeric() || b"-._~:[]%!$&'()*+;=".contains(b))
}

/// Takes `Transfer-Encoding` away; with it there must be no `Content-Length` (RFC 9112 6.3).
fn transfer_encoding(version: Version, headers: &mut HeaderMap) -> Result<(), ()> {
    let mut codings = headers.get_all(header::TRANSFER_ENCODING).iter();
    let Some(first) = codings.next() else { return Ok(()) };
    let chunked = first.as_bytes().trim_ascii().eq_ignore_ascii_case(b"chunked");
    if !chunked || codings.next().is_some() || version != Version::HTTP_11 {
        return Err(());
    }
    headers.remove(header::TRANSFER_ENCODING);
    headers.remove(header::CONTENT_LENGTH);
    Ok(())
}

/// Equal ones become one; a list, or two that differ, have no meaning.
fn content_length(headers: &mut HeaderMap) -> Result<(), Reason> {
    let mut lengths = headers.get_all(header::CONTENT_LENGTH).iter();
    let Some(first) = lengths.next() else { return Ok(()) };
    let mut more = false;
    let same = lengths.all(|other| {
        more = true;
        other == first
    });
    if !same || first.is_empty() || !first.as_bytes().iter().all(u8::is_ascii_digit) {
        return Err(Reason::BadRequest);
    }
    if more {
        let first = first.clone();
        headers.insert(header::CONTENT_LENGTH, first);
    }
    Ok(())
}

/// Whether a websocket is asked for. Offers to go on with another version of HTTP are passed over, as RFC 9110 7.8
/// permits; of any other protocol the client would be left in doubt, so it is told.
fn upgrade(head: &request::Parts) -> Result<bool, Reason> {
    let asked = tokens(&head.headers, &header::CONNECTION).any(|token| token.eq_ignore_ascii_case("upgrade"));
    if !asked || head.version != Version::HTTP_11 || !head.headers.contains_key(header::UPGRADE) {
        return Ok(false);
    }
    let mut offers = tokens(&head.headers, &header::UPGRADE);
    if offers.any(|offer| offer.eq_ignore_ascii_case("websocket")) {
        return if head.method == Method::GET { Ok(true) } else { Err(Reason::BadRequest) };
    }
    let is_http = |offer: &str| {
        let name = offer.split('/').next().unwrap_or(offer);
        ["h2c", "h2", "http", "tls"].iter().any(|known| name.eq_ignore_ascii_case(known))
    };
    if tokens(&head.headers, &header::UPGRADE).all(is_http) { Ok(false) } else { Err(Reason::UpgradeRefused) }
}

/// Leaves `TE: trailers` or nothing.
fn te(headers: &mut HeaderMap) -> bool {
    if !headers.contains_key(header::TE) {
        return false;
    }
    let trailers = tokens(headers, &header::TE).any(|token| token.eq_ignore_ascii_case("trailers"));
    if trailers {
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
    } else {
        headers.remove(header::TE);
    }
    trailers
}

fn hop_by_hop(headers: &mut HeaderMap, present: Present) {
    if present.has(Present::CONNECTION) {
        let named = |token: &str| match token {
            // The two that nearly every Connection header says.
            "keep-alive" | "close" => None,
            other => HeaderName::from_bytes(other.as_bytes()).ok().filter(|name| !KEPT.contains(&name.as_str())),
        };
        let named: Vec<HeaderName> = tokens(headers, &header::CONNECTION).filter_map(named).collect();
        for name in named {
            headers.remove(name);
        }
        headers.remove(header::CONNECTION);
    }
    if present.has(Present::UPGRADE) {
        headers.remove(header::UPGRADE);
    }
    if present.has(Present::HOP) {
        for name in &HOP {
            headers.remove(name);
        }
    }
}

/// The elements of a list, over all headers of a name.
fn tokens<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(str::trim).filter(|token| !token.is_empty())
}

fn inbound(headers: &mut HeaderMap, rules: &Rules<'_>, present: Present) {
    if present.has(Present::OURS | Present::ORIGIN) {
        let trusted = rules.peer.is_some_and(|peer| rules.forwarders.contains(peer));
        remove_where(headers, |name| {
            name.starts_with(OURS)
                || name == XFCC.as_str()
                || name == "l5d-client-id"
                || (!trusted && (name == "forwarded" || name.starts_with(FORWARDED)))
        });
    }
    if let (Some(_), Some(xfcc)) = (rules.peer, rules.xfcc) {
        headers.insert(XFCC, xfcc.clone());
    }
}

fn remove_where(headers: &mut HeaderMap, unwanted: impl Fn(&str) -> bool) {
    let unwanted: Vec<HeaderName> = headers.keys().filter(|name| unwanted(name.as_str())).cloned().collect();
    for name in unwanted {
        headers.remove(name);
    }
}

fn set_path(uri: &mut Uri, mut path: String) -> Result<(), Reason> {
    if let Some(query) = uri.query() {
        path.push('?');
        path.push_str(query);
    }
    let mut parts = std::mem::take(uri).into_parts();
    parts.path_and_query = Some(PathAndQuery::try_from(path).map_err(|_| Reason::BadRequest)?);
    *uri = Uri::from_parts(parts).map_err(|_| Reason::BadRequest)?;
    Ok(())
}

/// `application/grpc`, `application/grpc+proto`, `application/grpc; …`; gRPC-Web is not gRPC.
fn is_grpc(head: &request::Parts) -> bool {
    if head.method != Method::POST {
        return false;
    }
    let kind =
        head.headers.get(header::CONTENT_TYPE).and_then(|value| value.as_bytes().strip_prefix(b"application/grpc"));
    kind.is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
}

#[cfg(test)]
mod tests;
