//! Looks after a worker's connections to endpoints: what is idle too long or was closed goes, and so does what rests on a peer that
//! is no longer trusted. One task for all of them, so that none needs a timer or a watch of its own.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;

use outrigger_core::chain::Bundle;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::http1::Connection;
use super::pool::{ByTarget, Pool, SharedConnection};
use super::streams;
use crate::identity::IdentityStore;
use crate::tls;

/// How often idle connections are looked at.
const SWEEP: Duration = Duration::from_secs(5);

/// What the sweep is told.
#[derive(Debug, Default)]
pub(super) struct Sweep {
    begun: Cell<bool>,
    /// When it looks next
    next: Cell<Option<Instant>>,
    sooner: Notify,
}

impl Sweep {
    /// True the first time: somebody has to run it.
    pub(super) fn begin(&self) -> bool {
        !self.begun.replace(true)
    }

    /// It has to look by then.
    pub(super) fn due(&self, at: Instant) {
        if self.next.get().is_none_or(|next| at < next) {
            self.next.set(Some(at));
            self.sooner.notify_one();
        }
    }
}

/// Sweeps until the worker ends.
pub(super) async fn sweep(pools: Weak<RefCell<ByTarget>>, sweep: Rc<Sweep>, store: Arc<IdentityStore>) {
    let mut changes = store.subscribe();
    let mut regular = Instant::now() + SWEEP;
    sweep.due(regular);
    loop {
        let next = sweep.next.get().unwrap_or(regular);
        tokio::select! {
            () = tokio::time::sleep_until(next) => {}
            () = sweep.sooner.notified() => continue,
            changed = changes.changed() => if changed.is_err() {
                return;
            },
        }
        let Some(pools) = pools.upgrade() else { return };
        let now = Instant::now();
        let bundle = store.bundle();
        let mut pools = pools.borrow_mut();
        let ends = pools.values().filter_map(|pool| look_at_peers(pool, &bundle, now)).min();
        if now >= regular {
            clear_away(&mut pools, now);
            regular = now + SWEEP;
        }
        sweep.next.set(Some(ends.map_or(regular, |ends| ends.min(regular))));
    }
}

/// Ends what rests on peers that are no longer trusted at `now`; in-use connections have a while. When to look again.
fn look_at_peers(pool: &Pool, bundle: &Bundle, now: Instant) -> Option<Instant> {
    let (mut next, mut distrusted) = (None, false);
    let mut later = |at: Instant| next = Some(next.map_or(at, |next: Instant| next.min(at)));
    pool.proven.borrow_mut().retain(|connection| {
        let Some(connection) = connection.upgrade() else { return false };
        let (ends, grace) = judge(&connection, bundle, now);
        if let Some(why) = ends {
            tracing::info!(?why, "an endpoint is no longer trusted: its connections end");
            distrusted = true;
        }
        match grace {
            Some(at) if at <= now => {
                connection.sever();
                false
            }
            Some(at) => {
                later(at);
                true
            }
            None => {
                if let Some(peer) = connection.link().peer() {
                    later(peer.deadline());
                }
                true
            }
        }
    });
    if distrusted {
        pool.distrust();
    }
    next
}

/// Why a connection's peer has just stopped being trusted, and when the connection is cut.
fn judge(connection: &Connection, bundle: &Bundle, now: Instant) -> (Option<tls::Ended>, Option<Instant>) {
    if let Some(at) = connection.cut.get() {
        return (None, Some(at));
    }
    let ended = connection.link().peer().and_then(|peer| peer.ended_at(bundle, now));
    if ended.is_some() {
        connection.cut.set(Some(now + tls::GRACE));
    }
    (ended, connection.cut.get())
}

/// Closes connections that were idle too long at `now` or are closed, and forgets pools that have none.
fn clear_away(pools: &mut ByTarget, now: Instant) {
    let now = now.into_std();
    pools.retain(|_, pool| {
        if pool.touched.replace(false) {
            pool.used.set(Some(now));
        }
        let old = |since: std::time::Instant| now.saturating_duration_since(since) >= pool.timeout.get();
        pool.idle.borrow_mut().retain(|idle| {
            let kept = idle.connection.is_quiet();
            let old = old(idle.since);
            if kept && old {
                idle.connection.close();
            }
            kept && !old
        });
        let in_use = |shared: &SharedConnection| shared.streams.get() > 0 || !old(shared.since.get());
        pool.shared.borrow_mut().retain(|shared| streams::is_open(&shared.sender) && in_use(shared));
        pool.open.get() > 0 || pool.connecting.borrow().is_some() || !pool.used.get().is_none_or(old)
    });
}
