//! Noticing that files changed, and when they can be read.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use notify::event::{AccessKind, AccessMode, ModifyKind, RenameMode};
use notify::{EventKind, RecursiveMode, Watcher};
use tokio::sync::Notify;

/// A file that was closed after writing, or renamed into place, is read so soon: others may come with it.
const COMPLETE: Duration = Duration::from_millis(5);
/// One that may still be written, or come back, after this: editors write in several steps.
const INCOMPLETE: Duration = Duration::from_millis(100);
/// Of more than this it is only known that there were many.
const MAX_PATHS: usize = 4096;

/// What changed and was not looked at yet.
#[derive(Debug, Default)]
pub struct Noticed(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    pending: Mutex<Pending>,
    changed: Notify,
}

/// Paths, each with the time at which it can be read.
#[derive(Debug, Default)]
struct Pending {
    due: BTreeMap<PathBuf, Instant>,
    /// Not known which
    any: Option<Instant>,
}

/// What to look at.
#[derive(Debug, PartialEq, Eq)]
pub enum Ready {
    /// These paths
    Paths(BTreeSet<PathBuf>),
    /// Everything
    Any,
}

impl Noticed {
    /// Waits until something can be read, and takes it. To be called again when it was dropped before it returned.
    pub async fn next(&mut self) -> Ready {
        loop {
            let due = {
                let mut pending = self.0.pending.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(ready) = pending.ready(Instant::now()) {
                    return ready;
                }
                pending.next()
            };
            match due {
                Some(due) => {
                    let _ = tokio::time::timeout_at(due.into(), self.0.changed.notified()).await;
                }
                None => self.0.changed.notified().await,
            }
        }
    }
}

impl Pending {
    /// Takes in an event; whether it is one.
    fn take(&mut self, event: notify::Result<notify::Event>, now: Instant) -> bool {
        let Ok(event) = event else {
            self.any = Some(now + INCOMPLETE);
            return true;
        };
        if event.need_rescan() {
            self.any = Some(now + INCOMPLETE);
            return true;
        }
        let wait = match event.kind {
            EventKind::Access(AccessKind::Close(AccessMode::Write))
            | EventKind::Modify(ModifyKind::Name(RenameMode::To)) => COMPLETE,
            // What was moved here from another name that counts: both are looked at together.
            EventKind::Modify(ModifyKind::Name(RenameMode::Both)) if !counts(event.paths.first()) => return false,
            // Our own reading is no change.
            EventKind::Access(_) => return false,
            _ => INCOMPLETE,
        };
        if self.due.len() + event.paths.len() > MAX_PATHS {
            self.due.clear();
            self.any = Some(now + INCOMPLETE);
            return true;
        }
        self.due.extend(event.paths.into_iter().map(|path| (path, now + wait)));
        true
    }

    fn ready(&mut self, now: Instant) -> Option<Ready> {
        if self.any.is_some_and(|due| due <= now) {
            *self = Self::default();
            return Some(Ready::Any);
        }
        let paths: BTreeSet<PathBuf> =
            self.due.iter().filter(|(_, due)| **due <= now).map(|(path, _)| path.clone()).collect();
        self.due.retain(|_, due| *due > now);
        (!paths.is_empty()).then_some(Ready::Paths(paths))
    }

    fn next(&self) -> Option<Instant> {
        self.due.values().copied().chain(self.any).min()
    }
}

/// Whether a path would be read: a temporary file beside it is renamed over what counts.
fn counts(path: Option<&PathBuf>) -> bool {
    let name =
        path.and_then(|path| path.file_name()).map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    !name.starts_with('.') && (name.ends_with(".yaml") || name.ends_with(".yml"))
}

/// Watches the configuration, and the directories of modules outside it.
pub struct Watch {
    watcher: notify::RecommendedWatcher,
    root: PathBuf,
    beside: BTreeSet<PathBuf>,
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").field("root", &self.root).field("beside", &self.beside).finish_non_exhaustive()
    }
}

impl Watch {
    /// Watches everything below `root`. What changes is told by the second value.
    ///
    /// # Errors
    /// When the system gives no watch (often `fs.inotify.max_user_watches`).
    pub fn new(root: &Path) -> notify::Result<(Self, Noticed)> {
        let noticed = Noticed::default();
        let shared = noticed.0.clone();
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            let mut pending = shared.pending.lock().unwrap_or_else(PoisonError::into_inner);
            if pending.take(event, Instant::now()) {
                shared.changed.notify_one();
            }
        })?;
        watcher.watch(root, RecursiveMode::Recursive)?;
        Ok((Self { watcher, root: root.to_owned(), beside: BTreeSet::new() }, noticed))
    }

    /// Also watches the directories of these files.
    pub fn also<'a>(&mut self, paths: impl Iterator<Item = &'a str>) {
        let parents = paths.filter_map(|path| Path::new(path).parent().map(Path::to_owned));
        let wanted: BTreeSet<PathBuf> = parents.filter(|parent| !parent.starts_with(&self.root)).collect();
        for gone in self.beside.difference(&wanted) {
            let _ = self.watcher.unwatch(gone);
        }
        self.beside.retain(|path| wanted.contains(path));
        for new in wanted {
            if !self.beside.contains(&new) && self.watcher.watch(&new, RecursiveMode::NonRecursive).is_ok() {
                self.beside.insert(new);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use notify::event::{CreateKind, DataChange, RemoveKind};

    use super::*;

    fn event(kind: EventKind, paths: &[&str]) -> notify::Result<notify::Event> {
        Ok(paths.iter().fold(notify::Event::new(kind), |event, path| event.add_path(path.into())))
    }

    fn paths(names: &[&str]) -> Option<Ready> {
        Some(Ready::Paths(names.iter().map(PathBuf::from).collect()))
    }

    #[test]
    fn what_is_complete_is_read_soon_and_what_may_not_be_later() {
        let (mut pending, start) = (Pending::default(), Instant::now());
        assert!(pending.take(event(EventKind::Create(CreateKind::File), &["a.yaml"]), start));
        assert!(pending.take(event(EventKind::Modify(ModifyKind::Data(DataChange::Any)), &["a.yaml"]), start));
        assert_eq!(pending.ready(start + COMPLETE), None);
        let closed = EventKind::Access(AccessKind::Close(AccessMode::Write));
        assert!(pending.take(event(closed, &["a.yaml"]), start + COMPLETE));
        // An editor that removes and writes anew: not read between.
        assert!(pending.take(event(EventKind::Remove(RemoveKind::File), &["b.yaml"]), start));
        assert_eq!(pending.ready(start + COMPLETE * 2), paths(&["a.yaml"]));
        assert_eq!(pending.ready(start + INCOMPLETE), paths(&["b.yaml"]));
        assert_eq!((pending.ready(start + INCOMPLETE * 2), pending.next()), (None, None));
        // Our own reading is no change.
        assert!(!pending.take(event(EventKind::Access(AccessKind::Open(AccessMode::Read)), &["a.yaml"]), start));
    }

    #[test]
    fn a_file_renamed_into_place_is_complete_and_one_moved_from_another_place_is_read_with_it() {
        let rename = |mode| EventKind::Modify(ModifyKind::Name(mode));
        let (mut pending, start) = (Pending::default(), Instant::now());
        pending.take(event(rename(RenameMode::From), &[".a.new"]), start);
        pending.take(event(rename(RenameMode::To), &["a.yaml"]), start);
        pending.take(event(rename(RenameMode::Both), &[".a.new", "a.yaml"]), start);
        assert_eq!(pending.ready(start + COMPLETE), paths(&["a.yaml"]));
        pending.take(event(rename(RenameMode::From), &["a.yaml"]), start);
        pending.take(event(rename(RenameMode::To), &["b.yaml"]), start);
        pending.take(event(rename(RenameMode::Both), &["a.yaml", "b.yaml"]), start);
        assert_eq!(pending.ready(start + COMPLETE), None);
        assert_eq!(pending.ready(start + INCOMPLETE), paths(&[".a.new", "a.yaml", "b.yaml"]));
    }

    #[test]
    fn very_many_at_once_are_everything() {
        let (mut pending, start) = (Pending::default(), Instant::now());
        for n in 0..=MAX_PATHS {
            pending.take(event(EventKind::Remove(RemoveKind::File), &[&format!("{n}.yaml")]), start);
        }
        assert_eq!(pending.ready(start + INCOMPLETE), Some(Ready::Any));
        assert_eq!(pending.next(), None);
    }
}
