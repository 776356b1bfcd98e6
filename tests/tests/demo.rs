//! `outrigger demo --check`: passes on a whole mesh, and fails by name when any one of its conditions is broken.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};

use nix::sys::signal::Signal;
use outrigger_e2e::{Process, binary, until};

fn check(sabotage: &[&str]) -> Output {
    Command::new(binary("outrigger")).args(["demo", "--check"]).args(sabotage).output().expect("run outrigger demo")
}

/// Breaks one condition; the verdict must be a failure that names it.
fn sabotage(condition: &str) {
    let ran = check(&["--sabotage", condition]);
    let said = String::from_utf8_lossy(&ran.stdout).into_owned() + &String::from_utf8_lossy(&ran.stderr);
    assert_eq!(ran.status.code(), Some(1), "{said}");
    assert!(said.contains(&format!("condition `{condition}` was not observed")), "{said}");
}

#[test]
fn the_demo_observes_all_of_it() {
    let ran = check(&[]);
    assert!(ran.status.success(), "{ran:?}");
}

#[test]
fn sabotaged_traffic_is_named() {
    sabotage("traffic");
}

#[test]
fn sabotaged_mtls_is_named() {
    sabotage("mtls");
}

#[test]
fn sabotaged_split_is_named() {
    sabotage("split");
}

#[test]
fn sabotaged_filter_is_named() {
    sabotage("filter");
}

#[test]
fn sabotaged_weights_are_named() {
    sabotage("weights");
}

#[test]
fn sabotaged_retry_is_named() {
    sabotage("retry");
}

#[test]
fn sabotaged_rotation_is_named() {
    sabotage("rotation");
}

/// Processes whose command line holds this text.
fn processes(with: &str) -> usize {
    let all = fs::read_dir("/proc").expect("/proc").filter_map(Result::ok);
    all.filter(|entry| {
        fs::read(entry.path().join("cmdline")).is_ok_and(|line| String::from_utf8_lossy(&line).contains(with))
    })
    .count()
}

#[test]
fn the_live_view_names_the_file_to_edit_and_shows_the_change_and_ctrl_c_stops_everything() {
    let directory = tempfile::tempdir().expect("directory");
    let files = directory.path().join("demo");
    let mut command = Command::new(binary("outrigger"));
    command.args(["demo", "--dir"]).arg(&files);
    let mut demo = Process::start("demo", command, directory.path());

    let route = until("it names the file", || {
        let log = demo.log();
        let line = log.lines().find(|line| line.contains("edit the weights in"))?.to_owned();
        line.rsplit(' ').next().map(PathBuf::from)
    });
    // A line per service and version: requests/s, success, p50, p99, mTLS peers, filter calls.
    until("the view shows every service at work", || {
        let log = demo.log();
        let shows = |service: &str, version: &str, peer: &str| {
            log.lines().any(|line| {
                let words: Vec<&str> = line.split_whitespace().collect();
                words.starts_with(&[service, version])
                    && line.contains("100.0 %")
                    && line.contains("ms")
                    && line.contains(peer)
            })
        };
        let filtered = log.lines().any(|line| {
            line.starts_with("reviews    v1") && line.split_whitespace().last().is_some_and(|calls| calls != "0")
        });
        (shows("web", "v1", "client")
            && shows("reviews", "v1", "web")
            && shows("reviews", "v2", "web")
            && shows("ratings", "v1", "reviews")
            && filtered)
            .then_some(())
    });
    // 20 % to v2 becomes all of it.
    let text = fs::read_to_string(&route).expect("the route");
    let moved = text.replace("weight: 80", "weight: 0").replace("weight: 20", "weight: 100");
    assert_ne!(moved, text);
    fs::write(&route, moved).expect("edit");
    until("the view shows the moved split", || {
        let log = demo.log();
        let last = log.lines().rev().find(|line| line.starts_with("reviews v2"))?.to_owned();
        (last.ends_with("100 %") || last.ends_with("99 %")).then_some(())
    });

    let of_the_demo = files.to_str().expect("path").to_owned();
    assert!(processes(&of_the_demo) >= 6, "{} processes", processes(&of_the_demo));
    demo.signal(Signal::SIGINT);
    assert!(demo.ended().success());
    assert_eq!(processes(&of_the_demo), 0);
}
