//! Filters of opaque connections: driven over pipes with filters written here, and over real sockets with a module.

use std::cell::RefCell;
use std::rc::Rc;

use outrigger_proto::mesh as wire;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::net::TcpStream;

use super::*;
use crate::filter::{Action, Event, Filter, Interest, StaticConnection, StreamInfo, View};
use crate::testing::*;

type Plan = fn(Flow, Event, &View) -> Action;

/// Says what it was told, and does what the plan says.
struct Told {
    name: &'static str,
    events: Rc<RefCell<Vec<String>>>,
    last: Rc<RefCell<Option<View>>>,
    plan: Plan,
}

impl Filter for Told {
    fn on(&mut self, flow: Flow, event: Event, view: &View) -> Action {
        let side = if flow == Flow::Request { "client" } else { "server" };
        let what = match event {
            Event::Headers { .. } => "new".to_owned(),
            Event::Body { size, end } => format!("{side} {size}{}", if end { " end" } else { "" }),
            Event::Trailers => "trailers".to_owned(),
            Event::Closed(who) => format!("{side} closed {who:?}"),
        };
        self.events.borrow_mut().push(format!("{} {what}", self.name));
        *self.last.borrow_mut() = Some(view.clone());
        (self.plan)(flow, event, view)
    }

    fn log(&mut self, _view: &View) {}

    fn done(&mut self, _view: &View) {
        self.events.borrow_mut().push(format!("{} done", self.name));
    }

    fn name(&self) -> &str {
        self.name
    }

    fn interest(&self) -> Interest {
        Interest { request_body: true, response_body: true, ..Interest::default() }
    }

    fn body_limit(&self) -> usize {
        8
    }
}

struct Setup {
    filtered: Filtered,
    events: Rc<RefCell<Vec<String>>>,
    last: Rc<RefCell<Option<View>>>,
}

fn setup(plans: &[(&'static str, Plan)]) -> Setup {
    let (events, last) = (Rc::<RefCell<Vec<String>>>::default(), Rc::<RefCell<Option<View>>>::default());
    let told = |(name, plan): &(&'static str, Plan)| {
        let told = Told { name, events: events.clone(), last: last.clone(), plan: *plan };
        Box::new(told) as Box<dyn Filter>
    };
    let info = StreamInfo::new(Rc::new(StaticConnection::default()), std::time::Instant::now());
    let filtered = Filtered::new(Chain::tcp(plans.iter().map(told).collect(), info));
    Setup { filtered, events, last }
}

const IDLE: Duration = Duration::from_secs(60);

/// Carries in the background: the client's and the server's ends, and how it ended.
async fn carried(
    mut filtered: Filtered,
) -> (DuplexStream, DuplexStream, tokio::task::JoinHandle<(Passed, io::Result<Option<Stop>>)>) {
    let (client, mut near) = duplex(1024);
    let (server, far) = duplex(1024);
    let task = tokio::task::spawn_local(async move {
        if let Err((reason, detail)) = filtered.admit(&mut near, IDLE).await {
            panic!("{reason:?} {detail}");
        }
        let ended = filtered.carry(near, far, IDLE, |_| {}).await;
        (filtered.passed(), ended)
    });
    (client, server, task)
}

async fn read(from: &mut DuplexStream, n: usize) -> String {
    let mut buf = vec![0; n];
    within(from.read_exact(&mut buf)).await.unwrap();
    String::from_utf8(buf).unwrap()
}

/// A client that resets its connection.
struct Gone;

impl AsyncRead for Gone {
    fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()))
    }
}

#[test]
fn a_client_that_goes_before_it_is_let_in_is_not_the_filters_doing() {
    run(async {
        let mut setup = setup(&[("a", |_, _, _| Action::Pause)]);
        let (reason, detail) = within(setup.filtered.admit(&mut Gone, IDLE)).await.unwrap_err();
        assert_eq!(reason, None, "{detail}");
        assert!(detail.starts_with("the client went away"), "{detail}");
        drop(setup.filtered);
        assert_eq!(setup.events.borrow().last().unwrap(), "a done");
    });
}

#[test]
fn both_directions_pass_the_filters_in_order_and_back_with_half_close() {
    run(async {
        let mark: [Plan; 2] = [
            |flow, event, view| {
                if let Event::Body { size: 1.., .. } = event {
                    view.set_body(flow, 0, 0, b"a");
                }
                Action::Continue
            },
            |flow, event, view| {
                if let Event::Body { size: 1.., .. } = event {
                    view.set_body(flow, 0, 0, b"b");
                }
                Action::Continue
            },
        ];
        let Setup { filtered, events, .. } = setup(&[("1", mark[0]), ("2", mark[1])]);
        let (mut client, mut server, task) = carried(filtered).await;
        client.write_all(b"hi").await.unwrap();
        assert_eq!(read(&mut server, 4).await, "bahi");
        client.shutdown().await.unwrap();
        assert_eq!(within(server.read(&mut [0])).await.unwrap(), 0, "the client's end is handed on");
        server.write_all(b"yo").await.unwrap();
        assert_eq!(read(&mut client, 4).await, "abyo", "the client may still be answered");
        server.shutdown().await.unwrap();
        let (passed, ended) = within(task).await.unwrap();
        assert!(ended.unwrap().is_none());
        assert_eq!((passed.sent, passed.received), (2, 2));
        let told = [
            "1 new",
            "2 new",
            "1 client 2",
            "2 client 3",
            "1 client 0 end",
            "2 client 0 end",
            "2 server 2",
            "1 server 3",
            "2 server 0 end",
            "1 server 0 end",
            "1 server closed Unknown",
            "2 server closed Unknown",
            "1 client closed Remote",
            "2 client closed Remote",
            "1 done",
            "2 done",
        ];
        assert_eq!(*events.borrow(), told);
    });
}

/// A side that was reset.
struct Reset;

impl AsyncRead for Reset {
    fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()))
    }
}

impl AsyncWrite for Reset {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(buf.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[test]
fn a_side_that_is_reset_is_told_as_gone() {
    run(async {
        let pass: Plan = |_, _, _| Action::Continue;
        let Setup { mut filtered, events, .. } = setup(&[("1", pass)]);
        let (_server, far) = duplex(64);
        assert!(within(filtered.carry(Reset, far, IDLE, |_| {})).await.is_err());
        drop(filtered);
        assert_eq!(*events.borrow(), ["1 client closed Remote", "1 done"]);

        let Setup { mut filtered, events, .. } = setup(&[("1", pass)]);
        let (_client, near) = duplex(64);
        assert!(within(filtered.carry(near, Reset, IDLE, |_| {})).await.is_err());
        drop(filtered);
        assert_eq!(*events.borrow(), ["1 server closed Unknown", "1 client closed Local", "1 done"]);
    });
}

#[test]
fn a_new_connection_waits_until_it_is_let_in_and_its_bytes_gather_within_the_limit() {
    run(async {
        let hold: Plan =
            |_, event, _| if matches!(event, Event::Headers { .. }) { Action::Pause } else { Action::Continue };
        let Setup { filtered, events, last } = setup(&[("1", hold)]);
        let (mut client, mut server, _task) = carried(filtered).await;
        client.write_all(&[b'x'; 600]).await.unwrap();
        tokio::task::yield_now().await;
        // One read of them is in the filter; with its limit reached, nothing more is read: the pipe fills.
        let more = [b'x'; 2000];
        let mut writing = Box::pin(client.write_all(&more));
        assert!(futures_util::poll!(writing.as_mut()).is_pending(), "back-pressure");
        assert_eq!(*events.borrow(), ["1 new"]);
        last.borrow().as_ref().unwrap().resume(Flow::Request);
        within(async {
            tokio::join!(writing, async { assert_eq!(read(&mut server, 2600).await, "x".repeat(2600)) }).0
        })
        .await
        .unwrap();
        assert_eq!(events.borrow()[1], "1 client 600", "all that gathered, at once: {events:?}");
    });
}

#[test]
fn what_is_held_beyond_the_limit_ends_the_connection() {
    run(async {
        let hold: Plan =
            |_, event, _| if matches!(event, Event::Body { .. }) { Action::Pause } else { Action::Continue };
        let Setup { filtered, .. } = setup(&[("1", hold)]);
        let (mut client, mut server, task) = carried(filtered).await;
        client.write_all(b"123456789").await.unwrap();
        let (_, ended) = within(task).await.unwrap();
        assert_eq!(reason(ended.unwrap().unwrap()).0, Reason::FilterRequestTooLarge);
        assert_eq!(within(server.read(&mut [0])).await.unwrap(), 0, "nothing of it went on");
    });
}

#[test]
fn a_filter_that_closes_takes_nothing_from_the_client_that_was_let_go() {
    run(async {
        let close: Plan = |flow, event, view| {
            if let (Flow::Request, Event::Body { size: 1.., .. }) = (flow, event) {
                view.close();
            }
            Action::Continue
        };
        let Setup { filtered, events, .. } = setup(&[("1", close)]);
        let (mut client, mut server, task) = carried(filtered).await;
        server.write_all(b"greeting").await.unwrap();
        assert_eq!(read(&mut client, 8).await, "greeting");
        client.write_all(b"bad").await.unwrap();
        let (_, ended) = within(task).await.unwrap();
        assert_eq!(ended.unwrap(), Some(Stop::Reset));
        let mut rest = Vec::new();
        within(server.read_to_end(&mut rest)).await.unwrap();
        assert!(rest.is_empty(), "what made it close went nowhere: {rest:?}");
        let events = events.borrow();
        assert!(events.contains(&"1 client closed Local".to_owned()), "{events:?}");
    });
}

/// Marks what passes, pauses until a client sent four bytes, and traps at an `x`.
const GUEST: &str = r#"(module
  (import "env" "proxy_set_buffer_bytes" (func $set (param i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_get_buffer_bytes" (func $get (param i32 i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 2)
  (data (i32.const 8) "><")
  (global $free (mut i32) (i32.const 1024))
  (func (export "proxy_abi_version_0_2_1"))
  (func (export "malloc") (param i32) (result i32)
    (global.get $free) (global.set $free (i32.add (global.get $free) (local.get 0))))
  (func (export "proxy_on_downstream_data") (param i32 i32 i32) (result i32)
    (if (i32.eqz (local.get 1)) (then (return (i32.const 0))))
    (if (i32.lt_u (local.get 1) (i32.const 4)) (then (return (i32.const 1))))
    (drop (call $get (i32.const 2) (i32.const 0) (i32.const 1) (i32.const 16) (i32.const 20)))
    (if (i32.eq (i32.load8_u (i32.load (i32.const 16))) (i32.const 120)) (then unreachable))
    (drop (call $set (i32.const 2) (i32.const 0) (i32.const 0) (i32.const 8) (i32.const 1)))
    (i32.const 0))
  (func (export "proxy_on_upstream_data") (param i32 i32 i32) (result i32)
    (if (i32.eqz (local.get 1)) (then (return (i32.const 0))))
    (drop (call $set (i32.const 3) (i32.const 0) (i32.const 0) (i32.const 9) (i32.const 1)))
    (i32.const 0)))"#;

/// Echoes on each connection.
async fn echo() -> std::net::SocketAddr {
    let (listener, address) = listen().await;
    tokio::task::spawn_local(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::task::spawn_local(async move {
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    address
}

#[test]
fn a_module_stands_in_opaque_connections_of_both_sides() {
    run(async {
        let app = echo().await;
        let mut server = TestProxy::new("db");
        let mut port = self_port(app, wire::MtlsMode::Strict);
        port.stream_filters = vec!["filter/demo/inbound".into()];
        server.filter("inbound", GUEST).await;
        server.inbound(port);
        let inbound = server.serve_inbound(app, true).await;
        let mut client = TestProxy::new("web");
        client.filter("outbound", GUEST).await;
        let mut db = service("db", retries());
        db.ports[0].stream_filters = vec!["filter/demo/outbound".into()];
        client.service(&db);
        client.endpoints("demo/db:80", vec![endpoint("db-0", inbound, Some("db"))]);
        let outbound = client.serve_outbound(None, Some("10.96.0.1:80".parse().unwrap())).await;

        let mut stream = TcpStream::connect(outbound).await.unwrap();
        stream.write_all(b"abcd").await.unwrap();
        let mut got = [0; 8];
        within(stream.read_exact(&mut got)).await.unwrap();
        assert_eq!(&got, b"<<>>abcd", "each side marked it both ways");

        let mut stream = TcpStream::connect(outbound).await.unwrap();
        stream.write_all(b"xxxx").await.unwrap();
        let mut rest = Vec::new();
        let _ = within(stream.read_to_end(&mut rest)).await;
        assert!(rest.is_empty());
        // The one before, which is still open in the same instance, goes by the same policy.
        until("the failures are counted", || client.metrics().contains("reason=\"filter-failed\"} 2\n")).await;
        let mut stream = TcpStream::connect(outbound).await.unwrap();
        stream.write_all(b"abcd").await.unwrap();
        within(stream.read_exact(&mut got)).await.unwrap();
        assert_eq!(&got, b"<<>>abcd", "the next connection has a fresh instance");
    });
}
