use super::*;
use crate::link::Budget;

const BUDGET: Budget = Budget { percent: 20, min_per_second: 10 };

fn policy() -> Retries {
    Retries {
        attempts: 2,
        connect_failure: true,
        reset: true,
        statuses: vec![502, 503, 504],
        grpc_statuses: vec![14],
        backoff_base: Duration::from_millis(25),
        backoff_max: Duration::from_millis(250),
    }
}

fn status(status: u16, reason: Option<Reason>) -> Failure {
    Failure::Response { status, grpc: None, reason }
}

/// What the first failure of a request leads to.
fn first(idempotent: bool, replayable: bool, failure: Failure) -> Result<(), Why> {
    let now = Instant::now();
    let budget = RetryBudget::new(&BUDGET, now);
    let mut plan = Plan::new(idempotent, None);
    match plan.next(&policy(), failure, replayable, (&budget, &BUDGET), now, &mut Rng::with_seed(1)) {
        Decision::Retry(wait) => {
            assert!(wait <= Duration::from_millis(25));
            Ok(())
        }
        Decision::GiveUp(why) => Err(why),
    }
}

#[test]
fn what_nobody_processed_is_retried_whatever_the_method() {
    for failure in [
        Failure::Connect,
        Failure::Unprocessed,
        status(503, Some(Reason::ConnectFailure)),
        status(503, Some(Reason::Draining)),
    ] {
        assert_eq!(first(false, true, failure), Ok(()), "{failure:?}");
        assert_eq!(first(false, false, failure), Err(Why::Unsafe), "the body is gone: {failure:?}");
    }
}

#[test]
fn what_may_have_been_processed_is_retried_only_if_idempotent() {
    for failure in [
        Failure::Reset,
        Failure::PerTryTimeout,
        status(502, None),
        status(503, Some(Reason::UpstreamReset)),
        Failure::Response { status: 200, grpc: Some(14), reason: None },
    ] {
        assert_eq!(first(true, true, failure), Ok(()), "{failure:?}");
        assert_eq!(first(false, true, failure), Err(Why::Unsafe), "{failure:?}");
        assert_eq!(first(true, false, failure), Err(Why::Unsafe), "{failure:?}");
    }
}

#[test]
fn overload_and_what_the_policy_does_not_name_are_not_retried() {
    for failure in [
        Failure::Overflow,
        status(503, Some(Reason::OverflowRequests)),
        status(503, Some(Reason::OverflowPending)),
        status(503, Some(Reason::OverflowConnections)),
        status(503, Some(Reason::Overloaded)),
        status(503, Some(Reason::FilterFailed)),
        status(500, None),
        Failure::Response { status: 200, grpc: Some(13), reason: None },
    ] {
        assert_eq!(first(true, true, failure), Err(Why::NotRetriable), "{failure:?}");
    }
}

#[test]
fn idempotence_is_the_methods_or_the_clients_word() {
    let mut headers = HeaderMap::new();
    for method in [Method::GET, Method::HEAD, Method::PUT, Method::DELETE, Method::OPTIONS, Method::TRACE] {
        assert!(idempotent(&method, &headers), "{method}");
    }
    for method in [Method::POST, Method::PATCH, Method::from_bytes(b"MOVE").unwrap()] {
        assert!(!idempotent(&method, &headers), "{method}");
    }
    headers.insert("idempotency-key", HeaderValue::from_static("7"));
    assert!(idempotent(&Method::POST, &headers));
}

#[test]
fn attempts_and_the_deadline_end_it() {
    let now = Instant::now();
    let budget = RetryBudget::new(&BUDGET, now);
    let mut rng = Rng::with_seed(1);
    let mut plan = Plan::new(true, None);
    let mut next = || plan.next(&policy(), Failure::Reset, true, (&budget, &BUDGET), now, &mut rng);
    assert!(matches!(next(), Decision::Retry(_)));
    assert!(matches!(next(), Decision::Retry(_)));
    assert_eq!(next(), Decision::GiveUp(Why::Attempts));
    assert_eq!(plan.retries(), 2);
    let mut late = Plan::new(true, Some(now));
    let decision = late.next(&policy(), Failure::Reset, true, (&budget, &BUDGET), now, &mut rng);
    assert_eq!(decision, Decision::GiveUp(Why::Deadline));
}

#[test]
fn waits_double_with_full_jitter_up_to_the_longest() {
    let mut rng = Rng::with_seed(1);
    for (made, bound) in [(0, 25), (1, 50), (2, 100), (3, 200), (4, 250), (40, 250)] {
        let waits: Vec<_> = (0..1_000).map(|_| backoff(&policy(), made, &mut rng).as_millis()).collect();
        assert!(waits.iter().all(|wait| *wait <= bound), "{made}");
        assert!(
            waits.iter().any(|wait| *wait > bound * 9 / 10) && waits.iter().any(|wait| *wait < bound / 10),
            "{made}"
        );
    }
}

/// Retries that a budget yields at one moment.
fn burst(budget: &RetryBudget, policy: &Budget, now: Instant) -> usize {
    std::iter::repeat_with(|| budget.withdraw(policy, now)).take(10_000).take_while(|given| *given).count()
}

#[test]
fn a_budget_yields_its_minimum_rate_and_its_share() {
    let start = Instant::now();
    let budget = RetryBudget::new(&BUDGET, start);
    assert_eq!(burst(&budget, &BUDGET, start), 100, "ten seconds of the minimum");
    assert_eq!(burst(&budget, &BUDGET, start + Duration::from_secs(1)), 10);
    for _ in 0..100 {
        budget.deposit(&BUDGET);
    }
    assert_eq!(burst(&budget, &BUDGET, start + Duration::from_secs(1)), 20, "20 % of 100 requests");
    assert_eq!(burst(&budget, &BUDGET, start + Duration::from_secs(3600)), 100, "no more than the bucket holds");
    let ticks = (1..=1_000).filter(|ms| budget.withdraw(&BUDGET, start + Duration::from_millis(3_600_000 + ms)));
    assert_eq!(ticks.count(), 10, "looking often earns no more");
    let none = Budget { percent: 0, min_per_second: 0 };
    let budget = RetryBudget::new(&none, start);
    assert_eq!(burst(&budget, &none, start + Duration::from_secs(3600)), 0);
}

#[test]
fn the_budget_bounds_the_plan() {
    let now = Instant::now();
    let none = Budget { percent: 0, min_per_second: 0 };
    let budget = RetryBudget::new(&none, now);
    let mut plan = Plan::new(true, None);
    let decision = plan.next(&policy(), Failure::Connect, true, (&budget, &none), now, &mut Rng::with_seed(1));
    assert_eq!(decision, Decision::GiveUp(Why::Budget));
}

#[test]
fn a_peers_reason_reads_back() {
    for reason in Reason::ALL {
        assert_eq!(peer_reason(&HeaderValue::from_static(reason.code())), Some(*reason));
    }
    assert_eq!(peer_reason(&HeaderValue::from_static("other")), None);
}
