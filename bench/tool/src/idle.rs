//! Connections that had one request each, and are kept.

use std::io::{BufRead, Read, Write};
use std::net::TcpStream;

use rustls::{ClientConnection, StreamOwned};

use crate::tls::Tls;
use crate::{HOST, Opts, addr};

enum Conn {
    Plain(TcpStream),
    Tls(Box<StreamOwned<ClientConnection, TcpStream>>),
}

impl Conn {
    fn open(o: &Opts, tls: Option<&Tls>) -> std::io::Result<Self> {
        let s = TcpStream::connect(addr(o))?;
        s.set_nodelay(true)?;
        s.set_read_timeout(Some(std::time::Duration::from_secs(5)))?;
        Ok(match tls {
            None => Self::Plain(s),
            Some(tls) => Self::Tls(Box::new(StreamOwned::new(tls.connect()?, s))),
        })
    }

    fn ask(&mut self) -> std::io::Result<()> {
        let req = format!("GET /svc-0/ HTTP/1.1\r\nHost: {HOST}\r\n\r\n");
        match self {
            Self::Plain(s) => ask(s, req.as_bytes()),
            Self::Tls(s) => ask(s.as_mut(), req.as_bytes()),
        }
    }
}

fn ask(s: &mut (impl Read + Write), req: &[u8]) -> std::io::Result<()> {
    s.write_all(req)?;
    let (mut got, mut buf) = (Vec::new(), [0u8; 4096]);
    loop {
        let n = s.read(&mut buf)?;
        got.extend_from_slice(&buf[..n]);
        if n == 0 || !b"HTTP/1.1 200".starts_with(&got[..got.len().min(12)]) {
            return Err(std::io::Error::other("not 200"));
        }
        if got.windows(4).position(|w| w == b"\r\n\r\n").is_some_and(|head| got.len() >= head + 4 + 1024) {
            return Ok(());
        }
    }
}

/// At each step a line is printed once that many connections are kept, and one of standard input waited for. At the end the
/// first and the last connection have to answer still.
pub fn run(o: &Opts) {
    let tls = Tls::of(o);
    let steps: Vec<usize> = o["steps"].split(',').map(|n| n.parse().unwrap()).collect();
    let mut held: Vec<Conn> = Vec::new();
    let mut line = String::new();
    for step in steps {
        while held.len() < step {
            let mut c = Conn::open(o, tls.as_ref()).expect("connect");
            c.ask().expect("the first request");
            held.push(c);
        }
        println!("{{\"held\":{}}}", held.len());
        std::io::stdin().lock().read_line(&mut line).unwrap();
    }
    let last = held.len() - 1;
    let alive = held[0].ask().is_ok() && held[last].ask().is_ok();
    println!("{{\"alive\":{alive}}}");
}
