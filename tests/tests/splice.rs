//! Opaque streams in plaintext go through pipes (splice(2)) when there is much of them, and leave none behind.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;

use outrigger_e2e::{Address, Backend, HANG, Local, until};

const STREAMS: usize = 8;
const BYTES: usize = 8 << 20;

fn pattern(stream: usize) -> Vec<u8> {
    (0..BYTES).map(|at| u8::try_from((at * (stream + 1) + at / 251) % 256).unwrap()).collect()
}

/// Pipes that the process has open: their ends.
fn pipes(id: u32) -> usize {
    let open = fs::read_dir(format!("/proc/{id}/fd")).unwrap();
    open.filter(|entry| {
        let link = entry.as_ref().ok().and_then(|entry| fs::read_link(entry.path()).ok());
        link.is_some_and(|link| link.to_string_lossy().starts_with("pipe:"))
    })
    .count()
}

#[test]
fn bulk_is_spliced_counted_and_leaves_no_pipe() {
    let echo = Backend::echo(TcpListener::bind("127.0.0.1:0").unwrap(), b"");
    let local =
        Local::new("apiVersion: outrigger.dev/v1alpha1\nkind: MeshConfig\nmetadata: {name: default}\nspec: {}\n");
    let inbound = Address::claim();
    let address = inbound.port(15006);
    let app = format!("main={}/tcp", echo.address());
    let proxy = local.proxy("echo").flag("--workers", &1).flag("--app", &app).flag("--inbound", &address).start();
    let mut proxy = proxy.ready();
    let spliced = || proxy.admin("/stats").json()["workers"][0]["splicedBytes"].as_u64().unwrap();
    let before = pipes(proxy.process.id());
    assert_eq!(spliced(), 0);

    let clients: Vec<_> = (0..STREAMS)
        .map(|number| {
            thread::spawn(move || {
                let mut stream = TcpStream::connect(address).unwrap();
                stream.set_read_timeout(Some(HANG)).unwrap();
                let sent = pattern(number);
                let (mut sender, bytes) = (stream.try_clone().unwrap(), sent.clone());
                let sending = thread::spawn(move || {
                    sender.write_all(&bytes).unwrap();
                    sender.shutdown(Shutdown::Write).unwrap();
                });
                let mut got = Vec::new();
                stream.read_to_end(&mut got).unwrap();
                sending.join().unwrap();
                assert!(got == sent, "stream {number}: {} bytes of {BYTES}, or others", got.len());
            })
        })
        .collect();
    clients.into_iter().for_each(|client| client.join().unwrap());

    let all = (2 * STREAMS * BYTES) as f64;
    until("the streams are counted", || {
        let metrics = proxy.metrics();
        let way = |way| metrics.sum("outrigger_tcp_bytes_total", &[("direction", "inbound"), ("way", way)]);
        ((way("sent") + way("received") - all).abs() < 0.5).then_some(())
    });
    let spliced = spliced() as f64;
    assert!(spliced > all / 4.0 && spliced <= all, "{spliced} of {all} bytes were spliced");
    // A worker keeps two empty ones.
    let left = pipes(proxy.process.id());
    assert!(left <= before + 4, "{left} ends of pipes, {before} before");
    assert!(proxy.process.is_running());
}
