//! One application of the shop: answers with its own name and version and, nested, what the service it calls answered.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::process::ExitCode;

use anyhow::Context as _;
use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST};
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};

/// `outrigger demo-app`
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// Service name
    #[arg(long)]
    name: String,
    /// Version, in every answer
    #[arg(long)]
    version: String,
    /// Where it listens
    #[arg(long)]
    listen: SocketAddr,
    /// The service it calls for each request
    #[arg(long, requires = "proxy")]
    calls: Option<String>,
    /// Its sidecar's outbound listener
    #[arg(long)]
    proxy: Option<SocketAddr>,
}

type Calls = Client<HttpConnector, Full<Bytes>>;

/// Serves until it is ended.
///
/// # Errors
/// When the address cannot be listened on.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    tokio::runtime::Runtime::new().context("starting the runtime")?.block_on(serve(args))
}

async fn serve(args: Args) -> anyhow::Result<ExitCode> {
    let listener = tokio::net::TcpListener::bind(args.listen)
        .await
        .with_context(|| format!("{} cannot listen on {}", args.name, args.listen))?;
    let client: Calls = Client::builder(TokioExecutor::new()).build_http();
    loop {
        let (stream, _) = listener.accept().await.context("accept")?;
        let (args, client) = (args.clone(), client.clone());
        tokio::spawn(async move {
            let service = service_fn(|request| answer(&args, &client, request));
            // A client that goes away is no concern of the shop.
            let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

async fn answer(args: &Args, client: &Calls, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let (status, headers, called) = match (&args.calls, args.proxy) {
        (Some(service), Some(proxy)) => match call(client, proxy, service, request.headers()).await {
            Ok(answer) => answer,
            Err(e) => (StatusCode::BAD_GATEWAY, HeaderMap::new(), json!({"error": e.to_string()})),
        },
        _ => (StatusCode::OK, HeaderMap::new(), Value::Null),
    };
    let body = json!({"service": args.name, "version": args.version, "calls": called}).to_string();
    let mut response = Response::new(Full::from(body));
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static("application/json"));
    Ok(response)
}

/// Calls a service by name through the sidecar. What the mesh and its filters said in headers is passed on, and so
/// is the trace context (an application's part in tracing).
async fn call(
    client: &Calls,
    proxy: SocketAddr,
    service: &str,
    from: &HeaderMap,
) -> anyhow::Result<(StatusCode, HeaderMap, Value)> {
    let mut request = Request::get(format!("http://{proxy}/")).header(HOST, service).body(Full::default())?;
    for name in ["traceparent", "tracestate"] {
        if let Some(value) = from.get(name) {
            request.headers_mut().insert(name, value.clone());
        }
    }
    let (head, body) = client.request(request).await?.into_parts();
    let body = body.collect().await?.to_bytes();
    let passed = head
        .headers
        .into_iter()
        .filter_map(|(name, value)| name.map(|name| (name, value)))
        .filter(|(name, _)| name.as_str().starts_with("x-shop-") || name == "x-outrigger-reason")
        .collect();
    let text = || Value::String(String::from_utf8_lossy(&body).into_owned());
    Ok((head.status, passed, serde_json::from_slice(&body).unwrap_or_else(|_| text())))
}
