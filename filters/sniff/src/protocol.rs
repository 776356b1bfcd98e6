//! What first bytes say: no host call here.

use serde::Deserialize;

/// No protocol here needs more bytes to be told.
pub(crate) const ENOUGH: usize = 24;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Protocol {
    Tls,
    Http1,
    Http2,
    Ssh,
    Redis,
    Postgres,
    Unknown,
}

impl Protocol {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Tls => "tls",
            Self::Http1 => "http1",
            Self::Http2 => "http2",
            Self::Ssh => "ssh",
            Self::Redis => "redis",
            Self::Postgres => "postgres",
            Self::Unknown => "unknown",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sniffed {
    Is(Protocol),
    /// Too few bytes
    More,
}

/// Beginnings that tell. The first five bytes of PostgreSQL's messages are their length and version.
const BEGINNINGS: [(&[u8], Protocol); 13] = [
    (&[0x16, 0x03], Protocol::Tls),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Protocol::Http2),
    (b"GET ", Protocol::Http1),
    (b"HEAD ", Protocol::Http1),
    (b"POST ", Protocol::Http1),
    (b"PUT ", Protocol::Http1),
    (b"PATCH ", Protocol::Http1),
    (b"DELETE ", Protocol::Http1),
    (b"OPTIONS ", Protocol::Http1),
    (b"CONNECT ", Protocol::Http1),
    (b"TRACE ", Protocol::Http1),
    (b"SSH-", Protocol::Ssh),
    (b"*", Protocol::Redis),
];

/// Version 3.0, and the request for TLS.
const POSTGRES: [[u8; 4]; 2] = [[0, 3, 0, 0], [0x04, 0xd2, 0x16, 0x2f]];

pub(crate) fn sniff(bytes: &[u8]) -> Sniffed {
    let mut open = false;
    for (beginning, protocol) in BEGINNINGS {
        if bytes.starts_with(beginning) {
            return Sniffed::Is(protocol);
        }
        open |= beginning.starts_with(bytes);
    }
    match bytes.get(4..8) {
        Some(version) if bytes[0] == 0 && POSTGRES.iter().any(|known| known == version) => {
            return Sniffed::Is(Protocol::Postgres);
        }
        Some(_) => {}
        None => open |= bytes.first() == Some(&0),
    }
    if open { Sniffed::More } else { Sniffed::Is(Protocol::Unknown) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn protocols_by_their_first_bytes() {
        for (bytes, protocol) in [
            (&b"\x16\x03\x01\x02\x00"[..], Protocol::Tls),
            (b"GET / HTTP/1.1\r\n", Protocol::Http1),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n....", Protocol::Http2),
            (b"*1\r\n$4\r\nPING\r\n", Protocol::Redis),
            (b"\0\0\0\x08\x04\xd2\x16\x2f", Protocol::Postgres),
            (b"\0\0\0\x50\0\x03\0\0user", Protocol::Postgres),
            (b"hello", Protocol::Unknown),
            (b"\0\0\0\x08\x01\x02\x03\x04", Protocol::Unknown),
        ] {
            assert_eq!(sniff(bytes), Sniffed::Is(protocol), "{bytes:?}");
        }
    }

    #[test]
    fn a_beginning_may_go_on() {
        for bytes in [&b""[..], b"\x16", b"PO", b"PRI * HTTP", b"\0\0\0"] {
            assert_eq!(sniff(bytes), Sniffed::More, "{bytes:?}");
        }
    }
}
