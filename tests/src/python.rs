//! Scripts of `tests/python`, run in the environment that `scripts/setup.sh` makes.

use std::path::PathBuf;
use std::process::Command;

/// A command that runs `tests/python/<script>`.
pub fn python(script: &str) -> Command {
    let venv = environment();
    let python = venv.join("bin/python");
    assert!(python.exists(), "{} is missing: run scripts/setup.sh", python.display());
    let mut command = Command::new(python);
    command
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/python/").to_owned() + script)
        .env("PYTHONDONTWRITEBYTECODE", "1");
    command
}

/// The Python environment of the tests.
pub(crate) fn environment() -> PathBuf {
    std::env::var_os("OUTRIGGER_VENV").map_or_else(default_venv, PathBuf::from)
}

/// Where `scripts/setup.sh` makes it.
fn default_venv() -> PathBuf {
    let home = || PathBuf::from(std::env::var_os("HOME").expect("HOME")).join(".cache");
    std::env::var_os("XDG_CACHE_HOME").map_or_else(home, PathBuf::from).join("outrigger/venv")
}

/// Runs it to its end and returns what it printed; panics with both outputs when it failed.
pub fn succeed(command: &mut Command) -> String {
    let output = command.output().expect("run");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}\n{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}
