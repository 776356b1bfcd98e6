//! Pipes that carry bytes from one socket to another within the kernel (splice(2)).
//!
//! A stream has a pipe only while bytes are in it: it takes an empty one when its socket is readable, and gives it back when the
//! other socket has taken everything. So an idle stream holds none, a worker mostly uses one and the same, and only streams whose
//! receivers are slow hold more, up to a limit.

use std::cell::RefCell;
use std::io;
use std::os::fd::OwnedFd;
use std::task::{Context, Poll, ready};

use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::unistd::pipe2;
use tokio::io::Interest;
use tokio::net::TcpStream;

/// Most bytes in a pipe. It takes as many pages, which a user without privileges may do (`pipe-max-size`); where the kernel grants
/// fewer, less fits.
const ROOM: usize = 512 * 1024;
/// Pipes that one worker has at most: with all of them full, 16 MiB of the kernel's memory. Beyond it streams are copied.
pub(crate) const MOST: usize = if cfg!(test) { 4 } else { 32 };
/// Empty pipes that a worker keeps.
const SPARE: usize = 2;

thread_local! {
    static PIPES: RefCell<Pipes> = const { RefCell::new(Pipes { spare: Vec::new(), taken: 0, unusable: false }) };
}

/// The pipes of one worker.
struct Pipes {
    spare: Vec<Ends>,
    /// By streams
    taken: usize,
    /// The kernel, or what stands in for it, does not splice sockets.
    unusable: bool,
}

#[derive(Debug)]
struct Ends {
    read: OwnedFd,
    write: OwnedFd,
}

impl Ends {
    fn new() -> nix::Result<Self> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        // Refused above a limit of the user's: it is then as large as it is.
        let _ = fcntl(&write, FcntlArg::F_SETPIPE_SZ(i32::try_from(ROOM).unwrap_or(i32::MAX)));
        Ok(Self { read, write })
    }
}

/// A pipe of one direction of a stream, given back on drop.
#[derive(Debug)]
pub(crate) struct Pipe {
    ends: Option<Ends>,
    held: usize,
}

/// What filling a pipe came to.
#[derive(Debug)]
pub(crate) enum Filled {
    /// So many bytes are in it; none: the sender has ended
    With(Pipe, usize),
    /// No pipe is to be had, or no socket can be spliced: the bytes have to be copied
    Not,
}

impl Pipe {
    fn take() -> Option<Self> {
        PIPES.with_borrow_mut(|pipes| {
            if pipes.unusable || pipes.taken >= MOST {
                return None;
            }
            let ends = match pipes.spare.pop() {
                Some(ends) => ends,
                None => Ends::new().ok()?,
            };
            pipes.taken += 1;
            Some(Self { ends: Some(ends), held: 0 })
        })
    }

    /// Reads what the socket has into an empty pipe.
    ///
    /// # Errors
    /// The socket's.
    pub(crate) fn poll_fill(cx: &mut Context<'_>, from: &TcpStream) -> Poll<io::Result<Filled>> {
        loop {
            ready!(from.poll_read_ready(cx))?;
            let Some(mut pipe) = Self::take() else { return Poll::Ready(Ok(Filled::Not)) };
            let Some(ends) = &pipe.ends else { return Poll::Ready(Ok(Filled::Not)) };
            // The pipe is empty, so that only the socket can be the one with nothing to do.
            match from.try_io(Interest::READABLE, || transfer(from, &ends.write, ROOM)) {
                Ok(bytes) => {
                    pipe.held = bytes;
                    return Poll::Ready(Ok(Filled::With(pipe, bytes)));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // Nothing was read yet, so nothing is lost by copying instead.
                Err(error) if is_unsupported(&error) => {
                    PIPES.with_borrow_mut(|pipes| pipes.unusable = true);
                    return Poll::Ready(Ok(Filled::Not));
                }
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    /// Writes all that is in it.
    ///
    /// # Errors
    /// The socket's.
    pub(crate) fn poll_empty(
        &mut self,
        cx: &mut Context<'_>,
        to: &TcpStream,
        moved: &mut bool,
    ) -> Poll<io::Result<()>> {
        while let Some(ends) = self.ends.as_ref().filter(|_| self.held > 0) {
            ready!(to.poll_write_ready(cx))?;
            match to.try_io(Interest::WRITABLE, || transfer(&ends.read, to, self.held)) {
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Ok(bytes) => {
                    self.held = self.held.saturating_sub(bytes);
                    *moved = true;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        let ends = self.ends.take();
        // A worker that ends has no list of pipes any more: this one is closed.
        let _ = PIPES.try_with(|pipes| {
            let mut pipes = pipes.borrow_mut();
            pipes.taken -= 1;
            if let Some(ends) = ends.filter(|_| self.held == 0 && pipes.spare.len() < SPARE) {
                pipes.spare.push(ends);
            }
        });
    }
}

fn transfer(from: impl std::os::fd::AsFd, to: impl std::os::fd::AsFd, most: usize) -> io::Result<usize> {
    let flags = SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK;
    Ok(splice(from, None, to, None, most, flags)?)
}

fn is_unsupported(error: &io::Error) -> bool {
    use nix::libc::{EINVAL, ENOSYS, EOPNOTSUPP, EPERM};
    matches!(error.raw_os_error(), Some(EINVAL | ENOSYS | EOPNOTSUPP | EPERM))
}

/// Pipes of this thread: with streams, and kept.
#[cfg(test)]
pub(crate) fn pipes() -> (usize, usize) {
    PIPES.with_borrow(|pipes| (pipes.taken, pipes.spare.len()))
}
