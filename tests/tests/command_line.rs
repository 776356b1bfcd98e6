//! The command line against a real control plane, and on its own.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use std::process::{Command, Output};

use outrigger_e2e::binary;

fn outrigger(args: &[&str]) -> Output {
    Command::new(binary("outrigger")).args(args).output().expect("run outrigger")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn version_and_completion() {
    assert_eq!(text(&outrigger(&["version"]).stdout), format!("outrigger {}\n", env!("CARGO_PKG_VERSION")));
    let version: serde_json::Value =
        serde_json::from_slice(&outrigger(&["version", "-o", "json"]).stdout).expect("JSON");
    assert_eq!(version["version"], env!("CARGO_PKG_VERSION"));
    for shell in ["bash", "zsh", "fish"] {
        let script = outrigger(&["completion", shell]);
        assert!(script.status.success() && text(&script.stdout).contains("intercept"), "{shell}");
    }
    // The script is one that the shell accepts.
    let script = text(&outrigger(&["completion", "bash"]).stdout);
    assert!(Command::new("bash").args(["-n", "-c", &script]).status().expect("run bash").success());
}

#[test]
fn an_absent_control_plane_is_named_with_the_remedy() {
    let status = outrigger(&["status", "--control", "http://127.0.0.1:9"]);
    assert!(!status.status.success());
    let error = text(&status.stderr);
    assert!(error.contains("http://127.0.0.1:9") && error.contains("--control"), "{error}");
}
