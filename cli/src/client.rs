//! A small client for the control plane's HTTP API (and, in the demo, for proxies' admin and metrics).

use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{Method, Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// The API answers from memory: longer means that it hangs.
const PATIENCE: Duration = Duration::from_secs(10);

/// The control plane's HTTP API.
#[derive(Debug, Clone)]
pub(crate) struct Control {
    authority: String,
}

/// An answer of an HTTP server.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) body: Bytes,
}

impl Control {
    /// `url` is `http://HOST:PORT`.
    pub(crate) fn new(url: &str) -> anyhow::Result<Self> {
        let uri: Uri = url.parse().with_context(|| format!("--control {url}: not a URL"))?;
        if uri.scheme_str() != Some("http") {
            bail!("--control {url}: give http://HOST:PORT (the API is plain HTTP, on loopback by default)");
        }
        let authority = uri.authority().ok_or_else(|| anyhow!("--control {url}: the host is missing"))?;
        if !matches!(uri.path(), "" | "/") {
            bail!("--control {url}: leave out the path {}", uri.path());
        }
        let authority = if authority.port().is_some() { authority.to_string() } else { format!("{authority}:15014") };
        Ok(Self { authority })
    }

    /// `GET path`, as JSON.
    pub(crate) fn get(&self, path: &str) -> anyhow::Result<serde_json::Value> {
        self.json(Method::GET, path, None, &[])
    }

    /// `POST path` with the administrator's token.
    pub(crate) fn post(&self, path: &str, token: &str, body: &serde_json::Value) -> anyhow::Result<serde_json::Value> {
        self.json(Method::POST, path, Some(body), &[("authorization", &format!("Bearer {token}"))])
    }

    /// `PUT path` with the administrator's token.
    pub(crate) fn put(&self, path: &str, token: &str, body: &serde_json::Value) -> anyhow::Result<serde_json::Value> {
        self.json(Method::PUT, path, Some(body), &[("authorization", &format!("Bearer {token}"))])
    }

    /// `PUT path` of bytes, with the administrator's token.
    pub(crate) fn upload(&self, path: &str, token: &str, body: Bytes) -> anyhow::Result<serde_json::Value> {
        let kind = ("content-type", "application/wasm");
        self.call(Method::PUT, path, body, &[kind, ("authorization", &format!("Bearer {token}"))])
    }

    /// `DELETE path` with the administrator's token.
    pub(crate) fn delete(&self, path: &str, token: &str) -> anyhow::Result<serde_json::Value> {
        self.json(Method::DELETE, path, None, &[("authorization", &format!("Bearer {token}"))])
    }

    fn json(
        &self,
        method: Method,
        path: &str,
        body: Option<&serde_json::Value>,
        headers: &[(&str, &str)],
    ) -> anyhow::Result<serde_json::Value> {
        let body = body.map(serde_json::to_vec).transpose()?.unwrap_or_default();
        let mut headers = headers.to_vec();
        if !body.is_empty() {
            headers.push(("content-type", "application/json"));
        }
        self.call(method, path, body.into(), &headers)
    }

    fn call(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        headers: &[(&str, &str)],
    ) -> anyhow::Result<serde_json::Value> {
        let url = format!("http://{}{path}", self.authority);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let answer = runtime.block_on(request(&self.authority, method, path, headers, body)).with_context(|| {
            format!("{url}: is the control plane running there? Set --control or OUTRIGGER_CONTROL")
        })?;
        if !answer.status.is_success() {
            bail!("{url}: {}: {}", answer.status, reason(&answer.body));
        }
        serde_json::from_slice(&answer.body)
            .with_context(|| format!("{url}: the answer is no JSON: is this the control plane's HTTP port?"))
    }
}

/// What an error answer says: `{"error": …}`, or its text.
fn reason(body: &[u8]) -> String {
    let value: Option<serde_json::Value> = serde_json::from_slice(body).ok();
    match value.as_ref().and_then(|value| value["error"].as_str()) {
        Some(error) => error.to_owned(),
        None => String::from_utf8_lossy(body).trim().to_owned(),
    }
}

/// One request on a connection of its own, answer read whole.
///
/// # Errors
/// No connection, no HTTP, or no answer within ten seconds.
pub(crate) async fn request(
    authority: &str,
    method: Method,
    path: &str,
    headers: &[(&str, &str)],
    body: Bytes,
) -> anyhow::Result<Answer> {
    let exchange = async {
        let stream = TcpStream::connect(authority).await.context("cannot connect")?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let mut request = Request::builder().method(method).uri(path).header("host", authority);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(body))?;
        let read = async {
            let (head, body) = sender.send_request(request).await?.into_parts();
            let body = body.collect().await?.to_bytes();
            anyhow::Ok(Answer { status: head.status, body })
        };
        // The connection is driven here, beside the reading, and needs no task of its own.
        tokio::pin!(connection);
        tokio::pin!(read);
        tokio::select! {
            answer = &mut read => answer,
            closed = &mut connection => {
                closed?;
                read.await
            }
        }
    };
    tokio::time::timeout(PATIENCE, exchange).await.context("no answer within 10 s")?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_checked() {
        assert_eq!(Control::new("http://127.0.0.1:15014").unwrap().authority, "127.0.0.1:15014");
        assert_eq!(Control::new("http://[::1]").unwrap().authority, "[::1]:15014");
        for bad in ["https://127.0.0.1:15014", "127.0.0.1:15014", "http://a:1/api", "http://"] {
            assert!(Control::new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn error_answers_are_unwrapped() {
        assert_eq!(reason(br#"{"error":"no such token"}"#), "no such token");
        assert_eq!(reason(b"plain\n"), "plain");
    }
}
