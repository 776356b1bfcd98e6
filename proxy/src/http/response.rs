//! Response heads, between two hops.

use ::http::header::{CONNECTION, TE, TRAILER, UPGRADE};
use ::http::{HeaderMap, HeaderValue, Response, StatusCode, Version, request, response};
use outrigger_core::reason::Reason;
use outrigger_core::retry;

use super::respond;

const WEBSOCKET: HeaderValue = HeaderValue::from_static("websocket");

/// What of the client's hop a response has to suit.
#[derive(Debug, Clone, Copy)]
pub(super) struct Hops {
    version: Version,
    trailers: bool,
}

impl Hops {
    pub(super) fn of(head: &request::Parts) -> Self {
        Self { version: head.version, trailers: head.version == Version::HTTP_2 || accepts_trailers(&head.headers) }
    }

    /// Puts back what belongs to the client's hop.
    pub(super) fn restore<B>(self, response: &mut Response<B>) {
        *response.version_mut() = self.version;
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
            response.headers_mut().insert(UPGRADE, WEBSOCKET);
        }
        if !self.trailers {
            response.headers_mut().remove(TRAILER);
        }
    }
}

/// `TE` lists `trailers`.
pub(super) fn accepts_trailers(headers: &HeaderMap) -> bool {
    headers
        .get_all(TE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .any(|value| value.split(',').any(|coding| coding.trim().eq_ignore_ascii_case("trailers")))
}

/// Why a proxy of the mesh made this response, if one did. What an application wrote there is gone by now.
pub(super) fn reason(head: &response::Parts) -> Option<&'static str> {
    let value = head.headers.get(&respond::REASON)?;
    retry::peer_reason(value).map(Reason::code)
}
