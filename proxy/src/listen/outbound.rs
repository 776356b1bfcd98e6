//! What the application sends.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::rc::Rc;
use std::time::{Duration, Instant};

use outrigger_core::detect::Detected;
use outrigger_core::key::Key;
use outrigger_core::link::Protocol;
use tokio::net::TcpStream;

use super::handoff::Known;
use super::peek::{Seen, look};
use super::{Outbound, Version, original};
use crate::flags::Intercept;
use crate::metrics::Metric;
use crate::snapshot::Target;
use crate::worker::Worker;

/// A client silent for this long waits for the server to speak first.
const SILENCE: Duration = Duration::from_millis(250);
/// How long a connection may stay open before its first request, where only HTTP can come.
const IDLE: Duration = Duration::from_secs(300);

/// Finds out what the application speaks on a connection, and to whom.
pub(super) async fn accept(worker: Rc<Worker>, stream: TcpStream) -> Known {
    judge(&worker, stream).await.unwrap_or_else(|error| {
        tracing::debug!(%error, "an outbound connection ended before its protocol was known");
        Known::Over
    })
}

async fn judge(worker: &Worker, stream: TcpStream) -> io::Result<Known> {
    let client = original::plain(stream.peer_addr()?);
    let local = original::plain(stream.local_addr()?);
    if worker.proxy.settings.intercept == Intercept::None {
        return explicit(stream, client).await;
    }
    let destination = original::destination(&stream, local)?;
    if destination == local || is_own(worker, destination, local) {
        worker.metrics.add(Metric::Refused, &["outbound", "own-port"], 1);
        let said = worker.refusals.borrow_mut().say(Instant::now());
        if let Some(unsaid) = said {
            tracing::warn!(%client, %destination, unsaid, "refused: the destination is this proxy itself");
        }
        return Ok(Known::Over);
    }
    let info = Outbound { client, destination: Some(destination) };
    // Boxed: waiting for discovery is rare and takes room.
    let version = match Box::pin(declared(worker, destination)).await {
        Protocol::Http1 => Some(Version::Http1),
        Protocol::Http2 => Some(Version::Http2),
        Protocol::Tcp => None,
        Protocol::Detect => match look(&stream, silence(worker, destination)).await? {
            Seen::Closed => return Ok(Known::Over),
            Seen::Speaks(Detected::Http1) => Some(Version::Http1),
            Seen::Speaks(Detected::Http2) => Some(Version::Http2),
            Seen::Speaks(Detected::Tls(_) | Detected::Opaque) | Seen::Silent => None,
        },
    };
    Ok(Known::outbound(stream, info, version))
}

/// Where the server is known to speak first, only a client that has spoken already is listened to.
fn silence(worker: &Worker, destination: SocketAddr) -> Duration {
    let known = worker.server_first.borrow().knows(destination, Instant::now());
    if known { Duration::ZERO } else { SILENCE }
}

/// Without interception only HTTP says where it goes.
async fn explicit(stream: TcpStream, client: SocketAddr) -> io::Result<Known> {
    let version = match look(&stream, IDLE).await? {
        Seen::Closed | Seen::Silent => return Ok(Known::Over),
        Seen::Speaks(Detected::Http2) => Version::Http2,
        // Broken HTTP included: it is answered with a reason.
        Seen::Speaks(Detected::Http1 | Detected::Opaque) => Version::Http1,
        Seen::Speaks(Detected::Tls(_)) => {
            tracing::warn!(%client, "refused: TLS on the outbound port; send plaintext HTTP, the sidecar encrypts it");
            return Ok(Known::Over);
        }
    };
    Ok(Known::outbound(stream, Outbound { client, destination: None }, Some(version)))
}

/// The protocol that discovery declares for a destination. Nothing known: detect, and the data path says why it refuses.
async fn declared(worker: &Worker, destination: SocketAddr) -> Protocol {
    match worker.find(&Key::Ip(destination)).await {
        Ok((_, Target::Service(service))) => service
            .ports
            .iter()
            .find(|port| port.number == destination.port())
            .map_or(Protocol::Detect, |port| port.protocol),
        Ok((_, Target::Workload(workload))) => workload.protocol,
        Ok((_, Target::Absent)) | Err(_) => Protocol::Detect,
    }
}

/// One of this proxy's own ports: what is sent there would come back.
fn is_own(worker: &Worker, destination: SocketAddr, local: SocketAddr) -> bool {
    let own = worker.proxy.settings.own_ports().contains(&destination.port());
    own && (destination.ip() == local.ip() || is_of_this_host(destination.ip()))
}

/// Exactly the addresses of this host can be bound.
fn is_of_this_host(ip: IpAddr) -> bool {
    UdpSocket::bind((ip, 0)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_addresses_are_told_from_others() {
        assert!(is_of_this_host("127.0.0.1".parse().unwrap()));
        assert!(is_of_this_host("127.8.8.8".parse().unwrap()), "the whole loopback network is this host");
        assert!(!is_of_this_host("192.0.2.1".parse().unwrap()));
    }
}
