//! The access log: one JSON object per line, written by a thread of its own so that a slow terminal delays no request.

use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant, SystemTime};

/// Lines that may wait to be written.
const QUEUE: usize = 4096;

/// Where access log lines go. Lines that do not fit the queue are dropped and counted.
#[derive(Debug, Clone)]
pub struct AccessLog {
    lines: SyncSender<String>,
    /// Queued and not written yet
    waiting: Arc<AtomicU64>,
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
        let (log, lines) = Self::channel();
        let waiting = log.waiting.clone();
        std::thread::Builder::new().name("access-log".into()).spawn(move || write_all(&lines, &waiting))?;
        Ok(log)
    }

    /// A log whose lines are read by the caller.
    pub fn channel() -> (Self, Receiver<String>) {
        let (tx, rx) = sync_channel(QUEUE);
        (Self { lines: tx, waiting: Arc::default() }, rx)
    }

    /// Queues one line. False: it was dropped, and is to be counted.
    #[must_use]
    pub fn write(&self, entry: &Entry<'_>) -> bool {
        self.waiting.fetch_add(1, Ordering::AcqRel);
        let queued = self.lines.try_send(entry.json()).is_ok();
        if !queued {
            self.waiting.fetch_sub(1, Ordering::AcqRel);
        }
        queued
    }

    /// Before the process ends: waits until what was queued is written, at most this long.
    pub fn flush(&self, most: Duration) {
        let end = Instant::now() + most;
        while self.waiting.load(Ordering::Acquire) > 0 && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn write_all(lines: &Receiver<String>, waiting: &AtomicU64) {
    let mut out = std::io::LineWriter::new(std::io::stdout());
    for mut line in lines {
        line.push('\n');
        // Standard output closed: nobody reads the log, and serving goes on.
        if out.write_all(line.as_bytes()).is_err() {
            return;
        }
        waiting.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Entry<'_> {
    /// The line, without its end.
    pub fn json(&self) -> String {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let mut text = String::with_capacity(384);
        let _ = write!(text, "{{\"time\":{}.{:03},\"kind\":\"access\"", now.as_secs(), now.subsec_millis());
        for (name, value) in [
            ("direction", self.direction),
            ("protocol", self.protocol),
            ("method", self.method),
            ("authority", self.authority),
            ("path", self.path),
            ("reason", self.reason),
            ("detail", self.detail),
            ("service", self.service),
            ("version", self.version),
            ("peer", self.peer),
            ("route", self.route),
        ] {
            if !value.is_empty() {
                let _ = write!(text, ",\"{name}\":");
                quote(&mut text, value);
            }
        }
        if let Some(upstream) = self.upstream {
            let _ = write!(text, ",\"upstream\":\"{upstream}\"");
        }
        if let Some(client) = self.client {
            let _ = write!(text, ",\"client\":\"{client}\"");
        }
        if let Some(trace) = self.trace {
            let _ = write!(text, ",\"trace_id\":\"{trace:032x}\"");
        }
        if self.status != 0 {
            let _ = write!(text, ",\"status\":{}", self.status);
        }
        let ms = self.duration.as_secs_f64() * 1e3;
        let _ = write!(
            text,
            ",\"attempts\":{},\"duration_ms\":{ms:.3},\"sent\":{},\"received\":{}}}",
            self.attempts, self.sent, self.received
        );
        text
    }
}

/// A JSON string.
fn quote(text: &mut String, value: &str) {
    text.push('"');
    for c in value.chars() {
        match c {
            '"' => text.push_str("\\\""),
            '\\' => text.push_str("\\\\"),
            c if c < ' ' => {
                let _ = write!(text, "\\u{:04x}", u32::from(c));
            }
            c => text.push(c),
        }
    }
    text.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_json_whatever_the_client_sent() {
        let (log, lines) = AccessLog::channel();
        let written = log.write(&Entry {
            method: "GET",
            path: "/a\"b\\\u{1}",
            status: 503,
            reason: "no-endpoints",
            ..Entry::default()
        });
        assert!(written);
        let line: serde_json::Value = serde_json::from_str(&lines.recv().unwrap()).unwrap();
        assert_eq!(line["path"], "/a\"b\\\u{1}");
        assert_eq!(line["status"], 503);
        assert_eq!(line["reason"], "no-endpoints");
        assert!(line.get("peer").is_none());
    }

    #[test]
    fn a_full_queue_drops_and_says_so() {
        let (log, lines) = AccessLog::channel();
        assert!((0..QUEUE).all(|_| log.write(&Entry::default())));
        assert!(!log.write(&Entry::default()));
        lines.recv().unwrap();
        assert!(log.write(&Entry::default()));
    }
}
