//! WebSocket: after both sides agreed, bytes.

use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use outrigger_core::reason::Reason;
use std::time::Duration;

use super::attempt::Attempt;
use super::exchange::{Exchange, Running};
use crate::metrics::Metric;
use crate::tcp;

/// Without a byte in either direction.
const IDLE: Duration = Duration::from_secs(3600);

/// Copies between the two sides of an upgrade, in a task of its own, until one ends or the proxy cuts what is left.
pub(super) fn start(
    mut exchange: Box<Exchange>,
    attempt: Box<Attempt>,
    (client, server): (OnUpgrade, OnUpgrade),
    running: Running,
) {
    tokio::task::spawn_local(async move {
        let worker = exchange.connection.worker.clone();
        let _open = worker.metrics.hold(Metric::Upgrades, &[exchange.connection.way().name()]);
        let both = async { tokio::try_join!(client, server) };
        match both.await {
            Ok((client, server)) => {
                tokio::select! {
                    copied = tcp::copy(io(client), io(server), IDLE) => {
                        exchange.count(copied.sent, copied.received);
                        attempt.succeeded(None);
                    }
                    () = worker.drain.cut() => {
                        exchange.end_with(Reason::Draining);
                        attempt.cancelled();
                    }
                }
            }
            Err(error) => {
                tracing::debug!(%error, "an upgrade was not completed");
                attempt.cancelled();
            }
        }
        drop(running);
    });
}

fn io(upgraded: Upgraded) -> TokioIo<Upgraded> {
    TokioIo::new(upgraded)
}
