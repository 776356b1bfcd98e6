//! What a client speaks, by looking at its bytes and leaving them in the socket.

use std::cell::RefCell;
use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use nix::sys::socket::{MsgFlags, recv};
use outrigger_core::detect::{Detected, Progress, detect};
use tokio::io::Interest;
use tokio::net::TcpStream;

/// As much as the detector ever asks for. Bytes.
const LOOK: usize = 16 * 1024;
/// From the first byte to a verdict; a client that is slower is opaque.
const VERDICT: Duration = Duration::from_secs(3);

/// What was seen.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// Nothing was sent in time
    Silent,
    /// The client closed without a byte
    Closed,
    /// It speaks this
    Speaks(Detected),
}

thread_local! {
    /// One per worker: a connection allocates nothing before it is known.
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; LOOK]);
}

/// Looks at a client's first bytes; the first must arrive within `silence`.
///
/// # Errors
/// When the connection breaks.
pub(super) async fn look(stream: &TcpStream, silence: Duration) -> io::Result<Seen> {
    let mut limit = silence;
    let mut deadline = tokio::time::Instant::now() + limit;
    loop {
        match peek(stream)? {
            Peeked::Nothing => {}
            Peeked::End => return Ok(Seen::Closed),
            Peeked::Is(detected) => return Ok(Seen::Speaks(detected)),
            Peeked::More if limit != VERDICT => {
                limit = VERDICT;
                deadline = tokio::time::Instant::now() + VERDICT;
            }
            Peeked::More => {}
        }
        if tokio::time::timeout_at(deadline, stream.readable()).await.is_err() {
            return Ok(if limit == VERDICT { Seen::Speaks(Detected::Opaque) } else { Seen::Silent });
        }
    }
}

enum Peeked {
    Nothing,
    End,
    More,
    Is(Detected),
}

fn peek(stream: &TcpStream) -> io::Result<Peeked> {
    let peeked = BUFFER.with_borrow_mut(|buffer| {
        let n = match stream.try_io(Interest::READABLE, || Ok(recv(stream.as_raw_fd(), buffer, MsgFlags::MSG_PEEK)?)) {
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Peeked::Nothing),
            Err(error) => return Err(error),
        };
        Ok(match detect(&buffer[..n]) {
            _ if n == 0 => Peeked::End,
            Progress::Found(detected) => Peeked::Is(detected),
            Progress::More if n == LOOK => Peeked::Is(Detected::Opaque),
            Progress::More => Peeked::More,
        })
    });
    if matches!(peeked, Ok(Peeked::More)) {
        // The bytes stay in the socket, so it would be readable at once: forget that, and the next arrival wakes.
        let _ = stream.try_io(Interest::READABLE, || Err::<(), _>(io::ErrorKind::WouldBlock.into()));
    }
    peeked
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (client, listener.accept().await.unwrap().0)
    }

    #[tokio::test]
    async fn a_request_in_pieces_is_recognised_and_left_in_the_socket() {
        let (mut client, mut server) = pair().await;
        client.write_all(b"GE").await.unwrap();
        {
            let looking = look(&server, Duration::from_secs(60));
            tokio::pin!(looking);
            assert!(futures_util::poll!(&mut looking).is_pending());
            client.write_all(b"T / HTTP/1.1\r\n\r\n").await.unwrap();
            assert_eq!(looking.await.unwrap(), Seen::Speaks(Detected::Http1));
        }
        let mut bytes = [0; 18];
        server.read_exact(&mut bytes).await.unwrap();
        assert_eq!(&bytes, b"GET / HTTP/1.1\r\n\r\n");
    }

    #[tokio::test]
    async fn silence_and_closing_are_told_apart() {
        let (client, server) = pair().await;
        assert_eq!(look(&server, Duration::from_millis(1)).await.unwrap(), Seen::Silent);
        drop(client);
        assert_eq!(look(&server, Duration::from_secs(60)).await.unwrap(), Seen::Closed);
    }
}
