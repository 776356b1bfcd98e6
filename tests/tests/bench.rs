//! The comparison in `bench/`: the configuration that it gives to Outrigger is verified as every peer's is before anything is
//! measured, on the binary that is built. Speed is not asserted.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use outrigger_e2e::{binary, python, succeed};

fn verified(topology: &str) -> String {
    succeed(python("bench_peer.py").arg(topology).env("OUTRIGGER_BIN", binary("outrigger-proxy")))
}

#[test]
fn plaintext_is_carried_with_body_and_echo() {
    verified("h1-single");
}

#[test]
fn at_the_application_ten_rules_decide_and_what_is_forbidden_gets_403() {
    verified("h1-inbound");
}

#[test]
fn a_pair_carries_over_mtls_and_refuses_foreign_clients() {
    verified("h1-mtls-pair");
}

#[test]
fn a_server_of_another_identity_is_refused() {
    assert!(verified("wrong-san").starts_with("refused"));
}
