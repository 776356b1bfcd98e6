//! Values that fields share: each checked as it is read, so that an error has the field's path.

use std::fmt;
use std::marker::PhantomData;
use std::str::FromStr;

use serde::de::{self, Deserialize, Deserializer, Visitor};

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

scalar!(Millis, Size, Percent, Label, Subdomain, Port, Method, HeaderName, HeaderText, Principal, Glob, Block);

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
    Principal: principal, "a SPIFFE ID pattern like spiffe://cluster.local/ns/demo/sa/web, where * stands for any characters but /";
    /// A path, with one `*` at its start or its end
    Glob: glob, "a path: it begins with / (a * at the end makes a prefix), or with * (a suffix), or is *";
    /// A CIDR block or one address
    Block: |text| text.parse::<ipnet::IpNet>().is_ok() || text.parse::<std::net::IpAddr>().is_ok(), "a CIDR block or an IP address";
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
    let inner = text.strip_suffix('*').or_else(|| text.strip_prefix('*')).unwrap_or(text);
    (text.starts_with('/') || text.starts_with('*')) && !inner.contains('*') && !text.contains(['?', '#'])
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
