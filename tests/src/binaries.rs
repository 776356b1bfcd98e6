//! The binaries under test.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Path of a binary of the workspace: from `OUTRIGGER_BIN_DIR`, which `make test` sets after
/// building, else from the directory of the test itself, built first when it is missing.
pub fn binary(name: &str) -> PathBuf {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    let directory = DIRECTORY.get_or_init(|| match env::var_os("OUTRIGGER_BIN_DIR") {
        Some(directory) => directory.into(),
        None => build(),
    });
    let path = directory.join(name);
    assert!(path.exists(), "{} is missing: run `cargo build --workspace --bins`", path.display());
    path
}

/// Of `<target>/debug/deps/<test>`, `<target>/debug`.
fn build() -> PathBuf {
    let test = env::current_exe().expect("path of the test");
    let directory = test.parent().and_then(Path::parent).expect("target directory").to_owned();
    let built = ["outrigger", "outrigger-proxy", "outrigger-control", "outrigger-scale"]
        .iter()
        .all(|name| directory.join(name).exists());
    if !built {
        let target = directory.parent().expect("target directory");
        let status = Command::new(env!("CARGO"))
            .args(["build", "--workspace", "--bins", "--locked", "--target-dir"])
            .arg(target)
            .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
            .status()
            .expect("run cargo");
        assert!(status.success(), "cargo build --workspace --bins failed");
    }
    directory
}
