//! What was seen of a case, and how it differs from what the case expects.

use std::collections::BTreeMap;

use super::model::{Chunk, Expect, ExpectRequest, ExpectResponse, ExpectTcp, ExpectUpstream, Start, TcpState};

/// Name in lower case and value, in order.
pub type Headers = Vec<(String, String)>;

/// A response as the client received it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SeenResponse {
    /// HTTP status; 0: none came
    pub status: u16,
    /// Headers
    pub headers: Headers,
    /// Without its framing
    pub body: Vec<u8>,
    /// Trailers
    pub trailers: Headers,
    /// It ended before it was complete
    pub reset: bool,
}

/// A request as a server received it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SeenRequest {
    /// Which server
    pub server: Option<String>,
    /// Method
    pub method: String,
    /// Path and query
    pub path: String,
    /// `Host`
    pub authority: String,
    /// Headers
    pub headers: Headers,
    /// Without its framing
    pub body: Vec<u8>,
    /// Trailers
    pub trailers: Headers,
}

/// A TCP connection at the end of a step.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SeenTcp {
    /// How far it has come
    pub state: TcpState,
    /// What came to the upstream in the step
    pub upstream: Vec<u8>,
    /// What came to the client in the step
    pub client: Vec<u8>,
    /// The upstream has been told that nothing more comes
    pub upstream_end: bool,
    /// The client has been told that nothing more comes
    pub client_end: bool,
}

/// What was seen of one step.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    /// What the client got, if the step has a request
    pub response: Option<SeenResponse>,
    /// What the application got
    pub upstream: Vec<SeenRequest>,
    /// The TCP connection, if there is one. In process only
    pub tcp: Option<SeenTcp>,
    /// What called services got
    pub called: Vec<SeenRequest>,
    /// Lines of the filters, `level text`
    pub log: Vec<String>,
    /// By the name the filters gave
    pub metrics: BTreeMap<String, i64>,
    /// Which the filters set for the exchange or connection. In process only
    pub properties: BTreeMap<String, String>,
    /// Why the step's update was refused, if it was. In process only
    pub refused: Option<String>,
    /// What the host itself had to say: failures of instances and their reasons. In process only
    pub notes: Vec<String>,
}

/// Something that is not as expected.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Difference {
    /// Of which step; empty: of the start
    pub step: String,
    /// What of it, as `status` or `log 2`
    pub what: String,
    /// Quoted, and cut where it is long
    pub expected: String,
    /// Likewise
    pub observed: String,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { step, what, expected, observed } = self;
        if !step.is_empty() {
            write!(f, "{step}: ")?;
        }
        write!(f, "{what}: {expected} → {observed}")
    }
}

impl Difference {
    /// A difference of no step yet.
    pub fn new(what: impl Into<String>, expected: impl Into<String>, observed: impl Into<String>) -> Self {
        Self { step: String::new(), what: what.into(), expected: expected.into(), observed: observed.into() }
    }

    /// The same, of a step.
    #[must_use]
    pub fn of(mut self, step: &str) -> Self {
        step.clone_into(&mut self.step);
        self
    }
}

/// The differences; each line is `step: what: expected → observed`.
pub type Differences = Vec<Difference>;

/// Most bytes of a text that are shown.
const MOST: usize = 200;

fn quote(text: &str) -> String {
    quote_from(text, 0)
}

/// The text from about there on.
fn quote_from(text: &str, from: usize) -> String {
    if text.len() <= MOST {
        return format!("{text:?}");
    }
    let boundary = |at: usize| (0..=at.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or_default();
    let (from, to) = (boundary(from), boundary(from.saturating_add(MOST)));
    let before = if from > 0 { "…" } else { "" };
    let after = if to < text.len() { "…" } else { "" };
    format!("{before}{:?}{after} ({} bytes)", text.get(from..to).unwrap_or_default(), text.len())
}

/// Bytes from about there on. `text`: they are shown as one; else as those of a byte string.
fn quote_bytes(bytes: &[u8], from: usize, text: bool) -> String {
    if text {
        return quote_from(&text_of(bytes), from);
    }
    let from = if bytes.len() <= MOST { 0 } else { from.min(bytes.len()) };
    let to = bytes.len().min(from + MOST);
    let shown = bytes.get(from..to).unwrap_or_default().escape_ascii();
    let (before, after) = (if from > 0 { "…" } else { "" }, if to < bytes.len() { "…" } else { "" });
    let size = if bytes.len() <= MOST { String::new() } else { format!(" ({} bytes)", bytes.len()) };
    format!("{before}b\"{shown}\"{after}{size}")
}

/// Compares one step.
pub fn compare(expect: &Expect, seen: &Seen) -> Differences {
    let mut out = Differences::new();
    messages(expect, seen, &mut out);
    if let Some(expected) = &expect.tcp {
        match &seen.tcp {
            Some(seen) => out.append(&mut tcp(expected, seen)),
            None => out.push(Difference::new("tcp", "a connection", "none")),
        }
    }
    let seen_log = if expect.more_log { seen.log.get(..expect.log.len()).unwrap_or(&seen.log) } else { &seen.log };
    log(&expect.log, seen_log, &mut out);
    if let Some(most) = expect.most_log.filter(|most| *most < seen.log.len()) {
        out.push(Difference::new("log", format!("at most {most} lines"), "more"));
    }
    for (name, expected) in &expect.metrics {
        let value = seen.metrics.get(name);
        if value != Some(expected) {
            let value = value.map_or("none".into(), i64::to_string);
            out.push(Difference::new(format!("metric {name}"), expected.to_string(), value));
        }
    }
    for (name, expected) in &expect.properties {
        let value = seen.properties.get(name);
        if value != Some(expected) {
            let value = value.map_or("none".into(), |value| quote(value));
            out.push(Difference::new(format!("property {name}"), quote(expected), value));
        }
    }
    out
}

/// Compares what passed between client, application and services.
fn messages(expect: &Expect, seen: &Seen, out: &mut Differences) {
    if let Some(expected) = &expect.response {
        match &seen.response {
            Some(seen) => response(expected, seen, out),
            None => out.push(Difference::new("response", "one", "none")),
        }
    }
    match &expect.upstream {
        None => {}
        Some(ExpectUpstream::Came(came)) if *came == seen.upstream.is_empty() => {
            out.push(Difference::new("upstream", requests(usize::from(*came)), requests(seen.upstream.len())));
        }
        Some(ExpectUpstream::Came(_)) => {}
        Some(ExpectUpstream::Request(expected)) => match seen.upstream.as_slice() {
            [one] => request("upstream", expected, one, out),
            other => out.push(Difference::new("upstream", requests(1), requests(other.len()))),
        },
    }
    if let Some(expected) = &expect.called {
        if expected.len() == seen.called.len() {
            for (expected, seen) in expected.iter().zip(&seen.called) {
                request("called", expected, seen, out);
            }
        } else {
            out.push(Difference::new("called", requests(expected.len()), requests(seen.called.len())));
        }
    }
}

fn requests(count: usize) -> String {
    match count {
        0 => "no request".into(),
        1 => "one request".into(),
        more => format!("{more} requests"),
    }
}

/// Compares a refusal: `None` is none. `words`: the message is this host's own.
pub fn compare_refusal(expected: &[String], refusal: Option<&str>, words: bool, out: &mut Differences) {
    match (expected.is_empty(), refusal) {
        (true, Some(message)) if words => {
            out.push(Difference::new("start", "accepted", format!("refused: {}", quote(message))));
        }
        (true, Some(_)) => out.push(Difference::new("start", "accepted", "refused")),
        (false, None) => out.push(Difference::new("start", "refused", "accepted")),
        (false, Some(message)) if words => {
            for part in expected.iter().filter(|part| !message.contains(part.as_str())) {
                out.push(Difference::new("start", format!("refused with {part:?}"), quote(message)));
            }
        }
        (true, None) | (false, Some(_)) => {}
    }
}

/// Compares the start: `refusal` is the message with which the configuration was refused, `log` the lines before any exchange.
pub fn compare_start(start: &Start, refusal: Option<&str>, lines: &[String], words: bool) -> Differences {
    let mut out = Differences::new();
    compare_refusal(&start.refused, refusal, words, &mut out);
    if refusal.is_some() {
        return out;
    }
    // A throw-away instance and one per worker say the same.
    let mut once: Vec<String> = Vec::new();
    for line in lines {
        if !once.contains(line) {
            once.push(line.clone());
        }
    }
    log(&start.log, &once, &mut out);
    out
}

fn log(expected: &[String], seen: &[String], out: &mut Differences) {
    for index in 0..expected.len().max(seen.len()) {
        let (expected, seen) = (expected.get(index), seen.get(index));
        if !same_line(expected, seen) {
            let text = |line: Option<&String>| line.map_or("nothing".to_owned(), |line| quote(line));
            out.push(Difference::new(format!("log {}", index + 1), text(expected), text(seen)));
        }
    }
}

/// `…` in what is expected stands for any text.
fn same_line(expected: Option<&String>, seen: Option<&String>) -> bool {
    match (expected, seen) {
        (Some(expected), Some(seen)) => match expected.split_once('…') {
            Some((begin, end)) => seen.strip_prefix(begin).is_some_and(|rest| rest.ends_with(end)),
            None => expected == seen,
        },
        (expected, seen) => expected == seen,
    }
}

fn text_of(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn same<T: PartialEq + std::fmt::Display>(what: &str, expected: Option<&T>, seen: &T, out: &mut Differences) {
    if let Some(expected) = expected
        && expected != seen
    {
        out.push(Difference::new(what, expected.to_string(), seen.to_string()));
    }
}

/// What may still come of a TCP connection makes no difference: it is as expected, or other bytes have come.
pub(super) fn is_settled(expected: &ExpectTcp, seen: &SeenTcp) -> bool {
    let other = |expected: Option<&Chunk>, seen| expected.is_some_and(|chunk| !chunk.bytes().starts_with(seen));
    other(expected.upstream.as_ref(), &seen.upstream)
        || other(expected.client.as_ref(), &seen.client)
        || tcp(expected, seen).is_empty()
}

fn tcp(expected: &ExpectTcp, seen: &SeenTcp) -> Differences {
    let mut out = Differences::new();
    same("tcp state", expected.state.as_ref(), &seen.state, &mut out);
    body("tcp upstream", expected.upstream.as_ref(), &seen.upstream, &mut out);
    body("tcp client", expected.client.as_ref(), &seen.client, &mut out);
    same("tcp upstream-end", expected.upstream_end.as_ref(), &seen.upstream_end, &mut out);
    same("tcp client-end", expected.client_end.as_ref(), &seen.client_end, &mut out);
    out
}

fn response(expected: &ExpectResponse, seen: &SeenResponse, out: &mut Differences) {
    if expected.reset != seen.reset {
        let text = |reset| if reset { "reset" } else { "complete" };
        out.push(Difference::new("response", text(expected.reset), text(seen.reset)));
    }
    same("status", expected.status.as_ref(), &seen.status, out);
    headers("response header", &expected.headers, &seen.headers, out);
    body("response body", expected.body.as_ref(), &seen.body, out);
    headers("response trailer", &expected.trailers, &seen.trailers, out);
}

fn request(what: &str, expected: &ExpectRequest, seen: &SeenRequest, out: &mut Differences) {
    if let Some(server) = &seen.server {
        same(&format!("{what} server"), expected.server.as_ref(), server, out);
    }
    same(&format!("{what} method"), expected.method.as_ref(), &seen.method, out);
    same(&format!("{what} path"), expected.path.as_ref(), &seen.path, out);
    same(&format!("{what} authority"), expected.authority.as_ref(), &seen.authority, out);
    // Framing is what a proxy does behind the filters.
    let framing = |line: &&String| ["content-length", "transfer-encoding"].contains(&pair(line).0);
    let wanted: Vec<String> =
        expected.headers.iter().filter(|line| seen.server.is_some() || !framing(line)).cloned().collect();
    headers(&format!("{what} header"), &wanted, &seen.headers, out);
    body(&format!("{what} body"), expected.body.as_ref(), &seen.body, out);
    headers(&format!("{what} trailer"), &expected.trailers, &seen.trailers, out);
}

fn body(what: &str, expected: Option<&Chunk>, seen: &[u8], out: &mut Differences) {
    if let Some(expected) = expected.map(Chunk::bytes)
        && expected != seen
    {
        // Long bodies are shown from a little before they part.
        let parts = expected.iter().zip(seen).take_while(|(a, b)| a == b).count();
        let from = if parts < MOST / 2 { 0 } else { parts - MOST / 4 };
        let text = [expected.as_slice(), seen].iter().all(|bytes| std::str::from_utf8(bytes).is_ok());
        out.push(Difference::new(what, quote_bytes(&expected, from, text), quote_bytes(seen, from, text)));
    }
}

/// Splits `name: value`. A line without a colon (a pseudo header's own aside) is a name that must be absent.
pub fn pair(line: &str) -> (&str, Option<&str>) {
    match line.split_once(':') {
        Some((name, value)) => (name.trim(), Some(value.trim())),
        None => (line.trim(), None),
    }
}

fn headers(what: &str, expected: &[String], seen: &Headers, out: &mut Differences) {
    let mut wanted: Vec<(&str, Vec<&str>)> = Vec::new();
    for (name, value) in expected.iter().map(|line| pair(line)) {
        match wanted.iter_mut().find(|(of, _)| *of == name) {
            Some((_, values)) => values.extend(value),
            None => wanted.push((name, value.into_iter().collect())),
        }
    }
    for (name, values) in wanted {
        let have: Vec<&str> = seen.iter().filter(|(of, _)| of == name).map(|(_, value)| value.as_str()).collect();
        if have != values {
            out.push(Difference::new(format!("{what} {name}"), format!("{values:?}"), format!("{have:?}")));
        }
    }
}
