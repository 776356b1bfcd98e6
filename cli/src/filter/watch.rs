//! Changes of one file.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use anyhow::Context as _;
use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};

/// Compilers write a file in several steps: it is read when it has been quiet for so long.
const QUIET: Duration = Duration::from_millis(100);

/// A file that is watched: by its directory, because builds replace it.
pub(super) struct Watch {
    _watcher: RecommendedWatcher,
    events: Receiver<()>,
}

impl Watch {
    pub(super) fn of(file: &Path) -> anyhow::Result<Self> {
        let name = file.file_name().with_context(|| format!("{}: not a file", file.display()))?.to_owned();
        let directory =
            file.parent().filter(|parent| !parent.as_os_str().is_empty()).map_or(PathBuf::from("."), Into::into);
        let (sender, events) = channel();
        let concerns = move |event: notify::Result<notify::Event>| {
            let event = event.ok().filter(|event| !event.kind.is_access());
            if event.is_some_and(|event| event.paths.iter().any(|path| path.file_name() == Some(&name))) {
                // Nobody waits any more when the program ends.
                let _ = sender.send(());
            }
        };
        let watching = notify::recommended_watcher(concerns).and_then(|mut watcher| {
            watcher.watch(&directory, RecursiveMode::NonRecursive)?;
            Ok(watcher)
        });
        let watcher = watching.with_context(|| format!("{} cannot be watched", directory.display()))?;
        Ok(Self { _watcher: watcher, events })
    }

    /// Waits for the next change. False: there is none any more.
    pub(super) fn changed(&self) -> bool {
        if self.events.recv().is_err() {
            return false;
        }
        loop {
            match self.events.recv_timeout(QUIET) {
                Ok(()) => {}
                Err(RecvTimeoutError::Timeout) => return true,
                Err(RecvTimeoutError::Disconnected) => return false,
            }
        }
    }
}
