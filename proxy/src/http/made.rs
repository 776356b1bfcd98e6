//! Bodies that the proxy makes itself, for call-outs.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use ::http::HeaderMap;
use bytes::Bytes;
use http_body::{Frame, SizeHint};

/// A body of a call-out.
#[derive(Debug)]
pub(crate) enum Made {
    /// Known as a whole: can be sent again
    Whole {
        /// All of it
        data: Bytes,
        /// After it
        trailers: Option<HeaderMap>,
    },
    /// Written while it is sent; `None`: an attempt has it
    Fed(Option<Feed>),
}

impl Made {
    pub(super) fn can_replay(&self) -> bool {
        matches!(self, Self::Whole { .. } | Self::Fed(Some(_)))
    }

    /// The body of the next attempt.
    pub(super) fn attempt(&mut self) -> Option<Self> {
        match self {
            Self::Whole { data, trailers } => Some(Self::Whole { data: data.clone(), trailers: trailers.clone() }),
            Self::Fed(feed) => feed.take().map(|feed| Self::Fed(Some(feed))),
        }
    }

    pub(crate) fn poll_frame(&mut self, cx: &Context<'_>) -> Poll<Option<Frame<Bytes>>> {
        match self {
            Self::Whole { data, .. } if !data.is_empty() => Poll::Ready(Some(Frame::data(std::mem::take(data)))),
            Self::Whole { trailers, .. } => Poll::Ready(trailers.take().map(Frame::trailers)),
            Self::Fed(Some(feed)) => feed.poll(cx).map(|data| data.map(Frame::data)),
            Self::Fed(None) => Poll::Ready(None),
        }
    }

    pub(super) fn is_end(&self) -> bool {
        match self {
            Self::Whole { data, trailers } => data.is_empty() && trailers.is_none(),
            Self::Fed(feed) => feed.as_ref().is_none_or(Feed::is_end),
        }
    }

    pub(super) fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole { data, .. } => SizeHint::with_exact(data.len() as u64),
            Self::Fed(_) => SizeHint::default(),
        }
    }
}

/// What is written into a body while it is sent. Clones are handles to the same body.
#[derive(Debug, Clone, Default)]
pub(crate) struct Feed(Rc<RefCell<State>>);

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Bytes>,
    bytes: usize,
    ended: bool,
    waker: Option<Waker>,
}

impl Feed {
    /// Appends data. False: more than `limit` bytes wait already, or the body has ended.
    pub(crate) fn push(&self, data: Bytes, limit: usize) -> bool {
        let mut state = self.0.borrow_mut();
        if state.ended || state.bytes.saturating_add(data.len()) > limit {
            return false;
        }
        if !data.is_empty() {
            state.bytes += data.len();
            state.waiting.push_back(data);
        }
        state.wake();
        true
    }

    /// Nothing follows.
    pub(crate) fn end(&self) {
        let mut state = self.0.borrow_mut();
        state.ended = true;
        state.wake();
    }

    /// Bytes that were not sent yet.
    pub(crate) fn bytes(&self) -> usize {
        self.0.borrow().bytes
    }

    /// Pieces that were not sent yet.
    pub(crate) fn waiting(&self) -> usize {
        self.0.borrow().waiting.len()
    }

    fn poll(&self, cx: &Context<'_>) -> Poll<Option<Bytes>> {
        let mut state = self.0.borrow_mut();
        if let Some(data) = state.waiting.pop_front() {
            state.bytes -= data.len();
            return Poll::Ready(Some(data));
        }
        if state.ended {
            return Poll::Ready(None);
        }
        state.waker = Some(cx.waker().clone());
        Poll::Pending
    }

    fn is_end(&self) -> bool {
        let state = self.0.borrow();
        state.ended && state.waiting.is_empty()
    }
}

impl State {
    fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_fed_comes_out_in_order_within_its_limit() {
        let cx = Context::from_waker(Waker::noop());
        let feed = Feed::default();
        let mut made = Made::Fed(Some(feed.clone()));
        let mut attempt = made.attempt().unwrap();
        assert!(made.attempt().is_none() && !made.can_replay());
        assert!(attempt.poll_frame(&cx).is_pending());
        assert!(feed.push(Bytes::from_static(b"12"), 4) && feed.push(Bytes::from_static(b"34"), 4));
        assert!(!feed.push(Bytes::from_static(b"5"), 4));
        let mut next = || match attempt.poll_frame(&cx) {
            Poll::Ready(Some(frame)) => frame.into_data().ok(),
            _ => None,
        };
        assert_eq!(next().unwrap(), "12");
        assert_eq!(feed.bytes(), 2);
        feed.end();
        assert!(!feed.push(Bytes::new(), 4));
        assert_eq!((next().unwrap(), next()), (Bytes::from_static(b"34"), None));
        assert!(attempt.is_end());
    }
}
