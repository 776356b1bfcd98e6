//! What the decisions on a request cost: `cargo bench -p outrigger-core`.

#![allow(missing_docs, clippy::unwrap_used)]

use std::hint::black_box;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use fastrand::Rng;
use http::{HeaderMap, Method, Request};
use outrigger_core::balance::{EndpointInfo, EndpointSet, pick};
use outrigger_core::link::{self, Algorithm, Port};
use outrigger_core::normalize::{self, Direction, Rules};
use outrigger_core::route::{Head, select, split};
use outrigger_proto::mesh as wire;

/// A port with so many prefix routes, and a catch-all after them.
fn port(routes: u32) -> Port {
    let backend = "demo/reviews:80";
    let matching = |rule| {
        let prefix = if rule == routes { String::new() } else { format!("/service-{rule}/v1") };
        wire::HttpMatch { rule, path: Some(wire::http_match::Path::Prefix(prefix)), ..Default::default() }
    };
    let share = |weight| wire::WeightedBackend { backend: backend.into(), weight, ..Default::default() };
    let rule =
        |i| wire::HttpRule { name: format!("demo/r/{i}"), backends: vec![share(90), share(10)], ..Default::default() };
    let routes =
        wire::HttpRoutes { matches: (0..=routes).map(matching).collect(), rules: (0..=routes).map(rule).collect() };
    let port = wire::ServicePort { port: 80, backend: backend.into(), routes: Some(routes), ..Default::default() };
    let backend = wire::Backend { key: backend.into(), port: 80, ..Default::default() };
    let wire = wire::Service { ports: vec![port], backends: vec![backend], ..Default::default() };
    link::service(&wire).unwrap().ports.remove(0)
}

fn routing(c: &mut Criterion) {
    let mut group = c.benchmark_group("route");
    let headers = HeaderMap::new();
    let head = Head { method: &Method::GET, path: "/elsewhere/a/b", query: None, headers: &headers };
    for routes in [1, 100, 1000] {
        let port = port(routes);
        group.bench_function(BenchmarkId::new("select, last match", routes), |b| {
            b.iter(|| select(black_box(&port), black_box(&head)).unwrap().prefix);
        });
    }
    let port = port(1);
    let rule = select(&port, &head).unwrap().rule;
    let mut rng = Rng::with_seed(1);
    group.bench_function("split of two", |b| b.iter(|| black_box(split(black_box(rule), &mut rng, |_| true))));
    group.finish();
}

fn balancing(c: &mut Criterion) {
    let mut group = c.benchmark_group("balance");
    let now = Instant::now();
    for count in [5, 1000_u16] {
        let info = |id: u16| EndpointInfo {
            id: format!("demo/reviews-{id}").into(),
            address: SocketAddr::from(([127, 0, 0, 1], 1 + id)),
            app_port: 80,
            identity: None,
            version: "v1".into(),
            weight: 100,
            region: "".into(),
            zone: "".into(),
        };
        let set = EndpointSet::default().update((0..count).map(info), now);
        for algorithm in [Algorithm::PeakEwma, Algorithm::LeastRequest, Algorithm::RoundRobin, Algorithm::Random] {
            let mut rng = Rng::with_seed(1);
            group.bench_function(BenchmarkId::new(format!("{algorithm:?}"), count), |b| {
                b.iter(|| {
                    let mut guard = pick(black_box(&set), algorithm, &[], now, &mut rng).unwrap();
                    guard.answered(now + Duration::from_millis(1));
                });
            });
        }
    }
    group.finish();
}

fn normalising(c: &mut Criterion) {
    let rules = Rules { direction: Direction::Inbound, path_rules: false, peer: None, xfcc: None, forwarders: &[] };
    let request =
        Request::get("/reviews/1?a=b").header("host", "reviews").header("user-agent", "x").header("accept", "*/*");
    let (mut head, ()) = request.body(()).unwrap().into_parts();
    c.bench_function("normalize/clean request", |b| b.iter(|| normalize::request(black_box(&mut head), &rules)));
}

criterion_group!(benches, routing, balancing, normalising);
criterion_main!(benches);
