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
/// Requests of one worker that wait for their refusal: more have it at once.
const HELD: u32 = 4096;
/// Between two samples of the lag.
const TICK: Duration = Duration::from_millis(10);

/// What a worker has taken on, and whether it may take on more.
#[derive(Debug)]
pub struct Gate {
    /// Requests that have not ended
    running: Cell<u32>,
    most: u32,
    watched: Cell<bool>,
    held: Cell<u32>,
}

impl Gate {
    /// For at most so many requests at once.
    pub fn new(most: u32) -> Self {
        Self { running: Cell::new(0), most, watched: Cell::new(false), held: Cell::new(0) }
    }

    /// Requests that have not ended.
    pub fn running(&self) -> u32 {
        self.running.get()
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
        self.running() <= FEW.min(self.most)
    }
}

/// Why a request is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// As many are in flight as may be
    Full,
    /// The worker has no time
    Late,
}

/// Whether the request that entered last is refused.
pub fn refuses(worker: &Rc<Worker>) -> Option<Refusal> {
    if worker.gate.is_calm() {
        return None;
    }
    let refusal = if worker.gate.running.get() > worker.gate.most {
        Refusal::Full
    } else if refused_by_lag(worker) {
        Refusal::Late
    } else {
        return None;
    };
    worker.load.refused.count();
    Some(refusal)
}

/// Has a request that entered wait for its refusal (see [`shed::hold`]), at the latest until `deadline`, where not too many do. Meanwhile it
/// is not in flight.
pub async fn hold(worker: &Rc<Worker>, deadline: Option<std::time::Instant>) {
    if worker.gate.held.get() < HELD {
        let _held = Held::new(worker);
        let until = Instant::now() + shed::hold(worker.rng.borrow_mut().u16(..));
        tokio::time::sleep_until(deadline.map_or(until, |deadline| until.min(deadline.into()))).await;
    }
}

/// A request that waits for its refusal.
struct Held<'a>(&'a Gate);

impl<'a> Held<'a> {
    fn new(worker: &'a Rc<Worker>) -> Self {
        let gate = &worker.gate;
        gate.held.set(gate.held.get() + 1);
        gate.leave();
        Self(gate)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.held.set(self.0.held.get() - 1);
        self.0.enter();
    }
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
