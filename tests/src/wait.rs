//! Waiting for causes.

use std::thread;
use std::time::{Duration, Instant};

/// Nothing that works takes this long, even on a busy machine.
pub const HANG: Duration = Duration::from_secs(30);

/// Asks until there is an answer, and returns it.
///
/// # Panics
/// After [`HANG`], naming `what`.
#[track_caller]
pub fn until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(started.elapsed() < HANG, "still waiting after {HANG:?}: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}
