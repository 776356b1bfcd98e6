//! HTTP/2 to endpoints, on h2 itself. hyper's client puts a channel, a task and two wake-ups between a request and its
//! connection, which with small messages is a tenth of a hop.

use std::cell::Cell;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use ::http::header::CONTENT_LENGTH;
use ::http::{Method, Request, Response};
use bytes::Bytes;
use h2::client::{Builder, SendRequest};
use h2::{Ping, PingPong, Reason, SendStream};
use http_body::Body;

use super::connect::{ConnectError, drive, protocol};
use super::pool::{SendError, WireError};
use super::received::Received;
use crate::coalesce::coalesce;
use crate::http::RequestBody;
use crate::io::Io;

/// Streams that one connection carries before another is opened.
pub(super) const STREAMS: usize = 100;
/// Header block of a response, bytes.
const MAX_HEAD: u32 = 64 * 1024;
const STREAM_WINDOW: u32 = 256 * 1024;
const CONNECTION_WINDOW: u32 = 1024 * 1024;
/// Bytes of a request held per stream while the endpoint's window is closed.
const SEND_BUFFER: usize = 64 * 1024;
const PING_EVERY: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// A connection's open streams.
pub(super) type Open = Rc<Cell<usize>>;

/// Starts HTTP/2 on a connection; `held` is dropped when it ends. `ended` runs beside it for as long.
pub(super) async fn start<H: 'static>(
    io: Io,
    held: H,
    open: Open,
    ended: impl Future<Output = ()> + 'static,
) -> Result<SendRequest<Bytes>, ConnectError> {
    let (io, flusher) = coalesce(io);
    let mut builder = Builder::new();
    builder
        .enable_push(false)
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        // Until the endpoint says otherwise.
        .initial_max_send_streams(STREAMS)
        .max_header_list_size(MAX_HEAD)
        .max_send_buffer_size(SEND_BUFFER);
    let (sender, mut connection) = builder.handshake(io).await.map_err(protocol)?;
    let pings = connection.ping_pong();
    tokio::task::spawn_local(flusher.around(async move {
        let silent = silent(pings, open);
        tokio::select! {
            biased;
            () = drive(connection, ended) => {}
            () = silent => tracing::debug!("an endpoint does not answer pings: its connection ends"),
        }
        drop(held);
    }));
    Ok(sender)
}

/// Ready when the endpoint leaves a ping unanswered while streams are open.
async fn silent(pings: Option<PingPong>, open: Open) {
    let Some(mut pings) = pings else { return std::future::pending().await };
    loop {
        tokio::time::sleep(PING_EVERY).await;
        if open.get() == 0 {
            continue;
        }
        match tokio::time::timeout(PING_TIMEOUT, pings.ping(Ping::opaque())).await {
            Ok(Ok(_)) => {}
            // The connection says why it ends.
            Ok(Err(_)) => return std::future::pending().await,
            Err(_) => return,
        }
    }
}

/// Whether the connection takes new streams: it has not ended, and the endpoint has not said that it will.
pub(super) fn is_open(sender: &SendRequest<Bytes>) -> bool {
    // A clone has no stream of its own that it could wait for, so this is never pending.
    sender.clone().poll_ready(&mut Context::from_waker(Waker::noop())).map_err(drop) != Poll::Ready(Err(()))
}

/// Sends a request and waits for the head of its response.
pub(super) async fn send(
    sender: &SendRequest<Bytes>,
    mut request: Request<RequestBody>,
) -> Result<Response<Received>, SendError> {
    if !is_open(sender) {
        let error = WireError::Closed;
        return Err(SendError { unsent: Some(request), error });
    }
    state_length(&mut request);
    let (head, body) = request.into_parts();
    let whole = body.is_end_stream();
    let failed = |error: h2::Error| SendError { unsent: None, error: error.into() };
    let (response, stream) = sender.clone().send_request(Request::from_parts(head, ()), whole).map_err(failed)?;
    let upload = (!whole).then(|| Upload(Some(tokio::task::spawn_local(pump(body, stream)).abort_handle())));
    let response = response.await.map_err(failed)?;
    Ok(response.map(|stream| Received::http2(stream, upload)))
}

/// As HTTP/1 would: a length that is known, where a body is or could be expected.
fn state_length(request: &mut Request<RequestBody>) {
    let Some(length) = request.body().size_hint().exact() else { return };
    let expected = !matches!(*request.method(), Method::GET | Method::HEAD | Method::DELETE | Method::CONNECT);
    if (length > 0 || expected) && !request.headers().contains_key(CONTENT_LENGTH) {
        request.headers_mut().insert(CONTENT_LENGTH, length.into());
    }
}

/// A request's body on its way up. It ends when nobody waits for the response any more.
#[derive(Debug)]
pub(super) struct Upload(Option<tokio::task::AbortHandle>);

impl Upload {
    /// The response is complete: what is left of the request may still go.
    pub(super) fn release(mut self) {
        self.0 = None;
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if let Some(upload) = &self.0 {
            upload.abort();
        }
    }
}

async fn pump(body: RequestBody, mut stream: SendStream<Bytes>) {
    let mut body = std::pin::pin!(body);
    std::future::poll_fn(|cx| poll_pump(body.as_mut(), &mut stream, cx)).await;
}

/// Ready at the end of the body, or when the endpoint wants no more of it.
fn poll_pump(mut body: Pin<&mut RequestBody>, stream: &mut SendStream<Bytes>, cx: &mut Context<'_>) -> Poll<()> {
    loop {
        // The body is asked for more only when some of it could leave: back-pressure.
        stream.reserve_capacity(1);
        while stream.capacity() == 0 {
            match ready!(stream.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return Poll::Ready(()),
            }
        }
        if stream.poll_reset(cx).is_ready() {
            return Poll::Ready(());
        }
        let sent = match ready!(body.as_mut().poll_frame(cx)) {
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) => {
                    let last = body.is_end_stream();
                    stream.send_data(data, last).map(|()| last)
                }
                Err(frame) => match frame.into_trailers() {
                    Ok(trailers) => {
                        stream.reserve_capacity(0);
                        stream.send_trailers(trailers).map(|()| true)
                    }
                    Err(_unknown) => Ok(false),
                },
            },
            Some(Err(error)) => {
                stream.send_reset(reason(error.as_ref()));
                return Poll::Ready(());
            }
            None => stream.send_data(Bytes::new(), true).map(|()| true),
        };
        match sent {
            Ok(false) => {}
            // An error: the stream was reset in the meantime, as its response says.
            Ok(true) | Err(_) => return Poll::Ready(()),
        }
    }
}

/// Why the client's body broke off, for the endpoint.
fn reason(error: &(dyn std::error::Error + 'static)) -> Reason {
    let mut causes = std::iter::successors(Some(error), |error| error.source());
    let found = causes.find_map(|error| error.downcast_ref::<h2::Error>()?.reason());
    found.unwrap_or(Reason::INTERNAL_ERROR)
}
