//! The directories of YAML: what their files hold, and what became other.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Directories below `--config` are followed so deep: symbolic links may make circles.
const MAX_DEPTH: usize = 16;
/// A larger file is no configuration.
const MAX_FILE: u64 = 16 * 1024 * 1024;
/// Files that became other: the text of each by path, or why it could not be read; `None` where it is gone.
pub type Changes = BTreeMap<String, Option<Result<String, String>>>;

/// A file this young may be written again within the resolution of its time: it is read again however equal it looks.
const RACY: Duration = Duration::from_secs(2);

/// The YAML files below some directories, hidden ones left out. Symbolic links are followed: Kubernetes swaps a whole
/// ConfigMap by renaming one.
#[derive(Debug)]
pub struct Sources {
    /// As given, and absolute
    directories: Vec<(PathBuf, PathBuf)>,
    seen: BTreeMap<PathBuf, Stamp>,
    reads: u64,
}

impl Sources {
    /// Those below `directories`; nothing is read yet.
    pub fn new(directories: &[&Path]) -> Self {
        let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let directories = directories.iter().map(|path| ((*path).to_owned(), absolute(path))).collect();
        Self { directories, seen: BTreeMap::new(), reads: 0 }
    }

    /// How many files were read since the start.
    pub fn reads(&self) -> u64 {
        self.reads
    }

    /// Looks at every file, and reads those that are not as they were.
    ///
    /// # Errors
    /// When one of the directories themselves cannot be listed; a file that cannot be read is an entry of the result.
    pub fn scan(&mut self) -> io::Result<Changes> {
        let mut changes = Changes::new();
        let mut found = BTreeMap::new();
        for (directory, _) in self.directories.clone() {
            self.list(&directory, 0, &mut found, &mut changes)?;
        }
        for gone in self.seen.keys().filter(|path| !found.contains_key(*path)) {
            changes.entry(gone.display().to_string()).or_insert(None);
        }
        self.seen = found;
        Ok(changes)
    }

    /// Looks at these files only, or at every one where what changed may be more than files.
    ///
    /// # Errors
    /// As [`Sources::scan`].
    pub fn look(&mut self, paths: &BTreeSet<PathBuf>) -> io::Result<Changes> {
        let mut changes = Changes::new();
        for path in paths {
            let within =
                |(given, absolute): &(PathBuf, PathBuf)| Some((given.clone(), path.strip_prefix(absolute).ok()?));
            // Else it is a module's directory elsewhere.
            let Some((directory, within)) = self.directories.iter().find_map(within) else { continue };
            let path = directory.join(within);
            let plain = within.components().all(|part| !hidden(&part.as_os_str().to_string_lossy()));
            match fs::symlink_metadata(&path) {
                Ok(metadata) if metadata.is_file() && plain && is_yaml(&path) => {
                    let text = self.read(&path, &metadata);
                    changes.insert(path.display().to_string(), Some(text));
                    self.seen.insert(path, stamp(&metadata));
                }
                Ok(metadata) if metadata.is_file() => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    if self.seen.remove(&path).is_some() {
                        changes.insert(path.display().to_string(), None);
                    } else if self.seen.range(path.clone()..).next().is_some_and(|(other, _)| other.starts_with(&path))
                    {
                        // It was a directory.
                        return self.scan();
                    }
                }
                // A directory or a link: what is behind it may be anything.
                _ => return self.scan(),
            }
        }
        Ok(changes)
    }

    fn list(
        &mut self,
        directory: &Path,
        depth: usize,
        found: &mut BTreeMap<PathBuf, Stamp>,
        changes: &mut Changes,
    ) -> io::Result<()> {
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            if hidden(&entry.file_name().to_string_lossy()) {
                continue;
            }
            let path = entry.path();
            let yaml = is_yaml(&path);
            match fs::metadata(&path) {
                Ok(metadata) if metadata.is_dir() && depth < MAX_DEPTH => {
                    if let Err(error) = self.list(&path, depth + 1, found, changes) {
                        // Its files keep what they last held.
                        let reason = format!("the directory cannot be read: {error}");
                        changes.insert(path.display().to_string(), Some(Err(reason)));
                        let below = self.seen.range(path.clone()..).take_while(|(other, _)| other.starts_with(&path));
                        found.extend(below.map(|(path, stamp)| (path.clone(), *stamp)));
                        found.insert(path, Stamp::default());
                    }
                }
                Ok(metadata) if yaml && metadata.is_file() => {
                    let now = stamp(&metadata);
                    let young = metadata.modified().is_ok_and(|at| at.elapsed().is_ok_and(|age| age < RACY));
                    if young || self.seen.get(&path) != Some(&now) {
                        changes.insert(path.display().to_string(), Some(self.read(&path, &metadata)));
                    }
                    found.insert(path, now);
                }
                // Gone between the listing and now: another event follows.
                Err(error) if error.kind() == io::ErrorKind::NotFound && !path.is_symlink() => {}
                Err(error) if yaml => {
                    let reason = format!("the file cannot be read: {error}");
                    changes.insert(path.display().to_string(), Some(Err(reason)));
                    found.insert(path, Stamp::default());
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn read(&mut self, path: &Path, metadata: &fs::Metadata) -> Result<String, String> {
        let size = metadata.len();
        if size > MAX_FILE {
            return Err(format!("the file has {size} bytes; at most {MAX_FILE} are read: split it"));
        }
        self.reads += 1;
        fs::read_to_string(path).map_err(|error| format!("the file cannot be read: {error}"))
    }
}

fn hidden(name: &str) -> bool {
    name.starts_with('.')
}

fn is_yaml(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml")
}

/// Size, time of change and inode: a file with the same ones is the same.
type Stamp = (u64, i64, i64, u64);

fn stamp(metadata: &fs::Metadata) -> Stamp {
    (metadata.len(), metadata.mtime(), metadata.mtime_nsec(), metadata.ino())
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
        let mut sources = Sources::new(&[directory.path()]);
        let files = sources.scan().unwrap();
        let names: Vec<_> = files
            .iter()
            .map(|(path, text)| (path.rsplit('/').next().unwrap(), text.as_ref().unwrap().as_deref().ok()))
            .collect();
        assert_eq!(names, [("a.yaml", Some("a")), ("e.yaml", Some("e")), ("f.yaml", None), ("b.yml", Some("b"))]);
        assert!(Sources::new(&[&at("nowhere")]).scan().is_err());
    }

    #[test]
    fn only_what_changed_is_read_again() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::create_dir(at("sub")).unwrap();
        for n in 0..100 {
            let path = at(&format!("sub/{n}.yaml"));
            fs::write(&path, "a").unwrap();
            let old = fs::FileTimes::new().set_modified(std::time::SystemTime::UNIX_EPOCH);
            fs::File::options().write(true).open(&path).unwrap().set_times(old).unwrap();
        }
        let mut sources = Sources::new(&[directory.path()]);
        assert_eq!((sources.scan().unwrap().len(), sources.reads()), (100, 100));
        assert_eq!((sources.scan().unwrap().len(), sources.reads()), (0, 100));
        fs::write(at("sub/7.yaml"), "b").unwrap();
        fs::remove_file(at("sub/8.yaml")).unwrap();
        let paths = |names: &[&str]| names.iter().map(|name| at(name)).collect::<BTreeSet<_>>();
        let changes = sources.look(&paths(&["sub/7.yaml", "sub/8.yaml", "sub/.9.yaml.swp", "sub/none"])).unwrap();
        assert_eq!(changes.values().cloned().collect::<Vec<_>>(), [Some(Ok("b".to_owned())), None]);
        assert_eq!(sources.reads(), 101);
        // A whole directory that goes, and comes back by another name.
        fs::rename(at("sub"), at("other")).unwrap();
        let changes = sources.look(&paths(&["sub", "other"])).unwrap();
        assert_eq!(changes.values().filter(|text| text.is_none()).count(), 99);
        assert_eq!(changes.values().filter(|text| text.is_some()).count(), 99);
    }
}
