//! Shutting down in order: not ready and withdrawn → no new requests on old connections → listeners closed → what is left
//! is cut.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use outrigger_core::reason::Reason;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::state::{Activity, Proxy};

/// How far the shutdown is. Later phases include earlier ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Phase {
    /// Normal service
    Serving = 0,
    /// `/ready` says no and the registration is being withdrawn; everything is still served
    NotReady = 1,
    /// Inbound connections end: `Connection: close`, GOAWAY; new ones are still served, with one request each
    Closing = 2,
    /// Inbound listeners are closed
    Stopped = 3,
    /// The time is over: every connection is cut
    Cut = 4,
}

impl Phase {
    fn from_u8(number: u8) -> Self {
        match number {
            0 => Self::Serving,
            1 => Self::NotReady,
            2 => Self::Closing,
            3 => Self::Stopped,
            _ => Self::Cut,
        }
    }

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Serving => "serving",
            Self::NotReady => "not-ready",
            Self::Closing => "closing",
            Self::Stopped => "stopped",
            Self::Cut => "cut",
        }
    }
}

/// The process's shutdown: moves forward only.
#[derive(Debug, Default)]
pub struct Drain {
    phase: AtomicU8,
    /// One channel per worker, so that connections of different workers share no lock.
    workers: std::sync::Mutex<Vec<watch::Sender<u8>>>,
    requested: tokio::sync::Notify,
}

/// The shutdown as one worker sees it. Clones are cheap.
#[derive(Debug, Clone)]
pub struct DrainWatch(watch::Receiver<u8>);

impl Drain {
    /// Serving.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// How far it is.
    pub fn phase(&self) -> Phase {
        Phase::from_u8(self.phase.load(Ordering::Acquire))
    }

    /// Moves forward to a phase; going back does nothing.
    pub fn advance(&self, phase: Phase) {
        self.phase.fetch_max(phase as u8, Ordering::AcqRel);
        let workers = self.workers.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        for worker in workers.iter() {
            worker.send_if_modified(|seen| {
                let newer = *seen < phase as u8;
                *seen = (*seen).max(phase as u8);
                newer
            });
        }
    }

    /// A view for one worker.
    pub fn watch(&self) -> DrainWatch {
        let (sender, receiver) = watch::channel(self.phase.load(Ordering::Acquire));
        let mut workers = self.workers.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        workers.retain(|worker| !worker.is_closed());
        workers.push(sender);
        DrainWatch(receiver)
    }

    /// Asks for the shutdown (`POST /drain`).
    pub fn request(&self) {
        self.requested.notify_one();
    }

    /// Resolves when somebody asked for the shutdown.
    pub async fn requested(&self) {
        self.requested.notified().await;
    }
}

impl DrainWatch {
    /// How far it is.
    pub fn phase(&self) -> Phase {
        Phase::from_u8(*self.0.borrow())
    }

    /// Resolves at the phase, or at once when it is reached already.
    pub async fn reached(&self, phase: Phase) {
        let mut receiver = self.0.clone();
        // A sender that is gone means that the process is ending without a drain: nothing more will come.
        if receiver.wait_for(|seen| *seen >= phase as u8).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Whether connections of clients should end: inbound at [`Phase::Closing`], outbound never before [`Phase::Cut`], since
    /// the application may still need to call.
    pub fn is_closing(&self, inbound: bool) -> bool {
        self.phase() >= if inbound { Phase::Closing } else { Phase::Cut }
    }

    /// Resolves at the next phase.
    pub async fn changed(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Resolves when everything is cut.
    pub async fn cut(&self) {
        self.reached(Phase::Cut).await;
    }
}

/// How often the count of open connections is looked at while draining.
const LOOK: Duration = Duration::from_millis(50);

/// Shuts down in order. Returns when nothing is open, or when the maximum time is over and the rest is cut. `withdraw`
/// ends when the control plane has confirmed, or after its own time.
pub async fn run(proxy: &Proxy, withdraw: impl Future<Output = ()>) {
    let started = Instant::now();
    let end = started + proxy.settings.drain_max;
    proxy.drain.advance(Phase::NotReady);
    tracing::info!(max = ?proxy.settings.drain_max, "draining: not ready any more");
    let told = async {
        tokio::join!(withdraw, tokio::time::sleep(proxy.settings.drain_min));
    };
    // The maximum time holds whatever the control plane does.
    if tokio::time::timeout_at(end, told).await.is_ok() {
        proxy.drain.advance(Phase::Closing);
        proxy.drain.advance(Phase::Stopped);
        until_quiet(proxy, end).await;
    }
    let Activity { inbound, outbound_running, .. } = proxy.activity();
    if inbound + outbound_running > 0 {
        tracing::warn!(
            inbound,
            outbound = outbound_running,
            reason = Reason::Draining.code(),
            "the maximum time of draining is over: what is open is cut"
        );
    }
    proxy.drain.advance(Phase::Cut);
    tracing::info!(took = ?started.elapsed(), "drained");
}

/// Until nothing is open; or nothing inbound is, and the application has kept its outbound connections idle for the minimum
/// time: kept-alive connections of one that may be gone hold nothing up.
async fn until_quiet(proxy: &Proxy, end: Instant) {
    let mut before = proxy.activity();
    let mut since = Instant::now();
    while Instant::now() < end {
        let now = proxy.activity();
        if now.inbound + now.outbound == 0 {
            return;
        }
        if now.inbound + now.outbound_running > 0 || now.begun != before.begun {
            since = Instant::now();
        } else if since.elapsed() >= proxy.settings.drain_min {
            return;
        }
        before = now;
        tokio::time::sleep(LOOK).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn phases_only_move_forward_and_late_watchers_see_them() {
        let drain = Drain::new();
        let early = drain.watch();
        drain.advance(Phase::Closing);
        drain.advance(Phase::NotReady);
        assert_eq!(drain.phase(), Phase::Closing);
        assert_eq!(early.phase(), Phase::Closing);
        assert!(early.is_closing(true) && drain.watch().is_closing(true));
        assert!(!early.is_closing(false));
        let cut = early.cut();
        tokio::pin!(cut);
        assert!(futures_util::poll!(&mut cut).is_pending());
        drain.advance(Phase::Cut);
        cut.await;
    }
}
