//! What the repository promises of itself: layers, the commands of the Makefile, the pages, the table of what works.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn run(program: &str, args: &[&str]) -> Output {
    Command::new(program).args(args).current_dir(root()).output().unwrap_or_else(|error| panic!("{program}: {error}"))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Every file below a directory with this ending, build results left out.
fn files(directory: &Path, ending: &str, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
        let path = entry.path();
        if path.is_dir() {
            if !["target", ".git"].contains(&entry.file_name().to_str().unwrap()) {
                files(&path, ending, into);
            }
        } else if path.to_str().unwrap().ends_with(ending) {
            into.push(path);
        }
    }
}

#[test]
fn dependencies_point_downwards_and_the_core_does_no_io() {
    let metadata = run(env!("CARGO"), &["metadata", "--format-version", "1", "--no-deps", "--offline"]);
    let metadata: serde_json::Value = serde_json::from_slice(&metadata.stdout).unwrap();
    let layers = ["outrigger-proto", "outrigger-core", "outrigger-proxy", "outrigger-control", "outrigger"];
    let uses = |name: &str| -> Vec<String> {
        let package = metadata["packages"].as_array().unwrap().iter().find(|package| package["name"] == name).unwrap();
        let dependencies = package["dependencies"].as_array().unwrap().iter();
        dependencies
            .filter(|dependency| dependency["kind"].is_null())
            .map(|dependency| dependency["name"].as_str().unwrap().to_owned())
            .collect()
    };
    for (level, layer) in layers.iter().enumerate() {
        for above in &layers[level + 1..] {
            assert!(!uses(layer).iter().any(|name| name == above), "{layer} depends on {above}");
        }
    }
    let io = ["tokio", "hyper", "tonic", "wasmtime", "socket2", "mio", "nix"];
    assert!(!uses("outrigger-core").iter().any(|name| io.contains(&name.as_str())));
    // And none of them by way of others.
    let tree = text(
        &run(env!("CARGO"), &["tree", "-p", "outrigger-core", "-e", "normal", "--prefix", "none", "--offline"]).stdout,
    );
    assert!(tree.starts_with("outrigger-core"), "{tree}");
    for name in io {
        assert!(!tree.lines().any(|line| line.split(' ').next() == Some(name)), "outrigger-core reaches {name}");
    }
}

#[test]
fn lints_are_policy_in_every_crate() {
    for manifest in ["proxy/core", "proxy", "control-plane", "cli", "tests", "bench/scale"] {
        assert!(read(&format!("{manifest}/Cargo.toml")).contains("[lints]\nworkspace = true"), "{manifest}");
    }
    let policy = read("Cargo.toml");
    for lint in ["unsafe_code = \"deny\"", "unwrap_used = \"deny\"", "expect_used = \"deny\"", "panic = \"deny\""] {
        assert!(policy.contains(lint), "{lint}");
    }
    // No file grows without end. Tests and tables may be longer than code.
    let mut sources = Vec::new();
    for crate_ in ["proxy/core/src", "proxy/src", "control-plane/src", "cli/src"] {
        files(&root().join(crate_), ".rs", &mut sources);
    }
    assert!(sources.len() > 80, "{}", sources.len());
    for path in sources.iter().filter(|path| !path.to_str().unwrap().contains("tests")) {
        let lines = fs::read_to_string(path).unwrap().lines().count();
        assert!(lines <= 650, "{}: {lines} lines", path.display());
    }
}

#[test]
fn the_makefile_has_every_target_and_those_to_come_say_so() {
    let makefile = read("Makefile");
    let targets = "demo test lint release bench bench-scale bench-budget conformance-wasm conformance-envoy";
    for target in targets.split(' ') {
        assert!(makefile.lines().any(|line| line.starts_with(&format!("{target}:"))), "{target}");
    }
    for later in ["conformance", "sim"] {
        let made = run("make", &["--no-print-directory", later]);
        assert!(!made.status.success() && text(&made.stderr).contains("not built yet"), "{later}: {made:?}");
    }
    let plan = text(&run("make", &["--dry-run", "--no-print-directory", "fuzz", "SECS=7"]).stdout);
    assert!(plan.contains("--test fuzz_host") && plan.contains("7"), "{plan}");
    // What is measured is what is released.
    let plan = text(&run("make", &["--dry-run", "--no-print-directory", "bench"]).stdout);
    for step in ["scripts/release.sh", "/dist/outrigger-proxy"] {
        assert!(plan.contains(step), "{step} is not part of make bench:\n{plan}");
    }
    // demo and test do all their set-up, and say what they do while they do it.
    let plan = text(&run("make", &["--dry-run", "--no-print-directory", "test"]).stdout);
    for step in ["scripts/setup.sh", "filters/build.sh", "cargo build", "scripts/test.sh", "==>"] {
        assert!(plan.contains(step), "{step} is not part of make test:\n{plan}");
    }
    let plan = text(&run("make", &["--dry-run", "--no-print-directory", "demo"]).stdout);
    for step in ["scripts/setup.sh", "filters/build.sh", "cargo build", "outrigger\" demo"] {
        assert!(plan.contains(step), "{step} is not part of make demo:\n{plan}");
    }
}

#[test]
fn ci_runs_what_contributors_run() {
    let ci = read(".ci/run");
    assert!(ci.contains("set -euo pipefail"));
    for step in ["scripts/setup.sh", "scripts/lint.sh", "make test", "make bench-budget"] {
        assert!(ci.contains(step), "{step}");
    }
    let lint = read("scripts/lint.sh");
    for step in ["cargo fmt --all --check", "-D warnings", "cargo tree -p outrigger-core", "scripts/status.py"] {
        assert!(lint.contains(step), "{step}");
    }
}

#[test]
fn pages_and_licence_are_there_and_their_links_lead_somewhere() {
    assert!(read("LICENSE").contains("Apache License"));
    assert!(read("CHANGELOG.md").contains("## Unreleased"));
    let mut pages = vec![root().join("README.md")];
    files(&root().join("docs"), ".md", &mut pages);
    for page in pages {
        let text = fs::read_to_string(&page).unwrap();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let target = link.split('#').next().unwrap();
            if !target.is_empty() && !target.contains("://") {
                assert!(page.parent().unwrap().join(target).exists(), "{}: {link}", page.display());
            }
        }
    }
    let readme = read("README.md");
    assert!(readme.contains("make demo") && readme.contains("make test"));
}

#[test]
fn the_ten_slowest_tests_are_printed_and_skipped_ones_fail() {
    let directory = tempfile::tempdir().unwrap();
    let report = directory.path().join("junit.xml");
    let case = |i: usize| format!("<testcase classname=\"c\" name=\"t{i}\" time=\"{i}.5\"></testcase>");
    let write = |more: &str| {
        let cases: String = (1..=14).map(case).collect();
        fs::write(&report, format!("<testsuites><testsuite>{cases}{more}</testsuite></testsuites>")).unwrap();
        run("scripts/report.py", &["junit", report.to_str().unwrap()])
    };
    let good = write("");
    let said = text(&good.stdout);
    assert!(good.status.success(), "{said}");
    assert!(said.contains("c t14") && said.contains("c t5") && !said.contains("c t4"), "{said}");
    assert_eq!(said.lines().last(), Some("14 passed, 0 failed"));
    assert!(!write("<testcase classname=\"c\" name=\"s\" time=\"1\"><skipped/></testcase>").status.success());
    assert!(!write("<testcase classname=\"c\" name=\"f\" time=\"1\"><failure/></testcase>").status.success());
    let again = write("<testcase classname=\"c\" name=\"again\" time=\"1\"><flakyFailure/></testcase>");
    assert!(again.status.success() && text(&again.stdout).contains("c again"), "one that was run again is named");
}

#[test]
fn the_status_table_may_only_name_tests_that_exist() {
    assert!(run("scripts/status.py", &[]).status.success());
    // The same script on a copy of the tree in which one name is wrong.
    let copy = tempfile::tempdir().unwrap();
    let archive = Command::new("sh")
        .args(["-c", "git ls-files -z --cached --others --exclude-standard | tar --null -T - -c | tar -x -C \"$0\" && git -C \"$0\" init -q"])
        .arg(copy.path())
        .current_dir(root())
        .status();
    assert!(archive.unwrap().success());
    let page = copy.path().join("docs/status.md");
    let table = fs::read_to_string(&page).unwrap();
    let broken = table.replacen("workspace::ci_runs_what_contributors_run", "workspace::no_such_test", 1);
    assert_ne!(broken, table, "the table does not name this file's tests");
    fs::write(&page, broken).unwrap();
    let checked = Command::new(copy.path().join("scripts/status.py")).current_dir(copy.path()).output().unwrap();
    assert!(!checked.status.success());
    assert!((text(&checked.stdout) + &text(&checked.stderr)).contains("no_such_test"), "{checked:?}");
}

#[test]
fn one_test_alone_uses_the_unscoped_token() {
    let mut sources = Vec::new();
    files(&root().join("tests"), ".rs", &mut sources);
    let users: Vec<String> = sources
        .iter()
        .filter(|path| !path.ends_with("workspace.rs"))
        .filter(|path| fs::read_to_string(path).unwrap().contains("read_to_string(mesh.path(\"control/join-token\"))"))
        .map(|path| path.file_name().unwrap().to_str().unwrap().to_owned())
        .collect();
    assert_eq!(users, ["control_plane.rs"]);
    let text = read("tests/tests/control_plane.rs");
    assert_eq!(text.matches("read_to_string(mesh.path(\"control/join-token\"))").count(), 1);
    // What every other test gets: scoped and single-use.
    assert!(read("tests/src/mesh.rs").contains("\"--single-use\""));
}
