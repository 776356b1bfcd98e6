//! A line of the access log as JSON, written byte by byte: this runs for every request where all are logged.

use std::io::Write as _;
use std::net::SocketAddr;
use std::time::Duration;

use super::Entry;

/// Appends the line of `entry`; `time` is since 1970.
pub(super) fn line(out: &mut Vec<u8>, entry: &Entry<'_>, time: Duration) {
    out.extend_from_slice(b"{\"time\":");
    thousandths(out, u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
    out.extend_from_slice(b",\"kind\":\"access\"");
    text(out, b",\"direction\":\"", entry.direction);
    text(out, b",\"protocol\":\"", entry.protocol);
    text(out, b",\"method\":\"", entry.method);
    text(out, b",\"authority\":\"", entry.authority);
    text(out, b",\"path\":\"", entry.path);
    text(out, b",\"reason\":\"", entry.reason);
    text(out, b",\"detail\":\"", entry.detail);
    text(out, b",\"service\":\"", entry.service);
    text(out, b",\"version\":\"", entry.version);
    text(out, b",\"peer\":\"", entry.peer);
    text(out, b",\"route\":\"", entry.route);
    address(out, b",\"upstream\":\"", entry.upstream);
    address(out, b",\"client\":\"", entry.client);
    if let Some(trace) = entry.trace {
        out.extend_from_slice(b",\"trace_id\":\"");
        let mut digits = [0; 32];
        for (pair, byte) in digits.chunks_exact_mut(2).zip(trace.to_be_bytes()) {
            pair.copy_from_slice(&[hex(byte >> 4), hex(byte & 15)]);
        }
        out.extend_from_slice(&digits);
        out.push(b'"');
    }
    if entry.status != 0 {
        out.extend_from_slice(b",\"status\":");
        number(out, entry.status.into());
    }
    out.extend_from_slice(b",\"attempts\":");
    number(out, entry.attempts.into());
    out.extend_from_slice(b",\"duration_ms\":");
    // Rounded, to the microsecond.
    thousandths(out, u64::try_from((entry.duration.as_nanos() + 500) / 1000).unwrap_or(u64::MAX));
    out.extend_from_slice(b",\"sent\":");
    number(out, entry.sent);
    out.extend_from_slice(b",\"received\":");
    number(out, entry.received);
    out.extend_from_slice(b"}\n");
}

/// A member whose value is a string, unless that is empty. `name` ends where the value begins.
fn text(out: &mut Vec<u8>, name: &[u8], value: &str) {
    if value.is_empty() {
        return;
    }
    out.extend_from_slice(name);
    let value = value.as_bytes();
    // Without a way out in the middle, so that it is done many bytes at a time.
    if value.iter().fold(false, |found, byte| found | special(*byte)) {
        escape(out, value);
    } else {
        out.extend_from_slice(value);
    }
    out.push(b'"');
}

/// Whether JSON wants the byte escaped.
fn special(byte: u8) -> bool {
    byte < b' ' || byte == b'"' || byte == b'\\'
}

#[cold]
fn escape(out: &mut Vec<u8>, value: &[u8]) {
    for byte in value {
        match byte {
            b'"' | b'\\' => out.extend_from_slice(&[b'\\', *byte]),
            byte if special(*byte) => out.extend_from_slice(&[b'\\', b'u', b'0', b'0', hex(byte >> 4), hex(byte & 15)]),
            byte => out.push(*byte),
        }
    }
}

/// A digit, of four bits.
fn hex(digit: u8) -> u8 {
    if digit < 10 { b'0' + digit } else { b'a' + digit - 10 }
}

fn address(out: &mut Vec<u8>, name: &[u8], address: Option<SocketAddr>) {
    let Some(address) = address else { return };
    out.extend_from_slice(name);
    match address {
        SocketAddr::V4(v4) => {
            for (byte, end) in v4.ip().octets().iter().zip(b"...:") {
                number(out, (*byte).into());
                out.push(*end);
            }
            number(out, v4.port().into());
        }
        // A vector takes everything.
        SocketAddr::V6(v6) => drop(write!(out, "{v6}")),
    }
    out.push(b'"');
}

/// With three decimals.
fn thousandths(out: &mut Vec<u8>, value: u64) {
    number(out, value / 1000);
    out.push(b'.');
    out.extend_from_slice(&[100, 10, 1].map(|unit| digit(value / unit)));
}

fn number(out: &mut Vec<u8>, mut value: u64) {
    // As many digits as u64::MAX has.
    let mut digits = [0; 20];
    let mut at = digits.len();
    for place in digits.iter_mut().rev() {
        *place = digit(value);
        value /= 10;
        at -= 1;
        if value == 0 {
            break;
        }
    }
    out.extend_from_slice(digits.get(at..).unwrap_or_default());
}

/// The last digit.
#[allow(clippy::cast_possible_truncation)] // below ten
fn digit(value: u64) -> u8 {
    b'0' + (value % 10) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_member_has_its_form() {
        let entry = Entry {
            direction: "outbound",
            protocol: "http/1.1",
            method: "GET",
            authority: "reviews",
            path: "/\u{e9}\n",
            status: 200,
            service: "demo/reviews",
            version: "v1",
            upstream: Some("10.0.255.7:80".parse().unwrap()),
            client: Some("[::1]:4000".parse().unwrap()),
            route: "demo/r/0",
            attempts: 1,
            duration: Duration::from_nanos(12_000_600),
            sent: 0,
            received: u64::MAX,
            trace: Some(0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c),
            ..Entry::default()
        };
        let mut out = Vec::new();
        line(&mut out, &entry, Duration::from_micros(1_700_000_000_042_999));
        let want = concat!(
            r#"{"time":1700000000.042,"kind":"access","direction":"outbound","protocol":"http/1.1","method":"GET","#,
            r#""authority":"reviews","path":"/é\u000a","service":"demo/reviews","version":"v1","route":"demo/r/0","#,
            r#""upstream":"10.0.255.7:80","client":"[::1]:4000","trace_id":"0af7651916cd43dd8448eb211c80319c","#,
            r#""status":200,"attempts":1,"duration_ms":12.001,"sent":0,"received":18446744073709551615}"#,
            "\n"
        );
        assert_eq!(String::from_utf8(out).unwrap(), want);
    }
}
