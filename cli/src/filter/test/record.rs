//! `--record`: what was observed becomes what is expected.

use std::fs;

use anyhow::{Context as _, bail};
use outrigger_core::resource::Located;
use outrigger_proxy::filter::cases::{
    Case, Expect, ExpectRequest, ExpectResponse, ExpectTcp, ExpectUpstream, Headers, Outcome, Seen, SeenRequest,
    SeenResponse, SeenTcp, Step, Suite, compare, compare_start, pair,
};

use super::find::is_yaml;
use super::read::File;
use super::yaml::{self, Node};

/// Whether a step's expectations are to be written: it differs, or has none.
fn is_wanted(step: &Step, seen: &Seen) -> bool {
    let refused = match (&seen.refused, step.expect.refused.as_slice()) {
        (None, []) => false,
        (Some(message), [_, ..]) => step.expect.refused.iter().any(|part| !message.contains(part.as_str())),
        _ => true,
    };
    refused || step.expect == Expect::default() || !compare(&step.expect, seen).is_empty()
}

fn starts_otherwise(case: &Case, outcome: &Outcome) -> bool {
    !compare_start(&case.start, outcome.refused.as_deref(), &outcome.start, true).is_empty()
}

/// How many places of a case would be written.
pub(super) fn places(case: &Case, outcome: &Outcome) -> usize {
    let steps = case.steps.iter().zip(&outcome.steps);
    let wanted = steps.filter(|(step, seen)| is_wanted(step, seen) && !expectation(step, seen).is_empty()).count();
    wanted + usize::from(starts_otherwise(case, outcome))
}

/// Writes what was observed into the file, and returns in how many places.
///
/// # Errors
/// When it cannot be written, or would not say what was observed; the file is as before then.
pub(super) fn write(file: &File, outcomes: &[(usize, Outcome)]) -> anyhow::Result<usize> {
    let mut text = file.text.clone();
    let mut count = 0;
    // From the end, so that lines before stay where they are.
    for (index, outcome) in outcomes.iter().rev() {
        let Some(case) = file.suite.cases.get(*index) else { continue };
        let at = format!("cases[{index}]");
        if starts_otherwise(case, outcome) {
            text = place(file, &text, &at, "start", &start(outcome))?;
            count += 1;
        }
        for (number, (step, seen)) in case.steps.iter().zip(&outcome.steps).enumerate().rev() {
            let node = expectation(step, seen);
            if is_wanted(step, seen) && !node.is_empty() {
                text = place(file, &text, &format!("{at}.steps[{number}]"), "expect", &node)?;
                count += 1;
            }
        }
    }
    if count > 0 {
        verify(file, &text, outcomes)?;
        // A rename, so that the file is never half.
        let new = file.path.with_extension("yaml.new");
        fs::write(&new, text).with_context(|| format!("cannot write {}", new.display()))?;
        fs::rename(&new, &file.path).with_context(|| format!("cannot replace {}", file.path.display()))?;
    }
    Ok(count)
}

fn place(file: &File, text: &str, at: &str, key: &str, node: &Node) -> anyhow::Result<String> {
    if !is_yaml(&file.path) {
        bail!("only YAML is recorded; this is another kind of file");
    }
    let (first, field) = (file.line(at), format!("{at}.{key}"));
    let line = file.has(&field).then(|| file.line(&field));
    yaml::put(text, first, line, key, node).map_err(|why| anyhow::anyhow!("{why}"))
}

/// What was written must be read as what was observed.
fn verify(file: &File, text: &str, outcomes: &[(usize, Outcome)]) -> anyhow::Result<()> {
    let mut suite: Suite = Located::read(&file.path.display().to_string(), text)
        .map_err(|rejection| anyhow::anyhow!("what was to be written cannot be read again: {rejection}"))?
        .value;
    suite.settle();
    for (index, outcome) in outcomes {
        let Some(case) = suite.cases.get(*index) else { bail!("what was to be written has fewer cases") };
        for (step, seen) in case.steps.iter().zip(&outcome.steps) {
            if let Some(difference) = compare(&step.expect, seen).first() {
                bail!("case `{}`: YAML cannot hold what was observed: {difference}", case.name);
            }
        }
    }
    Ok(())
}

fn start(outcome: &Outcome) -> Node {
    let mut map = Vec::new();
    match &outcome.refused {
        Some(message) => map.push(("refused".to_owned(), Node::List(vec![Node::Text(message.clone())]))),
        None => {
            let mut once: Vec<String> = Vec::new();
            for line in &outcome.start {
                if !once.contains(line) {
                    once.push(line.clone());
                }
            }
            map.push(("log".to_owned(), texts(&once)));
        }
    }
    Node::Map(map)
}

fn texts(lines: &[String]) -> Node {
    Node::List(lines.iter().map(|line| Node::Text(line.clone())).collect())
}

fn flag() -> Node {
    Node::Plain("true".into())
}

/// What a step is to expect: what its expectations name, as it was observed; everything where there are none.
fn expectation(step: &Step, seen: &Seen) -> Node {
    let expect = &step.expect;
    let all = *expect == Expect::default();
    let mut map: Vec<(String, Node)> = Vec::new();
    let mut add = |key: &str, node: Node| map.push((key.to_owned(), node));
    if let Some(message) = &seen.refused {
        let kept = !expect.refused.is_empty() && expect.refused.iter().all(|part| message.contains(part.as_str()));
        add("refused", if kept { texts(&expect.refused) } else { texts(std::slice::from_ref(message)) });
    }
    if let Some(response) = seen.response.as_ref().filter(|_| all || expect.response.is_some()) {
        add("response", response_of(expect.response.as_ref(), response));
    }
    if step.request.is_some() && (all || expect.upstream.is_some()) {
        add("upstream", upstream_of(expect.upstream.as_ref(), &seen.upstream));
    }
    if let Some(tcp) = seen.tcp.as_ref().filter(|_| all || expect.tcp.is_some()) {
        add("tcp", tcp_of(expect.tcp.as_ref(), tcp));
    }
    if (all && !seen.called.is_empty()) || expect.called.is_some() {
        let named = expect.called.as_deref().unwrap_or_default();
        let called = seen.called.iter().enumerate().map(|(index, seen)| request_of(named.get(index), seen));
        add("called", Node::List(called.collect()));
    }
    let log = if expect.more_log { seen.log.get(..expect.log.len()).unwrap_or(&seen.log) } else { &seen.log };
    if !log.is_empty() {
        add("log", texts(log));
    }
    if expect.more_log {
        add("more-log", flag());
    }
    if let Some(most) = expect.most_log {
        add("most-log", Node::Plain(most.max(seen.log.len()).to_string()));
    }
    let metrics = seen.metrics.iter().filter(|(name, _)| all || expect.metrics.contains_key(*name));
    let metrics: Vec<_> = metrics.map(|(name, value)| (name.clone(), Node::Plain(value.to_string()))).collect();
    if !metrics.is_empty() {
        add("metrics", Node::Map(metrics));
    }
    let properties = seen.properties.iter().filter(|(name, _)| all || expect.properties.contains_key(*name));
    let properties: Vec<_> = properties.map(|(name, value)| (name.clone(), Node::Text(value.clone()))).collect();
    if !properties.is_empty() {
        add("properties", Node::Map(properties));
    }
    Node::Map(map)
}

/// A text where it can be read as one, else in hexadecimal.
fn bytes_of(bytes: &[u8]) -> Node {
    let readable = |text: &&str| !text.contains(|c: char| c.is_control() && !"\r\n\t".contains(c));
    match std::str::from_utf8(bytes).ok().filter(readable) {
        Some(text) => Node::Text(text.to_owned()),
        None => {
            let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            Node::Map(vec![("hex".into(), Node::Text(digits))])
        }
    }
}

fn tcp_of(named: Option<&ExpectTcp>, seen: &SeenTcp) -> Node {
    let mut map: Vec<(String, Node)> = Vec::new();
    let mut add = |wanted: bool, key: &str, node: Node| {
        if wanted {
            map.push((key.to_owned(), node));
        }
    };
    let plain = |value: &dyn std::fmt::Display| Node::Plain(value.to_string());
    add(named.is_none_or(|named| named.state.is_some()), "state", plain(&seen.state));
    add(named.is_none_or(|named| named.upstream.is_some()), "upstream", bytes_of(&seen.upstream));
    add(named.is_none_or(|named| named.client.is_some()), "client", bytes_of(&seen.client));
    let end = named.map_or(seen.upstream_end, |named| named.upstream_end.is_some());
    add(end, "upstream-end", plain(&seen.upstream_end));
    let end = named.map_or(seen.client_end, |named| named.client_end.is_some());
    add(end, "client-end", plain(&seen.client_end));
    Node::Map(map)
}

/// Of the fields that `named` names, or of all: what they are.
fn fields(named: Option<&[String]>, seen: &Headers) -> Node {
    let Some(named) = named else {
        return texts(&seen.iter().map(|(name, value)| format!("{name}: {value}")).collect::<Vec<_>>());
    };
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in named.iter().map(|line| pair(line)) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let mut lines = Vec::new();
    for name in names {
        let before = lines.len();
        lines.extend(seen.iter().filter(|(of, _)| of == name).map(|(name, value)| format!("{name}: {value}")));
        if lines.len() == before {
            lines.push(name.to_owned());
        }
    }
    texts(&lines)
}

fn response_of(named: Option<&ExpectResponse>, seen: &SeenResponse) -> Node {
    let mut map: Vec<(String, Node)> = Vec::new();
    let mut add = |wanted: bool, key: &str, node: Node| {
        if wanted {
            map.push((key.to_owned(), node));
        }
    };
    add(named.is_none_or(|named| named.status.is_some()), "status", Node::Plain(seen.status.to_string()));
    let headers = fields(named.map(|named| named.headers.as_slice()), &seen.headers);
    add(!headers.is_empty(), "headers", headers);
    let body = named.map_or(!seen.body.is_empty(), |named| named.body.is_some());
    add(body, "body", bytes_of(&seen.body));
    let trailers = fields(named.map(|named| named.trailers.as_slice()), &seen.trailers);
    add(!trailers.is_empty(), "trailers", trailers);
    add(seen.reset, "reset", flag());
    Node::Map(map)
}

fn upstream_of(named: Option<&ExpectUpstream>, seen: &[SeenRequest]) -> Node {
    match (named, seen) {
        (None, [one]) => request_of(None, one),
        (Some(ExpectUpstream::Request(named)), [one]) => request_of(Some(named), one),
        (_, seen) => Node::Plain((!seen.is_empty()).to_string()),
    }
}

fn request_of(named: Option<&ExpectRequest>, seen: &SeenRequest) -> Node {
    let mut map: Vec<(String, Node)> = Vec::new();
    let mut add = |wanted: bool, key: &str, node: Node| {
        if wanted {
            map.push((key.to_owned(), node));
        }
    };
    let text = |text: &str| Node::Text(text.to_owned());
    if let Some(server) = &seen.server {
        add(named.is_none_or(|named| named.server.is_some()), "server", text(server));
    }
    add(named.is_none_or(|named| named.method.is_some()), "method", text(&seen.method));
    add(named.is_none_or(|named| named.path.is_some()), "path", text(&seen.path));
    add(named.is_none_or(|named| named.authority.is_some()), "authority", text(&seen.authority));
    let headers = fields(named.map(|named| named.headers.as_slice()), &seen.headers);
    add(!headers.is_empty(), "headers", headers);
    let body = named.map_or(!seen.body.is_empty(), |named| named.body.is_some());
    add(body, "body", bytes_of(&seen.body));
    let trailers = fields(named.map(|named| named.trailers.as_slice()), &seen.trailers);
    add(!trailers.is_empty(), "trailers", trailers);
    Node::Map(map)
}
