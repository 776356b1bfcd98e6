//! Peak EWMA: rises to a peak at once, forgets it slowly. As finagle's load balancer has it.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Time constant of forgetting, in seconds.
const TAU: f32 = 10.0;
/// Unit of the stamp. 2^32 of them are 76 hours, after which an age is taken modulo that: harmless.
const TICK: Duration = Duration::from_micros(64);

/// Microseconds (f32, upper half) and stamp in ticks (lower half) in one word, so that both change together.
#[derive(Debug)]
pub(super) struct PeakEwma {
    base: Instant,
    packed: AtomicU64,
}

impl PeakEwma {
    pub(super) fn new(now: Instant) -> Self {
        Self { base: now, packed: AtomicU64::new(0) }
    }

    fn stamp(&self, now: Instant) -> u32 {
        let ticks = now.saturating_duration_since(self.base).as_nanos() / TICK.as_nanos();
        // Modulo on purpose.
        #[allow(clippy::cast_possible_truncation)]
        let stamp = ticks as u32;
        stamp
    }

    /// What is left of a value after the time between two stamps.
    fn decay(stamp: u32, then: u32) -> f32 {
        // Two workers' clocks readings may come in the wrong order: a step back is no step.
        let age = stamp.wrapping_sub(then);
        if age == 0 || age > u32::MAX / 2 {
            return 1.0;
        }
        (-(age as f32) * TICK.as_secs_f32() / TAU).exp()
    }

    /// Microseconds, decayed until now.
    pub(super) fn get(&self, now: Instant) -> f32 {
        let (value, then) = unpack(self.packed.load(Relaxed));
        if value == 0.0 { 0.0 } else { value * Self::decay(self.stamp(now), then) }
    }

    pub(super) fn record(&self, sample: Duration, now: Instant) {
        let sample = micros(sample);
        self.update(now, |value, decay| if sample > value { sample } else { value * decay + sample * (1.0 - decay) });
    }

    /// Records max(ewma, sample).
    pub(super) fn at_least(&self, sample: Duration, now: Instant) {
        let sample = micros(sample);
        self.update(now, |value, _| value.max(sample));
    }

    fn update(&self, now: Instant, next: impl Fn(f32, f32) -> f32) {
        let stamp = self.stamp(now);
        let change = |packed| {
            let (value, then) = unpack(packed);
            Some(pack(next(value, Self::decay(stamp, then)), stamp))
        };
        // The closure always returns a value, so this cannot fail.
        let _ = self.packed.fetch_update(Relaxed, Relaxed, change);
    }
}

fn micros(time: Duration) -> f32 {
    // At least 1: 0 means that nothing was measured.
    (time.as_secs_f32() * 1e6).max(1.0)
}

fn pack(value: f32, stamp: u32) -> u64 {
    u64::from(value.to_bits()) << 32 | u64::from(stamp)
}

fn unpack(packed: u64) -> (f32, u32) {
    #[allow(clippy::cast_possible_truncation)]
    let (value, stamp) = ((packed >> 32) as u32, packed as u32);
    (f32::from_bits(value), stamp)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rises_at_once_and_forgets_slowly() {
        let start = Instant::now();
        let ewma = PeakEwma::new(start);
        ewma.record(Duration::from_millis(10), start);
        assert_eq!(ewma.get(start), 10_000.0);
        ewma.record(Duration::from_millis(100), start + Duration::from_secs(1));
        assert_eq!(ewma.get(start + Duration::from_secs(1)), 100_000.0);
        let later = start + Duration::from_secs(11);
        ewma.record(Duration::from_millis(10), later);
        let value = ewma.get(later);
        assert!((43_000.0..43_200.0).contains(&value), "100 ms / e + 10 ms × (1 - 1/e), not {value}");
    }

    #[test]
    fn a_fast_failure_does_not_flatter() {
        let start = Instant::now();
        let ewma = PeakEwma::new(start);
        ewma.record(Duration::from_millis(50), start);
        ewma.at_least(Duration::from_micros(10), start + Duration::from_secs(1));
        assert_eq!(ewma.get(start + Duration::from_secs(1)), 50_000.0);
        ewma.at_least(Duration::from_secs(3), start + Duration::from_secs(1));
        assert_eq!(ewma.get(start + Duration::from_secs(1)), 3_000_000.0);
    }
}
