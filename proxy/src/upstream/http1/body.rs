//! A response's body, read from its connection by whoever wants it.

use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Frame, SizeHint};

use super::{BoxError, Connection, Piece};

/// The body of a response. Dropped before its end, it takes its connection along.
#[derive(Debug)]
pub struct Body {
    /// Until the end
    connection: Option<Rc<Connection>>,
}

impl Body {
    /// The body whose head was read last.
    pub(super) fn of(connection: &Rc<Connection>) -> Self {
        let ended = connection.state.borrow().reader.is_end();
        Self { connection: (!ended).then(|| connection.clone()) }
    }

    /// The body, if all of it came with its head.
    pub(in crate::upstream) fn take_whole(&mut self) -> Option<Bytes> {
        let connection = self.connection.as_ref()?;
        let whole = connection.state.borrow_mut().take_whole()?;
        self.connection = None;
        Some(whole)
    }

    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Piece, BoxError>>> {
        let Some(connection) = &self.connection else { return Poll::Ready(None) };
        let mut upload = connection.upload.borrow_mut();
        if let Some(Poll::Ready(sent)) = upload.as_mut().map(|upload| upload.poll_sent(cx)) {
            *upload = None;
            if let Err(error) = sent {
                // Nobody would ever complete the request.
                return Poll::Ready(Some(Err(error.into())));
            }
        }
        let piece = ready!(connection.state.borrow_mut().poll_piece(cx));
        Poll::Ready(Some(piece.map_err(Into::into)))
    }

    pub(in crate::upstream) fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let Some(piece) = ready!(self.poll_piece(cx)) else { return Poll::Ready(None) };
        let frame = match piece {
            Ok(Piece::Data(data)) => {
                if !self.has_ended() {
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                Some(Ok(Frame::data(data)))
            }
            Ok(Piece::Trailers(trailers)) => Some(Ok(Frame::trailers(trailers))),
            Ok(Piece::End | Piece::More) => None,
            Err(error) => {
                self.abandon();
                return Poll::Ready(Some(Err(error)));
            }
        };
        // Whatever comes on the connection from now on is another exchange's.
        self.connection = None;
        Poll::Ready(frame)
    }

    fn has_ended(&self) -> bool {
        self.connection.as_ref().is_none_or(|connection| connection.state.borrow().reader.is_end())
    }

    /// Nothing more is wanted of the connection.
    fn abandon(&mut self) {
        if let Some(connection) = self.connection.take() {
            connection.state.borrow_mut().reader.retire();
            if let Some(upload) = connection.take_upload() {
                upload.abort();
            }
        }
    }

    pub(in crate::upstream) fn is_end_stream(&self) -> bool {
        self.connection.is_none()
    }

    pub(in crate::upstream) fn size_hint(&self) -> SizeHint {
        let remaining =
            self.connection.as_ref().map_or(Some(0), |connection| connection.state.borrow().reader.remaining());
        remaining.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        self.abandon();
    }
}
