//! Clients that read nothing, and applications that read nothing: 10,000 streams over 100 HTTP/2 connections cost a proxy a bounded
//! amount of memory, which comes back; others are served meanwhile.
#![allow(clippy::print_stderr, clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use std::collections::VecDeque;
use std::net::{IpAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use outrigger_e2e::h2::{END, Kind, Windows};
use outrigger_e2e::{H2, Local, LocalProxy, until};

const STREAMS: usize = 100;
/// What a stalled stream may cost, bytes: `docs/performance.md`, "Slow clients and slow upstreams".
const PER_STREAM: u64 = 64 * 1024;
/// With what waits to be sent to a client whose window is open and whose socket is full.
const PER_UNREAD_STREAM: u64 = 144 * 1024;
/// What of it may still be held when the streams are gone.
const KEPT: u64 = 64 << 20;

/// An application that speaks HTTP/2 and answers `POST` at once, whatever of its body is still to come.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Application {
    /// `GET` gets a response that does not end: as much of it as the proxy takes
    Endless,
    /// `POST` with a body is never answered, and nothing of its body is read
    Deaf,
}

/// How many bytes of responses it has sent, and how many streams it has seen.
#[derive(Debug, Default)]
struct Seen {
    sent: AtomicU64,
    streams: AtomicU64,
}

impl Application {
    fn start(self, seen: Arc<Seen>) -> u16 {
        let listener = TcpListener::bind((IpAddr::from([127, 0, 0, 1]), 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let seen = seen.clone();
                thread::spawn(move || H2::accept(stream).and_then(|connection| self.serve(connection, &seen)));
            }
        });
        port
    }

    fn serve(self, mut connection: H2, seen: &Seen) -> Option<()> {
        let (mut windows, mut endless) = (Windows::default(), VecDeque::new());
        loop {
            let frame = connection.read()?;
            windows.see(&frame);
            if frame.kind == Kind::Headers {
                seen.streams.fetch_add(1, Ordering::SeqCst);
                // The method comes first: 0x82 is GET.
                let get = frame.payload.first() == Some(&0x82);
                match self {
                    Self::Endless if get => {
                        connection.respond(frame.stream, false)?;
                        endless.push_back(frame.stream);
                    }
                    Self::Deaf if !get && frame.flags & END == 0 => {}
                    _ => {
                        connection.respond(frame.stream, false)?;
                        let bytes = windows.take(frame.stream).min(2);
                        connection.try_write(Kind::Data, END, frame.stream, &b"ok"[..bytes as usize])?;
                    }
                }
            }
            endless.retain(|stream| frame.kind != Kind::Reset || *stream != frame.stream);
            let data = [b'x'; 16 * 1024];
            while let Some((at, bytes)) =
                (0..endless.len()).map(|at| (at, windows.take(endless[at]))).find(|(_, bytes)| *bytes > 0)
            {
                connection.try_write(Kind::Data, 0, endless[at], &data[..bytes as usize])?;
                seen.sent.fetch_add(u64::from(bytes), Ordering::SeqCst);
                // Each has its turn.
                endless.rotate_left(at + 1);
            }
        }
    }
}

/// A proxy at the caller, one worker, in front of the application.
fn proxy(port: u16) -> (Local, LocalProxy) {
    let local = Local::new(&format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: app, namespace: demo}}\n\
         spec: {{ports: [{{name: http, port: 80, targetPort: {port}, appProtocol: kubernetes.io/h2c}}]}}\n---\n\
         apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\n\
         metadata: {{name: app, namespace: demo, labels: {{kubernetes.io/service-name: app}}}}\n\
         ports: [{{name: http, port: {port}}}]\nendpoints: [{{addresses: [127.0.0.1]}}]\n---\n\
         apiVersion: outrigger.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: limits, namespace: demo}}\n\
         spec: {{targetRefs: [{{group: '', kind: Service, name: app}}], \
         circuitBreaker: {{maxConnections: 100000, maxPendingRequests: 100000, maxRequests: 100000}}}}\n"
    ));
    let proxy = local.proxy("web").flag("--workers", &1).flag("--max-requests", &20_000).start().ready();
    (local, proxy)
}

fn worker(proxy: &LocalProxy, of: &str) -> u64 {
    proxy.admin("/stats").json()["workers"][0][of].as_u64().unwrap()
}

/// One more client is served; where it is refused because the proxy is late, it asks again.
fn assert_served(proxy: &LocalProxy) {
    let mut other = H2::connect(proxy.outbound(), 1 << 20);
    until("another client is served", || {
        let refused = worker(proxy, "refused");
        let stream = other.request("POST", "app", "/", true);
        let served = other.ended(stream);
        assert!(served || worker(proxy, "refused") > refused, "another client is served");
        served.then_some(())
    });
}

/// Waits until a number no longer moves, for as long as it does.
fn settled(what: &str, number: impl Fn() -> u64) -> u64 {
    let mut last = number();
    loop {
        let mut times = 0;
        let now = until(what, || {
            let now = number();
            times += 1;
            (now != last || times > 40).then_some(now)
        });
        if now == last {
            return now;
        }
        last = now;
    }
}

/// How the streams of a connection are stalled.
trait Stall {
    /// Opens one
    fn one(&self, client: &mut H2);
    /// All of a connection are open
    fn begun(&self, _: &H2) {}
    /// For as long as the test does
    fn lasts(&self) -> bool {
        true
    }
    /// What one may cost, bytes
    fn cost(&self) -> u64 {
        PER_STREAM
    }
}

/// Asks for responses that do not end. With a closed window it still answers pings; else it reads nothing at all, and the proxy
/// ends its connection when it has left a ping unanswered, after 50 s.
struct Ask {
    answers_pings: bool,
}

impl Stall for Ask {
    fn one(&self, client: &mut H2) {
        client.request("GET", "app", "/", true);
    }

    fn begun(&self, client: &H2) {
        if self.answers_pings {
            let mut client = client.share();
            thread::spawn(move || while client.read().is_some() {});
        }
    }

    fn lasts(&self) -> bool {
        self.answers_pings
    }

    fn cost(&self) -> u64 {
        if self.answers_pings { PER_STREAM } else { PER_UNREAD_STREAM }
    }
}

/// Sends bodies, as much of each as the proxy takes.
struct Upload;

impl Stall for Upload {
    fn one(&self, client: &mut H2) {
        client.request("POST", "app", "/", false);
    }

    fn begun(&self, client: &H2) {
        let mut client = client.share();
        thread::spawn(move || {
            let streams: Vec<u32> = (1..client.next_stream()).step_by(2).collect();
            let (mut windows, data) = (Windows::default(), [b'x'; 16 * 1024]);
            while let Some(frame) = client.read() {
                windows.see(&frame);
                while let Some((stream, bytes)) =
                    streams.iter().map(|stream| (*stream, windows.take(*stream))).find(|(_, bytes)| *bytes > 0)
                {
                    if client.try_write(Kind::Data, 0, stream, &data[..bytes as usize]).is_none() {
                        return;
                    }
                }
            }
        });
    }
}

/// What is stalled costs at most so much, and is over when the connections are gone.
fn stalled(application: Application, connections: usize, window: u32, stall: &impl Stall) {
    let seen = Arc::new(Seen::default());
    let (_local, proxy) = proxy(application.start(seen.clone()));
    assert_served(&proxy);
    until("nothing runs", || (worker(&proxy, "running") == 0).then_some(()));
    let before = proxy.process.anonymous_memory();

    let (mut clients, mut refused, mut most) = (Vec::new(), worker(&proxy, "refused"), 0);
    for number in 1..=connections {
        let mut client = H2::connect(proxy.outbound(), window);
        (0..STREAMS).for_each(|_| stall.one(&mut client));
        stall.begun(&client);
        clients.push(client);
        // One after the other, so that the proxy is not late. On a busy machine any may be: what it refuses is asked again,
        // elsewhere, since here the refusal itself may be stalled.
        until("the application has its streams", || {
            let all = worker(&proxy, "refused");
            if all > refused {
                let mut other = H2::connect(proxy.outbound(), window);
                (refused..all).for_each(|_| stall.one(&mut other));
                stall.begun(&other);
                clients.push(other);
                refused = all;
            }
            // One was served before.
            (seen.streams.load(Ordering::SeqCst) > (number * STREAMS) as u64).then_some(())
        });
        most = proxy.process.anonymous_memory().max(most);
    }
    let all = (connections * STREAMS) as u64;
    settled("the application sends no more", || seen.sent.load(Ordering::SeqCst));
    let grown = settled("memory grows no more", || proxy.process.anonymous_memory() >> 20) << 20;
    let grown = grown.max(most).saturating_sub(before);
    eprintln!("{all} streams: {} KiB each, {} MiB", grown / 1024 / all, grown >> 20);
    assert!(grown <= all * stall.cost(), "{all} stalled streams cost {} KiB each", grown / 1024 / all);
    assert_served(&proxy);
    assert_eq!(proxy.admin("/ready").status, 200);
    assert!(!stall.lasts() || worker(&proxy, "running") >= all);

    clients.iter().for_each(H2::close);
    settled("streams end", || worker(&proxy, "running"));
    assert_eq!(worker(&proxy, "running"), 0);
    until("memory comes back", || {
        assert_served(&proxy);
        (proxy.process.anonymous_memory() <= before + KEPT).then_some(())
    });
}

#[test]
fn clients_with_closed_windows() {
    stalled(Application::Endless, 100, 0, &Ask { answers_pings: true });
}

#[test]
fn clients_that_let_everything_be_sent_and_read_nothing() {
    // Fewer: what flows until every socket is full takes its time.
    stalled(Application::Endless, 10, 0x7fff_ffff, &Ask { answers_pings: false });
}

#[test]
fn an_application_that_reads_nothing() {
    stalled(Application::Deaf, 100, 1 << 20, &Upload);
}
