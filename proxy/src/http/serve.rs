//! A client's connection: HTTP/1 or HTTP/2 by hyper, its limits, and its end when the proxy drains.

use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};

use super::head::{Guarded, Times};
use super::{Connection, ConnectionInfo, Way, exchange};
use crate::coalesce::coalesce;
use crate::io::Io;
use crate::listen::Version;
use crate::metrics::Metric;
use crate::tls;
use crate::upstream::LocalExecutor;
use crate::worker::Worker;

/// Header block, bytes.
pub(super) const MAX_HEAD: usize = 64 * 1024;
const IDLE_TIMEOUT: Duration = Duration::from_secs(300);
/// Streams of one client's connection.
const MAX_STREAMS: u32 = 250;
/// Streams that a client may have reset before we saw them, and that we reset for its errors: more is abuse.
const MAX_RESETS: usize = 100;
const STREAM_WINDOW: u32 = 256 * 1024;
const CONNECTION_WINDOW: u32 = 1024 * 1024;
/// Bytes of responses held per stream while a client's window is closed.
const SEND_BUFFER: usize = 64 * 1024;
const PING_EVERY: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// Serves one connection until it ends, or the proxy drains.
pub async fn serve(io: Io, info: ConnectionInfo, version: Version, worker: Rc<Worker>) {
    let connection = Rc::new(Connection::new(info, worker));
    let protocol = match version {
        Version::Http1 => "http/1.1",
        Version::Http2 => "h2",
    };
    let _open = connection.worker.metrics.hold(Metric::Connections, &[connection.way().name(), protocol]);
    let ended = match version {
        Version::Http1 => serve_http1(io, &connection).await,
        Version::Http2 => serve_http2(io, &connection).await,
    };
    if let Err(error) = ended {
        tracing::debug!(client = %connection.client(), %error, "a client's connection ended with an error");
    }
}

async fn serve_http1(io: Io, connection: &Rc<Connection>) -> hyper::Result<()> {
    let times = Times { head: connection.worker.proxy.settings.header_timeout, idle: IDLE_TIMEOUT };
    let io = Guarded::new(io, connection.phase.clone(), times);
    let service = {
        let connection = connection.clone();
        service_fn(move |request| exchange::handle(connection.clone(), request))
    };
    let mut builder = http1::Builder::new();
    // Header fields: hyper's own limit of 100, which it keeps with less work than the same limit given to it.
    builder.max_header_size(MAX_HEAD).max_buf_size(2 * MAX_HEAD).timer(TokioTimer::new());
    builder.auto_date_header(false).header_read_timeout(None);
    let serving = builder.serve_connection(TokioIo::new(io), service).with_upgrades();
    let mut serving = std::pin::pin!(serving);
    until_drained(connection, serving.as_mut(), http1::UpgradeableConnection::graceful_shutdown).await
}

async fn serve_http2(io: Io, connection: &Rc<Connection>) -> hyper::Result<()> {
    let service = {
        let connection = connection.clone();
        // Boxed: hyper and tokio move each stream's task several times before it runs.
        service_fn(move |request| Box::pin(exchange::handle(connection.clone(), request)))
    };
    let mut builder = http2::Builder::new(LocalExecutor);
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        // Twice the limit: h2 answers what is above with a bare 431, what is between gets one that says why.
        .max_header_list_size(u32::try_from(2 * MAX_HEAD).unwrap_or(u32::MAX))
        .max_pending_accept_reset_streams(MAX_RESETS)
        .max_local_error_reset_streams(MAX_RESETS)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buf_size(SEND_BUFFER)
        .auto_date_header(false)
        .keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_TIMEOUT);
    let (io, flusher) = coalesce(io);
    let serving = async {
        let mut serving = std::pin::pin!(builder.serve_connection(TokioIo::new(io), service));
        let idle = idle(connection);
        tokio::select! {
            ended = until_drained(connection, serving.as_mut(), http2::Connection::graceful_shutdown) => return ended,
            () = idle => {}
        }
        serving.as_mut().graceful_shutdown();
        let last = tokio::time::timeout(PING_TIMEOUT, serving);
        last.await.unwrap_or(Ok(()))
    };
    flusher.around(serving).await
}

/// Ready when no stream was open for the idle timeout. HTTP/1 connections are watched by their guard.
async fn idle(connection: &Connection) {
    let mut seen = 0;
    loop {
        tokio::time::sleep(IDLE_TIMEOUT).await;
        let requests = connection.requests.get();
        if connection.running.get() == 0 && requests == seen {
            return;
        }
        seen = requests;
    }
}

/// Polls a connection to its end. When the proxy drains or its peer stops being trusted, it is asked to end after what runs;
/// when that takes too long, it is dropped.
async fn until_drained<C>(
    connection: &Connection,
    mut serving: Pin<&mut C>,
    shut_down: impl Fn(Pin<&mut C>),
) -> C::Output
where
    C: Future<Output = hyper::Result<()>>,
{
    let drain = &connection.worker.drain;
    let inbound = connection.way() == Way::Inbound;
    let mut grace = Duration::MAX;
    tokio::select! {
        biased;
        ended = serving.as_mut() => return ended,
        () = drain.closing(inbound) => shut_down(serving.as_mut()),
        () = untrusted(connection) => {
            grace = tls::GRACE;
            shut_down(serving.as_mut());
        }
    }
    tokio::select! {
        biased;
        ended = serving => ended,
        () = drain.cut() => Ok(()),
        () = tokio::time::sleep(grace) => Ok(()),
    }
}

/// Ready when what the peer proved holds no longer; never for plaintext.
async fn untrusted(connection: &Connection) {
    let Some(peer) = connection.proof() else { return std::future::pending().await };
    let why = peer.ended(&connection.worker.proxy.identity).await;
    tracing::info!(client = %connection.client(), peer = %peer.identity, ?why, "a peer is no longer trusted: its connection ends");
}
