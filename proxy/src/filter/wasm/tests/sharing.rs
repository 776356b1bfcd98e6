//! Shared data, queues, metrics, foreign functions and withheld time, from the guest's side.

use super::guest::{Bench, exchange, import, on_headers, passed, texts};

const FUNCTIONS: [(&str, usize); 11] = [
    ("get_shared_data", 5),
    ("set_shared_data", 5),
    ("register_shared_queue", 3),
    ("resolve_shared_queue", 5),
    ("enqueue_shared_queue", 3),
    ("dequeue_shared_queue", 3),
    ("define_metric", 4),
    ("get_metric", 2),
    ("call_foreign_function", 6),
    ("get_buffer_status", 3),
    ("get_status", 3),
];
/// Functions with a parameter of 64 bits.
const LONG: &str = r#"
    (import "env" "proxy_increment_metric" (func $increment_metric (param i32 i64) (result i32)))
    (import "env" "proxy_record_metric" (func $record_metric (param i32 i64) (result i32)))"#;
/// Where results go.
const OUT: &str = "(i32.const 0) (i32.const 4)";
const BAD: &str = "(i32.const -2)";

/// Runs this in `on_request_headers`; it traps unless everything is as it says.
fn runs(body: &str) {
    let bench = Bench::new();
    let guest = texts(&(import(&FUNCTIONS) + LONG), &on_headers("request", body, 0));
    let plugin = [bench.with(&guest, |spec| spec.vm_id = "shared".into())];
    let outcome = exchange(&plugin).0;
    assert!(passed(&outcome), "{outcome:?} {:?}", bench.plugins.status()[0].last_error);
}

#[test]
fn c75_data_is_compared_and_swapped() {
    runs(&format!(
        "(call $is (call $get_shared_data @k@ {OUT} (i32.const 8)) (i32.const 1))
         (call $ok (call $set_shared_data @k@ @one@ (i32.const 99)))
         (call $ok (call $get_shared_data @k@ {OUT} (i32.const 8)))
         (call $is (i32.load (i32.const 4)) (i32.const 3))
         (if (i32.eqz (i32.load (i32.const 8))) (then unreachable))
         (call $is (call $set_shared_data @k@ @two@ (i32.add (i32.load (i32.const 8)) (i32.const 1))) (i32.const 8))
         (call $ok (call $set_shared_data @k@ @two@ (i32.load (i32.const 8))))
         (call $ok (call $set_shared_data @k@ @three@ (i32.const 0)))
         (call $is (call $get_shared_data (i32.const -8) (i32.const 100) {OUT} (i32.const 8)) (i32.const 6))
         (call $is (call $get_shared_data @k@ {OUT} {BAD}) (i32.const 6))
         (call $is (call $set_shared_data @k@ (i32.const -8) (i32.const 100) (i32.const 0)) (i32.const 6))"
    ));
}

#[test]
fn c77_queues() {
    runs(&format!(
        "(call $is (call $resolve_shared_queue (i32.const 0) (i32.const 0) @q@ (i32.const 0)) (i32.const 1))
         (call $ok (call $register_shared_queue @q@ (i32.const 0)))
         (call $ok (call $register_shared_queue @q@ (i32.const 4)))
         (call $is (i32.load (i32.const 0)) (i32.load (i32.const 4)))
         (call $ok (call $resolve_shared_queue (i32.const 0) (i32.const 0) @q@ (i32.const 8)))
         (call $ok (call $resolve_shared_queue @shared@ @q@ (i32.const 8)))
         (call $is (i32.load (i32.const 8)) (i32.load (i32.const 0)))
         (call $is (call $resolve_shared_queue @other@ @q@ (i32.const 8)) (i32.const 1))
         (call $is (call $dequeue_shared_queue (i32.load (i32.const 8)) (i32.const 16) (i32.const 20)) (i32.const 7))
         (call $ok (call $enqueue_shared_queue (i32.load (i32.const 8)) @first@))
         (call $ok (call $enqueue_shared_queue (i32.load (i32.const 8)) @no2@))
         (call $is (call $dequeue_shared_queue (i32.load (i32.const 8)) {BAD} (i32.const 20)) (i32.const 6))
         (call $ok (call $dequeue_shared_queue (i32.load (i32.const 8)) (i32.const 16) (i32.const 20)))
         (call $is (i32.load (i32.const 20)) (i32.const 5))
         (call $is (call $enqueue_shared_queue (i32.const 0) @x@) (i32.const 1))
         (call $is (call $dequeue_shared_queue (i32.const 0) (i32.const 16) (i32.const 20)) (i32.const 1))
         (call $is (call $register_shared_queue @q@ {BAD}) (i32.const 6))"
    ));
}

#[test]
fn c78_metrics_count_and_are_told() {
    let bench = Bench::new();
    let body = format!(
        "(call $is (call $define_metric (i32.const 3) @hits@ (i32.const 0)) (i32.const 2))
         (call $is (call $define_metric (i32.const 0) @hits@ {BAD}) (i32.const 6))
         (call $ok (call $define_metric (i32.const 0) @hits@ (i32.const 0)))
         (call $is (call $increment_metric (i32.load (i32.const 0)) (i64.const -1)) (i32.const 2))
         (call $ok (call $increment_metric (i32.load (i32.const 0)) (i64.const 2)))
         (call $ok (call $record_metric (i32.load (i32.const 0)) (i64.const 3)))
         (call $ok (call $get_metric (i32.load (i32.const 0)) (i32.const 8)))
         (call $is (i32.ge_u (i32.load (i32.const 8)) (i32.const 5)) (i32.const 1))
         (call $is (call $get_metric (i32.const 12345) (i32.const 8)) (i32.const 1))
         (call $is (call $get_metric (i32.load (i32.const 0)) {BAD}) (i32.const 6))
         (call $ok (call $define_metric (i32.const 2) @took@ (i32.const 0)))
         (call $is (call $get_metric (i32.load (i32.const 0)) (i32.const 8)) (i32.const 2))"
    );
    let guest = texts(&(import(&FUNCTIONS) + LONG), &on_headers("request", &body, 0));
    let plugin = [bench.plugin(&guest)];
    let workers: Vec<_> = (0..3)
        .map(|_| {
            let plugin = plugin.clone();
            std::thread::spawn(move || (0..4).all(|_| passed(&exchange(&plugin).0)))
        })
        .collect();
    assert!(workers.into_iter().all(|worker| worker.join().unwrap()));
    let mut text = String::new();
    bench.plugins.custom_metrics(&mut text);
    let line = "outrigger_filter_counter_total{filter=\"demo/guest\",name=\"hits\"} 60";
    assert!(text.lines().any(|found| found == line), "{text}");
}

#[test]
fn what_a_trial_counts_and_shares_is_seen_by_nobody() {
    let bench = Bench::new();
    let body = r#"(func (export "proxy_on_configure") (param i32 i32) (result i32)
        (call $ok (call $define_metric (i32.const 0) @tried@ (i32.const 0)))
        (call $ok (call $set_shared_data @k@ @v@ (i32.const 0)))
        (i32.const 1))"#;
    let _plugin = bench.plugin(&texts(&import(&FUNCTIONS), body));
    let mut text = String::new();
    bench.plugins.custom_metrics(&mut text);
    assert_eq!(text, "");
}

#[test]
fn foreign_functions_and_what_is_not_there() {
    // Address 0 means that no result is wanted.
    const PLACE: &str = "(i32.const 16) (i32.const 20)";
    runs(&format!(
        "(call $is (call $call_foreign_function @nope@ @x@ {PLACE}) (i32.const 1))
         (call $ok (call $call_foreign_function @compress@ @aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa@ {PLACE}))
         (call $ok (call $call_foreign_function @uncompress@ (i32.load (i32.const 16)) (i32.load (i32.const 20)) {PLACE}))
         (call $is (i32.load (i32.const 20)) (i32.const 32))
         (call $ok (call $call_foreign_function @clear_route_cache@ (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)))
         (call $is (call $call_foreign_function @uncompress@ @x@ {PLACE}) (i32.const 3))
         (call $is (call $get_buffer_status (i32.const 8) {PLACE}) (i32.const 1))
         (call $is (call $get_buffer_status (i32.const 9) {PLACE}) (i32.const 2))
         (call $ok (call $get_status (i32.const 8) {PLACE}))
         (call $is (i32.load (i32.const 8)) (i32.const 0))"
    ));
}
