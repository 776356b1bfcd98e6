//! A response that a filter makes itself.

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, TRANSFER_ENCODING};
use http::{HeaderMap, HeaderValue, StatusCode, response};

/// A response made by a filter instead of the upstream.
#[derive(Debug, Clone)]
pub struct LocalResponse {
    /// HTTP status
    pub status: StatusCode,
    /// Headers in order, without framing headers
    pub headers: HeaderMap,
    /// Whole body
    pub body: Bytes,
    /// gRPC status, used where the request is gRPC; `None`: mapped from `status`
    pub grpc_status: Option<u32>,
}

impl LocalResponse {
    /// The head to send: framing headers recomputed, `text/plain` where there is a body and no type. For gRPC requests it is 200
    /// with `grpc-status` and `grpc-message`, and `body` becomes empty.
    pub fn into_head(mut self, grpc: bool) -> (response::Parts, Bytes) {
        let (mut head, ()) = http::Response::new(()).into_parts();
        self.headers.remove(CONTENT_LENGTH);
        self.headers.remove(TRANSFER_ENCODING);
        if grpc {
            let code = self.grpc_status.unwrap_or_else(|| grpc_from_http(self.status));
            self.headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            self.headers.insert("grpc-status", HeaderValue::from(code));
            if !self.body.is_empty()
                && let Ok(message) = HeaderValue::from_str(&grpc_message(&self.body))
            {
                self.headers.insert("grpc-message", message);
            }
            head.headers = self.headers;
            return (head, Bytes::new());
        }
        head.status = self.status;
        if self.status == StatusCode::NO_CONTENT || self.status == StatusCode::NOT_MODIFIED {
            self.body = Bytes::new();
        } else {
            self.headers.insert(CONTENT_LENGTH, HeaderValue::from(self.body.len()));
        }
        if !self.body.is_empty() && !self.headers.contains_key(CONTENT_TYPE) {
            self.headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        }
        head.headers = self.headers;
        (head, self.body)
    }
}

/// Whether a request is gRPC: `content-type: application/grpc`, with or without a suffix.
pub(super) fn is_grpc(headers: &HeaderMap) -> bool {
    let Some(rest) = headers.get(CONTENT_TYPE).and_then(|value| value.as_bytes().strip_prefix(b"application/grpc"))
    else {
        return false;
    };
    matches!(rest.first(), None | Some(b'+' | b';'))
}

/// The gRPC status for an HTTP status (the table of gRPC's `http-grpc-status-mapping.md`). It has no success: without a status of its own,
/// not even 200 is one.
pub(super) fn grpc_from_http(status: StatusCode) -> u32 {
    match status.as_u16() {
        400 => 13,
        401 => 16,
        403 => 7,
        404 => 12,
        429 | 502 | 503 | 504 => 14,
        _ => 2,
    }
}

/// Percent-encodes as gRPC does: printable ASCII but `%` stays.
fn grpc_message(body: &[u8]) -> String {
    let mut text = String::with_capacity(body.len().min(1024));
    for byte in body.iter().take(1024) {
        if (0x20..=0x7e).contains(byte) && *byte != b'%' {
            text.push(char::from(*byte));
        } else {
            text.push_str(&format!("%{byte:02X}"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn local(status: u16, body: &'static str) -> LocalResponse {
        LocalResponse {
            status: StatusCode::from_u16(status).unwrap(),
            headers: HeaderMap::new(),
            body: Bytes::from_static(body.as_bytes()),
            grpc_status: None,
        }
    }

    #[test]
    fn framing_is_recomputed() {
        let mut response = local(403, "no");
        response.headers.insert(CONTENT_LENGTH, HeaderValue::from_static("99"));
        let (head, body) = response.into_head(false);
        assert_eq!(head.headers[CONTENT_LENGTH], "2");
        assert_eq!(head.headers[CONTENT_TYPE], "text/plain");
        assert_eq!(body, "no");
        let (head, body) = local(204, "ignored").into_head(false);
        assert!(body.is_empty() && head.headers.is_empty());
    }

    #[test]
    fn grpc_requests_get_a_status_in_headers() {
        let (head, body) = local(403, "50% no\n").into_head(true);
        assert_eq!(head.status, StatusCode::OK);
        assert_eq!(head.headers["grpc-status"], "7");
        assert_eq!(head.headers["grpc-message"], "50%25 no%0A");
        assert!(body.is_empty());
        let (head, _) = LocalResponse { grpc_status: Some(9), ..local(403, "") }.into_head(true);
        assert_eq!(head.headers["grpc-status"], "9");
        let (head, _) = local(200, "").into_head(true);
        assert_eq!(head.headers["grpc-status"], "2");
    }
}
