//! What a filter costs: exchanges through the host that serves traffic, one after the other, without sockets.
//!
//! A filter is measured beside an empty one, in turns, so that what else the machine does meets both; each turn is a round of its own, and
//! how far rounds differ says how much a number is worth.

use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use http::{HeaderMap, request, response};
use outrigger_proto::mesh;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::drive::{Input, has_body, inputs, push, request_head, response_head};
use super::model::{Reply, Request};
use crate::filter::{
    Chain, Flow, Frame, Plugin, Plugins, Settings, StaticConnection, Stop, StreamInfo, release_unused, warm,
};

/// Compiled from `empty.wat`.
const EMPTY: &[u8] = include_bytes!("empty.wasm");
/// Exchanges before anything is measured.
const WARM: usize = 200;
/// Exchanges whose allocations are counted.
const COUNTED: usize = 500;
/// Steps of one exchange: one that takes more waits for something that nobody plays.
const STEPS: usize = 10_000;
/// CPU time of a callback: far above what a guest needs on a busy machine.
const CALL_TIME_MS: u64 = 1000;

/// What is measured.
#[derive(Debug)]
pub struct Bench<'a> {
    /// The filter
    pub module: Bytes,
    /// Given to `on_configure`
    pub configuration: Bytes,
    /// Sent in turn
    pub exchanges: &'a [(Request, Reply)],
    /// Exchanges in a round
    pub requests: usize,
    /// Rounds of each filter
    pub rounds: usize,
}

/// What one filter costs. Times are those of the host and the guest for a whole exchange, in nanoseconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Cost {
    /// Median of the rounds' medians
    pub p50_ns: u64,
    /// Least and greatest of the rounds' medians
    pub p50_range: (u64, u64),
    /// Median of the rounds' 99th percentiles
    pub p99_ns: u64,
    /// Least and greatest of the rounds' 99th percentiles
    pub p99_range: (u64, u64),
    /// Allocations of the host for one exchange, on average
    pub allocations: f64,
    /// Linear memory of one instance after all of it, bytes
    pub memory_bytes: u64,
}

/// An empty filter and the one measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Costs {
    /// What the host costs by itself
    pub empty: Cost,
    /// The filter
    pub filter: Cost,
}

/// Measures a filter on the calling thread. `count` runs something and says how many allocations it made.
///
/// # Errors
/// When the filter is refused or fails, or when an exchange does not end; and what the thread needs and does not get.
pub fn bench(bench: &Bench<'_>, settings: Settings, count: &dyn Fn(&mut dyn FnMut()) -> u64) -> Result<Costs, String> {
    let failed = |error: &dyn std::fmt::Display| error.to_string();
    let plugins = Plugins::new(settings).map_err(|error| failed(&error))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .thread_stack_size(crate::worker::STACK)
        .build()
        .map_err(|error| failed(&error))?;
    let tasks = tokio::task::LocalSet::new();
    let all = async {
        let mut empty = Measured::new(&plugins, "empty", Bytes::from_static(EMPTY), Bytes::new()).await?;
        let mut filter = Measured::new(&plugins, "filter", bench.module.clone(), bench.configuration.clone()).await?;
        for measured in [&mut empty, &mut filter] {
            measured.round(bench.exchanges, WARM)?;
            measured.rounds.clear();
        }
        for _ in 0..bench.rounds.max(1) {
            for measured in [&mut empty, &mut filter] {
                measured.round(bench.exchanges, bench.requests)?;
                // What the filter does beside exchanges (ticks) has its turn.
                tokio::task::yield_now().await;
            }
        }
        Ok(Costs {
            empty: empty.cost(&plugins, bench.exchanges, count)?,
            filter: filter.cost(&plugins, bench.exchanges, count)?,
        })
    };
    let costs = tasks.block_on(&runtime, all);
    tasks.block_on(&runtime, async { release_unused() });
    costs
}

struct Measured {
    name: &'static str,
    chain: Vec<Arc<Plugin>>,
    /// Sorted times of each round
    rounds: Vec<Vec<u64>>,
}

impl Measured {
    async fn new(plugins: &Plugins, name: &'static str, module: Bytes, configuration: Bytes) -> Result<Self, String> {
        let source = mesh::Filter {
            namespace: "bench".into(),
            name: name.into(),
            sha256: hex::encode(Sha256::digest(&module)),
            size: module.len() as u64,
            configuration,
            call_time_ms: CALL_TIME_MS,
            ..mesh::Filter::default()
        };
        let plugin = plugins.prepare(&source, Some(module)).await.map_err(|error| error.to_string())?;
        warm(&plugin);
        Ok(Self { name, chain: vec![plugin], rounds: Vec::new() })
    }

    fn round(&mut self, exchanges: &[(Request, Reply)], requests: usize) -> Result<(), String> {
        let mut times = Vec::with_capacity(requests);
        for (request, reply) in exchanges.iter().cycle().take(requests) {
            let exchange = Exchange::new(request, reply);
            let begin = Instant::now();
            exchange.run(&self.chain)?;
            times.push(u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX));
        }
        times.sort_unstable();
        self.rounds.push(times);
        Ok(())
    }

    fn cost(
        &self,
        plugins: &Plugins,
        exchanges: &[(Request, Reply)],
        count: &dyn Fn(&mut dyn FnMut()) -> u64,
    ) -> Result<Cost, String> {
        let mut allocations = 0;
        let mut result = Ok(());
        for (request, reply) in exchanges.iter().cycle().take(COUNTED) {
            let mut exchange = Some(Exchange::new(request, reply));
            allocations += count(&mut || {
                if let Some(exchange) = exchange.take() {
                    result = exchange.run(&self.chain);
                }
            });
            result.clone()?;
        }
        let row = plugins.status().into_iter().find(|row| row.name == self.name);
        let (p50_ns, p50_range) = over(&self.rounds, 50);
        let (p99_ns, p99_range) = over(&self.rounds, 99);
        Ok(Cost {
            p50_ns,
            p50_range,
            p99_ns,
            p99_range,
            allocations: allocations as f64 / COUNTED as f64,
            memory_bytes: row.map_or(0, |row| row.memory_bytes),
        })
    }
}

/// A percentile of each round: their median, and the least and greatest.
fn over(rounds: &[Vec<u64>], percent: usize) -> (u64, (u64, u64)) {
    let at = |times: &Vec<u64>| times.get((times.len() * percent / 100).min(times.len().saturating_sub(1))).copied();
    let mut all: Vec<u64> = rounds.iter().filter_map(at).collect();
    all.sort_unstable();
    let of = |index: usize| all.get(index).copied().unwrap_or_default();
    (of(all.len() / 2), (of(0), of(all.len().saturating_sub(1))))
}

/// One exchange, ready to go in: what it is made of is not measured.
struct Exchange {
    info: StreamInfo,
    request: request::Parts,
    response: response::Parts,
    sent: VecDeque<Input>,
    answered: VecDeque<Input>,
    bodies: (bool, bool),
}

impl Exchange {
    fn new(request: &Request, reply: &Reply) -> Self {
        let connection = StaticConnection {
            source: Some(([127, 0, 0, 1], 51314).into()),
            destination: Some(([127, 0, 0, 1], 15001).into()),
            id: 1,
            workload: "filters".into(),
            namespace: "bench".into(),
            ..StaticConnection::default()
        };
        let mut info = StreamInfo::new(Rc::new(connection), Instant::now());
        info.service = Some("bench/reviews".into());
        let (head, answer) = (request_head(request), response_head(reply));
        let has = |headers: &HeaderMap, body, trailers| has_body(headers, body, trailers);
        let bodiless = request.method == "HEAD" || [204, 304].contains(&reply.status);
        let bodies = (
            has(&head.headers, &request.body, &request.trailers),
            !bodiless && has(&answer.headers, &reply.body, &reply.trailers),
        );
        let of = |some: bool, body, trailers| if some { inputs(body, trailers) } else { VecDeque::new() };
        Self {
            sent: of(bodies.0, &request.body, &request.trailers),
            answered: of(bodies.1, &reply.body, &reply.trailers),
            info,
            request: head,
            response: answer,
            bodies,
        }
    }

    fn run(self, plugins: &[Arc<Plugin>]) -> Result<(), String> {
        let Self { info, request, response, mut sent, mut answered, bodies } = self;
        let chain = Chain::new(plugins, info);
        chain.request_headers(request, !bodies.0);
        let mut response = Some(response);
        let (mut up, mut down) = (Side::default(), Side::default());
        for _ in 0..STEPS {
            let mut moved = push(&chain, Flow::Request, &mut sent);
            moved |= up.take(&chain, Flow::Request);
            if up.ended
                && let Some(head) = response.take()
            {
                chain.response_headers(head, !bodies.1);
                moved = true;
            }
            moved |= down.take(&chain, Flow::Response);
            if down.ended {
                chain.done();
                return Ok(());
            }
            if down.began {
                moved |= push(&chain, Flow::Response, &mut answered);
            }
            match chain.stop() {
                None if moved => {}
                None => {
                    return Err(
                        "an exchange waits for something (a call-out, a timer), which bench does not play".into()
                    );
                }
                Some(Stop::Local) => {
                    sent.clear();
                    answered.clear();
                    response = None;
                }
                Some(Stop::Failed(failed)) => {
                    // SDKs export the callbacks of both kinds, so that nothing tells before.
                    let why =
                        "the filter failed at a request, as one of TCP connections does, which bench does not measure";
                    return Err(format!("{why}: {}", failed.reason));
                }
                Some(Stop::TooLarge(_)) => return Err("a body is longer than what is held for filters".into()),
                Some(Stop::Reset) => return Err("the filter reset the exchange".into()),
            }
        }
        Err("an exchange does not end".into())
    }
}

/// What has come out of one direction.
#[derive(Default)]
struct Side {
    began: bool,
    ended: bool,
}

impl Side {
    fn take(&mut self, chain: &Chain, flow: Flow) -> bool {
        let mut moved = false;
        if !self.began {
            let end = match flow {
                Flow::Request => chain.take_request().map(|(_, end)| end),
                Flow::Response => chain.take_response().map(|(_, end)| end),
            };
            if let Some(end) = end {
                (self.began, self.ended, moved) = (true, end, true);
            }
        }
        while self.began
            && !self.ended
            && let Some(frame) = chain.next(flow)
        {
            moved = true;
            self.ended = matches!(frame, Frame::Trailers(_) | Frame::End);
        }
        moved
    }
}

#[cfg(test)]
mod tests {
    use super::super::model::Chunk;
    use super::*;
    use crate::filter::Compiler;

    fn run(module: &str, exchange: (Request, Reply)) -> Result<Costs, String> {
        let cache = tempfile::tempdir().unwrap();
        let settings = Settings { compiler: Compiler::InProcess, cache: cache.path().join("c") };
        let what = Bench {
            module: wat::parse_str(module).unwrap().into(),
            configuration: Bytes::new(),
            exchanges: &[exchange],
            requests: 20,
            rounds: 3,
        };
        bench(&what, settings, &|work| {
            work();
            7
        })
    }

    #[test]
    fn the_empty_filter_is_what_its_source_says() {
        assert_eq!(EMPTY, wat::parse_str(include_str!("empty.wat")).unwrap());
    }

    #[test]
    fn exchanges_with_bodies_run_to_their_end_and_are_measured() {
        let body = vec![Chunk::Text("some".into()), Chunk::Text("thing".into())];
        let request = Request { method: "POST".into(), body: body.clone(), ..Request::default() };
        let reply = Reply { headers: Vec::new(), body, trailers: vec!["x: 1".into()], ..Reply::default() };
        let costs = run(include_str!("empty.wat"), (request, reply)).unwrap();
        for cost in [&costs.empty, &costs.filter] {
            assert!(cost.p50_ns > 0 && cost.p99_ns >= cost.p50_ns, "{costs:?}");
            assert!(cost.p99_range.0 <= cost.p99_ns && cost.p99_ns <= cost.p99_range.1, "{costs:?}");
            assert_eq!((cost.allocations, cost.memory_bytes), (7.0, 65536), "{costs:?}");
        }
    }

    #[test]
    fn a_filter_that_fails_or_waits_is_an_error() {
        let with = |body: &str| include_str!("empty.wat").replacen("(i32.const 0)", body, 1);
        let plain = || (Request::default(), Reply::default());
        assert!(run(&with("unreachable"), plain()).unwrap_err().contains("failed"));
        assert!(run(&with("(i32.const 1)"), plain()).is_err(), "it pauses, and nothing could resume it");
    }

    #[test]
    fn percentiles_are_those_of_rounds() {
        let rounds = vec![(1..=100).collect(), (101..=200).collect(), (201..=300).collect()];
        assert_eq!(over(&rounds, 50), (151, (51, 251)));
        assert_eq!(over(&rounds, 99), (200, (100, 300)));
    }
}
