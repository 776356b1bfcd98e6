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

use super::stream::Waiter;
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
    /// One more message. True: others are on their way, and it waits for them.
    fn takes(&self, stream: &Rc<Stream>, flow: Flow) -> bool {
        self.now.set(self.now.get() + 1);
        if self.before.get() < FEW {
            return false;
        }
        let mut waiting = self.waiting.borrow_mut();
        if waiting.is_empty() {
            // Behind all tasks that this turn has found so far.
            tokio::task::spawn_local(run());
        }
        waiting.push((Rc::clone(stream), flow));
        true
    }
}

async fn run() {
    // The next one is about as large.
    let waiting = COHORT.with(|cohort| cohort.waiting.replace_with(|waiting| Vec::with_capacity(waiting.len())));
    let mut waiting = waiting.into_iter();
    loop {
        for (stream, flow) in waiting.by_ref().take(MOST) {
            // A fault of the proxy's is that exchange's own, and none of the others'.
            let result = catch_unwind(AssertUnwindSafe(|| stream.take_turn(flow)));
            stream.ran.set(Some(result));
            stream.wake(Waiter::Turn);
        }
        if waiting.len() == 0 {
            return;
        }
        tokio::task::yield_now().await;
    }
}

impl Stream {
    fn take_turn(self: &Rc<Self>, flow: Flow) {
        // An instance may have ended in another exchange since this one looked: what is lost with it is told before it is met.
        self.settle();
        self.run(flow);
    }
}

impl Chain {
    /// Runs a direction, now or in its turn: when other exchanges have come as far.
    pub async fn run(&self, flow: Flow) {
        let stream = &self.0;
        if !COHORT.with(|cohort| cohort.takes(stream, flow)) {
            return stream.take_turn(flow);
        }
        let result = poll_fn(|cx| {
            let ran = stream.ran.take();
            if ran.is_none() {
                stream.register(Waiter::Turn, cx.waker());
            }
            ran.map_or(Poll::Pending, Poll::Ready)
        });
        result.await.unwrap_or_else(|panic| resume_unwind(panic));
    }
}

#[cfg(test)]
mod tests;
