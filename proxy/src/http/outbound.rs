//! From the own application: where to, by which rule, to which backend.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use ::http::header::HOST;
use ::http::uri::Authority;
use ::http::{HeaderValue, Response, Uri, request};
use bytes::Bytes;
use outrigger_core::key::{self, Key, Named};
use outrigger_core::link::{OutboundTraffic, Port, Protocol, Service};
use outrigger_core::normalize::{self, Canonical, Direction, Rules};
use outrigger_core::reason::Reason;
use outrigger_core::route::{self, Selected, Split};

use super::attempt::{self, Call};
use super::exchange::{Answer, Exchange, Failure, Incomer};
use super::request::{self as outgoing, Outgoing};
use super::{Asked, Connection, ConnectionInfo};
use crate::snapshot::{self, Snapshot};
use crate::upstream::Target;

/// Destinations outside the mesh may be far away.
const OUTSIDE_CONNECT: Duration = Duration::from_secs(10);
const OUTSIDE_IDLE: Duration = Duration::from_secs(60);

/// Handles a request of the own application.
pub(super) async fn handle(x: &mut Exchange, mut inc: Incomer) -> Result<Answer, Failure> {
    let connection = x.connection.clone();
    let ConnectionInfo::Outbound(info) = &connection.info else { return Err(Reason::Internal.into()) };
    let worker = &connection.worker;
    let canonical = normalized(x, &mut inc.head)?;
    let asked = match info.destination {
        Some(address) => Rc::new((Key::Ip(address), Some(address.port()))),
        None => remembered(&connection, &inc.head)?,
    };
    let (key, port) = (&asked.0, asked.1);
    let (snapshot, target) = worker.find(key).await?;
    x.begin_outbound(&snapshot);
    x.begin_trace(&mut inc.head.headers, snapshot.mesh.as_deref());
    match target {
        snapshot::Target::Service(service) => to_service(x, &snapshot, &service, port, inc, canonical).await,
        snapshot::Target::Workload(workload) => to_workload(x, &workload, inc, &canonical).await,
        snapshot::Target::Absent => match info.destination {
            Some(address) => outside(x, &snapshot, address, inc, &canonical).await,
            None => Err(Failure::new(Reason::UnknownService, key.to_string())),
        },
    }
}

fn normalized(x: &mut Exchange, head: &mut request::Parts) -> Result<Canonical, Failure> {
    let rules = Rules { direction: Direction::Outbound, path_rules: false, peer: None, xfcc: None, forwarders: &[] };
    let canonical = normalize::request(head, &rules)?;
    x.grpc = canonical.is_grpc;
    Ok(canonical)
}

/// Explicit mode: what the authority names. A client's connection asks for the same one again as a rule, so the last
/// reading is kept.
fn remembered(connection: &Connection, head: &request::Parts) -> Result<Rc<Asked>, Failure> {
    let host = head.headers.get(HOST);
    if let (Some(host), Some((last, asked))) = (host, &*connection.asked.borrow())
        && host == last
    {
        return Ok(asked.clone());
    }
    let asked = Rc::new(named(head, &connection.worker.proxy.settings.namespace)?);
    *connection.asked.borrow_mut() = host.map(|host| (host.clone(), asked.clone()));
    Ok(asked)
}

/// Explicit mode: the authority names the service.
fn named(head: &request::Parts, namespace: &str) -> Result<Asked, Failure> {
    let authority = outgoing::authority(&head.uri, &head.headers).ok_or(Reason::BadRequest)?;
    let unreadable = || Failure::new(Reason::BadRequest, format!("the authority `{authority}` cannot be read"));
    let (named, port) = key::canonicalise(authority.as_str(), namespace).ok_or_else(unreadable)?;
    Ok(match named {
        Named::Service(service) => (Key::Service(service), port),
        Named::Host(host) => {
            let port = port.unwrap_or(80);
            let key = match host.parse() {
                Ok(ip) => Key::Ip(SocketAddr::new(ip, port)),
                Err(_) => Key::Host(host, port),
            };
            (key, Some(port))
        }
    })
}

async fn to_service(
    x: &mut Exchange,
    snapshot: &Snapshot,
    service: &Arc<Service>,
    port: Option<u16>,
    mut inc: Incomer,
    canonical: Canonical,
) -> Result<Answer, Failure> {
    x.service = service.label.clone();
    let unknown =
        || Failure::new(Reason::UnknownPort, format!("{} has no port {}", x.service, port.unwrap_or_default()));
    let port = service.port(port).ok_or_else(unknown)?;
    let canonical = match filtered(x, snapshot, port, &mut inc, canonical)? {
        Filtered::Continue(canonical) => canonical,
        Filtered::Answer(answer) => return Ok(answer),
    };
    let head = route::Head {
        method: &inc.head.method,
        path: canonical.path(&inc.head.uri),
        query: inc.head.uri.query(),
        headers: &inc.head.headers,
    };
    let selected = route::select(port, &head).ok_or(Reason::NoRoute)?;
    x.route = selected.rule.name.clone();
    if let Some(answer) = redirected(&selected, port, &inc.head, &canonical) {
        return Ok(answer);
    }
    let call = chosen(x, &selected)?;
    let Incomer { head, body, upgrade } = inc;
    let mut out = Outgoing::new(head, &canonical, body, upgrade);
    change(&mut out.head, &call, &selected);
    attempt::routed(x, call, out).await
}

enum Filtered {
    Continue(Canonical),
    Answer(Answer),
}

fn filtered(
    x: &mut Exchange,
    snapshot: &Snapshot,
    port: &Port,
    inc: &mut Incomer,
    canonical: Canonical,
) -> Result<Filtered, Failure> {
    if port.filters.is_empty() {
        return Ok(Filtered::Continue(canonical));
    }
    x.chain(snapshot, &port.filters)?;
    let before: Uri = inc.head.uri.clone();
    let end = http_body::Body::is_end_stream(&inc.body);
    if let Some(answer) = x.filter_request(&mut inc.head, end)? {
        return Ok(Filtered::Answer(answer));
    }
    if before == inc.head.uri {
        return Ok(Filtered::Continue(canonical));
    }
    // Routing comes after the filters, so what they wrote is what it sees.
    let path = normalize::canonical(inc.head.uri.path(), false)?;
    Ok(Filtered::Continue(Canonical { path, ..canonical }))
}

/// Draws the backend, once for all attempts.
fn chosen(x: &Exchange, selected: &Selected<'_>) -> Result<Call, Failure> {
    let worker = &x.connection.worker;
    let clusters = &worker.proxy.clusters;
    let rule = selected.rule;
    let ready = |backend: &outrigger_core::link::Backend| clusters.get(&backend.key).is_ready();
    match route::split(rule, &mut worker.rng.borrow_mut(), ready) {
        Split::Backend(share, backend) => Ok(Call {
            cluster: clusters.get(&backend.key),
            backend: backend.clone(),
            share: rule.backends.iter().position(|one| std::ptr::eq(one, share)).unwrap_or_default(),
            rule: rule.clone(),
            service: x.service.clone(),
        }),
        Split::Invalid(why) => Err(Failure::new(Reason::NoBackend, why)),
        Split::None => Err(Failure::new(Reason::NoBackend, format!("rule {}", rule.name))),
    }
}

/// The rule's changes, then those of the share.
fn change(head: &mut request::Parts, call: &Call, selected: &Selected<'_>) {
    if call.rule.simple {
        return;
    }
    let share = call.share().map(|share| &share.filters);
    for filters in std::iter::once(&call.rule.filters).chain(share) {
        route::modify_request(filters, head);
        if let Some(rewrite) = &filters.rewrite {
            route::rewrite(rewrite, head, selected.prefix);
        }
    }
}

fn redirected(selected: &Selected<'_>, port: &Port, head: &request::Parts, canonical: &Canonical) -> Option<Answer> {
    let redirect = selected.rule.filters.redirect.as_ref()?;
    let authority = outgoing::authority(&head.uri, &head.headers).unwrap_or(Authority::from_static("localhost"));
    let (path, query) = (canonical.path(&head.uri), head.uri.query());
    let (status, location) = route::redirect(redirect, "http", &authority, port.number, path, query, selected.prefix);
    let mut response = Response::new(Bytes::new());
    *response.status_mut() = status;
    response.headers_mut().insert(::http::header::LOCATION, location);
    response.headers_mut().insert(::http::header::CONTENT_LENGTH, HeaderValue::from_static("0"));
    Some(Answer::Local { response, reason: Reason::RouteResponse, filtered: false })
}

/// An instance, hit by its own address.
async fn to_workload(
    x: &mut Exchange,
    workload: &snapshot::Workload,
    inc: Incomer,
    canonical: &Canonical,
) -> Result<Answer, Failure> {
    let endpoint = &workload.endpoint;
    x.service = endpoint.id.clone();
    x.endpoint_version = endpoint.version.clone();
    let target = Target::workload(workload, |protocol| outgoing::wire(protocol, inc.head.version));
    let Incomer { head, body, upgrade } = inc;
    attempt::direct(x, &target, Outgoing::new(head, canonical, body, upgrade)).await
}

/// With interception: what no part of the mesh has this address.
async fn outside(
    x: &mut Exchange,
    snapshot: &Snapshot,
    address: SocketAddr,
    inc: Incomer,
    canonical: &Canonical,
) -> Result<Answer, Failure> {
    let permitted = snapshot.mesh.as_ref().is_none_or(|mesh| mesh.outbound == OutboundTraffic::AllowAny);
    if !permitted {
        return Err(Failure::new(Reason::UnknownService, address.to_string()));
    }
    x.service = x.connection.worker.labels.outside.clone();
    let wire = outgoing::wire(Protocol::Detect, inc.head.version);
    let target = Target::plain(address, wire, OUTSIDE_CONNECT, OUTSIDE_IDLE);
    let Incomer { head, body, upgrade } = inc;
    attempt::direct(x, &target, Outgoing::new(head, canonical, body, upgrade)).await
}
