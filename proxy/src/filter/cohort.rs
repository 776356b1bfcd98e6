//! Exchanges whose filters run one after the other.
//!
//! What a filter costs is fetching its code more than running it: between one exchange's filters and the next one's the worker reads, routes and
//! writes, and the guest has left the processor's first caches by then. So where a turn of the worker (from one wait for IO to the next) finds many
//! messages, each of them goes as far as its filters, the filters of all run, and all go on: cohort scheduling (Larus and Parkes, "Using Cohort
//! Scheduling to Enhance Server Performance", USENIX 2002). Where there are few, none waits.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;
use std::task::Poll;

use super::stream::{Turn, Waiter};
use super::{Chain, Flow, Stream};

/// Messages in one turn from which on those of the next one wait for each other. To wait is to be polled once more, which is worth it from two or
/// three on.
const FEW: u32 = 3;
/// The filters of so many run before the worker looks at anything else.
const MOST: usize = 64;

/// Of one worker.
struct Cohort {
    /// Messages that came to filters in this turn, and in the one before
    now: Cell<u32>,
    before: Cell<u32>,
    /// Those that wait, each with a task of its own; while there are any, a task of the worker's is about to run them
    waiting: RefCell<Vec<(Rc<Stream>, Flow)>>,
}

thread_local! {
    static COHORT: Cohort = const { Cohort { now: Cell::new(0), before: Cell::new(0), waiting: RefCell::new(Vec::new()) } };
}

/// The calling worker has done what there was to do. On a thread that never says so nothing waits.
pub fn next_turn() {
    COHORT.with(|cohort| cohort.before.set(cohort.now.replace(0)));
}

impl Cohort {
    /// One more message. True: others are on their way.
    fn meets(&self) -> bool {
        self.now.set(self.now.get() + 1);
        self.before.get() >= FEW
    }

    fn join(&self, stream: &Rc<Stream>, flow: Flow) {
        stream.turn.set(Some(Turn::Awaited));
        let mut waiting = self.waiting.borrow_mut();
        if waiting.is_empty() {
            // Behind all tasks that this turn has found so far.
            tokio::task::spawn_local(run());
        }
        waiting.push((Rc::clone(stream), flow));
    }
}

async fn run() {
    let mut waiting = COHORT.with(|cohort| cohort.waiting.take()).into_iter();
    while waiting.len() > 0 {
        for (stream, flow) in waiting.by_ref().take(MOST) {
            // A fault of the proxy's is that exchange's own, and none of the others'.
            let result = catch_unwind(AssertUnwindSafe(|| {
                // An instance may have ended in one that ran just now: the others of it are told before they come to it.
                stream.settle();
                stream.run(flow);
            }));
            stream.turn.set(Some(Turn::Over(result)));
            stream.wake(Waiter::Turn);
        }
        if waiting.len() > 0 {
            tokio::task::yield_now().await;
        }
    }
}

impl Chain {
    /// Runs a direction, now or in its turn: when other exchanges have come as far.
    pub async fn run(&self, flow: Flow) {
        let stream = &self.0;
        if !COHORT.with(Cohort::meets) {
            return stream.run(flow);
        }
        COHORT.with(|cohort| cohort.join(stream, flow));
        let result = poll_fn(|cx| match stream.turn.take() {
            Some(Turn::Over(result)) => Poll::Ready(result),
            turn => {
                stream.turn.set(turn);
                stream.register(Waiter::Turn, cx.waker());
                Poll::Pending
            }
        });
        result.await.unwrap_or_else(|panic| resume_unwind(panic));
    }
}

#[cfg(test)]
mod tests;
