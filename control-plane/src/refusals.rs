//! What callers were refused, for the log and `/api/v1/status`. Bounded: the newest are kept.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use serde::Serialize;

/// How many refusals status shows.
const KEPT: usize = 256;

/// One refused call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Refusal {
    /// What was asked for: `sign`, `register`, `withdraw`, `subscribe`, …
    pub call: &'static str,
    /// Who asked: identity, or address where there is none
    pub caller: String,
    /// Why, and what to do
    pub reason: String,
    /// Seconds since the Unix epoch
    pub at: u64,
}

/// The newest refusals.
#[derive(Debug, Default)]
pub struct Refusals(Mutex<VecDeque<Refusal>>);

impl Refusals {
    /// Logs a refusal and keeps it for status. What the caller sent is cut to a sane length first.
    pub fn record(&self, call: &'static str, caller: &str, reason: &str) {
        let cut = |text: &str| text.chars().take(512).collect::<String>();
        let at = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let refusal = Refusal { call, caller: cut(caller), reason: cut(reason), at };
        tracing::warn!(call, caller = %refusal.caller, reason = %refusal.reason, "refused");
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back(refusal);
    }

    /// What is kept, oldest first.
    pub fn list(&self) -> Vec<Refusal> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }
}
