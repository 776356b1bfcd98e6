//! The application: HTTP/1.1, h2c by prior knowledge, WebSocket and gRPC on one port.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Frame, Incoming};
use hyper::header::{CONNECTION, CONTENT_TYPE, HeaderMap, HeaderValue, UPGRADE};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::Role;

use crate::{Opts, block_on, num};

type Answer = Response<BoxBody<Bytes, hyper::Error>>;

/// GET -> a fixed body; POST -> echoes the body; gRPC -> echoes message by message; `Upgrade: websocket` -> echoes.
/// For verification: a request with x-ask learns the HTTP version it arrived in and the traceparent and x-filter that came. No other does: what a
/// filter adds to a request must not make the response dearer.
pub fn run(o: &Opts) {
    let body = Bytes::from(vec![b'x'; num(o, "body", 1024usize)]);
    let ip: std::net::IpAddr = num(o, "ip", [127, 0, 0, 1].into());
    let port: u16 = num(o, "port", 0);
    block_on(async move {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind((ip, port).into()).expect("bind");
        let l = socket.listen(8192).expect("listen");
        loop {
            let Ok((s, _)) = l.accept().await else { continue };
            let _ = s.set_nodelay(true);
            let body = body.clone();
            tokio::task::spawn_local(async move {
                let service = service_fn(move |req| answer(req, body.clone()));
                let builder = hyper_util::server::conn::auto::Builder::new(LocalExec);
                let _ = builder.serve_connection_with_upgrades(TokioIo::new(s), service).await;
            });
        }
    });
}

async fn answer(mut req: Request<Incoming>, body: Bytes) -> Result<Answer, hyper::Error> {
    let asked = req.headers().contains_key("x-ask").then(|| (req.version(), req.headers().clone()));
    let mut r = if req.headers().contains_key(UPGRADE) {
        websocket(&mut req)
    } else if req.headers().get(CONTENT_TYPE).is_some_and(|t| t.as_bytes().starts_with(b"application/grpc")) {
        let mut r = Response::new(BodyExt::boxed(GrpcEcho(Some(req.into_body()))));
        r.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        r
    } else {
        let out = if req.method() == Method::POST { req.into_body().collect().await?.to_bytes() } else { body };
        let mut r = Response::new(Full::new(out).map_err(never).boxed());
        r.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        r
    };
    if let Some((version, headers)) = asked {
        r.headers_mut().insert("x-backend-version", format!("{version:?}").parse().unwrap());
        for (name, back) in [("traceparent", "x-backend-traceparent"), ("x-filter", "x-reflect-filter")] {
            if let Some(value) = headers.get(name) {
                r.headers_mut().insert(back, value.clone());
            }
        }
    }
    Ok(r)
}

fn never(e: Infallible) -> hyper::Error {
    match e {}
}

fn websocket(req: &mut Request<Incoming>) -> Answer {
    let mut r = Response::new(Full::new(Bytes::new()).map_err(never).boxed());
    let Some(key) = req.headers().get("sec-websocket-key") else {
        *r.status_mut() = StatusCode::BAD_REQUEST;
        return r;
    };
    let accept = derive_accept_key(key.as_bytes());
    let upgrade = hyper::upgrade::on(req);
    tokio::task::spawn_local(async move {
        let Ok(io) = upgrade.await else { return };
        let mut ws = WebSocketStream::from_raw_socket(TokioIo::new(io), Role::Server, None).await;
        while let Some(Ok(message)) = ws.next().await {
            let data = message.is_text() || message.is_binary();
            if data && ws.send(message).await.is_err() {
                break;
            }
        }
    });
    *r.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let h = r.headers_mut();
    h.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    h.insert(UPGRADE, HeaderValue::from_static("websocket"));
    h.insert("sec-websocket-accept", accept.parse().unwrap());
    r
}

/// The request's messages as they come, then `grpc-status: 0`.
struct GrpcEcho(Option<Incoming>);

impl Body for GrpcEcho {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let Some(body) = &mut self.0 else { return Poll::Ready(None) };
        match ready!(Pin::new(&mut *body).poll_frame(cx)) {
            Some(Ok(frame)) if frame.data_ref().is_some_and(|data| !data.is_empty()) => Poll::Ready(Some(Ok(frame))),
            Some(Err(e)) => Poll::Ready(Some(Err(e))),
            // An empty frame can only be the client's end: sent on without one it would look like a flood.
            _ => {
                self.0 = None;
                let mut trailers = HeaderMap::new();
                trailers.insert("grpc-status", HeaderValue::from_static("0"));
                Poll::Ready(Some(Ok(Frame::trailers(trailers))))
            }
        }
    }
}

#[derive(Clone)]
struct LocalExec;

impl<F> hyper::rt::Executor<F> for LocalExec
where
    F: Future + 'static,
{
    fn execute(&self, f: F) {
        tokio::task::spawn_local(async move {
            f.await;
        });
    }
}
