//! Which rule and which backend a request gets, and what the rule changes on the way.

mod change;
mod query;

pub use change::{modify_request, modify_response, redirect, rewrite};

use std::sync::Arc;

use fastrand::Rng;
use http::{HeaderMap, HeaderName, Method};

use crate::link::{Backend, Match, PathMatch, Port, Rule, ValueMatch, ValuePattern, Weighted};

/// What matchers see of a request.
#[derive(Debug, Clone, Copy)]
pub struct Head<'a> {
    /// Method
    pub method: &'a Method,
    /// Canonical path, without the query
    pub path: &'a str,
    /// Query as sent, without `?`
    pub query: Option<&'a str>,
    /// Headers
    pub headers: &'a HeaderMap,
}

/// A rule that was selected.
#[derive(Debug, Clone, Copy)]
pub struct Selected<'a> {
    /// The rule
    pub rule: &'a Arc<Rule>,
    /// The prefix that matched, which a rewrite may replace; "" for every path
    pub prefix: Option<&'a str>,
}

/// Selects the rule: the first match that holds, or implicit routing where no route replaces it. `None`: routes replace
/// it and none matches, which is 404.
pub fn select<'a>(port: &'a Port, head: &Head<'_>) -> Option<Selected<'a>> {
    let Some(table) = &port.routes else {
        return Some(Selected { rule: &port.implicit, prefix: None });
    };
    let found = table.matches.iter().find(|one| holds(one, head))?;
    let prefix = match &found.path {
        PathMatch::Any => Some(""),
        PathMatch::Prefix(prefix) => Some(&**prefix),
        PathMatch::Exact(_) | PathMatch::Regex(_) => None,
    };
    Some(Selected { rule: table.rules.get(found.rule)?, prefix })
}

/// Cheapest and most selective condition first.
fn holds(one: &Match, head: &Head<'_>) -> bool {
    let path = match &one.path {
        PathMatch::Any => true,
        PathMatch::Exact(path) => **path == *head.path,
        PathMatch::Prefix(prefix) => below(head.path, prefix),
        PathMatch::Regex(regex) => regex.is_match(head.path),
    };
    path && one.method.as_ref().is_none_or(|method| method == head.method)
        && one.headers.iter().all(|want| header_holds(want, head.headers))
        && (one.query.is_empty() || query::holds(&one.query, head.query.unwrap_or("")))
}

/// Element-wise: `/a/b` is below `/a`, `/ab` is not.
fn below(path: &str, prefix: &str) -> bool {
    path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Several headers of one name are one list, as HTTP has it (RFC 9110 5.3).
fn header_holds(want: &ValueMatch<HeaderName>, headers: &HeaderMap) -> bool {
    let mut values = headers.get_all(&want.name).iter();
    let Some(first) = values.next() else { return false };
    let Ok(first) = first.to_str() else { return false };
    let Some(second) = values.next() else { return value_holds(&want.value, first) };
    let mut all = first.to_owned();
    for value in std::iter::once(second).chain(values) {
        let Ok(value) = value.to_str() else { return false };
        all.push(',');
        all.push_str(value);
    }
    value_holds(&want.value, &all)
}

fn value_holds(want: &ValuePattern, value: &str) -> bool {
    match want {
        ValuePattern::Exact(exact) => **exact == *value,
        ValuePattern::Regex(regex) => regex.is_match(value),
    }
}

/// Where a request goes within a rule.
#[derive(Debug, Clone, Copy)]
pub enum Split<'a> {
    /// A share with a backend; `None` of its endpoints may be ready where no sibling's are
    Backend(&'a Weighted, &'a Arc<Backend>),
    /// A share without a valid backend, answered with 500: why
    Invalid(&'a str),
    /// No share has a weight
    None,
}

/// Chooses a share by weight. A backend without ready endpoints keeps its share only while no sibling with a weight is
/// ready; an invalid share always keeps its own.
pub fn split<'a>(rule: &'a Rule, rng: &mut Rng, ready: impl Fn(&Backend) -> bool) -> Split<'a> {
    match rule.backends.as_slice() {
        [] => Split::None,
        [only] if only.weight == 0 => Split::None,
        [only] => share(only),
        _ => match draw(rule, rng, |_| true) {
            Some(first) if unready(first, &ready) => {
                // Drawn anew among the ready ones only. An invalid share does not gain by it.
                share(draw(rule, rng, |one| one.backend.as_ref().is_ok_and(|one| ready(one))).unwrap_or(first))
            }
            Some(first) => share(first),
            None => Split::None,
        },
    }
}

fn unready(one: &Weighted, ready: impl Fn(&Backend) -> bool) -> bool {
    one.backend.as_ref().is_ok_and(|backend| !ready(backend))
}

fn share(one: &Weighted) -> Split<'_> {
    match &one.backend {
        Ok(backend) => Split::Backend(one, backend),
        Err(why) => Split::Invalid(why),
    }
}

fn draw<'a>(rule: &'a Rule, rng: &mut Rng, fits: impl Fn(&Weighted) -> bool) -> Option<&'a Weighted> {
    let weight = |one: &Weighted| if fits(one) { u64::from(one.weight) } else { 0 };
    let sum: u64 = rule.backends.iter().map(weight).sum();
    if sum == 0 {
        return None;
    }
    let mut point = rng.u64(..sum);
    for one in &rule.backends {
        match point.checked_sub(weight(one)) {
            Some(rest) => point = rest,
            None => return Some(one),
        }
    }
    None
}

#[cfg(test)]
mod tests;
