//! Which files have cases.

use std::fs;
use std::path::{Path, PathBuf};

/// The files of cases that `paths` name: files as they are; of a directory its `cases.yaml` and the YAML files of its `cases/`, or, where
/// it has neither, those of the directories in it. What is not there goes to `unreadable`.
pub(super) fn files(paths: &[PathBuf], unreadable: &mut Vec<String>) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for path in paths {
        if !path.is_dir() {
            // Whether it can be read is seen when it is read.
            found.push(path.clone());
            continue;
        }
        let mut of = in_directory(path);
        if of.is_empty() {
            of = sorted(path).iter().filter(|path| path.is_dir()).flat_map(|path| in_directory(path)).collect();
        }
        if of.is_empty() {
            unreadable.push(format!(
                "{}: no cases here: neither cases.yaml nor cases/*.yaml, and none in the directories in it",
                path.display()
            ));
        }
        found.append(&mut of);
    }
    found
}

fn in_directory(directory: &Path) -> Vec<PathBuf> {
    let own = directory.join("cases.yaml");
    let more = sorted(&directory.join("cases")).into_iter().filter(|path| is_yaml(path) && path.is_file());
    own.is_file().then_some(own).into_iter().chain(more).collect()
}

pub(super) fn is_yaml(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml")
}

/// What is in a directory, by name; nothing where there is none.
fn sorted(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten();
    let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    paths
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_has_its_own_cases_or_those_of_the_directories_in_it() {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        for path in
            ["a/cases.yaml", "a/cases/2.yaml", "a/cases/1.yml", "a/cases/notes.txt", "b/cases/x.yaml", "c/other.yaml"]
        {
            fs::create_dir_all(at(path).parent().unwrap()).unwrap();
            fs::write(at(path), "").unwrap();
        }
        let mut unreadable = Vec::new();
        let own = [at("a/cases.yaml"), at("a/cases/1.yml"), at("a/cases/2.yaml")];
        assert_eq!(files(&[at("a")], &mut unreadable), own);
        let mut all = own.to_vec();
        all.push(at("b/cases/x.yaml"));
        assert_eq!(files(&[root.path().to_owned()], &mut unreadable), all);
        assert_eq!(files(&[at("c/other.yaml")], &mut unreadable), [at("c/other.yaml")]);
        assert!(unreadable.is_empty());
        assert!(
            files(&[at("c")], &mut unreadable).is_empty() && unreadable[0].contains("cases.yaml"),
            "{unreadable:?}"
        );
    }
}
