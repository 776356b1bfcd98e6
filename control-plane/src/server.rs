//! The gRPC listener: TLS by rustls, so that every call knows the certificate of its connection.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::Routes;
use tonic::transport::server::Connected;

use crate::peer::Peer;
use crate::tls::Terminator;

/// A handshake takes at most this long.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// Handshakes at once; further connections wait in the listener's queue.
const MAX_HANDSHAKES: usize = 512;
/// A proxy that answers no ping for this long is gone.
const KEEPALIVE: Duration = Duration::from_secs(10);

/// A connection after its handshake.
#[derive(Debug)]
pub struct Connection {
    tls: TlsStream<TcpStream>,
    peer: Peer,
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tls).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_shutdown(cx)
    }
}

/// Serves gRPC until `stop`, then lets calls in progress end. A renewed certificate is used from the
/// next connection on.
///
/// # Errors
/// Those of tonic's transport.
pub async fn serve(
    listener: TcpListener,
    tls: Arc<Terminator>,
    routes: Routes,
    stop: impl Future<Output = ()> + Send + 'static,
) -> Result<(), tonic::transport::Error> {
    let (sender, connections) = mpsc::channel(16);
    let accepting = tokio::spawn(accept(listener, tls, sender));
    let served = tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .max_concurrent_streams(64)
        .add_routes(routes)
        .serve_with_incoming_shutdown(ReceiverStream::new(connections), stop)
        .await;
    accepting.abort();
    served
}

async fn accept(listener: TcpListener, tls: Arc<Terminator>, sender: mpsc::Sender<io::Result<Connection>>) {
    let handshakes = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    loop {
        let Ok(permit) = handshakes.clone().acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, most often: others end meanwhile.
                tracing::warn!(%error, "accepting a connection failed");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let tls = Arc::clone(&tls);
        let sender = sender.clone();
        tokio::spawn(async move {
            let address = stream.peer_addr();
            match tokio::time::timeout(HANDSHAKE, handshake(stream, &tls)).await {
                Ok(Ok(connection)) => {
                    drop(permit);
                    let _ = sender.send(Ok(connection)).await;
                }
                Ok(Err(error)) => tracing::info!(?address, %error, "TLS handshake failed"),
                Err(_) => tracing::info!(?address, "TLS handshake took too long"),
            }
        });
    }
}

async fn handshake(stream: TcpStream, tls: &Terminator) -> io::Result<Connection> {
    stream.set_nodelay(true)?;
    let (tls, peer) = tls.accept(stream).await?;
    Ok(Connection { tls, peer })
}
