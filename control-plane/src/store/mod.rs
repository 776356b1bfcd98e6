//! The last good version of every resource. One bad document is rejected alone: what it said before goes on serving,
//! also after a restart, until the document is removed or repaired. A change of a file costs that file, not all of them.

mod instead;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use outrigger_core::compile::ClosedPolicy;
use outrigger_core::resource::{self, Closed, Loaded, Rejection, ResourceId, Skipped};
use serde::{Deserialize, Serialize};

use crate::durable::Log;
use crate::source::Changes;

#[cfg(test)]
mod tests;

/// What goes on in place of something rejected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Serving {
    /// The last good version
    #[serde(rename = "last good")]
    LastGood,
    /// There never was a good version
    #[serde(rename = "nothing")]
    Nothing,
    /// A policy of which no version is good: what it may govern is closed
    #[serde(rename = "closed")]
    Closed,
}

/// A rejection, and what serves in its place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Rejected {
    /// What, where and why
    #[serde(flatten)]
    pub rejection: Rejection,
    /// What serves instead
    pub serving: Serving,
    /// Whether an earlier version serves
    pub last_good: bool,
}

impl Rejected {
    /// A rejection with what serves in its place.
    pub fn new(rejection: Rejection, serving: Serving) -> Self {
        Self { rejection, serving, last_good: serving == Serving::LastGood }
    }
}

/// What is to be said of the files as they are now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Accepted {
    /// Not accepted
    pub rejected: Vec<Rejected>,
    /// Of no use to the mesh
    pub skipped: Vec<Skipped>,
    /// Policies that fail closed
    pub closed: Vec<ClosedPolicy>,
}

/// A resource whose version in force became another; `None`: it is gone.
pub type Replaced = (ResourceId, Option<Arc<Loaded>>);

/// The last good versions, and the file they are kept in.
#[derive(Debug)]
pub struct Store {
    log: Log,
    good: BTreeMap<ResourceId, Good>,
    /// What was good before the last change, of what that touched
    before: HashMap<ResourceId, Option<Good>>,
    next_order: u64,
    files: BTreeMap<String, Arc<File>>,
    /// The files that declare a resource well
    declared: HashMap<ResourceId, BTreeSet<String>>,
    /// Those that are declared more than once
    doubled: BTreeSet<ResourceId>,
    /// Files of which something is to be said
    noted: BTreeSet<String>,
    accepted: Arc<Accepted>,
    unsaved: BTreeSet<ResourceId>,
    /// Those that were taken back: looked at again with every change, since what they contradict may be gone
    retracted: BTreeSet<ResourceId>,
}

/// What one file holds.
#[derive(Debug, Default)]
struct File {
    digest: u64,
    resources: Vec<Arc<Loaded>>,
    rejections: Vec<Rejection>,
    skipped: Vec<Skipped>,
}

#[derive(Debug, Clone)]
struct Good {
    loaded: Arc<Loaded>,
    /// When it was first seen, relative to the others
    order: u64,
}

/// A line of the file on disk.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Saved {
    id: ResourceId,
    /// `None`: gone
    version: Option<SavedVersion>,
}

#[derive(Serialize, Deserialize)]
struct SavedVersion {
    file: String,
    line: u32,
    order: u64,
    document: String,
}

impl Store {
    /// Opens the store at `path`, a file that need not exist yet.
    ///
    /// # Errors
    /// When the file exists and cannot be read: starting without it would drop resources that served.
    pub fn open(path: PathBuf) -> io::Result<Self> {
        let (log, lines) = Log::open::<Saved>(path)?;
        let mut saved = BTreeMap::new();
        let mut next_order = 0;
        for Saved { id, version } in lines {
            next_order = next_order.max(version.as_ref().map_or(0, |version| version.order));
            match version {
                Some(version) => saved.insert(id, version),
                None => saved.remove(&id),
            };
        }
        let mut good = BTreeMap::new();
        for (id, SavedVersion { file, line, order, document }) in saved {
            let parsed = resource::parse_at(&file, line, &document);
            match parsed.resources.into_iter().find(|loaded| loaded.id == id) {
                Some(loaded) => {
                    good.insert(id, Good { loaded: Arc::new(loaded), order });
                }
                // Written by another version, which accepted more.
                None => tracing::warn!(%file, line, resource = %id, "the last good version is not accepted any more"),
            }
        }
        Ok(Self {
            log,
            good,
            before: HashMap::new(),
            next_order,
            files: BTreeMap::new(),
            declared: HashMap::new(),
            doubled: BTreeSet::new(),
            noted: BTreeSet::new(),
            accepted: Arc::default(),
            unsaved: BTreeSet::new(),
            retracted: BTreeSet::new(),
        })
    }

    /// Takes in everything that the files say, at the start: what no file says any more is gone.
    pub fn begin(&mut self, files: Changes) -> Vec<Replaced> {
        let known = self.good.keys().cloned().collect();
        self.take(files, known)
    }

    /// Takes in what became other in the files. Returns what is in force now in place of something else, new ones oldest first.
    pub fn apply(&mut self, changes: Changes) -> Vec<Replaced> {
        self.take(changes, BTreeSet::new())
    }

    /// What is in force, oldest first.
    pub fn resources(&self) -> Vec<Arc<Loaded>> {
        let mut by_age: Vec<&Good> = self.good.values().collect();
        by_age.sort_by_key(|good| good.order);
        by_age.into_iter().map(|good| good.loaded.clone()).collect()
    }

    /// What is to be said of the files.
    pub fn accepted(&self) -> Arc<Accepted> {
        self.accepted.clone()
    }

    /// How many files were read.
    pub fn files(&self) -> usize {
        self.files.len()
    }

    /// Takes back the version that was accepted last, because it contradicts another resource. Returns the version before it,
    /// which is the last good one again.
    pub fn retract(&mut self, rejection: &Rejection) -> Option<Arc<Loaded>> {
        let Rejection { kind, namespace, name, .. } = rejection;
        let id = ResourceId { kind: kind.clone(), namespace: namespace.clone(), name: name.clone() };
        let last = self.before.remove(&id)??;
        let current = self.good.get_mut(&id)?;
        if Arc::ptr_eq(&current.loaded, &last.loaded) {
            return None;
        }
        *current = last.clone();
        self.retracted.insert(id.clone());
        self.unsaved.insert(id);
        Some(last.loaded)
    }

    /// Writes what changed since the last time.
    ///
    /// # Errors
    /// Those of the file system; the next call tries again.
    pub fn save(&mut self) -> io::Result<()> {
        if self.unsaved.is_empty() {
            return Ok(());
        }
        let saved = |id: &ResourceId, good: Option<&Good>| Saved {
            id: id.clone(),
            version: good.map(|good| SavedVersion {
                file: good.loaded.file.clone(),
                line: good.loaded.line,
                order: good.order,
                document: good.loaded.document.clone(),
            }),
        };
        let lines: Vec<Saved> = self.unsaved.iter().map(|id| saved(id, self.good.get(id))).collect();
        let all = match self.log.grows(lines.len(), self.good.len()) {
            true => self.good.iter().map(|(id, good)| saved(id, Some(good))).collect(),
            false => Vec::new(),
        };
        self.log.append(&lines, &all)?;
        self.unsaved.clear();
        Ok(())
    }

    fn take(&mut self, changes: Changes, mut affected: BTreeSet<ResourceId>) -> Vec<Replaced> {
        // Those of the files first, in their order: it counts as their age.
        let mut in_order = Vec::new();
        let mut said = false;
        for (path, text) in changes {
            let digest = text.as_ref().and_then(|text| text.as_ref().ok()).map(|text| digest(text));
            let before = self.files.get(&path).cloned();
            if digest.is_some() && before.as_ref().map(|file| file.digest) == digest {
                continue;
            }
            let now = text.map(|text| Arc::new(self.read(&path, text)));
            said |= [&before, &now].into_iter().flatten().any(|file| file.noteworthy());
            for file in [&before, &now].into_iter().flatten() {
                in_order.extend(file.resources.iter().map(|loaded| loaded.id.clone()));
                self.kept_by(&path, file, &mut affected);
            }
            self.set(&path, before.as_deref(), now);
        }
        in_order.extend(affected);
        in_order.extend(std::mem::take(&mut self.retracted));
        let mut replaced = Vec::new();
        self.before.clear();
        let mut seen = BTreeSet::new();
        for id in in_order.into_iter().filter(|id| seen.insert(id.clone())) {
            said |= self.count(&id);
            let good = self.decide(&id);
            let before = match &good {
                Some(good) => self.good.insert(id.clone(), good.clone()),
                None => self.good.remove(&id),
            };
            let same = match (&before, &good) {
                (Some(before), Some(now)) => Arc::ptr_eq(&before.loaded, &now.loaded),
                (None, None) => true,
                _ => false,
            };
            if !same {
                self.unsaved.insert(id.clone());
                replaced.push((id.clone(), good.map(|good| good.loaded)));
            }
            self.before.insert(id, before);
        }
        if said {
            self.accepted = Arc::new(self.say());
        }
        replaced
    }

    fn read(&self, path: &str, text: Result<String, String>) -> File {
        let text = match text {
            Ok(text) => text,
            Err(reason) => return File { rejections: vec![unreadable(path, reason)], ..File::default() },
        };
        let parsed = resource::parse(path, &text);
        // The same text at the same place stays the same object, so that what is compiled from it can stay too.
        let kept = |loaded: Loaded| {
            let known = self.good.get(&loaded.id).map(|good| &good.loaded).filter(|known| {
                known.document == loaded.document && known.file == loaded.file && known.line == loaded.line
            });
            known.cloned().unwrap_or_else(|| Arc::new(loaded))
        };
        File {
            digest: digest(&text),
            resources: parsed.resources.into_iter().map(kept).collect(),
            rejections: parsed.rejections,
            skipped: parsed.skipped,
        }
    }

    fn set(&mut self, path: &str, before: Option<&File>, now: Option<Arc<File>>) {
        for loaded in before.into_iter().flat_map(|file| &file.resources) {
            if let Some(files) = self.declared.get_mut(&loaded.id) {
                files.remove(path);
                if files.is_empty() {
                    self.declared.remove(&loaded.id);
                }
            }
        }
        self.noted.remove(path);
        let Some(now) = now else {
            self.files.remove(path);
            return;
        };
        for loaded in &now.resources {
            self.declared.entry(loaded.id.clone()).or_default().insert(path.to_owned());
        }
        if now.noteworthy() {
            self.noted.insert(path.to_owned());
        }
        self.files.insert(path.to_owned(), now);
    }

    /// Every declaration of a resource, the one that counts first.
    fn declarations(&self, id: &ResourceId) -> impl Iterator<Item = &Arc<Loaded>> {
        let files = self.declared.get(id).into_iter().flatten().filter_map(|path| self.files.get(path));
        files.flat_map(|file| &file.resources).filter(move |loaded| loaded.id == *id)
    }

    /// Notes whether a resource is declared more than once; whether that is to be said, or was.
    fn count(&mut self, id: &ResourceId) -> bool {
        let again = self.declarations(id).nth(1).is_some();
        match again {
            true => {
                self.doubled.insert(id.clone());
                true
            }
            false => self.doubled.remove(id),
        }
    }

    fn decide(&mut self, id: &ResourceId) -> Option<Good> {
        let known = self.good.get(id).cloned();
        let Some(loaded) = self.declarations(id).next().cloned() else {
            return known.filter(|known| self.keeps(id, &known.loaded.file));
        };
        let order = known.map_or(self.next_order + 1, |known| known.order);
        self.next_order = self.next_order.max(order);
        Some(Good { loaded, order })
    }
}

impl File {
    fn noteworthy(&self) -> bool {
        !(self.rejections.is_empty() && self.skipped.is_empty())
    }
}

fn unreadable(file: &str, reason: String) -> Rejection {
    Rejection {
        file: file.to_owned(),
        line: 0,
        kind: String::new(),
        namespace: String::new(),
        name: String::new(),
        field: String::new(),
        reason,
        closes: None,
    }
}

fn digest(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}

/// Logs what is new among rejected and skipped documents.
pub fn report(before: &Accepted, now: &Accepted) {
    let known: BTreeSet<String> = before.rejected.iter().map(|rejected| rejected.rejection.to_string()).collect();
    for Rejected { rejection, serving, .. } in &now.rejected {
        let Rejection { file, line, kind, namespace, name, field, reason, closes } = rejection;
        if known.contains(&rejection.to_string()) {
            continue;
        }
        tracing::error!(%file, line, %kind, %namespace, %name, %field, ?serving, "rejected: {reason}");
        if let (Serving::Closed, Some(closes)) = (serving, closes) {
            let what = match closes.what {
                Closed::Authorization => "everything is denied",
                Closed::Mtls => "plaintext is refused",
            };
            tracing::error!(namespace = %closes.namespace, selector = ?closes.selector, "failing closed: {what}");
        }
    }
    let known: BTreeSet<String> = before.skipped.iter().map(ToString::to_string).collect();
    for skipped in now.skipped.iter().map(ToString::to_string).filter(|line| !known.contains(line)) {
        tracing::info!("{skipped}");
    }
}
