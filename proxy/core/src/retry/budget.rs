//! A retry budget: so many per cent of the requests, and so many per second in any case. A token bucket that all
//! workers share.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use crate::link::Budget;

/// Tokens of one cluster. A retry costs one.
#[derive(Debug, Default)]
pub struct RetryBudget {
    /// In hundredths of a token: a request deposits as many as the policy has per cent.
    balance: AtomicI64,
    base: OnceLock<Instant>,
    /// Until when the tokens per second are paid in, in microseconds since `base`.
    paid: AtomicU64,
}

const TOKEN: i64 = 100;
const SECOND: u64 = 1_000_000;
/// How many seconds' worth of the minimum rate the bucket holds: how big a burst of retries may be.
const BURST: i64 = 10;

impl RetryBudget {
    /// A budget that starts with what the minimum rate earns until the bucket is full.
    pub fn new(policy: &Budget, now: Instant) -> Self {
        let start = i64::from(policy.min_per_second) * BURST * TOKEN;
        let budget = Self { balance: AtomicI64::new(start), ..Self::default() };
        budget.base.get_or_init(|| now);
        budget
    }

    /// A request (not a retry) was made. In a healthy cluster the bucket is full, and this is one load.
    pub fn deposit(&self, policy: &Budget) {
        if self.balance.load(Relaxed) < capacity(policy) {
            self.balance.fetch_add(i64::from(policy.percent), Relaxed);
        }
    }

    /// Takes one retry out. `false`: used up.
    pub(super) fn withdraw(&self, policy: &Budget, now: Instant) -> bool {
        self.pay_in(policy, now);
        let take = |balance: i64| (balance >= TOKEN).then(|| balance - TOKEN);
        self.balance.fetch_update(Relaxed, Relaxed, take).is_ok()
    }

    /// Pays in what the minimum rate has earned since the last time: whoever moves `paid` on pays.
    fn pay_in(&self, policy: &Budget, now: Instant) {
        let base = *self.base.get_or_init(|| now);
        let now = u64::try_from(now.saturating_duration_since(base).as_micros()).unwrap_or(u64::MAX);
        let paid = self.paid.load(Relaxed);
        let rate = u64::from(policy.min_per_second) * TOKEN.unsigned_abs();
        // Whole hundredths only, and the time that is not yet worth one stays unpaid.
        let earned = now.saturating_sub(paid).min(SECOND * BURST.unsigned_abs()).saturating_mul(rate) / SECOND;
        if earned == 0 || self.paid.compare_exchange(paid, now, Relaxed, Relaxed).is_err() {
            return;
        }
        let room = |balance: i64| {
            let full = capacity(policy).max(balance);
            Some(balance.saturating_add_unsigned(earned).min(full))
        };
        // The closure always returns a value, so this cannot fail.
        let _ = self.balance.fetch_update(Relaxed, Relaxed, room);
    }
}

fn capacity(policy: &Budget) -> i64 {
    i64::from(policy.min_per_second.max(1)) * BURST * TOKEN
}
