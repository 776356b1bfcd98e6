//! Authorization: deny, then allow, then the default; audit beside it.

use std::net::IpAddr;

use http::{HeaderMap, HeaderValue, Method};
use ipnet::IpNet;
use outrigger_proto::mesh as wire;

use crate::link::LinkError;
use crate::reason::Reason;
use crate::spiffe::SpiffeId;

/// Compiled rules of one port of a workload. The default allows everything.
#[derive(Debug, Default)]
pub struct Authorization {
    default_deny: bool,
    deny: Vec<Rule>,
    allow: Vec<Rule>,
    audit: Vec<Rule>,
    /// Some rule has paths: the application gets the canonical path
    pub path_rules: bool,
    closed: Option<Box<str>>,
}

#[derive(Debug)]
struct Rule {
    name: Box<str>,
    from: Vec<Source>,
    to: Vec<Operation>,
    when: Vec<(http::HeaderName, Vec<Pattern>)>,
}

#[derive(Debug)]
struct Source {
    principals: Vec<Pattern>,
    namespaces: Vec<Pattern>,
    ip_blocks: Vec<IpNet>,
}

#[derive(Debug)]
struct Operation {
    methods: Vec<Pattern>,
    paths: Vec<Pattern>,
    ports: Vec<u16>,
}

/// A text in which `*` stands for anything, `/` included: the parts between the stars.
#[derive(Debug)]
struct Pattern(Vec<Box<str>>);

impl Pattern {
    fn new(text: &str) -> Self {
        Self(text.split('*').map(Into::into).collect())
    }

    fn matches(&self, text: &str) -> bool {
        let [first, middle @ .., last] = self.0.as_slice() else {
            return matches!(self.0.as_slice(), [only] if **only == *text);
        };
        let Some(text) = text.strip_prefix(&**first) else { return false };
        // The earliest place of each part leaves the most for those after it.
        let rest = middle.iter().try_fold(text, |text, part| Some(&text[text.find(&**part)? + part.len()..]));
        rest.is_some_and(|rest| rest.ends_with(&**last))
    }
}

/// What is judged.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// Verified identity; `None`: plaintext
    pub peer: Option<&'a SpiffeId>,
    /// Address of the peer
    pub ip: IpAddr,
    /// Application port
    pub port: u16,
    /// The HTTP part
    pub method: &'a Method,
    /// Canonical path
    pub path: &'a str,
    /// Headers after normalisation
    pub headers: &'a HeaderMap,
}

/// What is judged of a TCP stream.
#[derive(Debug, Clone, Copy)]
pub struct Connection<'a> {
    /// Verified identity; `None`: plaintext
    pub peer: Option<&'a SpiffeId>,
    /// Address of the peer
    pub ip: IpAddr,
    /// Application port
    pub port: u16,
}

/// The decision, and the rule that made it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict<'a> {
    /// Why it is denied, if it is
    pub outcome: Result<(), Reason>,
    /// The rule that allowed or denied, or why all is denied; `None`: the default
    pub rule: Option<&'a str>,
    /// Audit rules that matched
    pub audit: Vec<&'a str>,
}

/// The HTTP part of what is judged.
#[derive(Clone, Copy)]
struct Http<'a> {
    method: &'a Method,
    path: &'a str,
    headers: &'a HeaderMap,
}

/// What an HTTP field says about a stream that has no HTTP.
#[derive(Clone, Copy)]
enum Without {
    /// Allow: what cannot be shown is not allowed
    NoMatch,
    /// Deny and Audit: the rest of the rule decides
    Ignore,
}

impl Authorization {
    /// Compiles the wire form.
    ///
    /// # Errors
    /// An address block, header name or port that cannot be read.
    pub fn link(wire: &wire::Authorization) -> Result<Self, LinkError> {
        let rules = |list: &[wire::AuthorizationRule], what: &str| {
            let each = list.iter().enumerate().map(|(i, one)| Rule::link(one, &format!("{what}[{i}]")));
            each.collect::<Result<Vec<_>, _>>()
        };
        Ok(Self {
            default_deny: wire.default_deny,
            deny: rules(&wire.deny, "deny")?,
            allow: rules(&wire.allow, "allow")?,
            audit: rules(&wire.audit, "audit")?,
            path_rules: wire.path_rules,
            closed: (!wire.closed.is_empty()).then(|| wire.closed.as_str().into()),
        })
    }

    /// What it consists of, for people: each action with the names of its rules, in the order in which they are tried.
    pub fn rules(&self) -> [(&'static str, Vec<&str>); 3] {
        let lists = [("deny", &self.deny), ("allow", &self.allow), ("audit", &self.audit)];
        lists.map(|(action, rules)| (action, rules.iter().map(|rule| &*rule.name).collect()))
    }

    /// Judges a request.
    pub fn decide(&self, request: &Request<'_>) -> Verdict<'_> {
        let &Request { peer, ip, port, method, path, headers } = request;
        self.judge(&Connection { peer, ip, port }, Some(Http { method, path, headers }))
    }

    /// Judges a TCP stream: an Allow rule with HTTP fields never matches it, a Deny rule ignores its HTTP fields.
    pub fn decide_connection(&self, connection: &Connection<'_>) -> Verdict<'_> {
        self.judge(connection, None)
    }

    fn judge(&self, connection: &Connection<'_>, http: Option<Http<'_>>) -> Verdict<'_> {
        let first = |rules: &'_ [Rule], without| rules.iter().position(|rule| rule.matches(connection, http, without));
        let audit = self.audit.iter().filter(|rule| rule.matches(connection, http, Without::Ignore));
        let audit = audit.map(|rule| &*rule.name).collect();
        let verdict = |outcome, rule| Verdict { outcome, rule, audit };
        if let Some(why) = &self.closed {
            return verdict(Err(Reason::AuthorizationUnavailable), Some(why));
        }
        if let Some(i) = first(&self.deny, Without::Ignore) {
            return verdict(Err(Reason::Unauthorized), Some(&self.deny[i].name));
        }
        if !self.default_deny {
            return verdict(Ok(()), None);
        }
        match first(&self.allow, Without::NoMatch) {
            Some(i) => verdict(Ok(()), Some(&self.allow[i].name)),
            None => verdict(Err(Reason::Unauthorized), None),
        }
    }
}

impl Rule {
    fn link(wire: &wire::AuthorizationRule, field: &str) -> Result<Self, LinkError> {
        let error = |part: String, problem: String| LinkError { field: format!("{field}.{part}"), problem };
        let patterns = |list: &[String]| list.iter().map(|text| Pattern::new(text)).collect::<Vec<_>>();
        let source = |(i, one): (usize, &wire::Source)| {
            let block = |text: &String| {
                let parsed = text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
                parsed.map_err(|_| error(format!("from[{i}].ip_blocks"), format!("`{text}` is not a CIDR block")))
            };
            Ok(Source {
                principals: patterns(&one.principals),
                namespaces: patterns(&one.namespaces),
                ip_blocks: one.ip_blocks.iter().map(block).collect::<Result<_, _>>()?,
            })
        };
        let operation = |(i, one): (usize, &wire::Operation)| {
            let port = |number: &u32| {
                let problem = |_| error(format!("to[{i}].ports"), format!("{number} is not a port"));
                u16::try_from(*number).map_err(problem)
            };
            Ok(Operation {
                methods: patterns(&one.methods),
                paths: patterns(&one.paths),
                ports: one.ports.iter().map(port).collect::<Result<_, _>>()?,
            })
        };
        let condition = |(i, one): (usize, &wire::Condition)| {
            let problem = |_| error(format!("when[{i}].header"), format!("`{}` is not a header name", one.header));
            Ok((one.header.parse().map_err(problem)?, patterns(&one.values)))
        };
        Ok(Self {
            name: wire.name.as_str().into(),
            from: wire.from.iter().enumerate().map(source).collect::<Result<_, LinkError>>()?,
            to: wire.to.iter().enumerate().map(operation).collect::<Result<_, LinkError>>()?,
            when: wire.when.iter().enumerate().map(condition).collect::<Result<_, LinkError>>()?,
        })
    }

    fn matches(&self, connection: &Connection<'_>, http: Option<Http<'_>>, without: Without) -> bool {
        any_or_empty(&self.from, |source| source.matches(connection))
            && any_or_empty(&self.to, |operation| operation.matches(connection.port, http, without))
            && match (self.when.is_empty(), http) {
                (true, _) => true,
                (false, Some(http)) => self.when.iter().all(|(name, values)| {
                    // Several headers of one name: each is looked at, so that none hides behind another.
                    let mut given = http.headers.get_all(name).iter();
                    given.any(|given| holds(given, values, without))
                }),
                (false, None) => matches!(without, Without::Ignore),
            }
    }
}

/// Whether a header's value is one of `values`. Not inlined: it is not on the way of most rules.
#[inline(never)]
fn holds(given: &HeaderValue, values: &[Pattern], without: Without) -> bool {
    match given.to_str() {
        Ok(given) => any_or_empty(values, |value| value.matches(given)),
        // Not text that a rule could name: nobody is let in by it, nor gets past a denial.
        Err(_) => matches!(without, Without::Ignore),
    }
}

impl Source {
    fn matches(&self, connection: &Connection<'_>) -> bool {
        let peer = |pattern: &Pattern, part: fn(&SpiffeId) -> &str| {
            connection.peer.is_some_and(|peer| pattern.matches(part(peer)))
        };
        let ip = connection.ip.to_canonical();
        any_or_empty(&self.principals, |one| peer(one, SpiffeId::as_str))
            && any_or_empty(&self.namespaces, |one| peer(one, SpiffeId::namespace))
            && any_or_empty(&self.ip_blocks, |one| one.contains(&ip))
    }
}

impl Operation {
    fn matches(&self, port: u16, http: Option<Http<'_>>, without: Without) -> bool {
        let has_http = !self.methods.is_empty() || !self.paths.is_empty();
        any_or_empty(&self.ports, |one| *one == port)
            && match http {
                Some(http) => {
                    any_or_empty(&self.methods, |one| one.matches(http.method.as_str()))
                        && any_or_empty(&self.paths, |one| one.matches(http.path))
                }
                None => !has_http || matches!(without, Without::Ignore),
            }
    }
}

fn any_or_empty<T>(list: &[T], matches: impl Fn(&T) -> bool) -> bool {
    list.is_empty() || list.iter().any(matches)
}

#[cfg(test)]
mod tests;
