//! What filters may know of the exchange they are in.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

/// What is known of a client's connection. Nothing is computed before a filter asks for it. What is not known is `None`, never
/// guessed.
pub trait ConnectionFacts: std::fmt::Debug {
    /// True: on the way to this workload's application. False: from it
    fn inbound(&self) -> bool;
    /// The client's address
    fn source(&self) -> Option<SocketAddr>;
    /// The address the client called (the original destination where there is one)
    fn destination(&self) -> Option<SocketAddr>;
    /// SPIFFE ID that the client proved
    fn peer_identity(&self) -> Option<&str>;
    /// SPIFFE ID of this proxy, where the connection is mTLS
    fn local_identity(&self) -> Option<String>;
    /// SNI of the client's TLS connection
    fn server_name(&self) -> Option<&str>;
    /// Number of the client's connection, unique in this process
    fn id(&self) -> u64;
    /// Name of this workload
    fn workload(&self) -> &str;
    /// Namespace of this workload
    fn namespace(&self) -> &str;
}

/// Facts of one exchange, from which filters' properties are read.
#[derive(Debug, Clone)]
pub struct StreamInfo {
    /// Of the client's connection
    pub connection: Rc<dyn ConnectionFacts>,
    /// When the request head was complete
    pub start: Instant,
    /// The endpoint that was chosen; set before response callbacks
    pub upstream: Option<SocketAddr>,
    /// `<namespace>/<name>` of the service
    pub service: Option<Arc<str>>,
    /// Name of the rule that was chosen
    pub route: Option<Arc<str>>,
}

impl StreamInfo {
    /// Of an exchange that begins now.
    pub fn new(connection: Rc<dyn ConnectionFacts>, start: Instant) -> Self {
        Self { connection, start, upstream: None, service: None, route: None }
    }

    /// `http` or `https`, as the client spoke.
    pub fn scheme(&self) -> &'static str {
        if self.connection.peer_identity().is_some() { "https" } else { "http" }
    }

    /// [`start`](Self::start) by the wall clock.
    pub fn started(&self) -> SystemTime {
        SystemTime::now().checked_sub(self.start.elapsed()).unwrap_or(SystemTime::UNIX_EPOCH)
    }
}

impl Default for StreamInfo {
    fn default() -> Self {
        Self::new(Rc::new(StaticConnection::default()), Instant::now())
    }
}

/// Facts that somebody wrote down: for runs of filters without a proxy.
#[derive(Debug, Clone, Default)]
#[allow(missing_docs)] // See the trait.
pub struct StaticConnection {
    pub inbound: bool,
    pub source: Option<SocketAddr>,
    pub destination: Option<SocketAddr>,
    pub peer_identity: Option<String>,
    pub local_identity: Option<String>,
    pub server_name: Option<String>,
    pub id: u64,
    pub workload: String,
    pub namespace: String,
}

impl ConnectionFacts for StaticConnection {
    fn inbound(&self) -> bool {
        self.inbound
    }

    fn source(&self) -> Option<SocketAddr> {
        self.source
    }

    fn destination(&self) -> Option<SocketAddr> {
        self.destination
    }

    fn peer_identity(&self) -> Option<&str> {
        self.peer_identity.as_deref()
    }

    fn local_identity(&self) -> Option<String> {
        self.local_identity.clone()
    }

    fn server_name(&self) -> Option<&str> {
        self.server_name.as_deref()
    }

    fn id(&self) -> u64 {
        self.id
    }

    fn workload(&self) -> &str {
        &self.workload
    }

    fn namespace(&self) -> &str {
        &self.namespace
    }
}

/// Bytes that filters of one exchange may set as properties, names and values together.
const STATE_LIMIT: usize = 64 * 1024;

/// Properties that filters set, shared along the chain of one exchange.
#[derive(Debug, Default)]
pub struct FilterState {
    entries: Vec<(Vec<u8>, Vec<u8>)>,
    size: usize,
}

impl FilterState {
    /// The value set under a name.
    pub fn get(&self, name: &[u8]) -> Option<&[u8]> {
        self.entries.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_slice())
    }

    /// Every name and value, in the order in which the names were set first.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.entries.iter().map(|(name, value)| (name.as_slice(), value.as_slice()))
    }

    /// Sets a value. False: the exchange's limit of 64 KiB is reached, and nothing changed.
    pub fn set(&mut self, name: &[u8], value: &[u8]) -> bool {
        let old = self.entries.iter().position(|(key, _)| key == name);
        let freed = old.map_or(0, |at| name.len() + self.entries.get(at).map_or(0, |(_, value)| value.len()));
        let size = self.size - freed + name.len() + value.len();
        if size > STATE_LIMIT {
            return false;
        }
        self.size = size;
        match old.and_then(|at| self.entries.get_mut(at)) {
            Some(entry) => entry.1 = value.to_vec(),
            None => self.entries.push((name.to_vec(), value.to_vec())),
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_is_bounded_and_replaces() {
        let mut state = FilterState::default();
        assert!(state.set(b"a", b"1"));
        assert!(state.set(b"a", &[7; 60_000]));
        assert!(!state.set(b"b", &[7; 10_000]));
        assert_eq!(state.get(b"b"), None);
        assert!(state.set(b"a", b"2"));
        assert!(state.set(b"b", &[7; 10_000]));
        assert_eq!(state.get(b"a"), Some(&b"2"[..]));
        assert_eq!(
            state.iter().map(|(name, value)| (name, value.len())).collect::<Vec<_>>(),
            [(&b"a"[..], 1), (b"b", 10_000)]
        );
    }
}
