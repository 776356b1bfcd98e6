//! Mesh TLS of both directions: TLS 1.3, both sides with a certificate, each side's identity known before the first
//! byte of the application.

mod error;
mod known;
mod provider;
mod session;
mod stream;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod verifier;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use outrigger_core::chain::{Bundle, Fingerprint, Usage, Verified};
use outrigger_core::spiffe::SpiffeId;
use rustls::{CommonState, HandshakeKind};
use rustls_pki_types::{ServerName, UnixTime};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;

pub use error::TlsError;
pub use provider::provider;
pub(crate) use session::{Sessions, ticketer};
pub use stream::{Accepted, Dialled, Session, Stream};
pub(crate) use verifier::{ClientVerifier, ServerVerifier};

use crate::identity::{Identity, IdentityStore};

/// ALPN of HTTP/2 between sidecars.
pub const ALPN_H2: &[u8] = b"h2";
/// ALPN of HTTP/1.1 between sidecars.
pub const ALPN_HTTP1: &[u8] = b"http/1.1";
/// ALPN of opaque streams between sidecars.
pub const ALPN_TCP: &[u8] = b"outrigger-tcp";

/// What runs on a connection whose peer is no longer trusted may still end for this long. Tests wait for it.
pub(crate) const GRACE: Duration = if cfg!(test) { Duration::from_millis(200) } else { Duration::from_secs(10) };

/// The other side of a mesh connection, verified.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Its SPIFFE ID
    pub identity: SpiffeId,
    /// When the earliest certificate of its chain expires
    pub not_after: SystemTime,
    /// The root that its chain ends at
    pub root: Fingerprint,
    /// Whether the handshake resumed a session
    pub resumed: bool,
    /// `not_after` on the monotonic clock
    deadline: Instant,
}

/// Why a connection whose peer was fine must be drained now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The peer's certificate expired
    Expired,
    /// The trust bundle no longer has the peer's root
    RootDropped,
}

impl Peer {
    fn new(verified: Verified, resumed: bool, now: UnixTime) -> Self {
        // A certificate is good through its last second; so whoever was just let in has at least a second.
        let left = (u64::try_from(verified.not_after).unwrap_or(0) + 1).saturating_sub(now.as_secs());
        Self {
            identity: verified.identity,
            not_after: SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(verified.not_after).unwrap_or(0)),
            root: verified.root,
            resumed,
            deadline: Instant::now() + Duration::from_secs(left),
        }
    }

    /// When the peer's certificate expires, on the monotonic clock.
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Whether the peer has stopped being trusted at `now`.
    pub fn ended_at(&self, bundle: &Bundle, now: Instant) -> Option<Ended> {
        if now >= self.deadline {
            return Some(Ended::Expired);
        }
        (!bundle.contains(&self.root)).then_some(Ended::RootDropped)
    }

    /// Returns once the connection must be drained: at the expiry of the peer's certificate, or when the bundle drops
    /// its root. Cancel safe.
    pub async fn ended(&self, store: &IdentityStore) -> Ended {
        // Subscribed before the first look, so that no change falls in between.
        let mut changes = store.subscribe();
        loop {
            if let Some(ended) = self.ended_at(&store.bundle(), Instant::now()) {
                return ended;
            }
            tokio::select! {
                () = tokio::time::sleep_until(self.deadline) => {}
                changed = changes.changed() => if changed.is_err() {
                    tokio::time::sleep_until(self.deadline).await;
                },
            }
        }
    }
}

/// Returns when the connection of a peer that stopped being trusted must be cut: [`GRACE`] after it had to be drained. Never
/// for plaintext.
pub(crate) async fn cut(peer: Option<&Peer>, store: &IdentityStore) -> Ended {
    let Some(peer) = peer else { return std::future::pending().await };
    let ended = peer.ended(store).await;
    tokio::time::sleep(GRACE).await;
    ended
}

/// Where a mesh connection goes.
#[derive(Debug, Clone)]
pub struct Target<'a> {
    /// The address that was dialled: sessions are kept per address and SNI
    pub address: SocketAddr,
    /// `p<port>.<service>.<namespace>.outrigger.internal`
    pub sni: &'a str,
    /// Who must answer; exactly this
    pub expected: &'a SpiffeId,
    /// Offered, in order of preference; none: no ALPN
    pub alpn: &'a [&'a [u8]],
}

/// Accepts mesh TLS on `io`: the peer has shown a certificate of the current bundle. The protocol is in
/// `get_ref().1.alpn_protocol()`.
///
/// # Errors
/// See [`TlsError`]; `limit` bounds the handshake.
pub async fn accept<IO>(io: IO, identity: &Identity, limit: Duration) -> Result<(Accepted<IO>, Peer), TlsError>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let mut stream = Accepted::accepted(Arc::clone(identity.server_config()), io)?;
    tokio::time::timeout(limit, stream.handshake()).await.map_err(|_| TlsError::Timeout)??;
    let peer = judge(stream.get_ref().1, identity, Usage::Client)?;
    Ok((stream, peer))
}

/// Opens mesh TLS on `io`: the peer has shown a certificate of the current bundle for exactly `target.expected`.
///
/// # Errors
/// See [`TlsError`]; `limit` bounds the handshake.
pub async fn connect<IO>(
    io: IO,
    identity: &Identity,
    target: &Target<'_>,
    limit: Duration,
) -> Result<(Dialled<IO>, Peer), TlsError>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let name = ServerName::try_from(target.sni.to_owned()).map_err(|_| TlsError::Name(target.sni.to_owned()))?;
    // A copy is a dozen reference counts; it carries what differs by connection: protocols and the session store's key.
    let mut config = identity.client_config().as_ref().clone();
    config.alpn_protocols = target.alpn.iter().map(|protocol| protocol.to_vec()).collect();
    let sessions = identity.sessions().of(target.address);
    config.resumption = rustls::client::Resumption::store(Arc::clone(&sessions) as _);
    let mut stream = Dialled::dialled(Arc::new(config), name, io)?;
    tokio::time::timeout(limit, stream.handshake()).await.map_err(|_| TlsError::Timeout)??;
    let peer = judge(stream.get_ref().1, identity, Usage::Server)?;
    if peer.identity != *target.expected {
        return Err(TlsError::PeerIdentity { expected: target.expected.clone(), got: peer.identity });
    }
    // Tickets arrive with the first read, after this: none is kept from a peer that was not accepted.
    sessions.keep_until(peer.deadline.min(identity.deadline()));
    Ok((stream, peer))
}

/// The check after every handshake, resumed or not: a resumed one has called no verifier, and even in a full one the
/// bundle may have changed since.
fn judge(connection: &CommonState, identity: &Identity, usage: Usage) -> Result<Peer, TlsError> {
    let now = UnixTime::now();
    let chain = connection.peer_certificates().unwrap_or_default();
    let verified = known::verify(chain, &identity.bundle(), usage, now)?;
    let resumed = connection.handshake_kind() == Some(HandshakeKind::Resumed);
    Ok(Peer::new(verified, resumed, now))
}
