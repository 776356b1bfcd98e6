//! What filters may know of the exchange they are in.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use http::{request, response};

/// Facts of one exchange, from which filters' properties are read. Absent facts are `None`, never guessed.
#[derive(Debug, Clone)]
pub struct StreamInfo {
    /// True: on the way to this workload's application. False: from it.
    pub inbound: bool,
    /// The client's address
    pub source: Option<SocketAddr>,
    /// The address the client called (the original destination where there is one)
    pub destination: Option<SocketAddr>,
    /// The endpoint that was chosen; set before response callbacks
    pub upstream: Option<SocketAddr>,
    /// True: the client proved an identity
    pub mtls: bool,
    /// SPIFFE ID of the client
    pub peer_identity: Option<Arc<str>>,
    /// SPIFFE ID of this proxy
    pub local_identity: Option<Arc<str>>,
    /// SNI of the client's TLS connection
    pub server_name: Option<Arc<str>>,
    /// Number of the client's connection, unique in this process
    pub connection_id: u64,
    /// When the request head was complete
    pub start: SystemTime,
    /// `http` or `https`, as the client spoke
    pub scheme: &'static str,
    /// `<namespace>/<name>` of the service
    pub service: Option<Arc<str>>,
    /// Name of the rule that was chosen
    pub route: Option<Arc<str>>,
    /// Name of this workload
    pub workload: Arc<str>,
    /// Namespace of this workload
    pub namespace: Arc<str>,
}

impl Default for StreamInfo {
    fn default() -> Self {
        Self {
            inbound: false,
            source: None,
            destination: None,
            upstream: None,
            mtls: false,
            peer_identity: None,
            local_identity: None,
            server_name: None,
            connection_id: 0,
            start: SystemTime::UNIX_EPOCH,
            scheme: "http",
            service: None,
            route: None,
            workload: Arc::from(""),
            namespace: Arc::from(""),
        }
    }
}

/// Copies of the heads, as they left the chain.
#[derive(Debug, Default)]
pub struct Heads {
    /// After the request phase
    pub request: Option<Box<request::Parts>>,
    /// After the response phase
    pub response: Option<Box<response::Parts>>,
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
    }
}
