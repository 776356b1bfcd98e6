//! HTTP/1.1 by bytes: messages in chunks of one's own choosing, with trailers.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use outrigger_proxy::filter::cases::{Chunk, Headers, Request, SeenResponse, pair};

/// Nothing in a case takes this long.
const HANG: Duration = Duration::from_secs(8);

/// A message as it was received.
#[derive(Debug, Default)]
pub(super) struct Message {
    /// Request or status line
    pub(super) start: String,
    pub(super) headers: Headers,
    pub(super) body: Vec<u8>,
    pub(super) trailers: Headers,
    /// The connection ended first
    pub(super) cut: bool,
}

impl Message {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(of, _)| of == name).map(|(_, value)| value.as_str())
    }

    /// Reads one. `bodiless`: it has no body whatever its headers say; `to_end`: without framing the body ends with the connection.
    pub(super) fn read(
        from: &mut BufReader<TcpStream>,
        bodiless: impl Fn(&str) -> bool,
        to_end: bool,
    ) -> io::Result<Self> {
        let mut message = Self { start: line(from)?, ..Self::default() };
        message.headers = headers(from)?;
        if bodiless(&message.start) {
            return Ok(message);
        }
        let chunked = message.header("transfer-encoding").is_some_and(|value| value.contains("chunked"));
        let length = message.header("content-length").and_then(|value| value.parse().ok());
        let read = match (chunked, length) {
            (true, _) => message.chunks(from),
            (false, Some(length)) => {
                let mut part = from.take(length);
                part.read_to_end(&mut message.body).map(|read| message.cut = (read as u64) < length)
            }
            (false, None) if to_end => from.read_to_end(&mut message.body).map(drop),
            (false, None) => Ok(()),
        };
        message.cut |= read.is_err();
        Ok(message)
    }

    fn chunks(&mut self, from: &mut BufReader<TcpStream>) -> io::Result<()> {
        loop {
            let size = line(from)?;
            let size = size.split(';').next().unwrap_or_default().trim();
            let size = u64::from_str_radix(size, 16).map_err(io::Error::other)?;
            if size == 0 {
                self.trailers = headers(from)?;
                return Ok(());
            }
            if (from.take(size).read_to_end(&mut self.body)? as u64) < size {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            line(from)?;
        }
    }
}

fn line(from: &mut BufReader<TcpStream>) -> io::Result<String> {
    let mut line = String::new();
    if from.read_line(&mut line)? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(line.trim_end().to_owned())
}

fn headers(from: &mut BufReader<TcpStream>) -> io::Result<Headers> {
    let mut headers = Headers::new();
    loop {
        let line = line(from)?;
        if line.is_empty() {
            return Ok(headers);
        }
        let (name, value) = pair(&line);
        headers.push((name.to_ascii_lowercase(), value.unwrap_or_default().to_owned()));
    }
}

/// Writes the rest of a message: headers, then the body chunk by chunk; `sent` is called after each.
pub(super) fn write(
    to: &mut TcpStream,
    start: &str,
    lines: &[String],
    body: &[Chunk],
    trailers: &[String],
    mut sent: impl FnMut(),
) -> io::Result<()> {
    let has = |name: &str| lines.iter().any(|line| pair(line).0.eq_ignore_ascii_case(name));
    let chunked = !has("content-length") && (!body.is_empty() || !trailers.is_empty());
    let mut head = format!("{start}\r\n");
    for line in lines {
        head += line;
        head += "\r\n";
    }
    if chunked {
        head += "transfer-encoding: chunked\r\n";
    }
    if chunked && !trailers.is_empty() {
        let names: Vec<&str> = trailers.iter().map(|line| pair(line).0).collect();
        head += &format!("trailer: {}\r\n", names.join(", "));
    }
    to.write_all((head + "\r\n").as_bytes())?;
    for chunk in body {
        let bytes = chunk.bytes();
        let size = format!("{:x}\r\n", bytes.len());
        let framed = if chunked { [size.as_bytes(), &bytes, b"\r\n"].concat() } else { bytes };
        to.write_all(&framed)?;
        sent();
    }
    if chunked {
        let trailers: String = trailers.iter().map(|line| format!("{line}\r\n")).collect();
        to.write_all(format!("0\r\n{trailers}\r\n").as_bytes())?;
    }
    Ok(())
}

/// Sends a request to a proxy and reads what comes back. `None`: the client went away, as the request says.
pub(super) fn exchange(to: SocketAddr, request: &Request, progress: &dyn Fn()) -> Option<SeenResponse> {
    let reset = || Some(SeenResponse { reset: true, ..SeenResponse::default() });
    let Ok(mut stream) = TcpStream::connect(to) else { return reset() };
    stream.set_read_timeout(Some(HANG)).expect("timeout");
    stream.set_nodelay(true).expect("nodelay");
    let mut reader = BufReader::new(stream.try_clone().expect("clone"));
    let start = format!("{} {} HTTP/1.1", request.method, request.path);
    let mut lines = vec![format!("host: {}", request.authority)];
    lines.extend(request.headers.iter().cloned());
    // A server may answer, and close, before it has read everything.
    let _ = write(&mut stream, &start, &lines, &request.body, &request.trailers, progress);
    if request.disconnect {
        progress();
        return None;
    }
    let head = request.method == "HEAD";
    let bodiless = |start: &str| head || [" 204", " 304"].iter().any(|code| start.contains(code));
    let Ok(message) = Message::read(&mut reader, bodiless, true) else { return reset() };
    let status = message.start.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
    let Message { headers, body, trailers, cut, .. } = message;
    Some(SeenResponse { status, headers, body, trailers, reset: cut })
}
