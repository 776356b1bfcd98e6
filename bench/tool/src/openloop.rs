//! HTTP/1.1 at a constant rate, whatever the server does.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::time::Instant;

use crate::{Opts, addr, num};

struct Conn {
    s: TcpStream,
    intended: u64,
    busy: bool,
    dead: bool,
    got: Vec<u8>,
    need: usize,
    /// The response under way is a refusal
    refused: bool,
}

/// Says why, and when to come again.
fn is_refusal(head: &str) -> bool {
    head.starts_with("http/1.1 503") && head.contains("\r\nx-outrigger-reason: overloaded") && head.contains("\r\nretry-after: ")
}

/// Constant-rate schedule shared by all connections. Latency counts from the *intended* send
/// time, so a stall in the proxy is charged to every request that should have been sent meanwhile.
pub fn run(o: &Opts) {
    let (rate, conns): (f64, usize) = (num(o, "rate", 1000.0), num(o, "conns", 32));
    let (secs, warm): (f64, f64) = (num(o, "secs", 4.0), num(o, "warmup", 1.0));
    // Refusals are part of what is measured: 503 with a reason and `retry-after`. What no connection is free for is not sent.
    let shed: usize = num(o, "shed", 0);
    let (mut refused, mut unsent) = (0u64, 0u64);
    let patience = if shed > 0 { 15_000_000_000 } else { 3_000_000_000 };
    let req = b"GET /svc-0/ HTTP/1.1\r\nHost: svc-0.mesh\r\nUser-Agent: meshbench\r\nAccept: */*\r\n\r\n";
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1usize) };
    let ep = unsafe { libc::epoll_create1(0) };
    let mut cs: Vec<Conn> = Vec::new();
    for i in 0..conns {
        let s = TcpStream::connect(addr(o)).expect("connect");
        s.set_nodelay(true).unwrap();
        s.set_nonblocking(true).unwrap();
        let mut ev = libc::epoll_event { events: libc::EPOLLIN as u32, u64: i as u64 };
        unsafe { libc::epoll_ctl(ep, libc::EPOLL_CTL_ADD, s.as_raw_fd(), &mut ev) };
        cs.push(Conn { s, intended: 0, busy: false, dead: false, got: Vec::new(), need: 0, refused: false });
    }
    let t0 = Instant::now();
    let now = || t0.elapsed().as_nanos() as u64;
    let step = 1e9 / rate;
    let (warm_ns, end_ns) = ((warm * 1e9) as u64, ((warm + secs) * 1e9) as u64);
    let mut free: std::collections::VecDeque<usize> = (0..conns).collect();
    let mut backlog = std::collections::VecDeque::<u64>::new();
    let (mut n, mut errors, mut total, mut inflight) = (0u64, 0u64, 0u64, 0usize);
    let mut lat: Vec<u64> = Vec::with_capacity((rate * secs) as usize + 16);
    let mut evs = vec![libc::epoll_event { events: 0, u64: 0 }; 256];
    let mut buf = vec![0u8; 65536];
    loop {
        let t = now();
        let mut next = (n as f64 * step) as u64;
        while next <= t && next < end_ns {
            backlog.push_back(next);
            n += 1;
            next = (n as f64 * step) as u64;
        }
        if shed > 0 && free.is_empty() {
            unsent += backlog.drain(..).filter(|at| *at >= warm_ns).count() as u64;
        }
        while let (Some(&want), Some(&i)) = (backlog.front(), free.front()) {
            backlog.pop_front();
            free.pop_front();
            let c = &mut cs[i];
            c.intended = want;
            c.busy = true;
            c.got.clear();
            c.need = 0;
            inflight += 1;
            if c.s.write_all(req).is_err() {
                errors += 1;
                c.dead = true;
                inflight -= 1;
            }
        }
        let t = now();
        if next >= end_ns && (inflight == 0 && backlog.is_empty() || t > end_ns + patience) {
            break;
        }
        if free.is_empty() && inflight == 0 {
            break; // every connection is dead
        }
        let wait = if next >= end_ns { 100_000_000 } else { next.saturating_sub(t) };
        let ts = libc::timespec { tv_sec: (wait / 1_000_000_000) as i64, tv_nsec: (wait % 1_000_000_000) as i64 };
        let k = unsafe {
            libc::syscall(libc::SYS_epoll_pwait2, ep, evs.as_mut_ptr(), 256, &ts, 0usize, 8usize)
        };
        for e in evs.iter().take(k.max(0) as usize) {
            let i = e.u64 as usize;
            let c = &mut cs[i];
            if c.dead {
                continue;
            }
            match c.s.read(&mut buf) {
                Ok(0) => {
                    errors += 1;
                    c.dead = true;
                }
                Ok(m) => {
                    c.got.extend_from_slice(&buf[..m]);
                    if c.need == 0 {
                        if let Some(p) = c.got.windows(4).position(|w| w == b"\r\n\r\n") {
                            let h = String::from_utf8_lossy(&c.got[..p]).to_ascii_lowercase();
                            let len = h.split("\r\n").find_map(|l| l.strip_prefix("content-length:"));
                            c.refused = shed > 0 && is_refusal(&h);
                            match (h.starts_with("http/1.1 200") || c.refused, len.and_then(|v| v.trim().parse::<usize>().ok())) {
                                (true, Some(l)) => c.need = p + 4 + l,
                                _ => {
                                    errors += 1;
                                    c.dead = true;
                                }
                            }
                        }
                    }
                    if !c.dead && c.need > 0 && c.got.len() >= c.need {
                        let l = now().saturating_sub(c.intended);
                        total += 1;
                        match (c.intended >= warm_ns, c.refused) {
                            (true, false) => lat.push(l),
                            (true, true) => refused += 1,
                            (false, _) => {}
                        }
                        c.busy = false;
                        inflight -= 1;
                        free.push_back(i);
                    }
                }
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(_) => {
                    errors += 1;
                    c.dead = true;
                }
            }
            if c.dead {
                if c.busy {
                    inflight -= 1;
                }
                unsafe { libc::epoll_ctl(ep, libc::EPOLL_CTL_DEL, c.s.as_raw_fd(), std::ptr::null_mut()) };
            }
        }
    }
    errors += (inflight + backlog.len()) as u64;
    lat.sort_unstable();
    let q = |p: f64| lat.get(((lat.len() as f64 * p) as usize).min(lat.len().saturating_sub(1))).copied().unwrap_or(0) as f64 / 1000.0;
    println!(
        "{{\"total\":{},\"counted\":{},\"refused\":{refused},\"unsent\":{unsent},\"errors\":{},\"p50_us\":{:.1},\"p90_us\":{:.1},\"p99_us\":{:.1},\"p999_us\":{:.1},\"max_us\":{:.1}}}",
        total, lat.len(), errors, q(0.5), q(0.9), q(0.99), q(0.999), q(1.0)
    );
}
