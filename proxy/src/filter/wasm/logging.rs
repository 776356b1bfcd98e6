//! What guests log: bounded, at the proxy's level.

use std::time::{Duration, Instant};

use super::host::Host;

/// Lines per second that one instance may log.
const LOG_LINES: u32 = 100;
/// Bytes of a line that are logged.
const LOG_BYTES: usize = 4096;

/// Keeps a guest from flooding the log.
#[derive(Debug, Default)]
pub(super) struct LogLimit {
    second: Option<Instant>,
    lines: u32,
}

impl LogLimit {
    fn admit(&mut self, now: Instant) -> bool {
        if self.second.is_none_or(|start| now.saturating_duration_since(start) >= Duration::from_secs(1)) {
            self.second = Some(now);
            self.lines = 0;
        }
        self.lines = self.lines.saturating_add(1);
        self.lines <= LOG_LINES
    }
}

impl Host {
    /// Logs a guest's line at a Proxy-Wasm level: one record, truncated, control characters escaped.
    pub(super) fn log(&mut self, level: u32, line: &[u8]) {
        if !level_enabled(level) || !self.log.admit(Instant::now()) {
            return;
        }
        let text = String::from_utf8_lossy(line.get(..line.len().min(LOG_BYTES)).unwrap_or_default());
        let mut text: String = text.chars().flat_map(escape).collect();
        if line.len() > LOG_BYTES {
            text.push_str(" [truncated]");
        }
        let filter = self.plugin().name.as_str();
        match level {
            0 => tracing::trace!(target: "filter", filter, "{text}"),
            1 => tracing::debug!(target: "filter", filter, "{text}"),
            2 => tracing::info!(target: "filter", filter, "{text}"),
            3 => tracing::warn!(target: "filter", filter, "{text}"),
            _ => tracing::error!(target: "filter", filter, "{text}"),
        }
    }
}

fn escape(c: char) -> impl Iterator<Item = char> {
    let (plain, escaped) = if c.is_control() { (None, Some(c.escape_default())) } else { (Some(c), None) };
    plain.into_iter().chain(escaped.into_iter().flatten())
}

fn level_enabled(level: u32) -> bool {
    match level {
        0 => tracing::enabled!(target: "filter", tracing::Level::TRACE),
        1 => tracing::enabled!(target: "filter", tracing::Level::DEBUG),
        2 => tracing::enabled!(target: "filter", tracing::Level::INFO),
        3 => tracing::enabled!(target: "filter", tracing::Level::WARN),
        _ => true,
    }
}

/// The lowest Proxy-Wasm level that is logged.
pub(super) fn log_level() -> u32 {
    (0..4).find(|level| level_enabled(*level)).unwrap_or(4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_lines_are_limited_per_second() {
        let mut limit = LogLimit::default();
        let now = Instant::now();
        assert_eq!((0..1000).filter(|_| limit.admit(now)).count(), 100);
        assert!(limit.admit(now + Duration::from_secs(1)));
    }

    #[test]
    fn control_characters_are_escaped() {
        assert_eq!("a\nb\x1b[0m".chars().flat_map(escape).collect::<String>(), "a\\nb\\u{1b}[0m");
    }
}
