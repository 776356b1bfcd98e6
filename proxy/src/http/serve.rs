//! A client's connection: HTTP/1 or HTTP/2 by hyper, its limits, and its end when the proxy drains.

use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::server::conn::http1::{self, UpgradeableConnection};
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncWrite, ReadBuf};

use super::head::Guarded;
use super::idle::{Ask, Parked, Seated};
use super::{Connection, ConnectionInfo, exchange};
use crate::coalesce::coalesce;
use crate::io::Io;
use crate::listen::Version;
use crate::metrics::Metric;
use crate::upstream::LocalExecutor;
use crate::worker::Worker;

/// Header block, bytes.
pub(super) const MAX_HEAD: usize = 64 * 1024;
/// Without a request.
pub(super) const IDLE_TIMEOUT: Duration = Duration::from_secs(300);
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
    let connection = Rc::new(Connection::new(info, version, worker));
    let protocol = match version {
        Version::Http1 => "http/1.1",
        Version::Http2 => "h2",
    };
    let _open = connection.worker.metrics.hold(Metric::Connections, &[connection.way().name(), protocol]);
    let _seated = Seated::new(&connection);
    let ended = match version {
        Version::Http1 => serve_http1(io, &connection).await,
        Version::Http2 => Box::pin(serve_http2(io, &connection)).await,
    };
    if let Err(error) = ended {
        tracing::debug!(client = %connection.client(), %error, "a client's connection ended with an error");
    }
}

/// Serves requests while they come, and waits with as little as possible while none do.
async fn serve_http1(mut io: Io, connection: &Rc<Connection>) -> hyper::Result<()> {
    loop {
        // What hyper needs is gone when this has ended.
        let active = Box::pin(active(io, connection)).await;
        io = match active {
            Active::Idle(io) => io,
            Active::Ended(ended) => return ended,
        };
        if !io.has_unread() && !parked(&io, connection).await {
            let _ = std::future::poll_fn(|cx| Poll::Ready(Pin::new(&mut io).poll_shutdown(cx))).await;
            return Ok(());
        }
    }
}

/// How the service of a connection paused.
enum Active {
    /// No request runs, and nothing of one was read that is not given back
    Idle(Io),
    Ended(hyper::Result<()>),
}

/// Serves requests until the connection ends or is asked to park and can.
async fn active(io: Io, connection: &Rc<Connection>) -> Active {
    let limit = connection.worker.proxy.settings.header_timeout;
    let io = Guarded::new(io, connection.phase.clone(), limit);
    let service = {
        let connection = connection.clone();
        service_fn(move |request| exchange::handle(connection.clone(), request))
    };
    let mut builder = http1::Builder::new();
    // Header fields: hyper's own limit of 100, which it keeps with less work than the same limit given to it.
    builder.max_header_size(MAX_HEAD).max_buf_size(2 * MAX_HEAD);
    builder.auto_date_header(false).header_read_timeout(None);
    let mut serving = builder.serve_connection(TokioIo::new(io), service).with_upgrades();
    let paused = std::future::poll_fn(|cx| {
        let asked = connection.seat.asked(cx);
        if asked == Ask::Park {
            connection.phase.probe();
        }
        if let Poll::Ready(ended) = Pin::new(&mut serving).poll(cx) {
            return Poll::Ready(Paused::Ended(ended));
        }
        match asked {
            Ask::Nothing => Poll::Pending,
            Ask::Close(grace) => Poll::Ready(Paused::Close(grace)),
            Ask::Park => {
                connection.seat.answered();
                if connection.phase.is_quiet() {
                    detach(connection, &mut serving, UpgradeableConnection::graceful_shutdown, cx)
                } else {
                    Poll::Pending
                }
            }
        }
    });
    match paused.await {
        Paused::Ended(ended) => Active::Ended(ended),
        Paused::Close(grace) => {
            Pin::new(&mut serving).graceful_shutdown();
            Active::Ended(wind_down(connection, Pin::new(&mut serving), grace).await)
        }
        Paused::Detached => match serving.into_parts() {
            Some(parts) => Active::Idle(parts.io.into_inner().into_io().unread(parts.read_buf)),
            None => Active::Ended(Ok(())),
        },
    }
}

enum Paused {
    /// hyper is done with a connection that is as good as before
    Detached,
    Close(Duration),
    Ended(hyper::Result<()>),
}

/// Asks hyper to end a quiet connection, which it does at once exactly where it waits for a request's first byte: then nothing is
/// left in it. Otherwise (a request's body is still on its way after the response) it ends after that, as it may.
fn detach<C>(
    connection: &Connection,
    serving: &mut C,
    shut_down: impl FnOnce(Pin<&mut C>),
    cx: &mut Context<'_>,
) -> Poll<Paused>
where
    C: Future<Output = hyper::Result<()>> + Unpin,
{
    connection.phase.detach(true);
    shut_down(Pin::new(serving));
    let polled = Pin::new(serving).poll(cx);
    connection.phase.detach(false);
    polled.map(|ended| if ended.is_ok() { Paused::Detached } else { Paused::Ended(ended) })
}

/// Waits for the next request. False: the connection is to end, or has.
async fn parked(io: &Io, connection: &Connection) -> bool {
    let _parked = Parked::new(connection);
    let mut byte = [std::mem::MaybeUninit::uninit()];
    std::future::poll_fn(|cx| {
        if matches!(connection.seat.asked(cx), Ask::Close(_)) {
            return Poll::Ready(false);
        }
        // By a look at the bytes: what the reactor last heard may be about bytes that were read since.
        let mut buf = ReadBuf::uninit(&mut byte);
        io.socket().poll_peek(cx, &mut buf).map(|peeked| peeked.is_ok_and(|n| n > 0))
    })
    .await
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
        let paused = std::future::poll_fn(|cx| match (serving.as_mut().poll(cx), connection.seat.asked(cx)) {
            (Poll::Ready(ended), _) => Poll::Ready(Err(ended)),
            (Poll::Pending, Ask::Close(grace)) => Poll::Ready(Ok(grace)),
            (Poll::Pending, Ask::Nothing | Ask::Park) => Poll::Pending,
        });
        match paused.await {
            Ok(grace) => {
                serving.as_mut().graceful_shutdown();
                wind_down(connection, serving, grace).await
            }
            Err(ended) => ended,
        }
    };
    flusher.around(serving).await
}

/// Polls a connection that was asked to end to its end. When that takes too long, it is dropped.
async fn wind_down<C>(connection: &Connection, serving: Pin<&mut C>, grace: Duration) -> hyper::Result<()>
where
    C: Future<Output = hyper::Result<()>>,
{
    tokio::select! {
        biased;
        ended = serving => ended,
        () = connection.worker.drain.cut() => Ok(()),
        () = tokio::time::sleep(grace) => Ok(()),
    }
}
