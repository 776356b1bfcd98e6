//! The Proxy-Wasm conformance cases on Envoy: every difference is listed in `cases.toml` with its reason.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use outrigger_e2e::conformance::{Envoy, World, case, check_peer};

fn run(number: u32) {
    for case in case(number) {
        if case.envoy.as_ref().is_some_and(|peer| peer.skip) {
            continue;
        }
        let differences = World::of(case).run(case, &mut Envoy::of(case));
        check_peer(case, &differences);
    }
}

macro_rules! cases {
    ($($name:ident = $number:literal;)*) => {$(
        #[test]
        fn $name() {
            run($number);
        }
    )*};
}

include!("../proxy-wasm/cases.rs");
