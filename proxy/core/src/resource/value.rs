//! Values that fields share: each checked as it is read, so that an error has the field's path.

use std::fmt;
use std::marker::PhantomData;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;
use serde::de::{self, Deserialize, Deserializer, Visitor};

use crate::normalize::canonical;

/// Longest pattern's compiled size, in bytes: a pattern must not be a way to exhaust proxies.
const REGEX_LIMIT: usize = 256 * 1024;

/// A DNS label: what namespaces, Services and service accounts are called.
pub(crate) fn dns_label(text: &str) -> bool {
    let bytes = text.as_bytes();
    (1..=63).contains(&bytes.len())
        && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-')
        && bytes.first() != Some(&b'-')
        && bytes.last() != Some(&b'-')
}

/// Labels joined by dots, at most 253 bytes: the names of most other kinds.
pub(crate) fn dns_subdomain(text: &str) -> bool {
    text.len() <= 253 && text.split('.').all(dns_label)
}

/// Checks that a regular expression compiles, and to something small.
pub(crate) fn check_regex(pattern: &str) -> Result<(), String> {
    let anchored = format!("^(?:{pattern})$");
    regex::RegexBuilder::new(&anchored).size_limit(REGEX_LIMIT).build().map(drop).map_err(|error| match error {
        regex::Error::CompiledTooBig(_) => "the regular expression is too big; simplify it".to_owned(),
        // The last line says what; those before draw the pattern, which no single line of a log can.
        error => error.to_string().lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned(),
    })
}

/// A value read from a scalar by `FromStr`; numbers are read by their text.
pub(crate) struct Scalar<T>(pub(crate) PhantomData<T>);

impl<'de, T: FromStr<Err = String>> Visitor<'de> for Scalar<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string or a number")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        text.parse().map_err(E::custom)
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<T, E> {
        self.visit_str(&number.to_string())
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<T, E> {
        self.visit_str(&number.to_string())
    }

    fn visit_f64<E: de::Error>(self, number: f64) -> Result<T, E> {
        self.visit_str(&number.to_string())
    }
}

/// `Deserialize` through [`Scalar`] for types with `FromStr<Err = String>`.
macro_rules! scalar {
    ($($name:ty),*) => {
        $(impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserializer.deserialize_any($crate::resource::value::Scalar::<Self>(std::marker::PhantomData))
            }
        })*
    };
}
pub(crate) use scalar;

scalar!(
    Identity, Millis, Size, Percent, Label, Subdomain, Port, Method, HeaderName, HeaderText, Principal, Glob, Block
);

/// A duration in milliseconds: `250ms`, `1s`, `1h30m`, `24h`, `1d`. `0s` is zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Millis(pub(crate) u64);

impl FromStr for Millis {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not a duration; write one like 250ms, 1s, 5m or 1h30m");
        let mut total: u64 = 0;
        let mut rest = text;
        if rest.is_empty() {
            return Err(wrong());
        }
        while !rest.is_empty() {
            let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
            let unit_end = digits + rest.bytes().skip(digits).take_while(u8::is_ascii_alphabetic).count();
            let (Some(number), Some(unit)) = (rest.get(..digits), rest.get(digits..unit_end)) else {
                return Err(wrong());
            };
            let scale = match unit {
                "ms" => 1,
                "s" => 1_000,
                "m" => 60_000,
                "h" => 3_600_000,
                "d" => 86_400_000,
                _ => return Err(wrong()),
            };
            let number: u64 = number.parse().map_err(|_| wrong())?;
            total = number.checked_mul(scale).and_then(|part| total.checked_add(part)).ok_or_else(wrong)?;
            rest = rest.get(unit_end..).unwrap_or_default();
        }
        // A hundred years: nothing longer is meant, and sums of a few stay far from overflow.
        if total > 100 * 365 * 86_400_000 { Err(wrong()) } else { Ok(Self(total)) }
    }
}

/// Bytes: `512Ki`, `16Mi`, `1Gi`, `1000`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size(pub(crate) u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (number, scale) = [("Ki", 1 << 10), ("Mi", 1 << 20), ("Gi", 1 << 30)]
            .into_iter()
            .find_map(|(unit, scale)| Some((text.strip_suffix(unit)?, scale)))
            .unwrap_or((text, 1));
        let bytes = number.parse::<u64>().ok().and_then(|number| number.checked_mul(scale));
        bytes.map(Self).ok_or_else(|| format!("`{text}` is not a size; write one like 512Ki or 16Mi"))
    }
}

/// A share in millionths: `1%`, `0.5%`, `20`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Percent(pub(crate) u32);

impl FromStr for Percent {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not a percentage from 0 to 100; write one like 1% or 0.5%");
        let number: f64 = text.strip_suffix('%').unwrap_or(text).trim().parse().map_err(|_| wrong())?;
        if !(0.0..=100.0).contains(&number) {
            return Err(wrong());
        }
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // 0 to 1,000,000
        Ok(Self((number * 10_000.0).round() as u32))
    }
}

/// Text with a rule, as a type.
macro_rules! text {
    ($($(#[$meta:meta])* $name:ident: $check:expr, $what:literal;)*) => {
        $($(#[$meta])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
        pub(crate) struct $name(pub(crate) String);

        impl FromStr for $name {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                let check: fn(&str) -> bool = $check;
                if check(text) { Ok(Self(text.to_owned())) } else { Err(format!(concat!("`{}` is not ", $what), text)) }
            }
        })*
    };
}

text! {
    /// A DNS label
    Label: dns_label, "a DNS label (lower-case letters, digits and -, at most 63)";
    /// A DNS subdomain
    Subdomain: dns_subdomain, "a name (DNS labels joined by dots, at most 253)";
    /// An HTTP method
    Method: |text| http::Method::from_bytes(text.as_bytes()).is_ok() && !text.bytes().any(|b| b.is_ascii_lowercase()),
        "an HTTP method; methods are written in capitals";
    /// The value of a header
    HeaderText: |text| http::HeaderValue::from_str(text).is_ok(), "a header value (visible ASCII)";
    /// A SPIFFE ID with wildcards
    Principal: principal, "a SPIFFE ID pattern like spiffe://cluster.local/ns/demo/sa/web, where * stands for any characters";
    /// A path in canonical spelling, with one `*` at its start or its end
    Glob: glob, "a path: it begins with / (a * at the end makes a prefix), or with * (a suffix), or is *; and it is spelled as requests are before rules see them: plain characters unescaped, no //, no dot segments, no %2F";
    /// One workload's identity
    Identity: |text| text.parse::<crate::spiffe::SpiffeId>().is_ok(), "a workload's SPIFFE ID; the form is spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>";
}

fn principal(text: &str) -> bool {
    if text == "*" {
        return true;
    }
    let Some(rest) = text.strip_prefix("spiffe://") else { return false };
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"-._*/".contains(&b);
    rest.split_once('/').is_some_and(|(domain, path)| !domain.is_empty() && !path.is_empty())
        && rest.bytes().all(allowed)
}

fn glob(text: &str) -> bool {
    // A rule that no canonical path can match would be a hole in a Deny: so a path that it matches must be canonical.
    let example = match (text.strip_suffix('*'), text.strip_prefix('*')) {
        (Some(""), _) => return true,
        (Some(prefix), _) => format!("{prefix}x"),
        (None, Some(suffix)) => format!("/x{suffix}"),
        (None, None) => text.to_owned(),
    };
    example.starts_with('/') && !example.contains('*') && canonical(&example, true) == Ok(None)
}

/// A port from 1 to 65535
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Port(pub(crate) u16);

impl FromStr for Port {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let port = text.parse().ok().filter(|port| *port != 0);
        port.map(Self).ok_or_else(|| format!("`{text}` is not a port from 1 to 65535"))
    }
}

/// A CIDR block; one address is a block of its own
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Block(pub(crate) String);

impl FromStr for Block {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let net = text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
        net.map(|net| Self(net.to_string())).map_err(|_| format!("`{text}` is not a CIDR block or an IP address"))
    }
}

/// A header name in lower case
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct HeaderName(pub(crate) String);

impl FromStr for HeaderName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let name = http::HeaderName::from_bytes(text.as_bytes());
        name.map(|name| Self(name.as_str().to_owned())).map_err(|_| format!("`{text}` is not a header name"))
    }
}

/// A field that the API has and this version does not: naming it is an error, never ignored.
#[derive(Debug, Clone, Copy)]
pub(crate) enum NotYet {}

impl<'de> Deserialize<'de> for NotYet {
    fn deserialize<D: Deserializer<'de>>(_: D) -> Result<Self, D::Error> {
        Err(de::Error::custom("not supported yet; remove it"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (text, millis) in [
            ("250ms", 250),
            ("1s", 1_000),
            ("0s", 0),
            ("5m", 300_000),
            ("24h", 86_400_000),
            ("1h30m", 5_400_000),
            ("1d", 86_400_000),
        ] {
            assert_eq!(text.parse(), Ok(Millis(millis)), "{text}");
        }
        for text in ["", "1", "s", "1.5s", "-1s", "1s ", "1 s", "1w", "99999999999999999999s", "9999999d"] {
            assert!(text.parse::<Millis>().is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_and_percentages() {
        for (text, bytes) in [("512Ki", 512 << 10), ("16Mi", 16 << 20), ("1Gi", 1 << 30), ("1000", 1000)] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for text in ["", "Ki", "1.5Mi", "16MB", "-1", "99999999999Gi"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
        for (text, millionths) in [("1%", 10_000), ("0.5%", 5_000), ("100", 1_000_000), ("0%", 0)] {
            assert_eq!(text.parse(), Ok(Percent(millionths)), "{text}");
        }
        for text in ["", "%", "101%", "-1%", "NaN", "inf"] {
            assert!(text.parse::<Percent>().is_err(), "{text}");
        }
    }

    #[test]
    fn names_principals_and_blocks() {
        assert!(
            dns_label("a-1")
                && !dns_label("-a")
                && !dns_label("a-")
                && !dns_label("A")
                && !dns_label("a.b")
                && !dns_label("")
        );
        assert!(dns_subdomain("a.b") && !dns_subdomain("a..b") && !dns_subdomain(&"a.".repeat(200)));
        for text in ["*", "spiffe://cluster.local/ns/demo/sa/web", "spiffe://*/ns/demo/sa/*"] {
            assert!(text.parse::<Principal>().is_ok(), "{text}");
        }
        for text in ["cluster.local/ns/demo/sa/web", "spiffe://", "spiffe://a", "spiffe://a/b c", ""] {
            assert!(text.parse::<Principal>().is_err(), "{text}");
        }
        assert_eq!("10.0.0.1".parse(), Ok(Block("10.0.0.1/32".into())));
        assert_eq!("fd00::/8".parse(), Ok(Block("fd00::/8".into())));
        assert!("10.0.0.0/33".parse::<Block>().is_err());
    }

    #[test]
    fn a_pattern_that_compiles_to_much_is_refused() {
        assert_eq!(check_regex("a{2}b*"), Ok(()));
        assert_eq!(check_regex("(a{1000}){1000}"), Err("the regular expression is too big; simplify it".into()));
        assert!(check_regex("(?=a)").is_err());
    }
}
