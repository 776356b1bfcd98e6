//! Opaque TCP: uploads whose bytes the server counts, and ping-pong.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use crate::{Opts, addr, num};

/// The first byte says what for: `S`, count to the end, then tell the number (8 bytes, little endian); `E`, echo.
pub fn backend(o: &Opts) {
    let l = TcpListener::bind(addr(o)).expect("bind");
    for s in l.incoming().flatten() {
        std::thread::spawn(move || serve(s));
    }
}

fn serve(mut s: TcpStream) -> std::io::Result<()> {
    s.set_nodelay(true)?;
    let mut buf = vec![0u8; 256 * 1024];
    s.read_exact(&mut buf[..1])?;
    let (echo, mut total) = (buf[0] == b'E', 0u64);
    loop {
        let n = s.read(&mut buf)?;
        if n == 0 {
            break;
        }
        total += n as u64;
        if echo {
            s.write_all(&buf[..n])?;
        }
    }
    if !echo {
        s.write_all(&total.to_le_bytes())?;
    }
    Ok(())
}

fn connect(o: &Opts, kind: &[u8]) -> TcpStream {
    let target = match o.get("to") {
        Some(to) => to.parse().expect("--to IP:PORT"),
        None => addr(o),
    };
    let mut s = TcpStream::connect(target).expect("connect");
    s.set_nodelay(true).unwrap();
    s.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    s.write_all(kind).expect("write");
    s
}

/// Runs `each` on as many threads, and prints the sums of what they did and what went wrong.
fn threads(o: &Opts, each: impl Fn(TcpStream, Instant) -> (u64, u64) + Clone + Send + 'static, kind: &'static [u8]) {
    let (conns, secs): (usize, f64) = (num(o, "conns", 1), num(o, "secs", 2.0));
    let streams: Vec<_> = (0..conns).map(|_| connect(o, kind)).collect();
    let t0 = Instant::now();
    let end = t0 + Duration::from_secs_f64(secs);
    let start = |s| {
        let each = each.clone();
        std::thread::spawn(move || each(s, end))
    };
    let all: Vec<_> = streams.into_iter().map(start).collect();
    let sums = all.into_iter().map(|h| h.join().unwrap()).fold((0, 0), |x, y| (x.0 + y.0, x.1 + y.1));
    println!("{{\"total\":{},\"errors\":{},\"secs\":{:.4}}}", sums.0, sums.1, t0.elapsed().as_secs_f64());
}

pub fn bulk(o: &Opts) {
    let upload = |mut s: TcpStream, end: Instant| {
        let data: Vec<u8> = (0..256 * 1024).map(|i| (i % 251) as u8).collect();
        let mut sent = 0u64;
        while Instant::now() < end {
            match s.write(&data) {
                Ok(n) => sent += n as u64,
                Err(_) => return (sent, 1),
            }
        }
        let (mut said, _) = ([0u8; 8], s.shutdown(Shutdown::Write));
        let right = s.read_exact(&mut said).is_ok() && u64::from_le_bytes(said) == sent;
        (sent, u64::from(!right))
    };
    threads(o, upload, b"S");
}

pub fn pingpong(o: &Opts) {
    let size: usize = num(o, "size", 128);
    let play = move |mut s: TcpStream, end: Instant| {
        let (mut data, mut back, mut count) = (vec![0u8; size], vec![0u8; size], 0u64);
        while Instant::now() < end {
            data[..8.min(size)].copy_from_slice(&count.to_le_bytes()[..8.min(size)]);
            if s.write_all(&data).is_err() || s.read_exact(&mut back).is_err() || data != back {
                return (count, 1);
            }
            count += 1;
        }
        (count, 0)
    };
    threads(o, play, b"E");
}
