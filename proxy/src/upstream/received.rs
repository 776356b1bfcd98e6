//! A response's body as it arrives from an endpoint, over either version of HTTP.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use ::http::HeaderMap;
use bytes::Bytes;
use h2::{Reason, RecvStream};
use http_body::{Body, Frame, SizeHint};

use super::http1;
use super::streams::Upload;

/// Any failure of a body.
type Error = Box<dyn std::error::Error + Send + Sync>;

/// The body of an endpoint's response.
#[derive(Debug)]
pub enum Received {
    /// Of HTTP/1
    Http1(http1::Body),
    /// Of HTTP/2
    Http2(Stream),
}

/// The endpoint's half of an HTTP/2 stream.
#[derive(Debug)]
pub struct Stream {
    stream: RecvStream,
    data_ended: bool,
    /// The request's body, until the response has ended
    upload: Option<Upload>,
}

impl Received {
    pub(super) fn http2(stream: RecvStream, upload: Option<Upload>) -> Self {
        let mut stream = Stream { stream, data_ended: false, upload };
        if stream.stream.is_end_stream() {
            stream.end();
        }
        Self::Http2(stream)
    }

    /// The body, if all of it came with its head.
    pub(crate) fn take_whole(&mut self) -> Option<Bytes> {
        match self {
            Self::Http1(body) => body.take_whole(),
            Self::Http2(_) => None,
        }
    }
}

impl Stream {
    fn end(&mut self) {
        if let Some(upload) = self.upload.take() {
            upload.release();
        }
    }

    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, h2::Error>>> {
        let data = ready!(self.stream.poll_data(cx));
        if let Some(Ok(data)) = &data {
            // Fails only for more than was received.
            let _ = self.stream.flow_control().release_capacity(data.len());
            if self.stream.is_end_stream() {
                self.end();
            }
        }
        Poll::Ready(data)
    }

    fn poll_trailers(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<HeaderMap>, h2::Error>> {
        let trailers = ready!(self.stream.poll_trailers(cx));
        if trailers.is_ok() {
            self.end();
        }
        Poll::Ready(trailers)
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        if !self.data_ended {
            match ready!(self.poll_data(cx)) {
                Some(Ok(data)) => return Poll::Ready(Some(Ok(Frame::data(data)))),
                Some(Err(error)) => return Poll::Ready(Some(Err(failure(error)))),
                None => self.data_ended = true,
            }
        }
        Poll::Ready(match ready!(self.poll_trailers(cx)) {
            Ok(trailers) => trailers.map(|trailers| Ok(Frame::trailers(trailers))),
            Err(error) => Some(Err(failure(error))),
        })
    }
}

/// A reset without an error may stand behind the end of a response (RFC 9113, 8.1), where h2 does not show it. In front of it the response is
/// not whole; as the reason of the client's own reset it would say that it is.
fn failure(error: h2::Error) -> Error {
    match error.reason() {
        Some(Reason::NO_ERROR) => "the endpoint reset the stream before its end".into(),
        _ => error.into(),
    }
}

/// A response ended as it did for what its request did.
pub(crate) fn is_of_the_request(error: &Error) -> bool {
    error.downcast_ref::<http1::Error>().is_some_and(http1::Error::is_of_the_request)
}

impl Body for Received {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        match self.get_mut() {
            Self::Http1(body) => body.poll_frame(cx),
            Self::Http2(stream) => stream.poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Http1(body) => body.is_end_stream(),
            Self::Http2(stream) => stream.stream.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Http1(body) => body.size_hint(),
            Self::Http2(stream) if stream.stream.is_end_stream() => SizeHint::with_exact(0),
            // The head says it, where it is known; h2 sees to it that it is true.
            Self::Http2(_) => SizeHint::default(),
        }
    }
}
