//! Applications: small servers within the test, which record what reached them.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use serde_json::json;

use crate::Raw;

/// One server. It stops when dropped.
#[derive(Debug)]
pub struct Backend {
    address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    requests: Mutex<Vec<Recorded>>,
    connections: Mutex<Vec<Connection>>,
    stopped: AtomicBool,
}

/// A connection and every byte that it brought.
type Connection = (TcpStream, Arc<Mutex<Vec<u8>>>);

/// A request as it arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recorded {
    /// As sent
    pub method: String,
    /// As sent, with the query
    pub path: String,
    /// Name in lower case and value, in order
    pub headers: Vec<(String, String)>,
    /// Without its framing
    pub body: Vec<u8>,
}

/// What an HTTP backend does with a request.
#[derive(Debug, Clone)]
pub enum Reply {
    /// Answers. Content-Length and `x-backend` are added
    Answer {
        /// HTTP status
        status: u16,
        /// More headers
        headers: Vec<(String, String)>,
        /// The body
        body: Vec<u8>,
    },
    /// These bytes as they are, then the connection is closed
    Raw(Vec<u8>),
    /// Closes the connection without a word
    Close,
    /// Never answers
    Hang,
}

impl Recorded {
    /// The first value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(of, _)| of == name).map(|(_, value)| value.as_str())
    }
}

impl Backend {
    /// HTTP/1.1 on a free port of `ip`: tells in JSON what it received, under `x-backend: name`. `/status/NNN` is
    /// answered with that status.
    pub fn http(ip: IpAddr, name: &str) -> Self {
        let told = name.to_owned();
        Self::http_with(ip, name, move |request| {
            let status = request
                .path
                .split('?')
                .next()
                .and_then(|path| path.strip_prefix("/status/"))
                .and_then(|status| status.parse().ok())
                .unwrap_or(200);
            let body = json!({
                "backend": told,
                "method": request.method,
                "path": request.path,
                "headers": request.headers,
                "body": String::from_utf8_lossy(&request.body),
            });
            Reply::Answer { status, headers: Vec::new(), body: body.to_string().into_bytes() }
        })
    }

    /// HTTP/1.1 on a free port of `ip`, answering as `reply` says.
    pub fn http_with(ip: IpAddr, name: &str, reply: impl Fn(&Recorded) -> Reply + Send + Sync + 'static) -> Self {
        Self::on(listen(ip), name, reply)
    }

    /// As [`Backend::http_with`], on a listener made elsewhere (another network namespace, a given port).
    pub fn on(listener: TcpListener, name: &str, reply: impl Fn(&Recorded) -> Reply + Send + Sync + 'static) -> Self {
        let (name, reply) = (name.to_owned(), Arc::new(reply));
        Self::serve(listener, move |stream, shared, bytes| {
            let _ = http(&stream, shared, bytes, &name, reply.as_ref());
        })
    }

    /// Opaque TCP: says `greeting` first, then sends back what it receives until the client's end.
    pub fn echo(listener: TcpListener, greeting: &'static [u8]) -> Self {
        Self::serve(listener, move |mut stream, _, bytes| {
            let mut buffer = [0; 16 * 1024];
            let _ = stream.write_all(greeting);
            while let Ok(read @ 1..) = stream.read(&mut buffer) {
                lock(bytes).extend_from_slice(&buffer[..read]);
                if stream.write_all(&buffer[..read]).is_err() {
                    break;
                }
            }
            let _ = stream.shutdown(Shutdown::Write);
        })
    }

    /// A server on a free port of `ip` that does with each connection what `script` says.
    pub fn scripted(ip: IpAddr, script: impl Fn(Raw) + Send + Sync + Clone + 'static) -> Self {
        Self::serve(listen(ip), move |stream, _, _| {
            let ended = stream.try_clone().expect("clone of a socket");
            script(Raw::new(stream));
            let _ = ended.shutdown(Shutdown::Both);
        })
    }

    /// Connections so far.
    pub fn connections(&self) -> usize {
        lock(&self.shared.connections).len()
    }

    fn serve(
        listener: TcpListener,
        serve: impl Fn(TcpStream, &Shared, &Mutex<Vec<u8>>) + Send + Sync + Clone + 'static,
    ) -> Self {
        let address = listener.local_addr().expect("address of a listener");
        let shared = Arc::new(Shared::default());
        let accepting = shared.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                if accepting.stopped.load(Ordering::SeqCst) {
                    break;
                }
                let Ok(stream) = stream else { continue };
                let (shared, serve, bytes) = (accepting.clone(), serve.clone(), Arc::default());
                let kept = stream.try_clone().expect("clone of a socket");
                lock(&shared.connections).push((kept, Arc::clone(&bytes)));
                thread::spawn(move || serve(stream, &shared, &bytes));
            }
        });
        Self { address, shared }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Requests so far, in the order of their arrival.
    pub fn requests(&self) -> Vec<Recorded> {
        lock(&self.shared.requests).clone()
    }

    /// Requests so far.
    pub fn count(&self) -> usize {
        lock(&self.shared.requests).len()
    }

    /// Every byte received so far, by connection.
    pub fn bytes(&self) -> Vec<Vec<u8>> {
        lock(&self.shared.connections).iter().map(|(_, bytes)| lock(bytes).clone()).collect()
    }

    /// Ends it as a crash would: no new connections, and open ones are cut.
    pub fn kill(&mut self) {
        if self.shared.stopped.swap(true, Ordering::SeqCst) {
            return;
        }
        // Wakes the accepting thread, which drops the listener.
        let _ = TcpStream::connect(self.address);
        self.cut();
    }

    /// Cuts every connection, and goes on accepting others.
    pub fn cut(&self) {
        for (stream, _) in lock(&self.shared.connections).iter() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.kill();
    }
}

fn listen(ip: IpAddr) -> TcpListener {
    TcpListener::bind((ip, 0)).unwrap_or_else(|error| panic!("listen on {ip}: {error}"))
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Records every byte that is read.
struct Tap<'a> {
    stream: &'a TcpStream,
    bytes: &'a Mutex<Vec<u8>>,
}

impl Read for Tap<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut stream = self.stream;
        let read = stream.read(buffer)?;
        lock(self.bytes).extend_from_slice(&buffer[..read]);
        Ok(read)
    }
}

fn http(
    mut stream: &TcpStream,
    shared: &Shared,
    bytes: &Mutex<Vec<u8>>,
    name: &str,
    reply: &dyn Fn(&Recorded) -> Reply,
) -> io::Result<()> {
    let mut reader = BufReader::new(Tap { stream, bytes });
    while let Some(mut request) = head(&mut reader)? {
        if request.header("expect").is_some_and(|value| value.eq_ignore_ascii_case("100-continue")) {
            stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        request.body = body(&mut reader, &request)?;
        let last = request.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"));
        let is_head = request.method == "HEAD";
        lock(&shared.requests).push(request.clone());
        match reply(&request) {
            Reply::Answer { status, headers, body } => {
                let mut text =
                    format!("HTTP/1.1 {status} Said\r\nx-backend: {name}\r\ncontent-length: {}\r\n", body.len());
                for (name, value) in headers {
                    text.push_str(&format!("{name}: {value}\r\n"));
                }
                let mut answer = text.into_bytes();
                answer.extend_from_slice(b"\r\n");
                if !is_head && status != 204 && status != 304 {
                    answer.extend_from_slice(&body);
                }
                stream.write_all(&answer)?;
            }
            Reply::Raw(answer) => {
                stream.write_all(&answer)?;
                return stream.shutdown(Shutdown::Both);
            }
            Reply::Close => return stream.shutdown(Shutdown::Both),
            Reply::Hang => {
                // Until the other side gives up.
                io::copy(&mut reader, &mut io::sink())?;
            }
        }
        if last {
            return stream.shutdown(Shutdown::Both);
        }
    }
    Ok(())
}

/// The next request's head, or `None` at the end of the connection.
fn head(reader: &mut impl BufRead) -> io::Result<Option<Recorded>> {
    let Some(first) = line(reader)? else { return Ok(None) };
    let mut words = first.split(' ');
    let method = words.next().unwrap_or_default().to_owned();
    let path = words.next().unwrap_or_default().to_owned();
    let mut headers = Vec::new();
    while let Some(line) = line(reader)?.filter(|line| !line.is_empty()) {
        let (name, value) = line.split_once(':').unwrap_or((&line, ""));
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    Ok(Some(Recorded { method, path, headers, body: Vec::new() }))
}

fn body(reader: &mut impl BufRead, request: &Recorded) -> io::Result<Vec<u8>> {
    let mut body = Vec::new();
    if request.header("transfer-encoding").is_some() {
        loop {
            let size = line(reader)?.unwrap_or_default();
            let size = size.split(';').next().unwrap_or_default().trim();
            let size = u64::from_str_radix(size, 16).map_err(io::Error::other)?;
            if size == 0 {
                while !line(reader)?.ok_or(io::ErrorKind::UnexpectedEof)?.is_empty() {}
                return Ok(body);
            }
            exactly(reader, size, &mut body)?;
            line(reader)?;
        }
    }
    let length = request.header("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    exactly(reader, length, &mut body)?;
    Ok(body)
}

/// A request whose body was cut short is no request: it is never recorded.
fn exactly(reader: &mut impl BufRead, size: u64, body: &mut Vec<u8>) -> io::Result<()> {
    let read = reader.take(size).read_to_end(body)?;
    if read as u64 == size { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// A line without its end, or `None` at the end of the stream.
fn line(reader: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut bytes = Vec::new();
    if reader.read_until(b'\n', &mut bytes)? == 0 {
        return Ok(None);
    }
    let text = String::from_utf8_lossy(&bytes);
    Ok(Some(text.trim_end_matches('\n').trim_end_matches('\r').to_owned()))
}
