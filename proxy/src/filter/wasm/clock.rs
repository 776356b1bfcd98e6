//! The clocks that guests read.

use std::cell::Cell;
use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

thread_local! {
    static SET: Cell<Option<Duration>> = const { Cell::new(None) };
}

/// Has the calling thread's guests read this time, since the Unix epoch, on both clocks, until it is set anew; `None`: the real ones. For
/// runs that must come out the same every time.
pub(in super::super) fn set(now: Option<Duration>) {
    SET.set(now);
}

/// Since the Unix epoch.
pub(super) fn wall() -> Duration {
    SET.get().unwrap_or_else(|| SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}

/// Since some moment of this process; never goes back.
pub(super) fn monotonic() -> Duration {
    static START: OnceLock<Instant> = OnceLock::new();
    SET.get().unwrap_or_else(|| START.get_or_init(Instant::now).elapsed())
}
