//! The access log: one JSON object per line.
//!
//! A worker writes its lines into a buffer of its own. Full ones, and at the latest after [`MOST`] what there is, go to one
//! thread that writes to standard output, so that a slow reader delays no request and a system call carries many lines.

mod json;

use std::cell::{Cell, RefCell};
use std::io::Write as _;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::Notify;

use crate::metrics::{Local, Metric};

/// Bytes after which a buffer is handed over: each wakes the thread that writes.
const FULL: usize = 64 << 10;
/// Room for the line that makes a buffer full.
const LINE: usize = 1 << 10;
/// Buffers that may wait to be written: 2 MiB.
const QUEUE: usize = 32;
/// How long a line waits in a worker's buffer.
const MOST: Duration = Duration::from_millis(100);
/// How long a worker that ends waits for room in the queue.
const LAST: Duration = Duration::from_millis(500);

/// Where access log lines go.
#[derive(Debug, Clone)]
pub struct AccessLog {
    buffers: SyncSender<Vec<u8>>,
    /// Queued and not written yet
    waiting: Arc<AtomicU64>,
    full: usize,
}

/// What one line says.
#[derive(Debug, Clone, Default)]
pub struct Entry<'a> {
    /// `inbound` or `outbound`
    pub direction: &'a str,
    /// `http/1.1`, `h2`, `tcp`
    pub protocol: &'a str,
    /// HTTP method; empty for TCP
    pub method: &'a str,
    /// Authority as the client wrote it
    pub authority: &'a str,
    /// Path without its query, which may hold secrets
    pub path: &'a str,
    /// HTTP status; 0 for TCP, and where no response was sent
    pub status: u16,
    /// Why the mesh answered, or ended the exchange
    pub reason: &'a str,
    /// What exactly, in words
    pub detail: &'a str,
    /// `<namespace>/<name>`
    pub service: &'a str,
    /// Version of the endpoint
    pub version: &'a str,
    /// Address of the endpoint
    pub upstream: Option<std::net::SocketAddr>,
    /// Address of the client
    pub client: Option<std::net::SocketAddr>,
    /// Identity that the peer proved
    pub peer: &'a str,
    /// Rule that was chosen
    pub route: &'a str,
    /// Attempts made
    pub attempts: u32,
    /// From the head to the end
    pub duration: Duration,
    /// Bytes towards the server
    pub sent: u64,
    /// Bytes towards the client
    pub received: u64,
    /// W3C trace id
    pub trace: Option<u128>,
}

impl AccessLog {
    /// A log to standard output. The thread ends with the last handle.
    ///
    /// # Errors
    /// When no thread can be made.
    pub fn stdout() -> std::io::Result<Self> {
        let (log, buffers) = Self::queue(FULL);
        let waiting = log.waiting.clone();
        std::thread::Builder::new().name("access-log".into()).spawn(move || write_all(&buffers, &waiting))?;
        Ok(log)
    }

    /// A log whose lines are read by the caller, each as soon as it is written.
    pub fn channel() -> (Self, Receiver<Vec<u8>>) {
        Self::queue(1)
    }

    fn queue(full: usize) -> (Self, Receiver<Vec<u8>>) {
        let (buffers, queue) = sync_channel(QUEUE);
        (Self { buffers, waiting: Arc::default(), full }, queue)
    }

    /// The part that one worker writes to; lines that are lost are counted in `metrics`.
    pub fn lines(&self, metrics: Local) -> Lines {
        Lines(Rc::new(Inner {
            log: self.clone(),
            metrics,
            buffer: RefCell::default(),
            held: Cell::new(0),
            clock: Cell::new((Instant::now(), Duration::ZERO)),
            begun: Notify::new(),
        }))
    }

    /// Before the process ends: waits until what was queued is written, at most this long.
    pub fn flush(&self, most: Duration) {
        let end = Instant::now() + most;
        while self.waiting.load(Ordering::Acquire) > 0 && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn write_all(buffers: &Receiver<Vec<u8>>, waiting: &AtomicU64) {
    let mut out = std::io::stdout().lock();
    for buffer in buffers {
        // Whole lines: the buffer of standard output passes them on at once.
        if let Err(error) = out.write_all(&buffer) {
            tracing::warn!(%error, "standard output is closed: no access log any more; its lines are counted as dropped");
            waiting.store(0, Ordering::Release);
            return;
        }
        waiting.fetch_sub(1, Ordering::AcqRel);
    }
}

/// One worker's part of the log. Cheap to clone; stays on its thread. What it holds is handed over when the last clone goes.
#[derive(Debug, Clone)]
pub struct Lines(Rc<Inner>);

#[derive(Debug)]
struct Inner {
    log: AccessLog,
    metrics: Local,
    buffer: RefCell<Vec<u8>>,
    /// Lines in the buffer
    held: Cell<u64>,
    /// A moment on both clocks, the second since 1970: read once per buffer
    clock: Cell<(Instant, Duration)>,
    /// The buffer is no longer empty.
    begun: Notify,
}

impl Lines {
    /// Writes one line about something that ended `now`. Where the log cannot keep up, the line is dropped and counted.
    pub fn write(&self, entry: &Entry<'_>, now: Instant) {
        let inner = &*self.0;
        if inner.buffer.borrow().len() >= inner.log.full && !inner.hand_over() {
            return inner.metrics.add(Metric::LogDropped, &[], 1);
        }
        let mut buffer = inner.buffer.borrow_mut();
        if buffer.is_empty() {
            let unix = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            inner.clock.set((now, unix));
            inner.begun.notify_one();
        }
        let (then, unix) = inner.clock.get();
        json::line(&mut buffer, entry, unix + now.saturating_duration_since(then));
        inner.held.set(inner.held.get() + 1);
        let full = buffer.len() >= inner.log.full;
        drop(buffer);
        if full {
            // Where there is no room now, the next line tries again.
            inner.hand_over();
        }
    }

    /// Hands over what has waited long enough, for as long as the worker runs.
    pub async fn keep_moving(self) {
        loop {
            self.0.begun.notified().await;
            tokio::time::sleep(MOST).await;
            while !self.0.hand_over() {
                tokio::time::sleep(MOST).await;
            }
        }
    }
}

impl Inner {
    /// Hands the buffer to the writer. False: there is no room, and it is still held.
    fn hand_over(&self) -> bool {
        let mut buffer = self.buffer.borrow_mut();
        if buffer.is_empty() {
            return true;
        }
        // A busy worker fills the next one too.
        let next = if buffer.len() >= FULL { Vec::with_capacity(FULL + LINE) } else { Vec::new() };
        self.log.waiting.fetch_add(1, Ordering::AcqRel);
        match self.log.buffers.try_send(std::mem::replace(&mut *buffer, next)) {
            Ok(()) => {}
            Err(TrySendError::Full(unsent)) => {
                self.log.waiting.fetch_sub(1, Ordering::AcqRel);
                *buffer = unsent;
                return false;
            }
            Err(TrySendError::Disconnected(_)) => {
                self.log.waiting.fetch_sub(1, Ordering::AcqRel);
                self.metrics.add(Metric::LogDropped, &[], self.held.get());
            }
        }
        self.held.set(0);
        true
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let end = Instant::now() + LAST;
        while !self.hand_over() {
            if Instant::now() >= end {
                tracing::warn!(lines = self.held.get(), "the last lines of the access log are lost: nobody reads it");
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Metrics;

    fn lines_of(log: &AccessLog) -> (Lines, impl Fn() -> i64 + use<>) {
        let metrics = Metrics::new();
        (log.lines(metrics.local()), move || metrics.total(Metric::LogDropped, &[]))
    }

    #[test]
    fn a_line_is_json_whatever_the_client_sent() {
        let (log, written) = AccessLog::channel();
        let (lines, _) = lines_of(&log);
        let entry =
            Entry { method: "GET", path: "/a\"b\\\u{1}", status: 503, reason: "no-endpoints", ..Entry::default() };
        lines.write(&entry, Instant::now());
        let line: serde_json::Value = serde_json::from_slice(&written.recv().unwrap()).unwrap();
        assert_eq!(line["path"], "/a\"b\\\u{1}");
        assert_eq!(line["status"], 503);
        assert_eq!(line["reason"], "no-endpoints");
        assert!(line.get("peer").is_none());
    }

    #[test]
    fn a_full_queue_drops_whole_lines_and_counts_them() {
        let (log, written) = AccessLog::channel();
        let (lines, dropped) = lines_of(&log);
        // The queue and the worker's own buffer.
        (0..=QUEUE).for_each(|_| lines.write(&Entry::default(), Instant::now()));
        assert_eq!(dropped(), 0);
        lines.write(&Entry::default(), Instant::now());
        assert_eq!(dropped(), 1);
        written.recv().unwrap();
        lines.write(&Entry::default(), Instant::now());
        assert_eq!(dropped(), 1);
    }

    #[test]
    fn lines_travel_together_in_order_and_none_stays_behind() {
        let (log, written) = AccessLog::queue(FULL);
        let (lines, dropped) = lines_of(&log);
        for attempts in 0..1000 {
            lines.write(&Entry { attempts, ..Entry::default() }, Instant::now());
        }
        drop(lines);
        drop(log);
        let buffers: Vec<_> = written.iter().collect();
        assert!((2..10).contains(&buffers.len()), "{} buffers", buffers.len());
        let text = String::from_utf8(buffers.concat()).unwrap();
        let numbers =
            text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["attempts"].clone());
        assert!(numbers.eq((0..1000).map(serde_json::Value::from)));
        assert_eq!(dropped(), 0);
    }

    #[test]
    fn a_lone_line_does_not_wait_for_others() {
        crate::testing::run(async {
            let (log, written) = AccessLog::queue(FULL);
            let (lines, _) = lines_of(&log);
            tokio::task::spawn_local(lines.clone().keep_moving());
            lines.write(&Entry::default(), Instant::now());
            assert!(written.try_recv().is_err());
            crate::testing::until("the line is handed over", || written.try_recv().is_ok()).await;
        });
    }

    #[test]
    fn what_nobody_can_write_is_counted() {
        let (log, written) = AccessLog::queue(FULL);
        let (lines, dropped) = lines_of(&log);
        drop(written);
        lines.write(&Entry::default(), Instant::now());
        drop(lines);
        assert_eq!(dropped(), 1);
    }
}
