//! A request on its way: its head, its body as it comes, and the wait for the head of its response.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use ::http::{Method, Response, StatusCode};
use bytes::{Buf, Bytes};
use http_body::{Body as _, Frame};
use tokio::io::AsyncWrite;
use tokio::task::JoinHandle;

use super::encode::{self, Encoder, Head};
use super::{Arrived, Body, Connection, Error, spare};
use crate::http::RequestBody;
use crate::io::Io;

/// Bytes of a body that are copied behind what comes before them; more of them are written from where they are.
const COPIED: usize = 4 * 1024;
/// Bytes of one record of TLS.
const RECORD: usize = 16 * 1024;

/// A request that got no response.
#[derive(Debug)]
pub struct Failed {
    /// Its body, where nothing of the request was sent and nothing of the body taken
    pub unsent: Option<RequestBody>,
    /// Why
    pub error: Error,
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self { unsent: None, error }
    }
}

/// Sends a request, and waits for the head of its response. Dropped before, the connection is good for nothing more.
pub(in crate::upstream) async fn send(
    connection: &Rc<Connection>,
    head: &Head<'_>,
    body: RequestBody,
) -> Result<Response<Body>, Failed> {
    connection.state.borrow_mut().reader.begin(*head.method == Method::HEAD);
    let mut sending = Sending { request: Some(Request::new(head, body)), broken: None };
    std::future::poll_fn(|cx| sending.poll(connection, cx)).await
}

/// A request and its response's head.
struct Sending {
    /// Until it is sent
    request: Option<Request>,
    /// Writing failed after something was sent: the endpoint may have said why
    broken: Option<io::Error>,
}

impl Sending {
    fn poll(&mut self, connection: &Rc<Connection>, cx: &mut Context<'_>) -> Poll<Result<Response<Body>, Failed>> {
        loop {
            if let Some(request) = &mut self.request {
                match request.poll(connection, cx) {
                    Poll::Pending if !request.begun => return Poll::Pending,
                    Poll::Pending => {}
                    Poll::Ready(Ok(())) => self.request = None,
                    Poll::Ready(Err(Error::Io(error))) => {
                        if !request.begun {
                            return Poll::Ready(Err(Failed { unsent: request.unsent(), error: Error::Io(error) }));
                        }
                        self.request = None;
                        self.broken = Some(error);
                    }
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(error.into())),
                }
            }
            let arrived = ready!(connection.state.borrow_mut().poll_head(cx));
            match arrived {
                Ok(Arrived::Interim(StatusCode::CONTINUE)) => {
                    if let Some(request) = &mut self.request {
                        request.body.open();
                    }
                }
                Ok(Arrived::Interim(_)) => {}
                Ok(Arrived::Head(response)) => {
                    return Poll::Ready(self.answered(connection, response).map_err(Into::into));
                }
                Err(Error::Closed) => {
                    let error = self.broken.take().map_or(Error::Closed, Error::Io);
                    return Poll::Ready(Err(error.into()));
                }
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }

    /// The response has begun, whether or not the request has ended.
    fn answered(&mut self, connection: &Rc<Connection>, response: Response<()>) -> Result<Response<Body>, Error> {
        let mut state = connection.state.borrow_mut();
        if let Some(request) = self.request.take() {
            if response.status() == StatusCode::SWITCHING_PROTOCOLS {
                return Err(Error::Framing("it switches protocols before the request's end"));
            }
            if request.body.is_held() {
                // The endpoint did not ask for the body, and what it would take the next request for nobody knows.
                state.reader.retire();
            } else {
                // The client may want to be rid of its body before it reads the response.
                *connection.upload.borrow_mut() = Some(Upload::start(request, connection));
            }
        } else if self.broken.is_some() {
            state.reader.retire();
        }
        state.full = state.reader.remaining().is_some_and(|length| length > spare::READ as u64);
        state.release();
        drop(state);
        Ok(response.map(|()| Body::of(connection)))
    }
}

/// What is left of a request, on its way beside its response.
#[derive(Debug)]
pub(in crate::upstream) struct Upload(JoinHandle<Result<(), Error>>);

impl Upload {
    fn start(mut request: Request, connection: &Rc<Connection>) -> Self {
        let connection = connection.clone();
        Self(tokio::task::spawn_local(async move {
            let sent = std::future::poll_fn(|cx| request.poll(&connection, cx)).await;
            if sent.is_err() {
                connection.state.borrow_mut().reader.retire();
            }
            match sent {
                // The endpoint takes no more, which it may while it answers.
                Err(Error::Io(_)) => Ok(()),
                sent => sent,
            }
        }))
    }

    /// Ready when the request was sent, or broke off. Not to be asked again then.
    pub(super) fn poll_sent(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Pin::new(&mut self.0).poll(cx).map(|sent| sent.unwrap_or(Ok(())))
    }

    pub(in crate::upstream) fn is_finished(&self) -> bool {
        self.0.is_finished()
    }

    pub(in crate::upstream) fn abort(&self) {
        self.0.abort();
    }

    /// Waits for its end.
    pub(in crate::upstream) async fn finished(self) {
        let _ = self.0.await;
    }
}

/// A request as far as it is not sent.
#[derive(Debug)]
struct Request {
    out: Out,
    encoder: Encoder,
    body: RequestBody,
    /// Bytes of it went out
    begun: bool,
    /// Bytes of the body were taken
    taken: bool,
    /// The body was waited for once, so that its first bytes may leave with the head
    waited: bool,
}

impl Request {
    fn new(head: &Head<'_>, body: RequestBody) -> Self {
        let mut out = Out { bytes: spare::writing(), ..Out::default() };
        let encoder = encode::head(head, body.is_end_stream(), body.size_hint().exact(), &mut out.bytes);
        Self { out, encoder, body, begun: false, taken: false, waited: false }
    }

    /// Ready when everything was sent.
    fn poll(&mut self, connection: &Connection, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        loop {
            let mut waits = false;
            // The body's first bytes may leave with the head.
            if !self.encoder.is_done() && (self.out.is_empty() || !(self.begun || self.taken)) {
                waits = self.poll_body(cx)?.is_pending();
                if waits && !self.begun && !self.waited && !self.body.is_held() {
                    // A body that came with its head is here at the next turn: then both leave together.
                    self.waited = true;
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
            }
            let io = &mut connection.state.borrow_mut().io;
            ready!(self.out.poll_write(io, &mut self.begun, cx))?;
            if self.encoder.is_done() {
                return Poll::Ready(Ok(()));
            }
            if waits {
                return Poll::Pending;
            }
        }
    }

    /// The body, if another connection could have all of the request: the first write failed. Of several records of TLS some may
    /// have gone out by then.
    fn unsent(&mut self) -> Option<RequestBody> {
        let unsent = !self.taken && self.out.bytes.len() <= RECORD;
        unsent.then(|| std::mem::replace(&mut self.body, RequestBody::empty()))
    }

    /// Takes the next bytes of the body.
    fn poll_body(&mut self, cx: &mut Context<'_>) -> Result<Poll<()>, Error> {
        let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) else { return Ok(Poll::Pending) };
        self.taken = true;
        match frame.transpose().map_err(Error::Body)?.map(Frame::into_data) {
            Some(Ok(data)) if data.is_empty() => {}
            Some(Ok(data)) => {
                let last = self.body.is_end_stream();
                self.out.after = self.encoder.data(data.len(), last, &mut self.out.bytes)?;
                self.out.put(data);
            }
            Some(Err(frame)) => self.encoder.end(frame.trailers_ref(), &mut self.out.bytes)?,
            None => self.encoder.end(None, &mut self.out.bytes)?,
        }
        Ok(Poll::Ready(()))
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        spare::written(std::mem::take(&mut self.out.bytes));
    }
}

/// Bytes to be written, in this order.
#[derive(Debug, Default)]
struct Out {
    bytes: Vec<u8>,
    /// Of `bytes`: written already
    written: usize,
    rest: Bytes,
    after: &'static [u8],
    /// The stream below has taken bytes since it was last flushed
    unflushed: bool,
}

impl Out {
    fn is_empty(&self) -> bool {
        self.written == self.bytes.len() && self.rest.is_empty() && self.after.is_empty()
    }

    /// Bytes of a body, after which `after` comes.
    fn put(&mut self, data: Bytes) {
        if data.len() <= COPIED {
            self.bytes.extend_from_slice(&data);
            self.bytes.extend_from_slice(std::mem::take(&mut self.after));
        } else {
            self.rest = data;
        }
    }

    fn poll_write(&mut self, io: &mut Io, begun: &mut bool, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.is_empty() {
            let first = &self.bytes[self.written..];
            let n = if self.rest.is_empty() && self.after.is_empty() {
                ready!(Pin::new(&mut *io).poll_write(cx, first))?
            } else {
                let all = [IoSlice::new(first), IoSlice::new(&self.rest), IoSlice::new(self.after)];
                ready!(Pin::new(&mut *io).poll_write_vectored(cx, &all))?
            };
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            *begun = true;
            self.unflushed = true;
            self.advance(n);
        }
        self.bytes.clear();
        self.written = 0;
        if self.unflushed {
            ready!(Pin::new(io).poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    fn advance(&mut self, n: usize) {
        let first = n.min(self.bytes.len() - self.written);
        self.written += first;
        let rest = (n - first).min(self.rest.len());
        self.rest.advance(rest);
        self.after = &self.after[n - first - rest..];
    }
}
