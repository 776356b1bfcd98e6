//! A TLS connection over a socket that owns a buffer only while something is in it.
//!
//! rustls' buffered connections keep 4 KiB for reading as long as they live, and read no more than that at once. Here records
//! are read into a buffer of the thread, as many as it holds with one system call, and what is encrypted is written from
//! another; only what did not end in that moment is copied into a buffer of the connection's own.

#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustls::CommonState;
use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, EncryptError, InsufficientSizeError, UnbufferedStatus};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The largest record on the wire: payload, what encryption adds at most, header.
const RECORD: usize = 16 * 1024 + 256 + 5;
/// A full record of TLS 1.3, whichever its cipher: whoever reads whole ones has no beginnings to keep.
const FULL: usize = 16 * 1024 + 5 + 1 + 16;
/// Bytes read from the socket at once, for readers of up to two records and of more.
const READ: [usize; 2] = [2 * FULL, 4 * FULL];
/// Bytes encrypted at once.
const PLAIN: usize = 64 * 1024;
/// Bytes of a message that has not come to its end: rustls' own limit for handshakes.
const UNFINISHED: usize = 64 * 1024;

/// A guess at the largest message of a handshake but certificates.
const HANDSHAKE: usize = 2048;

/// Room for these bytes in records.
fn room(plain: usize) -> usize {
    plain + (plain / (16 * 1024) + 1) * 64
}

thread_local! {
    // Taken while a connection is polled: no poll lies within another's.
    static INCOMING: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
    static OUTGOING: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
    static GATHERED: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

type Scratch = std::thread::LocalKey<Cell<Vec<u8>>>;

/// The thread's buffer, or a new one where the thread is ending.
fn borrow(scratch: &'static Scratch) -> Vec<u8> {
    scratch.try_with(Cell::take).unwrap_or_default()
}

/// Gives it back; one that had to grow is not kept.
fn give_back(scratch: &'static Scratch, buffer: Vec<u8>) {
    if buffer.capacity() <= 4 * RECORD {
        let _ending = scratch.try_with(|kept| kept.set(buffer));
    }
}

/// One side's connection of rustls, as [`Stream`] drives it.
pub trait Session {
    /// Of rustls
    type Data;
    /// Takes in records and says what is to be done next.
    fn process<'c, 'i>(&'c mut self, records: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;
    /// What both sides have in common.
    fn common(&self) -> &CommonState;
}

impl Session for UnbufferedServerConnection {
    type Data = ServerConnectionData;

    fn process<'c, 'i>(&'c mut self, records: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(records)
    }

    fn common(&self) -> &CommonState {
        self
    }
}

impl Session for UnbufferedClientConnection {
    type Data = ClientConnectionData;

    fn process<'c, 'i>(&'c mut self, records: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(records)
    }

    fn common(&self) -> &CommonState {
        self
    }
}

/// A TLS connection. See the module.
pub struct Stream<S, IO> {
    io: IO,
    session: S,
    /// The beginning of a record, or of a handshake message of several
    unfinished: Vec<u8>,
    /// Decrypted and not read yet, from `read` on
    plain: Vec<u8>,
    read: usize,
    out: Outgoing,
    /// The peer has said that it sends nothing more.
    closed: bool,
    /// We have.
    shut: bool,
    /// The socket is at its end.
    eof: bool,
    /// Nothing works any more.
    broken: Option<rustls::Error>,
}

/// The server's side.
pub type Accepted<IO> = Stream<UnbufferedServerConnection, IO>;
/// The client's side.
pub type Dialled<IO> = Stream<UnbufferedClientConnection, IO>;

impl<S, IO> std::fmt::Debug for Stream<S, IO> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stream").field("closed", &self.closed).field("broken", &self.broken).finish_non_exhaustive()
    }
}

impl<S, IO> Stream<S, IO> {
    /// The socket and rustls' connection.
    pub fn get_ref(&self) -> (&IO, &S) {
        (&self.io, &self.session)
    }
}

fn broken(error: rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// Decrypted bytes go to the reader, and what has no room there is kept.
fn deliver(payload: &[u8], buf: &mut ReadBuf<'_>, plain: &mut Vec<u8>) {
    let room = if plain.is_empty() { buf.remaining().min(payload.len()) } else { 0 };
    let (now, later) = payload.split_at(room);
    buf.put_slice(now);
    plain.extend_from_slice(later);
}

/// What is encrypted and not written yet: in the thread's buffer while the connection is polled, else in one of its own.
#[derive(Default)]
struct Outgoing {
    bytes: Vec<u8>,
    from: usize,
    to: usize,
    /// `bytes` is the thread's.
    shared: bool,
}

impl Outgoing {
    fn rest(&self) -> &[u8] {
        self.bytes.get(self.from..self.to).unwrap_or_default()
    }

    /// Appends what `write` writes into as much room as it needs; `room` is a guess.
    fn append<E: Required>(
        &mut self,
        mut room: usize,
        mut write: impl FnMut(&mut [u8]) -> Result<usize, E>,
    ) -> Result<(), E> {
        if self.bytes.is_empty() {
            self.bytes = borrow(&OUTGOING);
            self.shared = true;
        }
        loop {
            if self.bytes.len() < self.to + room {
                self.bytes.resize(self.to + room, 0);
            }
            match write(self.bytes.get_mut(self.to..).unwrap_or_default()) {
                Ok(written) => {
                    self.to += written;
                    return Ok(());
                }
                Err(error) => {
                    let there = self.bytes.len() - self.to;
                    room = match error.required() {
                        Some(required) if required > there => required,
                        _ => return Err(error),
                    };
                }
            }
        }
    }

    /// The poll is over: the thread gets its buffer back, and what did not leave is kept in one of its size.
    fn settle(&mut self) {
        if self.from < self.to && !self.shared {
            return;
        }
        let rest = self.rest().to_vec();
        let bytes = std::mem::replace(&mut self.bytes, rest);
        if self.shared {
            give_back(&OUTGOING, bytes);
        }
        (self.from, self.to, self.shared) = (0, self.bytes.len(), false);
    }
}

/// An error that may say how much room is needed.
trait Required {
    fn required(&self) -> Option<usize>;
}

impl Required for EncodeError {
    fn required(&self) -> Option<usize> {
        match self {
            Self::InsufficientSize(InsufficientSizeError { required_size }) => Some(*required_size),
            Self::AlreadyEncoded => None,
        }
    }
}

impl Required for EncryptError {
    fn required(&self) -> Option<usize> {
        match self {
            Self::InsufficientSize(InsufficientSizeError { required_size }) => Some(*required_size),
            Self::EncryptExhausted => None,
        }
    }
}

impl<S: Session, IO> Stream<S, IO> {
    fn new(session: S, io: IO) -> Self {
        Self {
            io,
            session,
            unfinished: Vec::new(),
            plain: Vec::new(),
            read: 0,
            out: Outgoing::default(),
            closed: false,
            shut: false,
            eof: false,
            broken: None,
        }
    }

    /// Takes in records until rustls needs more; how many bytes of them are done with. What is to be sent is put into `out`, at its end.
    fn process(&mut self, records: &mut [u8], buf: &mut ReadBuf<'_>) -> Result<usize, rustls::Error> {
        let mut done = 0;
        loop {
            let Some(rest) = records.get_mut(done..) else { return Ok(done) };
            let UnbufferedStatus { mut discard, state } = self.session.process(rest);
            let waits = match state? {
                ConnectionState::ReadTraffic(mut traffic) => {
                    while let Some(record) = traffic.next_record() {
                        let record = record?;
                        discard += record.discard;
                        deliver(record.payload, buf, &mut self.plain);
                    }
                    false
                }
                ConnectionState::EncodeTlsData(mut data) => {
                    let encoded = self.out.append(HANDSHAKE, |room| data.encode(room));
                    encoded.map_err(|error| rustls::Error::General(error.to_string()))?;
                    false
                }
                // It is in `out`, in its order.
                ConnectionState::TransmitTlsData(data) => {
                    data.done();
                    false
                }
                ConnectionState::PeerClosed => {
                    self.closed = true;
                    false
                }
                ConnectionState::WriteTraffic(_) | ConnectionState::BlockedHandshake | ConnectionState::Closed => true,
                // No configuration of ours accepts early data.
                ConnectionState::ReadEarlyData(_) => return Err(rustls::Error::General("early data".into())),
                _ => return Err(rustls::Error::General("an unknown state of the connection".into())),
            };
            done += discard;
            if waits {
                // What follows a close is ignored.
                return Ok(if self.closed { records.len() } else { done });
            }
        }
    }

    /// The connection is over; what rustls has to say of that (an alert) is put into `out`.
    fn fail(&mut self, error: rustls::Error) -> io::Error {
        self.unfinished = Vec::new();
        while self.session.common().wants_write() {
            let Ok(ConnectionState::EncodeTlsData(mut data)) = self.session.process(&mut []).state else { break };
            if self.out.append(HANDSHAKE, |room| data.encode(room)).is_err() {
                break;
            }
        }
        self.broken = Some(error.clone());
        broken(error)
    }

    /// Takes in what was read; `bytes` are the connection's unfinished ones and what came after them.
    fn take_in(&mut self, bytes: &mut [u8], buf: &mut ReadBuf<'_>) -> io::Result<()> {
        match self.process(bytes, buf) {
            Ok(done) => {
                let rest = bytes.get(done..).unwrap_or_default();
                if rest.len() > UNFINISHED {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "message buffer full"));
                }
                self.unfinished = rest.to_vec();
                Ok(())
            }
            Err(error) => Err(self.fail(error)),
        }
    }

    /// Encrypts some of these bytes into `out`; how many.
    fn encrypt(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut filled = bufs.iter().filter(|buf| !buf.is_empty());
        let (first, second) = (filled.next(), filled.next());
        let Some(first) = first else { return Ok(0) };
        if second.is_none() {
            return self.encrypt_one(first.get(..PLAIN).unwrap_or(first));
        }
        // One record for all of them costs less than one for each.
        let mut gathered = borrow(&GATHERED);
        gathered.clear();
        for buf in bufs {
            let room = PLAIN - gathered.len();
            gathered.extend_from_slice(buf.get(..room).unwrap_or(buf));
        }
        let result = self.encrypt_one(&gathered);
        give_back(&GATHERED, gathered);
        result
    }

    fn encrypt_one(&mut self, plain: &[u8]) -> io::Result<usize> {
        self.ask(|state, out| match state {
            ConnectionState::WriteTraffic(mut traffic) => {
                out.append(room(plain.len()), |room| traffic.encrypt(plain, room)).map_err(io::Error::other)?;
                Ok(plain.len())
            }
            _ => Err(io::ErrorKind::BrokenPipe.into()),
        })
    }

    /// Does something with the connection once it has nothing else to say.
    fn ask<T>(
        &mut self,
        f: impl FnOnce(ConnectionState<'_, '_, S::Data>, &mut Outgoing) -> io::Result<T>,
    ) -> io::Result<T> {
        loop {
            // Only with them rustls knows where it is.
            let UnbufferedStatus { discard, state } = self.session.process(&mut self.unfinished);
            match state.map_err(broken)? {
                ConnectionState::EncodeTlsData(mut data) => {
                    self.out.append(HANDSHAKE, |room| data.encode(room)).map_err(io::Error::other)?;
                }
                ConnectionState::TransmitTlsData(data) => data.done(),
                ConnectionState::PeerClosed => self.closed = true,
                state => return f(state, &mut self.out),
            }
            self.unfinished.drain(..discard.min(self.unfinished.len()));
        }
    }

    fn failure(&self) -> io::Result<()> {
        self.broken.clone().map_or(Ok(()), |error| Err(broken(error)))
    }
}

impl<S, IO> Stream<S, IO>
where
    S: Session,
    IO: AsyncRead + AsyncWrite + Unpin,
{
    /// Reads from the socket once, and takes that in.
    fn poll_more(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut bytes = borrow(&INCOMING);
        let kept = self.unfinished.len();
        let [few, many] = READ;
        let wanted = if buf.remaining() > few { many } else { few }.max(kept + RECORD);
        if bytes.len() < wanted {
            bytes.resize(wanted, 0);
        }
        let (head, room) = bytes.get_mut(..wanted).unwrap_or_default().split_at_mut(kept);
        head.copy_from_slice(&self.unfinished);
        let mut incoming = ReadBuf::new(room);
        let polled = Pin::new(&mut self.io).poll_read(cx, &mut incoming);
        let end = kept + incoming.filled().len();
        let result = match polled {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Ready(Ok(())) if end == kept => {
                self.eof = true;
                Poll::Ready(Ok(()))
            }
            Poll::Ready(Ok(())) => {
                let taken = self.take_in(bytes.get_mut(..end).unwrap_or_default(), buf);
                if taken.is_err() {
                    // The alert, if the socket takes it: nothing waits for that.
                    let _sent = self.poll_out(cx);
                } else if !self.session.common().is_handshaking() {
                    self.out.settle();
                }
                Poll::Ready(taken)
            }
        };
        give_back(&INCOMING, bytes);
        result
    }

    /// Writes what is encrypted. The thread has its buffer back afterwards.
    fn poll_out(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = loop {
            let rest = self.out.rest();
            if rest.is_empty() {
                break Poll::Ready(Ok(()));
            }
            match Pin::new(&mut self.io).poll_write(cx, rest) {
                Poll::Ready(Ok(0)) => break Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(n)) => self.out.from += n,
                Poll::Ready(Err(error)) => break Poll::Ready(Err(error)),
                Poll::Pending => break Poll::Pending,
            }
        };
        self.out.settle();
        polled
    }

    /// The handshake, to its end: what it has to say has left, the server's ticket included.
    pub(super) async fn handshake(&mut self) -> io::Result<()> {
        std::future::poll_fn(|cx| {
            let mut none = ReadBuf::new(&mut []);
            loop {
                // A client speaks first.
                self.ask(|_, _| Ok(()))?;
                let sent = self.poll_out(cx)?;
                if sent.is_ready() {
                    ready!(Pin::new(&mut self.io).poll_flush(cx))?;
                }
                if !self.session.common().is_handshaking() {
                    return sent.map(Ok);
                }
                // Also while the peer takes nothing: it may be waiting for the same.
                ready!(self.poll_more(cx, &mut none))?;
                if self.eof {
                    return Poll::Ready(Err(io::Error::new(io::ErrorKind::UnexpectedEof, "tls handshake eof")));
                }
            }
        })
        .await
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Accepted<IO> {
    /// A connection that was accepted, before its handshake.
    pub(super) fn accepted(config: std::sync::Arc<rustls::ServerConfig>, io: IO) -> Result<Self, rustls::Error> {
        Ok(Self::new(UnbufferedServerConnection::new(config)?, io))
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Dialled<IO> {
    /// A connection that was dialled, before its handshake.
    pub(super) fn dialled(
        config: std::sync::Arc<rustls::ClientConfig>,
        name: rustls_pki_types::ServerName<'static>,
        io: IO,
    ) -> Result<Self, rustls::Error> {
        Ok(Self::new(UnbufferedClientConnection::new(config, name)?, io))
    }
}

impl<S, IO> AsyncRead for Stream<S, IO>
where
    S: Session + Unpin,
    IO: AsyncRead + AsyncWrite + Unpin,
{
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buf.filled().len();
        loop {
            if let Some(rest) = this.plain.get(this.read..).filter(|rest| !rest.is_empty()) {
                let n = rest.len().min(buf.remaining());
                buf.put_slice(rest.get(..n).unwrap_or(rest));
                this.read += n;
                if this.read == this.plain.len() {
                    this.plain = Vec::new();
                    this.read = 0;
                }
                return Poll::Ready(Ok(()));
            }
            if buf.filled().len() > before || this.closed || buf.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
            this.failure()?;
            if this.eof {
                let why = "peer closed connection without sending TLS close_notify";
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::UnexpectedEof, why)));
            }
            match ready!(this.poll_more(cx, buf)) {
                // What came before it is read first.
                Err(_) if buf.filled().len() > before || !this.plain.is_empty() => {}
                result => result?,
            }
        }
    }
}

impl<S, IO> AsyncWrite for Stream<S, IO>
where
    S: Session + Unpin,
    IO: AsyncRead + AsyncWrite + Unpin,
{
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        this.failure()?;
        ready!(this.poll_out(cx))?;
        if this.shut {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let written = this.encrypt(bufs)?;
        if let Poll::Ready(Err(error)) = this.poll_out(cx) {
            return Poll::Ready(Err(error));
        }
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        this.failure()?;
        if this.session.common().wants_write() {
            this.ask(|_, _| Ok(()))?;
        }
        ready!(this.poll_out(cx))?;
        Pin::new(&mut this.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if !this.shut {
            this.shut = true;
            // Of a connection that failed the alert was the last word.
            if this.broken.is_none() {
                this.ask(|state, out| match state {
                    ConnectionState::WriteTraffic(mut traffic) => {
                        out.append(HANDSHAKE, |room| traffic.queue_close_notify(room)).map_err(io::Error::other)
                    }
                    _ => Ok(()),
                })?;
            }
        }
        ready!(this.poll_out(cx))?;
        match ready!(Pin::new(&mut this.io).poll_shutdown(cx)) {
            Err(error) if error.kind() != io::ErrorKind::NotConnected => Poll::Ready(Err(error)),
            _ => Poll::Ready(Ok(())),
        }
    }
}
