//! Filters that misbehave hurt requests inside them only.

use std::time::{Duration, Instant};

use futures_util::FutureExt;

use super::super::super::{Flow, Frame, Health, WRITE_LIMIT};
use super::guest::{Bench, Outcome, chain, exchange, head, import, on_headers, passed, reason, reply, wat};

const LOOP: &str = "(loop $l (br $l))";

/// Counts requests in a global and traps in the one with `x-foo: trap` (four bytes).
fn trapping() -> String {
    let body = format!(
        r#"(data (i32.const 1024) "x-foo")
        (global $n (mut i32) (i32.const 0))
        {}"#,
        on_headers(
            "request",
            "(global.set $n (i32.add (global.get $n) (i32.const 1)))
             (call $ok (call $get_header_map_value (i32.const 0) (i32.const 1024) (i32.const 5) (i32.const 0) (i32.const 4)))
             (if (i32.eq (i32.load (i32.const 4)) (i32.const 4)) (then unreachable))
             ;; the first request of an instance passes, any later one is answered by a trap too
             (call $is (global.get $n) (i32.const 1))",
            0
        )
    );
    wat(&import(&[("get_header_map_value", 5)]), &body)
}

fn trapped() -> http::request::Parts {
    let mut head = head();
    head.headers.insert("x-foo", http::HeaderValue::from_static("trap"));
    head
}

#[test]
fn c61_a_trap_ends_the_instance_and_the_next_request_has_a_fresh_one() {
    let bench = Bench::new();
    let plugin = bench.plugin(&trapping());
    let plugins = [plugin];
    let failed = chain(&plugins).request_headers(&mut trapped(), true);
    assert!(reason(failed).contains("unreachable"));
    // Fresh: its counter begins again.
    assert!(passed(&chain(&plugins).request_headers(&mut head(), true)));
    let row = &bench.plugins.status()[0];
    assert_eq!((row.failures, row.health), (1, Health::Running));
    assert!(row.last_error.as_deref().is_some_and(|error| error.contains("unreachable")));
}

#[test]
fn fail_open_goes_on_without_the_filter_only_if_nothing_was_changed() {
    let bench = Bench::new();
    let open = |spec: &mut outrigger_proto::mesh::Filter| spec.fail_open = true;
    let plugins = [bench.with(&wat("", &on_headers("request", "unreachable", 0)), open)];
    assert!(passed(&exchange(&plugins).0));
    let change = r#"(call $ok (call $add_header_map_value (i32.const 0) (i32.const 1024) (i32.const 1) (i32.const 1024) (i32.const 1))) unreachable"#;
    let body = format!("(data (i32.const 1024) \"x\") {}", on_headers("request", change, 0));
    let plugins = [bench.with(&wat(&import(&[("add_header_map_value", 5)]), &body), open)];
    assert!(matches!(exchange(&plugins).0, Outcome::Failed(_)));
}

#[test]
fn other_streams_of_a_dead_instance_go_by_the_policy() {
    for fail_open in [false, true] {
        let bench = Bench::new();
        let plugins = [bench.with(&trapping(), |spec| spec.fail_open = fail_open)];
        let mut bystander = chain(&plugins);
        assert!(passed(&bystander.request_headers(&mut head(), true)));
        let _ = chain(&plugins).request_headers(&mut trapped(), true);
        assert_eq!(passed(&bystander.response_headers(&mut reply(), true)), fail_open);
    }
}

#[test]
fn c62_every_kind_of_fault_is_a_trap() {
    let exit = r#"(import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))"#;
    for (body, expected) in [
        ("(call $recurse)", "stack"),
        ("(drop (i32.load (i32.const -4)))", "out of bounds"),
        ("unreachable", "unreachable"),
        ("(drop (i32.div_s (local.get $count) (i32.const 0)))", "divide by zero"),
        ("(call $exit (i32.const 3))", "proc_exit(3)"),
    ] {
        let bench = Bench::new();
        let body =
            format!("(func $recurse (call $recurse) (call $ok (i32.const 0))) {}", on_headers("request", body, 0));
        let reason = reason(exchange(&[bench.plugin(&wat(exit, &body))]).0);
        assert!(reason.contains(expected), "{reason}");
    }
}

#[test]
fn c63_an_endless_loop_is_stopped() {
    let bench = Bench::new();
    let plugins = [bench.with(&wat("", &on_headers("response", LOOP, 0)), |spec| spec.call_time_ms = 5)];
    let reason = reason(exchange(&plugins).0);
    assert!(reason.contains("limits.callTime"), "{reason}");
    assert_eq!(bench.plugins.status()[0].timeouts, 1);
}

#[test]
fn c64_an_endless_start_or_allocator_is_stopped() {
    let bench = Bench::new();
    let start = wat("", &format!(r#"(func (export "_initialize") {LOOP})"#));
    let message = bench.try_with(&start, |spec| spec.call_time_ms = 5).unwrap_err().to_string();
    assert!(message.contains("limits.callTime"), "{message}");
    let guest = format!(
        r#"(module {} (memory (export "memory") 1) (func (export "proxy_abi_version_0_2_1"))
        (func (export "malloc") (param i32) (result i32) {LOOP} (i32.const 0)) {})"#,
        import(&[("get_header_map_pairs", 3)]),
        on_headers("request", "(drop (call $get_header_map_pairs (i32.const 0) (i32.const 0) (i32.const 4)))", 0)
    );
    let plugins = [bench.with(&guest, |spec| spec.call_time_ms = 5)];
    assert!(reason(exchange(&plugins).0).contains("limits.callTime"));
}

#[test]
fn c65_a_crash_loop_backs_off() {
    let bench = Bench::new();
    let plugins = [bench.with(&wat("", &on_headers("request", "unreachable", 0)), |spec| spec.backoff_ms = 3_600_000)];
    let reasons: Vec<String> = (0..5).map(|_| reason(exchange(&plugins).0)).collect();
    assert!(reasons[2].contains("unreachable"));
    assert!(reasons[3].contains("starts again in") && reasons[4].contains("starts again in"), "{reasons:?}");
    let row = &bench.plugins.status()[0];
    assert_eq!((row.failures, row.health), (3, Health::Quarantined));
}

#[test]
fn the_allocator_cannot_reenter_the_stream() {
    let bench = Bench::new();
    let guest = format!(
        r#"(module {} (memory (export "memory") 1) (func (export "proxy_abi_version_0_2_1"))
        (func $get (result i32) (call $get_header_map_pairs (i32.const 0) (i32.const 0) (i32.const 4)))
        (func (export "malloc") (param i32) (result i32) (call $get)) {})"#,
        import(&[("get_header_map_pairs", 3)]),
        on_headers("request", "(drop (call $get))", 0)
    );
    let reason = reason(exchange(&[bench.plugin(&guest)]).0);
    assert!(reason.contains("from the allocator"), "{reason}");
}

#[test]
fn a_trap_in_on_log_disturbs_no_response() {
    let bench = Bench::new();
    let body = r#"(func (export "proxy_on_log") (param i32) unreachable)"#;
    let plugins = [bench.plugin(&wat("", body))];
    assert!(passed(&exchange(&plugins).0));
    assert_eq!(bench.plugins.status()[0].failures, 1);
}

#[test]
fn a_trap_in_on_log_disturbs_no_response_that_ended_in_the_same_entry() {
    let bench = Bench::new();
    for (log, failures) in [("", 0), ("unreachable", 1)] {
        let body = format!(
            r#"(func (export "proxy_on_response_body") (param i32 i32 i32) (result i32) (i32.const 0))
            (func (export "proxy_on_log") (param i32) {log})"#
        );
        let plugins = [bench.plugin(&wat("", &body))];
        let mut chain = chain(&plugins);
        assert!(passed(&chain.request_headers(&mut head(), true)));
        let before = bench.plugins.status()[0].calls;
        let bytes = bytes::Bytes::from_static(b"hello");
        chain.0.begin_whole(reply(), bytes.clone(), |_, _| ());
        chain.0.run(Flow::Response).now_or_never().unwrap();
        assert_eq!(chain.0.end_whole(), Some(bytes));
        assert!(!chain.0.stopped() && chain.0.take_response_head().is_some());
        chain.done();
        let row = &bench.plugins.status()[0];
        // Two of the body and one log; not again at the end.
        assert_eq!((row.failures, row.calls - before), (failures, 3));
    }
}

#[test]
fn c82_wasi_gives_nothing_away() {
    let bench = Bench::new();
    let wasi = |name: &str, params: &str| {
        format!(r#"(import "wasi_snapshot_preview1" "{name}" (func ${name} (param {params}) (result i32)))"#)
    };
    let imports = [
        wasi("fd_write", "i32 i32 i32 i32"),
        wasi("path_open", "i32 i32 i32 i32 i32 i64 i64 i32 i32"),
        wasi("sock_send", "i32 i32 i32 i32 i32"),
        wasi("environ_sizes_get", "i32 i32"),
        wasi("random_get", "i32 i32"),
        wasi("poll_oneoff", "i32 i32 i32 i32"),
    ]
    .concat();
    let zero = "(i32.const 0) ";
    let body = format!(
        "(call $is (call $fd_write (i32.const 3) {zero} {zero} {zero}) (i32.const 8))
         (call $ok (call $fd_write (i32.const 1) {zero} {zero} {zero}))
         (call $is (call $path_open {zero}{zero}{zero}{zero}{zero} (i64.const 0) (i64.const 0) {zero}{zero}) (i32.const 44))
         (call $is (call $sock_send {zero}{zero}{zero}{zero}{zero}) (i32.const 58))
         (call $ok (call $environ_sizes_get (i32.const 0) (i32.const 4)))
         (call $is (i32.load (i32.const 0)) (i32.const 1))
         (call $is (i32.load (i32.const 4)) (i32.const 10))
         (call $ok (call $random_get (i32.const 0) (i32.const 65536)))
         (call $is (call $random_get (i32.const 0) (i32.const 65537)) (i32.const 28))
         (call $is (call $random_get (i32.const -8) (i32.const 64)) (i32.const 21))
         (call $ok (call $poll_oneoff {zero}{zero}{zero}{zero}))"
    );
    let guest = wat(&imports, &on_headers("request", &body, 0));
    let plugins = [bench.with(&guest, |spec| drop(spec.environment.insert("REGION".into(), "eu".into())))];
    let outcome = exchange(&plugins).0;
    assert!(passed(&outcome), "{outcome:?}");
}

#[test]
fn c63_other_threads_are_not_stopped_by_a_loop_elsewhere() {
    let bench = Bench::new();
    let looping = bench.with(&wat("", &on_headers("request", LOOP, 0)), |spec| spec.call_time_ms = 100);
    let fine = bench.with(&wat("", &on_headers("request", "", 0)), |spec| {
        spec.name = "fine".into();
        spec.call_time_ms = 1000;
    });
    std::thread::scope(|scope| {
        let stuck = scope.spawn(|| matches!(exchange(&[looping]).0, Outcome::Failed(_)));
        let began = Instant::now();
        while !stuck.is_finished() && began.elapsed() < Duration::from_secs(60) {
            assert!(passed(&exchange(&[std::sync::Arc::clone(&fine)]).0));
        }
        assert!(stuck.join().unwrap());
    });
}

#[test]
fn a_failure_says_where_in_the_guest_it_was() {
    let bench = Bench::new();
    let body = format!(
        "(func $innermost unreachable) (func $between (call $innermost)) {}",
        on_headers("request", "(call $between)", 0)
    );
    let plugins = [bench.plugin(&wat("", &body))];
    let reason = reason(exchange(&plugins).0);
    let place = |part: &str| reason.find(part).unwrap_or_else(|| panic!("{part} in {reason}"));
    assert!(place("innermost+0x") < place(" < between+0x"), "{reason}");
    let row = bench.plugins.status().remove(0);
    assert_eq!(row.last_error, Some(reason), "and the status says it too");
    // Where it loops, too.
    let looping = format!("(func $spins {LOOP}) {}", on_headers("request", "(call $spins)", 0));
    let plugins = [bench.with(&wat("", &looping), |spec| spec.call_time_ms = 5)];
    let reason = super::guest::reason(exchange(&plugins).0);
    assert!(reason.contains("limits.callTime") && reason.contains("spins+0x"), "{reason}");
}

#[test]
fn who_used_up_its_share_of_the_worker_waits() {
    // Some 50 million turns: longer than the hundredth of a second that 1 % may save up.
    let work = "(local $n i32) (local.set $n (i32.const 50000000)) (loop $l (br_if $l (local.tee $n (i32.sub (local.get $n) (i32.const 1)))))";
    let guest = wat("", &on_headers("request", work, 0));
    for fail_open in [false, true] {
        let bench = Bench::new();
        let plugins = [bench.with(&guest, |spec| {
            spec.cpu_share_ppm = 10_000;
            spec.call_time_ms = 60_000;
            spec.fail_open = fail_open;
        })];
        let breaks = bench.with(&wat("", &on_headers("request", "unreachable", 0)), |spec| spec.name = "breaks".into());
        let throttled = || bench.plugins.status().iter().map(|row| row.throttled).sum::<u64>();
        let outcome = (0..1000).map(|_| exchange(&plugins).0).find(|outcome| throttled() > 0 || !passed(outcome));
        match outcome.unwrap() {
            Outcome::Failed(failed) => {
                assert!(!fail_open);
                assert!(failed.reason.contains("limits.cpuShare"), "{failed:?}");
            }
            outcome => assert!(fail_open && passed(&outcome), "{outcome:?}"),
        }
        let rows = bench.plugins.status();
        assert!(rows.iter().all(|row| (row.failures, row.health) == (0, Health::Running)), "its instance lives on");
        // Where the exchange never reached it, it is counted at the end: once, though it is told of the log and of the end.
        let before = throttled();
        assert!(matches!(exchange(&[breaks, plugins[0].clone()]).0, Outcome::Failed(_)));
        assert_eq!(throttled(), before + 1);
    }
}

#[test]
fn a_body_does_not_grow_for_ever_by_small_writes() {
    let bench = Bench::new();
    // Appends 200 kB again and again; the last time it is refused.
    let body = r#"(func (export "proxy_on_request_body") (param i32 i32 i32) (result i32) (local $n i32) (local $status i32)
        (local.set $n (i32.const 300))
        (loop $l
            (local.set $status (call $set_buffer_bytes (i32.const 0) (i32.const -1) (i32.const 0) (i32.const 1024) (i32.const 200000)))
            (br_if $l (local.tee $n (i32.sub (local.get $n) (i32.const 1)))))
        (call $is (local.get $status) (i32.const 2))
        (i32.const 0))"#;
    let plugins = [bench.with(&wat(&import(&[("set_buffer_bytes", 5)]), body), |spec| spec.call_time_ms = 60_000)];
    let mut driven = chain(&plugins);
    assert!(passed(&driven.request_headers(&mut head(), false)));
    driven.0.data(Flow::Request, bytes::Bytes::from_static(b"begun"), true);
    let mut size = 0;
    while let Some(Frame::Data(bytes)) = driven.0.next(Flow::Request) {
        size += bytes.len();
    }
    assert!((WRITE_LIMIT - 200_000..=WRITE_LIMIT).contains(&size), "{size}");
    driven.done();
    assert_eq!(bench.plugins.status()[0].failures, 0);
}

#[test]
fn a_local_responses_headers_are_as_large_as_other_maps_at_most() {
    let bench = Bench::new();
    // One pair: `a`, and a value of so many bytes.
    let reply = |value: u32, status: u32| {
        format!(
            "(memory.fill (i32.const 131086) (i32.const 118) (i32.const 65536))
             (i32.store (i32.const 131072) (i32.const 1)) (i32.store (i32.const 131076) (i32.const 1))
             (i32.store (i32.const 131080) (i32.const {value})) (i32.store8 (i32.const 131084) (i32.const 97))
             (i32.store8 (i32.const {}) (i32.const 0))
             (call $is (call $send_local_response (i32.const 403) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)
                (i32.const 131072) (i32.const {}) (i32.const -1)) (i32.const {status}))",
            131_086 + value,
            15 + value
        )
    };
    let body = format!("{} {}", reply(65_536, 2), reply(65_535, 0));
    let plugins = [bench.plugin(&wat(&import(&[("send_local_response", 8)]), &on_headers("request", &body, 0)))];
    let Outcome::Respond(response) = exchange(&plugins).0 else { panic!("{:?}", bench.plugins.status()) };
    assert_eq!(response.headers()["a"].len(), 65_535);
}

#[test]
fn one_fd_write_has_a_thousand_pieces_at_most() {
    let bench = Bench::new();
    let import = r#"(import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))"#;
    let body = "(call $is (call $write (i32.const 1) (i32.const 1024) (i32.const 1025) (i32.const 0)) (i32.const 28))
        (call $ok (call $write (i32.const 1) (i32.const 1024) (i32.const 1024) (i32.const 0)))";
    let outcome = exchange(&[bench.plugin(&wat(import, &on_headers("request", body, 0)))]).0;
    assert!(passed(&outcome), "{:?}", bench.plugins.status());
}
