//! Guests by file name: WAT put together here, others as `tests/proxy-wasm/build.sh` compiled them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Once;

use super::assemble::assemble;

/// `tests/proxy-wasm`.
pub(super) fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("proxy-wasm")
}

/// The bytes of a guest of `tests/proxy-wasm/guests`: `NAME.wat`, or `NAME.wasm`, which is compiled from another language.
pub fn module(name: &str) -> Vec<u8> {
    let path = directory().join("guests").join(name);
    if name.ends_with(".wat") {
        let source = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        return assemble(&source).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    static BUILD: Once = Once::new();
    BUILD.call_once(|| {
        let built = Command::new(directory().join("build.sh")).output().expect("run tests/proxy-wasm/build.sh");
        assert!(built.status.success(), "tests/proxy-wasm/build.sh: {}", String::from_utf8_lossy(&built.stderr));
    });
    let path = crate::guest::cache().join("conformance").join(name);
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
