//! Host functions that call other services: HTTP requests, gRPC calls and streams. A call is only noted here; the worker makes it when the
//! callback has returned, and its answer comes by a callback of the root context.

use std::collections::HashMap;
use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use http::header::{CONTENT_TYPE, HOST, TE};
use http::uri::{Authority, PathAndQuery, Uri};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Version, request};
use prost::Message as _;
use wasmtime::Linker;

use super::abi::{Pair, Status, deserialize_pairs};
use super::calls::{Guest, functions};
use super::headers;
use super::host::{Call, Host, check, give, slice, split, write_u32};
use crate::http::{Feed, Made, Place};

/// Longest body of a call, and longest gRPC message, bytes.
pub(super) const BODY: usize = 1 << 20;
/// Time of a call that names none, and the most that one may name.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);
const MOST_TIMEOUT: Duration = Duration::from_secs(3600);
/// What a message that waits in a stream costs beside its bytes.
const MESSAGE: usize = 64;
/// A gRPC stream ends after this long.
const STREAM_TIME: Duration = Duration::from_secs(24 * 3600);

/// What an instance asks of its worker.
#[derive(Debug)]
pub(super) enum Order {
    /// Tick a root context with this period; `None`: no more
    Tick { root: u32, period: Option<Duration> },
    /// Make a call
    Call(Box<Outgoing>),
}

/// A call that is to be made.
#[derive(Debug)]
pub(super) struct Outgoing {
    pub(super) id: u32,
    pub(super) root: u32,
    pub(super) kind: Kind,
    /// Name of the upstream, as the guest wrote it
    pub(super) upstream: String,
    pub(super) place: Place,
    pub(super) head: request::Parts,
    pub(super) body: Made,
    pub(super) timeout: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Http,
    /// One message, one answer
    Call,
    /// Messages in both directions
    Stream,
}

/// A call that has not ended.
#[derive(Debug)]
struct Pending {
    kind: Kind,
    feed: Option<Feed>,
    /// Bytes of its request
    size: usize,
    /// Aborts the task that makes it
    abort: Option<tokio::task::AbortHandle>,
}

impl Pending {
    /// Bytes that are kept for it.
    fn bytes(&self) -> usize {
        self.size + self.feed.as_ref().map_or(0, |feed| feed.bytes() + MESSAGE * feed.waiting())
    }
}

/// The calls of one instance.
#[derive(Debug, Default)]
pub(super) struct Calls {
    pending: HashMap<u32, Pending>,
    next: u32,
    /// What the worker has to do when the callback has returned
    pub(super) orders: Vec<Order>,
}

impl Calls {
    /// A new id: odd for gRPC calls, even for all else, never 0, and of no call that is outstanding.
    fn id(&mut self, kind: Kind) -> u32 {
        loop {
            self.next = self.next.wrapping_add(1);
            let id = self.next;
            if id != 0 && (id % 2 == 1) == (kind == Kind::Call) && !self.pending.contains_key(&id) {
                return id;
            }
        }
    }

    /// The task that makes a call, so that it can be cancelled.
    pub(super) fn started(&mut self, id: u32, abort: tokio::task::AbortHandle) {
        match self.pending.get_mut(&id) {
            Some(pending) => pending.abort = Some(abort),
            // It was cancelled in the callback that made it.
            None => abort.abort(),
        }
    }

    /// Whether a call is still waited for.
    pub(super) fn is_pending(&self, id: u32) -> bool {
        self.pending.contains_key(&id)
    }

    /// The call is over. False: nobody waits for it.
    pub(super) fn ended(&mut self, id: u32) -> bool {
        self.pending.remove(&id).is_some()
    }

    /// Bytes that are kept for calls.
    pub(super) fn bytes(&self) -> usize {
        self.pending.values().map(Pending::bytes).sum()
    }
}

impl Drop for Calls {
    fn drop(&mut self) {
        for pending in self.pending.values() {
            if let Some(abort) = &pending.abort {
                abort.abort();
            }
        }
    }
}

/// Defines them.
pub(super) fn define(linker: &mut Linker<Host>) -> wasmtime::Result<()> {
    functions! { linker,
        "proxy_set_tick_period_milliseconds" => set_tick_period, (period: u32);
        "proxy_get_status" => get_status, (code: u32, ptr: u32, len: u32);
        "proxy_http_call" => http_call, (up: u32, un: u32, hp: u32, hn: u32, bp: u32, bn: u32, tp: u32, tn: u32, timeout: u32, out: u32);
        "proxy_grpc_call" => grpc_call, (up: u32, un: u32, sp: u32, sn: u32, mp: u32, mn: u32, hp: u32, hn: u32, bp: u32, bn: u32, timeout: u32, out: u32);
        "proxy_grpc_stream" => grpc_stream, (up: u32, un: u32, sp: u32, sn: u32, mp: u32, mn: u32, hp: u32, hn: u32, out: u32);
        "proxy_grpc_send" => grpc_send, (id: u32, p: u32, n: u32, end: u32);
        "proxy_grpc_cancel" => grpc_cancel, (id: u32);
        "proxy_grpc_close" => grpc_close, (id: u32);
    }
    Ok(())
}

fn set_tick_period(caller: Guest<'_, '_>, period: u32) -> Call {
    let host = caller.data_mut();
    let root = host.root_id();
    let period = (period > 0).then(|| Duration::from_millis(period.into()));
    host.calls.orders.retain(|order| !matches!(order, Order::Tick { root: of, .. } if *of == root));
    host.calls.orders.push(Order::Tick { root, period });
    Ok(())
}

fn get_status(caller: Guest<'_, '_>, code: u32, ptr: u32, len: u32) -> Call {
    let status = caller.data().delivery.as_ref().and_then(|delivery| delivery.status.clone());
    let (status, message) = status.unwrap_or_default();
    write_u32(caller, code, status)?;
    give(caller, message.as_bytes(), ptr, len)
}

#[allow(clippy::too_many_arguments, reason = "the ABI's")]
fn http_call(
    caller: Guest<'_, '_>,
    up: u32,
    un: u32,
    hp: u32,
    hn: u32,
    bp: u32,
    bn: u32,
    tp: u32,
    tn: u32,
    timeout: u32,
    out: u32,
) -> Call {
    check(caller, out, 4)?;
    let (memory, host) = split(caller)?;
    let upstream = slice(memory, up, un)?;
    let pairs = deserialize_pairs(slice(memory, hp, hn)?).ok_or(Status::BadArgument)?;
    let body = slice(memory, bp, bn)?;
    let trailers = deserialize_pairs(slice(memory, tp, tn)?).ok_or(Status::BadArgument)?;
    let place = place(host, upstream).ok_or(Status::BadArgument)?;
    if i32::try_from(timeout).is_err() || body.len() > BODY {
        return Err(Status::BadArgument.into());
    }
    let head = request_head(&pairs)?;
    let mut after = HeaderMap::new();
    append(&mut after, &trailers)?;
    let body = Made::Whole { data: Bytes::copy_from_slice(body), trailers: (!after.is_empty()).then_some(after) };
    let id = order(host, Kind::Http, upstream, place, head, body, time(timeout), None)?;
    write_u32(caller, out, id)
}

fn time(timeout: u32) -> Duration {
    match timeout {
        0 => DEFAULT_TIMEOUT,
        some => Duration::from_millis(some.into()).min(MOST_TIMEOUT),
    }
}

/// The service that an upstream's name stands for.
fn place(host: &Host, upstream: &[u8]) -> Option<Place> {
    host.plugin().upstreams.get(std::str::from_utf8(upstream).ok()?).cloned()
}

/// Notes a call, if there may be another.
#[allow(clippy::too_many_arguments)]
fn order(
    host: &mut Host,
    kind: Kind,
    upstream: &[u8],
    place: Place,
    head: request::Parts,
    body: Made,
    timeout: Duration,
    feed: Option<Feed>,
) -> Result<u32, Status> {
    let content = match &body {
        Made::Whole { data, trailers } => data.len() + trailers.as_ref().map_or(0, headers::size),
        Made::Fed(_) => 0,
    };
    let size = content + head.uri.path_and_query().map_or(0, |path| path.as_str().len()) + headers::size(&head.headers);
    let plugin = host.plugin();
    if host.calls.pending.len() >= plugin.callouts || host.calls.bytes() + size > plugin.memory {
        return Err(Status::InternalFailure);
    }
    let root = host.root_id();
    let id = host.calls.id(kind);
    host.calls.pending.insert(id, Pending { kind, feed, size, abort: None });
    let upstream = String::from_utf8_lossy(upstream).into_owned();
    host.calls.orders.push(Order::Call(Box::new(Outgoing { id, root, kind, upstream, place, head, body, timeout })));
    Ok(id)
}

/// The head of an HTTP call: `:method`, `:path` and `:authority` (or `host`) are needed.
fn request_head(pairs: &[Pair<'_>]) -> Result<request::Parts, Status> {
    let (mut head, ()) = http::Request::new(()).into_parts();
    let find = |name: &[u8]| pairs.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| *value);
    let bad = Status::BadArgument;
    head.method = Method::from_bytes(find(b":method").ok_or(bad)?).map_err(|_| bad)?;
    let path = find(b":path").filter(|path| path.starts_with(b"/") && !path.contains(&b'#')).ok_or(bad)?;
    head.uri = Uri::from(PathAndQuery::try_from(path).map_err(|_| bad)?);
    let authority = find(b":authority").or_else(|| find(b"host")).ok_or(bad)?;
    if head.method == Method::CONNECT || Authority::try_from(authority).map_or(true, |read| read.as_str().contains('@'))
    {
        return Err(bad);
    }
    append(&mut head.headers, pairs)?;
    head.headers.insert(HOST, HeaderValue::from_bytes(authority).map_err(|_| bad)?);
    Ok(head)
}

/// Appends fields that are not framing, hop-by-hop or pseudo headers.
fn append(fields: &mut HeaderMap, pairs: &[Pair<'_>]) -> Result<(), Status> {
    for (key, value) in pairs.iter().filter(|(key, _)| !key.starts_with(b":")) {
        let name = HeaderName::from_bytes(key).map_err(|_| Status::BadArgument)?;
        let value = HeaderValue::from_bytes(value).map_err(|_| Status::BadArgument)?;
        let own =
            ["host", "connection", "transfer-encoding", "upgrade", "keep-alive", "content-length", "te", "expect"];
        if !own.contains(&name.as_str()) {
            fields.try_append(name, value).map_err(|_| Status::BadArgument)?;
        }
    }
    Ok(())
}

/// Envoy's `GrpcService`, as far as it names a cluster.
#[derive(prost::Message)]
struct GrpcService {
    #[prost(message, optional, tag = "1")]
    envoy: Option<EnvoyGrpc>,
}

#[derive(prost::Message)]
struct EnvoyGrpc {
    #[prost(string, tag = "1")]
    cluster: String,
}

/// The service of a gRPC call: by name, or by a serialized `GrpcService`.
fn grpc_place<'a>(host: &Host, upstream: &'a [u8]) -> Result<(std::borrow::Cow<'a, [u8]>, Place), Status> {
    if let Some(place) = place(host, upstream) {
        return Ok((upstream.into(), place));
    }
    let service = GrpcService::decode(upstream).map_err(|_| Status::ParseFailure)?;
    let cluster = service.envoy.ok_or(Status::ParseFailure)?.cluster;
    let place = place(host, cluster.as_bytes()).ok_or(Status::ParseFailure)?;
    Ok((cluster.into_bytes().into(), place))
}

fn grpc_head(service: &[u8], method: &[u8], metadata: &[Pair<'_>]) -> Result<request::Parts, Status> {
    let bad = Status::BadArgument;
    let token = |text: &[u8]| !text.is_empty() && text.iter().all(|b| b.is_ascii_graphic() && !b"/?#".contains(b));
    if !token(service) || !token(method) {
        return Err(bad);
    }
    let (mut head, ()) = http::Request::new(()).into_parts();
    head.method = Method::POST;
    head.version = Version::HTTP_2;
    let path = [b"/", service, b"/", method].concat();
    head.uri = Uri::from(PathAndQuery::try_from(path.as_slice()).map_err(|_| bad)?);
    append(&mut head.headers, metadata)?;
    head.headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    head.headers.insert(TE, HeaderValue::from_static("trailers"));
    Ok(head)
}

/// The authority of a call that states none.
fn name_authority(head: &mut request::Parts, place: &Place) {
    let authority = format!("{}.{}", place.service.name, place.service.namespace);
    if let Ok(authority) = HeaderValue::from_str(&authority) {
        head.headers.insert(HOST, authority);
    }
}

/// A message as gRPC frames it: not compressed, its length in front.
fn frame(message: &[u8]) -> Result<Bytes, Status> {
    if message.len() > BODY {
        return Err(Status::BadArgument);
    }
    let mut framed = BytesMut::with_capacity(message.len() + 5);
    framed.put_u8(0);
    framed.put_u32(u32::try_from(message.len()).map_err(|_| Status::BadArgument)?);
    framed.extend_from_slice(message);
    Ok(framed.freeze())
}

#[allow(clippy::too_many_arguments, reason = "the ABI's")]
fn grpc_call(
    caller: Guest<'_, '_>,
    up: u32,
    un: u32,
    sp: u32,
    sn: u32,
    mp: u32,
    mn: u32,
    hp: u32,
    hn: u32,
    bp: u32,
    bn: u32,
    timeout: u32,
    out: u32,
) -> Call {
    check(caller, out, 4)?;
    let (memory, host) = split(caller)?;
    let upstream = slice(memory, up, un)?;
    let (service, method) = (slice(memory, sp, sn)?, slice(memory, mp, mn)?);
    let metadata = deserialize_pairs(slice(memory, hp, hn)?).ok_or(Status::BadArgument)?;
    let message = slice(memory, bp, bn)?;
    let (upstream, place) = grpc_place(host, upstream)?;
    if i32::try_from(timeout).is_err() {
        return Err(Status::BadArgument.into());
    }
    let mut head = grpc_head(service, method, &metadata)?;
    name_authority(&mut head, &place);
    if let Ok(limit) = HeaderValue::from_str(&format!("{}m", time(timeout).as_millis())) {
        head.headers.insert("grpc-timeout", limit);
    }
    let body = Made::Whole { data: frame(message)?, trailers: None };
    let id = order(host, Kind::Call, &upstream, place, head, body, time(timeout), None)?;
    write_u32(caller, out, id)
}

#[allow(clippy::too_many_arguments, reason = "the ABI's")]
fn grpc_stream(
    caller: Guest<'_, '_>,
    up: u32,
    un: u32,
    sp: u32,
    sn: u32,
    mp: u32,
    mn: u32,
    hp: u32,
    hn: u32,
    out: u32,
) -> Call {
    check(caller, out, 4)?;
    let (memory, host) = split(caller)?;
    let upstream = slice(memory, up, un)?;
    let (service, method) = (slice(memory, sp, sn)?, slice(memory, mp, mn)?);
    let metadata = deserialize_pairs(slice(memory, hp, hn)?).ok_or(Status::BadArgument)?;
    let (upstream, place) = grpc_place(host, upstream)?;
    let mut head = grpc_head(service, method, &metadata)?;
    name_authority(&mut head, &place);
    let feed = Feed::default();
    let body = Made::Fed(Some(feed.clone()));
    let id = order(host, Kind::Stream, &upstream, place, head, body, STREAM_TIME, Some(feed))?;
    write_u32(caller, out, id)
}

/// A gRPC stream that has not ended; of a call there is nothing to send or close.
fn stream_of(host: &Host, id: u32) -> Result<&Pending, Status> {
    if id % 2 == 1 {
        return Err(Status::BadArgument);
    }
    host.calls.pending.get(&id).filter(|pending| pending.kind == Kind::Stream).ok_or(Status::NotFound)
}

fn grpc_send(caller: Guest<'_, '_>, id: u32, p: u32, n: u32, end: u32) -> Call {
    let (memory, host) = split(caller)?;
    let message = slice(memory, p, n)?;
    let feed = stream_of(host, id)?.feed.clone().ok_or(Status::NotFound)?;
    let message = frame(message)?;
    let limit = host.plugin().memory;
    let fits = host.calls.bytes() + message.len() + MESSAGE <= limit;
    if !fits || !feed.push(message, limit.min(4 * BODY)) {
        return Err(Status::InternalFailure.into());
    }
    if end != 0 {
        feed.end();
    }
    Ok(())
}

/// Ends a call or a stream; nothing more is heard of it.
fn grpc_cancel(caller: Guest<'_, '_>, id: u32) -> Call {
    let calls = &mut caller.data_mut().calls;
    if calls.pending.get(&id).is_none_or(|pending| pending.kind == Kind::Http) {
        return Err(Status::NotFound.into());
    }
    calls.orders.retain(|order| !matches!(order, Order::Call(call) if call.id == id));
    if let Some(Pending { abort: Some(abort), .. }) = calls.pending.remove(&id) {
        abort.abort();
    }
    Ok(())
}

/// A stream: nothing more is sent; what comes is still told. A call: it is cancelled.
fn grpc_close(caller: Guest<'_, '_>, id: u32) -> Call {
    let pending = caller.data().calls.pending.get(&id).ok_or(Status::NotFound)?;
    match (pending.kind, &pending.feed) {
        (Kind::Stream, Some(feed)) => {
            feed.end();
            Ok(())
        }
        (Kind::Http, _) => Err(Status::NotFound.into()),
        _ => grpc_cancel(caller, id),
    }
}
