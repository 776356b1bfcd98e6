//! Fetches what filters name on other hosts, and tries again what failed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use outrigger_core::resource::ModuleSource;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::remote::{FetchError, Fetcher};
use crate::mesh::Mesh;

/// Fetches at a time.
const PARALLEL: usize = 4;
const BACKOFF: Duration = Duration::from_secs(1);
const MAX_BACKOFF: Duration = Duration::from_secs(300);

/// A source that gave nothing, or something else.
#[derive(Debug, Clone)]
struct Away {
    backoff: Duration,
    next: Instant,
    /// What was wanted of it
    pinned: BTreeSet<String>,
}

/// Runs until dropped.
pub async fn follow(mesh: Arc<Mesh>, fetcher: Fetcher) {
    let mut states = mesh.subscribe();
    let mut away = BTreeMap::<ModuleSource, Away>::new();
    let mut running = BTreeSet::new();
    let mut fetches = JoinSet::new();
    loop {
        let missing = states.borrow_and_update().missing.clone();
        // Who wants another digest of it need not wait.
        away.retain(|source, away| missing.get(source) == Some(&away.pinned));
        let now = Instant::now();
        for (source, pinned) in &missing {
            let due = away.get(source).is_none_or(|away| away.next <= now);
            if due && running.len() < PARALLEL && running.insert(source.clone()) {
                let (fetcher, source, pinned) = (fetcher.clone(), source.clone(), pinned.clone());
                fetches.spawn(async move { (fetcher.fetch(&source).await, source, pinned) });
            }
        }
        // With every place taken, the next to end decides when to look again.
        let next = away.iter().filter(|(source, _)| !running.contains(*source)).map(|(_, away)| away.next).min();
        let next = next.filter(|_| running.len() < PARALLEL);
        tokio::select! {
            changed = states.changed() => {
                if changed.is_err() {
                    return;
                }
            }
            Some(Ok((fetched, source, pinned))) = fetches.join_next() => {
                running.remove(&source);
                take(&mesh, (source, pinned), fetched, &mut away).await;
            }
            () = async { tokio::time::sleep_until(next.unwrap_or(now)).await }, if next.is_some() => {}
        }
    }
}

async fn take(
    mesh: &Arc<Mesh>,
    (source, pinned): (ModuleSource, BTreeSet<String>),
    fetched: Result<Vec<u8>, FetchError>,
    away: &mut BTreeMap<ModuleSource, Away>,
) {
    let problem = match fetched {
        Ok(bytes) => mesh.fetched(source.clone(), bytes).await.err(),
        Err(error) => Some(error.to_string()),
    };
    let Some(why) = problem else {
        tracing::info!(%source, "a filter's module was fetched");
        away.remove(&source);
        return;
    };
    let backoff = away.get(&source).map_or(BACKOFF, |away| (away.backoff * 2).min(MAX_BACKOFF));
    tracing::warn!(%source, why, again = ?backoff, "a filter's module cannot be fetched");
    away.insert(source.clone(), Away { backoff, next: Instant::now() + backoff, pinned });
    mesh.not_fetched(source, why).await;
}
