//! meshbench-tool: the backends and load generators of bench.py. Every load generator prints one line of JSON, and ends only
//! when what it began is answered, so that its count is exact.
//!
//!   backend   --port P [--body 1024] [--ip 127.0.0.1]         HTTP/1.1, h2c, WebSocket echo, gRPC echo
//!   tcp       --port P                                        opaque: counts or echoes
//!   closed    --port P --conns C --secs S [--post BYTES]      HTTP/1.1, one request at a time on each connection; with `--turns 1`
//!                                                             for each line of its input: `SECS RATE`
//!   openloop  --port P --rate R --conns C --secs S [--warmup W] [--shed 1]     with shed: 503 `overloaded` is no error
//!   handshake --port P --secs S --threads T [--ca F --cert F --key F --sni NAME --group x25519|x25519mlkem768]
//!   idle      --port P --steps 1000,5000 [--ca ...]           a request each, then they are kept
//!   bulk      --port P --conns C --secs S                     uploads; the server says how much arrived
//!   pingpong  --port P --conns C --secs S [--size 128]
//!   websocket --port P --conns C --secs S [--size 128]
//!   grpc      --port P --conns C --streams N --secs S [--size 128] [--kind unary|stream]
mod backend;
mod closed;
mod grpc;
mod idle;
mod openloop;
mod opaque;
mod tls;
mod websocket;

use std::collections::HashMap;
use std::net::SocketAddr;

type Opts = HashMap<String, String>;

fn num<T: std::str::FromStr>(o: &Opts, k: &str, d: T) -> T {
    o.get(k).and_then(|v| v.parse().ok()).unwrap_or(d)
}

fn addr(o: &Opts) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], num::<u16>(o, "port", 0)))
}

/// The name the load asks for: a service of every peer's configuration.
const HOST: &str = "svc-0.mesh";

fn block_on(future: impl Future<Output = ()>) {
    let rt = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tokio::task::LocalSet::new().block_on(&rt, future);
}

fn main() {
    let mut args = std::env::args().skip(1);
    let cmd = args.next().unwrap_or_default();
    let mut o = Opts::new();
    while let Some(k) = args.next() {
        o.insert(k.trim_start_matches("--").to_string(), args.next().unwrap_or_default());
    }
    match cmd.as_str() {
        "backend" => backend::run(&o),
        "tcp" => opaque::backend(&o),
        "closed" => closed::run(&o),
        "openloop" => openloop::run(&o),
        "handshake" => tls::handshake(&o),
        "idle" => idle::run(&o),
        "bulk" => opaque::bulk(&o),
        "pingpong" => opaque::pingpong(&o),
        "websocket" => websocket::run(&o),
        "grpc" => grpc::run(&o),
        _ => {
            eprintln!("usage: meshbench-tool COMMAND --key value ...; see main.rs");
            std::process::exit(2)
        }
    }
}
