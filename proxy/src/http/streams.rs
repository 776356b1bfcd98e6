//! HTTP/2: a client's connection and its streams in one task.
//!
//! A task for each stream is made, queued and polled by tokio, and each word that it has for the connection queues the
//! connection's task again. Here the connection's task polls the streams that have something to do, and then the connection, until
//! neither has: what several streams say leaves with one turn.

use std::cell::RefCell;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use futures_util::stream::{FuturesUnordered, StreamExt};
use futures_util::task::AtomicWaker;
use futures_util::{FutureExt, future::LocalBoxFuture};

/// Turns of one poll: others of the worker wait meanwhile.
const TURNS: usize = 16;

/// Where hyper puts the streams that it begins.
#[derive(Clone, Default)]
pub(super) struct Begun(Rc<RefCell<Vec<LocalBoxFuture<'static, ()>>>>);

impl<F: Future + 'static> hyper::rt::Executor<F> for Begun {
    fn execute(&self, stream: F) {
        // As in a task of its own: what panics ends itself, and its drop resets the stream.
        let stream = AssertUnwindSafe(stream).catch_unwind().map(drop);
        self.0.borrow_mut().push(stream.boxed_local());
    }
}

/// Wakes the task, unless it is awake and will look again.
#[derive(Debug, Default)]
struct Bell {
    rung: AtomicBool,
    awake: AtomicBool,
    task: AtomicWaker,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // Whoever goes to sleep says so and looks again; who rings does it in the other order. One of the two sees the other.
        self.rung.store(true, Ordering::SeqCst);
        if !self.awake.load(Ordering::SeqCst) {
            self.task.wake();
        }
    }
}

/// A connection with its streams. When the connection is over they are dropped.
pub(super) struct Together<'a, C> {
    connection: Pin<&'a mut C>,
    begun: Begun,
    streams: FuturesUnordered<LocalBoxFuture<'static, ()>>,
    bell: Arc<Bell>,
    waker: Waker,
}

impl<'a, C: Future> Together<'a, C> {
    /// A connection that begins its streams in `begun`.
    pub(super) fn new(connection: Pin<&'a mut C>, begun: Begun) -> Self {
        let bell = Arc::new(Bell::default());
        let waker = Waker::from(bell.clone());
        Self { connection, begun, streams: FuturesUnordered::new(), bell, waker }
    }

    /// The connection alone.
    pub(super) fn connection(&mut self) -> Pin<&mut C> {
        self.connection.as_mut()
    }

    /// Polls what has something to do. Whether that is to be done again.
    fn turn(&mut self) -> (Poll<C::Output>, bool) {
        let mut cx = Context::from_waker(&self.waker);
        self.bell.rung.store(false, Ordering::SeqCst);
        while let Poll::Ready(Some(())) = self.streams.poll_next_unpin(&mut cx) {}
        let polled = self.connection.as_mut().poll(&mut cx);
        let mut begun = self.begun.0.borrow_mut();
        let more = !begun.is_empty();
        self.streams.extend(begun.drain(..));
        (polled, more)
    }
}

impl<C: Future> Future for Together<'_, C> {
    type Output = C::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<C::Output> {
        let this = self.get_mut();
        this.bell.task.register(cx.waker());
        this.bell.awake.store(true, Ordering::SeqCst);
        for _ in 0..TURNS {
            let (polled, more) = this.turn();
            if polled.is_ready() {
                return polled;
            }
            if more || this.bell.rung.load(Ordering::SeqCst) {
                // Who has used up the task's share says so by waking it.
                if tokio::task::coop::has_budget_remaining() {
                    continue;
                }
                break;
            }
            this.bell.awake.store(false, Ordering::SeqCst);
            if !this.bell.rung.load(Ordering::SeqCst) {
                return Poll::Pending;
            }
            this.bell.awake.store(true, Ordering::SeqCst);
        }
        this.bell.awake.store(false, Ordering::SeqCst);
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use hyper::rt::Executor;
    use tokio::sync::{mpsc, oneshot};

    use super::*;
    use crate::testing::{run, within};

    /// Ends with the sum of what its streams sent it, when the last sender is gone.
    async fn sum(mut words: mpsc::UnboundedReceiver<u32>, begin: impl FnOnce()) -> u32 {
        begin();
        let mut sum = 0;
        while let Some(word) = words.recv().await {
            sum += word;
        }
        sum
    }

    #[test]
    fn streams_run_within_the_connection_and_wake_it() {
        run(async {
            let (send, words) = mpsc::unbounded_channel();
            let (asked, answer) = oneshot::channel();
            let begun = Begun::default();
            let inner = begun.clone();
            let connection = sum(words, move || {
                let other = send.clone();
                // Woken from outside, and by one another.
                inner.execute(async move { other.send(answer.await.unwrap()).unwrap() });
                for word in 0..100 {
                    let send = send.clone();
                    inner.execute(async move {
                        tokio::task::yield_now().await;
                        send.send(word).unwrap();
                    });
                }
                inner.execute(async { panic!("of this stream only") });
            });
            std::thread::spawn(move || asked.send(1000).unwrap());
            let connection = std::pin::pin!(connection);
            assert_eq!(within(Together::new(connection, begun)).await, 1000 + 99 * 50);
        });
    }

    #[test]
    fn streams_end_with_the_connection() {
        run(async {
            let (dropped, begun) = (Rc::new(Cell::new(false)), Begun::default());
            let guard = dropped.clone();
            struct Guard(Rc<Cell<bool>>);
            impl Drop for Guard {
                fn drop(&mut self) {
                    self.0.set(true);
                }
            }
            let guard = Guard(guard);
            begun.execute(async move {
                let _guard = guard;
                std::future::pending::<()>().await;
            });
            let mut connection = std::pin::pin!(tokio::task::yield_now());
            let mut together = Together::new(connection.as_mut(), begun);
            within(&mut together).await;
            assert!(!dropped.get());
            drop(together);
            assert!(dropped.get());
        });
    }
}
