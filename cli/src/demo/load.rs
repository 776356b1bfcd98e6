//! Load on the shop's front door, and what its answers said.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use super::layout::{FILTER_HEADER, FILTER_VALUE};

/// Outcomes kept; the oldest go first.
const KEPT: usize = 20_000;
/// Requests under way at most: beyond it the load waits, as a pool of users would.
const CONCURRENT: usize = 64;
const TIMEOUT: Duration = Duration::from_secs(5);

/// One answer, as the client saw it.
#[derive(Debug, Clone)]
pub(super) struct Outcome {
    /// When it was asked for
    pub(super) at: Instant,
    pub(super) latency: Duration,
    /// Version of reviews that answered, from the body
    pub(super) version: Option<String>,
    /// The filter's header was there
    pub(super) filtered: bool,
    /// What went wrong, when anything did
    pub(super) error: Option<String>,
}

/// Load under way.
#[derive(Debug)]
pub(super) struct Load {
    outcomes: Arc<Mutex<VecDeque<Outcome>>>,
    task: JoinHandle<()>,
}

/// Sends `rate` requests per second to `url`. With `nowhere` set it sends none (a sabotage of the check).
pub(super) fn start(url: String, rate: u32, nowhere: bool) -> Load {
    let outcomes = Arc::<Mutex<VecDeque<Outcome>>>::default();
    let into = outcomes.clone();
    let task = tokio::spawn(async move {
        if nowhere {
            return;
        }
        let client: Client<HttpConnector, Full<Bytes>> = Client::builder(TokioExecutor::new()).build_http();
        let free = Arc::new(Semaphore::new(CONCURRENT));
        let mut tick = tokio::time::interval(Duration::from_secs(1) / rate.max(1));
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            let Ok(permit) = free.clone().acquire_owned().await else { return };
            let (client, url, into) = (client.clone(), url.clone(), into.clone());
            tokio::spawn(async move {
                let outcome = ask(&client, &url).await;
                let mut outcomes = lock(&into);
                if outcomes.len() == KEPT {
                    outcomes.pop_front();
                }
                outcomes.push_back(outcome);
                drop(permit);
            });
        }
    });
    Load { outcomes, task }
}

impl Load {
    /// What was asked for at `from` or later, and has been answered.
    pub(super) fn since(&self, from: Instant) -> Vec<Outcome> {
        lock(&self.outcomes).iter().filter(|outcome| outcome.at >= from).cloned().collect()
    }

    /// Ends it.
    pub(super) fn stop(&self) {
        self.task.abort();
    }
}

async fn ask(client: &Client<HttpConnector, Full<Bytes>>, url: &str) -> Outcome {
    let at = Instant::now();
    let answer = tokio::time::timeout(TIMEOUT, fetch(client, url)).await;
    let latency = at.elapsed();
    match answer {
        Ok(Ok((version, filtered, error))) => Outcome { at, latency, version, filtered, error },
        Ok(Err(e)) => Outcome { at, latency, version: None, filtered: false, error: Some(format!("{e:#}")) },
        Err(_) => Outcome { at, latency, version: None, filtered: false, error: Some("no answer within 5 s".into()) },
    }
}

async fn fetch(
    client: &Client<HttpConnector, Full<Bytes>>,
    url: &str,
) -> anyhow::Result<(Option<String>, bool, Option<String>)> {
    let (head, body) = client.request(Request::get(url).body(Full::default())?).await?.into_parts();
    let body = body.collect().await?.to_bytes();
    let error = (!head.status.is_success()).then(|| {
        let reason =
            head.headers.get("x-outrigger-reason").and_then(|value| value.to_str().ok()).unwrap_or("no reason");
        format!("{} ({reason}): {}", head.status, String::from_utf8_lossy(&body[..body.len().min(200)]))
    });
    let shop: Value = serde_json::from_slice(&body).unwrap_or_default();
    let version = shop.pointer("/calls/version").and_then(Value::as_str).map(str::to_owned);
    let filtered = head.headers.get(FILTER_HEADER).is_some_and(|value| value == FILTER_VALUE);
    Ok((version, filtered, error))
}

fn lock(outcomes: &Mutex<VecDeque<Outcome>>) -> MutexGuard<'_, VecDeque<Outcome>> {
    outcomes.lock().unwrap_or_else(PoisonError::into_inner)
}
