//! Configuration on demand: what the data path asks for is subscribed to, linked, and swapped in.

mod driver;
mod engine;
mod local;
mod modules;
mod persist;
mod remote;
mod reply;
mod subscriptions;
#[cfg(test)]
mod tests;

pub use driver::{Discovery, Origin, Sink};
pub use local::Local;
pub use remote::Remote;

use driver::{Event, Requests};

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use outrigger_core::key::Key;
use outrigger_core::reason::Reason;
use tokio::sync::{mpsc, watch};

use crate::snapshot::{Snapshot, Target};

/// Longest wait for the first answer about a destination.
pub const FIRST_USE: Duration = Duration::from_secs(1);
/// Destinations that may wait for the discovery task at once; more are answered `discovery-timeout`.
const QUEUE: usize = 1024;

/// What the data path knows of discovery.
#[derive(Debug)]
pub struct Directory {
    snapshot: Arc<ArcSwap<Snapshot>>,
    wanted: mpsc::Sender<Key>,
    /// Number of the newest snapshot.
    swapped: watch::Sender<u64>,
    connected: AtomicBool,
    /// Since when no answer can be had; looked at only on the way of an unknown destination.
    away_since: Mutex<Option<Instant>>,
}

impl Directory {
    /// An empty directory, and the keys that will be asked for.
    pub fn new() -> (Arc<Self>, mpsc::Receiver<Key>) {
        let (wanted, keys) = mpsc::channel(QUEUE);
        let directory = Self {
            snapshot: Arc::new(ArcSwap::from_pointee(Snapshot::default())),
            wanted,
            swapped: watch::channel(0).0,
            connected: AtomicBool::new(false),
            away_since: Mutex::new(Some(Instant::now())),
        };
        (Arc::new(directory), keys)
    }

    /// Where the newest snapshot is: workers cache it.
    pub fn cell(&self) -> Arc<ArcSwap<Snapshot>> {
        self.snapshot.clone()
    }

    /// The newest snapshot.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.load_full()
    }

    /// Numbers of snapshots, as they are swapped in.
    pub fn swaps(&self) -> watch::Receiver<u64> {
        self.swapped.subscribe()
    }

    /// Whether answers can be had now.
    pub fn connected(&self) -> bool {
        self.connected.load(Ordering::Acquire)
    }

    /// Subscribes to a destination and waits for its first answer, at most [`FIRST_USE`].
    ///
    /// # Errors
    /// `discovery-timeout`: no answer in time. `discovery-unavailable`: the control plane is away and the destination may be
    /// of the mesh. (Away and not of the mesh: [`Target::Absent`].)
    pub async fn resolve(&self, key: &Key) -> Result<(Arc<Snapshot>, Target), Reason> {
        let mut swaps = self.swapped.subscribe();
        if self.wanted.try_send(key.clone()).is_err() {
            return Err(Reason::DiscoveryTimeout);
        }
        let answered = async {
            loop {
                let snapshot = self.snapshot();
                if let Some(target) = snapshot.lookup(key) {
                    let target = target.clone();
                    return Some((snapshot, target));
                }
                // A connection that was just lost is often back at once: that is worth the wait, a long absence is not.
                if self.away_for(FIRST_USE) || swaps.changed().await.is_err() {
                    return None;
                }
            }
        };
        match tokio::time::timeout(FIRST_USE, answered).await {
            Ok(Some(found)) => Ok(found),
            Err(_) if self.connected() => Err(Reason::DiscoveryTimeout),
            Ok(None) | Err(_) => self.unanswered(key, self.snapshot()).ok_or(Reason::DiscoveryUnavailable),
        }
    }

    fn away_for(&self, time: Duration) -> bool {
        let since = *self.away_since.lock().unwrap_or_else(PoisonError::into_inner);
        since.is_some_and(|since| since.elapsed() >= time)
    }

    /// Away from the control plane: an outside address is outside, anything that may be of the mesh is refused rather than
    /// passed through in plaintext.
    fn unanswered(&self, key: &Key, snapshot: Arc<Snapshot>) -> Option<(Arc<Snapshot>, Target)> {
        let outside = match key {
            Key::Ip(address) => snapshot.mesh.is_some() && !snapshot.in_mesh(address.ip()),
            Key::Host(..) => snapshot.mesh.is_some(),
            _ => false,
        };
        outside.then_some((snapshot, Target::Absent))
    }

    /// Publishes a new snapshot. Only the discovery task calls it.
    pub(crate) fn publish(&self, mut snapshot: Snapshot) -> u64 {
        let number = self.snapshot.load().number + 1;
        snapshot.number = number;
        self.snapshot.store(Arc::new(snapshot));
        self.swapped.send_replace(number);
        number
    }

    pub(crate) fn set_connected(&self, connected: bool) {
        self.connected.store(connected, Ordering::Release);
        let mut since = self.away_since.lock().unwrap_or_else(PoisonError::into_inner);
        *since = if connected { None } else { since.or_else(|| Some(Instant::now())) };
        drop(since);
        // Those who wait look again.
        self.swapped.send_modify(|_| {});
    }
}
