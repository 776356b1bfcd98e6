//! The reader of HTTP/1 responses under arbitrary bytes, which endpoints may send. `make fuzz SECS=60` runs it for longer, `SEED=` replays.
//!
//! Nothing may panic, what is read may not depend on how the bytes arrive, and no more may come out than went in.
#![allow(clippy::unwrap_used, clippy::panic, clippy::missing_panics_doc)]
#![allow(clippy::print_stdout, reason = "the seed is what replays a run")]

use std::time::{Duration, Instant};

use fastrand::Rng;
use outrigger_proxy::upstream::http1::{Arrived, Piece, Reader};

/// What responses are made of, well and badly.
const PARTS: [&str; 32] = [
    "HTTP/1.1 200 OK\r\n",
    "HTTP/1.1 100 Continue\r\n\r\n",
    "HTTP/1.1 101 Switching Protocols\r\n",
    "HTTP/1.0 200 OK\r\n",
    "HTTP/1.1 204 No\n",
    "HTTP/1.1 304 \r\n",
    "HTTP/1.1 999 \x7f\r\n",
    "HTTP/2.0 200 OK\r\n",
    "content-length: 5\r\n",
    "Content-Length: 5, 5\r\n",
    "content-length: 18446744073709551615\r\n",
    "content-length: -1\r\n",
    "transfer-encoding: chunked\r\n",
    "Transfer-Encoding: gzip,\tChunked\r\n",
    "transfer-encoding: chunked, gzip\r\n",
    "connection: close\r\n",
    "connection: keep-alive\r\n",
    "x: y\r\n",
    " folded\r\n",
    "x: a\rb\r\n",
    "\r\n",
    "\n",
    "\r",
    "5\r\nhello\r\n",
    "5;ext=\"\r\nhello\r\n",
    "ffffffffffffffff\r\n",
    "10000000000000000\r\n",
    "0\r\n",
    "0\r\n\r\n",
    "0\r\nx-sum: 1\r\n\r\n",
    "hello",
    "\0",
];

/// Everything that came of a connection's bytes.
#[derive(Debug, PartialEq)]
struct Read {
    heads: Vec<String>,
    body: Vec<u8>,
    /// Trailers, where the body has ended
    ended: Option<usize>,
    error: Option<String>,
}

fn read(bytes: &[u8], head: bool, mut cut: impl FnMut() -> usize) -> Read {
    let mut reader = Reader::default();
    reader.begin(head);
    let mut got = Read { heads: Vec::new(), body: Vec::new(), ended: None, error: None };
    let (mut left, mut answered) = (bytes, false);
    while !left.is_empty() && got.ended.is_none() && got.error.is_none() {
        let (piece, rest) = left.split_at(cut().clamp(1, left.len()));
        left = rest;
        reader.buffer().extend_from_slice(piece);
        while got.ended.is_none() && step(&mut reader, &mut got, &mut answered) {}
    }
    assert!(!reader.is_reusable() || got.ended.is_some(), "a connection is used again in the middle of a response");
    got
}

/// False: more bytes are needed, or there is an error.
fn step(reader: &mut Reader, got: &mut Read, answered: &mut bool) -> bool {
    if *answered {
        match reader.piece() {
            Ok(Piece::More) => return false,
            Ok(Piece::Data(data)) => got.body.extend_from_slice(&data),
            Ok(Piece::Trailers(trailers)) => got.ended = Some(trailers.len()),
            Ok(Piece::End) => got.ended = Some(0),
            Err(error) => got.error = Some(error.to_string()),
        }
        return got.error.is_none();
    }
    match reader.head() {
        Ok(None) => return false,
        Ok(Some(Arrived::Interim(status))) => got.heads.push(status.to_string()),
        Ok(Some(Arrived::Head(response))) => {
            got.heads.push(format!("{response:?}"));
            *answered = true;
        }
        Err(error) => got.error = Some(error.to_string()),
    }
    got.error.is_none()
}

fn bytes(rng: &mut Rng) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..rng.usize(1..16) {
        bytes.extend_from_slice(PARTS[rng.usize(..PARTS.len())].as_bytes());
    }
    for _ in 0..rng.usize(..4) {
        let at = rng.usize(..bytes.len());
        bytes[at] = rng.u8(..);
    }
    bytes
}

fn limits() -> (Duration, u64) {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    (Duration::from_secs(number("FUZZ_SECS").unwrap_or(2)), number("FUZZ_SEED").unwrap_or_else(|| fastrand::u64(..)))
}

#[test]
fn arbitrary_responses_are_read_alike_however_they_arrive() {
    let (time, first) = limits();
    println!("responses from seed {first}");
    let (start, mut seed, mut runs, mut whole) = (Instant::now(), first, 0, 0);
    while start.elapsed() < time || runs < 2_000 {
        let mut rng = Rng::with_seed(seed);
        let (bytes, head) = (bytes(&mut rng), rng.u8(..8) == 0);
        let at_once = read(&bytes, head, || usize::MAX);
        let in_pieces = read(&bytes, head, || rng.usize(1..9));
        assert!(at_once.body.len() <= bytes.len(), "seed {seed}: more came out than went in");
        assert_eq!(at_once, in_pieces, "seed {seed}: {bytes:?}");
        whole += usize::from(at_once.ended.is_some());
        seed = seed.wrapping_add(1);
        runs += 1;
    }
    println!("{runs} responses, {whole} of them whole");
    assert!(whole > 0, "no response was ever whole: the fuzzer looks at nothing");
}
