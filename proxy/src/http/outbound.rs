//! From the own application: where to, by which rule, to which backend.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use ::http::header::HOST;
use ::http::uri::Authority;
use ::http::{HeaderValue, Response, request};
use bytes::Bytes;
use outrigger_core::key::{self, Key, Named, ServiceKey};
use outrigger_core::link::{OutboundTraffic, Port, Protocol, Service};
use outrigger_core::normalize::{self, Canonical, Direction, Rules};
use outrigger_core::reason::Reason;
use outrigger_core::route::{self, Selected, Split};

use super::attempt::{self, Call};
use super::exchange::{Answer, Exchange, Failure, Incomer};
use super::made::Made;
use super::request::{self as outgoing, Outgoing};
use super::{Asked, Connection};
use crate::filter::{RequestHead, Rewritten};
use crate::listen;
use crate::snapshot::{self, Pinned, Snapshot};
use crate::upstream::{Label, Target};

/// Destinations outside the mesh may be far away.
const OUTSIDE_CONNECT: Duration = Duration::from_secs(10);
const OUTSIDE_IDLE: Duration = Duration::from_secs(60);

/// Handles a request of the own application.
pub(super) async fn handle(x: &mut Exchange, info: &listen::Outbound, mut inc: Incomer) -> Result<Answer, Failure> {
    let connection = x.connection.clone();
    let mut canonical = normalized(x, &mut inc.head)?;
    let mut place = Place::find(&connection, info, &inc.head).await?;
    x.begin_outbound(&place.snapshot);
    x.begin_trace(&mut inc.head.headers, place.snapshot.mesh.as_deref());
    match filtered(x, &place, &mut inc, &canonical).await? {
        Filtered::Unchanged => {}
        // What the filters wrote is judged as if the application had written it, once; they do not see it again.
        Filtered::Changed { elsewhere } => {
            canonical = normalize::again(&mut inc.head, false, &canonical)?;
            if elsewhere && info.destination.is_none() {
                place = Place::find(&connection, info, &inc.head).await?;
            }
        }
        Filtered::Answer(answer) => return Ok(answer),
    }
    let chain = x.chain.clone();
    // Pinned here, and once: given away by value, or awaited in two places, it would be in every exchange's future twice.
    let answer = std::pin::pin!(onwards(x, info, &place, inc, &canonical));
    super::filtered::unless_stopped(chain, answer).await
}

/// Sends a request to where it goes.
async fn onwards(
    x: &mut Exchange,
    info: &listen::Outbound,
    place: &Place,
    inc: Incomer,
    canonical: &Canonical,
) -> Result<Answer, Failure> {
    match &place.target {
        snapshot::Target::Service(service) => to_service(x, service, place.port(), inc, canonical).await,
        snapshot::Target::Workload(workload) => to_workload(x, workload, inc, canonical).await,
        snapshot::Target::Absent => match info.destination {
            Some(address) => outside(x, &place.snapshot, address, inc, canonical).await,
            None => Err(Failure::new(Reason::UnknownService, place.asked.0.to_string())),
        },
    }
}

/// A call-out: to a service by its name, whatever the authority says, and through no filters.
pub(super) async fn call_out(
    x: &mut Exchange,
    service: &ServiceKey,
    port: Option<u16>,
    mut head: request::Parts,
    body: Made,
) -> Result<Answer, Failure> {
    let canonical = normalized(x, &mut head)?;
    let (snapshot, target) = x.connection.worker.clone().find(&Key::Service(service.clone())).await?;
    x.begin_outbound(&snapshot);
    x.begin_trace(&mut head.headers, snapshot.mesh.as_deref());
    let snapshot::Target::Service(service) = &target else {
        return Err(Failure::new(Reason::UnknownService, service.to_string()));
    };
    let port = enter(x, service, port)?;
    let selected = select(port, &head, &canonical).ok_or(Reason::NoRoute)?;
    x.select(selected.rule);
    if let Some(answer) = redirected(&selected, port, &head, &canonical) {
        return Ok(answer);
    }
    let call = chosen(x, &selected)?;
    let mut out = Outgoing::made(head, &canonical, body);
    change(&mut out.head, canonical.path.as_deref(), &call, &selected);
    attempt::routed(x, call, &mut out).await
}

/// Where a request goes, as discovery has it.
struct Place {
    asked: Rc<Asked>,
    snapshot: Pinned,
    target: snapshot::Target,
}

impl Place {
    async fn find(connection: &Connection, info: &listen::Outbound, head: &request::Parts) -> Result<Self, Failure> {
        let asked = match info.destination {
            Some(address) => Rc::new((Key::Ip(address), Some(address.port()))),
            None => remembered(connection, head)?,
        };
        let (snapshot, target) = connection.worker.find(&asked.0).await?;
        Ok(Self { asked, snapshot, target })
    }

    /// Port that was asked for.
    fn port(&self) -> Option<u16> {
        self.asked.1
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
    service: &Service,
    port: Option<u16>,
    inc: Incomer,
    canonical: &Canonical,
) -> Result<Answer, Failure> {
    let port = enter(x, service, port)?;
    let selected = select(port, &inc.head, canonical).ok_or(Reason::NoRoute)?;
    x.select(selected.rule);
    if let Some(answer) = redirected(&selected, port, &inc.head, canonical) {
        return Ok(answer);
    }
    let call = chosen(x, &selected)?;
    let Incomer { head, body, upgrade } = inc;
    let mut out = Outgoing::new(head, canonical, body, upgrade);
    change(&mut out.head, canonical.path.as_deref(), &call, &selected);
    attempt::routed(x, call, &mut out).await
}

/// The port of the service that is meant.
fn enter<'a>(x: &mut Exchange, service: &'a Service, port: Option<u16>) -> Result<&'a Port, Failure> {
    if !Arc::ptr_eq(&x.service, &service.label) {
        x.service = service.label.clone();
    }
    let unknown =
        || Failure::new(Reason::UnknownPort, format!("{} has no port {}", service.label, port.unwrap_or_default()));
    service.port(port).ok_or_else(unknown)
}

fn select<'a>(port: &'a Port, head: &request::Parts, canonical: &Canonical) -> Option<Selected<'a>> {
    let (path, query) = (canonical.path(&head.uri), head.uri.query());
    route::select(port, &route::Head { method: &head.method, path, query, headers: &head.headers })
}

enum Filtered {
    Unchanged,
    Changed { elsewhere: bool },
    Answer(Answer),
}

/// Runs the filters of the service's port and of the rule. They are told the rule that would be used of what the application wrote.
async fn filtered(
    x: &mut Exchange,
    place: &Place,
    inc: &mut Incomer,
    canonical: &Canonical,
) -> Result<Filtered, Failure> {
    let snapshot::Target::Service(service) = &place.target else { return Ok(Filtered::Unchanged) };
    let port = enter(x, service, place.port())?;
    if !port.filtered {
        return Ok(Filtered::Unchanged);
    }
    let selected = select(port, &inc.head, canonical);
    if let Some(selected) = &selected {
        x.select(selected.rule);
    }
    let keys = port.chain(selected.as_ref().map(|selected| &**selected.rule));
    if keys.is_empty() {
        return Ok(Filtered::Unchanged);
    }
    x.chain(&place.snapshot, keys)?;
    Ok(match x.filter_request(inc).await? {
        Some(answer) => Filtered::Answer(answer),
        None => match x.rewritten() {
            Rewritten { any: false, .. } => Filtered::Unchanged,
            Rewritten { authority, .. } => Filtered::Changed { elsewhere: authority },
        },
    })
}

/// Draws the backend, once for all attempts.
fn chosen(x: &Exchange, selected: &Selected<'_>) -> Result<Rc<Call>, Failure> {
    let worker = &x.connection.worker;
    let clusters = &worker.proxy.clusters;
    let rule = selected.rule;
    let ready = |backend: &outrigger_core::link::Backend| clusters.get(&backend.key).is_ready();
    match route::split(rule, &mut worker.rng.borrow_mut(), ready) {
        Split::Backend(share, backend) => Ok(worker.calls.get(share, &x.service, || Call {
            cluster: clusters.get(&backend.key),
            backend: backend.clone(),
            share: rule.backends.iter().position(|one| std::ptr::eq(one, share)).unwrap_or_default(),
            rule: rule.clone(),
            service: x.service.clone(),
        })),
        Split::Invalid(why) => Err(Failure::new(Reason::NoBackend, why)),
        Split::None => Err(Failure::new(Reason::NoBackend, format!("rule {}", rule.name))),
    }
}

/// The rule's changes, then those of the share. `canonical` is the path where it is not as sent.
fn change(head: &mut RequestHead, mut canonical: Option<&str>, call: &Call, selected: &Selected<'_>) {
    if call.rule.simple {
        return;
    }
    let share = call.share().map(|share| &share.filters);
    for filters in std::iter::once(&call.rule.filters).chain(share) {
        route::modify_request(filters, head);
        if let Some(rewrite) = &filters.rewrite {
            route::rewrite(rewrite, head, canonical, selected.prefix);
            if rewrite.path.is_some() {
                // The next one finds what this one wrote.
                canonical = None;
            }
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
    Some(Answer::Local { response, reason: Reason::RouteResponse })
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
    attempt::direct(x, &target, &mut Outgoing::new(head, canonical, body, upgrade)).await
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
    let target = Target::plain(address, wire, OUTSIDE_CONNECT, OUTSIDE_IDLE, Label::outbound(&x.service));
    let Incomer { head, body, upgrade } = inc;
    attempt::direct(x, &target, &mut Outgoing::new(head, canonical, body, upgrade)).await
}
