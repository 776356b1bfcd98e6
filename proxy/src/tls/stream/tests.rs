use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::*;
use crate::identity::Identity;
use crate::tls::testing::TestCa;
use crate::tls::{ALPN_H2, Target, accept, connect};

const API: &str = "spiffe://td/ns/demo/sa/api";
const SNI: &str = "p80.api.demo.outrigger.internal";
const LIMIT: Duration = Duration::from_secs(60);

type Pair = (Dialled<Pieces>, Accepted<Pieces>);

/// A pipe that gives and takes so many bytes at once.
struct Pieces(DuplexStream, usize);

impl AsyncRead for Pieces {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut bytes = vec![0; self.1.min(buf.remaining())];
        let mut piece = ReadBuf::new(&mut bytes);
        ready!(Pin::new(&mut self.0).poll_read(cx, &mut piece))?;
        buf.put_slice(piece.filled());
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Pieces {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let n = self.1.min(buf.len());
        Pin::new(&mut self.0).poll_write(cx, &buf[..n])
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

fn identities() -> (Arc<Identity>, Arc<Identity>) {
    let ca = TestCa::new("root");
    (ca.store("spiffe://td/ns/demo/sa/web").last().unwrap(), ca.store(API).last().unwrap())
}

/// Two ends over a pipe that gives and takes so many bytes at once.
async fn pair(piece: usize) -> Pair {
    let (web, api) = identities();
    let (near, far) = tokio::io::duplex(64 * 1024);
    let (near, far) = (Pieces(near, piece), Pieces(far, piece));
    let expected = API.parse().unwrap();
    let target = Target { address: ([10, 0, 0, 1], 1).into(), sni: SNI, expected: &expected, alpn: &[ALPN_H2] };
    let (near, far) = tokio::join!(connect(near, &web, &target, LIMIT), accept(far, &api, LIMIT));
    (near.unwrap().0, far.unwrap().0)
}

fn bytes(n: usize) -> Vec<u8> {
    (0..n).map(|i| u8::try_from(i * 7 % 251).unwrap()).collect()
}

async fn send(stream: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) {
    stream.write_all(bytes).await.unwrap();
    stream.flush().await.unwrap();
}

/// Reads so many bytes, a few at a time.
async fn receive(stream: &mut (impl AsyncRead + Unpin), n: usize, step: usize) -> Vec<u8> {
    let (mut all, mut some) = (Vec::new(), vec![0; step]);
    while all.len() < n {
        let read = stream.read(&mut some).await.unwrap();
        assert!(read > 0, "the end after {} of {n} bytes", all.len());
        all.extend_from_slice(&some[..read]);
    }
    all
}

fn holds_nothing<S, IO>(stream: &Stream<S, IO>) -> bool {
    stream.unfinished.capacity() + stream.plain.capacity() + stream.out.bytes.capacity() == 0
}

#[tokio::test]
async fn bytes_pass_whatever_they_are_cut_into() {
    for (piece, sent, step) in
        [(3, 3_000, 100), (1000, 100_000, 7), (16_407, 300_000, 5000), (1 << 20, 400_000, 50_000)]
    {
        let (mut near, mut far) = pair(piece).await;
        let data = bytes(sent);
        let there = async {
            let (mut incoming, mut outgoing) = tokio::io::split(&mut near);
            tokio::join!(receive(&mut incoming, sent, step), send(&mut outgoing, &data)).0
        };
        let back = async {
            let (mut incoming, mut outgoing) = tokio::io::split(&mut far);
            tokio::join!(receive(&mut incoming, sent, step), send(&mut outgoing, &data)).0
        };
        let (there, back) = tokio::join!(there, back);
        assert!(there == data && back == data, "pieces of {piece}");
        assert!(holds_nothing(&near) && holds_nothing(&far), "pieces of {piece}");
    }
}

#[tokio::test]
async fn several_buffers_are_one_record() {
    let (mut near, mut far) = pair(usize::MAX).await;
    let n = near.write_vectored(&[IoSlice::new(b"head"), IoSlice::new(b""), IoSlice::new(b"body")]).await.unwrap();
    assert_eq!(n, 8);
    near.flush().await.unwrap();
    // A record comes with one read.
    let mut read = [0; 100];
    assert_eq!(far.read(&mut read).await.unwrap(), 8);
    assert_eq!(&read[..8], b"headbody");
}

#[tokio::test]
async fn a_close_ends_one_direction_and_an_end_without_one_is_an_error() {
    let (mut near, mut far) = pair(usize::MAX).await;
    send(&mut near, b"last").await;
    near.shutdown().await.unwrap();
    assert_eq!(receive(&mut far, 4, 10).await, b"last");
    assert_eq!(far.read(&mut [0; 10]).await.unwrap(), 0);
    assert_eq!(far.read(&mut [0; 10]).await.unwrap(), 0);
    assert_eq!(near.write(b"more").await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    send(&mut far, b"answer").await;
    assert_eq!(receive(&mut near, 6, 10).await, b"answer");
    drop(far);
    for _ in 0..2 {
        assert_eq!(near.read(&mut [0; 10]).await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}

#[tokio::test]
async fn a_forged_record_ends_the_connection_and_the_peer_is_told() {
    let (mut near, mut far) = pair(usize::MAX).await;
    send(&mut near, b"fine").await;
    near.io.write_all(&[&[23, 3, 3, 0, 40][..], &[0; 40]].concat()).await.unwrap();
    // What came before it counts.
    assert_eq!(receive(&mut far, 4, 4).await, b"fine");
    let cause = |error: io::Error| error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>()).cloned();
    let decrypt = Some(rustls::Error::DecryptError);
    assert_eq!(cause(far.read(&mut [0; 10]).await.unwrap_err()), decrypt);
    assert_eq!(cause(far.read(&mut [0; 10]).await.unwrap_err()), decrypt);
    assert_eq!(cause(far.write(b"x").await.unwrap_err()), decrypt);
    let told = rustls::Error::AlertReceived(rustls::AlertDescription::BadRecordMac);
    assert_eq!(cause(near.read(&mut [0; 10]).await.unwrap_err()), Some(told));
}

#[tokio::test]
async fn keys_are_renewed_when_the_peer_asks() {
    let (web, api) = identities();
    let (near, far) = tokio::io::duplex(64 * 1024);
    let connector = tokio_rustls::TlsConnector::from(Arc::clone(web.client_config()));
    let name = rustls_pki_types::ServerName::try_from(SNI).unwrap();
    let (near, far) = tokio::join!(connector.connect(name, near), accept(far, &api, LIMIT));
    let (mut near, (mut far, _)) = (near.unwrap(), far.unwrap());
    for _ in 0..3 {
        near.get_mut().1.refresh_traffic_keys().unwrap();
        send(&mut near, b"new keys").await;
        assert_eq!(receive(&mut far, 8, 3).await, b"new keys");
        send(&mut far, b"as here").await;
        assert_eq!(receive(&mut near, 7, 3).await, b"as here");
    }
    assert!(holds_nothing(&far));
}
