//! Builds guests and runs exchanges through them.

use std::sync::Arc;

use bytes::Bytes;
use http::{Response, request, response};
use outrigger_proto::mesh;
use sha2::{Digest, Sha256};

use super::super::super::{
    Chain, Compiler, Failed, FilterError, Flow, Frame, Plugin, Plugins, Settings, StaticConnection, Stop, StreamInfo,
};

/// A module of ABI 0.2.1 with a bump allocator that has these further imports and functions. Data begins at 1024; the
/// allocator gives out addresses from 65536 on; `$ok` traps unless a status is 0, `$is` unless two numbers are equal.
pub(super) fn wat(imports: &str, body: &str) -> String {
    custom("proxy_abi_version_0_2_1", imports, body)
}

/// The same with another ABI marker.
pub(super) fn custom(marker: &str, imports: &str, body: &str) -> String {
    format!(
        r#"(module
        {imports}
        (memory (export "memory") 4)
        (global $top (mut i32) (i32.const 65536))
        (func (export "{marker}"))
        (func (export "proxy_on_memory_allocate") (param i32) (result i32)
            (global.get $top)
            (global.set $top (i32.add (global.get $top) (local.get 0))))
        (func $ok (param i32) (if (local.get 0) (then unreachable)))
        (func $is (param i32 i32) (if (i32.ne (local.get 0) (local.get 1)) (then unreachable)))
        {body})"#
    )
}

/// Imports of functions that all take i32 and return i32: name and number of parameters. `$name` without `proxy_`.
pub(super) fn import(functions: &[(&str, usize)]) -> String {
    let import = |(name, params): &(&str, usize)| {
        let params = "i32 ".repeat(*params);
        format!("(import \"env\" \"proxy_{name}\" (func ${name} (param {params}) (result i32)))\n")
    };
    functions.iter().map(import).collect()
}

/// `(i32.const a) (i32.const b) …`
pub(super) fn consts(numbers: &[u32]) -> String {
    numbers.iter().map(|n| format!("(i32.const {n}) ")).collect()
}

/// A guest with these functions, in whose code `@text@` becomes the address and the length of that text, which is in its memory.
pub(super) fn texts(imports: &str, body: &str) -> String {
    let (mut data, mut code) = (String::new(), String::new());
    let mut at = 1024;
    for (index, part) in body.split('@').enumerate() {
        if index % 2 == 0 {
            code.push_str(part);
            continue;
        }
        let escapes = part.matches('\\').count();
        data.push_str(&format!("(data (i32.const {at}) \"{part}\")\n"));
        // Each `\\xx` is one byte.
        code.push_str(&consts(&[at, u32::try_from(part.len() - 2 * escapes).unwrap()]));
        at += 128;
    }
    wat(imports, &format!("{data}{code}"))
}

/// A header callback, `request` or `response`, that does this and returns this.
pub(super) fn on_headers(side: &str, body: &str, result: u32) -> String {
    format!(
        r#"(func (export "proxy_on_{side}_headers") (param $context i32) (param $count i32) (param $end i32) (result i32)
        {body} (i32.const {result}))"#
    )
}

/// Plugins over a cache of its own.
pub(super) struct Bench {
    pub(super) plugins: Plugins,
    _cache: tempfile::TempDir,
}

impl Bench {
    pub(super) fn new() -> Self {
        let cache = tempfile::tempdir().unwrap();
        let settings = Settings { compiler: Compiler::InProcess, cache: cache.path().join("filters") };
        Self { plugins: Plugins::new(settings).unwrap(), _cache: cache }
    }

    /// Prepares a guest with changes to its specification.
    pub(super) fn try_with(
        &self,
        wat: &str,
        change: impl FnOnce(&mut mesh::Filter),
    ) -> Result<Arc<Plugin>, FilterError> {
        let module = wat::parse_str(wat).unwrap();
        let mut spec = mesh::Filter {
            namespace: "demo".into(),
            name: "guest".into(),
            sha256: hex::encode(Sha256::digest(&module)),
            root_id: "root".into(),
            // Far above what a test's guest needs on a busy machine.
            call_time_ms: 1000,
            ..Default::default()
        };
        change(&mut spec);
        tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap()
            .block_on(self.plugins.prepare(&spec, Some(Bytes::from(module))))
    }

    pub(super) fn with(&self, wat: &str, change: impl FnOnce(&mut mesh::Filter)) -> Arc<Plugin> {
        self.try_with(wat, change).unwrap()
    }

    pub(super) fn plugin(&self, wat: &str) -> Arc<Plugin> {
        self.with(wat, |_| {})
    }

    /// The message with which a guest is refused.
    pub(super) fn refusal(&self, wat: &str) -> String {
        self.try_with(wat, |_| {}).unwrap_err().to_string()
    }
}

pub(super) fn head() -> request::Parts {
    let request = http::Request::builder()
        .uri("/path?q=1")
        .header("host", "reviews.demo")
        .header("x-dup", "1")
        .header("x-dup", "2")
        .header("x-foo", "bar");
    request.body(()).unwrap().into_parts().0
}

pub(super) fn reply() -> response::Parts {
    Response::builder().header("x-up", "stream").body(()).unwrap().into_parts().0
}

/// What becomes of an exchange after a head ran through its filters.
#[derive(Debug)]
pub(super) enum Outcome {
    Continue,
    Paused,
    Respond(Response<Bytes>),
    Failed(Failed),
    Reset,
}

/// A chain that is driven without sockets.
pub(super) struct Driven(pub(super) Chain);

impl Driven {
    pub(super) fn request_headers(&mut self, head: &mut request::Parts, end: bool) -> Outcome {
        let empty = http::Request::new(()).into_parts().0;
        self.0.request_headers(std::mem::replace(head, empty), end);
        self.outcome(|chain| chain.take_request().map(|(passed, _)| *head = passed.into()))
    }

    pub(super) fn response_headers(&mut self, head: &mut response::Parts, end: bool) -> Outcome {
        let empty = Response::new(()).into_parts().0;
        self.0.response_headers(std::mem::replace(head, empty), end);
        self.outcome(|chain| chain.take_response().map(|(passed, _)| *head = passed))
    }

    fn outcome(&self, take: impl FnOnce(&Chain) -> Option<()>) -> Outcome {
        match self.0.stop() {
            None if take(&self.0).is_some() => Outcome::Continue,
            None => Outcome::Paused,
            Some(Stop::Local) => {
                let (head, _) = self.0.take_response().unwrap();
                let body = match self.0.next(Flow::Response) {
                    Some(Frame::Data(bytes)) => bytes,
                    _ => Bytes::new(),
                };
                Outcome::Respond(Response::from_parts(head, body))
            }
            Some(Stop::Failed(failed)) => Outcome::Failed(*failed),
            Some(Stop::TooLarge(_) | Stop::Reset) => Outcome::Reset,
        }
    }

    pub(super) fn done(self) {
        self.0.done();
    }
}

pub(super) fn chain(plugins: &[Arc<Plugin>]) -> Driven {
    let connection = StaticConnection {
        source: Some("127.0.0.1:51314".parse().unwrap()),
        peer_identity: Some("spiffe://cluster.local/ns/demo/sa/web".into()),
        id: 7,
        ..StaticConnection::default()
    };
    let mut info = StreamInfo::new(std::rc::Rc::new(connection), std::time::Instant::now());
    info.service = Some("demo/reviews".into());
    Driven(Chain::new(plugins, info))
}

/// A whole exchange: what became of the request, and the heads afterwards.
pub(super) fn exchange(plugins: &[Arc<Plugin>]) -> (Outcome, request::Parts, response::Parts) {
    let (mut chain, mut request, mut response) = (chain(plugins), head(), reply());
    let mut outcome = chain.request_headers(&mut request, true);
    if matches!(outcome, Outcome::Continue) {
        outcome = chain.response_headers(&mut response, false);
    }
    chain.done();
    (outcome, request, response)
}

pub(super) fn passed(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Continue)
}

/// The reason of a failure.
pub(super) fn reason(outcome: Outcome) -> String {
    match outcome {
        Outcome::Failed(Failed { filter, reason }) => {
            assert_eq!(filter, "demo/guest");
            reason
        }
        other => panic!("{other:?} is no failure"),
    }
}
