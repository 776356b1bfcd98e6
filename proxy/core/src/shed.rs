//! Which requests a worker refuses because it has no time for them: what it takes on late, clients have given up on by then.
//!
//! The measure is the worker's lag: how long a task that is ready waits until it runs. As with CoDel (RFC 8289) a short queue
//! is no overload, only one that stands: longer than [`TARGET`] during a whole [`INTERVAL`]. From then on the share of new
//! requests that is refused follows the lag as PIE's drop probability does (RFC 8033), until none is refused.
//!
//! A refusal costs a good part of a small request, and who has it at once comes back at once: where there are enough clients, refusing
//! them in turn keeps the queue as long as it was. A refused request therefore waits for its answer, about [`HOLD`], outside the queue.

use std::time::{Duration, Instant};

/// A lag that is no overload yet.
pub const TARGET: Duration = Duration::from_millis(50);
/// How long the queue has to stand before the first request is refused: what comes at once and is done in this time is waited for, since
/// its clients would rather have late answers than none.
pub const INTERVAL: Duration = Duration::from_millis(200);
/// How long a request that is refused for lag waits for its answer, on average.
pub const HOLD: Duration = Duration::from_millis(500);
/// All requests, in the unit of shares: a share is so many of 65,536.
pub const WHOLE: u32 = 1 << 16;
/// The largest share: some always pass, so that recovery is seen.
pub const MOST: u32 = WHOLE / 100 * 95;

/// How fast the share follows: per second, and for each [`TARGET`] that the lag is away from the target.
const GAIN: f64 = 1.0;
/// How much a growing lag counts at once, for each [`TARGET`] of growth: damps the swings.
const DAMPING: f64 = 0.1;
/// Of the lag, in targets: one late sample must not decide by itself.
const CLIP: f64 = 4.0;
/// Of the time between two samples, for the same reason.
const GAP: Duration = Duration::from_millis(200);

/// One worker's overload.
#[derive(Debug, Default)]
pub struct Shed {
    /// Since when the lag is above the target
    above: Option<Instant>,
    /// The last sample: when, and its lag in targets
    last: Option<(Instant, f64)>,
    /// What is refused, 0 to 1
    share: f64,
}

impl Shed {
    /// The share of new requests to refuse from now on, see [`WHOLE`], after a sample of the lag at `now`.
    pub fn observe(&mut self, lag: Duration, now: Instant) -> u32 {
        let late = (lag.as_secs_f64() / TARGET.as_secs_f64()).min(CLIP);
        let (before, was) = self.last.replace((now, late)).unwrap_or((now, late));
        if lag <= TARGET {
            self.above = None;
        }
        // The queue has stood for as long as what was at its head has waited.
        let since = (lag > TARGET).then(|| *self.above.get_or_insert(now.checked_sub(lag).unwrap_or(now)));
        let stands = since.is_some_and(|since| now.saturating_duration_since(since) >= INTERVAL);
        if stands || self.share > 0.0 {
            let passed = now.saturating_duration_since(before).min(GAP).as_secs_f64();
            self.share += GAIN * (late - 1.0) * passed + DAMPING * (late - was);
            self.share = self.share.clamp(0.0, f64::from(MOST) / f64::from(WHOLE));
        }
        self.share()
    }

    /// The share of new requests to refuse, see [`WHOLE`].
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // 0 to MOST
    pub fn share(&self) -> u32 {
        (self.share * f64::from(WHOLE)) as u32
    }
}

/// How long a refused request waits for its answer. `random` is any number, evenly distributed: those that were refused together do not
/// come back together.
pub fn hold(random: u16) -> Duration {
    HOLD / 2 + HOLD * u32::from(random) / WHOLE
}

/// Whether a request is refused. `random` is any number, evenly distributed.
pub fn refused(share: u32, random: u16) -> bool {
    u32::from(random) < share
}

#[cfg(test)]
mod tests {
    use std::cmp::Reverse;
    use std::collections::{BinaryHeap, VecDeque};

    use proptest::prelude::*;

    use super::*;

    /// Between two samples, as the worker takes them.
    const TICK: u64 = 10_000;
    /// Cost of a request, µs: the worker is saturated at 1,000 requests a second.
    const REQUEST: u64 = 1_000;
    /// Cost of refusing one, µs.
    const REFUSAL: u64 = 50;

    /// What became of a worker in simulated time.
    #[derive(Debug, Default)]
    struct Outcome {
        served: u64,
        refused: u64,
        /// Longest wait of one that was served, µs
        longest: u64,
        share: u32,
    }

    /// One worker's run queue, first in first out, with requests at an even rate. Everything in µs.
    struct Simulated {
        start: Instant,
        now: u64,
        next: u64,
        due: u64,
        /// When it became ready; `None` is the sampler
        queue: VecDeque<Option<u64>>,
        sampling: bool,
        shed: Shed,
        rng: fastrand::Rng,
    }

    impl Simulated {
        fn new(seed: u64) -> Self {
            Self {
                start: Instant::now(),
                now: 0,
                next: 0,
                due: TICK,
                queue: VecDeque::new(),
                sampling: false,
                shed: Shed::default(),
                rng: fastrand::Rng::with_seed(seed),
            }
        }

        fn run(&mut self, seconds: u64, per_second: u64) -> Outcome {
            self.run_for(seconds * 1_000_000, per_second)
        }

        fn run_for(&mut self, time: u64, per_second: u64) -> Outcome {
            let mut outcome = Outcome::default();
            let end = self.now + time;
            while self.now < end {
                while self.next <= self.now {
                    self.queue.push_back(Some(self.next));
                    self.next += 1_000_000 / per_second;
                }
                if !self.sampling && self.due <= self.now {
                    self.sampling = true;
                    self.queue.push_back(None);
                }
                match self.queue.pop_front() {
                    None => self.now = self.next.min(if self.sampling { u64::MAX } else { self.due }),
                    Some(None) => {
                        let lag = Duration::from_micros(self.now - self.due);
                        self.shed.observe(lag, self.start + Duration::from_micros(self.now));
                        self.due = self.now + TICK;
                        self.sampling = false;
                    }
                    Some(Some(_)) if refused(self.shed.share(), self.rng.u16(..)) => {
                        outcome.refused += 1;
                        self.now += REFUSAL;
                    }
                    Some(Some(ready)) => {
                        outcome.served += 1;
                        outcome.longest = outcome.longest.max(self.now - ready);
                        self.now += REQUEST;
                    }
                }
            }
            outcome.share = self.shed.share();
            outcome
        }
    }

    /// Clients that ask again as soon as they have an answer; what was served in the last of the seconds, of what could have been.
    fn goodput(seed: u64, clients: usize, held_back: bool, seconds: u64) -> f64 {
        // As measured of small requests through a sidecar pair, µs.
        const SMALL: u64 = 76;
        const ITS_REFUSAL: u64 = 28;
        let (start, rng) = (Instant::now(), &mut fastrand::Rng::with_seed(seed));
        let (mut now, mut due, mut served, mut shed) = (0, TICK, 0, Shed::default());
        let mut queue: VecDeque<Option<u64>> = std::iter::repeat_n(Some(0), clients).collect();
        let mut held = BinaryHeap::new();
        let mut sampling = false;
        while now < seconds * 1_000_000 {
            while held.peek().is_some_and(|Reverse(until)| *until <= now) {
                queue.push_back(held.pop().map(|Reverse(until)| until));
            }
            if !sampling && due <= now {
                sampling = true;
                queue.push_back(None);
            }
            match queue.pop_front() {
                None => now = held.peek().map_or(u64::MAX, |Reverse(until)| *until).min(due),
                Some(None) => {
                    shed.observe(Duration::from_micros(now - due), start + Duration::from_micros(now));
                    (due, sampling) = (now + TICK, false);
                }
                Some(Some(_)) if refused(shed.share(), rng.u16(..)) => {
                    now += ITS_REFUSAL;
                    let wait = if held_back { hold(rng.u16(..)) } else { Duration::ZERO };
                    held.push(Reverse(now + u64::try_from(wait.as_micros()).unwrap()));
                }
                Some(Some(_)) => {
                    now += SMALL;
                    served += u64::from(now > (seconds - 1) * 1_000_000);
                    queue.push_back(Some(now));
                }
            }
        }
        (served * SMALL) as f64 / 1e6
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn clients_that_come_back_at_once_do_not_keep_the_worker_refusing(seed: u64, clients in 100_usize..2_000) {
            let held = goodput(seed, clients, true, 10);
            prop_assert!(held > 0.9, "{held}");
        }

        #[test]
        fn at_twice_saturation_the_worker_stays_busy_and_waits_stay_short(seed: u64) {
            let mut worker = Simulated::new(seed);
            worker.run(5, 2_000);
            let outcome = worker.run(20, 2_000);
            // 947 a second is what the cost of refusing leaves at best.
            prop_assert!(outcome.served >= 20 * 900, "{outcome:?}");
            prop_assert!(outcome.longest < 500_000, "{outcome:?}");
        }

        #[test]
        fn below_saturation_nothing_is_refused_and_after_overload_nothing_either(seed: u64, load in 100_u64..950) {
            let mut worker = Simulated::new(seed);
            prop_assert_eq!(worker.run(5, load).refused, 0);
            prop_assert!(worker.run(5, 3_000).refused > 0);
            worker.run(5, load);
            let after = worker.run(5, load);
            prop_assert!(after.refused == 0 && after.share == 0, "{after:?}");
        }

        #[test]
        fn a_share_is_bounded_whatever_the_samples(samples: Vec<(u16, u16)>) {
            let mut now = Instant::now();
            let mut shed = Shed::default();
            for (lag, passed) in samples {
                now += Duration::from_millis(passed.into());
                prop_assert!(shed.observe(Duration::from_millis(lag.into()), now) <= MOST);
            }
        }
    }

    #[test]
    fn a_queue_that_does_not_stand_is_no_overload() {
        let start = Instant::now();
        let mut shed = Shed::default();
        let at = |ms| start + Duration::from_millis(ms);
        for round in 0..10 {
            // Late for 190 ms, again and again, with a sample in time between.
            assert_eq!(shed.observe(Duration::from_millis(90), at(round * 210 + 90)), 0);
            assert_eq!(shed.observe(Duration::from_millis(90), at(round * 210 + 190)), 0);
            assert_eq!(shed.observe(Duration::ZERO, at(round * 210 + 200)), 0);
        }
        assert_eq!(shed.observe(Duration::from_millis(90), at(3_090)), 0);
        assert!(shed.observe(Duration::from_millis(90), at(3_200)) > 0, "it stood for an interval");
    }

    #[test]
    fn without_the_wait_thousands_of_clients_are_refused_in_turn() {
        let (at_once, held) = (goodput(1, 2_500, false, 10), goodput(1, 2_500, true, 10));
        assert!(at_once < 0.2 && held > 0.85, "{at_once}, {held}");
    }

    #[test]
    fn a_burst_is_served_late_rather_than_refused() {
        let mut worker = Simulated::new(1);
        // Five times what it can do, for 40 ms: it is late for the next 160.
        let burst = worker.run_for(40_000, 5_000);
        let after = worker.run(2, 100);
        assert_eq!(burst.refused + after.refused, 0, "{burst:?} {after:?}");
        assert!(burst.served + after.served >= 390 && after.longest > 100_000, "{burst:?} {after:?}");
        // For longer than that it is no burst.
        assert!(worker.run(2, 2_000).refused > 0);
    }

    #[test]
    fn a_share_is_what_is_refused() {
        let of = |share| (0..=u16::MAX).filter(|random| refused(share, *random)).count();
        assert_eq!((of(0), of(WHOLE / 4), of(WHOLE)), (0, 1 << 14, 1 << 16));
    }
}
