//! The command line against a real control plane, and on its own.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use std::process::{Command, Output};

use outrigger_e2e::{Mesh, binary};

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

#[test]
fn validate_names_file_line_and_field_of_each_error_and_fails() {
    let directory = tempfile::tempdir().expect("directory");
    let path = directory.path().to_str().expect("path");
    let write = |name: &str, text: &str| std::fs::write(directory.path().join(name), text).expect("write");
    let service =
        "apiVersion: v1\nkind: Service\nmetadata: {name: a, namespace: demo}\nspec:\n  ports:\n  - port: 80\n";
    write("good.yaml", service);
    write("other.yaml", "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: a, namespace: demo}\n");
    let good = outrigger(&["validate", path]);
    assert!(good.status.success(), "{good:?}");
    assert!(text(&good.stdout).contains("1 accepted, 0 rejected, 1 skipped, in 2 files"), "{good:?}");

    // A misspelt field in the second document of a file; the first stays accepted.
    write(
        "bad.yaml",
        &format!("{}---\n{}", service.replace("name: a", "name: b"), service.replace("port: 80", "prot: 80")),
    );
    let bad = outrigger(&["validate", path]);
    assert_eq!(bad.status.code(), Some(1));
    let said = text(&bad.stdout);
    let line = said.lines().find(|line| line.contains("bad.yaml")).expect("a line for the file");
    assert!(line.starts_with(&format!("{path}/bad.yaml:13: ")) && line.contains("prot"), "{said}");

    let json: serde_json::Value =
        serde_json::from_slice(&outrigger(&["validate", path, "-o", "json"]).stdout).expect("JSON");
    assert_eq!(json["rejected"][0]["line"], 13);
    assert_eq!(json["rejected"][0]["kind"], "Service");

    let nowhere = outrigger(&["validate", "/nowhere"]);
    assert!(!nowhere.status.success() && text(&nowhere.stderr).contains("--config"), "{nowhere:?}");
}

#[test]
fn every_command_that_shows_something_can_show_json() {
    let mesh = Mesh::start("apiVersion: v1\nkind: Namespace\nmetadata: {name: demo}\n");
    let state = mesh.path("control");
    let state = state.to_str().expect("path");
    let config = mesh.path("config");
    let token = ["token", "create", "--state", state, "--namespace", "demo", "--service-account", "a"];
    for (command, shows) in [
        (&["version"][..], "version"),
        (&["status"][..], "proxies"),
        (&["validate", config.to_str().expect("path")][..], "accepted"),
        (&["intercept", "check"][..], "differences"),
        (&token[..], "token"),
    ] {
        let output = mesh.outrigger(&[command, &["-o", "json"]].concat());
        let json: serde_json::Value =
            serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{command:?}: {error}: {output:?}"));
        assert!(json.get(shows).is_some(), "{command:?}: {json}");
    }
}
