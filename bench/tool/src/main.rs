//! meshbench-tool: backend, open-loop load generator and handshake client for bench.py.
//!   backend   --port P [--body 1024]
//!   openloop  --port P --rate R --conns C --secs S [--warmup W]
//!   handshake --port P --secs S --threads T [--ca F --cert F --key F --sni NAME]
use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

type Opts = HashMap<String, String>;
fn num<T: std::str::FromStr>(o: &Opts, k: &str, d: T) -> T {
    o.get(k).and_then(|v| v.parse().ok()).unwrap_or(d)
}
fn addr(o: &Opts) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], num::<u16>(o, "port", 0)))
}

fn main() {
    let mut args = std::env::args().skip(1);
    let cmd = args.next().unwrap_or_default();
    let mut o = Opts::new();
    while let Some(k) = args.next() {
        o.insert(k.trim_start_matches("--").to_string(), args.next().unwrap_or_default());
    }
    match cmd.as_str() {
        "backend" => backend(&o),
        "openloop" => openloop(&o),
        "handshake" => handshake(&o),
        _ => {
            eprintln!("usage: meshbench-tool backend|openloop|handshake --key value ...");
            std::process::exit(2)
        }
    }
}

// ---------------------------------------------------------------- backend
/// HTTP/1.1 + h2c (prior knowledge). GET -> fixed body; POST -> echoes the body.
/// For verification: reflects the request header x-filter; a request with x-ask learns the HTTP version it
/// arrived in (x-backend-version).
fn backend(o: &Opts) {
    use bytes::Bytes;
    use http_body_util::{BodyExt, Full};
    use hyper::{header, service::service_fn, Method, Request, Response};
    let body = Bytes::from(vec![b'x'; num(o, "body", 1024usize)]);
    let a = addr(o);
    let rt = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    rt.block_on(async move {
        // tokio's default backlog (1024); the idle-connection test opens connections gradually
        let l = tokio::net::TcpListener::bind(a).await.expect("bind");
        let local = tokio::task::LocalSet::new();
        local
            .run_until(async move {
                loop {
                    let Ok((s, _)) = l.accept().await else { continue };
                    let _ = s.set_nodelay(true);
                    let body = body.clone();
                    tokio::task::spawn_local(async move {
                        let svc = service_fn(move |req: Request<hyper::body::Incoming>| {
                            let body = body.clone();
                            async move {
                                let filter = req.headers().get("x-filter").cloned();
                                let ask = req.headers().contains_key("x-ask").then(|| format!("{:?}", req.version()));
                                let out = if req.method() == Method::POST {
                                    req.into_body().collect().await?.to_bytes()
                                } else {
                                    body
                                };
                                let mut r = Response::new(Full::new(out));
                                r.headers_mut().insert(
                                    header::CONTENT_TYPE,
                                    header::HeaderValue::from_static("text/plain"),
                                );
                                if let Some(v) = filter {
                                    r.headers_mut().insert("x-reflect-filter", v);
                                }
                                if let Some(v) = ask {
                                    r.headers_mut().insert("x-backend-version", v.parse().unwrap());
                                }
                                Ok::<_, hyper::Error>(r)
                            }
                        });
                        let _ = hyper_util::server::conn::auto::Builder::new(LocalExec)
                            .serve_connection(hyper_util::rt::TokioIo::new(s), svc)
                            .await;
                    });
                }
            })
            .await;
    });
}
#[derive(Clone)]
struct LocalExec;
impl<F> hyper::rt::Executor<F> for LocalExec
where
    F: std::future::Future + 'static,
{
    fn execute(&self, f: F) {
        tokio::task::spawn_local(async move {
            f.await;
        });
    }
}

// ---------------------------------------------------------------- openloop
struct Conn {
    s: TcpStream,
    intended: u64,
    busy: bool,
    dead: bool,
    got: Vec<u8>,
    need: usize,
}

/// Constant-rate schedule shared by all connections. Latency counts from the *intended* send
/// time, so a stall in the proxy is charged to every request that should have been sent meanwhile.
fn openloop(o: &Opts) {
    let (rate, conns): (f64, usize) = (num(o, "rate", 1000.0), num(o, "conns", 32));
    let (secs, warm): (f64, f64) = (num(o, "secs", 4.0), num(o, "warmup", 1.0));
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
        cs.push(Conn { s, intended: 0, busy: false, dead: false, got: Vec::new(), need: 0 });
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
        if next >= end_ns && (inflight == 0 && backlog.is_empty() || t > end_ns + 3_000_000_000) {
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
                            match (h.starts_with("http/1.1 200"), len.and_then(|v| v.trim().parse::<usize>().ok())) {
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
                        if c.intended >= warm_ns {
                            lat.push(l);
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
        "{{\"total\":{},\"counted\":{},\"errors\":{},\"p50_us\":{:.1},\"p90_us\":{:.1},\"p99_us\":{:.1},\"p999_us\":{:.1},\"max_us\":{:.1}}}",
        total, lat.len(), errors, q(0.5), q(0.9), q(0.99), q(0.999), q(1.0)
    );
}

// ---------------------------------------------------------------- handshake
/// New TCP connection (+ full TLS 1.3 handshake with client certificate, resumption off) for each
/// request; `Connection: close`; the response is read to the end so the server finished its side.
fn handshake(o: &Opts) {
    use rustls::pki_types::{pem::PemObject, CertificateDer, PrivateKeyDer, ServerName};
    let secs: f64 = num(o, "secs", 4.0);
    let threads: usize = num(o, "threads", 4);
    let a = addr(o);
    let tls = o.get("ca").map(|ca| {
        let mut roots = rustls::RootCertStore::empty();
        for c in CertificateDer::pem_file_iter(ca).unwrap() {
            roots.add(c.unwrap()).unwrap();
        }
        let chain: Vec<_> = CertificateDer::pem_file_iter(&o["cert"]).unwrap().map(|c| c.unwrap()).collect();
        let key = PrivateKeyDer::from_pem_file(&o["key"]).unwrap();
        let mut p = rustls::crypto::ring::default_provider();
        p.cipher_suites = vec![rustls::crypto::ring::cipher_suite::TLS13_AES_128_GCM_SHA256]; // the same for every peer
        let mut c = rustls::ClientConfig::builder_with_provider(Arc::new(p))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .unwrap();
        c.resumption = rustls::client::Resumption::disabled();
        c.alpn_protocols = vec![b"http/1.1".to_vec()];
        (Arc::new(c), ServerName::try_from(o["sni"].clone()).unwrap())
    });
    let end = Instant::now() + Duration::from_secs_f64(secs);
    let t0 = Instant::now();
    let hs: Vec<_> = (0..threads)
        .map(|_| {
            let tls = tls.clone();
            std::thread::spawn(move || {
                let (mut ok, mut bad) = (0u64, 0u64);
                while Instant::now() < end {
                    if one(a, tls.as_ref()).unwrap_or(false) {
                        ok += 1
                    } else {
                        bad += 1;
                        if bad > 100 {
                            break;
                        }
                    }
                }
                (ok, bad)
            })
        })
        .collect();
    let (mut ok, mut bad) = (0, 0);
    for h in hs {
        let (a, b) = h.join().unwrap();
        ok += a;
        bad += b;
    }
    println!("{{\"total\":{},\"errors\":{},\"secs\":{:.3}}}", ok, bad, t0.elapsed().as_secs_f64());
}

type Tls = (Arc<rustls::ClientConfig>, rustls::pki_types::ServerName<'static>);
fn one(a: SocketAddr, tls: Option<&Tls>) -> std::io::Result<bool> {
    let req = b"GET /svc-0/ HTTP/1.1\r\nHost: svc-0.mesh\r\nConnection: close\r\n\r\n";
    let mut s = TcpStream::connect(a)?;
    s.set_nodelay(true)?;
    s.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut got = Vec::with_capacity(4096);
    match tls {
        None => {
            s.write_all(req)?;
            s.read_to_end(&mut got)?;
        }
        Some((cfg, name)) => {
            let mut c = rustls::ClientConnection::new(cfg.clone(), name.clone()).map_err(std::io::Error::other)?;
            let mut st = rustls::Stream::new(&mut c, &mut s);
            st.write_all(req)?;
            match st.read_to_end(&mut got) {
                Ok(_) => {}
                Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {}
                Err(e) => return Err(e),
            }
            if c.handshake_kind() != Some(rustls::HandshakeKind::Full) {
                return Ok(false);
            }
        }
    }
    Ok(got.starts_with(b"HTTP/1.1 200") && got.len() > 1024)
}
