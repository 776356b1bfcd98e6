//! New connections with full TLS 1.3 handshakes, and what they have in common with other clients of mesh TLS.

use std::io::{Error, ErrorKind, Read, Result, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject};
use rustls::{ClientConfig, ClientConnection, HandshakeKind, NamedGroup, RootCertStore};

use crate::{HOST, Opts, addr, num};

/// How to be an outbound sidecar: trust, certificate, the server's name, and the one group that is offered.
#[derive(Clone)]
pub struct Tls {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
    group: NamedGroup,
}

impl Tls {
    /// From --ca, --cert, --key, --sni, --group. `None`: plaintext is meant.
    pub fn of(o: &Opts) -> Option<Self> {
        let mut roots = RootCertStore::empty();
        for c in CertificateDer::pem_file_iter(o.get("ca")?).unwrap() {
            roots.add(c.unwrap()).unwrap();
        }
        use rustls::crypto::aws_lc_rs as lc;
        let group = match o.get("group").map(String::as_str) {
            Some("x25519mlkem768") => lc::kx_group::X25519MLKEM768,
            Some("x25519") | None => lc::kx_group::X25519,
            Some(other) => panic!("--group {other}: x25519 or x25519mlkem768"),
        };
        let mut p = lc::default_provider();
        p.cipher_suites = vec![lc::cipher_suite::TLS13_AES_128_GCM_SHA256]; // the same for every peer
        p.kx_groups = vec![group];
        let builder = ClientConfig::builder_with_provider(Arc::new(p));
        let builder = builder.with_protocol_versions(&[&rustls::version::TLS13]).unwrap().with_root_certificates(roots);
        let mut c = match o.get("cert") {
            // To see that it is refused.
            None => builder.with_no_client_auth(),
            Some(cert) => {
                let chain = CertificateDer::pem_file_iter(cert).unwrap().map(|c| c.unwrap()).collect();
                builder.with_client_auth_cert(chain, PrivateKeyDer::from_pem_file(&o["key"]).unwrap()).unwrap()
            }
        };
        c.resumption = rustls::client::Resumption::disabled();
        c.alpn_protocols = vec![b"http/1.1".to_vec()];
        let name = ServerName::try_from(o["sni"].clone()).unwrap();
        Some(Self { config: Arc::new(c), name, group: group.name() })
    }

    pub fn connect(&self) -> Result<ClientConnection> {
        ClientConnection::new(self.config.clone(), self.name.clone()).map_err(Error::other)
    }

    /// The handshake was a full one with the group that was asked for.
    pub fn is_right(&self, c: &ClientConnection) -> bool {
        c.handshake_kind() == Some(HandshakeKind::Full)
            && c.negotiated_key_exchange_group().is_some_and(|group| group.name() == self.group)
    }
}

/// New TCP connection (+ full TLS 1.3 handshake with client certificate, resumption off) for each
/// request; `Connection: close`; the response is read to the end so the server finished its side.
pub fn handshake(o: &Opts) {
    let secs: f64 = num(o, "secs", 2.0);
    let threads: usize = num(o, "threads", 4);
    let (a, tls) = (addr(o), Tls::of(o));
    let t0 = Instant::now();
    let end = t0 + Duration::from_secs_f64(secs);
    let worker = || {
        let tls = tls.clone();
        std::thread::spawn(move || {
            let (mut ok, mut bad) = (0u64, 0u64);
            while Instant::now() < end && bad < 100 {
                match one(a, tls.as_ref()) {
                    Ok(true) => ok += 1,
                    _ => bad += 1,
                }
            }
            (ok, bad)
        })
    };
    let all: Vec<_> = (0..threads).map(|_| worker()).collect();
    let sums = all.into_iter().map(|h| h.join().unwrap()).fold((0, 0), |x, y| (x.0 + y.0, x.1 + y.1));
    println!("{{\"total\":{},\"errors\":{},\"secs\":{:.3}}}", sums.0, sums.1, t0.elapsed().as_secs_f64());
}

fn one(a: SocketAddr, tls: Option<&Tls>) -> Result<bool> {
    let req = format!("GET /svc-0/ HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n");
    let mut s = TcpStream::connect(a)?;
    s.set_nodelay(true)?;
    s.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut got = Vec::with_capacity(4096);
    match tls {
        None => {
            s.write_all(req.as_bytes())?;
            s.read_to_end(&mut got)?;
        }
        Some(tls) => {
            let mut c = tls.connect()?;
            let mut st = rustls::Stream::new(&mut c, &mut s);
            st.write_all(req.as_bytes())?;
            match st.read_to_end(&mut got) {
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::UnexpectedEof => {}
                Err(e) => return Err(e),
            }
            if !tls.is_right(&c) {
                return Ok(false);
            }
        }
    }
    Ok(got.starts_with(b"HTTP/1.1 200") && got.len() > 1024)
}
