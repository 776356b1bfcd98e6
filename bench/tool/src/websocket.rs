//! WebSocket echo: each connection has one message under way.

use std::time::{Duration, Instant};

use futures_util::{SinkExt, StreamExt};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;

use crate::{HOST, Opts, addr, block_on, num};

pub fn run(o: &Opts) {
    let (conns, secs, size): (usize, f64, usize) = (num(o, "conns", 32), num(o, "secs", 2.0), num(o, "size", 128));
    let a = addr(o);
    block_on(async move {
        let t0 = Instant::now();
        let end = t0 + Duration::from_secs_f64(secs);
        let all: Vec<_> = (0..conns).map(|_| tokio::task::spawn_local(play(a, size, end))).collect();
        let (mut total, mut errors) = (0u64, 0u64);
        for one in all {
            let (count, right) = one.await.unwrap();
            total += count;
            errors += u64::from(!right);
        }
        println!("{{\"total\":{total},\"errors\":{errors},\"conns\":{conns},\"secs\":{:.4}}}", t0.elapsed().as_secs_f64());
    });
}

async fn play(a: std::net::SocketAddr, size: usize, end: Instant) -> (u64, bool) {
    let mut count = 0u64;
    let right = async {
        let s = TcpStream::connect(a).await.ok()?;
        s.set_nodelay(true).ok()?;
        let (mut ws, _) = tokio_tungstenite::client_async(format!("ws://{HOST}/svc-0/"), s).await.ok()?;
        let mut data = vec![7u8; size.max(8)];
        while Instant::now() < end {
            data[..8].copy_from_slice(&count.to_le_bytes());
            let message = Message::binary(data.clone());
            ws.send(message.clone()).await.ok()?;
            if ws.next().await?.ok()? != message {
                return None;
            }
            count += 1;
        }
        ws.close(None).await.ok()?;
        while let Some(Ok(_)) = ws.next().await {}
        Some(())
    };
    let right = right.await.is_some();
    (count, right)
}
