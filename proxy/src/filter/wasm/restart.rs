//! When a filter that fails may start again.

use std::time::{Duration, Instant};

/// Failures within this time count together.
const WINDOW: Duration = Duration::from_secs(10);
/// As many failures in the window make restarts wait.
const TOLERATED: usize = 3;

/// The restarts of one filter, over all workers. Pure: time is an argument.
#[derive(Debug)]
pub(in super::super) struct Restart {
    base: Duration,
    max: Duration,
    failures: Vec<Instant>,
    backoff: Option<(Duration, Instant)>,
}

impl Restart {
    /// Waits from `base`, doubling up to `max`.
    pub(in super::super) fn new(base: Duration, max: Duration) -> Self {
        Self { base, max: max.max(base), failures: Vec::new(), backoff: None }
    }

    /// An instance failed, or could not start.
    pub(in super::super) fn failed(&mut self, now: Instant) {
        self.failures.retain(|at| now.saturating_duration_since(*at) < WINDOW);
        self.failures.push(now);
        if self.failures.len() > TOLERATED {
            self.failures.remove(0);
        }
        let wait = match self.backoff {
            // It failed again soon after a wait: wait longer.
            Some((wait, until)) if now >= until && now.saturating_duration_since(until) < WINDOW.max(wait) => {
                (wait * 2).min(self.max)
            }
            // Others failed at the same time: this wait is already running.
            Some((_, until)) if now < until => return,
            _ if self.failures.len() >= TOLERATED => self.base,
            _ => {
                self.backoff = None;
                return;
            }
        };
        self.backoff = Some((wait, now + wait));
    }

    /// Time to wait until an instance may start; `None`: now.
    pub(in super::super) fn wait(&self, now: Instant) -> Option<Duration> {
        let (_, until) = self.backoff?;
        Some(until.saturating_duration_since(now)).filter(|left| !left.is_zero())
    }

    /// True: it waits, and has reached the longest wait.
    pub(in super::super) fn at_maximum(&self, now: Instant) -> bool {
        self.wait(now).is_some() && self.backoff.is_some_and(|(wait, _)| wait >= self.max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_third_failure_in_ten_seconds_waits_and_each_next_waits_longer() {
        let mut restart = Restart::new(Duration::from_secs(1), Duration::from_secs(3));
        let mut now = Instant::now();
        for _ in 0..2 {
            restart.failed(now);
            assert_eq!(restart.wait(now), None);
        }
        restart.failed(now);
        assert_eq!(restart.wait(now), Some(Duration::from_secs(1)));
        for wait in [2, 3, 3] {
            now += restart.wait(now).unwrap();
            assert_eq!(restart.wait(now), None);
            restart.failed(now);
            assert_eq!(restart.wait(now), Some(Duration::from_secs(wait)));
            // Another worker's instance failing meanwhile changes nothing.
            restart.failed(now);
            assert_eq!(restart.wait(now), Some(Duration::from_secs(wait)));
        }
        assert!(restart.at_maximum(now));
    }

    #[test]
    fn rare_failures_never_wait() {
        let mut restart = Restart::new(Duration::from_secs(1), Duration::from_secs(60));
        let mut now = Instant::now();
        for _ in 0..20 {
            restart.failed(now);
            assert_eq!(restart.wait(now), None);
            now += Duration::from_secs(6);
        }
    }

    #[test]
    fn a_quiet_time_forgives() {
        let mut restart = Restart::new(Duration::from_secs(1), Duration::from_secs(60));
        let now = Instant::now();
        for _ in 0..3 {
            restart.failed(now);
        }
        let later = now + Duration::from_secs(60);
        restart.failed(later);
        assert_eq!(restart.wait(later), None);
    }
}
