//! Administration and health over HTTP/1. Loopback by default; every request must name the address it came to, so that no
//! web page in a browser reaches it.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST, ORIGIN};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use outrigger_core::{chain, shed};
use serde_json::{Value, json};
use tracing_subscriber::{EnvFilter, Registry, reload};

use crate::drain::Phase;
use crate::filter::Plugins;
use crate::metrics::Metric;
use crate::snapshot::Target;
use crate::state::Proxy;

/// Changes the log's filter while running.
pub type LogHandle = reload::Handle<EnvFilter, Registry>;

/// What the endpoints show.
#[derive(Debug)]
pub struct Admin {
    /// The proxy
    pub proxy: Arc<Proxy>,
    /// WASM filters
    pub plugins: Option<Arc<Plugins>>,
    /// The log's filter
    pub log: LogHandle,
}

/// Which of the two listeners was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Surface {
    /// Everything; only from the own host
    Admin,
    /// `/ready`, `/live`, `/metrics`: for probes and scrapers
    Health,
}

impl Admin {
    /// Serves a listener for ever.
    pub async fn serve(self: Arc<Self>, listener: TcpListener, surface: Surface) -> std::io::Result<()> {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let permits = Arc::new(tokio::sync::Semaphore::new(64));
        loop {
            let Ok(permit) = permits.clone().acquire_owned().await else { return Ok(()) };
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "administration: accepting failed");
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                    continue;
                }
            };
            let this = self.clone();
            tokio::spawn(async move {
                let service = service_fn(move |request| {
                    let response = this.handle(&request, surface);
                    async move { Ok::<_, std::convert::Infallible>(response) }
                });
                let mut builder = http1::Builder::new();
                builder.timer(TokioTimer::new()).max_buf_size(16 * 1024);
                // A connection's error is its client's affair.
                let _ = builder.serve_connection(TokioIo::new(stream), service).await;
                drop(permit);
            });
        }
    }

    fn handle(&self, request: &Request<Incoming>, surface: Surface) -> Response<Full<Bytes>> {
        let (method, path) = (request.method(), request.uri().path());
        if surface == Surface::Admin && !trusted(request.headers(), self.proxy.settings.admin) {
            return text(StatusCode::FORBIDDEN, "Host or Origin is not this address; use http://127.0.0.1:15000\n");
        }
        match (method, path) {
            (&Method::GET, "/ready") => self.ready(),
            (&Method::GET, "/live") => text(StatusCode::OK, "live\n"),
            (&Method::GET, "/metrics") => typed("text/plain; version=0.0.4", self.proxy.metrics.encode()),
            _ if surface == Surface::Health => text(StatusCode::NOT_FOUND, "here are /ready, /live and /metrics\n"),
            (&Method::GET, "/config") => document(&self.config()),
            (&Method::GET, "/clusters") => document(&self.clusters()),
            (&Method::GET, "/certs") => document(&self.certificates()),
            (&Method::GET, "/filters") => {
                let snapshot = self.proxy.directory.snapshot();
                document(&json!(self.plugins.as_ref().map(|plugins| snapshot.filter_rows(plugins))))
            }
            (&Method::GET, "/stats") => document(&self.stats()),
            (&Method::POST, "/drain") => {
                self.proxy.drain.request();
                text(StatusCode::ACCEPTED, "draining\n")
            }
            (&Method::PUT, "/log") => self.set_log(request.uri().query().unwrap_or_default()),
            (_, "/drain") => text(StatusCode::METHOD_NOT_ALLOWED, "use POST\n"),
            (_, "/log") => text(StatusCode::METHOD_NOT_ALLOWED, "use PUT /log?level=debug\n"),
            _ => text(
                StatusCode::NOT_FOUND,
                "here are /ready, /live, /config, /clusters, /certs, /filters, /stats, /metrics, POST /drain, PUT /log?level=\n",
            ),
        }
    }

    /// Ready: listeners are bound, there is an identity where one is meant to be, and the first configuration is in.
    fn ready(&self) -> Response<Full<Bytes>> {
        let missing = self.proxy.missing();
        if missing.is_empty() {
            return text(StatusCode::OK, "ready\n");
        }
        text(StatusCode::SERVICE_UNAVAILABLE, &format!("not ready: {}\n", missing.join(", ")))
    }

    fn config(&self) -> Value {
        let snapshot = self.proxy.directory.snapshot();
        let mut targets: Vec<Value> = snapshot
            .targets
            .iter()
            .map(|(key, (target, _))| match target {
                Target::Service(service) => json!({
                    "key": key.to_string(), "kind": "service",
                    "backends": service.backends.iter().map(|backend| backend.key.to_string()).collect::<Vec<_>>(),
                }),
                Target::Workload(workload) => json!({
                    "key": key.to_string(), "kind": "workload", "id": workload.endpoint.id.to_string(),
                }),
                Target::Absent => json!({"key": key.to_string(), "kind": "absent"}),
            })
            .collect();
        targets.sort_by_key(|target| target["key"].as_str().map(str::to_owned));
        let inbound =
            snapshot.inbound.as_ref().map(|inbound| {
                inbound.ports.iter().map(|port| {
                json!({
                    "name": port.name.to_string(), "port": port.port, "protocol": format!("{:?}", port.protocol),
                    "mtls": format!("{:?}", port.mtls), "filters": port.filters.to_vec(),
                    "streamFilters": port.stream_filters.to_vec(),
                    "authorization": port.authorization.rules().into_iter().collect::<BTreeMap<_, _>>(),
                })
            }).collect::<Vec<_>>()
            });
        json!({
            "snapshot": snapshot.number,
            "connected": self.proxy.directory.connected(),
            "workload": format!("{}/{}", self.proxy.settings.namespace, self.proxy.settings.name),
            "trustDomain": snapshot.mesh.as_ref().map(|mesh| mesh.trust_domain.to_string()),
            "accessLog": snapshot.mesh.as_ref().map(|mesh| format!("{:?}", mesh.access_log)),
            "workers": self.proxy.settings.workers,
            "inbound": inbound,
            "destinations": targets,
        })
    }

    fn clusters(&self) -> Value {
        self.proxy.clusters_report()
    }

    fn certificates(&self) -> Value {
        let identity = self.proxy.identity.last();
        let seconds = |at: std::time::SystemTime| {
            at.duration_since(std::time::SystemTime::UNIX_EPOCH).map(|since| since.as_secs()).unwrap_or_default()
        };
        let roots: Vec<String> = self
            .proxy
            .identity
            .bundle()
            .roots()
            .iter()
            .map(|root| hex::encode(chain::Fingerprint::of(root).0))
            .collect();
        json!({
            "identity": identity.as_ref().map(|own| own.spiffe().to_string()),
            "valid": self.proxy.identity.current().is_some(),
            "generation": identity.as_ref().map(|own| own.generation()),
            "serial": identity.as_ref().and_then(|own| serial(own.chain().first()?)),
            "notBefore": identity.as_ref().map(|own| seconds(own.not_before())),
            "notAfter": identity.as_ref().map(|own| seconds(own.not_after())),
            "roots": roots,
        })
    }

    fn stats(&self) -> Value {
        let workers: Vec<Value> = self
            .proxy
            .workers
            .iter()
            .map(|load| {
                json!({
                    "inbound": load.inbound.load(Ordering::Relaxed),
                    "outbound": load.outbound.load(Ordering::Relaxed),
                    "parked": load.parked.load(Ordering::Relaxed),
                    "requests": load.requests.load(Ordering::Relaxed),
                    "streams": load.streams.load(Ordering::Relaxed),
                    "running": load.running(),
                    "serverFirst": load.server_first.load(Ordering::Relaxed),
                    "accepted": load.accepted.load(Ordering::Relaxed),
                    "handedOver": load.handed_over.load(Ordering::Relaxed),
                    "splicedBytes": load.spliced.get(),
                    "refused": load.refused.get(),
                    "refusedShare": f64::from(load.shed_share.load(Ordering::Relaxed)) / f64::from(shed::WHOLE),
                })
            })
            .collect();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "phase": self.proxy.drain.phase().name(),
            "connected": self.proxy.directory.connected(),
            "snapshot": self.proxy.directory.snapshot().number,
            "droppedLogLines": self.proxy.metrics.total(Metric::LogDropped, &[]),
            "requests": self.proxy.passed(),
            "workers": workers,
        })
    }

    fn set_log(&self, query: &str) -> Response<Full<Bytes>> {
        let level = query.split('&').find_map(|pair| pair.strip_prefix("level="));
        let Some(level) = level.filter(|level| !level.is_empty()) else {
            return text(StatusCode::BAD_REQUEST, "say which: /log?level=debug\n");
        };
        let set = EnvFilter::try_new(level)
            .map_err(|error| error.to_string())
            .and_then(|filter| self.log.reload(filter).map_err(|error| error.to_string()));
        match set {
            Ok(()) => text(StatusCode::OK, &format!("{level}\n")),
            Err(error) => text(StatusCode::BAD_REQUEST, &format!("`{level}` is no log filter: {error}\n")),
        }
    }
}

impl Proxy {
    /// What keeps the proxy from being ready, for people.
    pub fn missing(&self) -> Vec<&'static str> {
        let snapshot = self.directory.snapshot();
        let mut missing = Vec::new();
        if self.drain.phase() != Phase::Serving {
            missing.push("draining");
        }
        if !self.bound.ready.load(Ordering::Acquire) {
            missing.push("listeners are not bound");
        }
        if self.wants_identity() && self.identity.current().is_none() {
            missing.push("no valid certificate");
        }
        if snapshot.mesh.is_none() {
            missing.push("no mesh configuration yet");
        }
        if !self.settings.apps.is_empty() && snapshot.inbound.is_none() {
            missing.push("no configuration of this workload yet");
        }
        missing
    }
}

/// Whether the request was meant for this address: a page in a browser can neither choose Host nor hide Origin.
fn trusted(headers: &HeaderMap, listener: SocketAddr) -> bool {
    let own = |authority: &str| {
        let host = authority.parse::<http::uri::Authority>().ok().map(|authority| authority.host().to_owned());
        host.is_some_and(|host| {
            let host = host.trim_start_matches('[').trim_end_matches(']').to_ascii_lowercase();
            host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback() || ip == listener.ip())
        })
    };
    let value = |name| headers.get(name).map(|value| value.to_str().unwrap_or_default());
    value(HOST).is_some_and(own) && value(ORIGIN).is_none_or(|origin| origin.strip_prefix("http://").is_some_and(own))
}

/// A certificate's serial number, as tools write it.
fn serial(certificate: &[u8]) -> Option<String> {
    let (_, certificate) = x509_parser::parse_x509_certificate(certificate).ok()?;
    Some(certificate.raw_serial_as_string())
}

fn text(status: StatusCode, body: &str) -> Response<Full<Bytes>> {
    let mut response = typed("text/plain; charset=utf-8", body.to_owned());
    *response.status_mut() = status;
    response
}

fn document(value: &Value) -> Response<Full<Bytes>> {
    typed("application/json", format!("{value:#}\n"))
}

fn typed(content_type: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    response.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static(content_type));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_browsers_page_is_not_trusted() {
        let listener = "127.0.0.1:15000".parse().unwrap();
        let check = |pairs: &[(http::HeaderName, &'static str)]| {
            let headers = pairs.iter().map(|(name, value)| (name.clone(), http::HeaderValue::from_static(value)));
            trusted(&headers.collect(), listener)
        };
        assert!(
            check(&[(HOST, "127.0.0.1:15000")]) && check(&[(HOST, "localhost:15000")]) && check(&[(HOST, "[::1]:1")])
        );
        assert!(check(&[(HOST, "localhost"), (ORIGIN, "http://localhost:15000")]));
        assert!(!check(&[]) && !check(&[(HOST, "evil.example")]));
        assert!(!check(&[(HOST, "localhost:15000"), (ORIGIN, "https://evil.example")]));
        assert!(!check(&[(HOST, "localhost:15000"), (ORIGIN, "null")]));
    }
}
