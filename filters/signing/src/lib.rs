//! Signs requests with HMAC-SHA256, so that a service behind another party can tell that they came through this mesh.
//!
//! Signed are, a line each: the method, the path with its query, the authority, the time in seconds, and the values of `headers` in the
//! order configured. The result is `x-signature: keyId="k1",created=…,headers="…",signature="<base64>"`. With `digestTrailer` the
//! body's SHA-256 follows in a trailer as it streams by, signed with the same key: nothing is held back.
//!
//! ```json
//! {"keyId": "k1", "secret": "<base64>", "headers": ["content-type"], "digestTrailer": true}
//! ```

use std::fmt::Write;
use std::rc::Rc;
use std::time::UNIX_EPOCH;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::{Action, ContextType};
use serde::Deserialize;
use sha2::{Digest, Sha256};

/// Name of the trailer.
const DIGEST: &str = "x-body-digest";

proxy_wasm::main! {{
    proxy_wasm::set_root_context(|_| Box::new(Root::default()));
}}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Written {
    key_id: String,
    /// Base64
    secret: String,
    #[serde(default)]
    headers: Vec<String>,
    #[serde(default)]
    digest_trailer: bool,
}

#[derive(Debug, Default)]
struct Signer {
    key_id: String,
    secret: Vec<u8>,
    headers: Vec<String>,
    digest_trailer: bool,
}

impl Signer {
    fn mac(&self, text: &[u8]) -> String {
        // A key of any length will do (RFC 2104), so there is nothing that could fail.
        let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(&self.secret) else { return String::new() };
        mac.update(text);
        BASE64_STANDARD.encode(mac.finalize().into_bytes())
    }

    fn sign(&self, request: &Signed<'_>) -> String {
        let mut text = format!("{}\n{}\n{}\n{}\n", request.method, request.path, request.authority, request.created);
        for value in &request.values {
            text.push_str(value);
            text.push('\n');
        }
        let mut header = format!("keyId=\"{}\",created={}", self.key_id, request.created);
        if !self.headers.is_empty() {
            let _ = write!(header, ",headers=\"{}\"", self.headers.join(" "));
        }
        let _ = write!(header, ",signature=\"{}\"", self.mac(text.as_bytes()));
        header
    }
}

/// What is signed of a request.
struct Signed<'a> {
    method: &'a str,
    path: &'a str,
    authority: &'a str,
    /// Seconds since 1970
    created: u64,
    /// Of the configured headers; empty where one is missing
    values: Vec<String>,
}

#[derive(Default)]
struct Root {
    signer: Rc<Signer>,
}

impl Context for Root {}

impl RootContext for Root {
    fn on_configure(&mut self, _size: usize) -> bool {
        let Some(written) = filter_config::read::<Written>(self) else { return false };
        let secret = match BASE64_STANDARD.decode(&written.secret) {
            Ok(secret) if secret.len() >= 16 => secret,
            Ok(_) => return refuse("secret: must have 16 bytes or more"),
            Err(error) => return refuse(&format!("secret: not base64: {error}")),
        };
        let Written { key_id, headers, digest_trailer, .. } = written;
        self.signer = Rc::new(Signer { key_id, secret, headers, digest_trailer });
        true
    }

    fn create_http_context(&self, _id: u32) -> Option<Box<dyn HttpContext>> {
        Some(Box::new(Exchange { signer: Rc::clone(&self.signer), digest: Sha256::new() }))
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(ContextType::HttpContext)
    }
}

fn refuse(why: &str) -> bool {
    filter_config::refuse(why);
    false
}

struct Exchange {
    signer: Rc<Signer>,
    digest: Sha256,
}

impl Context for Exchange {}

impl HttpContext for Exchange {
    fn on_http_request_headers(&mut self, _count: usize, end_of_stream: bool) -> Action {
        let header = |name: &str| self.get_http_request_header(name).unwrap_or_default();
        let created = self.get_current_time().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let signature = self.signer.sign(&Signed {
            method: &header(":method"),
            path: &header(":path"),
            authority: &header(":authority"),
            created,
            values: self.signer.headers.iter().map(|name| header(name)).collect(),
        });
        self.set_http_request_header("x-signature", Some(&signature));
        if self.signer.digest_trailer && !end_of_stream {
            // HTTP/1 carries only the trailers that are announced, and none behind a body of a stated length.
            self.add_http_request_header("trailer", DIGEST);
            self.set_http_request_header("content-length", None);
        }
        Action::Continue
    }

    fn on_http_request_body(&mut self, size: usize, end_of_stream: bool) -> Action {
        if self.signer.digest_trailer {
            self.digest.update(self.get_http_request_body(0, size).unwrap_or_default());
            if end_of_stream {
                self.add_digest();
            }
        }
        Action::Continue
    }

    fn on_http_request_trailers(&mut self, _count: usize) -> Action {
        if self.signer.digest_trailer {
            self.add_digest();
        }
        Action::Continue
    }
}

impl Exchange {
    fn add_digest(&mut self) {
        let digest = std::mem::take(&mut self.digest).finalize();
        let value = format!("sha-256=:{}:;signature=\"{}\"", BASE64_STANDARD.encode(digest), self.signer.mac(&digest));
        self.set_http_request_trailer(DIGEST, Some(&value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 4231, test case 2.
    #[test]
    fn the_code_is_hmac_sha256() {
        let signer = Signer { secret: b"Jefe".to_vec(), ..Signer::default() };
        let code = BASE64_STANDARD.decode(signer.mac(b"what do ya want for nothing?")).unwrap();
        assert_eq!(&code[..4], [0x5b, 0xdc, 0xc1, 0x46]);
    }

    #[test]
    fn every_part_counts() {
        let signer = Signer { secret: vec![7; 16], headers: vec!["content-type".into()], ..Signer::default() };
        let sign = |path, value: &str| {
            signer.sign(&Signed { method: "GET", path, authority: "a", created: 1, values: vec![value.into()] })
        };
        assert_eq!(sign("/", "x"), sign("/", "x"));
        assert_ne!(sign("/", "x"), sign("/y", "x"));
        assert_ne!(sign("/", "x"), sign("/", "y"));
    }
}
