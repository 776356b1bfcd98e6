//! Connections without a request: one sweep per worker sees to what they wait for together, so that none of them needs a timer
//! or a watch of its own.
//!
//! The sweep asks: an HTTP/1 connection that had no request for a moment to park (to give back what hyper holds for it); one
//! that was idle for too long, whose peer is no longer trusted, or that the draining proxy wants closed, to end.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::sync::atomic::Ordering;
use std::task::{Context, Waker};
use std::time::Duration;

use tokio::time::Instant;

use super::serve::IDLE_TIMEOUT;
use super::{Connection, Way};
use crate::listen::Version;
use crate::shed::FEW;
use crate::worker::Worker;
use crate::{allocator, tls};

/// Between two looks while there are connections that could park: an idle one parks after one to two of these.
const LOOK: Duration = Duration::from_millis(250);
/// While there are none.
const SLOW_LOOK: Duration = Duration::from_secs(1);
/// Connections and requests that must have been freed before the allocator is told: the call costs more than a few are worth.
const WORTH_GIVING_BACK: usize = 64;
/// What runs on a connection that was idle may still end for this long.
const IDLE_GRACE: Duration = Duration::from_secs(20);

/// The connections of one worker.
#[derive(Debug, Default)]
pub struct Connections {
    all: RefCell<Vec<Weak<Connection>>>,
    sweeping: Cell<bool>,
    /// Connections that were parked or ended since the allocator was last told
    freed: Cell<usize>,
    /// Most requests in flight at a look since the allocator was last told, and those at the last look
    most: Cell<u32>,
    last: Cell<u32>,
}

/// What a connection is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Ask {
    #[default]
    Nothing,
    /// Wait with as little memory as possible, if no request is under way
    Park,
    /// End after what runs, which has this long
    Close(Duration),
}

/// What the sweep and a connection's task know of each other.
#[derive(Debug, Default)]
pub(super) struct Seat {
    ask: Cell<Ask>,
    waker: RefCell<Option<Waker>>,
    parked: Cell<bool>,
    /// Served to its end
    ended: Cell<bool>,
    /// Requests when the sweep last looked
    seen: Cell<Option<u64>>,
    /// Since when the sweep saw no request
    idle_since: Cell<Option<Instant>>,
}

impl Seat {
    /// What is asked; the task that looks is woken when that changes.
    pub(super) fn asked(&self, cx: &Context<'_>) -> Ask {
        let mut waker = self.waker.borrow_mut();
        if !waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            *waker = Some(cx.waker().clone());
        }
        self.ask.get()
    }

    /// A request to park was followed, or could not be.
    pub(super) fn answered(&self) {
        if self.ask.get() == Ask::Park {
            self.ask.set(Ask::Nothing);
        }
    }

    fn ask(&self, ask: Ask) {
        self.ask.set(ask);
        if let Some(waker) = &*self.waker.borrow() {
            waker.wake_by_ref();
        }
    }
}

/// A connection is parked until this is dropped.
#[derive(Debug)]
pub(super) struct Parked<'a>(&'a Connection);

impl<'a> Parked<'a> {
    pub(super) fn new(connection: &'a Connection) -> Self {
        connection.seat.parked.set(true);
        connection.worker.load.parked.fetch_add(1, Ordering::Relaxed);
        // Kept, this would hold the buffer that the last request was read into.
        connection.asked.take();
        Self(connection)
    }
}

impl Drop for Parked<'_> {
    fn drop(&mut self) {
        self.0.seat.parked.set(false);
        self.0.worker.load.parked.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A connection is looked after until this is dropped.
#[derive(Debug)]
pub(super) struct Seated<'a>(&'a Connection);

impl<'a> Seated<'a> {
    pub(super) fn new(connection: &'a Rc<Connection>) -> Self {
        let worker = &connection.worker;
        worker.connections.all.borrow_mut().push(Rc::downgrade(connection));
        // What happened already the sweep might not see before a request is served.
        connection.ask_to_close(Instant::now());
        if !worker.connections.sweeping.replace(true) {
            tokio::task::spawn_local(sweep(Rc::downgrade(worker)));
        }
        Self(connection)
    }
}

impl Drop for Seated<'_> {
    fn drop(&mut self) {
        self.0.seat.ended.set(true);
    }
}

/// Looks after a worker's connections for as long as there are any.
async fn sweep(worker: Weak<Worker>) {
    let Some((mut drain, mut identity)) =
        worker.upgrade().map(|worker| (worker.drain.clone(), worker.proxy.identity.subscribe()))
    else {
        return;
    };
    let mut next = Instant::now() + LOOK;
    loop {
        tokio::select! {
            () = tokio::time::sleep_until(next) => {}
            () = drain.changed() => {}
            changed = identity.changed() => if changed.is_err() {
                return;
            },
        }
        let Some(worker) = worker.upgrade() else { return };
        match worker.connections.look(Instant::now(), worker.gate.running()) {
            Some(at) => next = at,
            None => {
                worker.connections.sweeping.set(false);
                return;
            }
        }
    }
}

impl Connections {
    /// Looks at every connection once, while so many requests are in flight. When to look again; never if there are none.
    fn look(&self, now: Instant, running: u32) -> Option<Instant> {
        let freed = self.freed.get();
        let mut next = now + SLOW_LOOK;
        let mut all = self.all.borrow_mut();
        all.retain(|connection| {
            let Some(connection) = connection.upgrade().filter(|connection| !connection.seat.ended.get()) else {
                self.freed.set(self.freed.get() + 1);
                return false;
            };
            next = next.min(connection.look(now));
            true
        });
        let (ended, pending) = self.ended(running);
        // Nothing new was freed: the burst is over.
        if freed + ended >= WORTH_GIVING_BACK && freed == self.freed.get() {
            self.freed.set(0);
            self.most.set(running);
            allocator::give_back();
        }
        // A burst's room is not kept for ever.
        if all.capacity() > 64 && all.len() < all.capacity() / 4 {
            all.shrink_to_fit();
        }
        (!all.is_empty() || pending || self.freed.get() >= WORTH_GIVING_BACK).then_some(next)
    }

    /// How many requests of a burst have ended, which few connections may have carried; none where the worker is not as good as idle at two
    /// looks. And whether the next look may see them.
    fn ended(&self, running: u32) -> (usize, bool) {
        let most = self.most.get().max(running);
        self.most.set(most);
        let (was, is) = (self.last.replace(running) <= FEW, running <= FEW);
        let ended = if is { (most - running) as usize } else { 0 };
        if was { (ended, false) } else { (0, ended >= WORTH_GIVING_BACK) }
    }
}

impl Connection {
    /// The sweep's look. When to look again.
    fn look(&self, now: Instant) -> Instant {
        let seat = &self.seat;
        if matches!(seat.ask.get(), Ask::Close(_)) || self.ask_to_close(now) {
            return now + SLOW_LOOK;
        }
        let requests = self.requests.get();
        let idle = self.running.get() == 0 && seat.seen.replace(Some(requests)) == Some(requests);
        if !idle {
            seat.idle_since.set(None);
        }
        let since = if idle { seat.idle_since.get().unwrap_or(now) } else { now };
        if idle {
            seat.idle_since.set(Some(since));
            if now.duration_since(since) >= IDLE_TIMEOUT {
                seat.ask(Ask::Close(IDLE_GRACE));
            } else if self.version == Version::Http1 && !seat.parked.get() {
                seat.ask(Ask::Park);
                let freed = &self.worker.connections.freed;
                freed.set(freed.get() + 1);
            }
        }
        let look = if self.version == Version::Http1 && !seat.parked.get() { LOOK } else { SLOW_LOOK };
        self.proof().map_or(now + look, |peer| (now + look).min(peer.deadline()))
    }

    /// Asks a connection to end that the proxy's draining or its peer's certificate ends.
    fn ask_to_close(&self, now: Instant) -> bool {
        let drain = &self.worker.drain;
        if drain.is_closing(self.way() == Way::Inbound) {
            self.seat.ask(Ask::Close(Duration::MAX));
            return true;
        }
        let Some(peer) = self.proof() else { return false };
        let Some(why) = peer.ended_at(&self.worker.proxy.identity.bundle(), now) else { return false };
        tracing::info!(client = %self.client(), peer = %peer.identity, ?why, "a peer is no longer trusted: its connection ends");
        self.seat.ask(Ask::Close(tls::GRACE));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_many_requests_is_given_back_when_they_are_over() {
        let (connections, now) = (Connections::default(), Instant::now());
        let look = |running| (connections.look(now, running).is_some(), connections.most.get());
        assert_eq!(look(1000), (false, 1000));
        assert_eq!(look(FEW + 1), (false, 1000), "it is busy still");
        assert_eq!(look(3), (true, 1000), "one more look, also without connections");
        assert_eq!(look(3), (false, 3), "given back");
        // A busy worker's ups and downs are none of it, nor is what a few have left.
        for running in [500, 30, 400, 20, 20] {
            assert_eq!(look(running).1, 500);
        }
        assert_eq!((look(0), look(0)), ((true, 500), (false, 0)));
        assert_eq!((look(60), look(0), look(0)), ((false, 60), (false, 60), (false, 60)));
    }
}
