//! What others send to the application.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use outrigger_core::detect::{Detected, Hello, sni};
use outrigger_core::link::{MtlsMode, Protocol};
use tokio::net::TcpStream;

use super::handoff::Known;
use super::peek::{Seen, look};
use super::{Inbound, Version, original};
use crate::flags::{App, Intercept, Settings};
use crate::identity::Identity;
use crate::io::Io;
use crate::metrics::Metric;
use crate::tls::{self, Peer};
use crate::worker::Worker;

/// A client silent for this long is opaque, and judged as TCP.
const SILENCE: Duration = Duration::from_millis(250);
/// How long a connection may stay open before its first request, where HTTP is declared.
const IDLE: Duration = Duration::from_secs(300);
const HANDSHAKE: Duration = Duration::from_secs(10);

/// Why a connection is closed without a byte.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("port {0} is not declared with --app")]
    Undeclared(u16),
    #[error("without a mesh server name, more than one --app could be meant")]
    Ambiguous,
    #[error("the server name is for port {0}, the connection for port {1}")]
    Mismatch(u16, u16),
    #[error("what this workload enforces is not known yet")]
    NotConfigured,
    #[error("plaintext on a Strict port")]
    Plaintext,
    #[error("the destination is this proxy itself")]
    Own,
    #[error(transparent)]
    Tls(#[from] tls::TlsError),
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl Refusal {
    /// For the metric: a fixed set of words.
    fn word(&self) -> &'static str {
        match self {
            Self::Undeclared(_) => "undeclared-port",
            Self::Ambiguous => "ambiguous-port",
            Self::Mismatch(..) => "port-mismatch",
            Self::NotConfigured => "not-configured",
            Self::Plaintext => "mtls-required",
            Self::Own => "own-port",
            Self::Tls(error) => error.cause(),
            Self::Io(_) => "io",
        }
    }
}

/// Finds out what a caller speaks, to which port, and who it is.
pub(super) async fn accept(worker: Rc<Worker>, stream: TcpStream) -> Known {
    let client = match stream.peer_addr() {
        Ok(client) => original::plain(client),
        Err(error) => {
            tracing::debug!(%error, "an inbound connection was gone at once");
            return Known::Over;
        }
    };
    judge(&worker, stream, client).await.unwrap_or_else(|refusal| {
        worker.metrics.add(Metric::Refused, &["inbound", refusal.word()], 1);
        let said = worker.refusals.borrow_mut().say(Instant::now());
        if let Some(unsaid) = said {
            tracing::warn!(%client, reason = %refusal, unsaid, "inbound connection refused");
        }
        Known::Over
    })
}

async fn judge(worker: &Rc<Worker>, stream: TcpStream, client: SocketAddr) -> Result<Known, Refusal> {
    let meant = meant(worker, &stream)?;
    let silence = match meant.as_ref().and_then(|app| port(worker, app)) {
        Some((Protocol::Http1 | Protocol::Http2, _)) => IDLE,
        _ => SILENCE,
    };
    match look(&stream, silence).await? {
        Seen::Closed => Ok(Known::Over),
        Seen::Speaks(Detected::Tls(hello)) => encrypted(worker, stream, client, meant, &hello).await,
        Seen::Speaks(detected) => plaintext(worker, stream, client, meant, Some(detected)),
        Seen::Silent => plaintext(worker, stream, client, meant, None),
    }
}

/// The application's port that the original destination means; `None` without interception.
fn meant(worker: &Worker, stream: &TcpStream) -> Result<Option<App>, Refusal> {
    let settings = &worker.proxy.settings;
    if settings.intercept == Intercept::None {
        return Ok(None);
    }
    let local = original::plain(stream.local_addr()?);
    // Not redirected: somebody dialled the inbound port itself, which with interception nobody is told to.
    let destination = original::destination(stream, local).map_err(|_| Refusal::Own)?;
    if settings.own_ports().contains(&destination.port()) {
        return Err(Refusal::Own);
    }
    declared(settings, destination.port()).map(Some)
}

fn declared(settings: &Settings, port: u16) -> Result<App, Refusal> {
    settings.app(port).cloned().ok_or(Refusal::Undeclared(port))
}

/// The only application there is.
fn only(settings: &Settings) -> Result<App, Refusal> {
    match settings.apps.as_slice() {
        [app] => Ok(app.clone()),
        _ => Err(Refusal::Ambiguous),
    }
}

/// Protocol and mTLS mode of the application's port. The command line's protocol is what was registered.
fn port(worker: &Worker, app: &App) -> Option<(Protocol, MtlsMode)> {
    let snapshot = worker.snapshot();
    let port = snapshot.inbound.as_ref()?.port(app.address.port())?;
    let protocol = if port.protocol == Protocol::Detect { app.protocol } else { port.protocol };
    Some((protocol, port.mtls))
}

async fn encrypted(
    worker: &Worker,
    stream: TcpStream,
    client: SocketAddr,
    meant: Option<App>,
    hello: &Hello,
) -> Result<Known, Refusal> {
    let settings = &worker.proxy.settings;
    let app = match (hello.sni.as_deref().and_then(sni::parse), meant) {
        (Some(named), Some(meant)) if named.port != meant.address.port() => {
            return Err(Refusal::Mismatch(named.port, meant.address.port()));
        }
        (_, Some(meant)) => meant,
        (Some(named), None) => declared(settings, named.port)?,
        (None, None) => only(settings)?,
    };
    let (protocol, mode) = port(worker, &app).ok_or(Refusal::NotConfigured)?;
    if mode != MtlsMode::Strict && !hello.is_mesh() {
        // The application's own TLS.
        return Ok(Known::inbound(stream, Inbound { client, app, peer: None }, None));
    }
    let identity = worker.proxy.identity.required()?;
    let (io, peer, version) = Box::pin(handshake(stream, &identity, protocol)).await?;
    worker.metrics.add(Metric::TlsConnections, &["inbound", peer.identity.as_str()], 1);
    if peer.resumed {
        worker.metrics.add(Metric::TlsResumed, &["inbound"], 1);
    }
    Ok(Known::inbound(io, Inbound { client, app, peer: Some(Arc::new(peer)) }, version))
}

/// Accepts mesh TLS. Boxed by its caller, since it is large and soon over.
async fn handshake(
    stream: TcpStream,
    identity: &Identity,
    protocol: Protocol,
) -> Result<(Io, Peer, Option<Version>), Refusal> {
    let (stream, peer) = tls::accept(stream, identity, HANDSHAKE).await?;
    // A declared protocol always wins: a peer may not call HTTP opaque to get around what is judged and filtered as HTTP.
    let version = match (protocol, stream.get_ref().1.alpn_protocol()) {
        (Protocol::Tcp, _) => None,
        (_, Some(tls::ALPN_H2)) | (Protocol::Http2, _) => Some(Version::Http2),
        (_, Some(tls::ALPN_HTTP1)) | (Protocol::Http1, _) => Some(Version::Http1),
        (Protocol::Detect, _) => None,
    };
    Ok((Io::from(stream), peer, version))
}

fn plaintext(
    worker: &Worker,
    stream: TcpStream,
    client: SocketAddr,
    meant: Option<App>,
    detected: Option<Detected>,
) -> Result<Known, Refusal> {
    let app = match meant {
        Some(app) => app,
        None => only(&worker.proxy.settings)?,
    };
    let (protocol, mode) = port(worker, &app).ok_or(Refusal::NotConfigured)?;
    let version = match (protocol, detected) {
        (Protocol::Http1, _) => Some(Version::Http1),
        (Protocol::Http2, _) | (Protocol::Detect, Some(Detected::Http2)) => Some(Version::Http2),
        (Protocol::Detect, Some(Detected::Http1)) => Some(Version::Http1),
        (Protocol::Tcp | Protocol::Detect, _) => None,
    };
    if version.is_none() && mode == MtlsMode::Strict {
        return Err(Refusal::Plaintext);
    }
    // On a Strict port HTTP is answered with a reason, request by request.
    Ok(Known::inbound(stream, Inbound { client, app, peer: None }, version))
}
