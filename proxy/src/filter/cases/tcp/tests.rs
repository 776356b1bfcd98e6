//! TCP cases against guests written here.

use outrigger_core::resource::Located;

use super::super::{Outcome, Runner, Suite, check};
use super::*;

/// Says what it is told: sizes and ends of data, who closed.
const TOLD: &str = r#"(module
  (import "env" "proxy_log" (func $log (param i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 0) "newlog")
  (data (i32.const 16) "client . .")
  (data (i32.const 32) "server . .")
  (data (i32.const 48) "client closed .")
  (data (i32.const 64) "server closed .")
  (func (export "proxy_abi_version_0_2_1"))
  (func (export "malloc") (param i32) (result i32) (i32.const 1024))
  (func $say (param i32 i32) (drop (call $log (i32.const 2) (local.get 0) (local.get 1))))
  (func $digit (param i32 i32) (i32.store8 (local.get 0) (i32.add (i32.const 48) (local.get 1))))
  (func $data (param $text i32) (param $size i32) (param $end i32) (result i32)
    (call $digit (i32.add (local.get $text) (i32.const 7)) (local.get $size))
    (call $digit (i32.add (local.get $text) (i32.const 9)) (local.get $end))
    (call $say (local.get $text) (i32.const 10))
    (i32.const 0))
  (func $closed (param $text i32) (param $who i32)
    (call $digit (i32.add (local.get $text) (i32.const 14)) (local.get $who))
    (call $say (local.get $text) (i32.const 15)))
  (func (export "proxy_on_new_connection") (param i32) (result i32) (call $say (i32.const 0) (i32.const 3)) (i32.const 0))
  (func (export "proxy_on_downstream_data") (param i32 i32 i32) (result i32)
    (call $data (i32.const 16) (local.get 1) (local.get 2)))
  (func (export "proxy_on_upstream_data") (param i32 i32 i32) (result i32)
    (call $data (i32.const 32) (local.get 1) (local.get 2)))
  (func (export "proxy_on_downstream_connection_close") (param i32 i32) (call $closed (i32.const 48) (local.get 1)))
  (func (export "proxy_on_upstream_connection_close") (param i32 i32) (call $closed (i32.const 64) (local.get 1)))
  (func (export "proxy_on_log") (param i32) (call $say (i32.const 3) (i32.const 3))))"#;

/// Goes by the first byte of what it has: `h` is held until the end, `c` closes the connection, `t` traps. Each connection is a property.
const ODD: &str = r#"(module
  (import "env" "proxy_get_buffer_bytes" (func $get (param i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_close_stream" (func $close (param i32) (result i32)))
  (import "env" "proxy_set_property" (func $set (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 32) "odd\00seenyes")
  (func (export "proxy_abi_version_0_2_1"))
  (func (export "malloc") (param i32) (result i32) (i32.const 1024))
  (func (export "proxy_on_new_connection") (param i32) (result i32)
    (drop (call $set (i32.const 32) (i32.const 8) (i32.const 40) (i32.const 3)))
    (i32.const 0))
  (func $data (param $buffer i32) (param $end i32) (result i32) (local $first i32)
    (if (local.get $end) (then (return (i32.const 0))))
    (drop (call $get (local.get $buffer) (i32.const 0) (i32.const 1) (i32.const 16) (i32.const 20)))
    (local.set $first (i32.load8_u (i32.load (i32.const 16))))
    (if (i32.eq (local.get $first) (i32.const 116)) (then unreachable))
    (if (i32.eq (local.get $first) (i32.const 99)) (then (drop (call $close (i32.const 2))) (return (i32.const 1))))
    (i32.eq (local.get $first) (i32.const 104)))
  (func (export "proxy_on_downstream_data") (param i32 i32 i32) (result i32)
    (call $data (i32.const 2) (local.get 2)))
  (func (export "proxy_on_upstream_data") (param i32 i32 i32) (result i32)
    (call $data (i32.const 3) (local.get 2))))"#;

/// Lets a connection in when time has passed.
const LATE: &str = r#"(module
  (import "env" "proxy_set_tick_period_milliseconds" (func $tick (param i32) (result i32)))
  (import "env" "proxy_set_effective_context" (func $effective (param i32) (result i32)))
  (import "env" "proxy_continue_stream" (func $continue (param i32) (result i32)))
  (memory (export "memory") 1)
  (global $waiting (mut i32) (i32.const 0))
  (func (export "proxy_abi_version_0_2_1"))
  (func (export "malloc") (param i32) (result i32) (i32.const 1024))
  (func (export "proxy_on_new_connection") (param i32) (result i32)
    (global.set $waiting (local.get 0))
    (drop (call $tick (i32.const 250)))
    (i32.const 1))
  (func (export "proxy_on_tick") (param i32)
    (drop (call $effective (global.get $waiting)))
    (drop (call $continue (i32.const 2)))))"#;

fn play(guest: &'static str, filter: &str, steps: &str) -> Outcome {
    let text = format!("filters: [{{module: f.wasm{filter}}}]\ncases:\n- name: one\n  steps:\n{steps}");
    let mut suite: Suite = Located::read("c.yaml", &text).unwrap().value;
    suite.settle();
    check(&suite).unwrap();
    // Guests use a part of the stack.
    let thread = std::thread::Builder::new().stack_size(8 << 20);
    let thread = thread.spawn(move || {
        let cache = tempfile::tempdir().unwrap();
        let modules = |_: &str| wat::parse_str(guest).map_err(|error| error.to_string());
        Runner::new(&cache.path().join("c"), &modules, &[]).unwrap().run(&suite.cases[0]).unwrap()
    });
    thread.unwrap().join().unwrap()
}

#[track_caller]
fn passes(guest: &'static str, filter: &str, steps: &str) {
    let outcome = play(guest, filter, steps);
    assert!(outcome.differences.is_empty(), "{outcome:#?}");
}

#[test]
fn a_connection_goes_from_step_to_step_and_its_ends_are_told_as_by_the_proxy() {
    passes(
        TOLD,
        "",
        "  - tcp: {connect: true}
    expect: {tcp: {state: open, upstream: '', client: ''}, log: [info new]}
  - tcp: {upstream: hello}
    expect: {tcp: {upstream: '', client: hello}, log: [info server 5 0]}
  - tcp: {client: [ab, cde], upstream: {hex: '00 ff'}}
    expect: {tcp: {upstream: abcde, client: {hex: 00ff}}, log: [info client 2 0, info client 3 0, info server 2 0]}
  - tcp: {client-end: true}
    expect: {tcp: {state: open, upstream: '', upstream-end: true, client-end: false}, log: [info client 0 1]}
  - tcp: {upstream: bye, upstream-end: true}
    expect:
      tcp: {state: ended, client: bye, upstream-end: true, client-end: true}
      log: [info server 3 0, info server 0 1, info server closed 0, info client closed 2, info log]
",
    );
}

#[test]
fn a_connection_that_is_not_over_is_cut_before_the_next_one_and_after_the_last_step() {
    passes(
        TOLD,
        "",
        "  - tcp: {client: a}
    expect: {tcp: {state: open, upstream: a}, log: [info new, info client 1 0]}
  - wait-ms: 5
    expect: {tcp: {state: open, upstream: ''}, log: [info client closed 1, info log]}
  - tcp: {connect: true, client: b}
    expect: {tcp: {state: open, upstream: b}, log: [info new, info client 1 0, info client closed 1, info log]}
",
    );
}

#[test]
fn what_a_filter_holds_closes_and_fails_is_seen_with_the_proxys_reason() {
    passes(
        ODD,
        ", body-limit: 8",
        "  - tcp: {client: h}
    expect: {tcp: {state: open, upstream: ''}, properties: {odd.seen: 'yes'}}
  - tcp: {client: old, client-end: true}
    expect: {tcp: {upstream: hold, upstream-end: true}}
  - tcp: {connect: true, client: [ab, c, d], upstream: lost}
    expect: {tcp: {state: filter-response, upstream: ab, client: ''}}
  - tcp: {connect: true, client: h2345678, upstream: hi}
    expect: {tcp: {state: open, upstream: '', client: ''}}
  - tcp: {client: '9'}
    expect: {tcp: {state: filter-request-too-large, upstream: ''}}
  - tcp: {connect: true, upstream: h23456789}
    expect: {tcp: {state: filter-response-too-large, client: ''}}
  - tcp: {connect: true, client: fine}
    expect: {tcp: {state: open, upstream: fine}}
",
    );
    let outcome =
        play(ODD, "", "  - tcp: {client: [fine, trap]}\n    expect: {tcp: {state: filter-failed, upstream: fine}}\n");
    assert!(outcome.differences.is_empty(), "{outcome:#?}");
    assert!(outcome.steps[0].notes.iter().any(|note| note.contains("unreachable")), "{outcome:#?}");
}

#[test]
fn a_new_connection_waits_with_what_both_sides_sent_until_it_is_let_in() {
    passes(
        LATE,
        "",
        "  - tcp: {client: early, upstream: greeting}
    expect: {tcp: {state: waiting, upstream: '', client: ''}}
  - wait-ms: 300
    expect: {tcp: {state: open, upstream: early, client: greeting}}
",
    );
}

#[test]
fn properties_of_requests_are_seen_too() {
    let guest = r#"(module
      (import "env" "proxy_set_property" (func $set (param i32 i32 i32 i32) (result i32)))
      (memory (export "memory") 1)
      (data (i32.const 32) "a\00byes")
      (func (export "proxy_abi_version_0_2_1"))
      (func (export "malloc") (param i32) (result i32) (i32.const 1024))
      (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
        (call $set (i32.const 32) (i32.const 3) (i32.const 35) (i32.const 3))))"#;
    passes(guest, "", "  - request: {}\n    expect: {response: {status: 200}, properties: {a.b: 'yes'}}\n");
}

#[test]
fn what_is_not_as_expected_is_named() {
    let outcome = play(
        ODD,
        "",
        "  - name: first
    tcp: {client: fine}
    expect: {tcp: {state: filter-response, upstream: other, client-end: true}, properties: {odd.seen: 'no', odd.more: x}}
  - name: second
    tcp: {client: [{hex: 'ff00'}, '\"text\"']}
    expect: {tcp: {upstream: {hex: 'ff01'}}}
",
    );
    let lines: Vec<String> = outcome.differences.iter().map(ToString::to_string).collect();
    let expected = [
        "first: tcp state: filter-response → open",
        "first: tcp upstream: \"other\" → \"fine\"",
        "first: tcp client-end: true → false",
        "first: property odd.more: \"x\" → none",
        "first: property odd.seen: \"no\" → \"yes\"",
        "second: tcp upstream: b\"\\xff\\x01\" → b\"\\xff\\x00\\\"text\\\"\"",
    ];
    assert_eq!(lines, expected);
}

#[test]
fn the_names_of_states_are_those_that_are_read() {
    for name in [
        "waiting",
        "open",
        "ended",
        "filter-response",
        "filter-failed",
        "filter-request-too-large",
        "filter-response-too-large",
    ] {
        let state: TcpState = serde_json::from_value(name.into()).unwrap();
        assert_eq!(state.name(), name);
    }
}
