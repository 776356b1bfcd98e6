//! The clock that stops runaway guests, and sees how much of its thread's time each uses.
//!
//! Each thread that calls guests owns a slot: a counter that is odd while a call is in flight. One ticker thread looks at the
//! slots every few milliseconds, every millisecond while it finds calls in flight, and moves the engine's epoch on only when some
//! slot is still in the call it was in a tick ago, so a call that ends in time costs three stores and no clock is read. Where no call
//! has taken long for a while it looks less often; with no calls at all it sleeps until one begins.
//!
//! What a look finds in a call is taken to have been in it since the look before: over many calls that is the time they took, and it costs
//! them nothing.

use std::collections::HashMap;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::thread::Thread;
use std::time::{Duration, Instant};

use wasmtime::{Engine, EngineWeak};

/// Period of the ticker while a call is in flight: the precision of time limits, once a call was seen.
pub(super) const TICK: Duration = Duration::from_millis(1);
/// Its period otherwise. A thread of the proxy's own that wakes each millisecond costs as much as what short calls do.
const CALM: Duration = Duration::from_millis(4);
/// Its period after [`TRUST`] looks at calls none of which took long: to wake takes 20 µs of CPU or more, as much as several requests' filters.
const EASY: Duration = Duration::from_millis(16);
/// About a second.
const TRUST: u32 = 250;
/// Time without any call after which the ticker sleeps.
const IDLE: Duration = Duration::from_millis(64);

/// Longest time that one look stands for: who sleeps longer saw less.
const MOST: Duration = Duration::from_millis(20);
/// The same of an instance whose share is limited: what the smallest limit saves up.
const MOST_LIMITED: Duration = Duration::from_millis(10);

/// A thread's counter of calls and the meter of the last one, alone on its cache line.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Slot {
    calls: AtomicU64,
    meter: AtomicU64,
}

/// The time that one instance uses of its thread.
#[derive(Debug)]
pub(in super::super) struct Meter {
    id: u64,
    /// Microseconds so far
    used: AtomicU64,
    /// What it may use: millionths of the time; 0: all
    share: u32,
    /// Microseconds that it may use now; below 0, it must wait
    left: AtomicI64,
}

impl Meter {
    /// A meter, not watched yet. `share`: millionths of the time that may be used; 0: all.
    pub(super) fn new(share: u32) -> Arc<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        // A second's worth at most, and to begin with.
        Arc::new(Self { id, used: AtomicU64::new(0), share, left: AtomicI64::new(share.into()) })
    }

    /// Time used so far.
    pub(in super::super) fn used(&self) -> Duration {
        Duration::from_micros(self.used.load(Ordering::Relaxed))
    }

    /// True: its share is used up for now.
    pub(super) fn over(&self) -> bool {
        self.share != 0 && self.left.load(Ordering::Relaxed) < 0
    }

    fn pass(&self, time: Duration, busy: bool) {
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let most = if self.share == 0 { MOST } else { MOST_LIMITED };
        let took = if busy { micros(time.min(most)) } else { 0 };
        self.used.fetch_add(took, Ordering::Relaxed);
        if self.share == 0 {
            return;
        }
        let most = i64::from(self.share);
        let more = u128::from(micros(time)) * u128::from(self.share) / 1_000_000;
        let (more, less) = (i64::try_from(more).unwrap_or(i64::MAX), i64::try_from(took).unwrap_or(i64::MAX));
        let left = self.left.load(Ordering::Relaxed).saturating_add(more).saturating_sub(less);
        // One thread writes: the ticker's.
        self.left.store(left.clamp(-most, most), Ordering::Relaxed);
    }
}

#[derive(Debug)]
struct Watched {
    slot: Weak<Slot>,
    last: u64,
}

/// Handle of the ticker thread; the thread ends with the engine.
#[derive(Debug, Default)]
pub(super) struct Ticker {
    slots: Mutex<Vec<Watched>>,
    meters: Mutex<HashMap<u64, Weak<Meter>>>,
    /// An instance has come since the last look
    fresh: AtomicBool,
    asleep: AtomicBool,
    thread: OnceLock<Thread>,
}

impl Ticker {
    /// Starts the thread.
    pub(super) fn start(engine: &Engine) -> std::io::Result<Arc<Self>> {
        let ticker = Arc::new(Self::default());
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

    /// Counts an instance's time from now on, for as long as it holds the meter.
    pub(super) fn watch(&self, meter: &Arc<Meter>) {
        let mut meters = self.meters.lock().unwrap_or_else(PoisonError::into_inner);
        meters.retain(|_, meter| meter.strong_count() > 0);
        meters.insert(meter.id, Arc::downgrade(meter));
        self.fresh.store(true, Ordering::Relaxed);
    }

    /// Gives every meter the time that passed. True: some instance has to wait. Also says whether there is a limit to any one's share.
    fn count(&self, passed: Duration, busy: &[u64]) -> (bool, bool) {
        let meters = self.meters.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut over, mut limited) = (false, false);
        for meter in meters.values().filter_map(Weak::upgrade) {
            meter.pass(passed, busy.contains(&meter.id));
            over |= meter.over();
            limited |= meter.share != 0;
        }
        (over, limited)
    }

    /// True: some thread is in the same call as a tick ago. Also says whether there was any call since. `busy`: whose calls they are.
    fn look(&self, busy: &mut Vec<u64>) -> (bool, bool) {
        let (mut stuck, mut active) = (false, false);
        busy.clear();
        self.slots.lock().unwrap_or_else(PoisonError::into_inner).retain_mut(|watched| {
            let Some(slot) = watched.slot.upgrade() else { return false };
            let now = slot.calls.load(Ordering::SeqCst);
            if now % 2 == 1 {
                busy.push(slot.meter.load(Ordering::Relaxed));
            }
            stuck |= now == watched.last && now % 2 == 1;
            active |= now != watched.last || now % 2 == 1;
            watched.last = now;
            true
        });
        (stuck, active)
    }
}

/// What the thread knows from one look to the next.
struct Looks {
    last: Instant,
    /// Time without any call
    idle: Duration,
    /// Looks at calls, none of which took long, since the last one that did or a new instance
    calm: u32,
    /// Whose calls the last one found
    busy: Vec<u64>,
    /// How far into a tick the next call that wakes it is looked at, of [`u32::MAX`]
    phase: u32,
}

impl Looks {
    fn new(now: Instant) -> Self {
        Self { last: now, idle: Duration::ZERO, calm: 0, busy: Vec::new(), phase: 0 }
    }

    fn passed(&mut self, now: Instant) -> Duration {
        now.saturating_duration_since(std::mem::replace(&mut self.last, now))
    }

    /// True: a call takes long. And when to look again; `None`: when one begins.
    fn look(&mut self, ticker: &Ticker, now: Instant) -> (bool, Option<Duration>) {
        let (stuck, active) = ticker.look(&mut self.busy);
        let passed = self.passed(now);
        let (over, limited) = ticker.count(passed, &self.busy);
        if ticker.fresh.swap(false, Ordering::Relaxed) {
            self.calm = 0;
        }
        // Where a share is limited, what one look stands for must be little beside it.
        self.calm = if stuck || limited { 0 } else { self.calm.saturating_add(active.into()) };
        let rest = match self.calm {
            _ if !self.busy.is_empty() => TICK,
            TRUST.. => EASY,
            _ => CALM,
        };
        self.idle = if active || over { Duration::ZERO } else { self.idle + passed };
        (stuck, (self.idle < IDLE).then_some(rest))
    }

    /// It has slept, and was woken by a call or not: how long until the next look. Right now that call would always be found, and never have
    /// taken any time; somewhere in its first tick it is found as often as it is long, and that look stands for a tick.
    fn slept(&mut self, ticker: &Ticker, now: Instant, woken: bool) -> Duration {
        let passed = self.passed(now);
        ticker.count(passed, &[]);
        if !woken {
            // One look, and it sleeps again.
            self.idle = IDLE;
            return Duration::ZERO;
        }
        self.idle = Duration::ZERO;
        // Steps of the golden ratio: spread evenly, however many there are.
        self.phase = self.phase.wrapping_add(0x9E37_79B9);
        let rest = TICK.mul_f64(f64::from(self.phase) / f64::from(u32::MAX));
        self.last = (now + rest).checked_sub(TICK).unwrap_or(now);
        rest
    }
}

fn run(weak: &Weak<Ticker>, engine: &EngineWeak) {
    let mut looks = Looks::new(Instant::now());
    while let Some(ticker) = weak.upgrade() {
        let (stuck, rest) = looks.look(&ticker, Instant::now());
        if stuck {
            let Some(engine) = engine.upgrade() else { return };
            engine.increment_epoch();
        }
        if let Some(rest) = rest {
            drop(ticker);
            std::thread::sleep(rest);
            continue;
        }
        ticker.asleep.store(true, Ordering::SeqCst);
        // A call that began before the flag was up did not wake us: look once more.
        if ticker.look(&mut looks.busy).1 {
            ticker.asleep.store(false, Ordering::SeqCst);
        } else {
            drop(ticker);
            // Bounded, so that the thread ends soon after its engine.
            std::thread::park_timeout(Duration::from_secs(1));
        }
        let Some(ticker) = weak.upgrade() else { return };
        let woken = !ticker.asleep.load(Ordering::SeqCst);
        let rest = looks.slept(&ticker, Instant::now(), woken);
        drop(ticker);
        std::thread::sleep(rest);
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

    /// Marks the thread busy, for the instance of this meter, until the guard is dropped.
    pub(super) fn enter(&self, meter: &Meter) -> InCall<'_> {
        let calls = &self.slot.calls;
        // One writer: the slot is this thread's. SeqCst pairs with the ticker's flag: one of the two sees the other.
        self.slot.meter.store(meter.id, Ordering::Relaxed);
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A ticker without its thread, a clock that is turned by hand, and a thread that calls guests.
    struct Desk {
        ticker: Arc<Ticker>,
        watch: Watch,
        looks: Looks,
        now: Instant,
    }

    impl Desk {
        fn new(meter: &Arc<Meter>) -> Self {
            let (ticker, now) = (Arc::new(Ticker::default()), Instant::now());
            ticker.watch(meter);
            let watch = Watch::of(&ticker).unwrap();
            Self { ticker, watch, looks: Looks::new(now), now }
        }

        /// A look so much later.
        fn look(&mut self, later: Duration) -> (bool, Option<Duration>) {
            self.now += later;
            self.looks.look(&self.ticker, self.now)
        }

        /// So many looks, each with a short call since the one before: the last one's rest.
        fn calm(&mut self, looks: u32, meter: &Meter) -> Option<Duration> {
            let look = |_| {
                drop(self.watch.enter(meter));
                self.look(CALM)
            };
            (0..looks).map(look).last()?.1
        }
    }

    #[test]
    fn it_looks_less_often_where_calls_are_short() {
        let meter = Meter::new(0);
        let mut desk = Desk::new(&meter);
        assert_eq!(desk.calm(TRUST - 1, &meter), Some(CALM));
        assert_eq!(desk.calm(1, &meter), Some(EASY));
        assert_eq!(desk.look(EASY), (false, Some(EASY)), "without a call there is nothing to learn");
        {
            let watch = Watch::of(&desk.ticker).unwrap();
            let _in_call = watch.enter(&meter);
            assert_eq!(desk.look(EASY), (false, Some(TICK)), "this may be one that takes long");
            assert_eq!(desk.look(TICK), (true, Some(TICK)));
        }
        assert_eq!(desk.look(TICK), (false, Some(CALM)));
        assert_eq!(desk.calm(TRUST, &meter), Some(EASY));
        desk.ticker.watch(&Meter::new(0));
        assert_eq!(desk.calm(1, &meter), Some(CALM), "a new instance is not known yet");
        let limited = Meter::new(10_000);
        let mut desk = Desk::new(&limited);
        assert_eq!(desk.calm(TRUST * 2, &limited), Some(CALM));
        assert!(!limited.over());
    }

    #[test]
    fn it_sleeps_without_calls_and_what_wakes_it_is_not_charged_for_the_time_before() {
        let meter = Meter::new(10_000);
        let mut desk = Desk::new(&meter);
        desk.calm(1, &meter);
        let looks = (1..100).find(|_| desk.look(CALM).1.is_none());
        assert_eq!(looks.map(|looks| CALM * looks), Some(IDLE));
        let watch = Watch::of(&desk.ticker).unwrap();
        // Calls of a quarter of a tick, each of which wakes it.
        let took = TICK / 4;
        for _ in 0..100 {
            desk.now += Duration::from_millis(200);
            let in_call = watch.enter(&meter);
            let rest = desk.looks.slept(&desk.ticker, desk.now, true);
            if rest < took {
                assert_eq!(desk.look(rest), (false, Some(TICK)));
                drop(in_call);
            } else {
                drop(in_call);
                assert_eq!(desk.look(rest), (false, Some(CALM)));
            }
        }
        assert!(meter.used().abs_diff(took * 100) <= TICK * 2, "{:?}", meter.used());
        assert!(!meter.over());
        desk.look(CALM);
        assert_eq!(desk.looks.slept(&desk.ticker, desk.now, false), Duration::ZERO);
        assert_eq!(desk.look(Duration::ZERO), (false, None), "nobody woke it: it sleeps again");
    }

    #[test]
    fn a_share_is_used_up_and_comes_back() {
        let meter = Meter::new(200_000);
        let ms = Duration::from_millis;
        // A fifth of a second to begin with, and a fifth of the time on top.
        for _ in 0..249 {
            meter.pass(ms(1), true);
        }
        assert!(!meter.over());
        for _ in 0..3 {
            meter.pass(ms(1), true);
        }
        assert!(meter.over());
        for _ in 0..20 {
            meter.pass(ms(1), false);
        }
        assert!(!meter.over());
        assert_eq!(meter.used(), ms(252));
    }

    #[test]
    fn what_was_used_without_end_is_paid_off_in_a_second() {
        let meter = Meter::new(500_000);
        for _ in 0..10_000 {
            meter.pass(Duration::from_millis(10), true);
        }
        for _ in 0..100 {
            assert!(meter.over());
            meter.pass(Duration::from_millis(10), false);
        }
        meter.pass(Duration::from_millis(10), false);
        assert!(!meter.over());
    }

    #[test]
    fn without_a_share_time_is_only_counted() {
        let meter = Meter::new(0);
        meter.pass(Duration::from_secs(1), true);
        assert!(!meter.over());
        assert_eq!(meter.used(), MOST);
        let limited = Meter::new(10_000);
        limited.pass(MOST, true);
        assert!(!limited.over(), "one look does not use up all that it has saved");
    }
}
