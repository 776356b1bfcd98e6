//! The Proxy-Wasm conformance cases on this host: in process, and those about traffic through a whole proxy.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use outrigger_e2e::conformance::{case, module};
use outrigger_proxy::filter::cases::{Case, Differences, Runner};

fn run(case: &Case, hollow: &[&str]) -> Differences {
    let cache = tempfile::tempdir().unwrap();
    let modules = |name: &str| Ok(module(name));
    Runner::new(cache.path(), &modules, hollow).unwrap().run(case).unwrap()
}

mod in_process {
    use super::*;

    fn check(number: u32) {
        for case in case(number) {
            let differences = run(case, &[]);
            assert!(differences.is_empty(), "case {number} ({}): {differences:#?}", case.name);
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
