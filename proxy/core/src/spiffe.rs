//! SPIFFE IDs of workloads: `spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>`.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::str::FromStr;
use std::sync::Arc;

/// The identity of a workload. Cheap to clone; comparing and printing it formats nothing.
#[derive(Debug, Clone)]
pub struct SpiffeId {
    uri: Arc<str>,
    /// End of the trust domain, and of the namespace, in `uri`.
    domain_end: usize,
    namespace_end: usize,
}

/// A string that is no workload's SPIFFE ID.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("`{0}` is not a workload's SPIFFE ID; the form is spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>")]
pub struct BadSpiffeId(pub String);

const SCHEME: &str = "spiffe://";
/// The SPIFFE specification's own limit, in bytes.
const MAX: usize = 2048;

impl SpiffeId {
    /// The identity of a service account.
    ///
    /// # Errors
    /// When a part is empty or has characters that a SPIFFE ID must not have.
    pub fn new(trust_domain: &str, namespace: &str, service_account: &str) -> Result<Self, BadSpiffeId> {
        format!("{SCHEME}{trust_domain}/ns/{namespace}/sa/{service_account}").parse()
    }

    /// The whole URI.
    pub fn as_str(&self) -> &str {
        &self.uri
    }

    /// Trust domain, as `cluster.local`.
    pub fn trust_domain(&self) -> &str {
        &self.uri[SCHEME.len()..self.domain_end]
    }

    /// Kubernetes namespace.
    pub fn namespace(&self) -> &str {
        &self.uri[self.domain_end + "/ns/".len()..self.namespace_end]
    }

    /// Service account.
    pub fn service_account(&self) -> &str {
        &self.uri[self.namespace_end + "/sa/".len()..]
    }
}

impl FromStr for SpiffeId {
    type Err = BadSpiffeId;

    fn from_str(s: &str) -> Result<Self, BadSpiffeId> {
        let parts = || {
            let rest = s.strip_prefix(SCHEME).filter(|_| s.len() <= MAX)?;
            let (domain, rest) = rest.split_once("/ns/")?;
            let (namespace, account) = rest.split_once("/sa/")?;
            let domain_ok = domain.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_'));
            (domain_ok && !domain.is_empty() && segment(namespace) && segment(account))
                .then_some((domain.len(), namespace.len()))
        };
        let (domain, namespace) = parts().ok_or_else(|| BadSpiffeId(s.to_owned()))?;
        let domain_end = SCHEME.len() + domain;
        Ok(Self { uri: s.into(), domain_end, namespace_end: domain_end + "/ns/".len() + namespace })
    }
}

/// One path segment: the characters SPIFFE allows, and no relative segment.
fn segment(s: &str) -> bool {
    !matches!(s, "" | "." | "..") && s.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri)
    }
}

impl PartialEq for SpiffeId {
    fn eq(&self, other: &Self) -> bool {
        self.uri == other.uri
    }
}

impl Eq for SpiffeId {}

impl Hash for SpiffeId {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.uri.hash(state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_back_as_written() {
        let id = SpiffeId::new("cluster.local", "demo", "reviews").unwrap();
        assert_eq!(id.to_string(), "spiffe://cluster.local/ns/demo/sa/reviews");
        assert_eq!((id.trust_domain(), id.namespace(), id.service_account()), ("cluster.local", "demo", "reviews"));
        assert_eq!(id, id.as_str().parse().unwrap());
    }

    #[test]
    fn refuses_what_is_no_workload() {
        for text in [
            "",
            "https://cluster.local/ns/a/sa/b",
            "spiffe:///ns/a/sa/b",
            "spiffe://td/ns//sa/b",
            "spiffe://td/ns/a/sa/",
            "spiffe://td/ns/a/sa/b/c",
            "spiffe://td/ns/a/b/sa/c",
            "spiffe://td/ns/../sa/c",
            "spiffe://TD/ns/a/sa/b",
            "spiffe://td/ns/a%41/sa/b",
            "spiffe://td/ns/a/sa/b?x",
            "spiffe://user@td/ns/a/sa/b",
        ] {
            assert_eq!(text.parse::<SpiffeId>(), Err(BadSpiffeId(text.into())), "{text}");
        }
    }
}
