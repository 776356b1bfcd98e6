//! `outrigger demo --check`: passes on a whole mesh, and fails by name when any one of its conditions is broken.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use std::process::{Command, Output};

use outrigger_e2e::binary;

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
