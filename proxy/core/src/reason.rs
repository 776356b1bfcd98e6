//! Why the mesh itself answered a request: the one table of codes (`x-outrigger-reason`), from which
//! `docs/reasons.md` is generated.

use http::StatusCode;

/// The header that carries the code.
pub const HEADER: &str = "x-outrigger-reason";

macro_rules! reasons {
    ($($(#[$meta:meta])* $name:ident = $code:literal, $status:expr, $grpc:literal, $what:literal, $remedy:literal;)*) => {
        /// Why the mesh made a response. Codes are stable: people alert on them.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Reason { $(#[doc = $what] $name,)* }

        impl Reason {
            /// Every reason, in the order of the documentation.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The stable code.
            pub fn code(self) -> &'static str {
                match self { $(Self::$name => $code,)* }
            }

            /// The HTTP status of the response.
            pub fn status(self) -> StatusCode {
                match self { $(Self::$name => $status,)* }
            }

            /// The gRPC status code, where the request is gRPC.
            pub fn grpc_status(self) -> u8 {
                match self { $(Self::$name => $grpc,)* }
            }

            /// What happened, in a sentence.
            pub fn what(self) -> &'static str {
                match self { $(Self::$name => $what,)* }
            }

            /// What to do about it.
            pub fn remedy(self) -> &'static str {
                match self { $(Self::$name => $remedy,)* }
            }
        }
    };
}

reasons! {
    BadRequest = "bad-request", StatusCode::BAD_REQUEST, 13, "The request is malformed or ambiguous (Host, Transfer-Encoding, path).", "Fix the client; the proxy's log names the rule.";
    HeadersTooLarge = "headers-too-large", StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, 8, "The header block exceeds 64 KiB.", "Send fewer or smaller headers.";
    HeadTimeout = "head-timeout", StatusCode::REQUEST_TIMEOUT, 4, "The request head did not arrive in time.", "Look for a stalled client.";
    ConnectRefused = "connect-method", StatusCode::METHOD_NOT_ALLOWED, 12, "CONNECT is not forwarded.", "Call the service directly.";
    UpgradeRefused = "upgrade-refused", StatusCode::NOT_IMPLEMENTED, 12, "An upgrade other than websocket was required.", "Use websocket, or HTTP/2 without an upgrade.";
    Unauthorized = "authorization-denied", StatusCode::FORBIDDEN, 7, "An AuthorizationPolicy denied the request.", "`outrigger status` and the proxy's log name the policy.";
    AuthorizationUnavailable = "authorization-unavailable", StatusCode::FORBIDDEN, 7, "A policy that selects this workload could not be read, so everything is denied.", "Fix the policy that `outrigger status` lists as rejected.";
    MtlsRequired = "mtls-required", StatusCode::FORBIDDEN, 16, "Plaintext reached a Strict port.", "Call through a sidecar, or make the port Permissive.";
    IdentityUnavailable = "identity-unavailable", StatusCode::SERVICE_UNAVAILABLE, 14, "The proxy has no valid certificate.", "Look at `/certs` and at the control plane's status.";
    PeerIdentity = "peer-identity", StatusCode::SERVICE_UNAVAILABLE, 14, "The peer's certificate is not the endpoint's identity, expired, or of another trust domain.", "Compare the endpoint's identity with the peer's `/certs`.";
    UnknownService = "unknown-service", StatusCode::SERVICE_UNAVAILABLE, 14, "No service, route or permitted outside destination has this name or address.", "Check the name, and `outboundTraffic` of MeshConfig.";
    UnknownPort = "unknown-port", StatusCode::SERVICE_UNAVAILABLE, 14, "The service or workload does not declare this port.", "Declare the port in the Service or with --app.";
    DiscoveryTimeout = "discovery-timeout", StatusCode::SERVICE_UNAVAILABLE, 14, "The control plane did not answer for this destination within 1 s.", "Look at the control plane's load and log.";
    DiscoveryUnavailable = "discovery-unavailable", StatusCode::SERVICE_UNAVAILABLE, 14, "The control plane is away and this destination was never used before.", "Bring the control plane back.";
    NoRoute = "no-route", StatusCode::NOT_FOUND, 12, "Routes replace the service's own routing, and none matches.", "Add a rule, or a catch-all.";
    NoBackend = "no-backend", StatusCode::INTERNAL_SERVER_ERROR, 14, "The chosen rule or share has no valid backend.", "`outrigger status` names the reference.";
    NoEndpoints = "no-endpoints", StatusCode::SERVICE_UNAVAILABLE, 14, "The backend has no ready endpoint.", "Look at the workloads that the Service selects.";
    ConnectFailure = "connect-failure", StatusCode::SERVICE_UNAVAILABLE, 14, "No connection to any endpoint that was tried.", "Look at the endpoint's host and port.";
    ConnectTimeout = "connect-timeout", StatusCode::SERVICE_UNAVAILABLE, 14, "Connecting to the endpoint took too long.", "Look at the network, or raise `timeouts.connect`.";
    UpstreamReset = "upstream-reset", StatusCode::BAD_GATEWAY, 14, "The endpoint closed or reset before a response.", "Look at the application's log.";
    UpstreamProtocol = "upstream-protocol", StatusCode::BAD_GATEWAY, 13, "The endpoint's response is not valid HTTP.", "Check the port's protocol.";
    RequestTimeout = "request-timeout", StatusCode::GATEWAY_TIMEOUT, 4, "The request's timeout passed.", "Raise `timeouts.request`, or make the service faster.";
    PerTryTimeout = "per-try-timeout", StatusCode::GATEWAY_TIMEOUT, 4, "The last attempt's timeout passed.", "Raise `perTryTimeout`.";
    OverflowPending = "overflow-pending", StatusCode::SERVICE_UNAVAILABLE, 8, "Too many requests wait for a connection.", "Raise `circuitBreaker.maxPendingRequests`, or add endpoints.";
    OverflowRequests = "overflow-requests", StatusCode::SERVICE_UNAVAILABLE, 8, "Too many concurrent requests to the service.", "Raise `circuitBreaker.maxRequests`, or add endpoints.";
    OverflowConnections = "overflow-connections", StatusCode::SERVICE_UNAVAILABLE, 8, "Too many connections to the service.", "Raise `circuitBreaker.maxConnections`.";
    Overloaded = "overloaded", StatusCode::SERVICE_UNAVAILABLE, 8, "The proxy has more requests than CPU time, or `--max-requests` of them in flight.", "Give the sidecar more CPU, add endpoints, or raise `--max-requests`.";
    FilterFailed = "filter-failed", StatusCode::SERVICE_UNAVAILABLE, 14, "A FailClosed filter trapped, ran too long, or could not start.", "Look at `/filters` and the proxy's log.";
    FilterResponse = "filter-response", StatusCode::OK, 0, "A filter answered, with a status of its own, or closed the connection.", "Look at the filter.";
    FilterRequestTooLarge = "filter-request-too-large", StatusCode::PAYLOAD_TOO_LARGE, 8, "A filter held more of the request's body than its `limits.body`.", "Send less, or raise the filter's `limits.body`.";
    FilterResponseTooLarge = "filter-response-too-large", StatusCode::INTERNAL_SERVER_ERROR, 8, "A filter held more of the response's body than its `limits.body`.", "Raise the filter's `limits.body`, or let it stream.";
    RouteResponse = "route-response", StatusCode::FOUND, 0, "A route's redirect answered; the status is the route's.", "Nothing to do.";
    Draining = "draining", StatusCode::SERVICE_UNAVAILABLE, 14, "The proxy is shutting down and takes no new requests.", "Nothing to do: callers go elsewhere.";
}

/// `docs/reasons.md`, whole.
pub fn document() -> String {
    let mut text = String::from(
        "# Reasons\n\nEvery response that the mesh itself makes carries `x-outrigger-reason`. This page is generated from \
         `proxy/core/src/reason.rs`; a test keeps it equal.\n\n| code | HTTP | gRPC | what happened | what to do |\n|---|---|---|---|---|\n",
    );
    for reason in Reason::ALL {
        text.push_str(&format!(
            "| `{}` | {} | {} | {} | {} |\n",
            reason.code(),
            reason.status().as_u16(),
            reason.grpc_status(),
            reason.what(),
            reason.remedy()
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_unique_and_the_page_is_current() {
        let mut codes: Vec<_> = Reason::ALL.iter().map(|reason| reason.code()).collect();
        codes.sort_unstable();
        codes.dedup();
        assert_eq!(codes.len(), Reason::ALL.len());
        let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/reasons.md");
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(page, document()).unwrap();
        }
        assert_eq!(std::fs::read_to_string(page).unwrap(), document(), "run the tests with UPDATE_DOCS=1");
    }
}
