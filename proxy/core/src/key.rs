//! Names on the wire: subscription keys, and the canonical form of what an application calls a service.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

/// A service by namespace and name. Key: `svc/<namespace>/<name>`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceKey {
    /// Kubernetes namespace
    pub namespace: String,
    /// Service name
    pub name: String,
}

/// A subscription key of the discovery transport.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Key {
    /// `svc/<namespace>/<name>`
    Service(ServiceKey),
    /// `ip/<addr>:<port>`: an intercepted original destination
    Ip(SocketAddr),
    /// `host/<name>:<port>`: an authority that is no service name
    Host(String, u16),
    /// `self/<workload>`: in the subscriber's own namespace
    SelfOf(String),
    /// `filter/<namespace>/<name>`
    Filter(String, String),
    /// `wasm/<sha256>`
    Wasm(String),
    /// `endpoints/<namespace>/<service>:<port>/<shard>`
    Endpoints(ServiceKey, u16, u32),
    /// `bundle/<trust domain>`
    Bundle(String),
    /// `mesh`
    Mesh,
}

/// A key that cannot be read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "`{0}` is not a resource key; keys are svc/<ns>/<name>, ip/<addr>:<port>, host/<name>:<port>, self/<workload>, filter/<ns>/<name>, wasm/<sha256>, endpoints/<ns>/<svc>:<port>/<shard>, bundle/<trust domain>, mesh"
)]
pub struct BadKey(pub String);

impl fmt::Display for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Service(key) => write!(f, "svc/{key}"),
            Self::Ip(addr) => write!(f, "ip/{addr}"),
            Self::Host(name, port) => write!(f, "host/{name}:{port}"),
            Self::SelfOf(workload) => write!(f, "self/{workload}"),
            Self::Filter(ns, name) => write!(f, "filter/{ns}/{name}"),
            Self::Wasm(digest) => write!(f, "wasm/{digest}"),
            Self::Endpoints(key, port, shard) => write!(f, "endpoints/{key}:{port}/{shard}"),
            Self::Bundle(domain) => write!(f, "bundle/{domain}"),
            Self::Mesh => f.write_str("mesh"),
        }
    }
}

impl FromStr for Key {
    type Err = BadKey;

    fn from_str(s: &str) -> Result<Self, BadKey> {
        parse(s).ok_or_else(|| BadKey(s.to_owned()))
    }
}

fn parse(s: &str) -> Option<Key> {
    if s == "mesh" {
        return Some(Key::Mesh);
    }
    let (kind, rest) = s.split_once('/')?;
    Some(match kind {
        "svc" => Key::Service(pair(rest)?),
        "ip" => Key::Ip(rest.parse().ok()?),
        "host" => {
            let (name, port) = rest.rsplit_once(':')?;
            Key::Host(part(name)?, port.parse().ok()?)
        }
        "self" => Key::SelfOf(part(rest)?),
        "filter" => {
            let ServiceKey { namespace, name } = pair(rest)?;
            Key::Filter(namespace, name)
        }
        "wasm" => {
            let hex = rest.len() == 64 && rest.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
            hex.then(|| Key::Wasm(rest.to_owned()))?
        }
        "endpoints" => {
            let (service, shard) = rest.rsplit_once('/')?;
            let (service, port) = service.rsplit_once(':')?;
            Key::Endpoints(pair(service)?, port.parse().ok()?, shard.parse().ok()?)
        }
        "bundle" => Key::Bundle(part(rest)?),
        _ => return None,
    })
}

fn part(s: &str) -> Option<String> {
    (!s.is_empty() && !s.contains('/')).then(|| s.to_owned())
}

fn pair(s: &str) -> Option<ServiceKey> {
    let (namespace, name) = s.split_once('/')?;
    Some(ServiceKey { namespace: part(namespace)?, name: part(name)? })
}

/// What an application means by an authority: a service of the mesh, or some other host. Both with the port
/// that was written, if one was.
///
/// One label is a service of `own_namespace`; two are `service.namespace`; `service.namespace.svc` may be followed by
/// any domain (`cluster.local`). Letter case and one trailing dot do not count. IP literals are other hosts.
///
/// Returns `None` for an authority that is malformed (empty, with user info, or with a port that is no number).
pub fn canonicalise(authority: &str, own_namespace: &str) -> Option<(Named, Option<u16>)> {
    let authority: http::uri::Authority = authority.parse().ok()?;
    if authority.as_str().contains('@') {
        return None;
    }
    let port = authority.port_u16();
    if port.is_none() && authority.as_str().trim_end_matches(']').contains(':') && !authority.host().starts_with('[') {
        return None;
    }
    let host = authority.host().to_ascii_lowercase();
    let host = host.strip_suffix('.').unwrap_or(&host);
    if host.is_empty() {
        return None;
    }
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    if bare.parse::<std::net::IpAddr>().is_ok() {
        return Some((Named::Host(bare.to_owned()), port));
    }
    let labels: Vec<&str> = host.split('.').collect();
    if labels.iter().any(|label| label.is_empty()) {
        return None;
    }
    let service = |name: &str, namespace: &str| {
        Named::Service(ServiceKey { namespace: namespace.to_owned(), name: name.to_owned() })
    };
    let named = match labels.as_slice() {
        [name] => service(name, own_namespace),
        [name, namespace] | [name, namespace, "svc", ..] => service(name, namespace),
        _ => Named::Host(host.to_owned()),
    };
    Some((named, port))
}

/// The result of [`canonicalise`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Named {
    /// A name of the mesh's form
    Service(ServiceKey),
    /// Any other host: lower case, no trailing dot, no brackets
    Host(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(namespace: &str, name: &str) -> Named {
        Named::Service(ServiceKey { namespace: namespace.into(), name: name.into() })
    }

    #[test]
    fn keys_read_back_as_written() {
        for text in [
            "svc/demo/reviews",
            "ip/10.0.0.1:80",
            "ip/[::1]:80",
            "host/example.com:443",
            "self/reviews-v1-0",
            "filter/demo/cohort",
            "endpoints/demo/reviews:8080/3",
            "bundle/cluster.local",
            "mesh",
            "wasm/0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
        ] {
            assert_eq!(text.parse::<Key>().unwrap().to_string(), text);
        }
        for text in
            ["", "svc/demo", "svc//x", "svc/a/b/c", "ip/10.0.0.1", "wasm/abc", "other/x", "endpoints/demo/reviews/0"]
        {
            assert_eq!(text.parse::<Key>(), Err(BadKey(text.into())), "{text}");
        }
    }

    #[test]
    fn names_are_canonicalised() {
        for (authority, named, port) in [
            ("reviews", service("demo", "reviews"), None),
            ("Reviews.:8080", service("demo", "reviews"), Some(8080)),
            ("reviews.other", service("other", "reviews"), None),
            ("reviews.other.svc", service("other", "reviews"), None),
            ("reviews.other.svc.cluster.local:80", service("other", "reviews"), Some(80)),
            ("www.example.com", Named::Host("www.example.com".into()), None),
            ("10.0.0.1:80", Named::Host("10.0.0.1".into()), Some(80)),
            ("[::1]:80", Named::Host("::1".into()), Some(80)),
        ] {
            assert_eq!(canonicalise(authority, "demo"), Some((named, port)), "{authority}");
        }
        for authority in ["", "a..b", "user@reviews", "reviews:", "reviews:99999", "."] {
            assert_eq!(canonicalise(authority, "demo"), None, "{authority}");
        }
    }
}
