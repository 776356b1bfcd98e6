//! Files that survive a crash whole: written beside their place, synced, renamed; and logs of changes to them.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Replaces the file at `path` with `content` at once: a reader, or a start after a crash, sees the old content or the
/// new one, never a part. `mode` is that of the new file (`0o600` for what is secret).
///
/// # Errors
/// Those of the file system; the old content is then still in place.
pub fn write(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let directory = path.parent().ok_or_else(|| io::Error::other(format!("{} has no directory", path.display())))?;
    let name = path.file_name().ok_or_else(|| io::Error::other(format!("{} is no file name", path.display())))?;
    let mut beside = std::ffi::OsString::from(".");
    beside.push(name);
    beside.push(format!(".{}.new", std::process::id()));
    let beside = directory.join(beside);
    // What an earlier process with our id left there may have another mode.
    match fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&beside)
        .and_then(|mut file| file.write_all(content).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&beside, path));
    if let Err(error) = written {
        let _ = fs::remove_file(&beside);
        return Err(error);
    }
    File::open(directory)?.sync_all()
}

/// Makes a directory that only its owner may enter, and those above it; one that exists is left as it is.
///
/// # Errors
/// Those of the file system.
pub fn directory(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// A log is written anew when it has this many lines more than twice what is live.
const SLACK: usize = 1024;

/// A file of JSON lines, each a change to what was before: saving a change costs that change, not all there is.
#[derive(Debug)]
pub struct Log {
    path: PathBuf,
    file: Option<File>,
    lines: usize,
}

impl Log {
    /// Opens the log, and returns its lines in order. A last line that a crash cut off is left out.
    ///
    /// # Errors
    /// Those of the file system, and a line that is not what was written.
    pub fn open<T: DeserializeOwned>(path: PathBuf) -> io::Result<(Self, Vec<T>)> {
        // Bytes: a line may be cut within a character.
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error),
        };
        let mut entries = Vec::new();
        for line in text.split_inclusive(|byte| *byte == b'\n') {
            match serde_json::from_slice(line) {
                Ok(entry) => entries.push(entry),
                Err(_) if !line.ends_with(b"\n") => {}
                Err(error) => return Err(io::Error::other(format!("{}: {error}", path.display()))),
            }
        }
        // Without a file the next writing replaces it: so it does after a cut line.
        let file = if text.ends_with(b"\n") { Some(OpenOptions::new().append(true).open(&path)?) } else { None };
        Ok((Self { path, file, lines: entries.len() }, entries))
    }

    /// A log that is written anew whatever is at `path`.
    pub fn anew(path: PathBuf) -> Self {
        Self { path, file: None, lines: 0 }
    }

    /// Whether the file is written anew, rather than these many lines added to it: `live` is the number of lines that it would
    /// then have.
    pub fn grows(&self, lines: usize, live: usize) -> bool {
        self.file.is_none() || self.lines + lines > 2 * live + SLACK
    }

    /// Adds lines, or writes `all` anew where there are any of these; on disk when this returns.
    ///
    /// # Errors
    /// Those of the file system; the next writing must then be anew, as [`Log::grows`] says.
    pub fn append<T: Serialize>(&mut self, changes: &[T], all: &[T]) -> io::Result<()> {
        let Some(mut file) = self.file.take().filter(|_| all.is_empty()) else {
            write(&self.path, &lines(all)?, 0o600)?;
            self.lines = all.len();
            self.file = Some(OpenOptions::new().append(true).open(&self.path)?);
            return Ok(());
        };
        file.write_all(&lines(changes)?)?;
        file.sync_data()?;
        self.lines += changes.len();
        self.file = Some(file);
        Ok(())
    }
}

fn lines<T: Serialize>(entries: &[T]) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    for entry in entries {
        serde_json::to_writer(&mut text, entry)?;
        text.push(b'\n');
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn content_is_replaced_with_its_mode_and_nothing_is_left_beside() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        write(&path, b"one", 0o644).unwrap();
        write(&path, b"two", 0o600).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_log_gives_back_what_was_added_and_forgets_a_line_that_was_cut() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let (mut log, none) = Log::open::<u32>(path.clone()).unwrap();
        assert!(none.is_empty());
        assert!(log.grows(1, 1));
        log.append(&[1], &[1]).unwrap();
        assert!(!log.grows(2, 3));
        log.append(&[2, 3], &[]).unwrap();
        drop(log);
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"4").unwrap();
        // Whole numbers are whole however they are cut: something that is not.
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{").unwrap();
        let (mut log, entries) = Log::open::<u32>(path.clone()).unwrap();
        assert_eq!(entries, [1, 2, 3]);
        assert!(log.grows(1, 4));
        log.append(&[5], &[1, 2, 3, 5]).unwrap();
        assert_eq!(Log::open::<u32>(path.clone()).unwrap().1, [1, 2, 3, 5]);
        // A line that was cut within a character.
        let words = directory.path().join("words");
        fs::write(&words, b"\"\xc3\xa4\"\n\"\xc3").unwrap();
        assert_eq!(Log::open::<String>(words).unwrap().1, ["ä"]);
        // It does not grow for ever.
        for n in 0..1100_u32 {
            let all = if log.grows(1, 1) { vec![n] } else { Vec::new() };
            log.append(&[n], &all).unwrap();
        }
        assert!(Log::open::<u32>(path).unwrap().1.len() < 200);
    }
}
