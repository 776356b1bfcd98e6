//! How often the same thing is said in the log: a flood of refused connections must not become a flood of lines.

use std::time::{Duration, Instant};

/// A period in which lines are counted.
pub const PERIOD: Duration = Duration::from_secs(1);
/// Lines of one period that are said.
pub const LINES: u32 = 5;

/// One kind of log line, on one worker.
#[derive(Debug, Default)]
pub struct Quiet {
    since: Option<Instant>,
    said: u32,
    unsaid: u64,
}

impl Quiet {
    /// Whether a line may be said now; if so, how many before it were not.
    pub fn say(&mut self, now: Instant) -> Option<u64> {
        if self.since.is_none_or(|since| now.saturating_duration_since(since) >= PERIOD) {
            self.since = Some(now);
            self.said = 0;
        }
        if self.said >= LINES {
            self.unsaid += 1;
            return None;
        }
        self.said += 1;
        Some(std::mem::take(&mut self.unsaid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_a_few_lines_and_a_number() {
        let start = Instant::now();
        let mut quiet = Quiet::default();
        let said = (0..1000).filter(|_| quiet.say(start).is_some()).count();
        assert_eq!(said, LINES as usize);
        assert_eq!(quiet.say(start + PERIOD), Some(1000 - u64::from(LINES)));
        assert_eq!(quiet.say(start + PERIOD), Some(0), "told once");
    }
}
