//! The directory of YAML: reading it, and noticing that it changed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use notify::{RecursiveMode, Watcher};
use tokio::sync::mpsc;

/// Directories below `--config` are followed so deep: symbolic links may make circles.
const MAX_DEPTH: usize = 16;
/// A larger file is no configuration.
const MAX_FILE: u64 = 16 * 1024 * 1024;

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
}
