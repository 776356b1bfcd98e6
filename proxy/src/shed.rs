//! Refusing what a worker has no time or room for. The decision is [`outrigger_core::shed`]'s; here is what it is told, and when.
//!
//! A worker with few requests in flight is never overloaded, and costs nothing here: its lag is watched, with a timer, only while
//! there are more.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use outrigger_core::shed::{self, Shed};
use tokio::time::Instant;

use crate::worker::Worker;

/// Requests in flight below which nothing is refused: whatever makes such a worker late, it is not what it has taken on.
pub const FEW: u32 = 16;
/// Between two samples of the lag.
const TICK: Duration = Duration::from_millis(10);

/// What a worker has taken on, and whether it may take on more.
#[derive(Debug)]
pub struct Gate {
    /// Requests that have not ended
    running: Cell<u32>,
    most: u32,
    watched: Cell<bool>,
}

impl Gate {
    /// For at most so many requests at once.
    pub fn new(most: u32) -> Self {
        Self { running: Cell::new(0), most, watched: Cell::new(false) }
    }

    /// A request begins, or is there to be refused.
    pub fn enter(&self) {
        self.running.set(self.running.get() + 1);
    }

    /// A request has ended.
    pub fn leave(&self) {
        self.running.set(self.running.get() - 1);
    }

    /// Few enough are in flight that there is nothing to decide.
    fn is_calm(&self) -> bool {
        self.running.get() <= FEW.min(self.most)
    }
}

/// Whether the request that entered last is refused.
pub fn refuses(worker: &Rc<Worker>) -> bool {
    if worker.gate.is_calm() {
        return false;
    }
    let refused = worker.gate.running.get() > worker.gate.most || refused_by_lag(worker);
    if refused {
        worker.load.refused.count();
    }
    refused
}

fn refused_by_lag(worker: &Rc<Worker>) -> bool {
    if !worker.gate.watched.replace(true) {
        tokio::task::spawn_local(watch(worker.clone()));
    }
    let share = worker.load.shed_share.load(Ordering::Relaxed);
    share > 0 && shed::refused(share, worker.rng.borrow_mut().u16(..))
}

/// Follows the worker's lag until it is calm again: an idle proxy has no timer.
async fn watch(worker: Rc<Worker>) {
    let mut shed = Shed::default();
    let begun = || worker.load.requests.load(Ordering::Relaxed);
    let mut seen = begun();
    loop {
        let due = Instant::now() + TICK;
        tokio::time::sleep_until(due).await;
        let now = Instant::now();
        let before = shed.share();
        let share = shed.observe(now - due, now.into_std());
        worker.load.shed_share.store(share, Ordering::Relaxed);
        if before == 0 && share > 0 {
            tell(&worker, now - due);
        }
        // Many may be in flight for hours, such as upgraded connections: what counts is whether more come.
        let quiet = worker.gate.is_calm() || begun() == seen;
        if share == 0 && quiet {
            worker.gate.watched.set(false);
            return;
        }
        seen = begun();
    }
}

fn tell(worker: &Worker, lag: Duration) {
    let now = std::time::Instant::now();
    if let Some(unsaid) = worker.overloads.borrow_mut().say(now) {
        let running = worker.gate.running.get();
        tracing::warn!(worker = worker.index, ?lag, running, unsaid, "overloaded: some requests are refused");
    }
}
