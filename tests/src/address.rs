//! Loopback addresses of one's own.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::process;
use std::sync::atomic::{AtomicU32, Ordering};

/// A loopback address (of 127.0.0.0/8) that no other test, process or instance uses while this value lives. Well-known
/// ports can be used on it, and no port has to be guessed free.
#[derive(Debug)]
pub struct Address {
    ip: Ipv4Addr,
    /// Held so that another process that draws the same address sees that it is taken.
    _claim: TcpListener,
}

impl Address {
    /// Claims one.
    pub fn claim() -> Self {
        // Below the ephemeral ports, and nobody's.
        const CLAIM_PORT: u16 = 9;
        static NEXT: AtomicU32 = AtomicU32::new(0);
        loop {
            let draw = process::id().wrapping_mul(97).wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));
            let [_, b, c, d] = draw.to_be_bytes();
            // 127.0.… is left to people and 127.255.… to broadcasts.
            let ip = Ipv4Addr::new(127, b.clamp(1, 254), c, d.clamp(1, 254));
            if let Ok(claim) = TcpListener::bind((ip, CLAIM_PORT)) {
                return Self { ip, _claim: claim };
            }
        }
    }

    /// The address.
    pub fn ip(&self) -> IpAddr {
        self.ip.into()
    }

    /// With a port.
    pub fn port(&self, port: u16) -> SocketAddr {
        (self.ip, port).into()
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.ip.fmt(f)
    }
}
