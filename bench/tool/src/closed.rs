//! HTTP/1.1, one request at a time on each connection: as fast as the server answers, or no faster than a rate.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::time::Instant;

use crate::{HOST, Opts, addr, num};

/// Seconds after which what is under way is lost.
const PATIENCE: f64 = 5.0;

struct Conn {
    s: TcpStream,
    got: usize,
    /// Bytes of the whole response; 0: its head is not complete
    need: usize,
    head: Vec<u8>,
    /// A request is under way
    busy: bool,
}

struct Load {
    epoll: i32,
    conns: Vec<Conn>,
    request: Vec<u8>,
    /// Bytes of a request's body
    post: usize,
}

/// Once; with `turns` for each line that comes in, on the same connections: seconds, and requests a second (0: as many as are answered).
pub fn run(o: &Opts) {
    let mut load = Load::connect(o);
    if num(o, "turns", 0) == 0 {
        return load.turn(num(o, "secs", 2.0), 0.0);
    }
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1usize) };
    for line in std::io::stdin().lines() {
        let line = line.expect("a line");
        let mut words = line.split(' ').map(|word| word.parse().expect("a number"));
        load.turn(words.next().expect("seconds"), words.next().expect("a rate"));
    }
}

struct Turn {
    start: Instant,
    secs: f64,
    /// Seconds between two requests
    step: f64,
    idle: VecDeque<usize>,
    begun: u64,
    running: u64,
    total: u64,
    errors: u64,
}

impl Turn {
    /// Seconds until the next request; `None`: the time is over.
    fn wait(&self) -> Option<f64> {
        let (now, due) = (self.start.elapsed().as_secs_f64(), self.begun as f64 * self.step);
        (now.max(due) < self.secs).then(|| (due - now).max(0.0))
    }
}

impl Load {
    fn connect(o: &Opts) -> Self {
        let post: usize = num(o, "post", 0);
        let mut request = match post {
            0 => format!("GET /svc-0/ HTTP/1.1\r\nHost: {HOST}\r\n\r\n"),
            n => format!("POST /svc-0/ HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {n}\r\n\r\n"),
        }
        .into_bytes();
        request.resize(request.len() + post, b'p');
        let epoll = unsafe { libc::epoll_create1(0) };
        let mut conns = Vec::new();
        for i in 0..num(o, "conns", 32) {
            let s = TcpStream::connect(addr(o)).expect("connect");
            s.set_nodelay(true).unwrap();
            let mut ev = libc::epoll_event { events: libc::EPOLLIN as u32, u64: i };
            unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, s.as_raw_fd(), &mut ev) };
            conns.push(Conn { s, got: 0, need: 0, head: Vec::with_capacity(1024), busy: false });
        }
        Self { epoll, conns, request, post }
    }

    /// After the time no request is begun, and what is under way is waited for.
    fn turn(&mut self, secs: f64, rate: f64) {
        let idle = (0..self.conns.len()).collect();
        let step = if rate > 0.0 { 1.0 / rate } else { 0.0 };
        let mut turn = Turn { start: Instant::now(), secs, step, idle, begun: 0, running: 0, total: 0, errors: 0 };
        let mut evs = vec![libc::epoll_event { events: 0, u64: 0 }; 256];
        let mut buf = vec![0u8; 65536];
        loop {
            self.begin(&mut turn);
            let wait = turn.wait().filter(|_| !turn.idle.is_empty());
            if wait.is_none() && turn.running == 0 {
                break;
            }
            let k = self.events(&mut evs, wait.unwrap_or(PATIENCE));
            if k == 0 && wait.is_none() {
                turn.errors += turn.running;
                break;
            }
            for e in &evs[..k] {
                let i = e.u64 as usize;
                let busy = self.conns[i].busy;
                match self.heard(i, &mut buf) {
                    Some(false) => continue,
                    Some(true) => {
                        turn.total += 1;
                        turn.idle.push_back(i);
                    }
                    None => {
                        turn.errors += 1;
                        turn.idle.retain(|idle| *idle != i);
                    }
                }
                turn.running -= u64::from(busy);
                self.begin(&mut turn);
            }
        }
        let Turn { start, total, errors, .. } = turn;
        println!("{{\"total\":{total},\"errors\":{errors},\"secs\":{:.4}}}", start.elapsed().as_secs_f64());
    }

    /// Begins what is due.
    fn begin(&mut self, turn: &mut Turn) {
        while !turn.idle.is_empty()
            && turn.wait() == Some(0.0)
            && let Some(i) = turn.idle.pop_front()
        {
            // Blocking: a body that does not fit the socket's buffer waits for the proxy, which reads on its own.
            if self.conns[i].s.write_all(&self.request).is_ok() {
                self.conns[i].busy = true;
                (turn.begun, turn.running) = (turn.begun + 1, turn.running + 1);
            } else {
                self.leave(i);
                turn.errors += 1;
            }
        }
    }

    fn leave(&self, i: usize) {
        let fd = self.conns[i].s.as_raw_fd();
        unsafe { libc::epoll_ctl(self.epoll, libc::EPOLL_CTL_DEL, fd, std::ptr::null_mut()) };
    }

    /// How many there are within the time.
    fn events(&self, evs: &mut [libc::epoll_event], secs: f64) -> usize {
        let (ep, time) = (self.epoll, libc::timespec { tv_sec: secs as i64, tv_nsec: (secs.fract() * 1e9) as i64 });
        loop {
            let k = unsafe {
                libc::syscall(libc::SYS_epoll_pwait2, ep, evs.as_mut_ptr(), evs.len(), &time, 0usize, 8usize)
            };
            if let Ok(k) = usize::try_from(k) {
                return k;
            }
            let error = std::io::Error::last_os_error();
            assert!(error.kind() == std::io::ErrorKind::Interrupted, "epoll_pwait2: {error}");
        }
    }

    /// `Some(true)`: a response is complete; `None`: it is wrong, or nothing was asked, and the connection is not used any more.
    fn heard(&mut self, i: usize, buf: &mut [u8]) -> Option<bool> {
        let c = &mut self.conns[i];
        let more = match c.s.read(buf) {
            Ok(m) if m > 0 && c.busy => c.take(&buf[..m], self.post),
            _ => None,
        };
        c.busy = more == Some(false);
        if more.is_none() {
            self.leave(i);
        }
        more
    }
}

impl Conn {
    /// `Some(true)`: the response is complete; `None`: it is wrong.
    fn take(&mut self, data: &[u8], post: usize) -> Option<bool> {
        self.got += data.len();
        if self.need == 0 {
            self.head.extend_from_slice(data);
            let Some(end) = self.head.windows(4).position(|w| w == b"\r\n\r\n") else { return Some(false) };
            let length = length(&self.head[..end])?;
            if !self.head.starts_with(b"HTTP/1.1 200") || (post > 0 && length != post) {
                return None;
            }
            self.need = end + 4 + length;
        }
        if self.got < self.need {
            return Some(false);
        }
        let right = self.got == self.need;
        (self.got, self.need) = (0, 0);
        self.head.clear();
        right.then_some(true)
    }
}

fn length(head: &[u8]) -> Option<usize> {
    head.split(|b| *b == b'\n').find_map(|line| {
        let (name, value) = line.split_at_checked(15)?;
        let is = name.eq_ignore_ascii_case(b"content-length:");
        is.then(|| std::str::from_utf8(value).ok()?.trim().parse().ok())?
    })
}
