//! What is refused before it serves, and what loads.

use super::super::super::Health;
use super::guest::{Bench, custom, exchange, import, on_headers, passed, wat};

#[test]
fn c01_c02_modules_of_no_or_another_abi_are_refused() {
    let bench = Bench::new();
    let message = bench.refusal("(module)");
    assert!(message.contains("exports no proxy_abi_version_*"), "{message}");
    let message = bench.refusal(&custom("proxy_abi_version_0_3_0", "", ""));
    assert!(message.contains("proxy_abi_version_0_3_0") && message.contains("0.2.1"), "{message}");
}

#[test]
fn c03_c04_imports_that_are_not_served_are_named() {
    let bench = Bench::new();
    let message = bench.refusal(&wat(&import(&[("does_not_exist", 1)]), ""));
    assert!(message.contains("proxy_does_not_exist"), "{message}");
    let message = bench.refusal(&wat(&import(&[("log", 1)]), ""));
    assert!(message.contains("proxy_log"), "{message}");
}

#[test]
fn c05_an_allocator_and_a_memory_are_needed() {
    let bench = Bench::new();
    let marker = r#"(func (export "proxy_abi_version_0_2_1"))"#;
    let message = bench.refusal(&format!(r#"(module {marker} (memory (export "memory") 1))"#));
    assert!(message.contains("malloc"), "{message}");
    let message = bench.refusal(&format!("(module {marker})"));
    assert!(message.contains("memory"), "{message}");
}

#[test]
fn c06_a_module_of_nothing_lets_everything_pass() {
    let bench = Bench::new();
    let (outcome, request, _) = exchange(&[bench.plugin(&wat("", ""))]);
    assert!(passed(&outcome));
    assert_eq!(request.headers.len(), super::guest::head().headers.len());
}

#[test]
fn c07_initialize_runs_instead_of_start_and_its_trap_refuses() {
    let bench = Bench::new();
    let message = bench.refusal(&wat("", r#"(func (export "_initialize") unreachable)"#));
    assert!(message.contains("start-up") && message.contains("unreachable"), "{message}");
    bench.plugin(&wat("", r#"(func (export "_initialize")) (func (export "_start") unreachable)"#));
    let message = bench.refusal(&wat("", r#"(func (export "_start") unreachable)"#));
    assert!(message.contains("start-up"), "{message}");
}

#[test]
fn c08_the_start_section_runs_first() {
    let bench = Bench::new();
    let body = format!(
        "(global $ran (mut i32) (i32.const 0)) (func $go (global.set $ran (i32.const 1))) (start $go) {}",
        on_headers("request", "(call $is (global.get $ran) (i32.const 1))", 0)
    );
    assert!(passed(&exchange(&[bench.plugin(&wat("", &body))]).0));
}

#[test]
fn c09_c10_c11_a_refused_configuration_refuses_the_filter() {
    let bench = Bench::new();
    for (callback, body, expected) in [
        ("proxy_on_vm_start", "(i32.const 0)", "proxy_on_vm_start returned false"),
        ("proxy_on_configure", "(i32.const 0)", "proxy_on_configure returned false"),
        ("proxy_on_configure", "unreachable", "proxy_on_configure: it trapped"),
    ] {
        let body = format!(r#"(func (export "{callback}") (param i32 i32) (result i32) {body})"#);
        let message = bench.refusal(&wat("", &body));
        assert!(message.contains(expected), "{message}");
    }
    // Reported although nothing of that name serves.
    let row = &bench.plugins.status()[0];
    assert_eq!(row.health, Health::Refused);
    assert!(row.refused.as_ref().is_some_and(|why| why.contains("it trapped")), "{row:?}");
}

#[test]
fn c12_host_calls_during_start_up_are_refused() {
    let bench = Bench::new();
    let body = r#"(func (export "_initialize") (drop (call $get_header_map_value (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0))))"#;
    let message = bench.refusal(&wat(&import(&[("get_header_map_value", 5)]), body));
    assert!(message.contains("proxy_get_header_map_value was called during start-up"), "{message}");
}

#[test]
fn c13_abi_0_1_0_is_served() {
    let bench = Bench::new();
    let imports = import(&[("get_configuration", 2), ("get_header_map_value", 5)]);
    // A missing key reads as Ok and empty; the configuration comes from a function of its own.
    let body = r#"
        (data (i32.const 1024) "x-missing")
        (func (export "proxy_on_configure") (param i32 i32) (result i32)
            (call $ok (call $get_configuration (i32.const 0) (i32.const 4)))
            (call $is (i32.load (i32.const 4)) (i32.const 3))
            (i32.const 1))
        (func (export "proxy_on_request_headers") (param i32 i32) (result i32)
            (call $ok (call $get_header_map_value (i32.const 0) (i32.const 1024) (i32.const 9) (i32.const 0) (i32.const 4)))
            (call $is (i32.load (i32.const 4)) (i32.const 0))
            (i32.const 0))"#;
    let guest = custom("proxy_abi_version_0_1_0", &imports, body);
    let plugin = bench.with(&guest, |spec| spec.configuration = b"abc".to_vec().into());
    assert!(passed(&exchange(&[plugin]).0));
}

#[test]
fn c14_the_same_import_twice_links() {
    let bench = Bench::new();
    let twice = r#"(import "wasi_snapshot_preview1" "fd_write" (func (param i32 i32 i32 i32) (result i32)))"#.repeat(2);
    bench.plugin(&wat(&twice, ""));
}

#[test]
fn c15_memory_beyond_the_limit_is_refused() {
    let bench = Bench::new();
    let guest = r#"(module (memory (export "memory") 32768) (func (export "proxy_abi_version_0_2_0"))
        (func (export "malloc") (param i32) (result i32) (i32.const 0)))"#;
    let message = bench.refusal(guest);
    assert!(message.contains("limits.memory"), "{message}");
    // Growth within the guest's rights is refused with -1, and the guest goes on.
    let body = on_headers("request", "(call $is (memory.grow (i32.const 20000)) (i32.const -1))", 0);
    assert!(passed(&exchange(&[bench.plugin(&wat("", &body))]).0));
}

#[test]
fn c16_configuration_is_read_in_on_configure_only() {
    let bench = Bench::new();
    let read = "(call $get_buffer_bytes (i32.const 7) (i32.const 1) (i32.const 100) (i32.const 0) (i32.const 4))";
    let body = format!(
        r#"(func (export "proxy_on_configure") (param i32 i32) (result i32)
            (call $is (local.get 1) (i32.const 4))
            (call $ok {read})
            (call $is (i32.load (i32.const 4)) (i32.const 3))
            (call $is (i32.load8_u (i32.load (i32.const 0))) (i32.const 50))
            ;; past the end: nothing; past 32 bits and unknown buffers: bad
            (call $ok (call $get_buffer_bytes (i32.const 7) (i32.const 40) (i32.const 1) (i32.const 0) (i32.const 4)))
            (call $is (i32.load (i32.const 4)) (i32.const 0))
            (call $is (call $get_buffer_bytes (i32.const 7) (i32.const -1) (i32.const -1) (i32.const 0) (i32.const 4)) (i32.const 2))
            (call $is (call $get_buffer_bytes (i32.const 9) (i32.const 0) (i32.const 1) (i32.const 0) (i32.const 4)) (i32.const 2))
            (i32.const 1))
        {}"#,
        on_headers("request", &format!("(call $is {read} (i32.const 1))"), 0)
    );
    let guest = wat(&import(&[("get_buffer_bytes", 5)]), &body);
    assert!(passed(&exchange(&[bench.with(&guest, |spec| spec.configuration = b"1234".to_vec().into())]).0));
    // An empty one is no failure.
    let body = r#"(func (export "proxy_on_configure") (param i32 i32) (result i32) (i32.eqz (local.get 1)))"#;
    bench.plugin(&wat("", body));
}

#[test]
fn exports_of_another_type_are_refused() {
    let bench = Bench::new();
    let body = r#"(func (export "proxy_on_request_headers") (param i32 i64) (result i32) (i32.const 0))"#;
    let message = bench.refusal(&wat("", body));
    assert!(message.contains("proxy_on_request_headers") && message.contains("i64"), "{message}");
}

#[test]
fn every_function_of_the_abi_links() {
    let bench = Bench::new();
    let functions = [
        ("set_buffer_bytes", 5),
        ("get_buffer_status", 3),
        ("set_tick_period_milliseconds", 1),
        ("http_call", 10),
        ("grpc_call", 12),
        ("grpc_stream", 9),
        ("grpc_send", 4),
        ("grpc_cancel", 1),
        ("grpc_close", 1),
        ("get_status", 3),
        ("get_shared_data", 5),
        ("set_shared_data", 5),
        ("register_shared_queue", 3),
        ("resolve_shared_queue", 5),
        ("enqueue_shared_queue", 3),
        ("dequeue_shared_queue", 3),
        ("define_metric", 4),
        ("get_metric", 2),
        ("call_foreign_function", 6),
        ("get_log_level", 1),
        ("continue_stream", 1),
        ("close_stream", 1),
        ("done", 0),
    ];
    let body = on_headers("request", "(call $is (call $grpc_cancel (i32.const 1)) (i32.const 1))", 0);
    assert!(passed(&exchange(&[bench.plugin(&wat(&import(&functions), &body))]).0));
}

#[test]
fn a_module_that_is_not_what_was_announced_is_refused() {
    let bench = Bench::new();
    let error = bench.try_with(&wat("", ""), |spec| spec.sha256 = "0".repeat(64)).unwrap_err().to_string();
    assert!(error.contains("SHA-256"), "{error}");
    let error = bench.try_with(&wat("", ""), |spec| spec.sha256 = "../../etc/passwd".into()).unwrap_err().to_string();
    assert!(error.contains("not a SHA-256"), "{error}");
}
