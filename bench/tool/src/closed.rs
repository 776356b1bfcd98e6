//! HTTP/1.1 as fast as the server answers: each connection has one request under way.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::time::Instant;

use crate::{HOST, Opts, addr, num};

struct Conn {
    s: TcpStream,
    got: usize,
    /// Bytes of the whole response; 0: its head is not complete
    need: usize,
    head: Vec<u8>,
    open: bool,
}

/// After the time no request is begun, and what is under way is waited for.
pub fn run(o: &Opts) {
    let (conns, secs): (usize, f64) = (num(o, "conns", 32), num(o, "secs", 2.0));
    let post: usize = num(o, "post", 0);
    let mut req = match post {
        0 => format!("GET /svc-0/ HTTP/1.1\r\nHost: {HOST}\r\n\r\n"),
        n => format!("POST /svc-0/ HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {n}\r\n\r\n"),
    }
    .into_bytes();
    req.resize(req.len() + post, b'p');
    let ep = unsafe { libc::epoll_create1(0) };
    let mut cs = Vec::new();
    for i in 0..conns {
        let s = TcpStream::connect(addr(o)).expect("connect");
        s.set_nodelay(true).unwrap();
        let mut ev = libc::epoll_event { events: libc::EPOLLIN as u32, u64: i as u64 };
        unsafe { libc::epoll_ctl(ep, libc::EPOLL_CTL_ADD, s.as_raw_fd(), &mut ev) };
        cs.push(Conn { s, got: 0, need: 0, head: Vec::with_capacity(1024), open: true });
    }
    let (mut total, mut errors, mut running) = (0u64, 0u64, 0usize);
    let t0 = Instant::now();
    for c in &mut cs {
        // Blocking: a body that does not fit the socket's buffer waits for the proxy, which reads on its own.
        c.s.write_all(&req).expect("write");
        running += 1;
    }
    let mut evs = vec![libc::epoll_event { events: 0, u64: 0 }; 256];
    let mut buf = vec![0u8; 65536];
    while running > 0 {
        let k = unsafe { libc::epoll_wait(ep, evs.as_mut_ptr(), 256, 5000) };
        if k <= 0 {
            errors += running as u64;
            break;
        }
        for e in evs.iter().take(k as usize) {
            let c = &mut cs[e.u64 as usize];
            if !c.open {
                continue;
            }
            let more = match c.s.read(&mut buf) {
                Ok(m) if m > 0 => c.take(&buf[..m], post),
                _ => None,
            };
            match more {
                Some(false) => continue,
                Some(true) => {
                    total += 1;
                    if t0.elapsed().as_secs_f64() < secs && c.s.write_all(&req).is_ok() {
                        continue;
                    }
                }
                None => {
                    errors += 1;
                    c.open = false;
                    unsafe { libc::epoll_ctl(ep, libc::EPOLL_CTL_DEL, c.s.as_raw_fd(), std::ptr::null_mut()) };
                }
            }
            running -= 1;
        }
    }
    println!("{{\"total\":{total},\"errors\":{errors},\"secs\":{:.4}}}", t0.elapsed().as_secs_f64());
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
