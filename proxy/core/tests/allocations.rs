//! The decisions on a common request allocate nothing. A count, unlike a time, means the same on every machine.

#![allow(missing_docs, clippy::unwrap_used)]

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use fastrand::Rng;
use http::Request;
use outrigger_core::authz;
use outrigger_core::balance::{EndpointInfo, EndpointSet, pick};
use outrigger_core::detect::detect;
use outrigger_core::link::{self, Algorithm};
use outrigger_core::normalize::{self, Direction, Rules, trace};
use outrigger_core::route::{Head, Split, select, split};
use outrigger_core::spiffe::SpiffeId;
use outrigger_proto::mesh as wire;

/// Counts the allocations of each thread.
#[allow(unsafe_code)]
mod unsafe_counting {
    use std::alloc::{GlobalAlloc, Layout, System};
    use std::cell::Cell;

    thread_local! {
        static COUNT: Cell<usize> = const { Cell::new(0) };
    }

    struct Counting;

    #[global_allocator]
    static ALLOCATOR: Counting = Counting;

    // SAFETY: every call goes on to the system's allocator, unchanged.
    unsafe impl GlobalAlloc for Counting {
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            let _ = COUNT.try_with(|count| count.set(count.get() + 1));
            // SAFETY: the caller's promises are the system allocator's conditions.
            unsafe { System.alloc(layout) }
        }

        unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
            // SAFETY: as above; `pointer` came from `alloc`.
            unsafe { System.dealloc(pointer, layout) }
        }
    }

    pub(crate) fn during<T>(work: impl FnOnce() -> T) -> (usize, T) {
        let before = COUNT.get();
        let result = work();
        (COUNT.get() - before, result)
    }
}

use unsafe_counting::during;

fn service() -> link::Service {
    let key = "demo/reviews:80";
    let share = |weight| wire::WeightedBackend { backend: key.into(), weight, ..Default::default() };
    let rule = wire::HttpRule { backends: vec![share(90), share(10)], ..Default::default() };
    let on = |path| wire::HttpMatch { path: Some(path), ..Default::default() };
    let header = wire::ValueMatch { name: "x-side".into(), value: Some(wire::value_match::Value::Regex("c.*".into())) };
    let matches = vec![
        on(wire::http_match::Path::Exact("/other".into())),
        wire::HttpMatch { headers: vec![header], ..Default::default() },
        on(wire::http_match::Path::Prefix("/reviews".into())),
    ];
    let routes = wire::HttpRoutes { matches, rules: vec![rule] };
    let port = wire::ServicePort { port: 80, backend: key.into(), routes: Some(routes), ..Default::default() };
    let backend = wire::Backend { key: key.into(), port: 80, ..Default::default() };
    link::service(&wire::Service { ports: vec![port], backends: vec![backend], ..Default::default() }).unwrap()
}

fn endpoints(now: Instant) -> EndpointSet {
    let info = |id: u16| EndpointInfo {
        id: id.to_string().into(),
        address: SocketAddr::from(([127, 0, 0, 1], 1 + id)),
        app_port: 80,
        identity: None,
        version: "".into(),
        weight: 1,
        region: "".into(),
        zone: "".into(),
    };
    EndpointSet::default().update((0..5).map(info), now)
}

fn authorization() -> authz::Authorization {
    let source = wire::Source { principals: vec!["spiffe://*/sa/web".into()], ..Default::default() };
    let operation = wire::Operation { paths: vec!["/reviews*".into()], ..Default::default() };
    let rule = wire::AuthorizationRule { from: vec![source], to: vec![operation], ..Default::default() };
    let wire = wire::Authorization { default_deny: true, allow: vec![rule], ..Default::default() };
    authz::Authorization::link(&wire).unwrap()
}

#[test]
fn a_clean_request_is_normalised_judged_and_routed_without_allocation() {
    let (service, authorization, now) = (service(), authorization(), Instant::now());
    let (set, mut rng) = (endpoints(now), Rng::with_seed(1));
    let peer: SpiffeId = "spiffe://cluster.local/ns/demo/sa/web".parse().unwrap();
    let xfcc = normalize::xfcc(&peer, &peer);
    let rules = Rules {
        direction: Direction::Inbound,
        path_rules: true,
        peer: Some(&peer),
        xfcc: Some(&xfcc),
        forwarders: &[],
    };
    let request = Request::get("/reviews/1?a=b").header("host", "reviews").header("accept", "*/*");
    // As it comes from a parser: with room.
    let (mut head, ()) =
        request.header("connection", "keep-alive").header("x-side", "stable").body(()).unwrap().into_parts();
    head.headers.reserve(16);

    let (count, canonical) = during(|| normalize::request(&mut head, &rules));
    let canonical = canonical.unwrap();
    assert_eq!(count, 0, "normalize");

    let path = canonical.path(&head.uri);
    let (method, headers, ip) = (&head.method, &head.headers, [127, 0, 0, 1].into());
    let asked = authz::Request { peer: Some(&peer), ip, port: 80, method, path, headers };
    let (count, allowed) = during(|| authorization.decide(&asked).outcome.is_ok());
    assert_eq!((count, allowed), (0, true), "authz");

    let head = Head { method, path, query: head.uri.query(), headers };
    let routed = || {
        let selected = select(&service.ports[0], &head)?;
        matches!(split(selected.rule, &mut rng, |_| true), Split::Backend(..)).then_some(())
    };
    // The first use of an expression makes its cache.
    assert_eq!(select(&service.ports[0], &head).unwrap().prefix, Some("/reviews"));
    assert_eq!(during(routed), (0, Some(())), "route");

    for algorithm in [Algorithm::PeakEwma, Algorithm::LeastRequest, Algorithm::RoundRobin, Algorithm::Random] {
        let attempt =
            || pick(&set, algorithm, &[], now, &mut rng).map(|mut one| one.answered(now + Duration::from_millis(1)));
        assert_eq!(during(attempt), (0, Some(())), "{algorithm:?}");
    }
}

#[test]
fn detection_and_a_traces_continuation_are_cheap() {
    assert_eq!(during(|| detect(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")).0, 0);
    assert_eq!(during(|| detect(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")).0, 0);
    let mut headers = http::HeaderMap::new();
    headers.insert("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".parse().unwrap());
    let (count, _) = during(|| trace::propagate(&mut headers, &mut Rng::with_seed(1), 0));
    assert!(count <= 2, "the new value, and no more: {count}");
}
