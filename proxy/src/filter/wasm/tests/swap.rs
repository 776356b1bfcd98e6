//! New versions beside old ones.

use std::sync::Arc;

use super::super::release_unused;
use super::guest::{Bench, chain, exchange, head, import, on_headers, passed, reply, wat};

/// Marks responses with its version.
fn version(version: u32) -> String {
    let body = format!(
        "(data (i32.const 1024) \"x-version{version}\") {}",
        on_headers(
            "response",
            "(call $ok (call $add_header_map_value (i32.const 2) (i32.const 1024) (i32.const 9) (i32.const 1033) (i32.const 1)))",
            0
        )
    );
    wat(&import(&[("add_header_map_value", 5)]), &body)
}

#[test]
fn c84_streams_in_flight_end_on_the_old_version() {
    let bench = Bench::new();
    let old = bench.plugin(&version(1));
    let gone = Arc::downgrade(&old);
    let mut in_flight = chain(&[old]);
    assert!(passed(&in_flight.request_headers(&mut head(), true)));

    let new = [bench.plugin(&version(2))];
    assert_eq!(exchange(&new).2.headers["x-version"], "2");
    release_unused();
    let mut response = reply();
    assert!(passed(&in_flight.response_headers(&mut response, true)));
    assert_eq!(response.headers["x-version"], "1");
    in_flight.done();
    release_unused();
    assert!(gone.upgrade().is_none());
    let row = &bench.plugins.status()[0];
    assert_eq!((row.requests, row.instances), (1, 1));
}

#[test]
fn c85_a_refused_version_leaves_the_old_one_and_says_why() {
    let bench = Bench::new();
    let old = [bench.plugin(&version(1))];
    bench.refusal("(module)");
    assert_eq!(exchange(&old).2.headers["x-version"], "1");
    let refused = bench.plugins.status()[0].refused.clone();
    assert!(refused.is_some_and(|reason| reason.contains("proxy_abi_version")));
}

#[test]
fn the_same_specification_is_the_same_plugin() {
    let bench = Bench::new();
    let first = bench.plugin(&version(1));
    assert!(Arc::ptr_eq(&first, &bench.plugin(&version(1))));
    let other = bench.with(&version(1), |spec| spec.configuration = b"x".to_vec().into());
    assert!(!Arc::ptr_eq(&first, &other));
}

#[test]
fn the_root_context_ends_with_the_instance() {
    let bench = Bench::new();
    // Its on_done traps if it is called for a stream; the root's is counted as a failure nowhere, so nothing may be reported.
    let body = r#"(func (export "proxy_on_done") (param i32) (result i32)
        (if (i32.ne (local.get 0) (i32.const 2)) (then unreachable)) (i32.const 1))"#;
    let plugin = bench.plugin(&wat("", body));
    assert!(passed(&exchange(&[Arc::clone(&plugin)]).0));
    assert_eq!(bench.plugins.status()[0].failures, 0);
}
