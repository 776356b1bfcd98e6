//! What is carried: gRPC by grpcio, WebSocket by Python's websockets, opaque TCP, servers that speak first.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener};
use std::process::Command;

use outrigger_e2e::{Backend, HANG, Lan, Mesh, Process, Proxy, python, succeed, until};

fn service(name: &str, port: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: demo}}\n\
         spec: {{selector: {{app: {name}}}, clusterIP: 10.96.0.10, ports: [{{name: {port}, port: 80, targetPort: {port}}}]}}\n"
    )
}

/// A port that is free now, for a server that cannot be given a listener.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// grpcio's server as the application `echo`, and a proxy to call it through.
fn grpc() -> (Mesh, Process, Proxy, Proxy) {
    let mesh = Mesh::start(&service("echo", "grpc"));
    let port = free_port();
    let server = serve("grpc_peer.py", port, &mesh);
    let app = format!("grpc=127.0.0.1:{port}/h2");
    let echo = mesh.proxy("echo-0").labels("app=echo").app(&app).start();
    let web = mesh.proxy("web-0").start();
    until("web reaches echo", || (status(&web)["code"] == "OK").then_some(()));
    (mesh, server, echo, web)
}

fn serve(script: &str, port: u16, mesh: &Mesh) -> Process {
    let mut command = python(script);
    command.args(["serve", &port.to_string()]);
    Process::serve(script, command, &mesh.path(""))
}

/// A case of grpcio's client.
fn call(web: &Proxy, case: &str) -> Command {
    let mut command = python("grpc_peer.py");
    command.args(["call", &web.outbound().to_string(), "echo", case]);
    command
}

/// What a unary call ended with.
fn status(web: &Proxy) -> serde_json::Value {
    serde_json::from_str(&succeed(&mut call(web, "status"))).unwrap()
}

#[test]
fn grpc_unary_with_trailers() {
    let (_mesh, _server, echo, web) = grpc();
    succeed(&mut call(&web, "unary"));
    let peers = echo.metrics().by("outrigger_tls_connections_total", "peer");
    assert!(peers.contains_key("spiffe://cluster.local/ns/demo/sa/web"), "{peers:?}");
}

#[test]
fn grpc_streams_big_messages_and_many_calls() {
    let (_mesh, _server, _echo, web) = grpc();
    for case in ["stream", "bidi", "big", "many"] {
        succeed(&mut call(&web, case));
    }
}

#[test]
fn grpc_deadline() {
    let (_mesh, _server, _echo, web) = grpc();
    succeed(&mut call(&web, "deadline"));
}

#[test]
fn grpc_error_status_with_its_message() {
    let (_mesh, _server, _echo, web) = grpc();
    succeed(&mut call(&web, "error"));
}

#[test]
fn grpc_gets_a_grpc_status_from_the_mesh_itself() {
    let (_mesh, mut server, _echo, web) = grpc();
    server.kill();
    let status = until("the mesh answers itself", || {
        let status = status(&web);
        (status["code"] != "OK").then_some(status)
    });
    assert_eq!(status["code"], "UNAVAILABLE", "{status}");
    assert!(status["reason"].is_string(), "{status}");
}

#[test]
fn websocket() {
    let mesh = Mesh::start(&service("chat", "http"));
    let port = free_port();
    let _server = serve("websocket_peer.py", port, &mesh);
    let app = format!("127.0.0.1:{port}");
    let _chat = mesh.proxy("chat-0").labels("app=chat").app(&app).start();
    let web = mesh.proxy("web-0").start();
    let url = format!("ws://{}/chat?room=1", web.outbound());
    until("the WebSocket client succeeds", || {
        let ran = python("websocket_peer.py").args(["call", &url, "chat"]).output().unwrap();
        ran.status.success().then_some(())
    });
}

/// A TCP service on host 2 behind interception, called from host 1; `greeting` is what the server says first.
fn tcp(protocol: &str, greeting: &'static [u8]) {
    let lan = Lan::new(3);
    let mesh = Mesh::start_on(lan.host(3), &service("database", "tcp"));
    let application = Backend::echo(lan.host(2).listen("[::]:5432".parse().unwrap()), greeting);
    let app = format!("tcp=127.0.0.1:5432{protocol}");
    let database = mesh.proxy("database-0").labels("app=database").app(&app).on(lan.host(2)).start();
    let web = mesh.proxy("web-0").on(lan.host(1)).start();
    database.intercept();
    web.intercept();

    let payload: Vec<u8> = (0..1_000_000_u32).flat_map(u32::to_le_bytes).collect();
    let received = until("the echo comes back", || {
        let mut stream = lan.host(1).connect("10.96.0.10:80".parse().unwrap()).ok()?;
        stream.set_read_timeout(Some(HANG)).unwrap();
        // A server that speaks first is heard before anything is sent.
        let mut first = vec![0; greeting.len()];
        stream.read_exact(&mut first).ok()?;
        assert_eq!(first, greeting);
        let mut writer = stream.try_clone().unwrap();
        let sent = payload.clone();
        let writing = std::thread::spawn(move || {
            // Half closed: the server still answers everything.
            let _ = writer.write_all(&sent).and_then(|()| writer.shutdown(Shutdown::Write));
        });
        let mut received = Vec::new();
        let read = stream.read_to_end(&mut received);
        writing.join().unwrap();
        (read.is_ok() && !received.is_empty()).then_some(received)
    });

    assert!(received == payload, "{} of {} bytes came back as they were", received.len(), payload.len());
    assert!(application.bytes().contains(&payload));
    let peers = database.metrics().by("outrigger_tls_connections_total", "peer");
    assert!(peers.contains_key("spiffe://cluster.local/ns/demo/sa/web"), "{peers:?}");
}

#[test]
fn opaque_tcp_with_half_close() {
    tcp("/tcp", b"");
}

#[test]
fn server_speaks_first_on_a_declared_port() {
    tcp("/tcp", b"220 ready\r\n");
}

#[test]
fn server_speaks_first_on_an_undeclared_port() {
    tcp("", b"220 ready\r\n");
}
