//! The Proxy-Wasm conformance cases on this host: one test for each number in process, and one through the whole proxy.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use std::collections::BTreeSet;

use outrigger_e2e::conformance::{Through, World, case, cases, host_functions, module, table};
use outrigger_proxy::filter::cases::{Case, Differences, Runner};

fn run(case: &Case, hollow: &[&str]) -> Differences {
    let cache = tempfile::tempdir().unwrap();
    let modules = |name: &str| Ok(module(name));
    Runner::new(cache.path(), &modules, hollow).unwrap().run(case).unwrap().differences
}

#[track_caller]
fn assert_none(case: &Case, differences: &Differences) {
    let lines: Vec<String> = differences.iter().map(ToString::to_string).collect();
    assert!(lines.is_empty(), "case {} ({}): {lines:#?}", case.number, case.name);
}

mod in_process {
    use super::*;

    fn check(number: u32) {
        for case in case(number).into_iter().filter(|case| case.proxy_only.is_none()) {
            assert_none(case, &run(case, &[]));
        }
    }

    macro_rules! cases {
        ($($name:ident = $number:literal;)*) => {
            $(
                #[test]
                fn $name() {
                    check($number);
                }
            )*

            pub(super) const NUMBERS: &[u32] = &[$($number),*];
        };
    }

    include!("../proxy-wasm/cases.rs");
}

mod through_the_proxy {
    use super::*;

    fn check(number: u32) {
        for case in case(number).into_iter().filter(|case| case.is_traffic()) {
            assert_none(case, &World::of(case).run(case, &mut Through::of(case)));
        }
    }

    macro_rules! cases {
        ($($name:ident = $number:literal;)*) => {$(
            #[test]
            fn $name() {
                check($number);
            }
        )*};
    }

    include!("../proxy-wasm/cases.rs");
}

/// What a module may import of WASI and `env`, except what it logs with.
fn every_call() -> Vec<&'static str> {
    let mut names = host_functions();
    names.retain(|name| *name != "proxy_log");
    names.push("fd_write");
    names
}

/// Runs the cases of these numbers that show host calls on a host whose calls do nothing.
fn mutated(numbers: std::ops::RangeInclusive<u32>) {
    let (calls, mut all) = (every_call(), every_call());
    all.push("proxy_log");
    let shows = |case: &&Case| numbers.contains(&case.number) && case.host_calls && case.proxy_only.is_none();
    let mut count = 0;
    for case in cases().iter().filter(shows) {
        // Those that are about the log itself.
        let hollow = if case.number == 83 { &all } else { &calls };
        assert!(!run(case, hollow).is_empty(), "case {} ({}) passes without host calls", case.number, case.name);
        count += 1;
    }
    assert!(count > 3, "{count}");
}

#[test]
fn a_host_whose_calls_do_nothing_fails_every_case_about_headers() {
    mutated(1..=33);
}

#[test]
fn a_host_whose_calls_do_nothing_fails_every_case_about_bodies() {
    mutated(34..=50);
}

#[test]
fn a_host_whose_calls_do_nothing_fails_every_case_about_local_responses() {
    mutated(51..=65);
}

#[test]
fn a_host_whose_calls_do_nothing_fails_every_case_about_calls_and_state() {
    mutated(66..=85);
}

#[test]
fn every_number_of_the_contract_has_its_cases_and_differences_their_reasons() {
    assert_eq!(in_process::NUMBERS, (1..=85).collect::<Vec<u32>>());
    // These are about state and calls that need no more than one exchange: each has a case that runs in process.
    for number in 1..=85 {
        assert!(case(number).iter().any(|case| case.proxy_only.is_none()), "{number}");
    }
    let mut through = BTreeSet::new();
    for case in cases() {
        assert!((1..=85).contains(&case.number), "{}", case.name);
        // What is about traffic runs through the proxy, or says why not.
        if case.is_traffic() {
            through.insert(case.number);
        } else {
            let about_start = case.steps.is_empty() && case.proxy_only.is_none();
            assert!(about_start || case.in_process_only.is_some(), "case {} ({})", case.number, case.name);
        }
        if let Some(peer) = &case.envoy {
            assert!(!peer.reason.is_empty(), "case {} ({})", case.number, case.name);
            assert!(peer.skip == peer.differs.is_empty(), "case {} ({})", case.number, case.name);
        }
    }
    assert!(through.len() > 70, "{through:?}");
}

#[test]
fn the_table_of_the_guide_is_current() {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/filters.md");
    let text = std::fs::read_to_string(page).unwrap();
    let (before, rest) = text.split_once("<!-- conformance -->\n").unwrap();
    let (_, after) = rest.split_once("<!-- /conformance -->").unwrap();
    let current = format!("{before}<!-- conformance -->\n{}<!-- /conformance -->{after}", table());
    if std::env::var_os("OUTRIGGER_UPDATE").is_some() {
        std::fs::write(page, current).unwrap();
    } else {
        assert!(current == text, "docs/filters.md: run this test with OUTRIGGER_UPDATE=1");
    }
}
