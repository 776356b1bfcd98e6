//! Header maps, local responses, properties and contexts, from the guest's side.

use http::StatusCode;

use super::guest::{Bench, Outcome, chain, consts, exchange, head, import, on_headers, passed, reason, reply, wat};

const MAPS: [(&str, usize); 8] = [
    ("get_header_map_value", 5),
    ("add_header_map_value", 5),
    ("replace_header_map_value", 5),
    ("remove_header_map_value", 3),
    ("get_header_map_pairs", 3),
    ("set_header_map_pairs", 3),
    ("send_local_response", 8),
    ("continue_stream", 1),
];

/// Texts in the guest's memory at 1024; the code names them `@text@`, which becomes `address length`.
fn guest(body: &str) -> String {
    let (mut data, mut code) = (String::new(), String::new());
    let mut at = 1024;
    for (index, part) in body.split('@').enumerate() {
        if index % 2 == 0 {
            code.push_str(part);
            continue;
        }
        let text = part.replace("\\r\\n", "\r\n").replace("\\00", "\0");
        data.push_str(&format!("(data (i32.const {at}) \"{part}\")\n", part = part.replace("\\r\\n", "\\0d\\0a")));
        code.push_str(&consts(&[at, u32::try_from(text.len()).unwrap()]));
        at += 128;
    }
    let functions =
        [&MAPS[..], &[("get_property", 4), ("set_property", 4), ("set_effective_context", 1), ("close_stream", 1)]];
    wat(&import(&functions.concat()), &format!("{data}{code}"))
}

const OUT: &str = "(i32.const 0) (i32.const 4)";

#[test]
fn c18_c19_missing_keys_and_case() {
    let bench = Bench::new();
    let body = format!(
        "(call $is (call $get_header_map_value (i32.const 0) @nope@ {OUT}) (i32.const 1))
         (call $ok (call $get_header_map_value (i32.const 0) @X-Foo@ {OUT}))
         (call $is (i32.load (i32.const 4)) (i32.const 3))
         (call $ok (call $get_header_map_value (i32.const 0) @host@ {OUT}))
         (call $is (i32.load (i32.const 4)) (i32.const 12))
         ;; :method, :path, :authority, :scheme, x-dup twice, x-foo
         (call $is (local.get $count) (i32.const 7))"
    );
    assert!(passed(&exchange(&[bench.plugin(&guest(&on_headers("request", &body, 0)))]).0));
}

#[test]
fn c20_c21_c23_c24_headers_are_changed() {
    let bench = Bench::new();
    let body = "(call $ok (call $add_header_map_value (i32.const 0) @X-UPPER@ @v@))
         (call $ok (call $add_header_map_value (i32.const 0) @x-dup@ @3@))
         (call $ok (call $replace_header_map_value (i32.const 0) @x-foo@ @baz@))
         (call $ok (call $remove_header_map_value (i32.const 0) @none@))
         (call $ok (call $replace_header_map_value (i32.const 0) @:path@ @/rewritten?a=b@))
         (call $ok (call $replace_header_map_value (i32.const 0) @:authority@ @ratings@))";
    let (outcome, request, _) = exchange(&[bench.plugin(&guest(&on_headers("request", body, 0)))]);
    assert!(passed(&outcome));
    assert_eq!(request.headers["x-upper"], "v");
    assert_eq!(request.headers.get_all("x-dup").iter().count(), 3);
    assert_eq!(request.headers["x-foo"], "baz");
    assert_eq!(request.uri, "/rewritten?a=b");
    assert_eq!(request.headers["host"], "ratings");
}

#[test]
fn c22_c30_maps_are_there_in_their_own_callback_only() {
    let bench = Bench::new();
    let early = format!(
        "(call $ok (call $get_header_map_pairs (i32.const 2) {OUT}))
         (call $is (i32.load (i32.const 4)) (i32.const 0))
         (call $is (call $get_header_map_pairs (i32.const 8) {OUT}) (i32.const 2))"
    );
    let late = format!(
        "(call $is (call $add_header_map_value (i32.const 0) @a@ @b@) (i32.const 2))
         (call $is (call $get_header_map_value (i32.const 0) @x-foo@ {OUT}) (i32.const 2))"
    );
    let log = format!(
        r#"(func (export "proxy_on_log") (param i32)
         (call $is (call $add_header_map_value (i32.const 0) @a@ @b@) (i32.const 2))
         (call $ok (call $get_header_map_value (i32.const 0) @x-foo@ {OUT}))
         (call $ok (call $get_header_map_value (i32.const 2) @x-up@ {OUT})))"#
    );
    let body = format!("{}{}{log}", on_headers("request", &early, 0), on_headers("response", &late, 0));
    let plugins = [bench.plugin(&guest(&body))];
    assert!(passed(&exchange(&plugins).0));
    // A trap in on_log disturbs no response, so only the status can tell.
    assert_eq!(bench.plugins.status()[0].failures, 0, "{:?}", bench.plugins.status());
}

#[test]
fn c26_c27_responses_stay_well_formed() {
    let bench = Bench::new();
    let body = "(call $ok (call $replace_header_map_value (i32.const 2) @:status@ @299@))
         (call $is (call $replace_header_map_value (i32.const 2) @:status@ @abc@) (i32.const 2))
         (call $is (call $add_header_map_value (i32.const 2) @x@ @a\\r\\nb: c@) (i32.const 2))
         (call $is (call $add_header_map_value (i32.const 2) @x y@ @z@) (i32.const 2))
         (call $ok (call $add_header_map_value (i32.const 2) @set-cookie@ @a@))
         (call $ok (call $add_header_map_value (i32.const 2) @set-cookie@ @b@))";
    let (outcome, _, response) = exchange(&[bench.plugin(&guest(&on_headers("response", body, 0)))]);
    assert!(passed(&outcome));
    assert_eq!(response.status.as_u16(), 299);
    assert_eq!(response.headers.get_all("set-cookie").iter().count(), 2);
    assert!(!response.headers.contains_key("x"));
}

#[test]
fn c28_c29_all_pairs_at_once() {
    let bench = Bench::new();
    let garbage = "(call $is (call $set_header_map_pairs (i32.const 0) @garbage!@) (i32.const 2))";
    let (outcome, request, _) = exchange(&[bench.plugin(&guest(&on_headers("request", garbage, 0)))]);
    assert!(passed(&outcome));
    assert_eq!(request.headers["x-foo"], "bar");
    let empty = "(call $ok (call $set_header_map_pairs (i32.const 0) (i32.const 0) (i32.const 0)))";
    let (outcome, _, _) = exchange(&[bench.plugin(&guest(&on_headers("request", empty, 0)))]);
    assert_eq!(reason(outcome), "it removed :method");
}

#[test]
fn c33_addresses_outside_memory_are_errors_of_the_guest_alone() {
    let bench = Bench::new();
    let body = format!(
        "(call $is (call $get_header_map_value (i32.const 0) (i32.const -8) (i32.const 100) {OUT}) (i32.const 6))
         (call $is (call $get_header_map_value (i32.const 0) @x-foo@ (i32.const -2) (i32.const 4)) (i32.const 6))
         (call $ok (call $get_header_map_value (i32.const 0) @x-foo@ (i32.const 1) (i32.const 7)))"
    );
    assert!(passed(&exchange(&[bench.plugin(&guest(&on_headers("request", &body, 0)))]).0));
}

/// A call that makes a local response of this status with the body `body`.
fn local(status: u32) -> String {
    format!(
        "(call $send_local_response (i32.const {status}) (i32.const 0) (i32.const 0) @body@ (i32.const 0) (i32.const 0) (i32.const -1))"
    )
}

fn response_of(outcome: Outcome) -> http::Response<bytes::Bytes> {
    match outcome {
        Outcome::Respond(response) => response,
        other => panic!("{other:?}"),
    }
}

#[test]
fn c52_c53_c54_the_first_local_response_wins() {
    let bench = Bench::new();
    let body =
        format!("(call $ok {}) (call $ok {}) (call $ok (call $continue_stream (i32.const 0)))", local(403), local(500));
    for result in [0, 1] {
        let (outcome, _, _) = exchange(&[bench.plugin(&guest(&on_headers("request", &body, result)))]);
        let response = response_of(outcome);
        assert_eq!(response.status(), StatusCode::FORBIDDEN);
        assert_eq!(response.body(), "body");
        assert_eq!(response.headers()["content-type"], "text/plain");
    }
}

#[test]
fn c56_a_local_response_replaces_the_upstreams() {
    let bench = Bench::new();
    let body = on_headers("response", &format!("(call $ok {})", local(418)), 0);
    let (outcome, _, _) = exchange(&[bench.plugin(&guest(&body))]);
    let response = response_of(outcome);
    assert_eq!(response.status().as_u16(), 418);
    assert!(!response.headers().contains_key("x-up"));
}

#[test]
fn c58_impossible_statuses_are_refused() {
    let bench = Bench::new();
    let calls: String =
        [0, 99, 101, 1000].iter().map(|status| format!("(call $is {} (i32.const 2))", local(*status))).collect();
    assert!(passed(&exchange(&[bench.plugin(&guest(&on_headers("request", &calls, 0)))]).0));
}

#[test]
fn c59_grpc_requests_get_a_grpc_status() {
    let bench = Bench::new();
    let plugin = bench.plugin(&guest(&on_headers("request", &format!("(call $ok {})", local(403)), 0)));
    let mut chain = chain(&[plugin]);
    let mut request = head();
    request.headers.insert("content-type", http::HeaderValue::from_static("application/grpc"));
    let response = response_of(chain.request_headers(&mut request, false));
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(response.headers()["grpc-status"], "7");
    assert_eq!(response.headers()["grpc-message"], "body");
}

#[test]
fn c60_filters_behind_a_local_response_only_log() {
    let bench = Bench::new();
    let marks = "(call $ok (call $add_header_map_value (i32.const 2) @x-first@ @1@))";
    let first = format!(
        "{}{}",
        on_headers("request", &format!("(call $ok {})", local(403)), 0),
        on_headers("response", marks, 0)
    );
    let first = bench.with(&guest(&first), |spec| spec.name = "first".into());
    let second = format!("{}{}", on_headers("request", "unreachable", 0), on_headers("response", "unreachable", 0));
    let second = bench.with(&guest(&second), |spec| spec.name = "second".into());
    let plugins = [first, second];
    let response = response_of(exchange(&plugins).0);
    // The response passed the callbacks of the filter that made it.
    assert_eq!(response.headers()["x-first"], "1");
    let rows = bench.plugins.status();
    assert_eq!((rows[1].name.as_str(), rows[1].requests, rows[1].failures), ("second", 1, 0));
}

#[test]
fn c50_c51_pause_and_continue() {
    let bench = Bench::new();
    let body = on_headers("request", "(call $ok (call $continue_stream (i32.const 0)))", 1);
    assert!(passed(&exchange(&[bench.plugin(&guest(&body))]).0));
    let body = on_headers("request", "(call $ok (call $continue_stream (i32.const 1)))", 0);
    assert!(passed(&exchange(&[bench.plugin(&guest(&body))]).0));
    let body = on_headers("request", "", 1);
    assert!(matches!(exchange(&[bench.plugin(&guest(&body))]).0, Outcome::Paused));
}

#[test]
fn a_filter_can_reset_the_stream() {
    let bench = Bench::new();
    let body = on_headers("request", "(call $ok (call $close_stream (i32.const 0)))", 0);
    assert!(matches!(exchange(&[bench.plugin(&guest(&body))]).0, Outcome::Reset));
}

#[test]
fn c79_only_contexts_of_the_same_instance_can_be_chosen() {
    let bench = Bench::new();
    let body = format!(
        "(call $is (call $set_effective_context (i32.const 4711)) (i32.const 2))
         (call $ok (call $set_effective_context (i32.const 1)))
         ;; the root has no headers
         (call $is (call $get_header_map_value (i32.const 0) @x-foo@ {OUT}) (i32.const 2))
         (call $ok (call $set_effective_context (i32.const 0)))
         (call $ok (call $get_header_map_value (i32.const 0) @x-foo@ {OUT}))
         (call $ok (call $set_effective_context (i32.const 1)))"
    );
    let again = format!("(call $ok (call $get_header_map_value (i32.const 2) @x-up@ {OUT}))");
    let body = format!("{}{}", on_headers("request", &body, 0), on_headers("response", &again, 0));
    assert!(passed(&exchange(&[bench.plugin(&guest(&body))]).0));
}

#[test]
fn c81_properties() {
    let bench = Bench::new();
    let size = |path: &str, size: u32| {
        format!("(call $ok (call $get_property @{path}@ {OUT})) (call $is (i32.load (i32.const 4)) (i32.const {size}))")
    };
    let missing =
        |path: &str, status: u32| format!("(call $is (call $get_property @{path}@ {OUT}) (i32.const {status}))");
    let body = [
        "(call $ok (call $replace_header_map_value (i32.const 0) @:path@ @/new@))".to_owned(),
        size("request\\00path", 4),
        size("request\\00path\\00", 4),
        size("request\\00headers\\00x-foo", 3),
        size("source\\00address", 15),
        size("source\\00port", 8),
        size("connection\\00mtls", 1),
        size("connection_id", 8),
        size("plugin_name", 10),
        size("plugin_root_id", 4),
        size("xds\\00cluster_name", 12),
        size("cluster_name", 12),
        missing("request.path", 1),
        missing("response\\00code", 1),
        missing("upstream\\00address", 1),
        missing("nope", 1),
        missing("request", 3),
        missing("", 3),
        "(call $ok (call $set_property @mine@ @value@))".to_owned(),
        size("mine", 5),
        size("filter_state\\00wasm.mine", 5),
        "(call $ok (call $set_property @plugin_name@ @value@))".to_owned(),
        size("plugin_name", 10),
    ]
    .concat();
    let later = [size("response\\00code", 8), size("request\\00path", 4), size("mine", 5)].concat();
    let body = format!("{}{}", on_headers("request", &body, 0), on_headers("response", &later, 0));
    let outcome = exchange(&[bench.plugin(&guest(&body))]).0;
    assert!(passed(&outcome), "{outcome:?}");
}

#[test]
fn an_empty_chain_does_nothing() {
    let mut chain = chain(&[]);
    assert!(passed(&chain.request_headers(&mut head(), true)));
    assert!(passed(&chain.response_headers(&mut reply(), true)));
}
