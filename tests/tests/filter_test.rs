//! `outrigger filter test`: the examples by their own cases, the conformance cases, and what it says of failures.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use outrigger_e2e::conformance::{cases, module};
use outrigger_e2e::{Guest, binary, example_filter};
use serde_json::Value;

fn test(args: &[&str]) -> Output {
    Command::new(binary("outrigger")).args(["filter", "test"]).args(args).output().expect("run outrigger")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// An example passes its cases, and a module that does nothing in its place does not.
fn example(name: &str) {
    let module = example_filter(name);
    let cases = root().join("filters").join(name).display().to_string();
    let modules = module.parent().unwrap().display().to_string();
    let passed = test(&[&cases, "--modules", &modules]);
    assert_eq!(passed.status.code(), Some(0), "{}{}", text(&passed.stdout), text(&passed.stderr));

    let hollow = tempfile::tempdir().unwrap();
    Guest::new("0_2_1").write(&hollow.path().join(module.file_name().unwrap()));
    let failed = test(&[&cases, "--modules", &hollow.path().display().to_string(), "-o", "json"]);
    assert_eq!(failed.status.code(), Some(1), "{}", text(&failed.stdout));
    for case in json(&failed)["files"][0]["cases"].as_array().unwrap() {
        // What shows that something passes untouched shows it of anything that does nothing.
        let untouched = ["nothing changes", "what is no JSON passes"];
        let name = case["name"].as_str().unwrap();
        let expected = if untouched.iter().any(|part| name.ends_with(part)) { "passed" } else { "failed" };
        assert_eq!(case["result"], expected, "{name}");
    }
}

#[test]
fn header_policy_passes_its_cases_and_nothing_else_does() {
    example("header-policy");
}

#[test]
fn jwt_claims_passes_its_cases_and_nothing_else_does() {
    example("jwt-claims");
}

#[test]
fn cohort_passes_its_cases_and_nothing_else_does() {
    example("cohort");
}

#[test]
fn signing_passes_its_cases_and_nothing_else_does() {
    example("signing");
}

#[test]
fn redaction_passes_its_cases_and_nothing_else_does() {
    example("redaction");
}

#[test]
fn waf_lite_passes_its_cases_and_nothing_else_does() {
    example("waf-lite");
}

#[test]
fn rate_limit_passes_its_cases_and_nothing_else_does() {
    example("rate-limit");
}

#[test]
fn ext_authz_passes_its_cases_and_nothing_else_does() {
    example("ext-authz");
}

#[test]
fn sniff_passes_its_cases_and_nothing_else_does() {
    example("sniff");
}

#[test]
fn the_conformance_cases_run_by_the_same_command() {
    let modules = tempfile::tempdir().unwrap();
    let all = cases().iter().flat_map(|case| {
        let updates = case.steps.iter().flat_map(|step| step.update.iter().chain(&step.update_during).flatten());
        case.filters.iter().chain(updates)
    });
    for name in all.map(|filter| filter.module.as_str()).collect::<BTreeSet<_>>() {
        fs::write(modules.path().join(name), module(name)).unwrap();
    }
    let file = root().join("tests/proxy-wasm/cases.toml").display().to_string();
    let directory = modules.path().display().to_string();
    let passed = test(&[&file, "--modules", &directory, "-o", "json"]);
    let report = json(&passed);
    let failed = |report: &Value| -> Vec<String> {
        let rows = report["files"][0]["cases"].as_array().unwrap();
        rows.iter()
            .filter(|row| row["result"] == "failed")
            .map(|row| row["name"].as_str().unwrap().to_owned())
            .collect()
    };
    assert_eq!(passed.status.code(), Some(0), "{:#?}", failed(&report));
    let only = cases().iter().filter(|case| case.proxy_only.is_some()).count();
    assert_eq!(report["skipped"], only);
    assert_eq!(report["passed"], cases().len() - only);

    // With one guest another, just its cases fail.
    fs::write(modules.path().join("31-cookies.wat"), module("06-nothing.wat")).unwrap();
    let sabotaged = test(&[&file, "--modules", &directory, "-o", "json", "--name", "set-cookie"]);
    assert_eq!(sabotaged.status.code(), Some(1));
    assert_eq!(failed(&json(&sabotaged)), ["set-cookie is added as a line of its own"]);
}

/// A directory with a filter that adds `x-tag: one` to requests, and these cases.
fn tagger(cases: &str) -> (tempfile::TempDir, String) {
    let directory = tempfile::tempdir().unwrap();
    Guest::adds("0_2_1", "x-tag", "one").write(&directory.path().join("tag.wasm"));
    fs::write(directory.path().join("cases.yaml"), format!("filters: [{{module: tag.wasm}}]\ncases:\n{cases}"))
        .unwrap();
    let path = directory.path().display().to_string();
    (directory, path)
}

#[test]
fn a_failure_is_shown_with_what_was_expected_and_observed() {
    let (_directory, path) = tagger(
        "- name: good\n  steps:\n  - request: {}\n    expect: {upstream: {headers: {x-tag: one}}}\n\
         - name: bad\n  steps:\n  - name: the tag\n    request: {}\n    expect: {upstream: {headers: {x-tag: two}}, response: {status: 201}}\n\
         - name: skipped\n  proxy-only: it needs routes\n  steps: [{request: {}}]\n",
    );
    let failed = test(&[&path]);
    assert_eq!(failed.status.code(), Some(1), "{failed:?}");
    let said = text(&failed.stdout);
    assert!(said.contains("ok    good (") && said.contains("skip  skipped: it needs routes"), "{said}");
    let line = said.lines().position(|line| line.contains("FAIL  bad (")).unwrap_or_else(|| panic!("{said}"));
    let lines: Vec<&str> = said.lines().skip(line).collect();
    assert!(lines[0].ends_with("cases.yaml:7"), "{said}");
    let below: Vec<&str> = lines[1..8].iter().map(|line| line.trim()).collect();
    let header = r#"- ["two"]"#;
    assert_eq!(below, ["the tag", "status", "- 201", "+ 200", "upstream header x-tag", header, r#"+ ["one"]"#]);
    assert!(said.contains("1 passed, 1 failed, 1 skipped"), "{said}");
    // No colours where there is no terminal.
    assert!(!said.contains('\x1b'), "{said}");

    let one = test(&[&path, "--name", "goo", "-o", "json"]);
    assert_eq!(one.status.code(), Some(0), "{one:?}");
    let report = json(&one);
    assert_eq!((report["passed"].as_u64(), report["failed"].as_u64()), (Some(1), Some(0)));
    assert_eq!(report["files"][0]["cases"][0]["line"], 3);
}

#[test]
fn a_trap_is_told_with_its_reason() {
    let directory = tempfile::tempdir().unwrap();
    Guest::new("0_2_1").on_headers("request", "(unreachable)").write(&directory.path().join("trap.wasm"));
    let cases = "cases:\n- name: trap\n  filters: [{module: trap.wasm}]\n  steps:\n  - request: {}\n    expect: {response: {status: 200}}\n";
    fs::write(directory.path().join("cases.yaml"), cases).unwrap();
    let failed = test(&[&directory.path().display().to_string()]);
    assert_eq!(failed.status.code(), Some(1), "{failed:?}");
    let said = text(&failed.stdout);
    assert!(said.contains("+ 503") && said.contains("note: ") && said.contains("unreachable"), "{said}");
}

#[test]
fn a_refused_configuration_is_told_with_what_the_filter_said() {
    let module = example_filter("cohort");
    let directory = tempfile::tempdir().unwrap();
    let cases = "cases:\n- name: refused\n  filters: [{module: cohort.wasm, configuration: {share: 101}}]\n";
    fs::write(directory.path().join("cases.yaml"), cases).unwrap();
    let modules = module.parent().unwrap().display().to_string();
    let failed = test(&[&directory.path().display().to_string(), "--modules", &modules]);
    assert_eq!(failed.status.code(), Some(1), "{failed:?}");
    let said = text(&failed.stdout);
    assert!(said.contains("+ refused: ") && said.contains("note: log: error configuration: share: must be"), "{said}");
}

#[test]
fn what_cannot_be_read_is_named_with_file_and_line() {
    let (directory, path) = tagger("- name: a\n  steps:\n  - reqest: {}\n");
    let unreadable = test(&[&path]);
    assert_eq!(unreadable.status.code(), Some(2), "{unreadable:?}");
    let said = text(&unreadable.stderr);
    assert!(said.contains("cases.yaml:5: cases[0].steps[0].reqest: unknown field; did you mean `request`?"), "{said}");

    fs::remove_file(directory.path().join("tag.wasm")).unwrap();
    fs::write(directory.path().join("cases.yaml"), "cases:\n- name: a\n  filters:\n  - module: tag.wasm\n").unwrap();
    let missing = test(&[&path]);
    assert_eq!(missing.status.code(), Some(2), "{missing:?}");
    let said = text(&missing.stderr);
    assert!(said.contains("cases.yaml:4: ") && said.contains("tag.wasm") && said.contains("--modules"), "{said}");

    for args in [&[path.as_str(), "--name", "b"][..], &["/nowhere"]] {
        assert_eq!(test(args).status.code(), Some(2), "{args:?}");
    }
}

#[test]
fn what_was_observed_is_recorded_and_the_rest_of_the_file_stays() {
    let (directory, path) = tagger(
        "# Why this is here\n- name: everything, where nothing is expected\n  steps:\n  - request: {path: /new}\n\n\
         # This one was right\n- name: right\n  steps:\n  - request: {}\n    expect: {response: {status: 200}}   # and stays\n\n\
         - name: wrong\n  steps:\n  - request: {}\n    expect:\n      upstream:\n        headers: {x-tag: two}   # and goes\n    # the end\n",
    );
    let file = directory.path().join("cases.yaml");
    let recorded = test(&[&path, "--record"]);
    assert_eq!(recorded.status.code(), Some(0), "{recorded:?}");
    assert!(text(&recorded.stdout).contains("2 steps recorded"), "{recorded:?}");
    let now = fs::read_to_string(&file).unwrap();
    for kept in ["# Why this is here\n", "# This one was right\n", "expect: {response: {status: 200}}   # and stays\n"]
    {
        assert!(now.contains(kept), "{now}");
    }
    assert!(now.contains("path: /new\n") && now.contains("        status: 200\n"), "{now}");
    assert!(now.contains("    expect:\n      upstream:\n        headers:\n          - \"x-tag: one\"\n"), "{now}");
    // What is recorded passes, and is recorded no more.
    let again = test(&[&path, "--record"]);
    assert_eq!(again.status.code(), Some(0), "{again:?}");
    assert_eq!(fs::read_to_string(&file).unwrap(), now);
    // And it is a test: another filter fails it.
    Guest::adds("0_2_1", "x-tag", "other").write(&directory.path().join("tag.wasm"));
    assert_eq!(test(&[&path]).status.code(), Some(1));
}

/// A directory with a TCP filter that holds what begins with `h` and closes what begins with `c`, and these cases.
fn holder(steps: &str) -> (tempfile::TempDir, String) {
    let directory = tempfile::tempdir().unwrap();
    let look = "(drop (call $get_buffer_bytes (i32.const 2) (i32.const 0) (i32.const 1) (i32.const 16) (i32.const 20)))
        (local.set $first (i32.load8_u (i32.load (i32.const 16))))
        (if (i32.eq (local.get $first) (i32.const 99)) (then (drop (call $close_stream (i32.const 2)))))
        (i32.eq (local.get $first) (i32.const 104))";
    Guest::new("0_2_1")
        .import("get_buffer_bytes", 5)
        .import("close_stream", 1)
        .field(&format!(
            "(func (export \"proxy_on_downstream_data\") (param i32 i32 i32) (result i32) (local $first i32) {look})"
        ))
        .write(&directory.path().join("hold.wasm"));
    let cases = format!("filters: [{{module: hold.wasm}}]\ncases:\n- name: a connection\n  steps:\n{steps}");
    fs::write(directory.path().join("cases.yaml"), cases).unwrap();
    let path = directory.path().display().to_string();
    (directory, path)
}

#[test]
fn a_failure_on_a_tcp_connection_is_shown_with_what_was_expected_and_observed() {
    let (_directory, path) = holder(
        "  - tcp: {client: hold}\n    expect: {tcp: {state: open, upstream: ''}}\n  \
         - name: another\n    tcp: {connect: true, client: [{hex: '00 ff'}, close], upstream: lost}\n    \
         expect: {tcp: {state: open, upstream: {hex: '00 fe'}, client: lost}, log: [info closed]}\n",
    );
    let failed = test(&[&path]);
    assert_eq!(failed.status.code(), Some(1), "{failed:?}");
    let said = text(&failed.stdout);
    let line = said.lines().position(|line| line.contains("FAIL  a connection (")).unwrap_or_else(|| panic!("{said}"));
    let below: Vec<&str> = said.lines().skip(line + 1).take(13).map(str::trim).collect();
    let bytes = [r#"- b"\x00\xfe""#, r#"+ b"\x00\xff""#];
    let expected = [
        "another",
        "tcp state",
        "- open",
        "+ filter-response",
        "tcp upstream",
        bytes[0],
        bytes[1],
        "tcp client",
        "- \"lost\"",
        "+ \"\"",
        "log 1",
        "- \"info closed\"",
        "+ nothing",
    ];
    assert_eq!(below, expected, "{said}");
}

#[test]
fn what_was_observed_of_a_tcp_connection_is_recorded() {
    let (directory, path) = holder(
        "  # Everything, where nothing is expected\n  - tcp: {client: [one, {hex: 'ff 00'}], upstream: back}\n  \
         # Only what is named\n  - tcp: {client-end: true}\n    expect: {tcp: {state: ended, upstream-end: false}}\n  \
         # This one is right\n  - tcp: {connect: true, client: close}\n    expect: {tcp: {state: filter-response}}   # and stays\n",
    );
    let file = directory.path().join("cases.yaml");
    let recorded = test(&[&path, "--record"]);
    assert_eq!(recorded.status.code(), Some(0), "{recorded:?}");
    assert!(text(&recorded.stdout).contains("2 steps recorded"), "{recorded:?}");
    let now = fs::read_to_string(&file).unwrap();
    let everything = "    expect:\n      tcp:\n        state: open\n        upstream:\n          hex: \"6f6e65ff00\"\n        client: back\n  # Only";
    assert!(now.contains(everything), "{now}");
    assert!(
        now.contains("    expect:\n      tcp:\n        state: open\n        upstream-end: true\n  # This"),
        "{now}"
    );
    assert!(now.contains("expect: {tcp: {state: filter-response}}   # and stays\n"), "{now}");
    // What is recorded passes, and is recorded no more; and it is a test.
    assert_eq!(test(&[&path, "--record"]).status.code(), Some(0));
    assert_eq!(fs::read_to_string(&file).unwrap(), now);
    Guest::new("0_2_1").write(&directory.path().join("hold.wasm"));
    assert_eq!(test(&[&path]).status.code(), Some(1));
}
