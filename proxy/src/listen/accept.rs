//! Listening sockets, one per worker on the same address, and the balance between workers.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;

use super::{inbound, outbound};
use crate::drain::Phase;
use crate::state::WorkerLoad;
use crate::worker::Worker;

const BACKLOG: i32 = 4096;
/// Pause after an error that is of the process and not of the connection (no more descriptors).
const PAUSE: Duration = Duration::from_millis(50);

/// Which listener a connection came in at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// From others to the application
    Inbound,
    /// From the application to others
    Outbound,
}

/// An accepted connection on its way to a worker. Counts as that worker's from now on.
#[derive(Debug)]
pub struct Accepted {
    socket: TcpStream,
    way: Way,
    count: Count,
}

/// One open connection of a worker; given back on drop.
#[derive(Debug)]
pub(crate) struct Count {
    load: Arc<WorkerLoad>,
    way: Way,
}

impl Count {
    pub(crate) fn new(load: Arc<WorkerLoad>, way: Way) -> Self {
        let count = Self { load, way };
        count.of().fetch_add(1, Ordering::Relaxed);
        count
    }

    fn of(&self) -> &AtomicUsize {
        match self.way {
            Way::Inbound => &self.load.inbound,
            Way::Outbound => &self.load.outbound,
        }
    }
}

impl Drop for Count {
    fn drop(&mut self) {
        self.of().fetch_sub(1, Ordering::Relaxed);
    }
}

/// One listener per worker on one address. Port 0 is chosen once for all of them.
///
/// # Errors
/// Names the address and what keeps it from being bound.
pub fn bind(address: SocketAddr, workers: usize) -> io::Result<Vec<TcpListener>> {
    let mut address = address;
    let mut listeners = Vec::with_capacity(workers);
    for _ in 0..workers {
        let listener = bind_one(address)
            .map_err(|error| io::Error::new(error.kind(), format!("{address} cannot be listened on: {error}")))?;
        address = listener.local_addr()?;
        listeners.push(listener);
    }
    Ok(listeners)
}

fn bind_one(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() && address.ip().is_unspecified() {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Accepts until the listener's time is over: inbound ends with [`Phase::Stopped`], outbound with [`Phase::Cut`].
pub(crate) async fn accept(
    worker: Rc<Worker>,
    listener: TcpListener,
    way: Way,
    others: Vec<mpsc::UnboundedSender<Accepted>>,
) {
    // Its successor is unsafe, for types whose descriptor could change while registered; a listener's cannot.
    #[allow(deprecated)]
    let listener = match AsyncFd::new(listener) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(%error, "a listener cannot be watched");
            return;
        }
    };
    let end = worker.drain.reached(if way == Way::Inbound { Phase::Stopped } else { Phase::Cut });
    tokio::pin!(end);
    loop {
        tokio::select! {
            () = &mut end => break,
            ready = listener.readable() => {
                let Ok(mut ready) = ready else { return };
                match ready.try_io(|listener| listener.get_ref().accept()) {
                    Ok(Ok((socket, _))) => place(&worker, socket, way, &others),
                    Ok(Err(error)) => pause(&error).await,
                    Err(_would_block) => {}
                }
            }
        }
    }
    // Closing a listener resets what waits in its queue: take it first.
    while let Ok((socket, _)) = listener.get_ref().accept() {
        place(&worker, socket, way, &others);
    }
}

async fn pause(error: &io::Error) {
    // The client was gone before it was accepted: its own affair.
    if !matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset) {
        tracing::warn!(%error, "accepting failed");
        tokio::time::sleep(PAUSE).await;
    }
}

/// Keeps the connection, or hands it to a worker with less to do: the kernel's hash is blind to load. The socket is not
/// registered with a reactor yet, so this costs a message.
fn place(worker: &Rc<Worker>, socket: TcpStream, way: Way, others: &[mpsc::UnboundedSender<Accepted>]) {
    worker.load.accepted.fetch_add(1, Ordering::Relaxed);
    let loads = &worker.proxy.workers;
    let least = loads.iter().enumerate().min_by_key(|(_, load)| load.open());
    if let Some((index, load)) = least
        && index != worker.index
        && worker.load.open() > load.open()
        && let Some(other) = others.get(index)
    {
        let accepted = Accepted { socket, way, count: Count::new(load.clone(), way) };
        match other.send(accepted) {
            Ok(()) => {
                worker.load.handed_over.fetch_add(1, Ordering::Relaxed);
            }
            Err(mpsc::error::SendError(accepted)) => adopt(worker, accepted),
        }
        return;
    }
    adopt(worker, Accepted { socket, way, count: Count::new(worker.load.clone(), way) });
}

/// Serves a connection on this worker.
pub(crate) fn adopt(worker: &Rc<Worker>, accepted: Accepted) {
    let Accepted { socket, way, count } = accepted;
    let worker = worker.clone();
    let stream = socket.set_nonblocking(true).and_then(|()| tokio::net::TcpStream::from_std(socket));
    let stream = match stream {
        Ok(stream) => stream,
        Err(error) => {
            tracing::warn!(%error, "an accepted socket cannot be used");
            return;
        }
    };
    // Without it small writes wait for acknowledgements; nothing breaks.
    let _ = stream.set_nodelay(true);
    tokio::task::spawn_local(async move {
        let _count = count;
        let known = match way {
            Way::Inbound => Box::pin(inbound::accept(worker.clone(), stream)).await,
            Way::Outbound => Box::pin(outbound::accept(worker.clone(), stream)).await,
        };
        known.serve(worker).await;
    });
}
