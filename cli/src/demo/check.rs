//! `outrigger demo --check`: seven conditions, each observed from outside.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use super::layout::CANARY;
use super::load::{Load, Outcome};
use super::observe::{self, Scrape};
use super::shop::Shop;
use super::{POLL, say};

/// The whole check, at most.
pub(super) const LIMIT: Duration = Duration::from_secs(46);
/// Until one condition must be seen.
const PATIENCE: Duration = Duration::from_secs(8);
/// The canary's share after it was moved, percent.
const MOVED: u32 = 80;
/// Requests that a share is judged by, and how far it may be off (percentage points): 3.5 σ of a fair split.
const SAMPLE: usize = 200;
const TOLERANCE: f64 = 10.0;

/// What `--check` proves, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Condition {
    /// Requests were answered
    Traffic,
    /// All of them over mTLS, from the caller's identity
    Mtls,
    /// Versions in the split that the route asks for
    Split,
    /// The WASM filter's header reached the client
    Filter,
    /// A changed weight applied
    Weights,
    /// A killed endpoint was retried around, with no client error
    Retry,
    /// Certificates were replaced under load, with no error
    Rotation,
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Traffic => "traffic",
            Self::Mtls => "mtls",
            Self::Split => "split",
            Self::Filter => "filter",
            Self::Weights => "weights",
            Self::Retry => "retry",
            Self::Rotation => "rotation",
        })
    }
}

/// Which condition was not observed, and what was seen instead.
#[derive(Debug)]
pub(super) struct Failure {
    condition: Condition,
    seen: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "condition `{}` was not observed: {}", self.condition, self.seen)
    }
}

type Seen = Result<String, String>;

/// Observes the conditions one after the other.
pub(super) async fn run(shop: &mut Shop, load: &Load) -> Result<(), Failure> {
    let start = Instant::now();
    let serials = certificates(shop).await;
    let step = |condition: Condition, seen: Seen| match seen {
        Ok(seen) => {
            say(&format!("ok  {:>4.1} s  {condition}: {seen}", start.elapsed().as_secs_f64()));
            Ok(())
        }
        Err(seen) => Err(Failure { condition, seen }),
    };
    step(Condition::Traffic, traffic(load, start).await)?;
    step(Condition::Mtls, mtls(shop).await)?;
    step(Condition::Split, split(load, start, CANARY).await)?;
    step(Condition::Filter, filter(load, start))?;
    step(Condition::Weights, weights(shop, load).await)?;
    step(Condition::Retry, retry(shop, load).await)?;
    step(Condition::Rotation, rotation(shop, load, start, &serials).await)
}

/// Waits for `found`, and says what was seen last when it did not come.
async fn within<T>(limit: Duration, mut found: impl AsyncFnMut() -> Result<T, String>) -> Result<T, String> {
    let end = Instant::now() + limit;
    loop {
        match found().await {
            Ok(found) => return Ok(found),
            Err(seen) if Instant::now() > end => return Err(seen),
            Err(_) => tokio::time::sleep(POLL).await,
        }
    }
}

fn no_errors(outcomes: &[Outcome]) -> Result<(), String> {
    let failed: Vec<&Outcome> = outcomes.iter().filter(|outcome| outcome.error.is_some()).collect();
    match failed.first().and_then(|outcome| outcome.error.as_ref()) {
        Some(error) => Err(format!("{} of {} requests failed, the first with: {error}", failed.len(), outcomes.len())),
        None => Ok(()),
    }
}

async fn traffic(load: &Load, start: Instant) -> Seen {
    within(PATIENCE, async || {
        let outcomes = load.since(start);
        no_errors(&outcomes)?;
        let answered = outcomes.len();
        if answered < 50 {
            Err(format!("{answered} requests were answered"))
        } else {
            Ok(format!("{answered} requests, no error"))
        }
    })
    .await
}

/// From the receiving sidecars' metrics: every request came over mTLS, from the identity that may call.
async fn mtls(shop: &Shop) -> Seen {
    within(PATIENCE, async || {
        let mut seen = Vec::new();
        for (workload, scrape) in shop.scrapes().await {
            let caller = match workload.service {
                "reviews" => shop.layout().identity("web"),
                "ratings" => shop.layout().identity("reviews"),
                _ => continue,
            };
            let (from, all) = peers(&scrape, &caller);
            if from == 0.0 || from < all {
                return Err(format!("{}: {from} of {all} requests came over mTLS from {caller}", workload.name));
            }
            if scrape.sum("outrigger_tls_connections_total", &[("direction", "inbound"), ("peer", &caller)]) == 0.0 {
                return Err(format!("{}: no TLS connection from {caller}", workload.name));
            }
            seen.push(format!("{} {from}/{all}", workload.name));
        }
        if seen.len() < 3 { Err(format!("only {} sidecars answered", seen.len())) } else { Ok(seen.join(", ")) }
    })
    .await
}

/// Requests that a sidecar received: from this identity, and from anybody.
pub(super) fn peers(scrape: &Scrape, caller: &str) -> (f64, f64) {
    let name = "outrigger_peer_requests_total";
    (scrape.sum(name, &[("peer", caller)]), scrape.sum(name, &[]))
}

fn share_of_v2(outcomes: &[Outcome]) -> (usize, f64) {
    let of = |version: &str| outcomes.iter().filter(|outcome| outcome.version.as_deref() == Some(version)).count();
    let (v1, v2) = (of("v1"), of("v2"));
    #[allow(clippy::cast_precision_loss)] // thousands at most
    let share = 100.0 * v2 as f64 / (v1 + v2).max(1) as f64;
    (v1 + v2, share)
}

async fn split(load: &Load, from: Instant, wanted: u32) -> Seen {
    let share = within(PATIENCE, async || match share_of_v2(&load.since(from)) {
        (count, _) if count < SAMPLE => Err(format!("{count} answers named a version of reviews")),
        (_, share) => Ok(share),
    })
    .await?;
    let seen = format!("{share:.0} % from v2, {wanted} % wanted");
    if (share - f64::from(wanted)).abs() > TOLERANCE { Err(seen) } else { Ok(seen) }
}

fn filter(load: &Load, from: Instant) -> Seen {
    let outcomes = load.since(from);
    let with = outcomes.iter().filter(|outcome| outcome.filtered).count();
    let seen = format!("{with} of {} answers carried the filter's header", outcomes.len());
    if with < outcomes.len() || with == 0 { Err(seen) } else { Ok(seen) }
}

async fn weights(shop: &Shop, load: &Load) -> Seen {
    if shop.layout().sabotage != Some(Condition::Weights) {
        shop.layout().write_route(MOVED).map_err(|e| format!("{e:#}"))?;
    }
    // The change is applied when answers follow it: the next 30 are mostly v2.
    let changed = Instant::now();
    let moved = within(PATIENCE, async || {
        let recent = load.since(Instant::now().checked_sub(Duration::from_millis(700)).unwrap_or(changed));
        let (count, share) = share_of_v2(&recent);
        if count >= 20 && share > 50.0 {
            Ok(Instant::now())
        } else {
            Err(format!("{share:.0} % from v2 long after {MOVED} % was asked for"))
        }
    })
    .await?;
    let after = changed.elapsed();
    split(load, moved, MOVED).await.map(|seen| format!("{seen}, {:.1} s after the file changed", after.as_secs_f64()))
}

async fn retry(shop: &mut Shop, load: &Load) -> Seen {
    shop.add_spare().await.map_err(|e| format!("the second instance of ratings did not start: {e:#}"))?;
    let spare = shop.layout().spare.clone();
    let served = within(PATIENCE, async || {
        let scrape = Scrape::of(spare.health).await.map_err(|e| format!("{e:#}"))?;
        let (_, all) = peers(&scrape, "");
        // Few will do: a new instance whose first answers were slow gets less for a while (peak-EWMA).
        if all < 3.0 { Err(format!("the second instance of ratings got {all} requests")) } else { Ok(all) }
    })
    .await?;
    let before = failures(shop).await;
    let killed = Instant::now();
    shop.crash_spare();
    within(PATIENCE, async || {
        let outcomes = load.since(killed);
        no_errors(&outcomes)?;
        let failed = failures(shop).await - before;
        if failed < 1.0 {
            return Err("no attempt at the killed endpoint failed, so nothing was retried".into());
        }
        if outcomes.len() < 100 { Err(format!("{} requests since the kill", outcomes.len())) } else { Ok(failed) }
    })
    .await
    .map(|failed| {
        format!(
            "an instance that had served {served} requests was killed; {failed} failed attempts at it, no client error"
        )
    })
}

/// Attempts at endpoints that failed, over all sidecars.
async fn failures(shop: &Shop) -> f64 {
    let name = "outrigger_attempts_total";
    let failed = |scrape: &Scrape| scrape.sum(name, &[]) - scrape.sum(name, &[("outcome", "success")]);
    shop.scrapes().await.iter().map(|(_, scrape)| failed(scrape)).sum()
}

/// What each sidecar's admin port says of its certificate: the serial number.
async fn certificates(shop: &Shop) -> BTreeMap<&'static str, String> {
    let mut all = BTreeMap::new();
    for workload in shop.workloads() {
        if let Ok(text) = observe::get(workload.admin, "/certs").await
            && let Ok(page) = serde_json::from_str::<serde_json::Value>(&text)
            && let Some(serial) = page.get("serial").and_then(serde_json::Value::as_str)
        {
            all.insert(workload.name, serial.to_owned());
        }
    }
    all
}

async fn rotation(shop: &Shop, load: &Load, start: Instant, first: &BTreeMap<&'static str, String>) -> Seen {
    let rotated = within(2 * PATIENCE, async || {
        let now = certificates(shop).await;
        let same: Vec<_> =
            first.iter().filter(|(name, serial)| now.get(*name) == Some(*serial)).map(|(name, _)| *name).collect();
        if first.len() < 4 || now.len() < 4 {
            return Err(format!("{} sidecars showed a certificate", now.len().min(first.len())));
        }
        if same.is_empty() {
            Ok(now.len())
        } else {
            Err(format!("the certificate of {} was not replaced", same.join(", ")))
        }
    })
    .await?;
    // New connections were made with the new ones, and nothing failed in all this time.
    let after = Instant::now();
    within(PATIENCE, async || match load.since(after).len() {
        count if count < 50 => Err(format!("{count} requests after the rotation")),
        _ => Ok(()),
    })
    .await?;
    let outcomes = load.since(start);
    no_errors(&outcomes)?;
    Ok(format!("{rotated} certificates replaced under load; {} requests in all, no error", outcomes.len()))
}
