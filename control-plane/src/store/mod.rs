//! The last good version of every resource. One bad document is rejected alone: what it said before goes on serving,
//! also after a restart, until the document is removed or repaired.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use outrigger_core::compile::ClosedPolicy;
use outrigger_core::resource::{self, Closed, Loaded, Parsed, Rejection, ResourceId, Skipped};
use serde::{Deserialize, Serialize};

use crate::durable;
use crate::source::Files;

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

/// What the files say now, as far as it is good.
#[derive(Debug, Clone, Default)]
pub struct Accepted {
    /// Oldest first
    pub resources: Vec<Arc<Loaded>>,
    /// Not accepted
    pub rejected: Vec<Rejected>,
    /// Of no use to the mesh
    pub skipped: Vec<Skipped>,
    /// Policies that fail closed
    pub closed: Vec<ClosedPolicy>,
}

/// The last good versions, and the file they are kept in.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    good: BTreeMap<ResourceId, Good>,
    /// What was good before the files changed the last time
    before: BTreeMap<ResourceId, Good>,
    next_order: u64,
    parsed: HashMap<String, (String, Arc<Parsed>)>,
    unsaved: bool,
}

#[derive(Debug, Clone)]
struct Good {
    loaded: Arc<Loaded>,
    /// When it was first seen, relative to the others
    order: u64,
}

/// The form on disk.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Saved {
    next_order: u64,
    resources: Vec<SavedResource>,
}

#[derive(Serialize, Deserialize)]
struct SavedResource {
    id: ResourceId,
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
        let mut store = Self {
            path,
            good: BTreeMap::new(),
            before: BTreeMap::new(),
            next_order: 0,
            parsed: HashMap::new(),
            unsaved: false,
        };
        let text = match std::fs::read(&store.path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(store),
            Err(error) => return Err(error),
        };
        let saved: Saved = serde_json::from_slice(&text)?;
        store.next_order = saved.next_order;
        for SavedResource { id, file, line, order, document } in saved.resources {
            let parsed = resource::parse_at(&file, line, &document);
            match parsed.resources.into_iter().find(|loaded| loaded.id == id) {
                Some(loaded) => {
                    store.good.insert(id, Good { loaded: Arc::new(loaded), order });
                }
                // Written by another version, which accepted more.
                None => tracing::warn!(%file, line, resource = %id, "the last good version is not accepted any more"),
            }
        }
        Ok(store)
    }

    /// Takes in what the files say now.
    pub fn apply(&mut self, files: &Files) -> Accepted {
        self.parsed.retain(|file, _| files.contains_key(file));
        let mut next = Next::default();
        for (file, text) in files {
            match text {
                Ok(text) => {
                    let parsed = self.parse(file, text);
                    self.take(&parsed, &mut next);
                }
                Err(reason) => next.rejections.push(Rejection {
                    file: file.clone(),
                    line: 0,
                    kind: String::new(),
                    namespace: String::new(),
                    name: String::new(),
                    field: String::new(),
                    reason: reason.clone(),
                    closes: None,
                }),
            }
        }
        let mut accepted = Accepted { skipped: next.skipped, ..Accepted::default() };
        for rejection in next.rejections {
            let serving = self.instead(&rejection, &mut next.good);
            if let (Serving::Closed, Some(closes)) = (serving, rejection.closes.clone()) {
                accepted.closed.push(ClosedPolicy { closes, reason: rejection.to_string() });
            }
            accepted.rejected.push(Rejected::new(rejection, serving));
        }
        accepted.rejected.extend(next.duplicates.into_iter().map(|again| Rejected::new(again, Serving::Nothing)));
        self.unsaved |= !same(&self.good, &next.good);
        self.before = std::mem::replace(&mut self.good, next.good);
        let mut by_age: Vec<&Good> = self.good.values().collect();
        by_age.sort_by_key(|good| good.order);
        accepted.resources = by_age.into_iter().map(|good| good.loaded.clone()).collect();
        accepted
    }

    /// Takes back the version that was accepted last, because it contradicts another resource. Returns the version before it,
    /// which is the last good one again.
    pub fn retract(&mut self, rejection: &Rejection) -> Option<Arc<Loaded>> {
        let Rejection { kind, namespace, name, .. } = rejection;
        let id = ResourceId { kind: kind.clone(), namespace: namespace.clone(), name: name.clone() };
        let last = self.before.get(&id)?.clone();
        let current = self.good.get_mut(&id)?;
        if Arc::ptr_eq(&current.loaded, &last.loaded) {
            return None;
        }
        *current = last.clone();
        self.unsaved = true;
        Some(last.loaded)
    }

    /// Writes what is held, if it changed since the last time.
    ///
    /// # Errors
    /// Those of the file system; the next call tries again.
    pub fn save(&mut self) -> io::Result<()> {
        if !self.unsaved {
            return Ok(());
        }
        let resources = self.good.iter().map(|(id, good)| SavedResource {
            id: id.clone(),
            file: good.loaded.file.clone(),
            line: good.loaded.line,
            order: good.order,
            document: good.loaded.document.clone(),
        });
        let saved = Saved { next_order: self.next_order, resources: resources.collect() };
        durable::write(&self.path, &serde_json::to_vec(&saved)?, 0o600)?;
        self.unsaved = false;
        Ok(())
    }

    fn parse(&mut self, file: &str, text: &str) -> Arc<Parsed> {
        if let Some((_, parsed)) = self.parsed.get(file).filter(|(known, _)| known == text) {
            return parsed.clone();
        }
        let parsed = Arc::new(resource::parse(file, text));
        self.parsed.insert(file.to_owned(), (text.to_owned(), parsed.clone()));
        parsed
    }

    fn take(&mut self, parsed: &Parsed, next: &mut Next) {
        for loaded in &parsed.resources {
            if let Some(first) = next.good.get(&loaded.id) {
                let Loaded { file, line, .. } = &*first.loaded;
                next.duplicates.push(Rejection {
                    file: loaded.file.clone(),
                    line: loaded.line,
                    kind: loaded.id.kind.clone(),
                    namespace: loaded.id.namespace.clone(),
                    name: loaded.id.name.clone(),
                    field: "metadata.name".to_owned(),
                    reason: format!("also declared at {file}:{line}, which counts; remove one of the two"),
                    closes: None,
                });
                continue;
            }
            let known = self.good.get(&loaded.id);
            let order = known.map_or(self.next_order + 1, |good| good.order);
            self.next_order = self.next_order.max(order);
            // The same text at the same place stays the same object, so that what is compiled from it can stay too.
            let kept = known.map(|good| &good.loaded).filter(|known| {
                known.document == loaded.document && known.file == loaded.file && known.line == loaded.line
            });
            let loaded = kept.cloned().unwrap_or_else(|| Arc::new(loaded.clone()));
            next.good.insert(loaded.id.clone(), Good { loaded, order });
        }
        next.rejections.extend(parsed.rejections.iter().cloned());
        next.skipped.extend(parsed.skipped.iter().cloned());
    }

    /// Puts back the last good version of what was rejected, and says what serves.
    fn instead(&self, rejection: &Rejection, good: &mut BTreeMap<ResourceId, Good>) -> Serving {
        let named = !rejection.kind.is_empty() && !rejection.name.is_empty();
        let last: Vec<&Good> = if named {
            let Rejection { kind, namespace, name, .. } = rejection;
            let id = ResourceId { kind: kind.clone(), namespace: namespace.clone(), name: name.clone() };
            self.good.get(&id).into_iter().collect()
        } else {
            // What this document was is unknown: everything that its file held goes on.
            self.good.values().filter(|good| good.loaded.file == rejection.file).collect()
        };
        let mut held = false;
        for last in last {
            let id = &last.loaded.id;
            // Its good version may be in another place of the files already.
            let ours = rejection.closes.is_none() || id.kind == rejection.kind;
            held |= named || (ours && !good.contains_key(id));
            good.entry(id.clone()).or_insert_with(|| last.clone());
        }
        match (held, &rejection.closes) {
            (true, _) => Serving::LastGood,
            (false, Some(_)) => Serving::Closed,
            (false, None) => Serving::Nothing,
        }
    }
}

/// The next state in the making.
#[derive(Default)]
struct Next {
    good: BTreeMap<ResourceId, Good>,
    rejections: Vec<Rejection>,
    duplicates: Vec<Rejection>,
    skipped: Vec<Skipped>,
}

fn same(one: &BTreeMap<ResourceId, Good>, other: &BTreeMap<ResourceId, Good>) -> bool {
    one.len() == other.len()
        && one.iter().zip(other).all(|((id, good), (other_id, other))| {
            id == other_id && good.order == other.order && Arc::ptr_eq(&good.loaded, &other.loaded)
        })
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
