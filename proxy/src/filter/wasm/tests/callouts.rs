//! Calls, timers and queues: what comes back to a root context.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::LocalBoxFuture;
use http::Response;
use http_body::Frame;
use http_body_util::{BodyExt as _, Full};

use super::super::super::{Answer, AnswerBody, CallOut, Chain, Outside, Plugin, connect, warm};
use super::guest::{Bench, chain, exchange, head, import, on_headers, passed, texts};

const FUNCTIONS: [(&str, usize); 16] = [
    ("http_call", 10),
    ("grpc_call", 12),
    ("grpc_stream", 9),
    ("grpc_send", 4),
    ("grpc_cancel", 1),
    ("grpc_close", 1),
    ("get_status", 3),
    ("set_effective_context", 1),
    ("continue_stream", 1),
    ("add_header_map_value", 5),
    ("get_header_map_value", 5),
    ("get_buffer_bytes", 5),
    ("set_tick_period_milliseconds", 1),
    ("register_shared_queue", 3),
    ("enqueue_shared_queue", 3),
    ("dequeue_shared_queue", 3),
];
const OUT: &str = "(i32.const 0) (i32.const 4)";
/// `:method GET`, `:path /check`, `:authority a`, serialized.
const HEAD: &str = "@\\03\\00\\00\\00\\07\\00\\00\\00\\03\\00\\00\\00\\05\\00\\00\\00\\06\\00\\00\\00\\0a\\00\\00\\00\\01\\00\\00\\00:method\\00GET\\00:path\\00/check\\00:authority\\00a\\00@";
const NONE: &str = "(i32.const 0) (i32.const 0)";

/// Answers in order; nothing where there are none.
#[derive(Default)]
struct Canned {
    answers: RefCell<VecDeque<Response<AnswerBody>>>,
    calls: RefCell<Vec<String>>,
}

impl Outside for Canned {
    fn send(&self, call: CallOut) -> LocalBoxFuture<'static, Answer> {
        self.calls.borrow_mut().push(format!("{} {} {}", call.upstream, call.head.method, call.head.uri));
        let answer = self.answers.borrow_mut().pop_front();
        Box::pin(async move { answer.ok_or_else(|| "nobody answers".into()) })
    }
}

fn body(data: &'static [u8], trailers: &[(&'static str, &'static str)]) -> AnswerBody {
    let mut fields = http::HeaderMap::new();
    for (name, value) in trailers {
        fields.insert(*name, http::HeaderValue::from_static(value));
    }
    if fields.is_empty() {
        return Box::pin(Full::new(Bytes::from_static(data)).map_err(|never| match never {}));
    }
    let frames = [Ok(Frame::data(Bytes::from_static(data))), Ok(Frame::trailers(fields))];
    Box::pin(http_body_util::StreamBody::new(futures_util::stream::iter(frames)))
}

fn guest(body: &str) -> String {
    texts(&import(&FUNCTIONS), body)
}

fn with_upstream(bench: &Bench, guest: &str) -> Arc<Plugin> {
    let upstream = outrigger_proto::mesh::filter::Upstream { namespace: "demo".into(), name: "authz".into(), port: 0 };
    bench.with(guest, |spec| {
        spec.upstreams = [("authz".to_owned(), upstream)].into();
        spec.callouts = 2;
    })
}

/// Runs on a worker that has these answers.
fn on_worker<F: Future>(canned: &Rc<Canned>, f: impl FnOnce() -> F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let local = tokio::task::LocalSet::new();
    let result = local.block_on(&runtime, async {
        connect(Some(canned.clone()));
        f().await
    });
    connect(None);
    result
}

/// Waits until the request has passed the filters.
async fn request(chain: &Chain) -> http::request::Parts {
    chain.request_headers(head(), true);
    loop {
        chain.settle();
        if let Some((head, _)) = chain.take_request() {
            return head.into();
        }
        tokio::task::yield_now().await;
    }
}

fn call(upstream: &str, head: &str, timeout: i64) -> String {
    format!("(call $http_call {upstream} {head} @b@ {NONE} (i32.const {timeout}) (i32.const 8))")
}

#[test]
fn c66_calls_that_cannot_be_made_say_so() {
    let bench = Bench::new();
    let body = format!(
        "(call $is {} (i32.const 2)) (call $is {} (i32.const 2)) (call $is {} (i32.const 2))
         (call $is (call $http_call @authz@ {HEAD} @b@ {NONE} (i32.const 0) (i32.const -2)) (i32.const 6))
         (call $ok {ok}) (call $ok {ok}) (call $is {ok} (i32.const 10))
         (call $is (call $grpc_call @nope@ @s@ @m@ {NONE} @x@ (i32.const 0) (i32.const 8)) (i32.const 4))
         (call $is (call $grpc_send (i32.const 3) @x@ (i32.const 0)) (i32.const 2))
         (call $is (call $grpc_send (i32.const 400) @x@ (i32.const 0)) (i32.const 1))
         (call $is (call $grpc_cancel (i32.const 400)) (i32.const 1))
         (call $is (call $grpc_close (i32.const 400)) (i32.const 1))",
        call("@nope@", HEAD, 1),
        call("@authz@", NONE, 1),
        call("@authz@", HEAD, -1),
        ok = call("@authz@", HEAD, 0),
    );
    let plugin = with_upstream(&bench, &guest(&on_headers("request", &body, 0)));
    let outcome = exchange(&[plugin]).0;
    assert!(passed(&outcome), "{:?}", bench.plugins.status());
}

/// Pauses, calls, and with the answer marks the request and lets it go.
fn asks() -> String {
    guest(&format!(
        r#"(global $stream (mut i32) (i32.const 0)) {}
        (func (export "proxy_on_http_call_response") (param i32 i32 i32 i32 i32)
            (call $is (local.get 1) (i32.load (i32.const 8)))
            (call $ok (call $get_status (i32.const 12) {OUT}))
            (if (local.get 2) (then
                (call $is (i32.load (i32.const 12)) (i32.const 200))
                (call $is (local.get 2) (i32.const 2)) (call $is (local.get 3) (i32.const 4)) (call $is (local.get 4) (i32.const 1))
                (call $ok (call $get_header_map_value (i32.const 6) @:status@ {OUT}))
                (call $ok (call $get_header_map_value (i32.const 7) @x-tail@ {OUT}))
                (call $is (call $add_header_map_value (i32.const 6) @a@ @b@) (i32.const 2))
                (call $ok (call $get_buffer_bytes (i32.const 4) (i32.const 0) (i32.const 99) {OUT}))
                (call $is (i32.load (i32.const 4)) (i32.const 4))))
            (call $is (call $set_effective_context (i32.const 12345)) (i32.const 2))
            (call $ok (call $set_effective_context (global.get $stream)))
            (if (local.get 2)
                (then (call $ok (call $add_header_map_value (i32.const 0) @x-answer@ @yes@)))
                (else (call $ok (call $add_header_map_value (i32.const 0) @x-answer@ @none@))))
            (call $ok (call $continue_stream (i32.const 0))))"#,
        on_headers(
            "request",
            &format!("(global.set $stream (local.get $context)) (call $ok {})", call("@authz@", HEAD, 500)),
            1
        )
    ))
}

#[test]
fn c67_c68_c69_an_answer_lets_the_request_go() {
    let bench = Bench::new();
    let plugin = [with_upstream(&bench, &asks())];
    let canned = Rc::new(Canned::default());
    let answer = Response::builder().header("x-a", "b").body(body(b"body", &[("x-tail", "1")])).unwrap();
    canned.answers.borrow_mut().push_back(answer);
    let answers = on_worker(&canned, || async {
        let (first, second) = (chain(&plugin), chain(&plugin));
        let answers = [request(&first.0).await, request(&second.0).await].map(|head| head.headers["x-answer"].clone());
        first.done();
        second.done();
        answers
    });
    assert_eq!(answers, ["yes", "none"], "{:?}", bench.plugins.status());
    assert_eq!(*canned.calls.borrow(), ["authz GET /check", "authz GET /check"]);
}

#[test]
fn c73_c74_ticks_reach_a_paused_stream_and_stop() {
    let bench = Bench::new();
    let plugin = [bench.plugin(&guest(&format!(
        r#"(global $stream (mut i32) (i32.const 0)) (global $ticks (mut i32) (i32.const 0)) {}
        (func (export "proxy_on_tick") (param i32)
            (global.set $ticks (i32.add (global.get $ticks) (i32.const 1)))
            (if (i32.lt_u (global.get $ticks) (i32.const 3)) (then (return)))
            ;; A fourth one would not find the stream.
            (call $ok (call $set_tick_period_milliseconds (i32.const 0)))
            (call $ok (call $set_effective_context (global.get $stream)))
            (call $ok (call $add_header_map_value (i32.const 0) @x-ticked@ @1@))
            (call $ok (call $continue_stream (i32.const 0))))"#,
        on_headers(
            "request",
            "(global.set $stream (local.get $context)) (call $ok (call $set_tick_period_milliseconds (i32.const 1)))",
            1
        )
    )))];
    on_worker(&Rc::default(), || async {
        let stream = chain(&plugin);
        assert_eq!(request(&stream.0).await.headers["x-ticked"], "1");
        stream.done();
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    });
    assert_eq!(bench.plugins.status()[0].failures, 0, "{:?}", bench.plugins.status());
}

#[test]
fn c77_a_queue_tells_after_the_callback() {
    let bench = Bench::new();
    let plugin = [bench.plugin(&guest(&format!(
        r#"(global $stream (mut i32) (i32.const 0)) (global $told (mut i32) (i32.const 0)) {}
        (func (export "proxy_on_queue_ready") (param i32 i32)
            (call $ok (call $dequeue_shared_queue (local.get 1) {OUT}))
            (global.set $told (i32.add (global.get $told) (i32.const 1)))
            (if (i32.lt_u (global.get $told) (i32.const 2)) (then (return)))
            (call $ok (call $set_effective_context (global.get $stream)))
            (call $ok (call $add_header_map_value (i32.const 0) @x-told@ @2@))
            (call $ok (call $continue_stream (i32.const 0))))"#,
        on_headers(
            "request",
            "(global.set $stream (local.get $context))
             (call $ok (call $register_shared_queue @q@ (i32.const 8)))
             (call $ok (call $enqueue_shared_queue (i32.load (i32.const 8)) @a@))
             (call $ok (call $enqueue_shared_queue (i32.load (i32.const 8)) @b@))
             (call $is (global.get $told) (i32.const 0))",
            1
        )
    )))];
    on_worker(&Rc::default(), || async {
        let stream = chain(&plugin);
        assert_eq!(request(&stream.0).await.headers["x-told"], "2");
        stream.done();
    });
}

#[test]
fn c77_who_fails_at_a_queue_hears_of_it_again() {
    let bench = Bench::new();
    // Each instance leaves itself a word as it starts.
    let plugin = bench.plugin(&guest(
        r#"(func (export "proxy_on_configure") (param i32 i32) (result i32)
            (call $ok (call $register_shared_queue @q@ (i32.const 8)))
            (call $ok (call $enqueue_shared_queue (i32.load (i32.const 8)) @a@))
            (i32.const 1))
        (func (export "proxy_on_queue_ready") (param i32 i32) unreachable)"#,
    ));
    on_worker(&Rc::default(), || async {
        warm(&plugin);
        let again = async {
            while bench.plugins.status()[0].failures < 2 {
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(10), again).await.unwrap();
    });
}

#[test]
fn a_plugin_that_refuses_its_configuration_leaves_nothing_in_a_shared_vm() {
    let bench = Bench::new();
    let ticking = guest(&format!(
        r#"(global $roots (mut i32) (i32.const 0)) {}
        (func (export "proxy_on_configure") (param i32 i32) (result i32)
            (call $ok (call $set_tick_period_milliseconds (i32.const 1)))
            (global.set $roots (i32.add (global.get $roots) (i32.const 1)))
            ;; Alone it would be accepted.
            (i32.eq (global.get $roots) (i32.const 1)))
        (func (export "proxy_on_tick") (param i32) (call $is (local.get 0) (i32.const 1)))"#,
        // Behind two roots: the instance is still the first one.
        on_headers("request", "(call $is (local.get $context) (i32.const 3))", 0)
    ));
    let plugin = |configuration: &'static [u8]| {
        bench.with(&ticking, |spec| {
            spec.vm_id = "shared".into();
            spec.configuration = configuration.to_vec().into();
        })
    };
    let (first, second) = (plugin(b"1"), plugin(b"2"));
    on_worker(&Rc::default(), || async {
        warm(&first);
        warm(&second);
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        let outcome = exchange(&[first]).0;
        assert!(passed(&outcome), "{outcome:?}");
    });
}

#[test]
fn messages_that_wait_are_bounded_by_number_too() {
    let bench = Bench::new();
    let body = format!(
        "(call $ok (call $grpc_stream @authz@ @s.S@ @Watch@ {NONE} (i32.const 8)))
         (block $full (loop $more
            (br_if $full (call $grpc_send (i32.load (i32.const 8)) {NONE} (i32.const 0)))
            (global.set $sent (i32.add (global.get $sent) (i32.const 1)))
            (br $more)))
         ;; Five bytes of each, and 64 beside them.
         (if (i32.gt_u (global.get $sent) (i32.const 15196)) (then unreachable))
         (if (i32.lt_u (global.get $sent) (i32.const 15000)) (then unreachable))"
    );
    let guest = guest(&format!("(global $sent (mut i32) (i32.const 0)) {}", on_headers("request", &body, 0)));
    let upstream = outrigger_proto::mesh::filter::Upstream { namespace: "demo".into(), name: "authz".into(), port: 0 };
    let plugin = bench.with(&guest, |spec| {
        spec.upstreams = [("authz".to_owned(), upstream)].into();
        spec.memory = 1 << 20;
    });
    let outcome = exchange(&[plugin]).0;
    assert!(passed(&outcome), "{:?}", bench.plugins.status());
}

#[test]
fn grpc_calls_and_streams_come_back() {
    let bench = Bench::new();
    let plugin = [with_upstream(
        &bench,
        &guest(&format!(
            r#"(global $stream (mut i32) (i32.const 0)) (global $seen (mut i32) (i32.const 0)) {}
            (func $saw (param i32) (global.set $seen (i32.add (i32.mul (global.get $seen) (i32.const 10)) (local.get 0))))
            (func (export "proxy_on_grpc_receive_initial_metadata") (param i32 i32 i32)
                (call $ok (call $get_header_map_value (i32.const 4) @x-a@ {OUT})) (call $saw (i32.const 1)))
            (func (export "proxy_on_grpc_receive") (param i32 i32 i32)
                (call $is (local.get 2) (i32.const 2))
                (call $ok (call $get_buffer_bytes (i32.const 5) (i32.const 0) (i32.const 9) {OUT}))
                (call $saw (i32.const 2)))
            (func (export "proxy_on_grpc_receive_trailing_metadata") (param i32 i32 i32)
                (call $ok (call $get_header_map_value (i32.const 5) @grpc-status@ {OUT})) (call $saw (i32.const 3)))
            (func (export "proxy_on_grpc_close") (param i32 i32 i32)
                (call $is (local.get 2) (i32.const 7))
                (call $ok (call $get_status (i32.const 8) {OUT}))
                (call $is (i32.load (i32.const 8)) (i32.const 7)) (call $is (i32.load (i32.const 4)) (i32.const 4))
                (call $saw (i32.const 4))
                ;; The call's one message, then the stream's four callbacks.
                (call $is (global.get $seen) (i32.const 21234))
                (call $ok (call $set_effective_context (global.get $stream)))
                (call $ok (call $add_header_map_value (i32.const 0) @x-closed@ @7@))
                (call $ok (call $continue_stream (i32.const 0))))"#,
            on_headers(
                "request",
                "(global.set $stream (local.get $context))
                 (call $ok (call $grpc_call @authz@ @s.S@ @Check@ (i32.const 0) (i32.const 0) @hi@ (i32.const 500) (i32.const 8)))
                 (call $is (call $grpc_send (i32.load (i32.const 8)) @x@ (i32.const 0)) (i32.const 2))
                 (call $ok (call $grpc_stream @authz@ @s.S@ @Watch@ (i32.const 0) (i32.const 0) (i32.const 8)))
                 (call $ok (call $grpc_send (i32.load (i32.const 8)) @x@ (i32.const 0)))
                 (call $ok (call $grpc_close (i32.load (i32.const 8))))
                 (call $is (call $grpc_send (i32.load (i32.const 8)) @x@ (i32.const 0)) (i32.const 10))",
                1
            )
        )),
    )];
    let canned = Rc::new(Canned::default());
    canned.answers.borrow_mut().extend([
        Response::new(body(b"\0\0\0\0\x02ok", &[("grpc-status", "0")])),
        Response::builder()
            .header("x-a", "b")
            .body(body(b"\0\0\0\0\x02ok", &[("grpc-status", "7"), ("grpc-message", "no%21!")]))
            .unwrap(),
    ]);
    on_worker(&canned, || async {
        let stream = chain(&plugin);
        assert_eq!(request(&stream.0).await.headers["x-closed"], "7");
        stream.done();
    });
    assert_eq!(*canned.calls.borrow(), ["authz POST /s.S/Check", "authz POST /s.S/Watch"]);
}
