//! Child processes that never outlive the demo.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A running child, ended by pid when dropped. What it prints goes to a file.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// # Errors
    /// When the program cannot be started: which, and what to do.
    pub(super) fn start(name: &str, program: &Path, args: &[String], logs: &Path) -> anyhow::Result<Self> {
        let log = logs.join(format!("{name}.log"));
        let file = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let child = Command::new(program)
            .args(args)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("cannot start {} ({}); build it with `make demo`", name, program.display()))?;
        Ok(Self { name: name.to_owned(), child, log })
    }

    /// An error with the end of its log when it has ended.
    pub(super) fn alive(&mut self) -> anyhow::Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => anyhow::bail!("{} ended ({status}). The end of its log:\n{}", self.name, self.tail()),
        }
    }

    /// The last lines of its log.
    pub(super) fn tail(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(8)..].join("\n")
    }

    /// SIGKILL, as a crash.
    pub(super) fn crash(&mut self) {
        // Already gone is what was wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// SIGTERM.
    pub(super) fn terminate(&self) {
        if let Ok(pid) = i32::try_from(self.child.id()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
    }

    /// Waits until it has ended, and kills it at the deadline.
    pub(super) async fn ended(&mut self, by: Instant) {
        while Instant::now() < by {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.crash();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.crash();
    }
}
