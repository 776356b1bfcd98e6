//! What waits for whom: tasks of one thread, in order, without sockets or time.

use std::cell::RefCell;
use std::io::Write;
use std::rc::Rc;

use futures_util::FutureExt;
use tokio::runtime::{Builder, LocalOptions};
use tokio::task::{JoinHandle, spawn_local};

use super::*;
use crate::filter::{Action, Event, Filter, Filters, Interest, RequestHead, StreamInfo, View};

type Log = Rc<RefCell<Vec<String>>>;

/// Writes down what it hears.
struct Scribe {
    number: u32,
    log: Log,
    /// A fault of the proxy's
    panics: bool,
    /// It ends its instance, in which another exchange is as well
    ends: Option<Rc<Stream>>,
}

impl Filter for Scribe {
    fn on(&mut self, flow: Flow, _: Event, _: &View) -> Action {
        self.log.borrow_mut().push(format!("{flow:?} {}", self.number));
        assert!(!self.panics, "as it was told to");
        if let Some(other) = &self.ends {
            other.notify();
        }
        Action::Continue
    }

    fn lost(&mut self, _: &View) -> Option<Action> {
        self.log.borrow_mut().push(format!("lost {}", self.number));
        Some(Action::Continue)
    }

    fn log(&mut self, _: &View) {}

    fn done(&mut self, _: &View) {
        self.log.borrow_mut().push(format!("done {}", self.number));
    }

    fn name(&self) -> &str {
        "scribe"
    }

    fn interest(&self) -> Interest {
        Interest::default()
    }
}

fn chain(log: &Log, number: u32, panics: bool) -> Chain {
    let filter: Box<dyn Filter> = Box::new(Scribe { number, log: log.clone(), panics, ends: None });
    Chain::of(Filters::from_iter([filter]), StreamInfo::default())
}

fn head() -> RequestHead {
    http::Request::new(()).into_parts().0.into()
}

/// An exchange in a task of its own: it comes, its filter hears of the request, it goes.
fn exchange(log: &Log, number: u32, panics: bool) -> JoinHandle<bool> {
    let log = log.clone();
    spawn_local(async move {
        log.borrow_mut().push(format!("comes {number}"));
        let chain = chain(&log, number, panics);
        let passed = chain.pass_request(&mut head(), true).await;
        log.borrow_mut().push(format!("goes {number}"));
        passed
    })
}

/// On a thread whose last turn found so many messages.
fn after(messages: u32, f: impl AsyncFnOnce(&Log)) -> Vec<String> {
    let runtime = Builder::new_current_thread().build_local(LocalOptions::default()).unwrap();
    let log = Log::default();
    COHORT.with(|cohort| cohort.now.set(messages));
    next_turn();
    runtime.block_on(f(&log));
    COHORT.with(|cohort| (cohort.now.take(), cohort.before.take()));
    log.take()
}

async fn both(log: &Log) {
    let exchanges = [exchange(log, 1, false), exchange(log, 2, false)];
    for exchange in exchanges {
        assert!(exchange.await.unwrap());
    }
}

#[test]
fn filters_of_many_run_one_after_the_other() {
    let told = ["comes 1", "comes 2", "Request 1", "Request 2", "goes 1", "done 1", "goes 2", "done 2"];
    assert_eq!(after(FEW, both), told);
}

#[test]
fn where_there_are_few_none_waits() {
    let told = ["comes 1", "Request 1", "goes 1", "done 1", "comes 2", "Request 2", "goes 2", "done 2"];
    assert_eq!(after(FEW - 1, both), told);
}

#[test]
fn what_a_turn_found_is_forgotten_with_the_next_one() {
    let told = after(FEW, async |log: &Log| {
        next_turn();
        both(log).await;
    });
    assert_eq!(told[..3], ["comes 1", "Request 1", "goes 1"]);
    let told = after(0, async |log: &Log| {
        for number in 0..FEW {
            exchange(log, number, false).await.unwrap();
        }
        log.borrow_mut().clear();
        next_turn();
        both(log).await;
    });
    assert_eq!(told[..3], ["comes 1", "comes 2", "Request 1"]);
}

#[test]
fn one_that_is_given_up_while_it_waits_holds_up_nobody() {
    let told = after(FEW, async |log: &Log| {
        let gone = chain(log, 1, false);
        assert_eq!(gone.pass_request(&mut head(), true).now_or_never(), None);
        drop(gone);
        assert!(exchange(log, 2, false).await.unwrap());
    });
    assert_eq!(told, ["done 1", "comes 2", "Request 2", "goes 2", "done 2"]);
}

#[test]
fn one_whose_instance_ends_in_another_is_told_before_its_turn() {
    let told = after(FEW, async |log: &Log| {
        let other = chain(log, 2, false);
        let filter: Box<dyn Filter> =
            Box::new(Scribe { number: 1, log: log.clone(), panics: false, ends: Some(other.0.clone()) });
        let ending = Chain::of(Filters::from_iter([filter]), StreamInfo::default());
        let (mut first, mut second) = (head(), head());
        let both = (ending.pass_request(&mut first, true), other.pass_request(&mut second, true));
        let wait = async { log.borrow_mut().push("both wait".into()) };
        assert_eq!(futures_util::future::join3(both.0, both.1, wait).await, (true, true, ()));
    });
    assert_eq!(told[..3], ["both wait", "Request 1", "lost 2"], "{told:?}");
}

#[test]
fn a_panic_is_its_own_exchanges() {
    let told = after(FEW, async |log: &Log| {
        let (first, second) = (exchange(log, 1, true), exchange(log, 2, false));
        let panicked = first.await.unwrap_err().try_into_panic().unwrap();
        assert_eq!(panicked.downcast_ref::<&str>(), Some(&"as it was told to"));
        assert!(second.await.unwrap());
    });
    assert_eq!(told[..3], ["comes 1", "comes 2", "Request 1"], "both wait");
    assert!(!told.contains(&"goes 1".to_owned()), "{told:?}");
}

#[test]
fn of_a_great_many_some_run_before_the_rest() {
    let many = u32::try_from(MOST).unwrap() + 1;
    let told = after(FEW, async |log: &Log| {
        let exchanges: Vec<_> = (0..many).map(|number| exchange(log, number, false)).collect();
        for exchange in exchanges {
            assert!(exchange.await.unwrap());
        }
    });
    let place = |what: String| told.iter().position(|one| *one == what).unwrap();
    let last = many - 2;
    assert!(place(format!("Request {last}")) < place("goes 0".into()), "{told:?}");
    assert!(place(format!("goes {last}")) < place(format!("Request {}", many - 1)), "{told:?}");
}

#[test]
fn a_workers_turn_ends_where_it_waits() {
    let runtime = crate::worker::runtime().unwrap();
    COHORT.with(|cohort| cohort.now.set(FEW));
    runtime.block_on(async {
        // What is there already is found by waiting for IO, once.
        let (near, mut far) = std::os::unix::net::UnixStream::pair().unwrap();
        far.write_all(b"x").unwrap();
        near.set_nonblocking(true).unwrap();
        tokio::net::UnixStream::from_std(near).unwrap().readable().await.unwrap();
    });
    assert_eq!(COHORT.with(|cohort| (cohort.before.take(), cohort.now.take())), (FEW, 0));
}
