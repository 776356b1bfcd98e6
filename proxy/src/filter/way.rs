//! How far one direction of a message has come through a chain, and what has come out of it.

use std::collections::VecDeque;

use bytes::Bytes;

/// Steps are counted in the order in which the direction passes the filters.
#[derive(Default)]
pub(crate) struct Way {
    pub(crate) begun: bool,
    /// The step that gets what comes in
    pub(crate) first: usize,
    /// The step that has the head
    pub(crate) head_at: usize,
    pub(crate) head_end: bool,
    pub(crate) head_taken: bool,
    /// Nothing more of it comes out
    pub(crate) cut: bool,
    /// What came with the head and no filter was given yet
    rest: Rest,
    out: Queue,
    held_out: usize,
    pub(crate) out_end: Option<End>,
}

/// The part of a message that came whole and is still to go in: its body, and its end by itself, as of other hosts.
#[derive(Default)]
enum Rest {
    #[default]
    Nothing,
    Body(Bytes),
    End,
}

/// What ends what comes out.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Plain,
    Trailers,
    Taken,
}

impl Way {
    /// It begins, with a head that a step has; `end`: nothing follows.
    pub(crate) fn begun(first: usize, end: bool) -> Self {
        Self { begun: true, first, head_at: first, head_end: end, ..Self::default() }
    }

    /// All of its body has come with the head.
    pub(crate) fn set_rest(&mut self, body: Bytes) {
        self.rest = Rest::Body(body);
    }

    /// There is something for [`Self::take_rest`].
    pub(crate) fn has_rest(&self) -> bool {
        !matches!(self.rest, Rest::Nothing)
    }

    /// What goes in next of what came with the head; and whether it is the end.
    pub(crate) fn take_rest(&mut self) -> Option<(Bytes, bool)> {
        match std::mem::take(&mut self.rest) {
            Rest::Nothing => None,
            Rest::Body(bytes) => {
                self.rest = Rest::End;
                Some((bytes, false))
            }
            Rest::End => Some((Bytes::new(), true)),
        }
    }

    /// The head has passed all of so many filters, and nobody took it.
    pub(crate) fn head_out(&self, filters: usize) -> bool {
        self.begun && !self.cut && self.head_at >= filters && !self.head_taken
    }

    /// Bytes, and perhaps the end, come out.
    pub(crate) fn put_out(&mut self, bytes: Bytes, ended: bool, trailers: bool) {
        self.held_out += bytes.len();
        self.out.push(bytes);
        if trailers {
            self.out_end = Some(End::Trailers);
        } else if ended {
            self.out_end = Some(End::Plain);
        }
    }

    /// The next chunk.
    pub(crate) fn pop(&mut self) -> Option<Bytes> {
        let bytes = self.out.pop()?;
        self.held_out -= bytes.len();
        Some(bytes)
    }

    /// All that is to come out, where that is one piece and nothing but the end follows it.
    pub(crate) fn take_whole(&mut self) -> Option<Bytes> {
        if self.out_end != Some(End::Plain) || self.cut || self.out.is_many() {
            return None;
        }
        self.out_end = Some(End::Taken);
        self.held_out = 0;
        Some(self.out.pop().unwrap_or_default())
    }

    /// Bytes that wait to be taken.
    pub(crate) fn held_out(&self) -> usize {
        self.held_out
    }

    /// Nothing has come out behind the head.
    pub(crate) fn is_clear(&self) -> bool {
        self.out.is_empty() && self.out_end.is_none()
    }

    /// Everything has come out, or been cut.
    pub(crate) fn ended(&self) -> bool {
        self.cut || (self.out.is_empty() && self.out_end == Some(End::Taken))
    }

    /// The length of all that is to come out, where nothing more goes in and no trailers follow.
    pub(crate) fn length(&self) -> Option<usize> {
        self.out_end.filter(|end| *end != End::Trailers).map(|_| self.held_out)
    }
}

/// Chunks, none of them empty. As a rule there is one, which takes no memory of its own.
#[derive(Default)]
struct Queue {
    next: Option<Bytes>,
    rest: Option<VecDeque<Bytes>>,
}

impl Queue {
    fn push(&mut self, bytes: Bytes) {
        if bytes.is_empty() {
            return;
        }
        if self.next.is_none() {
            self.next = Some(bytes);
        } else {
            self.rest.get_or_insert_default().push_back(bytes);
        }
    }

    fn pop(&mut self) -> Option<Bytes> {
        let next = self.next.take()?;
        self.next = self.rest.as_mut().and_then(VecDeque::pop_front);
        Some(next)
    }

    fn is_empty(&self) -> bool {
        self.next.is_none()
    }

    fn is_many(&self) -> bool {
        self.rest.as_ref().is_some_and(|rest| !rest.is_empty())
    }
}
