//! The parts of a TLS ClientHello that decide what happens to a connection (RFC 8446 4.1.2, RFC 6066 3, RFC 7301 3.1).
//! A bounded reader of bytes from outside: it never panics, and allocates only for what it returns.

use super::sni;

/// What a ClientHello says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Hello {
    /// Server name, lower case
    pub sni: Option<String>,
    /// Application protocols, in the client's order
    pub alpn: Vec<Vec<u8>>,
}

impl Hello {
    /// From another sidecar, by its server name.
    pub fn is_mesh(&self) -> bool {
        self.sni.as_deref().is_some_and(sni::is_mesh)
    }
}

pub(super) enum Parsed {
    More,
    Hello(Hello),
    No,
}

/// A hello with a hybrid key share has some 1.8 KiB.
const MAX: usize = 16 * 1024;
const MAX_PROTOCOLS: usize = 16;

/// Bytes that are missing may still come; bytes that are wrong never get right.
enum Stop {
    More,
    Wrong,
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], Stop> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(Stop::More)?;
        self.0 = rest;
        Ok(taken)
    }

    fn number(&mut self, bytes: usize) -> Result<usize, Stop> {
        Ok(self.take(bytes)?.iter().fold(0, |number, b| number << 8 | usize::from(*b)))
    }

    /// A vector with its length before it.
    fn vector(&mut self, length_bytes: usize) -> Result<Reader<'a>, Stop> {
        let length = self.number(length_bytes)?;
        Ok(Reader(self.take(length)?))
    }
}

pub(super) fn parse(bytes: &[u8]) -> Parsed {
    match handshake(bytes).and_then(|message| body(message.as_ref())) {
        Ok(hello) => Parsed::Hello(hello),
        Err(Stop::More) if bytes.len() < MAX => Parsed::More,
        Err(_) => Parsed::No,
    }
}

/// The handshake message, from one record or put together from several.
fn handshake(bytes: &[u8]) -> Result<std::borrow::Cow<'_, [u8]>, Stop> {
    let mut reader = Reader(bytes);
    let mut whole: Option<Vec<u8>> = None;
    loop {
        let [kind, major, _] = *reader.take(3)? else { return Err(Stop::Wrong) };
        if kind != 0x16 || major != 3 {
            return Err(Stop::Wrong);
        }
        let length = reader.number(2)?;
        if length == 0 || length > MAX {
            return Err(Stop::Wrong);
        }
        // The type of the message shows in its first byte: wait for nothing more if it is no ClientHello.
        if whole.is_none() && reader.0.first().is_some_and(|kind| *kind != 1) {
            return Err(Stop::Wrong);
        }
        let fragment = reader.take(length)?;
        let so_far: &[u8] = match &mut whole {
            Some(whole) => {
                whole.extend_from_slice(fragment);
                whole
            }
            None => fragment,
        };
        if let [1, a, b, c, body @ ..] = so_far {
            let length = usize::from(*a) << 16 | usize::from(*b) << 8 | usize::from(*c);
            if length > MAX {
                return Err(Stop::Wrong);
            }
            if body.len() >= length {
                return Ok(match whole {
                    Some(whole) => whole[4..4 + length].to_vec().into(),
                    None => fragment[4..4 + length].into(),
                });
            }
        }
        whole.get_or_insert_with(|| fragment.to_vec());
    }
}

fn body(message: &[u8]) -> Result<Hello, Stop> {
    // All of the message is there: what it lacks now is wrong.
    extensions(message).map_err(|_| Stop::Wrong)
}

fn extensions(message: &[u8]) -> Result<Hello, Stop> {
    let mut reader = Reader(message);
    reader.take(2 + 32)?;
    reader.vector(1)?;
    reader.vector(2)?;
    reader.vector(1)?;
    let mut hello = Hello::default();
    if reader.0.is_empty() {
        return Ok(hello);
    }
    let mut extensions = reader.vector(2)?;
    while !extensions.0.is_empty() {
        let kind = extensions.number(2)?;
        let mut data = extensions.vector(2)?;
        match kind {
            0 => hello.sni = server_name(&mut data)?,
            16 => hello.alpn = protocols(&mut data)?,
            _ => {}
        }
    }
    Ok(hello)
}

fn server_name(data: &mut Reader<'_>) -> Result<Option<String>, Stop> {
    let mut names = data.vector(2)?;
    while !names.0.is_empty() {
        let kind = names.number(1)?;
        let name = names.vector(2)?.0;
        if kind == 0 {
            let fits = !name.is_empty() && name.len() <= 255 && name.iter().all(u8::is_ascii_graphic);
            let text = std::str::from_utf8(name).ok().filter(|_| fits).ok_or(Stop::Wrong)?;
            return Ok(Some(text.to_ascii_lowercase()));
        }
    }
    Ok(None)
}

fn protocols(data: &mut Reader<'_>) -> Result<Vec<Vec<u8>>, Stop> {
    let mut list = data.vector(2)?;
    let mut protocols = Vec::new();
    while !list.0.is_empty() && protocols.len() < MAX_PROTOCOLS {
        protocols.push(list.vector(1)?.0.to_vec());
    }
    Ok(protocols)
}
