//! The directory of YAML: reading it, and noticing that it changed.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use notify::{RecursiveMode, Watcher};
use outrigger_core::compile::Module;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;

use crate::durable;

/// Directories below `--config` are followed so deep: symbolic links may make circles.
const MAX_DEPTH: usize = 16;
/// A larger file is no configuration.
const MAX_FILE: u64 = 16 * 1024 * 1024;
/// A larger file is no filter.
const MAX_MODULE: u64 = 256 * 1024 * 1024;

/// A module that no filter uses is held this long.
const UNUSED: Duration = Duration::from_secs(3600);
/// In the modules' directory: the module of each path.
const PATHS: &str = "paths.json";

/// Text of each `*.yaml` and `*.yml` by path, or why it could not be read.
pub type Files = BTreeMap<String, Result<String, String>>;

/// Reads every YAML file below `directory`, hidden ones left out. Symbolic links are followed: Kubernetes swaps a whole
/// ConfigMap by renaming one.
///
/// # Errors
/// When the directory itself cannot be listed; a file that cannot be read is an entry of the result.
pub fn read(directory: &Path) -> io::Result<Files> {
    let mut files = Files::new();
    read_into(directory, 0, &mut files)?;
    Ok(files)
}

fn read_into(directory: &Path, depth: usize, files: &mut Files) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with('.') {
            continue;
        }
        let path = entry.path();
        let yaml = name.ends_with(".yaml") || name.ends_with(".yml");
        match fs::metadata(&path) {
            Ok(metadata) if metadata.is_dir() && depth < MAX_DEPTH => {
                if let Err(error) = read_into(&path, depth + 1, files) {
                    // Its files keep what they last held.
                    files.insert(path.display().to_string(), Err(format!("the directory cannot be read: {error}")));
                }
            }
            Ok(metadata) if yaml && metadata.is_file() => {
                files.insert(path.display().to_string(), text(&path, metadata.len()));
            }
            // Gone between the listing and now: another event follows.
            Err(error) if error.kind() == io::ErrorKind::NotFound && !path.is_symlink() => {}
            Err(error) if yaml => {
                files.insert(path.display().to_string(), Err(format!("the file cannot be read: {error}")));
            }
            _ => {}
        }
    }
    Ok(())
}

fn text(path: &Path, size: u64) -> Result<String, String> {
    if size > MAX_FILE {
        return Err(format!("the file has {size} bytes; at most {MAX_FILE} are read: split it"));
    }
    fs::read_to_string(path).map_err(|error| format!("the file cannot be read: {error}"))
}

/// Filter modules, kept by digest in a directory of their own, so that a module outlives its file for the proxies
/// that still use it.
#[derive(Debug)]
pub struct ModuleStore {
    directory: PathBuf,
    /// What was read, by path: not read again while size, time and inode are the same
    seen: HashMap<String, (Stamp, Module)>,
    /// The last module of each path, persisted: it goes on while the file is away (replaced by deleting and writing)
    last: BTreeMap<String, Module>,
    held: BTreeMap<String, u64>,
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
        let last = match fs::read(directory.join(PATHS)) {
            Ok(text) => serde_json::from_slice(&text)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(error),
        };
        Ok(Self { directory, seen: HashMap::new(), last, held })
    }

    /// Takes in the module files at `paths`. Of what cannot be read the last module goes on; where there is none, it is
    /// left out, so that its filter is reported. A file that is unchanged is not read again.
    pub fn load(&mut self, paths: &BTreeSet<String>) -> BTreeMap<String, Module> {
        self.seen.retain(|path, _| paths.contains(path));
        let mut modules = BTreeMap::new();
        for path in paths {
            match self.one(path) {
                Ok(module) => {
                    modules.insert(path.clone(), module);
                }
                Err(error) => {
                    let last = self.last.get(path).filter(|last| self.held.contains_key(&last.sha256));
                    tracing::warn!(%path, %error, last_good = last.is_some(), "the module cannot be read");
                    modules.extend(last.map(|last| (path.clone(), last.clone())));
                }
            }
        }
        if modules != self.last {
            self.last.clone_from(&modules);
            let written = serde_json::to_vec(&modules)
                .map_err(io::Error::from)
                .and_then(|text| durable::write(&self.directory.join(PATHS), &text, 0o600));
            if let Err(error) = written {
                tracing::error!(%error, "the modules' paths cannot be written");
            }
        }
        modules
    }

    /// Forgets modules that are not among `used` and were written more than an hour ago: a proxy may still be fetching
    /// a newer one.
    pub fn prune(&mut self, used: &BTreeSet<String>) {
        let directory = &self.directory;
        let old = |path: &Path| {
            let written = fs::metadata(path).and_then(|metadata| metadata.modified());
            written.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > UNUSED))
        };
        let kept = |digest: &String| {
            let path = directory.join(digest);
            used.contains(digest) || !old(&path) || fs::remove_file(&path).is_err()
        };
        self.held.retain(|digest, _| kept(digest));
    }

    /// Sizes of everything held, by digest.
    pub fn held(&self) -> BTreeMap<String, u64> {
        self.held.clone()
    }

    fn one(&mut self, path: &str) -> io::Result<Module> {
        let metadata = fs::metadata(path)?;
        let stamp = (metadata.len(), metadata.mtime(), metadata.mtime_nsec(), metadata.ino());
        if let Some((_, module)) = self.seen.get(path).filter(|(seen, _)| *seen == stamp) {
            return Ok(module.clone());
        }
        if metadata.len() > MAX_MODULE {
            return Err(io::Error::other(format!("{} bytes; at most {MAX_MODULE} are read", metadata.len())));
        }
        let bytes = fs::read(path)?;
        let module = Module { sha256: hex::encode(Sha256::digest(&bytes)), size: bytes.len() as u64 };
        if !self.held.contains_key(&module.sha256) {
            durable::write(&self.directory.join(&module.sha256), &bytes, 0o600)?;
            self.held.insert(module.sha256.clone(), module.size);
        }
        self.seen.insert(path.to_owned(), (stamp, module.clone()));
        Ok(module)
    }
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
    /// Watches everything below `root`. The receiver gets one message for any number of changes not yet looked at.
    ///
    /// # Errors
    /// When the system gives no watch (often `fs.inotify.max_user_watches`).
    pub fn new(root: &Path) -> notify::Result<(Self, mpsc::Receiver<()>)> {
        let (changed, changes) = mpsc::channel(1);
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Our own reading is no change.
            if !matches!(&event, Ok(event) if event.kind.is_access()) {
                let _ = changed.try_send(());
            }
        })?;
        watcher.watch(root, RecursiveMode::Recursive)?;
        Ok((Self { watcher, root: root.to_owned(), beside: BTreeSet::new() }, changes))
    }

    /// Also watches the directories of these files.
    pub fn also(&mut self, paths: &BTreeSet<String>) {
        let parents = paths.iter().filter_map(|path| Path::new(path).parent().map(Path::to_owned));
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
    use super::*;

    #[test]
    fn yaml_is_read_below_the_directory_and_hidden_files_are_not() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::create_dir(at("sub")).unwrap();
        fs::create_dir(at("..2024")).unwrap();
        for (name, text) in
            [("a.yaml", "a"), ("sub/b.yml", "b"), (".c.yaml", "c"), ("d.txt", "d"), ("..2024/e.yaml", "e")]
        {
            fs::write(at(name), text).unwrap();
        }
        // As Kubernetes lays out a ConfigMap.
        std::os::unix::fs::symlink("..2024", at("..data")).unwrap();
        std::os::unix::fs::symlink("..data/e.yaml", at("e.yaml")).unwrap();
        fs::write(at("f.yaml"), [0xff, 0xfe]).unwrap();
        let files = read(directory.path()).unwrap();
        let names: Vec<_> =
            files.iter().map(|(path, text)| (path.rsplit('/').next().unwrap(), text.as_deref().ok())).collect();
        assert_eq!(names, [("a.yaml", Some("a")), ("e.yaml", Some("e")), ("f.yaml", None), ("b.yml", Some("b"))]);
        assert!(read(&at("nowhere")).is_err());
    }

    #[test]
    fn a_module_is_held_by_digest_after_its_file_changed() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("f.wasm");
        fs::write(&file, b"one").unwrap();
        let paths: BTreeSet<String> = [file.display().to_string(), "/nowhere.wasm".to_owned()].into();
        let mut store = ModuleStore::open(directory.path().join("modules")).unwrap();
        let one = store.load(&paths).into_values().next().unwrap();
        fs::write(&file, b"three").unwrap();
        let three = store.load(&paths).into_values().next().unwrap();
        assert_ne!(one.sha256, three.sha256);
        fs::remove_file(&file).unwrap();
        assert_eq!(store.load(&paths).into_values().next(), Some(three.clone()));
        let mut reopened = ModuleStore::open(directory.path().join("modules")).unwrap();
        assert_eq!(reopened.load(&paths).into_values().next(), Some(three.clone()));
        assert_eq!(reopened.held(), BTreeMap::from([(one.sha256, 3), (three.sha256, 5)]));
    }
}
