//! What a case says. One model for `tests/proxy-wasm/cases.toml` (conformance) and for the YAML of filters' authors.

use std::collections::BTreeMap;

use outrigger_core::reason::Reason;
use serde::Deserialize;

use super::decode;

/// A file of cases.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Suite {
    /// The chain of every case that has none of its own
    #[serde(default)]
    pub filters: Vec<FilterSpec>,
    /// In order
    #[serde(rename = "cases", alias = "case")]
    pub cases: Vec<Case>,
}

impl Suite {
    /// Gives each case what it leaves to the file.
    pub fn settle(&mut self) {
        for case in self.cases.iter_mut().filter(|case| case.filters.is_empty()) {
            case.filters.clone_from(&self.filters);
        }
    }
}

/// One or more filters, and exchanges through them. All steps of a case meet the same instances, one after the other.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Case {
    /// Number in the contract; 0 for cases outside it
    #[serde(default)]
    pub number: u32,
    /// What is shown
    pub name: String,
    /// The chain, in the order in which a request meets it
    #[serde(default)]
    pub filters: Vec<FilterSpec>,
    /// Start-up: unless it says otherwise, the filters are accepted
    #[serde(default)]
    pub start: Start,
    /// In order
    #[serde(default, rename = "steps", alias = "step")]
    pub steps: Vec<Step>,
    /// What filters read from their clocks, RFC 3339: it stands still but for `wait-ms`. Real time if absent. In process only
    pub clock: Option<String>,
    /// Workers of a proxy that it runs through; 0: one
    #[serde(default)]
    pub workers: usize,
    /// True: it shows what host calls do, so a host whose calls do nothing must fail it
    #[serde(default)]
    pub host_calls: bool,
    /// Why it cannot be shown through a whole proxy
    pub in_process_only: Option<String>,
    /// Why it needs a whole proxy, or several workers: what runs it in process says so instead
    pub proxy_only: Option<String>,
    /// What Envoy does otherwise
    pub envoy: Option<Peer>,
}

impl Case {
    /// Something happens after the start, and nothing keeps it from going through a whole proxy, between a client and an application of HTTP.
    pub fn is_traffic(&self) -> bool {
        let inside = |step: &Step| step.tcp.is_some() || !step.expect.properties.is_empty();
        let through = self.in_process_only.is_none() && self.clock.is_none() && !self.steps.iter().any(inside);
        through && !self.steps.is_empty()
    }
}

/// A filter of the chain.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct FilterSpec {
    /// File of the module
    pub module: String,
    /// Unique in the chain; `filter`, `filter2`, … if absent
    #[serde(default)]
    pub name: String,
    /// Given to `on_configure`: a text, or what becomes JSON
    #[serde(default, deserialize_with = "decode::text_or_json")]
    pub configuration: String,
    /// Given to `on_vm_start`, likewise
    #[serde(default, deserialize_with = "decode::text_or_json")]
    pub vm_configuration: String,
    /// Filters of one `vm_id` and one module share an instance
    #[serde(default)]
    pub vm_id: String,
    /// Selects the root context
    #[serde(default)]
    pub root_id: String,
    /// Environment variables
    #[serde(default)]
    pub environment: BTreeMap<String, String>,
    /// True: requests go on without the filter when it fails
    #[serde(default)]
    pub fail_open: bool,
    /// Most linear memory, bytes; 0: the default
    #[serde(default)]
    pub memory: u64,
    /// Most CPU time of a callback, milliseconds; 0: a second, far above what a guest needs on a busy machine
    #[serde(default)]
    pub call_time_ms: u64,
    /// Most bytes of a body that are held for filters; 0: the default
    #[serde(default)]
    pub body_limit: u64,
    /// Services that the filter may call
    #[serde(default)]
    pub upstreams: Vec<String>,
}

impl FilterSpec {
    /// Its name, or the one that it has for its place in the chain.
    pub fn name_at(&self, index: usize) -> String {
        match (self.name.as_str(), index) {
            ("", 0) => "filter".into(),
            ("", _) => format!("filter{}", index + 1),
            (name, _) => name.into(),
        }
    }
}

/// What happens when the filters are loaded.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Start {
    /// The configuration is refused, and the message contains all of these
    #[serde(default)]
    pub refused: Vec<String>,
    /// Lines of the filters before the first exchange, as `level text`. Hosts may start more than one instance: each says them
    #[serde(default)]
    pub log: Vec<String>,
}

/// One exchange, or what happens on a TCP connection, or time that passes, or a change of the configuration.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Step {
    /// Said when it fails
    #[serde(default)]
    pub name: String,
    /// Replaces the chain before anything else of this step
    pub update: Option<Vec<FilterSpec>>,
    /// Replaces the chain while the application holds the step's request
    pub update_during: Option<Vec<FilterSpec>>,
    /// The step's exchange
    pub request: Option<Request>,
    /// What happens on the case's TCP connection, which goes on from step to step. A case has requests or TCP connections, not both
    pub tcp: Option<Tcp>,
    /// What the application answers
    #[serde(default)]
    pub upstream: Reply,
    /// What called services answer, by name; others are unknown to the mesh
    #[serde(default)]
    pub services: BTreeMap<String, Service>,
    /// Time that passes after that, milliseconds
    #[serde(default)]
    pub wait_ms: u64,
    /// What must come of it
    #[serde(default)]
    pub expect: Expect,
}

/// What happens on a TCP connection, in the order of these fields; another order takes several steps.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct Tcp {
    /// A client connects; the first one does so by itself. A connection that is still there before the next one, or after the last step,
    /// is cut as by a proxy that drains: what filters say then is of the step before, or the last one
    pub connect: bool,
    /// What the client sends, one chunk after the other
    #[serde(deserialize_with = "decode::chunks")]
    pub client: Vec<Chunk>,
    /// What the upstream sends, once the filters have let the connection in
    #[serde(deserialize_with = "decode::chunks")]
    pub upstream: Vec<Chunk>,
    /// The client has nothing more to send
    pub client_end: bool,
    /// The upstream has nothing more to send
    pub upstream_end: bool,
}

/// Bytes: a text, or one repeated (`{repeat: x, times: 1000}`), or any (`{hex: 16 03 01}`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Chunk {
    /// As written
    Text(String),
    /// Which need not be text
    Bytes(Vec<u8>),
    /// The same text again and again
    Repeat {
        /// The text
        repeat: String,
        /// How often
        times: usize,
    },
}

impl Chunk {
    /// The bytes.
    pub fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Text(text) => text.clone().into_bytes(),
            Self::Bytes(bytes) => bytes.clone(),
            Self::Repeat { repeat, times } => repeat.repeat(*times).into_bytes(),
        }
    }
}

impl Default for Chunk {
    fn default() -> Self {
        Self::Text(String::new())
    }
}

/// What the client sends.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Request {
    /// Method
    pub method: String,
    /// Path and query
    pub path: String,
    /// `Host`
    pub authority: String,
    /// `name: value`, in order; or a mapping
    #[serde(deserialize_with = "decode::fields")]
    pub headers: Vec<String>,
    /// One chunk each; sent with `content-length` where the headers have it, else chunked
    #[serde(deserialize_with = "decode::chunks")]
    pub body: Vec<Chunk>,
    /// `name: value`, after the body
    #[serde(deserialize_with = "decode::fields")]
    pub trailers: Vec<String>,
    /// The client goes away when it has sent its request
    pub disconnect: bool,
    /// How often it is sent, several at once where there is a network; what is expected of the response is of the last
    pub times: usize,
}

impl Default for Request {
    fn default() -> Self {
        Self {
            method: "GET".into(),
            path: "/".into(),
            authority: "reviews".into(),
            headers: Vec::new(),
            body: Vec::new(),
            trailers: Vec::new(),
            disconnect: false,
            times: 1,
        }
    }
}

/// What a server answers.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Reply {
    /// HTTP status
    pub status: u16,
    /// `name: value`, in order; or a mapping
    #[serde(deserialize_with = "decode::fields")]
    pub headers: Vec<String>,
    /// One chunk each; sent with `content-length` where the headers have it, else chunked
    #[serde(deserialize_with = "decode::chunks")]
    pub body: Vec<Chunk>,
    /// `name: value`, after the body
    #[serde(deserialize_with = "decode::fields")]
    pub trailers: Vec<String>,
    /// It never answers
    pub hang: bool,
}

impl Default for Reply {
    fn default() -> Self {
        let headers = vec!["content-length: 2".into()];
        Self { status: 200, headers, body: vec![Chunk::Text("ok".into())], trailers: Vec::new(), hang: false }
    }
}

/// A service that filters call.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub enum Service {
    /// It answers
    Reply(Reply),
    /// Nobody listens
    Refused,
    /// It resets each connection before answering
    Reset,
}

/// What must come of a step. What is absent is not looked at, except [`Expect::log`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct Expect {
    /// The step's update is refused, and the message contains all of these; what was there before goes on serving
    pub refused: Vec<String>,
    /// To the client
    pub response: Option<ExpectResponse>,
    /// At the application
    pub upstream: Option<ExpectUpstream>,
    /// Of the TCP connection
    pub tcp: Option<ExpectTcp>,
    /// At called services, in order
    pub called: Option<Vec<ExpectRequest>>,
    /// Lines of the filters, as `level text`; all of them, in order. `…` stands for any text
    pub log: Vec<String>,
    /// The log may have more lines after these
    pub more_log: bool,
    /// The most lines it may have
    pub most_log: Option<usize>,
    /// Values of metrics that the filters defined, by the name they gave; a histogram's is its count
    pub metrics: BTreeMap<String, i64>,
    /// Properties that the filters set for the exchange or connection, by name (its parts joined by dots). In process only
    pub properties: BTreeMap<String, String>,
}

/// At the application: whether a request came (`true`, `false`), and which.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExpectUpstream {
    /// `false`: none came
    Came(bool),
    /// This one
    Request(ExpectRequest),
}

/// What is seen of a response. `name: value` headers (or a mapping): each name named must have just these values, in order; a name alone
/// (in a mapping: without a value) must be absent.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ExpectResponse {
    /// HTTP status
    pub status: Option<u16>,
    /// See above
    #[serde(deserialize_with = "decode::fields")]
    pub headers: Vec<String>,
    /// All of it
    pub body: Option<Chunk>,
    /// See above
    #[serde(deserialize_with = "decode::fields")]
    pub trailers: Vec<String>,
    /// The connection or stream ended before the response was complete
    pub reset: bool,
}

/// What is seen of a request, as in [`ExpectResponse`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ExpectRequest {
    /// Which server received it: `reviews`, or another that routes lead to. Where there are no routes, it is not looked at
    pub server: Option<String>,
    /// Method
    pub method: Option<String>,
    /// Path and query
    pub path: Option<String>,
    /// `Host`
    pub authority: Option<String>,
    /// See [`ExpectResponse`]
    #[serde(deserialize_with = "decode::fields")]
    pub headers: Vec<String>,
    /// All of it
    pub body: Option<Chunk>,
    /// See [`ExpectResponse`]
    #[serde(deserialize_with = "decode::fields")]
    pub trailers: Vec<String>,
}

/// What is seen of a TCP connection.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct ExpectTcp {
    /// How far it has come by the end of the step
    pub state: Option<TcpState>,
    /// All that came to the upstream in this step
    pub upstream: Option<Chunk>,
    /// All that came to the client in this step
    pub client: Option<Chunk>,
    /// Whether the upstream has been told that the client has nothing more to send
    pub upstream_end: Option<bool>,
    /// Whether the client has been told that the upstream has nothing more to send
    pub client_end: Option<bool>,
}

/// How far a TCP connection has come. The reasons are those of the metrics and the access log.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TcpState {
    /// Not let in yet
    #[default]
    Waiting,
    /// Let in, and not over
    Open,
    /// Both sides have sent all that they had
    Ended,
    /// A filter closed it
    FilterResponse,
    /// A filter failed
    FilterFailed,
    /// A filter held more than it may of what the client sent
    FilterRequestTooLarge,
    /// A filter held more than it may of what the upstream sent
    FilterResponseTooLarge,
}

impl TcpState {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Open => "open",
            Self::Ended => "ended",
            Self::FilterResponse => Reason::FilterResponse.code(),
            Self::FilterFailed => Reason::FilterFailed.code(),
            Self::FilterRequestTooLarge => Reason::FilterRequestTooLarge.code(),
            Self::FilterResponseTooLarge => Reason::FilterResponseTooLarge.code(),
        }
    }

    /// What a filter's end of it makes of it.
    pub(super) fn of(reason: Reason) -> Self {
        match reason {
            Reason::FilterFailed => Self::FilterFailed,
            Reason::FilterRequestTooLarge => Self::FilterRequestTooLarge,
            Reason::FilterResponseTooLarge => Self::FilterResponseTooLarge,
            _ => Self::FilterResponse,
        }
    }
}

impl std::fmt::Display for TcpState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// How another host differs.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Peer {
    /// Why ours is another result
    pub reason: String,
    /// It is not run there, for the reason above: it would hang or end the host
    pub skip: bool,
    /// The differences, each `what: expected → observed`, exactly as the runner prints them
    pub differs: Vec<String>,
}
