//! Chains of native filters, driven without sockets.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use bytes::Bytes;
use futures_util::FutureExt;
use http::{HeaderMap, HeaderValue, StatusCode};
use proptest::prelude::*;

use super::{
    Action, Chain, Event, Failed, Filter, Filters, Flow, Frame, HeadMut, Interest, LocalResponse, Next, Stop,
    StreamInfo, View, Which,
};

type Script = Rc<RefCell<VecDeque<Box<dyn FnMut(&View) -> Action>>>>;
type Log = Rc<RefCell<Vec<String>>>;

/// Writes down what comes to it; the next action is the script's, and Continue when that has ended.
struct Scripted {
    name: &'static str,
    log: Log,
    script: Script,
    last: Rc<RefCell<Option<View>>>,
    /// It asks for what comes next before it returns
    follows: bool,
}

impl Scripted {
    fn hear(&mut self, flow: Flow, event: Event, view: &View) -> Action {
        let event = match event {
            Event::Headers { end } => format!("headers {}", u8::from(end)),
            Event::Body { size, end } => format!("body {size} {}", u8::from(end)),
            Event::Trailers => "trailers".to_owned(),
            Event::Closed(_) => "closed".to_owned(),
        };
        self.log.borrow_mut().push(format!("{} {flow:?} {event}", self.name));
        *self.last.borrow_mut() = Some(view.clone());
        let next = self.script.borrow_mut().pop_front();
        next.map_or(Action::Continue, |mut next| next(view))
    }
}

impl Filter for Scripted {
    fn on(&mut self, flow: Flow, event: Event, view: &View) -> Action {
        let mut action = self.hear(flow, event, view);
        while self.follows
            && matches!(action, Action::Continue)
            && let Some(next) = view.follow(flow)
        {
            match next {
                Next::Event(event) => action = self.hear(flow, event, view),
                Next::Over => self.log_and_done(view),
            }
        }
        action
    }

    fn log(&mut self, _: &View) {
        self.log.borrow_mut().push(format!("{} log", self.name));
    }

    fn done(&mut self, _: &View) {
        self.log.borrow_mut().push(format!("{} done", self.name));
    }

    fn name(&self) -> &str {
        self.name
    }

    fn interest(&self) -> Interest {
        Interest {
            request_body: true,
            request_trailers: true,
            response_body: true,
            response_trailers: true,
            ..Interest::default()
        }
    }

    fn body_limit(&self) -> usize {
        16
    }
}

struct Bench {
    chain: Chain,
    log: Log,
    scripts: Vec<Script>,
    views: Vec<Rc<RefCell<Option<View>>>>,
}

impl Bench {
    fn new(count: usize) -> Self {
        Self::of(count, false)
    }

    fn of(count: usize, follows: bool) -> Self {
        let (log, mut scripts, mut views) = (Log::default(), Vec::new(), Vec::new());
        let mut filters = Filters::default();
        for name in ["a", "b", "c"].into_iter().take(count) {
            let (script, last) = (Script::default(), Rc::<RefCell<Option<View>>>::default());
            scripts.push(script.clone());
            views.push(last.clone());
            filters.push(Box::new(Scripted { name, log: log.clone(), script, last, follows }));
        }
        Self { chain: Chain::of(filters, StreamInfo::default()), log, scripts, views }
    }

    fn then(&self, filter: usize, action: impl FnMut(&View) -> Action + 'static) -> &Self {
        self.scripts[filter].borrow_mut().push_back(Box::new(action));
        self
    }

    fn request(&self, end: bool) {
        self.chain.request_headers(http::Request::new(()).into_parts().0, end);
    }

    fn response(&self, end: bool) {
        self.chain.response_headers(http::Response::new(()).into_parts().0, end);
    }

    fn data(&self, flow: Flow, text: &'static str, end: bool) {
        self.chain.data(flow, Bytes::from_static(text.as_bytes()), end);
    }

    /// Everything that has come out, `.` for the end.
    fn out(&self, flow: Flow) -> String {
        let mut out = String::new();
        while let Some(frame) = self.chain.next(flow) {
            match frame {
                Frame::Data(bytes) => out.push_str(std::str::from_utf8(&bytes).unwrap()),
                Frame::Trailers(trailers) => {
                    out.push_str(&format!("{trailers:?}."));
                }
                Frame::End => out.push('.'),
            }
        }
        out
    }

    fn seen(&self) -> Vec<String> {
        std::mem::take(&mut self.log.borrow_mut())
    }

    fn view(&self, filter: usize) -> View {
        self.views[filter].borrow().clone().unwrap()
    }
}

fn local(status: u16, body: &'static str) -> LocalResponse {
    LocalResponse {
        status: StatusCode::from_u16(status).unwrap(),
        headers: HeaderMap::new(),
        body: Bytes::from_static(body.as_bytes()),
        grpc_status: None,
    }
}

#[test]
fn c34_c39_a_paused_body_gathers_and_goes_on_as_a_whole() {
    let bench = Bench::new(1);
    bench.then(0, |_| Action::Continue).then(0, |_| Action::Pause).then(0, |_| Action::Pause);
    bench.request(false);
    assert!(bench.chain.take_request().is_some());
    for (text, end) in [("aaaa", false), ("bbbb", false), ("cccc", true)] {
        assert_eq!(bench.out(Flow::Request), "");
        bench.data(Flow::Request, text, end);
    }
    assert_eq!(
        bench.seen(),
        ["a Request headers 0", "a Request body 4 0", "a Request body 8 0", "a Request body 12 1"]
    );
    assert_eq!(bench.out(Flow::Request), "aaaabbbbcccc.");
    assert!(bench.chain.ended(Flow::Request));
}

#[test]
fn c35_chunks_are_rewritten_one_by_one() {
    let bench = Bench::new(2);
    let rewrite = |view: &View| {
        let size = view.body(Flow::Request, <[u8]>::len).unwrap();
        assert!(view.set_body(Flow::Request, 0, size, format!("<{size}>").as_bytes()));
        Action::Continue
    };
    bench.then(0, |_| Action::Continue).then(0, rewrite).then(0, rewrite).then(0, rewrite);
    bench.request(false);
    bench.data(Flow::Request, "aaaa", false);
    bench.data(Flow::Request, "bbbb", false);
    bench.data(Flow::Request, "", true);
    assert_eq!(bench.out(Flow::Request), "<4><4><0>.");
    assert!(bench.seen().contains(&"b Request body 3 1".to_owned()));
}

#[test]
fn c48_paused_headers_hold_everything_and_resume_gives_it_at_once() {
    let bench = Bench::new(2);
    bench.then(0, |_| Action::Pause);
    bench.request(false);
    assert!(bench.chain.take_request().is_none());
    bench.data(Flow::Request, "aaaaaaaaaaaa", false);
    assert!(bench.chain.wants(Flow::Request));
    bench.data(Flow::Request, "bbbb", true);
    assert!(!bench.chain.wants(Flow::Request), "the limit is back-pressure while headers are held");
    assert_eq!(bench.seen(), ["a Request headers 0"]);
    // From a timer, say: nothing runs until the exchange settles.
    let view = bench.view(0);
    assert!(view.write(Flow::Request, Which::Headers, |_| Ok::<_, ()>(())).is_some(), "held headers are writable");
    view.resume(Flow::Request);
    assert!(bench.seen().is_empty());
    bench.chain.settle();
    assert_eq!(
        bench.seen(),
        ["a Request body 16 1", "b Request headers 0", "b Request body 16 1"]
            .map(str::to_owned)
            .into_iter()
            .collect::<Vec<_>>()
    );
    assert!(bench.chain.take_request().is_some());
    assert_eq!(bench.out(Flow::Request), "aaaaaaaaaaaabbbb.");
    assert!(view.write(Flow::Request, Which::Headers, |_| Ok::<_, ()>(())).is_none(), "and no longer");
}

#[test]
fn c43_more_than_the_limit_stops_the_exchange() {
    for flow in [Flow::Request, Flow::Response] {
        let bench = Bench::new(1);
        bench.request(flow == Flow::Response);
        if flow == Flow::Response {
            bench.response(false);
        }
        bench.then(0, |_| Action::Pause);
        bench.data(flow, "aaaaaaaa", false);
        bench.seen();
        bench.data(flow, "bbbbbbbbbbbb", false);
        assert_eq!(bench.chain.stop(), Some(Stop::TooLarge(flow)));
        assert!(bench.seen().is_empty(), "it is not called again");
    }
}

#[test]
fn c40_c41_c42_trailers() {
    let bench = Bench::new(1);
    bench.then(0, |_| Action::Continue).then(0, |_| Action::Pause).then(0, |view| {
        assert!(view.set_body(Flow::Request, usize::MAX, 0, b"!"));
        Action::Continue
    });
    bench.request(false);
    bench.data(Flow::Request, "aaaa", false);
    bench.chain.trailers(Flow::Request, HeaderMap::from_iter([(http::header::ETAG, HeaderValue::from_static("1"))]));
    assert_eq!(bench.seen(), ["a Request headers 0", "a Request body 4 0", "a Request trailers"]);
    assert_eq!(bench.out(Flow::Request), "aaaa!{\"etag\": \"1\"}.");
    // Made by a filter at the end of a message without any: the next filter sees them.
    let bench = Bench::new(2);
    bench.then(0, |_| Action::Continue).then(0, |view| {
        let made = view.write(Flow::Request, Which::Trailers, |head| match head {
            super::HeadMut::Trailers(map, _) => {
                map.insert("x-sum", HeaderValue::from_static("7"));
                Ok(())
            }
            _ => Err(()),
        });
        assert!(matches!(made, Some(Ok(()))));
        Action::Continue
    });
    bench.request(false);
    bench.data(Flow::Request, "aaaa", true);
    assert_eq!(bench.seen().last().map(String::as_str), Some("b Request trailers"));
    assert_eq!(bench.out(Flow::Request), "aaaa{\"x-sum\": \"7\"}.");
}

#[test]
fn c50_c51_resumes_of_the_same_callback_and_of_nothing() {
    let bench = Bench::new(1);
    bench.then(0, |view| {
        view.resume(Flow::Response);
        view.resume(Flow::Request);
        Action::Pause
    });
    bench.request(true);
    assert!(bench.chain.take_request().is_some());
}

#[test]
fn c52_c53_c60_a_local_response_wins_and_goes_outwards() {
    let bench = Bench::new(3);
    bench.then(1, |view| {
        assert!(view.respond(local(403, "no")));
        assert!(view.respond(local(500, "second")));
        Action::Continue
    });
    bench.request(true);
    assert_eq!(bench.chain.stop(), Some(Stop::Local));
    let (head, end) = bench.chain.take_response().unwrap();
    assert_eq!((head.status.as_u16(), end), (403, false));
    assert_eq!(bench.out(Flow::Response), "no.");
    bench.chain.done();
    assert_eq!(
        bench.seen(),
        [
            "a Request headers 1",
            "b Request headers 1",
            "b Response headers 0",
            "b Response body 2 1",
            "a Response headers 0",
            "a Response body 2 1",
            "a log",
            "b log",
            "c log",
            "a done",
            "b done",
            "c done"
        ]
    );
}

#[test]
fn c55_c56_c57_local_responses_by_phase() {
    // In the body of the request.
    let bench = Bench::new(1);
    bench.then(0, |_| Action::Continue).then(0, |_| Action::Respond(Box::new(local(401, ""))));
    bench.request(false);
    bench.data(Flow::Request, "aaaa", false);
    assert_eq!(bench.chain.stop(), Some(Stop::Local));
    assert!(bench.chain.is_cut(Flow::Request));
    assert_eq!(bench.chain.take_response().unwrap().0.status, 401);
    // In the response's headers: its own callbacks do not run again.
    let bench = Bench::new(2);
    bench.request(true);
    bench.then(1, |_| Action::Respond(Box::new(local(418, "x"))));
    bench.response(false);
    assert_eq!(bench.chain.stop(), Some(Stop::Local));
    assert_eq!(bench.chain.take_response().unwrap().0.status, 418);
    assert_eq!(bench.out(Flow::Response), "x.");
    let seen = bench.seen();
    assert_eq!(seen[2..], ["b Response headers 0", "a Response headers 0", "a Response body 1 1"]);
    // After them: reset.
    let bench = Bench::new(1);
    bench.request(true);
    bench.response(false);
    assert!(bench.chain.take_response().is_some());
    bench.then(0, |_| Action::Respond(Box::new(local(418, "x"))));
    bench.data(Flow::Response, "aaaa", false);
    assert_eq!(bench.chain.stop(), Some(Stop::Reset));
    assert!(bench.chain.take_response().is_none() && bench.chain.is_cut(Flow::Response));
}

#[test]
fn an_exchange_that_is_dropped_while_it_waits_ends_its_filters_once() {
    let bench = Bench::new(2);
    bench.then(0, |_| Action::Pause);
    bench.request(false);
    let stream = Rc::downgrade(&bench.view(0).stream);
    let Bench { chain, log, views, .. } = bench;
    drop(chain);
    assert_eq!(log.borrow()[1..], ["a log", "b log", "a done", "b done"]);
    drop(views);
    assert!(stream.upgrade().is_none());
}

#[test]
fn responses_pass_in_reverse() {
    let bench = Bench::new(2);
    bench.request(true);
    bench.response(false);
    bench.data(Flow::Response, "aaaa", true);
    let seen = bench.seen();
    let expected = ["b Response headers 0", "a Response headers 0", "b Response body 4 1", "a Response body 4 1"];
    assert_eq!(seen[2..], expected);
}

/// Counts its wakes.
#[derive(Default)]
struct Waked(std::sync::atomic::AtomicUsize);

impl std::task::Wake for Waked {
    fn wake(self: std::sync::Arc<Self>) {
        self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    }
}

#[test]
fn a_callback_of_one_direction_that_resumes_the_other_wakes_who_waits_there() {
    for (held, other) in [(Flow::Response, Flow::Request), (Flow::Request, Flow::Response)] {
        let bench = Bench::new(1);
        bench.then(0, |_| Action::Continue);
        bench.request(false);
        assert!(bench.chain.take_request().is_some());
        bench.response(false);
        assert!(bench.chain.take_response().is_some());
        bench.then(0, |_| Action::Pause).then(0, move |view| {
            view.resume(held);
            Action::Continue
        });
        bench.data(held, "aaaa", true);
        assert_eq!(bench.out(held), "");
        let waked = std::sync::Arc::<Waked>::default();
        bench.chain.register(held, &waked.clone().into());
        bench.data(other, "bbbb", true);
        assert_eq!(waked.0.load(std::sync::atomic::Ordering::Relaxed), 1, "{held:?}");
        assert_eq!(bench.out(held), "aaaa.");
    }
}

#[test]
fn what_a_filter_asks_for_at_a_close_is_done() {
    let told = |what: fn(&View) -> Action| {
        let bench = Bench::new(0);
        let (script, last) = (Script::default(), Rc::default());
        let mut filters = Filters::default();
        filters.push(Box::new(Scripted {
            name: "a",
            log: Log::default(),
            script: script.clone(),
            last,
            follows: false,
        }));
        let bench = Bench { chain: Chain::tcp(filters, StreamInfo::default()), scripts: vec![script], ..bench };
        bench.then(0, |_| Action::Continue).then(0, |_| Action::Pause).then(0, what);
        bench.chain.connected();
        bench.data(Flow::Request, "held", false);
        let waked = std::sync::Arc::<Waked>::default();
        bench.chain.register(Flow::Request, &waked.clone().into());
        bench.chain.closed(Flow::Response, super::Peer::Unknown);
        assert_eq!(waked.0.load(std::sync::atomic::Ordering::Relaxed), 1);
        (bench.chain.stop(), bench.out(Flow::Request))
    };
    let failed = super::Failed { filter: "a".into(), reason: "trap".into() };
    let trapped = |_: &View| Action::Failed(Box::new(super::Failed { filter: "a".into(), reason: "trap".into() }));
    assert_eq!(told(trapped), (Some(Stop::Failed(Box::new(failed))), String::new()));
    let close = |view: &View| {
        view.close();
        Action::Continue
    };
    assert_eq!(told(close), (Some(Stop::Reset), String::new()));
    let resume = |view: &View| {
        view.resume(Flow::Request);
        Action::Continue
    };
    assert_eq!(told(resume), (None, "held".to_owned()));
}

/// What a scripted filter does in a callback of a response.
fn step(number: u8) -> Box<dyn FnMut(&View) -> Action> {
    let failed = || Failed { filter: "n/f".into(), reason: "it trapped".into() };
    Box::new(move |view| {
        let writes = |f: &dyn Fn(HeadMut<'_>)| {
            view.write(Flow::Response, Which::Headers, |head| {
                f(head);
                Ok::<_, ()>(())
            });
        };
        match number {
            1 => return Action::Pause,
            2 => return Action::Reset,
            3 => return Action::Failed(Box::new(failed())),
            4 => return Action::Respond(Box::new(local(403, "no"))),
            5 => drop(view.respond(local(429, ""))),
            6 => view.close(),
            7 => view.resume(Flow::Request),
            8 => {
                view.resume(Flow::Response);
                return Action::Pause;
            }
            9 => drop(view.set_body(Flow::Response, 0, 3, b"a longer one than may be held")),
            10 => writes(&|head| {
                if let HeadMut::Response(head, _) = head {
                    head.status = StatusCode::NOT_MODIFIED;
                }
            }),
            11 => writes(&|head| {
                if let HeadMut::Response(_, edits) = head {
                    edits.removes(0);
                }
            }),
            _ => {}
        }
        Action::Continue
    })
}

/// A response whose body came with its head, as an exchange gives it to filters; what they heard, and what became of it.
fn whole(scripts: &[Vec<u8>], body: &'static str, follows: bool) -> String {
    let bench = Bench::of(scripts.len(), follows);
    bench.request(true);
    bench.chain.take_request().unwrap();
    for (filter, steps) in scripts.iter().enumerate() {
        for number in steps {
            bench.scripts[filter].borrow_mut().push_back(step(*number));
        }
    }
    let chain = &bench.chain;
    let touch = |head: &mut http::response::Parts, length: usize| drop(head.headers.insert("x-length", length.into()));
    let head = http::Response::new(()).into_parts().0;
    chain.begin_whole(head, Bytes::from_static(body.as_bytes()), touch);
    chain.run(Flow::Response).now_or_never().unwrap();
    let (out, stop) = match chain.end_whole() {
        Some(bytes) => (format!("{}.", std::str::from_utf8(&bytes).unwrap()), None),
        None => {
            let left = if chain.stopped() && !chain.head_sent() { None } else { chain.let_go_response() };
            let pours = if left.is_some() { left != Some(StatusCode::NOT_MODIFIED) } else { !chain.stopped() };
            if pours {
                chain.pour();
            }
            if left.is_some()
                && pours
                && let Some(bytes) = chain.take_whole(Flow::Response)
            {
                chain.finish_response(|head| touch(head, bytes.len()));
                (format!("{}.", std::str::from_utf8(&bytes).unwrap()), chain.stop())
            } else {
                chain.let_go_response();
                (bench.out(Flow::Response) + if chain.is_cut(Flow::Response) { "|" } else { "" }, chain.stop())
            }
        }
    };
    chain.done();
    let head = chain.take_response_head().map(|head| (head.status, head.headers));
    format!("{:?} {head:?} {out:?} {stop:?}", bench.seen())
}

#[test]
fn a_filter_that_is_alone_hears_a_whole_response_at_once() {
    let at_once = |filters, follows| {
        let bench = Bench::of(filters, follows);
        bench.request(true);
        bench.seen();
        let head = http::Response::new(()).into_parts().0;
        bench.chain.begin_whole(head, Bytes::from_static(b"hello"), |_, length| assert_eq!(length, 5));
        bench.chain.run(Flow::Response).now_or_never().unwrap();
        (bench.chain.end_whole(), bench.seen())
    };
    let heard = ["a Response headers 0", "a Response body 5 0", "a Response body 0 1", "a log", "a done"];
    assert_eq!(at_once(1, true), (Some(Bytes::from_static(b"hello")), heard.map(str::to_owned).to_vec()));
    assert_eq!(at_once(1, false), (None, vec![heard[0].to_owned()]));
    // Of several, each hears of the head first.
    let heads = ["b Response headers 0", "a Response headers 0"];
    assert_eq!(at_once(2, true), (None, heads.map(str::to_owned).to_vec()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]
    #[test]
    fn what_is_heard_at_once_is_what_is_heard_one_by_one(
        scripts in proptest::collection::vec(proptest::collection::vec(0..12u8, 0..5), 1..4),
        body in prop::sample::select(vec!["", "hello", "more than may be held"]),
    ) {
        prop_assert_eq!(whole(&scripts, body, true), whole(&scripts, body, false));
    }
}
