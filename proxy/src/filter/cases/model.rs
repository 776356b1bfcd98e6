//! What a case says. One model for `tests/proxy-wasm/cases.toml` (conformance) and for the YAML of filters' authors.

use std::collections::BTreeMap;

use serde::Deserialize;

/// A file of cases.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Suite {
    /// What every case has that does not say otherwise: filters
    #[serde(default)]
    pub filters: Vec<FilterSpec>,
    /// In order
    #[serde(rename = "case", alias = "cases")]
    pub cases: Vec<Case>,
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
    #[serde(default, rename = "step", alias = "steps")]
    pub steps: Vec<Step>,
    /// True: it shows what host calls do, so a host whose calls do nothing must fail it
    #[serde(default)]
    pub host_calls: bool,
    /// Why it cannot be shown through a whole proxy
    pub in_process_only: Option<String>,
    /// Why it needs a whole proxy, or several workers: what runs it in process says so instead
    pub proxy_only: Option<String>,
    /// What this host still lacks for it
    pub missing: Option<String>,
    /// What Envoy does otherwise
    pub envoy: Option<Peer>,
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
    /// Given to `on_configure`
    #[serde(default)]
    pub configuration: String,
    /// Given to `on_vm_start`
    #[serde(default)]
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

/// One exchange, or time that passes, or a change of the configuration.
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
    /// What the application answers
    #[serde(default)]
    pub upstream: Reply,
    /// What called services answer, by name; others are unknown to the mesh
    #[serde(default)]
    pub services: BTreeMap<String, Service>,
    /// Time that passes after the exchange, milliseconds
    #[serde(default)]
    pub wait_ms: u64,
    /// What must come of it
    #[serde(default)]
    pub expect: Expect,
}

/// Bytes: a text, or one repeated.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum Chunk {
    /// As written
    Text(String),
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
    pub fn text(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Repeat { repeat, times } => repeat.repeat(*times),
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
    /// `name: value`, in order
    pub headers: Vec<String>,
    /// One chunk each; sent with `content-length` where the headers have it, else chunked
    pub body: Vec<Chunk>,
    /// `name: value`, after the body
    pub trailers: Vec<String>,
    /// The client goes away when it has sent its request
    pub disconnect: bool,
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
        }
    }
}

/// What a server answers.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Reply {
    /// HTTP status
    pub status: u16,
    /// `name: value`, in order
    pub headers: Vec<String>,
    /// One chunk each; sent with `content-length` where the headers have it, else chunked
    pub body: Vec<Chunk>,
    /// `name: value`, after the body
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
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct Expect {
    /// The step's update is refused, and the message contains all of these; what was there before goes on serving
    pub refused: Vec<String>,
    /// To the client
    pub response: Option<ExpectResponse>,
    /// At the application
    pub upstream: Option<ExpectUpstream>,
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
}

/// At the application: whether a request came, and which.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum ExpectUpstream {
    /// `false`: none came
    Came(bool),
    /// This one
    Request(ExpectRequest),
}

/// What is seen of a response. `name: value` headers: each name named must have just these values, in order; a name alone must
/// be absent.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ExpectResponse {
    /// HTTP status
    pub status: Option<u16>,
    /// See above
    pub headers: Vec<String>,
    /// All of it
    pub body: Option<Chunk>,
    /// See above
    pub trailers: Vec<String>,
    /// The connection or stream ended before the response was complete
    pub reset: bool,
}

/// What is seen of a request, as in [`ExpectResponse`].
#[derive(Debug, Clone, Default, Deserialize)]
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
    pub headers: Vec<String>,
    /// All of it
    pub body: Option<Chunk>,
    /// See [`ExpectResponse`]
    pub trailers: Vec<String>,
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
