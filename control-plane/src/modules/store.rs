//! Filter modules, by digest, and which one each source last gave.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use outrigger_core::compile::Module;
use outrigger_core::resource::ModuleSource;
use sha2::{Digest, Sha256};

use crate::durable;

/// Larger modules are not compiled by proxies. Bytes.
pub const MAX_MODULE: u64 = 64 * 1024 * 1024;

/// A module that no filter uses is held this long.
const UNUSED: Duration = Duration::from_secs(24 * 3600);
/// A file's time says when its module was last used, as exactly as this.
const TOUCH: Duration = Duration::from_secs(3600);
/// In the modules' directory: the module of each source.
const SOURCES: &str = "sources.json";

/// Filter modules, kept by digest in a directory of their own, so that a module outlives its source for the proxies
/// that still use it.
#[derive(Debug)]
pub struct ModuleStore {
    directory: PathBuf,
    /// What was read, by path: not read again while size, time and inode are the same
    seen: HashMap<String, (Stamp, Module)>,
    /// The last module of each source, persisted: it goes on while the source is away (a file that is replaced by deleting and
    /// writing, a registry that does not answer)
    last: BTreeMap<ModuleSource, Module>,
    held: BTreeMap<String, u64>,
    /// In use when it was last asked: nothing may have changed for days until one is replaced
    used: BTreeSet<String>,
}

type Stamp = (u64, i64, i64, u64);

impl ModuleStore {
    /// Opens the store, with what earlier runs left in it.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn open(directory: PathBuf) -> io::Result<Self> {
        durable::directory(&directory)?;
        let mut held = BTreeMap::new();
        for entry in fs::read_dir(&directory)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.len() == 64 {
                held.insert(name, entry.metadata()?.len());
            }
        }
        let last: Vec<(ModuleSource, Module)> = match fs::read(directory.join(SOURCES)) {
            Ok(text) => serde_json::from_slice(&text)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error),
        };
        Ok(Self { directory, seen: HashMap::new(), last: last.into_iter().collect(), held, used: BTreeSet::new() })
    }

    /// What the `wanted` sources give. Files are read, unless they are unchanged; of what cannot be read the last module goes on.
    /// Of a remote source it is what was last fetched. Where there is none, the source is left out, so that its filter is reported.
    pub fn load<'a>(&mut self, wanted: impl Iterator<Item = &'a ModuleSource>) -> BTreeMap<ModuleSource, Module> {
        let wanted: BTreeSet<&ModuleSource> = wanted.collect();
        self.seen.retain(|path, _| wanted.contains(&ModuleSource::File(path.clone())));
        let mut found = BTreeMap::new();
        for source in wanted {
            let last = self.last.get(source).filter(|last| self.held.contains_key(&last.sha256)).cloned();
            let module = match source {
                ModuleSource::File(path) => match self.file(path) {
                    Ok(module) => Some(module),
                    Err(error) => {
                        tracing::warn!(%path, %error, last_good = last.is_some(), "the module cannot be read");
                        last
                    }
                },
                ModuleSource::Url(_) | ModuleSource::Oci(_) => last,
                ModuleSource::Pushed => None,
            };
            found.extend(module.map(|module| (source.clone(), module)));
        }
        // Of sources that nobody wants now, too: an earlier version of a filter may be the last good one.
        let mut last = self.last.clone();
        last.extend(found.clone());
        last.retain(|_, module| self.held.contains_key(&module.sha256));
        if last != self.last {
            self.last = last;
            self.save();
        }
        found
    }

    /// What each source gave last, as far as it is held.
    pub fn last(&self) -> BTreeMap<ModuleSource, Module> {
        self.last.clone()
    }

    fn save(&self) {
        let sources: Vec<_> = self.last.iter().collect();
        let written = serde_json::to_vec(&sources)
            .map_err(io::Error::from)
            .and_then(|text| durable::write(&self.directory.join(SOURCES), &text, 0o600));
        if let Err(error) = written {
            tracing::error!(%error, "where modules came from cannot be written");
        }
    }

    /// Keeps a module. It stays for a day if no filter uses it.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn add(&mut self, bytes: &[u8]) -> io::Result<Module> {
        let module = Module { sha256: hex::encode(Sha256::digest(bytes)), size: bytes.len() as u64 };
        durable::write(&self.directory.join(&module.sha256), bytes, 0o600)?;
        self.held.insert(module.sha256.clone(), module.size);
        Ok(module)
    }

    /// A remote source gave this.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn fetched(&mut self, source: ModuleSource, bytes: &[u8]) -> io::Result<Module> {
        let module = self.add(bytes)?;
        self.last.insert(source, module.clone());
        self.save();
        Ok(module)
    }

    /// Forgets modules that are not among `used`, and were neither used nor written for a day: a proxy may still be fetching
    /// one, a pushed one be attached, and an update be taken back.
    pub fn prune(&mut self, used: &BTreeSet<String>) {
        let directory = &self.directory;
        let older = |path: &Path, than: Duration| {
            let touched = fs::metadata(path).and_then(|metadata| metadata.modified());
            touched.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > than))
        };
        let kept = |digest: &String| {
            let path = directory.join(digest);
            let used_now = used.contains(digest);
            if (used_now || self.used.contains(digest)) && older(&path, TOUCH) {
                let touched = fs::File::options().write(true).open(&path);
                if let Err(error) = touched.and_then(|file| file.set_modified(SystemTime::now())) {
                    tracing::warn!(%digest, %error, "when the module was last used cannot be noted");
                }
            }
            used_now || !older(&path, UNUSED) || fs::remove_file(&path).is_err()
        };
        self.held.retain(|digest, _| kept(digest));
        self.used.clone_from(used);
    }

    /// Sizes of everything held, by digest.
    pub fn held(&self) -> BTreeMap<String, u64> {
        self.held.clone()
    }

    fn file(&mut self, path: &str) -> io::Result<Module> {
        let metadata = fs::metadata(path)?;
        let stamp = (metadata.len(), metadata.mtime(), metadata.mtime_nsec(), metadata.ino());
        if let Some((_, module)) = self.seen.get(path).filter(|(seen, _)| *seen == stamp) {
            return Ok(module.clone());
        }
        if metadata.len() > MAX_MODULE {
            return Err(io::Error::other(format!("{} bytes; at most {MAX_MODULE} are read", metadata.len())));
        }
        let module = self.add(&fs::read(path)?)?;
        self.seen.insert(path.to_owned(), (stamp, module.clone()));
        Ok(module)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_is_held_by_digest_after_its_file_changed() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("f.wasm");
        fs::write(&file, b"one").unwrap();
        let source = |path: &Path| ModuleSource::File(path.display().to_string());
        let wanted = [source(&file), source(Path::new("/nowhere.wasm"))];
        let mut store = ModuleStore::open(directory.path().join("modules")).unwrap();
        let one = store.load(wanted.iter()).into_values().next().unwrap();
        fs::write(&file, b"three").unwrap();
        let three = store.load(wanted.iter()).into_values().next().unwrap();
        assert_ne!(one.sha256, three.sha256);
        fs::remove_file(&file).unwrap();
        assert_eq!(store.load(wanted.iter()).into_values().next(), Some(three.clone()));
        let mut reopened = ModuleStore::open(directory.path().join("modules")).unwrap();
        assert_eq!(reopened.load(wanted.iter()).into_values().next(), Some(three.clone()));
        assert_eq!(reopened.held(), BTreeMap::from([(one.sha256, 3), (three.sha256, 5)]));
    }

    #[test]
    fn what_a_source_gave_is_remembered_while_another_is_wanted() {
        let directory = tempfile::tempdir().unwrap();
        let source = |digest: &str| ModuleSource::Oci(format!("registry.example/f@sha256:{digest}"));
        let (old, new) = (source("0"), source("1"));
        let mut store = ModuleStore::open(directory.path().join("modules")).unwrap();
        let module = store.fetched(old.clone(), b"wasm").unwrap();
        assert!(store.load([&new].into_iter()).is_empty());
        assert_eq!(store.last().get(&old), Some(&module));
        assert_eq!(store.load([&old].into_iter()).get(&old), Some(&module));
    }

    #[test]
    fn a_module_stays_for_a_day_after_its_last_use() {
        let directory = tempfile::tempdir().unwrap();
        let mut store = ModuleStore::open(directory.path().to_owned()).unwrap();
        let (used, unused) = (store.add(b"used").unwrap().sha256, store.add(b"unused").unwrap().sha256);
        let age = |digest: &str| {
            let file = fs::File::options().write(true).open(directory.path().join(digest)).unwrap();
            file.set_modified(SystemTime::now() - 2 * UNUSED).unwrap();
        };
        let held = |store: &ModuleStore| store.held().into_keys().collect::<Vec<_>>();
        age(&used);
        age(&unused);
        store.prune(&BTreeSet::from([used.clone()]));
        assert_eq!(held(&store), std::slice::from_ref(&used));
        // Days later it is replaced.
        age(&used);
        store.prune(&BTreeSet::new());
        assert_eq!(held(&store), std::slice::from_ref(&used));
        age(&used);
        store.prune(&BTreeSet::new());
        assert!(held(&store).is_empty());
    }

    #[test]
    fn what_was_fetched_once_stays_after_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let source = ModuleSource::Oci("registry.example/f@sha256:0".into());
        let mut store = ModuleStore::open(directory.path().join("modules")).unwrap();
        assert!(store.load([&source].into_iter()).is_empty());
        let module = store.fetched(source.clone(), b"wasm").unwrap();
        let mut reopened = ModuleStore::open(directory.path().join("modules")).unwrap();
        assert_eq!(reopened.load([&source].into_iter()), BTreeMap::from([(source, module)]));
    }
}
