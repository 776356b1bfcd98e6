//! W3C trace context: every hop is a span of its own, a malformed context is replaced, and `tracestate` never goes
//! without the `traceparent` it belongs to (<https://www.w3.org/TR/trace-context/>).

use fastrand::Rng;
use http::header::Entry;
use http::{HeaderMap, HeaderName, HeaderValue};

/// `traceparent`
pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// `tracestate`
pub const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// A position in a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Context {
    /// Never 0
    pub trace: u128,
    /// Never 0
    pub span: u64,
    /// Whether the trace is recorded
    pub sampled: bool,
}

/// The hop's own span, and the one it came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hop {
    /// Of this hop; it is in the headers now
    pub context: Context,
    /// Span of the caller; `None`: the trace begins here
    pub parent: Option<u64>,
}

/// Continues the trace that the headers name, or begins one, and puts this hop's span into them. Of new traces
/// `sampling_ppm` in a million are sampled.
pub fn propagate(headers: &mut HeaderMap, rng: &mut Rng, sampling_ppm: u32) -> Hop {
    let begun = |rng: &mut Rng| {
        let (span, trace) = (rng.u64(1..), rng.u128(1..));
        Context { trace, span, sampled: rng.u32(..1_000_000) < sampling_ppm }
    };
    let (context, parent) = match headers.entry(TRACEPARENT) {
        Entry::Occupied(mut entry) => {
            // Two traceparent headers name no trace (3.2).
            let single = entry.iter().nth(1).is_none();
            let parent = if single { parse(entry.get().as_bytes()) } else { None };
            let context = match parent {
                Some(parent) => Context { span: rng.u64(1..), ..parent },
                None => begun(rng),
            };
            entry.insert(write(&context));
            (context, parent)
        }
        Entry::Vacant(entry) => {
            let context = begun(rng);
            entry.insert(write(&context));
            (context, None)
        }
    };
    if parent.is_none() {
        headers.remove(TRACESTATE);
    }
    Hop { context, parent: parent.map(|parent| parent.span) }
}

/// Reads a `traceparent` of version 00, or the part of a later version that is as in version 00.
pub fn parse(bytes: &[u8]) -> Option<Context> {
    let (head, rest) = bytes.split_at_checked(55)?;
    let [b'-', b'-', b'-'] = [head[2], head[35], head[52]] else { return None };
    let version = hex(&head[..2])?;
    let more = if version == 0 { rest.is_empty() } else { rest.is_empty() || rest[0] == b'-' };
    let (trace, flags) = (hex(&head[3..35])?, hex(&head[53..])?);
    let span = u64::try_from(hex(&head[36..52])?).ok()?;
    (version != 0xff && more && trace != 0 && span != 0).then_some(Context { trace, span, sampled: flags & 1 == 1 })
}

/// Lower case only.
fn hex(bytes: &[u8]) -> Option<u128> {
    bytes.iter().try_fold(0, |number, b| {
        let digit = match b {
            b'0'..=b'9' => b - b'0',
            b'a'..=b'f' => b - b'a' + 10,
            _ => return None,
        };
        Some(number << 4 | u128::from(digit))
    })
}

fn write(context: &Context) -> HeaderValue {
    let mut text = *b"00-00000000000000000000000000000000-0000000000000000-00";
    put(&mut text[3..35], &context.trace.to_be_bytes());
    put(&mut text[36..52], &context.span.to_be_bytes());
    text[54] += u8::from(context.sampled);
    // Hexadecimal digits and dashes are always a header value.
    let mut value = HeaderValue::from_bytes(&text).unwrap_or(HeaderValue::from_static("00-0-0-00"));
    // No two are the same: HTTP/2 then keeps it out of its tables, where it would drive out what comes again.
    value.set_sensitive(true);
    value
}

/// Lower case digits.
fn put(digits: &mut [u8], bytes: &[u8]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for (two, byte) in digits.as_chunks_mut::<2>().0.iter_mut().zip(bytes) {
        *two = [DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIVEN: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap())).collect()
    }

    #[test]
    fn a_trace_goes_on_with_a_new_span() {
        let mut headers = headers(&[("traceparent", GIVEN), ("tracestate", "a=b")]);
        let hop = propagate(&mut headers, &mut Rng::with_seed(1), 0);
        assert_eq!(hop.parent, Some(0x00f0_67aa_0ba9_02b7));
        assert_eq!(hop.context.trace, 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736);
        assert!(hop.context.sampled && hop.context.span != 0x00f0_67aa_0ba9_02b7);
        assert_eq!(parse(headers[TRACEPARENT].as_bytes()), Some(hop.context));
        assert_eq!(headers[TRACESTATE], "a=b");
    }

    #[test]
    fn a_malformed_context_is_replaced() {
        for bad in [
            "",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
        ] {
            let mut headers = headers(&[("traceparent", bad), ("tracestate", "a=b")]);
            let hop = propagate(&mut headers, &mut Rng::with_seed(2), 1_000_000);
            assert_eq!(hop.parent, None, "{bad}");
            assert!(hop.context.sampled);
            assert_eq!(parse(headers[TRACEPARENT].as_bytes()), Some(hop.context));
            assert!(!headers.contains_key(TRACESTATE), "{bad}");
        }
    }

    #[test]
    fn two_parents_are_none() {
        let mut headers = headers(&[("traceparent", GIVEN), ("traceparent", GIVEN)]);
        let hop = propagate(&mut headers, &mut Rng::with_seed(3), 0);
        assert_eq!(hop.parent, None);
        assert!(!hop.context.sampled);
        assert_eq!(headers.get_all(TRACEPARENT).iter().count(), 1);
    }
}
