//! WebSocket: after both sides agreed, bytes.

use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use outrigger_core::reason::Reason;
use std::time::Duration;

use super::Way;
use super::attempt::Attempt;
use super::exchange::{Exchange, Running};
use crate::copy::Relay;
use crate::io::Io;
use crate::listen;
use crate::metrics::Metric;
use crate::tls;

/// Without a byte in either direction.
const IDLE: Duration = Duration::from_secs(3600);

/// Copies between the two sides of an upgrade, in a task of its own, until one ends or the proxy cuts what is left.
pub(super) fn start(
    mut exchange: Box<Exchange>,
    mut attempt: Box<Attempt>,
    (client, server): (OnUpgrade, Io),
    running: Running,
) {
    let worker = exchange.connection.worker.clone();
    // The connection's own count ends with hyper's part of it; draining waits for the rest as well.
    let way = match exchange.connection.way() {
        Way::Inbound => listen::Way::Inbound,
        Way::Outbound => listen::Way::Outbound,
    };
    let count = listen::Count::new(worker.load.clone(), way);
    tokio::task::spawn_local(async move {
        let _open = worker.metrics.hold(Metric::Upgrades, &[exchange.connection.way().name()]);
        // The endpoint has done its part: how long the connection lives says nothing of it.
        attempt.connected();
        let store = &worker.proxy.identity;
        match client.await {
            Ok(client) => {
                let mut relay = Relay::new(TokioIo::new(client), server, IDLE, |_| {});
                tokio::select! {
                    _ended = &mut relay => {}
                    () = worker.drain.cut() => exchange.end_with(Reason::Draining),
                    _why = tls::cut(exchange.connection.proof(), store) => exchange.end_with(Reason::PeerIdentity),
                    _why = tls::cut(attempt.peer(), store) => exchange.end_with(Reason::PeerIdentity),
                }
                let passed = relay.passed();
                exchange.count(passed.sent, passed.received);
            }
            Err(error) => tracing::debug!(%error, "an upgrade was not completed"),
        }
        drop((exchange, attempt, running, count));
    });
}
