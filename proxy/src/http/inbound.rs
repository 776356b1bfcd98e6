//! To the own application: who calls, whether it may, and on.

use std::time::Duration;

use ::http::request;
use outrigger_core::authz;
use outrigger_core::link::{InboundPort, MtlsMode};
use outrigger_core::normalize::{self, Canonical, Direction, Rules};
use outrigger_core::reason::Reason;

use super::attempt;
use super::exchange::{Answer, Exchange, Failure, Incomer};
use super::request::{self as outgoing, Outgoing};
use crate::listen::Inbound;
use crate::metrics::Metric;
use crate::snapshot::Snapshot;
use crate::upstream::{Label, Target};

/// The application is on the same host: this is long.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// Handles a request to the own application.
pub(super) async fn handle(x: &mut Exchange, info: &Inbound, mut inc: Incomer) -> Result<Answer, Failure> {
    let connection = x.connection.clone();
    let snapshot = connection.worker.snapshot();
    let number = info.app.address.port();
    let inbound = snapshot.inbound.as_ref().ok_or(Reason::DiscoveryUnavailable)?;
    let port = inbound.port(number).ok_or_else(|| Failure::new(Reason::UnknownPort, format!("port {number}")))?;
    x.begin_inbound(&snapshot, port);
    if port.mtls == MtlsMode::Strict && info.peer.is_none() {
        return Err(Reason::MtlsRequired.into());
    }
    let canonical = normalized(x, &snapshot, port, &mut inc.head)?;
    x.begin_trace(&mut inc.head.headers, snapshot.mesh.as_deref());
    authorize(x, port, &inc.head, &canonical)?;
    let canonical = match filtered(x, &snapshot, port, &mut inc, canonical).await? {
        Filtered::Continue(canonical) => canonical,
        Filtered::Answer(answer) => return Ok(answer),
    };
    let wire = outgoing::wire(port.protocol, inc.head.version);
    let target = Target::plain(info.app.address, wire, CONNECT_TIMEOUT, IDLE_TIMEOUT, Label::inbound(&x.service));
    let Incomer { head, body, upgrade } = inc;
    let mut out = Outgoing::new(head, &canonical, body, upgrade);
    let chain = x.chain.clone();
    // As at the outbound: in the exchange's future once.
    let answer = std::pin::pin!(attempt::direct(x, &target, &mut out));
    super::filtered::unless_stopped(chain, answer).await
}

fn normalized(
    x: &mut Exchange,
    snapshot: &Snapshot,
    port: &InboundPort,
    head: &mut request::Parts,
) -> Result<Canonical, Failure> {
    let rules = Rules {
        direction: Direction::Inbound,
        path_rules: port.authorization.path_rules,
        peer: x.connection.peer(),
        xfcc: x.connection.xfcc(),
        forwarders: snapshot.mesh.as_ref().map_or(&[], |mesh| mesh.forwarders.as_slice()),
    };
    let canonical = normalize::request(head, &rules)?;
    x.grpc = canonical.is_grpc;
    Ok(canonical)
}

fn authorize(x: &Exchange, port: &InboundPort, head: &request::Parts, canonical: &Canonical) -> Result<(), Failure> {
    let request = authz::Request {
        peer: x.connection.peer(),
        ip: x.connection.client().ip(),
        port: port.port,
        method: &head.method,
        path: canonical.path(&head.uri),
        headers: &head.headers,
    };
    let verdict = port.authorization.decide(&request);
    let peer = x.connection.peer().map_or("none", |peer| peer.as_str());
    for rule in &verdict.audit {
        tracing::info!(rule, client = %x.connection.client(), peer, "an audit rule matched");
    }
    let rule = verdict.rule.unwrap_or("default");
    let metrics = &x.connection.worker.metrics;
    match verdict.outcome {
        Ok(()) => {
            metrics.add(Metric::Authorization, &["allow", rule], 1);
            Ok(())
        }
        Err(reason) => {
            metrics.add(Metric::Authorization, &["deny", rule], 1);
            tracing::info!(rule, client = %x.connection.client(), peer, "denied");
            // The caller is not told which policy it has to get around.
            Err(reason.into())
        }
    }
}

enum Filtered {
    Continue(Canonical),
    Answer(Answer),
}

/// Runs the filters. What they changed of method, path or authority is judged again, once.
async fn filtered(
    x: &mut Exchange,
    snapshot: &Snapshot,
    port: &InboundPort,
    inc: &mut Incomer,
    canonical: Canonical,
) -> Result<Filtered, Failure> {
    if port.filters.is_empty() {
        return Ok(Filtered::Continue(canonical));
    }
    x.chain(snapshot, &port.filters)?;
    if let Some(answer) = x.filter_request(inc).await? {
        return Ok(Filtered::Answer(answer));
    }
    if !x.rewritten().any {
        return Ok(Filtered::Continue(canonical));
    }
    let again = normalize::again(&mut inc.head, port.authorization.path_rules, &canonical)?;
    authorize(x, port, &inc.head, &again)?;
    Ok(Filtered::Continue(again))
}
