//! The one place where the mesh itself answers: every such response says why.

use ::http::header::{CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER};
use ::http::{HeaderMap, HeaderName, HeaderValue, Response, Version};
use bytes::Bytes;
use outrigger_core::reason::{self, Reason};

/// `x-outrigger-reason`
pub(crate) const REASON: HeaderName = HeaderName::from_static(reason::HEADER);
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// Seconds after which an overload may be over.
const LATER: HeaderValue = HeaderValue::from_static("1");

/// The response for a reason. `detail` says what exactly, or is empty. A gRPC request gets a trailers-only response.
pub(crate) fn respond(reason: Reason, grpc: bool, detail: &str) -> Response<Bytes> {
    let mut response = explain(reason, grpc, detail);
    if reason == Reason::Overloaded {
        response.headers_mut().insert(RETRY_AFTER, LATER);
    }
    response
}

fn explain(reason: Reason, grpc: bool, detail: &str) -> Response<Bytes> {
    let code = HeaderValue::from_static(reason.code());
    if grpc {
        let mut response = Response::new(Bytes::new());
        let message =
            if detail.is_empty() { reason.what().to_owned() } else { format!("{} ({detail})", reason.what()) };
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert(GRPC_STATUS, HeaderValue::from(u16::from(reason.grpc_status())));
        if let Ok(message) = HeaderValue::from_str(&grpc_message(&message)) {
            headers.insert(GRPC_MESSAGE, message);
        }
        headers.insert(REASON, code);
        return response;
    }
    let text = text(reason, detail);
    let mut response = Response::new(Bytes::new());
    *response.status_mut() = reason.status();
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(CONTENT_LENGTH, HeaderValue::from(text.len()));
    headers.insert(REASON, code);
    *response.body_mut() = text.into();
    response
}

/// What the body says: the code, what happened, and what to do.
pub(crate) fn text(reason: Reason, detail: &str) -> String {
    let (code, what, remedy) = (reason.code(), reason.what(), reason.remedy());
    if detail.is_empty() {
        format!("{code}: {what}\n{remedy}\n")
    } else {
        format!("{code}: {what}\n{detail}\n{remedy}\n")
    }
}

/// Whether a request (or response) is gRPC: `content-type: application/grpc`, with or without a suffix.
pub(crate) fn is_grpc(headers: &HeaderMap) -> bool {
    let rest = headers.get(CONTENT_TYPE).and_then(|value| value.as_bytes().strip_prefix(b"application/grpc"));
    rest.is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
}

/// The gRPC status in a head or in trailers, where there is one.
pub(crate) fn grpc_status(headers: &HeaderMap) -> Option<u32> {
    headers.get(GRPC_STATUS)?.to_str().ok()?.parse().ok()
}

/// Name of a protocol version in the access log.
pub(crate) fn version(version: Version) -> &'static str {
    match version {
        Version::HTTP_2 => "h2",
        Version::HTTP_10 => "http/1.0",
        _ => "http/1.1",
    }
}

/// Percent-encodes as gRPC does: printable ASCII but `%` stays.
fn grpc_message(message: &str) -> String {
    let mut text = String::with_capacity(message.len());
    for byte in message.bytes().take(1024) {
        if (0x20..=0x7e).contains(&byte) && byte != b'%' {
            text.push(char::from(byte));
        } else {
            text.push_str(&format!("%{byte:02X}"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use ::http::StatusCode;

    use super::*;

    #[test]
    fn every_reason_answers_with_its_code_and_remedy() {
        for reason in Reason::ALL {
            let response = respond(*reason, false, "detail 1");
            assert_eq!(response.status(), reason.status());
            assert_eq!(response.headers()["x-outrigger-reason"], reason.code());
            let body = std::str::from_utf8(response.body()).unwrap();
            assert!(body.contains(reason.remedy()) && body.contains("detail 1"), "{body}");
            assert_eq!(response.headers()["content-length"], body.len().to_string());
        }
    }

    #[test]
    fn grpc_gets_trailers_only() {
        let response = respond(Reason::NoEndpoints, true, "100% gone");
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.headers()["grpc-status"], "14");
        assert_eq!(response.headers()["grpc-message"], "The backend has no ready endpoint. (100%25 gone)");
        assert!(response.body().is_empty());
    }

    #[test]
    fn grpc_is_known_by_its_content_type() {
        let headers = |value| HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static(value))]);
        assert!(is_grpc(&headers("application/grpc")) && is_grpc(&headers("application/grpc+proto")));
        assert!(!is_grpc(&headers("application/grpc-web")) && !is_grpc(&HeaderMap::new()));
    }
}
