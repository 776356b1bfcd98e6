//! Clients and servers that nobody here wrote, driven by the scripts under `tests/python`.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::{Process, until};

/// A script of `tests/python`, run by the Python that `make setup` made.
#[derive(Debug)]
pub struct Python(Command);

impl Python {
    /// `python tests/python/<script> ARGS`
    pub fn script(script: &str, args: &[&str]) -> Self {
        let mut command = Command::new(interpreter());
        command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("python").join(script)).args(args);
        Self(command)
    }

    /// Runs it to its end, whatever that is.
    pub fn output(mut self) -> Output {
        self.0.output().unwrap_or_else(|error| panic!("cannot run Python: {error} (make setup installs it)"))
    }

    /// Runs it to its good end, and returns what it printed.
    ///
    /// # Panics
    /// When it fails: it has asserted something.
    #[track_caller]
    pub fn succeed(self) -> String {
        let output = self.output();
        assert!(output.status.success(), "the script failed:\n{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// As [`Python::succeed`], for one that prints JSON.
    #[track_caller]
    pub fn json(self) -> serde_json::Value {
        let text = self.succeed();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("no JSON ({error}): {text}"))
    }

    /// Starts a server, and waits until it prints `ready`.
    pub fn serve(self, name: &str, directory: &Path) -> Process {
        let mut process = Process::start(name, self.0, directory);
        until(&format!("{name} is ready"), || {
            assert!(process.is_running(), "{name} ended:\n{}", process.log());
            process.log().contains("ready").then_some(())
        });
        process
    }
}

fn interpreter() -> PathBuf {
    env::var_os("OUTRIGGER_VENV").map_or_else(default_venv, PathBuf::from).join("bin/python")
}

/// Where `scripts/setup.sh` puts it.
fn default_venv() -> PathBuf {
    let cache = env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = || PathBuf::from(env::var_os("HOME").expect("HOME")).join(".cache");
    cache.unwrap_or_else(home).join("outrigger/venv")
}
