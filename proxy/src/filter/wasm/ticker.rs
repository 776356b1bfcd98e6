//! The clock that stops runaway guests.
//!
//! Each thread that calls guests owns a slot: a counter that is odd while a call is in flight. One ticker thread looks at the
//! slots every millisecond and moves the engine's epoch on only when some slot is still in the call it was in a tick ago, so a
//! call that ends in time costs two stores and no clock is read. With no calls at all the ticker sleeps until one begins.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::thread::Thread;
use std::time::{Duration, Instant};

use wasmtime::{Engine, EngineWeak};

/// Period of the ticker: the precision of time limits.
pub(super) const TICK: Duration = Duration::from_millis(1);
/// Ticks without any call after which the ticker sleeps.
const IDLE_TICKS: u32 = 64;

/// A thread's counter of calls, alone on its cache line.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Slot(AtomicU64);

#[derive(Debug)]
struct Watched {
    slot: Weak<Slot>,
    last: u64,
}

/// Handle of the ticker thread; the thread ends with the engine.
#[derive(Debug)]
pub(super) struct Ticker {
    slots: Mutex<Vec<Watched>>,
    asleep: AtomicBool,
    thread: OnceLock<Thread>,
}

impl Ticker {
    /// Starts the thread.
    pub(super) fn start(engine: &Engine) -> std::io::Result<Arc<Self>> {
        let ticker =
            Arc::new(Self { slots: Mutex::new(Vec::new()), asleep: AtomicBool::new(false), thread: OnceLock::new() });
        let weak = Arc::downgrade(&ticker);
        let engine = engine.weak();
        let handle = std::thread::Builder::new()
            .name("filter-ticker".into())
            .stack_size(128 * 1024)
            .spawn(move || run(&weak, &engine))?;
        let _ = ticker.thread.set(handle.thread().clone());
        Ok(ticker)
    }

    fn wake(&self) {
        self.asleep.store(false, Ordering::SeqCst);
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }

    /// True: some thread is in the same call as a tick ago. Also says whether there was any call since.
    fn look(&self) -> (bool, bool) {
        let (mut stuck, mut active) = (false, false);
        self.slots.lock().unwrap_or_else(PoisonError::into_inner).retain_mut(|watched| {
            let Some(slot) = watched.slot.upgrade() else { return false };
            let now = slot.0.load(Ordering::SeqCst);
            stuck |= now == watched.last && now % 2 == 1;
            active |= now != watched.last || now % 2 == 1;
            watched.last = now;
            true
        });
        (stuck, active)
    }
}

fn run(weak: &Weak<Ticker>, engine: &EngineWeak) {
    let mut idle = 0;
    while let Some(ticker) = weak.upgrade() {
        let (stuck, active) = ticker.look();
        if stuck {
            let Some(engine) = engine.upgrade() else { return };
            engine.increment_epoch();
        }
        idle = if active { 0 } else { idle + 1 };
        if idle < IDLE_TICKS {
            drop(ticker);
            std::thread::sleep(TICK);
            continue;
        }
        ticker.asleep.store(true, Ordering::SeqCst);
        // A call that began before the flag was up did not wake us: look once more.
        if ticker.look().1 {
            ticker.asleep.store(false, Ordering::SeqCst);
        }
        idle = 0;
        if ticker.asleep.load(Ordering::SeqCst) {
            drop(ticker);
            // Bounded, so that the thread ends soon after its engine.
            std::thread::park_timeout(Duration::from_secs(1));
            // Nobody woke it: one look, and it sleeps again.
            let undisturbed = weak.upgrade().is_some_and(|ticker| ticker.asleep.load(Ordering::SeqCst));
            idle = if undisturbed { IDLE_TICKS - 1 } else { 0 };
        }
    }
}

thread_local! {
    static SLOT: std::cell::RefCell<Vec<(Weak<Ticker>, Arc<Slot>)>> = const { std::cell::RefCell::new(Vec::new()) };
}

/// A thread's place at the ticker: looked up once per instance. Stays on its thread.
#[derive(Debug)]
pub(super) struct Watch {
    ticker: Arc<Ticker>,
    slot: Arc<Slot>,
    here: PhantomData<*const ()>,
}

impl Watch {
    /// Of the calling thread; `None` while it is ending.
    pub(super) fn of(ticker: &Arc<Ticker>) -> Option<Self> {
        let slot = SLOT
            .try_with(|slots| {
                let mut slots = slots.borrow_mut();
                if let Some((_, slot)) = slots.iter().find(|(of, _)| std::ptr::eq(of.as_ptr(), Arc::as_ptr(ticker))) {
                    return Arc::clone(slot);
                }
                slots.retain(|(of, _)| of.strong_count() > 0);
                let slot = Arc::new(Slot::default());
                ticker
                    .slots
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(Watched { slot: Arc::downgrade(&slot), last: 0 });
                slots.push((Arc::downgrade(ticker), Arc::clone(&slot)));
                slot
            })
            .ok()?;
        Some(Self { ticker: Arc::clone(ticker), slot, here: PhantomData })
    }

    /// Marks the thread busy until the guard is dropped.
    pub(super) fn enter(&self) -> InCall<'_> {
        let Slot(calls) = &*self.slot;
        // One writer: the slot is this thread's. SeqCst pairs with the ticker's flag: one of the two sees the other.
        calls.store(calls.load(Ordering::Relaxed) + 1, Ordering::SeqCst);
        if self.ticker.asleep.load(Ordering::SeqCst) {
            self.ticker.wake();
        }
        InCall(calls)
    }
}

/// A call in flight.
#[derive(Debug)]
pub(super) struct InCall<'a>(&'a AtomicU64);

impl Drop for InCall<'_> {
    fn drop(&mut self) {
        self.0.store(self.0.load(Ordering::Relaxed) + 1, Ordering::Release);
    }
}

/// How much time one call has used, from its first expired epoch on.
#[derive(Debug, Default)]
pub(super) struct Budget {
    first: Option<(Duration, Instant)>,
    /// CPU time of one call
    pub(super) limit: Duration,
}

impl Budget {
    /// A new call of at most `limit` of this thread's CPU time, and ten times that by the clock.
    pub(super) fn arm(&mut self, limit: Duration) {
        self.first = None;
        self.limit = limit;
    }

    /// The epoch expired: whether the call must end.
    pub(super) fn spent(&mut self) -> bool {
        let (cpu, wall) = (thread_cpu_time(), Instant::now());
        let Some((first_cpu, first_wall)) = self.first else {
            // At least one tick of it has passed.
            self.first = Some((cpu.saturating_sub(TICK), wall));
            return false;
        };
        cpu.saturating_sub(first_cpu) >= self.limit || wall.saturating_duration_since(first_wall) >= self.limit * 10
    }
}

fn thread_cpu_time() -> Duration {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}
