//! Services, their ports and routes.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderName, HeaderValue, Method, StatusCode};
use outrigger_proto::mesh as wire;
use regex::Regex;

use super::cluster::{Backend, backend};
use super::{LinkError, Protocol, Within, address, optional_ms, port, protocol};

/// A service as one client namespace sees it.
#[derive(Debug, Clone)]
pub struct Service {
    /// Namespace
    pub namespace: Arc<str>,
    /// Name
    pub name: Arc<str>,
    /// `<namespace>/<name>`, as metrics and logs have it
    pub label: Arc<str>,
    /// Virtual addresses
    pub vips: Vec<IpAddr>,
    /// Ports, in the order of the Service
    pub ports: Vec<Port>,
    /// Every backend that a port or rule names
    pub backends: Vec<Arc<Backend>>,
}

impl Service {
    /// The port of this number; without a number the first.
    pub fn port(&self, number: Option<u16>) -> Option<&Port> {
        match number {
            Some(number) => self.ports.iter().find(|port| port.number == number),
            None => self.ports.first(),
        }
    }
}

/// One port of a service.
#[derive(Debug, Clone)]
pub struct Port {
    /// Number
    pub number: u16,
    /// Name; may be empty
    pub name: Arc<str>,
    /// Declared protocol
    pub protocol: Protocol,
    /// Routes replace implicit routing, even if there is no rule among them
    pub routes: Option<RouteTable>,
    /// Implicit routing, and TCP
    pub implicit: Arc<Rule>,
    /// Keys of the outbound filters of HTTP in the order of the request
    pub filters: Arc<[String]>,
    /// Of opaque connections
    pub stream_filters: Arc<[String]>,
    /// Some request meets a filter
    pub filtered: bool,
}

impl Port {
    /// Keys of the filters that a request of this rule meets, in its order.
    pub fn chain<'a>(&'a self, rule: Option<&'a Rule>) -> &'a [String] {
        rule.and_then(|rule| rule.wasm.as_deref()).unwrap_or(&self.filters)
    }

    /// Keys of all its filters, those of its rules too; some more than once.
    pub fn every_filter(&self) -> impl Iterator<Item = &String> {
        let rules = self.routes.iter().flat_map(|table| &table.rules);
        self.filters
            .iter()
            .chain(self.stream_filters.iter())
            .chain(rules.flat_map(|rule| rule.wasm.as_deref().unwrap_or_default()))
    }
}

/// Matches, best first, and the rules they lead to.
#[derive(Debug, Clone)]
pub struct RouteTable {
    /// In the order in which they are tried
    pub matches: Vec<Match>,
    /// What the matches point at
    pub rules: Vec<Arc<Rule>>,
}

/// A condition on a request head; all that is given must hold.
#[derive(Debug, Clone)]
pub struct Match {
    /// Index into [`RouteTable::rules`]
    pub rule: usize,
    /// On the canonical path
    pub path: PathMatch,
    /// Exact
    pub method: Option<Method>,
    /// All of
    pub headers: Vec<ValueMatch<HeaderName>>,
    /// All of; by decoded name
    pub query: Vec<ValueMatch<Box<str>>>,
}

/// A condition on a path.
#[derive(Debug, Clone)]
pub enum PathMatch {
    /// Every path
    Any,
    /// This path only
    Exact(Box<str>),
    /// This path and those below it; no trailing slash
    Prefix(Box<str>),
    /// Anchored at both ends
    Regex(Regex),
}

/// A condition on a named value.
#[derive(Debug, Clone)]
pub struct ValueMatch<N> {
    /// Name of the header or parameter
    pub name: N,
    /// What its value must be
    pub value: ValuePattern,
}

/// A condition on a value.
#[derive(Debug, Clone)]
pub enum ValuePattern {
    /// Equal, byte by byte
    Exact(Box<str>),
    /// Anchored at both ends
    Regex(Regex),
}

/// What happens to a request that a match selected.
#[derive(Debug, Clone)]
pub struct Rule {
    /// `<namespace>/<route>/<rule>`; of implicit routing the backend's key
    pub name: Arc<str>,
    /// Modifiers, redirect, rewrite
    pub filters: RouteFilters,
    /// Shares
    pub backends: Vec<Weighted>,
    /// Timeouts and retries
    pub policy: RoutePolicy,
    /// From a GRPCRoute: an unusable backend is grpc-status UNAVAILABLE
    pub grpc: bool,
    /// Keys of the filters of its requests, those of the port among them; `None`: those of the port
    pub wasm: Option<Arc<[String]>>,
    /// One valid backend, and no filter anywhere: nothing to do but forward
    pub simple: bool,
}

/// One share of a rule's requests.
#[derive(Debug, Clone)]
pub struct Weighted {
    /// The backend, or why the share is answered with 500
    pub backend: Result<Arc<Backend>, Box<str>>,
    /// Share: this over the sum
    pub weight: u32,
    /// Modifiers of this share only
    pub filters: RouteFilters,
}

/// Filters of a rule or a share.
#[derive(Debug, Clone, Default)]
pub struct RouteFilters {
    /// On the request
    pub request: Vec<HeaderChange>,
    /// On the response
    pub response: Vec<HeaderChange>,
    /// Instead of a backend
    pub redirect: Option<Redirect>,
    /// Of host and path
    pub rewrite: Option<Rewrite>,
}

impl RouteFilters {
    /// Nothing to do.
    pub fn is_empty(&self) -> bool {
        self.request.is_empty() && self.response.is_empty() && self.redirect.is_none() && self.rewrite.is_none()
    }
}

/// A header modifier.
#[derive(Debug, Clone, Default)]
pub struct HeaderChange {
    /// Replaces what is there
    pub set: Vec<(HeaderName, HeaderValue)>,
    /// Joined to what is there
    pub add: Vec<(HeaderName, HeaderValue)>,
    /// Taken away
    pub remove: Vec<HeaderName>,
}

/// A change of path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PathChange {
    /// The whole path
    Full(Box<str>),
    /// The prefix that the rule's match matched
    Prefix(Box<str>),
}

/// A redirect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Redirect {
    /// `http` or `https`; `None`: the request's
    pub scheme: Option<Box<str>>,
    /// `None`: the request's
    pub hostname: Option<Box<str>>,
    /// `None`: the request's
    pub path: Option<PathChange>,
    /// `None`: the scheme's own if a scheme is given, else the request's
    pub port: Option<u16>,
    /// 301, 302, 303, 307 or 308
    pub status: StatusCode,
}

/// A rewrite on the way to the backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rewrite {
    /// New authority
    pub hostname: Option<HeaderValue>,
    /// New path
    pub path: Option<PathChange>,
}

/// Timeouts and retries of a rule.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RoutePolicy {
    /// For the whole request, all attempts together
    pub request_timeout: Option<Duration>,
    /// For one attempt
    pub per_try_timeout: Option<Duration>,
    /// When another attempt is made
    pub retries: Retries,
}

/// When another attempt is made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Retries {
    /// After the first try; 0: none
    pub attempts: u32,
    /// On connect and TLS failures
    pub connect_failure: bool,
    /// On a reset or a passed per-try timeout before a response
    pub reset: bool,
    /// On these HTTP statuses
    pub statuses: Vec<u16>,
    /// On these gRPC statuses
    pub grpc_statuses: Vec<u32>,
    /// Upper bound of the first wait; doubles with each attempt
    pub backoff_base: Duration,
    /// Upper bound of every wait
    pub backoff_max: Duration,
}

type Backends = HashMap<String, Arc<Backend>>;

/// Links a `Service`.
///
/// # Errors
/// The first field that cannot be read, or a reference to a backend that is not in the message.
pub fn service(wire: &wire::Service) -> Result<Service, LinkError> {
    let mut backends = Backends::new();
    let mut ordered = Vec::with_capacity(wire.backends.len());
    for (i, one) in wire.backends.iter().enumerate() {
        let linked = Arc::new(backend(one).at("backends", i)?);
        ordered.push(Arc::clone(&linked));
        backends.insert(one.key.clone(), linked);
    }
    let ports = wire.ports.iter().enumerate().map(|(i, one)| service_port(one, &backends).at("ports", i));
    let vips = wire.vips.iter().enumerate().map(|(i, text)| address(&format!("vips[{i}]"), text));
    Ok(Service {
        namespace: wire.namespace.as_str().into(),
        name: wire.name.as_str().into(),
        label: format!("{}/{}", wire.namespace, wire.name).into(),
        vips: vips.collect::<Result<_, _>>()?,
        ports: ports.collect::<Result<_, _>>()?,
        backends: ordered,
    })
}

fn service_port(wire: &wire::ServicePort, backends: &Backends) -> Result<Port, LinkError> {
    let shares = match wire.backend.as_str() {
        "" => Vec::new(),
        key => vec![Weighted { backend: Ok(find(backends, key)?), weight: 1, filters: RouteFilters::default() }],
    };
    let implicit = Rule {
        name: wire.backend.as_str().into(),
        filters: RouteFilters::default(),
        simple: shares.len() == 1,
        backends: shares,
        policy: policy(wire.policy.as_ref())?,
        grpc: false,
        wasm: None,
    };
    let routes = wire.routes.as_ref().map(|wire| table(wire, backends).within("routes")).transpose()?;
    let own = routes.iter().flat_map(|table| &table.rules).any(|rule| rule.wasm.is_some());
    Ok(Port {
        number: port("port", wire.port)?,
        name: wire.name.as_str().into(),
        protocol: protocol(wire.protocol)?,
        routes,
        implicit: Arc::new(implicit),
        filtered: own || !wire.filters.is_empty(),
        filters: wire.filters.as_slice().into(),
        stream_filters: wire.stream_filters.as_slice().into(),
    })
}

fn find(backends: &Backends, key: &str) -> Result<Arc<Backend>, LinkError> {
    let found = backends.get(key).cloned();
    found.ok_or_else(|| LinkError::new("backend", format_args!("`{key}` is not among the service's backends")))
}

fn table(wire: &wire::HttpRoutes, backends: &Backends) -> Result<RouteTable, LinkError> {
    let rules = wire.rules.iter().enumerate().map(|(i, one)| rule(one, backends).at("rules", i));
    let rules: Vec<_> = rules.collect::<Result<_, _>>()?;
    let matches = wire.matches.iter().enumerate().map(|(i, one)| one_match(one, rules.len()).at("matches", i));
    Ok(RouteTable { matches: matches.collect::<Result<_, _>>()?, rules })
}

fn rule(wire: &wire::HttpRule, backends: &Backends) -> Result<Arc<Rule>, LinkError> {
    let shares = wire.backends.iter().enumerate().map(|(i, one)| weighted(one, backends).at("backends", i));
    let shares: Vec<_> = shares.collect::<Result<_, _>>()?;
    let filters = route_filters(&wire.filters)?;
    let simple = filters.is_empty()
        && matches!(shares.as_slice(), [one] if one.backend.is_ok() && one.weight > 0 && one.filters.is_empty());
    Ok(Arc::new(Rule {
        name: wire.name.as_str().into(),
        filters,
        backends: shares,
        policy: policy(wire.policy.as_ref())?,
        grpc: wire.grpc,
        wasm: (!wire.wasm.is_empty()).then(|| wire.wasm.as_slice().into()),
        simple,
    }))
}

fn weighted(wire: &wire::WeightedBackend, backends: &Backends) -> Result<Weighted, LinkError> {
    let backend = match wire.invalid.as_str() {
        "" => Ok(find(backends, &wire.backend)?),
        why => Err(why.into()),
    };
    Ok(Weighted { backend, weight: wire.weight, filters: route_filters(&wire.filters)? })
}

fn policy(wire: Option<&wire::RoutePolicy>) -> Result<RoutePolicy, LinkError> {
    let Some(wire) = wire else { return Ok(RoutePolicy::default()) };
    let retries = wire.retries.clone().unwrap_or_default();
    let status = |code: &u32| {
        let known = u16::try_from(*code).ok().filter(|code| (100..600).contains(code));
        known.ok_or_else(|| LinkError::new("policy.retries.statuses", format_args!("{code} is not an HTTP status")))
    };
    Ok(RoutePolicy {
        request_timeout: optional_ms(wire.request_timeout_ms),
        per_try_timeout: optional_ms(wire.per_try_timeout_ms),
        retries: Retries {
            attempts: retries.attempts,
            connect_failure: retries.connect_failure,
            reset: retries.reset,
            statuses: retries.statuses.iter().map(status).collect::<Result<_, _>>()?,
            grpc_statuses: retries.grpc_statuses,
            backoff_base: Duration::from_millis(retries.backoff_base_ms),
            backoff_max: Duration::from_millis(retries.backoff_max_ms.max(retries.backoff_base_ms)),
        },
    })
}

fn one_match(wire: &wire::HttpMatch, rules: usize) -> Result<Match, LinkError> {
    use wire::http_match::Path;
    let rule = usize::try_from(wire.rule).ok().filter(|rule| *rule < rules);
    let path = match &wire.path {
        None => PathMatch::Any,
        Some(Path::Exact(path)) => PathMatch::Exact(path.as_str().into()),
        Some(Path::Prefix(path)) => match path.trim_end_matches('/') {
            "" => PathMatch::Any,
            path => PathMatch::Prefix(path.into()),
        },
        Some(Path::Regex(pattern)) => PathMatch::Regex(regex("path", pattern)?),
    };
    let method = match wire.method.as_str() {
        "" => None,
        text => Some(text.parse().map_err(|_| LinkError::new("method", format_args!("`{text}` is not a method")))?),
    };
    let headers = wire.headers.iter().enumerate().map(|(i, one)| {
        let name = header_name(&one.name).at("headers", i)?;
        Ok(ValueMatch { name, value: pattern(one).at("headers", i)? })
    });
    let query = wire.query.iter().enumerate();
    let query =
        query.map(|(i, one)| Ok(ValueMatch { name: one.name.as_str().into(), value: pattern(one).at("query", i)? }));
    Ok(Match {
        rule: rule.ok_or_else(|| LinkError::new("rule", format_args!("{} is not among {rules} rules", wire.rule)))?,
        path,
        method,
        headers: headers.collect::<Result<_, _>>()?,
        query: query.collect::<Result<_, _>>()?,
    })
}

fn pattern(wire: &wire::ValueMatch) -> Result<ValuePattern, LinkError> {
    use wire::value_match::Value;
    match &wire.value {
        Some(Value::Exact(value)) => Ok(ValuePattern::Exact(value.as_str().into())),
        Some(Value::Regex(pattern)) => Ok(ValuePattern::Regex(regex("value", pattern)?)),
        None => Err(LinkError::new("value", "is missing")),
    }
}

/// Bounds the compiled program: bytes.
const REGEX_SIZE: usize = 1 << 18;
/// Bounds the pattern: bytes.
const PATTERN_SIZE: usize = 4096;

/// Compiles an expression that must match the whole value.
fn regex(field: &str, pattern: &str) -> Result<Regex, LinkError> {
    let compile = |text: &str| {
        let built = regex::RegexBuilder::new(text).size_limit(REGEX_SIZE).dfa_size_limit(REGEX_SIZE).build();
        built.map_err(|error| LinkError::new(field, format_args!("regular expression `{pattern}`: {error}")))
    };
    if pattern.len() > PATTERN_SIZE {
        return Err(LinkError::new(field, format_args!("regular expression longer than {PATTERN_SIZE} bytes")));
    }
    // By itself first: `a)|(?:b` is no expression, but would become one between the anchors.
    compile(pattern)?;
    compile(&format!("^(?:{pattern})$"))
}

fn header_name(text: &str) -> Result<HeaderName, LinkError> {
    text.parse().map_err(|_| LinkError::new("name", format_args!("`{text}` is not a header name")))
}

/// Headers that frame the message or name the connection: a modifier that touched them would break the message.
const UNTOUCHABLE: [&str; 7] =
    ["connection", "content-length", "host", "keep-alive", "te", "transfer-encoding", "upgrade"];

fn changed_name(text: &str) -> Result<HeaderName, LinkError> {
    let name = header_name(text)?;
    if UNTOUCHABLE.contains(&name.as_str()) {
        return Err(LinkError::new("name", format_args!("`{name}` cannot be changed by a header modifier")));
    }
    Ok(name)
}

fn header_change(wire: &wire::HeaderModifier) -> Result<HeaderChange, LinkError> {
    let pairs = |list: &[wire::Header], what: &str| {
        let pair = |(i, one): (usize, &wire::Header)| {
            let value = HeaderValue::from_str(&one.value)
                .map_err(|_| LinkError::new("value", format_args!("`{}` is not a header value", one.value)));
            Ok((changed_name(&one.name).at(what, i)?, value.at(what, i)?))
        };
        list.iter().enumerate().map(pair).collect::<Result<Vec<_>, LinkError>>()
    };
    let remove = wire.remove.iter().enumerate().map(|(i, name)| changed_name(name).at("remove", i));
    Ok(HeaderChange {
        set: pairs(&wire.set, "set")?,
        add: pairs(&wire.add, "add")?,
        remove: remove.collect::<Result<_, _>>()?,
    })
}

fn route_filters(wire: &[wire::RouteFilter]) -> Result<RouteFilters, LinkError> {
    use wire::route_filter::Filter;
    let mut filters = RouteFilters::default();
    for (i, one) in wire.iter().enumerate() {
        match &one.filter {
            Some(Filter::RequestHeaders(wire)) => filters.request.push(header_change(wire).at("filters", i)?),
            Some(Filter::ResponseHeaders(wire)) => filters.response.push(header_change(wire).at("filters", i)?),
            Some(Filter::Redirect(wire)) => filters.redirect = Some(redirect(wire).at("filters", i)?),
            Some(Filter::Rewrite(wire)) => filters.rewrite = Some(rewrite(wire).at("filters", i)?),
            // A filter this version cannot carry out must not be skipped.
            None => return Err(LinkError::new(format!("filters[{i}]"), "is not known to this version of the proxy")),
        }
    }
    Ok(filters)
}

fn redirect(wire: &wire::Redirect) -> Result<Redirect, LinkError> {
    let text = |text: &str| (!text.is_empty()).then(|| text.into());
    let status = u16::try_from(wire.status).ok().filter(|code| matches!(code, 301 | 302 | 303 | 307 | 308));
    let status = status.and_then(|code| StatusCode::from_u16(code).ok());
    Ok(Redirect {
        scheme: text(&wire.scheme),
        hostname: text(&wire.hostname),
        path: path_change(wire.path.as_ref()),
        port: if wire.port == 0 { None } else { Some(port("port", wire.port)?) },
        status: status.ok_or_else(|| LinkError::new("status", format_args!("{} is no redirect", wire.status)))?,
    })
}

fn rewrite(wire: &wire::Rewrite) -> Result<Rewrite, LinkError> {
    let hostname = match wire.hostname.as_str() {
        "" => None,
        text => {
            let problem = |_| LinkError::new("hostname", format_args!("`{text}` is not a host"));
            text.parse::<http::uri::Authority>().map_err(problem)?;
            HeaderValue::from_str(text).ok()
        }
    };
    Ok(Rewrite { hostname, path: path_change(wire.path.as_ref()) })
}

fn path_change(wire: Option<&wire::PathModifier>) -> Option<PathChange> {
    use wire::path_modifier::Path;
    wire.and_then(|wire| wire.path.as_ref()).map(|path| match path {
        Path::Full(path) => PathChange::Full(path.as_str().into()),
        Path::Prefix(path) => PathChange::Prefix(path.as_str().into()),
    })
}
