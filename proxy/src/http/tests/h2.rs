//! HTTP/2 and gRPC, with hyper as client and as application.

use std::convert::Infallible;
use std::net::SocketAddr;

use ::http::{HeaderMap, HeaderValue, Request, Response};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http2::SendRequest;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use super::retrying::{direct, streams};
use super::*;
use crate::upstream::LocalExecutor;

type Body = Full<Bytes>;

/// A gRPC-like application: echoes the request's body in one message, then a status in trailers.
pub(super) async fn grpc_app(status: &'static str) -> SocketAddr {
    let (listener, address) = listen().await;
    tokio::task::spawn_local(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let service = service_fn(move |request: Request<Incoming>| async move {
                let body = request.into_body().collect().await.unwrap();
                let got = body.trailers().is_some();
                let mut trailers = HeaderMap::new();
                trailers.insert("grpc-status", HeaderValue::from_static(status));
                trailers.insert("x-got-trailers", HeaderValue::from_static(if got { "yes" } else { "no" }));
                let frames = [Ok::<_, Infallible>(Frame::data(body.to_bytes())), Ok(Frame::trailers(trailers))];
                let stream = StreamBody::new(tokio_stream::iter(frames));
                let response = Response::builder().header("content-type", "application/grpc").body(stream);
                Ok::<_, Infallible>(response.unwrap())
            });
            let serving = hyper::server::conn::http2::Builder::new(LocalExecutor);
            tokio::task::spawn_local(serving.serve_connection(TokioIo::new(stream), service));
        }
    });
    address
}

pub(super) async fn connect(to: SocketAddr) -> SendRequest<Body> {
    let stream = TcpStream::connect(to).await.unwrap();
    let builder = hyper::client::conn::http2::Builder::new(LocalExecutor);
    let (sender, connection) = builder.handshake(TokioIo::new(stream)).await.unwrap();
    tokio::task::spawn_local(connection);
    sender
}

pub(super) fn call(host: &str, body: impl Into<Bytes>) -> Request<Body> {
    Request::post(format!("http://{host}/demo.Reviews/Get"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Full::new(body.into()))
        .unwrap()
}

/// What a client says first.
pub(super) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Writes one frame of stream 0.
pub(super) async fn write_frame(stream: &mut TcpStream, kind: u8, flags: u8, payload: &[u8]) {
    let mut frame = vec![0, 0, u8::try_from(payload.len()).unwrap(), kind, flags, 0, 0, 0, 0];
    frame.extend(payload);
    stream.write_all(&frame).await.unwrap();
}

/// Reads one frame: kind, flags, payload. `None` at the end.
pub(super) async fn read_frame(stream: &mut TcpStream) -> Option<(u8, u8, Vec<u8>)> {
    let mut head = [0; 9];
    stream.read_exact(&mut head).await.ok()?;
    let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
    stream.read_exact(&mut payload).await.ok()?;
    Some((head[3], head[4], payload))
}

#[test]
fn a_large_header_list_is_refused_with_a_reason() {
    run(async {
        let client = TestProxy::new("web");
        let outbound = client.serve_outbound(Some(Version::Http2), None).await;
        let mut sender = connect(outbound).await;
        let mut request = call("reviews", "");
        for i in 0..7 {
            let name = ::http::HeaderName::try_from(format!("x-{i}")).unwrap();
            request.headers_mut().insert(name, "a".repeat(10_000).parse().unwrap());
        }
        request.headers_mut().remove("content-type");
        let response = within(sender.send_request(request)).await.unwrap();
        assert_eq!(response.status(), 431);
        assert_eq!(response.headers()["x-outrigger-reason"], "headers-too-large");
    });
}

#[test]
fn grpc_passes_both_sidecars_with_trailers() {
    run(async {
        let pair = pair(grpc_app("0").await, Version::Http2, |_| {}).await;
        let mut sender = connect(pair.outbound).await;
        // More than every window, so that flow control has to work end to end.
        for size in [5, 3_000_000] {
            let response = within(sender.send_request(call("reviews", vec![7; size]))).await.unwrap();
            assert_eq!(response.status(), 200);
            let body = within(response.into_body().collect()).await.unwrap();
            assert_eq!(body.trailers().unwrap()["grpc-status"], "0");
            assert_eq!(body.to_bytes().len(), size);
        }
    });
}

#[test]
fn many_streams_share_few_connections() {
    run(async {
        let pair = pair(grpc_app("0").await, Version::Http2, |_| {}).await;
        let sender = connect(pair.outbound).await;
        let calls = (0..120_u8).map(|i| {
            let mut sender = sender.clone();
            async move {
                let response = sender.send_request(call("reviews", vec![i])).await.unwrap();
                response.into_body().collect().await.unwrap().to_bytes()
            }
        });
        let bodies = within(futures_util::future::join_all(calls)).await;
        assert!(bodies.iter().zip(0..).all(|(body, i)| **body == [i]));
        let cluster = pair.client.worker.proxy.clusters.get("demo/reviews:80");
        assert!(cluster.breaker.count(outrigger_core::breaker::Kind::Connection) <= 3);
    });
}

#[test]
fn the_mesh_answers_grpc_in_grpc() {
    run(async {
        let mut client = TestProxy::new("web");
        client.service(&service("empty", retries()));
        let outbound = client.serve_outbound(Some(Version::Http2), None).await;
        let mut sender = connect(outbound).await;
        let response = within(sender.send_request(call("empty", "x"))).await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["grpc-status"], "14");
        assert_eq!(response.headers()["x-outrigger-reason"], "no-endpoints");
    });
}

#[test]
fn an_http1_application_serves_http2_callers() {
    run(async {
        let app = app(|request| {
            assert!(request.starts_with("POST /demo.Reviews/Get HTTP/1.1\r\n"), "{request}");
            assert!(request.contains("host: reviews\r\n"), "{request}");
            ok("one")
        })
        .await;
        let pair = pair(app, Version::Http2, |port| port.protocol = wire::Protocol::Http1.into()).await;
        let mut sender = connect(pair.outbound).await;
        let response = within(sender.send_request(call("reviews", "x"))).await.unwrap();
        assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "one");
    });
}

#[test]
fn draining_ends_connections_after_what_runs() {
    run(async {
        let pair = pair(grpc_app("0").await, Version::Http2, |_| {}).await;
        let mut sender = connect(pair.outbound).await;
        let response = within(sender.send_request(call("reviews", "a"))).await.unwrap();
        pair.server.worker.proxy.drain.advance(crate::drain::Phase::Closing);
        assert_eq!(within(response.into_body().collect()).await.unwrap().to_bytes(), "a");
        // The connection between the sidecars ends; the next request takes a new one.
        let response = within(sender.send_request(call("reviews", "b"))).await.unwrap();
        assert_eq!(within(response.into_body().collect()).await.unwrap().to_bytes(), "b");
    });
}

#[test]
fn an_upload_ends_when_its_caller_leaves() {
    run(async {
        let (told, mut seen) = tokio::sync::mpsc::unbounded_channel();
        let app = streams(move |_, mut respond| {
            let told = told.clone();
            tokio::task::spawn_local(async move {
                told.send(None).unwrap();
                let reason = std::future::poll_fn(|cx| respond.poll_reset(cx)).await;
                told.send(Some(reason.unwrap())).unwrap();
            });
        })
        .await;
        let (_client, outbound) = direct(app, Version::Http2, wire::RoutePolicy::default()).await;
        let stream = TcpStream::connect(outbound).await.unwrap();
        let (mut sender, connection) = ::h2::client::handshake(stream).await.unwrap();
        tokio::task::spawn_local(connection);
        let request = Request::post("http://reviews/upload").body(()).unwrap();
        let (response, mut body) = sender.send_request(request, false).unwrap();
        body.send_data(Bytes::from_static(b"the first part"), false).unwrap();
        assert_eq!(within(seen.recv()).await, Some(None));
        body.send_reset(::h2::Reason::CANCEL);
        drop(response);
        assert_eq!(within(seen.recv()).await, Some(Some(::h2::Reason::CANCEL)));
    });
}
