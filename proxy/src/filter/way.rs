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
    out: Queue,
    held_out: usize,
    pub(crate) out_end: Option<End>,
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
        if self.out_end != Some(End::Plain) || self.cut || !self.out.rest.is_empty() {
            return None;
        }
        self.out_end = Some(End::Taken);
        self.held_out = 0;
        Some(std::mem::take(&mut self.out.next))
    }

    /// Bytes that wait to be taken.
    pub(crate) fn held_out(&self) -> usize {
        self.held_out
    }

    /// Nothing has come out behind the head.
    pub(crate) fn is_clear(&self) -> bool {
        self.out.next.is_empty() && self.out_end.is_none()
    }

    /// Everything has come out, or been cut.
    pub(crate) fn ended(&self) -> bool {
        self.cut || (self.out.next.is_empty() && self.out_end == Some(End::Taken))
    }

    /// The length of all that is to come out, where nothing more goes in and no trailers follow.
    pub(crate) fn length(&self) -> Option<usize> {
        self.out_end.filter(|end| *end != End::Trailers).map(|_| self.held_out)
    }
}

/// Chunks, none of them empty. As a rule there is one, which takes no memory of its own.
#[derive(Default)]
struct Queue {
    next: Bytes,
    rest: VecDeque<Bytes>,
}

impl Queue {
    fn push(&mut self, bytes: Bytes) {
        if self.next.is_empty() {
            self.next = bytes;
        } else if !bytes.is_empty() {
            self.rest.push_back(bytes);
        }
    }

    fn pop(&mut self) -> Option<Bytes> {
        if self.next.is_empty() {
            return None;
        }
        let rest = self.rest.pop_front().unwrap_or_default();
        Some(std::mem::replace(&mut self.next, rest))
    }
}
