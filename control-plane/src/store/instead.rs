//! What serves in place of what was rejected.

use std::collections::BTreeSet;

use outrigger_core::compile::ClosedPolicy;
use outrigger_core::resource::{Loaded, Rejection, ResourceId};

use super::{Accepted, File, Rejected, Serving, Store};

impl Store {
    /// Adds those resources that a file's rejections may keep in force.
    pub(super) fn kept_by(&self, path: &str, file: &File, affected: &mut BTreeSet<ResourceId>) {
        for rejection in &file.rejections {
            match named(rejection) {
                Some(id) => {
                    affected.insert(id);
                }
                // What this document was is unknown: everything that its file held goes on.
                None => {
                    let held = self.good.iter().filter(|(_, good)| good.loaded.file == path);
                    affected.extend(held.map(|(id, _)| id.clone()));
                }
            }
        }
    }

    /// Whether a rejection keeps a resource that no file declares well, and that was last read from `file`.
    pub(super) fn keeps(&self, id: &ResourceId, file: &str) -> bool {
        let noted = self.noted.iter().filter_map(|path| Some((path, self.files.get(path)?)));
        noted.into_iter().any(|(path, content)| {
            content.rejections.iter().any(|rejection| match named(rejection) {
                Some(rejected) => rejected == *id,
                None => path == file,
            })
        })
    }

    /// Everything that is to be said of the files.
    pub(super) fn say(&self) -> Accepted {
        let mut accepted = Accepted::default();
        let mut claimed = BTreeSet::new();
        for content in self.noted.iter().filter_map(|path| self.files.get(path)) {
            accepted.skipped.extend(content.skipped.iter().cloned());
            for rejection in &content.rejections {
                let serving = self.instead(rejection, &mut claimed);
                if let (Serving::Closed, Some(closes)) = (serving, rejection.closes.clone()) {
                    accepted.closed.push(ClosedPolicy { closes, reason: rejection.to_string() });
                }
                accepted.rejected.push(Rejected::new(rejection.clone(), serving));
            }
        }
        for id in &self.doubled {
            let mut declarations = self.declarations(id);
            let Some(first) = declarations.next() else { continue };
            accepted.rejected.extend(declarations.map(|again| Rejected::new(also(again, first), Serving::Nothing)));
        }
        accepted
    }

    fn instead(&self, rejection: &Rejection, claimed: &mut BTreeSet<ResourceId>) -> Serving {
        let held = match named(rejection) {
            Some(id) => {
                let before = self.before.get(&id).map(Option::is_some);
                let held = before.unwrap_or_else(|| self.good.contains_key(&id));
                claimed.insert(id);
                held
            }
            None => {
                let last = self.good.iter().filter(|(_, good)| good.loaded.file == rejection.file);
                let mut held = false;
                for (id, _) in last {
                    // Its good version may be in another place of the files already.
                    let ours = rejection.closes.is_none() || id.kind == rejection.kind;
                    held |= claimed.insert(id.clone()) && ours && !self.declared.contains_key(id);
                }
                held
            }
        };
        match (held, &rejection.closes) {
            (true, _) => Serving::LastGood,
            (false, Some(_)) => Serving::Closed,
            (false, None) => Serving::Nothing,
        }
    }
}

/// The resource that a rejection names, if it could be read so far.
fn named(rejection: &Rejection) -> Option<ResourceId> {
    let Rejection { kind, namespace, name, .. } = rejection;
    let known = !kind.is_empty() && !name.is_empty();
    known.then(|| ResourceId { kind: kind.clone(), namespace: namespace.clone(), name: name.clone() })
}

fn also(again: &Loaded, first: &Loaded) -> Rejection {
    Rejection {
        file: again.file.clone(),
        line: again.line,
        kind: again.id.kind.clone(),
        namespace: again.id.namespace.clone(),
        name: again.id.name.clone(),
        field: "metadata.name".to_owned(),
        reason: format!("also declared at {}:{}, which counts; remove one of the two", first.file, first.line),
        closes: None,
    }
}
