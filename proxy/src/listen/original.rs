//! Where a redirected connection was meant to go.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;

use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::{Ip6tOriginalDst, OriginalDst};

/// The original destination, from the kernel's connection tracking.
///
/// # Errors
/// When the connection was not redirected, or the kernel has no connection tracking.
pub(super) fn destination<S: AsFd>(socket: &S, local: SocketAddr) -> io::Result<SocketAddr> {
    // A dual-stack listener shows IPv4 clients as v4-mapped; their redirection is IPv4's.
    if plain(local).is_ipv4() {
        let raw = getsockopt(socket, OriginalDst)?;
        let ip = Ipv4Addr::from(u32::from_be(raw.sin_addr.s_addr));
        return Ok((ip, u16::from_be(raw.sin_port)).into());
    }
    let raw = getsockopt(socket, Ip6tOriginalDst)?;
    Ok(plain((Ipv6Addr::from(raw.sin6_addr.s6_addr), u16::from_be(raw.sin6_port)).into()))
}

/// Without the v4-mapping of dual-stack sockets.
pub(super) fn plain(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V6(ip) => ip.to_ipv4_mapped().map_or(address, |ip| (ip, address.port()).into()),
        IpAddr::V4(_) => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_addresses_are_unmapped() {
        assert_eq!(plain("[::ffff:10.0.0.1]:80".parse().unwrap()), "10.0.0.1:80".parse().unwrap());
        assert_eq!(plain("[::1]:80".parse().unwrap()), "[::1]:80".parse().unwrap());
    }
}
