//! HTTP/1 to endpoints that behave in every way an endpoint can.

use super::retrying::direct;
use super::*;
use crate::metrics::Metric;

const GET: &str = "GET / HTTP/1.1\r\nhost: reviews\r\n\r\n";
const POST: &str = "POST / HTTP/1.1\r\nhost: reviews\r\ncontent-length: 2\r\n\r\nhi";

/// A server that answers the n-th connection's (from 0) every request with these bytes, and then closes it if asked to.
async fn server(answer: impl Fn(usize) -> (String, bool) + 'static) -> std::net::SocketAddr {
    let (listener, address) = listen().await;
    tokio::task::spawn_local(async move {
        let mut n = 0;
        while let Ok((mut stream, _)) = listener.accept().await {
            let (bytes, closes) = answer(n);
            n += 1;
            tokio::task::spawn_local(async move {
                while read_message(&mut stream).await.is_some() {
                    stream.write_all(bytes.as_bytes()).await.unwrap();
                    if closes {
                        return;
                    }
                }
            });
        }
    });
    address
}

fn connects(client: &TestProxy) -> i64 {
    client.total(Metric::UpstreamConnects, &["demo/reviews", "success"])
}

#[test]
fn a_connection_that_the_endpoint_closed_is_not_used_for_any_method() {
    run(async {
        let app = server(|_| (ok("here"), true)).await;
        let (client, outbound) = direct(app, Version::Http1, wire::RoutePolicy::default()).await;
        for n in 1..=5 {
            let response = exchange(outbound, POST).await;
            assert!(response.ends_with("here"), "{response}");
            assert_eq!(connects(&client), n);
        }
    });
}

#[test]
fn bytes_that_nobody_asked_for_end_a_connection() {
    run(async {
        let app = server(|_| (ok("one") + &ok("two"), false)).await;
        let (client, outbound) = direct(app, Version::Http1, wire::RoutePolicy::default()).await;
        for n in 1..=3 {
            assert!(exchange(outbound, GET).await.ends_with("one"), "a response of nobody was taken for another");
            assert_eq!(connects(&client), n);
        }
    });
}

#[test]
fn what_is_no_response_is_told() {
    run(async {
        for (bytes, reason) in [
            ("HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab".into(), "upstream-protocol"),
            ("HTTP/1.1 200 OK\r\nx: a\r\n folded\r\ncontent-length: 0\r\n\r\n".into(), "upstream-protocol"),
            ("SSH-2.0-OpenSSH_9.6\r\n\r\n".into(), "upstream-protocol"),
            (format!("HTTP/1.1 200 OK\r\nx: {}\r\n\r\n", "a".repeat(70_000)), "upstream-protocol"),
            ("HTTP/1.1 200 OK\r\ncontent-len".into(), "upstream-reset"),
        ] {
            let app = server(move |_| (bytes.clone(), true)).await;
            let (_client, outbound) = direct(app, Version::Http1, wire::RoutePolicy::default()).await;
            let response = exchange(outbound, POST).await;
            assert!(response.contains(&format!("x-outrigger-reason: {reason}\r\n")), "{reason}: {response}");
        }
    });
}

#[test]
fn a_body_that_breaks_off_is_not_passed_off_as_whole() {
    run(async {
        for response in [
            "HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n-1\r\n",
        ] {
            let app = server(|_| (response.into(), true)).await;
            let (client, outbound) = direct(app, Version::Http1, retries()).await;
            let mut stream = TcpStream::connect(outbound).await.unwrap();
            stream.write_all(GET.as_bytes()).await.unwrap();
            let mut got = Vec::new();
            let _ = within(stream.read_to_end(&mut got)).await;
            let got = String::from_utf8_lossy(&got);
            // hyper may have flushed what it had, or not.
            assert!(!got.ends_with("0\r\n\r\n") && got.matches("half").count() <= 1, "{got}");
            assert_eq!(client.logged("outbound")["reason"], "upstream-reset");
        }
    });
}

#[test]
fn a_body_without_a_length_ends_with_its_connection() {
    run(async {
        let app = server(|_| ("HTTP/1.1 200 OK\r\n\r\nto the end".into(), true)).await;
        let (_client, outbound) = direct(app, Version::Http1, wire::RoutePolicy::default()).await;
        let response = exchange(outbound, GET).await;
        assert!(response.contains("to the end\r\n0\r\n\r\n"), "{response}");
    });
}

/// The response is larger than everything that buffers between, and so is the request, and each side sends before it reads.
#[test]
fn a_response_and_a_request_may_pass_each_other() {
    run(async {
        let (listener, app) = listen().await;
        let size = 24_000_000;
        let server = tokio::task::spawn_local(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut byte = [0; 1];
            stream.read_exact(&mut byte).await.unwrap();
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {size}\r\n\r\n");
            let (mut reads, mut writes) = stream.split();
            let respond = async {
                writes.write_all(head.as_bytes()).await.unwrap();
                writes.write_all(&vec![b'd'; size]).await.unwrap();
            };
            let mut got = vec![0; size + 1];
            let ((), read) = tokio::join!(respond, async {
                let mut total = 0;
                while total < size {
                    total += reads.read(&mut got).await.unwrap();
                }
                total
            });
            read
        });
        let (_client, outbound) = direct(app, Version::Http1, wire::RoutePolicy::default()).await;
        let mut stream = TcpStream::connect(outbound).await.unwrap();
        let head = format!("POST / HTTP/1.1\r\nhost: reviews\r\ncontent-length: {size}\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        // The whole body before a byte of the response is read.
        within(stream.write_all(&vec![b'u'; size])).await.unwrap();
        let response = within(read_head_and(&mut stream, size)).await;
        assert!(response.iter().all(|byte| *byte == b'd'));
        assert!(within(server).await.unwrap() >= size);
    });
}

/// The body of a response that has this length.
async fn read_head_and(stream: &mut TcpStream, size: usize) -> Vec<u8> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    let mut body = vec![0; size];
    stream.read_exact(&mut body).await.unwrap();
    body
}

#[test]
fn an_answer_before_the_requests_end_is_passed_on() {
    run(async {
        let (listener, app) = listen().await;
        tokio::task::spawn_local(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = [0; 20];
            stream.read_exact(&mut head).await.unwrap();
            let refusal = "HTTP/1.1 413 Too Large\r\nconnection: close\r\ncontent-length: 3\r\n\r\nbig";
            stream.write_all(refusal.as_bytes()).await.unwrap();
            stream.shutdown().await.unwrap();
            let _ = stream.read_to_end(&mut Vec::new()).await;
        });
        let (_client, outbound) = direct(app, Version::Http1, wire::RoutePolicy::default()).await;
        let mut stream = TcpStream::connect(outbound).await.unwrap();
        stream.write_all(b"POST / HTTP/1.1\r\nhost: reviews\r\ncontent-length: 1000000\r\n\r\nsome").await.unwrap();
        let response = within(read_message(&mut stream)).await.unwrap();
        assert!(response.starts_with("HTTP/1.1 413 ") && response.ends_with("big"), "{response}");
    });
}

#[test]
fn bytes_right_behind_a_101_are_the_upgrades() {
    run(async {
        let switch = "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\nfirst";
        let app = server(move |_| (switch.into(), true)).await;
        let (_client, outbound) = direct(app, Version::Http1, wire::RoutePolicy::default()).await;
        let mut stream = TcpStream::connect(outbound).await.unwrap();
        let head = "GET / HTTP/1.1\r\nhost: reviews\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n";
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut got = Vec::new();
        within(stream.read_to_end(&mut got)).await.unwrap();
        let got = String::from_utf8_lossy(&got);
        assert!(got.starts_with("HTTP/1.1 101 ") && got.ends_with("\r\n\r\nfirst"), "{got}");
    });
}

#[test]
fn a_client_that_leaves_takes_its_connection_to_the_endpoint_along() {
    run(async {
        let (listener, app) = listen().await;
        let (_client, outbound) = direct(app, Version::Http1, wire::RoutePolicy::default()).await;
        for answered in [false, true] {
            let mut stream = TcpStream::connect(outbound).await.unwrap();
            stream.write_all(GET.as_bytes()).await.unwrap();
            let (mut server, _) = within(listener.accept()).await.unwrap();
            read_message(&mut server).await.unwrap();
            if answered {
                server.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf").await.unwrap();
                within(stream.read_u8()).await.unwrap();
            }
            drop(stream);
            let mut rest = Vec::new();
            let _ = within(server.read_to_end(&mut rest)).await;
            assert_eq!(rest, b"", "nothing of another request came");
        }
    });
}

#[test]
fn a_small_body_leaves_with_its_head() {
    run(async {
        let (listener, app) = listen().await;
        let (_client, outbound) = direct(app, Version::Http1, wire::RoutePolicy::default()).await;
        let mut stream = TcpStream::connect(outbound).await.unwrap();
        stream.write_all(POST.as_bytes()).await.unwrap();
        let (mut server, _) = within(listener.accept()).await.unwrap();
        let mut bytes = [0; 4096];
        let n = within(server.read(&mut bytes)).await.unwrap();
        let request = String::from_utf8_lossy(&bytes[..n]);
        assert!(
            request.starts_with("POST / HTTP/1.1\r\nhost: reviews\r\n") && request.ends_with("\r\n\r\nhi"),
            "{request}"
        );
    });
}

#[test]
fn an_applications_bare_error_is_its_own() {
    run(async {
        for bare in ["400 Bad Request", "414 URI Too Long", "431 Request Header Fields Too Large"] {
            let answer = format!("HTTP/1.1 {bare}\r\ncontent-length: 0\r\n\r\n");
            let app = app(move |_| answer.clone()).await;
            let (_client, outbound) = direct(app, Version::Http1, retries()).await;
            let mut stream = TcpStream::connect(outbound).await.unwrap();
            for _ in 0..2 {
                stream.write_all(b"GET / HTTP/1.1\r\nhost: reviews\r\n\r\n").await.unwrap();
                let response = within(read_message(&mut stream)).await.unwrap();
                assert!(response.starts_with(&format!("HTTP/1.1 {bare}\r\n")), "{response}");
                assert!(!response.contains("x-outrigger-reason"), "{response}");
            }
        }
    });
}
