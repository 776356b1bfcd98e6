//! Who speaks first: destinations whose servers were seen to, so that their connections need not wait for silence.
//!
//! Only outbound, where discovery declares no protocol. What was learned is of one worker, expires, and is forgotten as
//! soon as a client speaks first after all.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// How long it holds after it was last seen.
pub const LEARNED: Duration = Duration::from_secs(600);
/// Destinations remembered; what does not fit waits for silence, as before.
pub const CAPACITY: usize = 1024;

/// Which side of a stream sent its first byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Speaker {
    /// The side that connected
    Client,
    /// The side that was connected to
    Server,
}

/// Destinations whose servers speak first, as far as one worker has seen.
#[derive(Debug, Default)]
pub struct ServerFirst {
    until: HashMap<SocketAddr, Instant>,
}

impl ServerFirst {
    /// Whether the server at this destination is known to speak first.
    pub fn knows(&self, destination: SocketAddr, now: Instant) -> bool {
        self.until.get(&destination).is_some_and(|until| now < *until)
    }

    /// How many destinations are remembered, expired ones included.
    pub fn remembered(&self) -> usize {
        self.until.len()
    }

    /// Takes note of who spoke first on an opaque stream to this destination.
    pub fn heard(&mut self, destination: SocketAddr, speaker: Speaker, now: Instant) {
        if speaker == Speaker::Client {
            self.until.remove(&destination);
            return;
        }
        if self.until.len() >= CAPACITY && !self.until.contains_key(&destination) {
            self.until.retain(|_, until| now < *until);
            if self.until.len() >= CAPACITY {
                return;
            }
        }
        self.until.insert(destination, now + LEARNED);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn destination(port: u16) -> SocketAddr {
        ([10, 0, 0, 1], port).into()
    }

    #[test]
    fn a_server_that_spoke_first_is_known_until_it_expires() {
        let start = Instant::now();
        let mut first = ServerFirst::default();
        assert!(!first.knows(destination(25), start));

        first.heard(destination(25), Speaker::Server, start);
        assert!(first.knows(destination(25), start));
        assert!(!first.knows(destination(26), start), "another port is another server");
        assert!(first.knows(destination(25), start + LEARNED - Duration::from_millis(1)));
        assert!(!first.knows(destination(25), start + LEARNED));

        first.heard(destination(25), Speaker::Server, start + LEARNED / 2);
        assert!(first.knows(destination(25), start + LEARNED), "seen again, it holds for longer");
    }

    #[test]
    fn a_client_that_speaks_first_teaches_nothing_and_unteaches() {
        let start = Instant::now();
        let mut first = ServerFirst::default();
        first.heard(destination(80), Speaker::Client, start);
        assert!(!first.knows(destination(80), start));
        first.heard(destination(80), Speaker::Server, start);
        first.heard(destination(80), Speaker::Client, start);
        assert!(!first.knows(destination(80), start));
    }

    #[test]
    fn memory_is_bounded_and_what_expired_makes_room() {
        let start = Instant::now();
        let mut first = ServerFirst::default();
        let ports = || 1..=u16::try_from(CAPACITY).unwrap();
        for port in ports() {
            first.heard(destination(port), Speaker::Server, start);
        }
        first.heard(destination(9000), Speaker::Server, start);
        assert!(!first.knows(destination(9000), start));
        assert!(ports().all(|port| first.knows(destination(port), start)));

        first.heard(destination(9000), Speaker::Server, start + LEARNED);
        assert!(first.knows(destination(9000), start + LEARNED));
        assert_eq!(first.remembered(), 1);
    }
}
