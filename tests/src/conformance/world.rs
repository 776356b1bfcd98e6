//! What stands around a proxy while a case runs through it: the application, the services that filters call, the client.

use std::collections::BTreeMap;
use std::io::{self, BufReader};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, getsockname, socket};
use outrigger_proxy::filter::cases::{
    Case, Difference, Differences, FilterSpec, Reply, Request, Seen, SeenRequest, SeenResponse, Service, Step, compare,
    compare_refusal, compare_start,
};

use super::wire::{self, Message};

/// How long nothing more must come before it is taken that nothing will.
const QUIET: Duration = Duration::from_millis(60);
/// How long one waits for a sign that a part of a body was seen.
const SIGN: Duration = Duration::from_millis(400);

/// A proxy with filters.
pub trait Target {
    /// Loads a chain; the error is the message of the refusal.
    fn load(&mut self, filters: &[FilterSpec], world: &World) -> Result<(), String>;
    /// Where the client connects.
    fn address(&self) -> SocketAddr;
    /// What the filters logged so far, as `level text`.
    fn log(&self) -> Vec<String>;
    /// Metrics that filters defined.
    fn metrics(&self, names: &[&String]) -> BTreeMap<String, i64>;
    /// The longest that something expected is waited for.
    fn patience(&self) -> Duration {
        Duration::from_secs(5)
    }
    /// Whether refusals are in this host's own words.
    fn words(&self) -> bool;
    /// Whether it still runs; if not, how it ended.
    fn ended(&mut self) -> Option<String>;
}

#[derive(Debug, Default)]
struct Script {
    reply: Reply,
    services: BTreeMap<String, Service>,
    upstream: Vec<SeenRequest>,
    called: Vec<SeenRequest>,
    /// The application does not answer yet
    held: bool,
}

/// Servers: `reviews`, `second`, and each service that a step names.
#[derive(Debug)]
pub struct World {
    script: Arc<Mutex<Script>>,
    /// Lines that the filters wrote; servers wait for it to grow between the parts of a body
    lines: Arc<Mutex<usize>>,
    /// Name and address of each
    pub servers: Vec<(String, SocketAddr)>,
    /// Ports where nobody listens
    _held: Vec<OwnedFd>,
}

/// A port that is taken, so that nobody else gets it, and where nobody listens.
fn deaf() -> (OwnedFd, SocketAddr) {
    let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).expect("socket");
    bind(socket.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, 0)).expect("bind");
    let address: SockaddrIn = getsockname(socket.as_raw_fd()).expect("name");
    (socket, SocketAddr::from(([127, 0, 0, 1], address.port())))
}

impl World {
    /// The servers of a case.
    pub fn of(case: &Case) -> Self {
        let (script, lines) = (Arc::<Mutex<Script>>::default(), Arc::default());
        let mut servers: Vec<(String, SocketAddr)> = Vec::new();
        let mut held = Vec::new();
        let names = case.steps.iter().flat_map(|step| &step.services);
        let refused: Vec<&String> =
            names.clone().filter(|(_, service)| matches!(service, Service::Refused)).map(|(name, _)| name).collect();
        let all = ["reviews".to_owned(), "second".to_owned()].into_iter().chain(names.map(|(name, _)| name.clone()));
        for name in all {
            if servers.iter().any(|(known, _)| *known == name) {
                continue;
            }
            if refused.contains(&&name) {
                let (socket, address) = deaf();
                held.push(socket);
                servers.push((name, address));
                continue;
            }
            let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
            servers.push((name.clone(), listener.local_addr().expect("address")));
            let (script, lines) = (Arc::clone(&script), Arc::clone(&lines));
            thread::spawn(move || {
                for stream in listener.incoming().map_while(Result::ok) {
                    let (name, script, lines) = (name.clone(), Arc::clone(&script), Arc::clone(&lines));
                    thread::spawn(move || serve(&name, stream, &script, &lines));
                }
            });
        }
        Self { script, lines, servers, _held: held }
    }

    /// Runs a case and returns what differs from its expectations.
    pub fn run(&self, case: &Case, target: &mut dyn Target) -> Differences {
        // Timers begin when the filters do: what they call answers from then on.
        if let Some(first) = case.steps.first() {
            self.play(first);
        }
        let refusal = target.load(&case.filters, self).err();
        let mut mark = 0;
        if refusal.is_none() && !case.start.log.is_empty() {
            settle(target, 0, case.start.log.len(), false);
        }
        let (start, _) = split(case, &target.log());
        let mut out = compare_start(&case.start, refusal.as_deref(), &start, target.words());
        if refusal.is_some() {
            return out;
        }
        for (index, step) in case.steps.iter().enumerate() {
            if index > 0 {
                self.play(step);
            }
            let seen = self.step(case, step, target, &mut mark, &mut out);
            let name = if step.name.is_empty() { format!("step {}", index + 1) } else { step.name.clone() };
            out.extend(compare(&step.expect, &seen).into_iter().map(|difference| difference.of(&name)));
            if let Some(how) = target.ended() {
                out.push(Difference::new("host", "running", how).of(&name));
                break;
            }
        }
        out
    }

    /// From now on servers answer as a step says, and note what comes.
    fn play(&self, step: &Step) {
        let mut script = self.script.lock().expect("script");
        script.reply = step.upstream.clone();
        script.services.clone_from(&step.services);
        script.upstream.clear();
        script.called.clear();
    }

    fn step(&self, case: &Case, step: &Step, target: &mut dyn Target, mark: &mut usize, out: &mut Differences) -> Seen {
        if let Some(update) = &step.update {
            let refusal = target.load(update, self).err();
            compare_refusal(&step.expect.refused, refusal.as_deref(), target.words(), out);
        }
        let response = step.request.as_ref().and_then(|request| {
            if request.times > 1 {
                crowd(target.address(), request);
            }
            self.exchange(case, step, request, target)
        });
        thread::sleep(Duration::from_millis(step.wait_ms));
        let lines = || split(case, &target.log()).1.len();
        settle_lines(&lines, *mark + step.expect.log.len(), step.expect.more_log, target.patience());
        let log = split(case, &target.log()).1.get(*mark..).unwrap_or_default().to_vec();
        *mark += log.len();
        let metrics = settled_metrics(target, &step.expect.metrics);
        let script = self.script.lock().expect("script");
        let (upstream, called) = (script.upstream.clone(), script.called.clone());
        Seen { response, upstream, called, log, metrics, ..Seen::default() }
    }

    fn exchange(&self, case: &Case, step: &Step, request: &Request, target: &mut dyn Target) -> Option<SeenResponse> {
        let address = target.address();
        let mut update = step.update_during.as_deref();
        self.script.lock().expect("script").held = update.is_some();
        thread::scope(|scope| {
            let client = scope.spawn(|| wire::exchange(address, request, &|| sign(&self.lines)));
            while !client.is_finished() {
                *self.lines.lock().expect("lines") = split(case, &target.log()).1.len();
                thread::sleep(Duration::from_millis(5));
                let arrived = !self.script.lock().expect("script").upstream.is_empty();
                if let Some(update) = update.take_if(|_| arrived) {
                    target.load(update, self).expect("the update during the exchange");
                    self.script.lock().expect("script").held = false;
                }
            }
            client.join().expect("client")
        })
    }
}

/// Metrics as they are expected, or as they are when they should have been long since: Envoy adds up histograms now and then.
fn settled_metrics(target: &dyn Target, expected: &BTreeMap<String, i64>) -> BTreeMap<String, i64> {
    let names: Vec<_> = expected.keys().collect();
    let end = Instant::now() + target.patience();
    loop {
        let metrics = target.metrics(&names);
        if metrics == *expected || Instant::now() >= end {
            return metrics;
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// Sends a request as often as it says, but once: over several connections at a time, so that every worker has some.
fn crowd(address: SocketAddr, request: &Request) {
    let left = AtomicUsize::new(request.times - 1);
    let another = || left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok();
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                while another() {
                    wire::exchange(address, request, &|| {});
                }
            });
        }
    });
}

fn sign(lines: &Mutex<usize>) {
    let now = || *lines.lock().expect("lines");
    let (before, started) = (now(), Instant::now());
    while now() == before && started.elapsed() < SIGN {
        thread::sleep(Duration::from_millis(5));
    }
}

/// Lines of the start, whenever they come: instances start when they must. And those of exchanges.
fn split(case: &Case, lines: &[String]) -> (Vec<String>, Vec<String>) {
    lines.iter().cloned().partition(|line| case.start.log.contains(line))
}

fn settle(target: &dyn Target, from: usize, count: usize, more: bool) {
    settle_lines(&|| target.log().len(), from + count, more, target.patience());
}

/// Waits until there are so many lines, and then until no more come.
fn settle_lines(lines: &dyn Fn() -> usize, wanted: usize, more: bool, patience: Duration) {
    let started = Instant::now();
    while lines() < wanted && started.elapsed() < patience {
        thread::sleep(Duration::from_millis(5));
    }
    if more {
        return;
    }
    let (mut last, mut since) = (lines(), Instant::now());
    while since.elapsed() < QUIET && started.elapsed() < 2 * patience {
        thread::sleep(Duration::from_millis(5));
        let now = lines();
        if now != last {
            (last, since) = (now, Instant::now());
        }
    }
}

/// Serves one connection by the script.
fn serve(name: &str, stream: TcpStream, script: &Mutex<Script>, lines: &Mutex<usize>) {
    let _ = stream.set_nodelay(true);
    let Ok(clone) = stream.try_clone() else { return };
    let (mut reader, mut stream) = (BufReader::new(clone), stream);
    while let Ok(message) = Message::read(&mut reader, |_| false, false) {
        let mut start = message.start.split(' ');
        let (method, path) = (start.next().unwrap_or_default().to_owned(), start.next().unwrap_or_default().to_owned());
        let authority = message.header("host").unwrap_or_default().to_owned();
        let head = method == "HEAD";
        let seen = SeenRequest {
            server: Some(name.to_owned()),
            method,
            path,
            authority,
            headers: message.headers,
            body: message.body,
            trailers: message.trailers,
        };
        let service = {
            let mut script = script.lock().expect("script");
            let service = script.services.get(name).cloned();
            // What the proxy gave up half-way did not come.
            if !message.cut {
                if service.is_some() { script.called.push(seen) } else { script.upstream.push(seen) }
            }
            service.unwrap_or_else(|| Service::Reply(script.reply.clone()))
        };
        let Service::Reply(reply) = service else {
            let _ = stream.shutdown(Shutdown::Both);
            return;
        };
        while script.lock().expect("script").held {
            thread::sleep(Duration::from_millis(5));
        }
        if reply.hang || answer(&mut stream, &reply, head, lines).is_err() || message.cut {
            let _ = io::copy(&mut reader, &mut io::sink());
            return;
        }
    }
}

fn answer(stream: &mut TcpStream, reply: &Reply, head: bool, lines: &Mutex<usize>) -> io::Result<()> {
    let start = format!("HTTP/1.1 {} Reply", reply.status);
    let several = reply.body.len() > 1 || !reply.trailers.is_empty();
    let (body, trailers) = if head { (&[][..], &[][..]) } else { (reply.body.as_slice(), reply.trailers.as_slice()) };
    wire::write(stream, &start, &reply.headers, body, trailers, || {
        if several {
            sign(lines);
        }
    })
}
