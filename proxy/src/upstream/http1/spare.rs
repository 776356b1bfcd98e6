//! Memory that exchanges of one worker use one after the other, so that a connection without one holds none.

use std::cell::Cell;

use ::http::HeaderMap;
use bytes::BytesMut;

/// Room to read into: as a rule a head and its body.
pub(super) const READ: usize = 16 * 1024;
/// Room for a body that fills the former.
pub(super) const READ_MORE: usize = 64 * 1024;
/// Of each kind, per worker.
const KEPT: usize = 4;
/// What is larger was needed once.
const MAX_WRITE: usize = 16 * 1024;
const MAX_HEADERS: usize = 64;

thread_local! {
    static READS: Cell<Vec<BytesMut>> = const { Cell::new(Vec::new()) };
    static WRITES: Cell<Vec<Vec<u8>>> = const { Cell::new(Vec::new()) };
    static HEADERS: Cell<Vec<HeaderMap>> = const { Cell::new(Vec::new()) };
}

type Kept<T> = std::thread::LocalKey<Cell<Vec<T>>>;

fn take<T>(kept: &'static Kept<T>) -> Option<T> {
    kept.with(|kept| {
        let mut all = kept.take();
        let one = all.pop();
        kept.set(all);
        one
    })
}

fn keep<T>(kept: &'static Kept<T>, one: T) {
    kept.with(|kept| {
        let mut all = kept.take();
        if all.len() < KEPT {
            all.push(one);
        }
        kept.set(all);
    });
}

/// An empty buffer with room for `room` bytes.
pub(super) fn reading(room: usize) -> BytesMut {
    let mut spare = take(&READS);
    // Bytes that were read into it may still be on their way to a client: then it is theirs.
    if spare.as_mut().is_some_and(|buf| !buf.try_reclaim(room)) {
        spare = None;
    }
    spare.unwrap_or_else(|| BytesMut::with_capacity(room))
}

/// Gives a buffer back that [`reading`] lent; it is empty.
pub(super) fn read(buf: BytesMut) {
    if buf.capacity() > 0 {
        keep(&READS, buf);
    }
}

/// An empty buffer for a request's head.
pub(super) fn writing() -> Vec<u8> {
    take(&WRITES).unwrap_or_default()
}

/// Gives a buffer back that [`writing`] lent.
pub(super) fn written(mut buf: Vec<u8>) {
    if (1..=MAX_WRITE).contains(&buf.capacity()) {
        buf.clear();
        keep(&WRITES, buf);
    }
}

/// An empty header map.
pub(super) fn headers() -> HeaderMap {
    take(&HEADERS).unwrap_or_default()
}

/// Keeps the memory of a header map that is no longer needed.
pub(crate) fn keep_headers(mut headers: HeaderMap) {
    if (1..=MAX_HEADERS).contains(&headers.capacity()) {
        headers.clear();
        keep(&HEADERS, headers);
    }
}
