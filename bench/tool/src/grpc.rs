//! gRPC echo over h2c: unary calls one after the other on each stream's place, or messages one after the other on it.

use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use h2::client::SendRequest;
use h2::{RecvStream, SendStream};
use tokio::net::TcpStream;

use crate::{HOST, Opts, addr, block_on, num};

#[derive(Default)]
struct Count {
    calls: u64,
    messages: u64,
}

pub fn run(o: &Opts) {
    let (conns, streams): (usize, usize) = (num(o, "conns", 8), num(o, "streams", 10));
    let (secs, size): (f64, usize) = (num(o, "secs", 2.0), num(o, "size", 128));
    let streaming = o.get("kind").is_some_and(|kind| kind == "stream");
    let a = addr(o);
    block_on(async move {
        let mut senders = Vec::new();
        for _ in 0..conns {
            let s = TcpStream::connect(a).await.expect("connect");
            s.set_nodelay(true).unwrap();
            let (sender, connection) = h2::client::handshake(s).await.expect("h2");
            tokio::task::spawn_local(connection);
            senders.push(sender);
        }
        let t0 = Instant::now();
        let end = t0 + Duration::from_secs_f64(secs);
        let places = senders.iter().flat_map(|sender| std::iter::repeat_n(sender, streams));
        let all: Vec<_> = places.map(|s| tokio::task::spawn_local(place(s.clone(), size, streaming, end))).collect();
        let (mut sum, mut errors) = (Count::default(), 0u64);
        for one in all {
            let (count, right) = one.await.unwrap();
            sum.calls += count.calls;
            sum.messages += count.messages;
            errors += u64::from(!right);
        }
        println!(
            "{{\"total\":{},\"messages\":{},\"errors\":{errors},\"secs\":{:.4}}}",
            sum.calls,
            sum.messages,
            t0.elapsed().as_secs_f64()
        );
    });
}

async fn place(sender: SendRequest<Bytes>, size: usize, streaming: bool, end: Instant) -> (Count, bool) {
    let mut count = Count::default();
    while Instant::now() < end {
        if call(&sender, size, streaming, end, &mut count).await.is_none() {
            return (count, false);
        }
        count.calls += 1;
    }
    (count, true)
}

/// One call. `None`: something of it was wrong.
async fn call(sender: &SendRequest<Bytes>, size: usize, streaming: bool, end: Instant, count: &mut Count) -> Option<()> {
    let request = http::Request::post(format!("http://{HOST}/svc-0/echo.Echo/Call"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .ok()?;
    let mut sender = sender.clone().ready().await.ok()?;
    let (response, mut up) = sender.send_request(request, false).ok()?;
    let message = message(size, count.messages);
    if !streaming {
        send(&mut up, message.clone(), true).await?;
    } else {
        send(&mut up, message.clone(), false).await?;
    }
    let response = response.await.ok()?;
    if response.status() != 200 {
        return None;
    }
    let mut down = response.into_body();
    receive(&mut down, &message).await?;
    count.messages += 1;
    while streaming && Instant::now() < end {
        send(&mut up, message.clone(), false).await?;
        receive(&mut down, &message).await?;
        count.messages += 1;
    }
    if streaming {
        send(&mut up, Bytes::new(), true).await?;
    }
    while let Some(rest) = down.data().await {
        if !rest.ok()?.is_empty() {
            return None;
        }
    }
    let trailers = down.trailers().await.ok()??;
    (trailers.get("grpc-status")?.as_bytes() == b"0").then_some(())
}

/// A message with its prefix: not compressed, length.
fn message(size: usize, number: u64) -> Bytes {
    let mut bytes = BytesMut::with_capacity(size + 5);
    bytes.extend_from_slice(&[0]);
    bytes.extend_from_slice(&u32::try_from(size).unwrap().to_be_bytes());
    bytes.resize(size + 5, number as u8);
    bytes.freeze()
}

async fn send(up: &mut SendStream<Bytes>, data: Bytes, end: bool) -> Option<()> {
    // A message is far smaller than any window: h2 keeps what does not fit at the moment.
    up.send_data(data, end).ok()
}

async fn receive(down: &mut RecvStream, message: &[u8]) -> Option<()> {
    let mut got = 0;
    while got < message.len() {
        let data = down.data().await?.ok()?;
        if message.get(got..got + data.len())? != &data[..] {
            return None;
        }
        got += data.len();
        down.flow_control().release_capacity(data.len()).ok()?;
    }
    Some(())
}
