//! What a filter sees of its stream, and may do to it.

use std::rc::Rc;

use http::{HeaderMap, request, response};

use super::stream::{At, Edits, Flow, Slot, Stream};
use super::{Event, FilterState, LocalResponse, StreamInfo};

/// One filter's view of its stream: what a callback may read and write. Cheap to clone; also from other contexts of the same filter, by
/// the rules of the stage that the filter is at.
#[derive(Debug, Clone)]
pub struct View {
    pub(crate) stream: Rc<Stream>,
    /// Which filter of the chain
    pub(crate) index: usize,
}

/// A head that may be read.
#[derive(Debug, Clone, Copy)]
pub enum HeadRef<'a> {
    /// Of the request
    Request(&'a request::Parts),
    /// Of the response
    Response(&'a response::Parts),
    /// Trailers
    Trailers(&'a HeaderMap),
}

/// A head that may be written, and where to note what was done to it.
#[derive(Debug)]
pub enum HeadMut<'a> {
    /// Of the request
    Request(&'a mut request::Parts, &'a mut Edits),
    /// Of the response
    Response(&'a mut response::Parts, &'a mut Edits),
    /// Trailers
    Trailers(&'a mut HeaderMap, &'a mut Edits),
}

/// What comes next to a filter that has not returned yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// Something more
    Event(Event),
    /// The end of the exchange: what [`Filter::log_and_done`] does, which is not called then
    Over,
}

/// Which head of a direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// In front of the body
    Headers,
    /// Behind it
    Trailers,
}

impl View {
    /// A head, if the filter may read it now.
    pub fn read<R>(&self, flow: Flow, which: Which, f: impl FnOnce(HeadRef<'_>) -> R) -> Option<R> {
        let data = self.stream.data.borrow();
        let stage = data.slots.get(self.index)?.stage(flow);
        let at = if which == Which::Headers { At::Headers } else { At::Trailers };
        if !(stage.open(at) || data.logging) || self.stream.tcp {
            return None;
        }
        let head = match (flow, which) {
            (Flow::Request, Which::Headers) => HeadRef::Request(data.request.as_deref()?),
            (Flow::Response, Which::Headers) => HeadRef::Response(data.response()?),
            (_, Which::Trailers) => HeadRef::Trailers(data.trailers[flow as usize].as_deref()?),
        };
        Some(f(head))
    }

    /// A head, if the filter may write it now. Trailers come into being where the message has none and the filter sees its end. An
    /// `Err` says that nothing was changed.
    pub fn write<T, E>(
        &self,
        flow: Flow,
        which: Which,
        f: impl FnOnce(HeadMut<'_>) -> Result<T, E>,
    ) -> Option<Result<T, E>> {
        let mut data = self.stream.data.borrow_mut();
        let data = &mut *data;
        if data.logging || self.stream.tcp {
            return None;
        }
        let slot = data.slots.get_mut(self.index)?;
        let (stage, edits) = match flow {
            Flow::Request => (&slot.request, slot.edits.first_mut()?),
            Flow::Response => (&slot.response, slot.edits.last_mut()?),
        };
        let at = if which == Which::Headers { At::Headers } else { At::Trailers };
        let last = which == Which::Trailers && stage.open(At::Body) && stage.ended;
        if !(stage.open(at) || last) {
            return None;
        }
        let head = match (flow, which) {
            (Flow::Request, Which::Headers) => HeadMut::Request(Rc::get_mut(data.request.as_mut()?)?, edits),
            (Flow::Response, Which::Headers) => HeadMut::Response(data.response.as_mut()?, edits),
            (_, Which::Trailers) => HeadMut::Trailers(data.trailers[flow as usize].get_or_insert_default(), edits),
        };
        let result = f(head);
        slot.changed |= result.is_ok();
        Some(result)
    }

    /// Body bytes, if the filter may see them now: in their callback, while it pauses there, and at the trailers.
    pub fn body<R>(&self, flow: Flow, f: impl FnOnce(&[u8]) -> R) -> Option<R> {
        let data = self.stream.data.borrow();
        let stage = data.slots.get(self.index)?.stage(flow);
        (stage.open(At::Body) || stage.open(At::Trailers)).then(|| f(stage.body.as_slice()))
    }

    /// Replaces body bytes (see [`Buffer::splice`]). False: not now, or more than the filter may hold.
    pub fn set_body(&self, flow: Flow, start: usize, len: usize, with: &[u8]) -> bool {
        let mut data = self.stream.data.borrow_mut();
        let Some(slot) = data.slots.get_mut(self.index) else { return false };
        let stage = slot.stage_mut(flow);
        if !(stage.open(At::Body) || stage.open(At::Trailers)) {
            return false;
        }
        // Also in many small steps: a paused stream's filter may come again and again.
        let size = stage.body.len();
        let cut = len.min(size - start.min(size));
        if with.len() > cut && size - cut + with.len() > super::WRITE_LIMIT {
            return false;
        }
        stage.body.splice(start, len, with);
        slot.changed = true;
        true
    }

    /// For a filter whose callback says [`Continue`](super::Action::Continue): what it is to be told next before it returns, if anything. What it
    /// was shown has gone on then.
    pub(crate) fn follow(&self, flow: Flow) -> Option<Next> {
        self.stream.follow(flow, self.index)
    }

    /// The exchange is over.
    pub(crate) fn is_over(&self) -> bool {
        self.stream.data.borrow().logging
    }

    /// Lets go what the filter holds, once its callback has returned. Nothing if it holds nothing.
    pub fn resume(&self, flow: Flow) {
        self.ask(|slot| {
            let stage = slot.stage(flow);
            if stage.calling || stage.paused {
                slot.wishes.resume[flow as usize] = true;
            }
        });
    }

    /// Answers the request; of several answers the first counts. False: the response has begun.
    pub fn respond(&self, response: LocalResponse) -> bool {
        let data = self.stream.data.borrow();
        // What comes too late resets the stream, as it does in other hosts: the filter wants the client not to get what it is getting.
        if data.logging || self.stream.tcp {
            return false;
        }
        drop(data);
        self.ask(|slot| {
            if !slot.answered && slot.wishes.reply.is_none() {
                slot.wishes.reply = Some(Box::new(response));
            }
        });
        true
    }

    /// Resets the client's stream, or closes its connection.
    pub fn close(&self) {
        self.ask(|slot| slot.wishes.reset = true);
    }

    /// An opaque connection.
    pub fn is_tcp(&self) -> bool {
        self.stream.tcp
    }

    /// Facts of the exchange, the properties that filters set, and the heads as far as they are known now.
    pub fn facts<R>(&self, f: impl FnOnce(&Facts<'_>) -> R) -> R {
        let data = self.stream.data.borrow();
        f(&Facts { info: &data.info, state: &data.state, request: data.request.as_deref(), response: data.response() })
    }

    /// Sets a property for the rest of the exchange. False: too much.
    pub fn set_property(&self, name: &[u8], value: &[u8]) -> bool {
        self.stream.data.borrow_mut().state.set(name, value)
    }

    /// True: the filter wrote to the message, or holds something of it.
    pub(crate) fn touched(&self) -> bool {
        let data = self.stream.data.borrow();
        data.slots.get(self.index).is_some_and(|slot| slot.changed || slot.request.paused || slot.response.paused)
    }

    fn ask(&self, f: impl FnOnce(&mut Slot)) {
        let calling = {
            let mut data = self.stream.data.borrow_mut();
            if data.logging {
                return;
            }
            let Some(slot) = data.slots.get_mut(self.index) else { return };
            f(slot);
            slot.request.calling || slot.response.calling
        };
        // In the filter's own callback the chain looks when it returns.
        if !calling {
            self.stream.notify();
        }
    }
}

/// What properties are made of.
pub struct Facts<'a> {
    /// Of the connection and the route
    pub info: &'a StreamInfo,
    /// Set by filters
    pub state: &'a FilterState,
    request: Option<&'a request::Parts>,
    response: Option<&'a response::Parts>,
}

impl std::fmt::Debug for Facts<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Facts").field("info", self.info).finish_non_exhaustive()
    }
}

impl<'a> Facts<'a> {
    /// As it stands, or as it left the chain where a filter may still want it
    pub fn request(&self) -> Option<&'a request::Parts> {
        self.request
    }

    /// The same
    pub fn response(&self) -> Option<&'a response::Parts> {
        self.response
    }
}
