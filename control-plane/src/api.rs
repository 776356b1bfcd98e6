//! The HTTP API: what is known, as JSON; mutations need the administrator's token.

use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};

use crate::durable;
use crate::filters;
use crate::mesh::Mesh;
use crate::metrics::Metrics;
use crate::proxies::Proxies;
use crate::refusals::Refusals;
use crate::reports::Reports;

/// What the API needs of the certificate authority.
pub trait Authority: Send + Sync + 'static {
    /// Roots and what was signed lately, for `/api/v1/certificates`.
    fn certificates(&self) -> Value;

    /// Makes a join token from the body of `POST /api/v1/tokens`; returns the answer's body.
    ///
    /// # Errors
    /// A sentence that says what is wrong with the request.
    fn create_token(&self, request: Value) -> Result<Value, String>;
}

/// What the API answers from.
#[derive(Clone)]
pub struct Api {
    /// The state
    pub mesh: Arc<Mesh>,
    /// Connected proxies
    pub proxies: Arc<Proxies>,
    /// Refused calls
    pub refusals: Arc<Refusals>,
    /// Counters
    pub metrics: Metrics,
    /// Certificates and tokens
    pub authority: Arc<dyn Authority>,
    /// How filters do
    pub reports: Arc<Reports>,
    /// The administrator's token
    pub admin_token: Arc<str>,
}

impl std::fmt::Debug for Api {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Api").finish_non_exhaustive()
    }
}

/// Reads the administrator's token, or makes one at the first start (mode 0600).
///
/// # Errors
/// Those of the file system.
pub fn admin_token(state: &Path) -> io::Result<Arc<str>> {
    let path = state.join("admin-token");
    match std::fs::read_to_string(&path) {
        Ok(token) if token.trim().len() >= 32 => return Ok(token.trim().into()),
        Ok(_) => tracing::warn!(path = %path.display(), "the administrator's token is too short: a new one is written"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let mut random = [0; 32];
    aws_lc_rs::rand::fill(&mut random).map_err(|_| io::Error::other("no randomness"))?;
    let token = hex::encode(random);
    durable::write(&path, format!("{token}\n").as_bytes(), 0o600)?;
    Ok(token.into())
}

impl Api {
    /// Whether a request brings the administrator's token.
    ///
    /// # Errors
    /// The response that says so.
    pub(crate) fn authorize(&self, call: &'static str, headers: &HeaderMap) -> Result<(), Box<Response>> {
        let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let given = given.and_then(|value| value.strip_prefix("Bearer ")).unwrap_or_default();
        // Equal time whatever is given, but for its length.
        aws_lc_rs::constant_time::verify_slices_are_equal(given.as_bytes(), self.admin_token.as_bytes()).map_err(|_| {
            let reason =
                "this needs the administrator's token (the file admin-token in --state) as `Authorization: Bearer …`";
            self.refusals.record(call, "HTTP API", reason);
            Box::new(problem(StatusCode::UNAUTHORIZED, reason))
        })
    }

    /// The routes, behind the check of Host and Origin.
    pub fn router(self) -> Router {
        Router::new()
            .route("/healthz", get(async || "ok\n"))
            .route("/metrics", get(metrics))
            .route("/api/v1/status", get(status))
            .route("/api/v1/proxies", get(async |State(api): State<Self>| Json(api.proxies.rows(&api.mesh.now()))))
            .route("/api/v1/services", get(async |State(api): State<Self>| Json(api.mesh.now().catalog.services())))
            .route("/api/v1/endpoints", get(async |State(api): State<Self>| Json(api.mesh.now().catalog.endpoints())))
            .route("/api/v1/routes", get(async |State(api): State<Self>| Json(api.mesh.now().catalog.routes())))
            .route("/api/v1/certificates", get(async |State(api): State<Self>| Json(api.authority.certificates())))
            .merge(filters::routes())
            .route("/api/v1/tokens", post(tokens))
            .fallback(async || problem(StatusCode::NOT_FOUND, "no such path; see /api/v1/status"))
            .layer(middleware::from_fn(guard))
            .with_state(self)
    }
}

/// A page in a browser must not reach the API by a name that it made point here.
async fn guard(request: Request, next: Next) -> Response {
    let headers = request.headers();
    let host = headers.get(header::HOST).map(|host| host.to_str().unwrap_or_default());
    if !host.is_some_and(local) {
        return problem(StatusCode::FORBIDDEN, "the Host header must be localhost or an IP address");
    }
    let origin = headers.get(header::ORIGIN).map(|origin| origin.to_str().unwrap_or_default());
    let origin_host = |origin: &str| origin.split_once("://").is_some_and(|(_, host)| local(host));
    if !origin.is_none_or(origin_host) {
        return problem(StatusCode::FORBIDDEN, "requests from other origins are refused");
    }
    next.run(request).await
}

/// Whether an authority is `localhost` or an IP address, with or without a port.
fn local(authority: &str) -> bool {
    let host = match authority.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((host, _)) => host,
        None => authority.rsplit_once(':').map_or(authority, |(host, _)| host),
    };
    host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok()
}

pub(crate) fn problem(status: StatusCode, reason: &str) -> Response {
    (status, Json(json!({ "error": reason }))).into_response()
}

async fn metrics(State(api): State<Api>) -> Response {
    let now = api.mesh.now();
    let text = api.metrics.text(api.proxies.count(), now.accepted.rejected.len(), now.generation, api.mesh.work());
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}

async fn status(State(api): State<Api>) -> Json<Value> {
    let now = api.mesh.now();
    let (held, registrations) = {
        let leases = api.mesh.leases();
        (leases.held(), leases.registrations().len())
    };
    let closed = now.accepted.closed.iter().map(|closed| json!({ "closes": closed.closes, "reason": closed.reason }));
    let closed: Vec<Value> = closed.collect();
    Json(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "trustDomain": api.mesh.trust_domain(),
        "generation": now.generation,
        "resources": now.catalog.resources().count(),
        "rejections": now.accepted.rejected,
        "skipped": now.accepted.skipped.len(),
        "closed": closed,
        "refusals": api.refusals.list(),
        "registrations": registrations,
        "leasesHeld": held,
        "connectedProxies": api.proxies.count(),
    }))
}

async fn tokens(
    State(api): State<Api>,
    headers: HeaderMap,
    body: Result<Json<Value>, axum::extract::rejection::JsonRejection>,
) -> Response {
    if let Err(refused) = api.authorize("tokens", &headers) {
        return *refused;
    }
    let body = match body {
        Ok(Json(body)) => body,
        Err(error) => return problem(StatusCode::BAD_REQUEST, &error.to_string()),
    };
    match api.authority.create_token(body) {
        Ok(answer) => Json(answer).into_response(),
        Err(reason) => problem(StatusCode::BAD_REQUEST, &reason),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_local_names_and_addresses_are_hosts_of_the_api() {
        for host in ["localhost", "LOCALHOST:15014", "127.0.0.1:15014", "[::1]:15014", "10.0.0.1"] {
            assert!(local(host), "{host}");
        }
        for host in ["", "evil.test", "evil.test:15014", "localhost.evil.test", "[evil]:80", "127.0.0.1.nip.io"] {
            assert!(!local(host), "{host}");
        }
    }
}
