//! Relays between real sockets.

use std::cell::Cell;
use std::rc::Rc;

use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinHandle;

use super::*;
use crate::splice::pipes;
use crate::testing::*;

const MANY: usize = 8 << 20;
/// Of each socket, so that what is under way is less than that.
const SOCKET: usize = 512 * 1024;

/// The two far ends of a relay, and the relay's result.
struct Relayed {
    client: TcpStream,
    server: TcpStream,
    task: JoinHandle<(io::Result<End>, Passed)>,
    /// As it is now
    passed: Rc<Cell<Passed>>,
}

impl Relayed {
    async fn start() -> Self {
        let (client, near) = pair().await;
        let (far, server) = pair().await;
        let passed = Rc::new(Cell::default());
        let seen = passed.clone();
        let task = tokio::task::spawn_local(async move {
            let mut relay = Relay::new(Io::from(near), Io::from(far), HANG, |_| {});
            let ended = std::future::poll_fn(|cx| {
                let polled = Pin::new(&mut relay).poll(cx);
                seen.set(relay.passed());
                polled
            });
            (ended.await, relay.passed())
        });
        Self { client, server, task, passed }
    }
}

/// A connection's two ends.
async fn pair() -> (TcpStream, TcpStream) {
    let (listener, address) = listen().await;
    let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
    let (near, far) = (near.unwrap(), far.unwrap().0);
    for end in [&near, &far] {
        let socket = socket2::SockRef::from(end);
        socket.set_send_buffer_size(SOCKET).unwrap();
        socket.set_recv_buffer_size(SOCKET).unwrap();
    }
    (near, far)
}

fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut noise = vec![0; bytes];
    rng.fill(&mut noise);
    noise
}

fn digest(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

async fn send(to: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) {
    within(to.write_all(bytes)).await.unwrap();
}

async fn receive(from: &mut (impl AsyncRead + Unpin), bytes: usize) -> Vec<u8> {
    let mut got = vec![0; bytes];
    within(from.read_exact(&mut got)).await.unwrap();
    got
}

async fn to_the_end(from: &mut (impl AsyncRead + Unpin)) -> Vec<u8> {
    let mut got = Vec::new();
    within(from.read_to_end(&mut got)).await.unwrap();
    got
}

#[test]
fn bulk_passes_whole_both_ways_at_once_and_through_pipes() {
    run(async {
        let Relayed { client, server, task, .. } = Relayed::start().await;
        let (up, down) = (noise(1, MANY), noise(2, MANY));
        let ((mut client_read, mut client_write), (mut server_read, mut server_write)) =
            (client.into_split(), server.into_split());
        let sends = async {
            let up_sent = async {
                send(&mut client_write, &up).await;
                client_write.shutdown().await.unwrap();
            };
            let down_sent = async {
                send(&mut server_write, &down).await;
                server_write.shutdown().await.unwrap();
            };
            tokio::join!(up_sent, down_sent)
        };
        let (_, got_up, got_down) = tokio::join!(sends, to_the_end(&mut server_read), to_the_end(&mut client_read));
        assert!(digest(&got_up) == digest(&up) && digest(&got_down) == digest(&down));
        let (ended, passed) = task.await.unwrap();
        assert_eq!(ended.unwrap(), End::Both);
        assert_eq!((passed.sent, passed.received), (MANY as u64, MANY as u64));
        assert!(passed.spliced > MANY as u64, "of {} bytes only {} were spliced", 2 * MANY, passed.spliced);
        let (taken, spare) = pipes();
        assert!(taken == 0 && spare <= 2, "{taken} taken, {spare} spare");
    });
}

#[test]
fn either_side_may_end_first_and_still_listen() {
    run(async {
        for client_first in [true, false] {
            let Relayed { client, server, task, .. } = Relayed::start().await;
            let (mut first, mut second) = if client_first { (client, server) } else { (server, client) };
            let (there, back) = (noise(3, MANY), noise(4, MANY));
            let ends = async {
                send(&mut first, &there).await;
                first.shutdown().await.unwrap();
            };
            let (_, got) = tokio::join!(ends, to_the_end(&mut second));
            assert!(digest(&got) == digest(&there));
            let answers = async {
                send(&mut second, &back).await;
                second.shutdown().await.unwrap();
            };
            let (_, got) = tokio::join!(answers, to_the_end(&mut first));
            assert!(digest(&got) == digest(&back));
            assert_eq!(task.await.unwrap().0.unwrap(), End::Both);
        }
    });
}

/// Lets everything on this thread run until nothing passes any more.
async fn settled(passed: &Cell<Passed>) {
    let mut quiet = 0;
    let mut seen = passed.get().sent;
    while quiet < 500 {
        tokio::task::yield_now().await;
        quiet = if passed.get().sent == seen { quiet + 1 } else { 0 };
        seen = passed.get().sent;
    }
}

/// A relay whose sender has more than it can send, and whose receiver has read nothing.
async fn stalled(up: &Rc<Vec<u8>>) -> (Relayed, JoinHandle<io::Result<()>>) {
    let mut relayed = Relayed::start().await;
    let (_read, mut write) = std::mem::replace(&mut relayed.client, pair().await.0).into_split();
    let bytes = up.clone();
    let writes = tokio::task::spawn_local(async move {
        let sent = write.write_all(&bytes).await;
        drop(_read);
        sent
    });
    settled(&relayed.passed).await;
    assert!(!writes.is_finished(), "the sender was not stopped");
    (relayed, writes)
}

#[test]
fn a_slow_receiver_stops_the_sender_and_loses_nothing() {
    run(async {
        let up = Rc::new(noise(5, 2 * MANY));
        let (mut relayed, writes) = stalled(&up).await;
        let held = relayed.passed.get();
        assert!(held.spliced > 0, "nothing was spliced");
        assert!(held.sent < MANY as u64, "{} bytes were taken from the sender", held.sent);
        assert_eq!(pipes().0, 1, "what the receiver has not taken is in one pipe");
        let got = receive(&mut relayed.server, up.len()).await;
        assert!(digest(&got) == digest(&up));
        within(writes).await.unwrap().unwrap();
        drop(relayed.server);
        within(relayed.task).await.unwrap().0.ok();
        assert_eq!(pipes().0, 0);
    });
}

#[test]
fn a_reset_ends_both_sides_and_gives_the_pipe_back() {
    run(async {
        let up = Rc::new(noise(6, 2 * MANY));
        let (relayed, writes) = stalled(&up).await;
        assert_eq!(pipes().0, 1);
        relayed.server.set_zero_linger().unwrap();
        drop(relayed.server);
        let (ended, passed) = within(relayed.task).await.unwrap();
        let kind = ended.unwrap_err().kind();
        assert!(matches!(kind, io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe), "{kind:?}");
        assert!(passed.sent < up.len() as u64);
        within(writes).await.unwrap().unwrap_err();
        assert_eq!(pipes().0, 0);
    });
}

#[test]
fn a_relay_that_is_cut_gives_its_pipe_back() {
    run(async {
        let up = Rc::new(noise(7, 2 * MANY));
        let (relayed, writes) = stalled(&up).await;
        assert_eq!(pipes(), (1, 0), "the only pipe is full");
        relayed.task.abort();
        assert!(within(relayed.task).await.unwrap_err().is_cancelled());
        // What was in it must not come out of another stream: it is closed, not kept.
        assert_eq!(pipes(), (0, 0));
        within(writes).await.unwrap().unwrap_err();
    });
}

#[test]
fn a_stream_goes_to_pipes_and_back_as_it_talks() {
    run(async {
        let Relayed { mut client, mut server, task, passed } = Relayed::start().await;
        let mut spliced = 0;
        for round in 0..3 {
            let bulk = noise(round, MANY / 2);
            let (_, got) = tokio::join!(send(&mut client, &bulk), receive(&mut server, bulk.len()));
            assert!(digest(&got) == digest(&bulk));
            assert!(passed.get().spliced > spliced, "round {round}: bulk was copied");
            // The first of these are still spliced.
            for number in 0..40_u8 {
                if number == 20 {
                    spliced = passed.get().spliced;
                }
                send(&mut client, &[number; 128]).await;
                assert_eq!(receive(&mut server, 128).await, [number; 128]);
                send(&mut server, &[number; 64]).await;
                assert_eq!(receive(&mut client, 64).await, [number; 64]);
            }
            assert_eq!(passed.get().spliced, spliced, "round {round}: small talk was spliced");
            assert_eq!(pipes().0, 0);
        }
        drop((client, server));
        task.await.unwrap().0.unwrap();
    });
}

#[test]
fn without_a_free_pipe_bytes_are_copied() {
    run(async {
        let up = Rc::new(noise(8, 2 * MANY));
        let mut full = Vec::new();
        while pipes().0 < crate::splice::MOST {
            full.push(stalled(&up).await);
        }
        let Relayed { mut client, mut server, passed, .. } = Relayed::start().await;
        let (_, got) = tokio::join!(send(&mut client, &up), receive(&mut server, up.len()));
        assert!(digest(&got) == digest(&up));
        assert_eq!(passed.get().spliced, 0);
        assert_eq!(pipes().0, crate::splice::MOST);
    });
}
