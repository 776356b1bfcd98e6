use std::time::Duration;

use fastrand::Rng;
use proptest::{prop_assert, prop_assert_eq, proptest};

use super::*;
use crate::link::{Algorithm, OutlierPolicy};
use crate::outlier::{Outcome, Outlier};

const ALL: [Algorithm; 4] = [Algorithm::PeakEwma, Algorithm::LeastRequest, Algorithm::RoundRobin, Algorithm::Random];
const POLICY: OutlierPolicy = OutlierPolicy {
    consecutive_failures: 5,
    base_ejection: Duration::from_secs(30),
    max_ejection: Duration::from_secs(300),
    max_ejected_percent: 50,
};

fn info(id: usize, weight: u32) -> EndpointInfo {
    let port = 10_000 + u16::try_from(id).unwrap();
    EndpointInfo {
        id: format!("demo/reviews-{id}").into(),
        address: SocketAddr::from(([127, 0, 0, 1], port)),
        app_port: 80,
        identity: None,
        version: "".into(),
        weight,
        region: "".into(),
        zone: "".into(),
    }
}

fn set(weights: &[u32], now: Instant) -> EndpointSet {
    EndpointSet::default().update(weights.iter().enumerate().map(|(id, weight)| info(id, *weight)), now)
}

fn place(set: &EndpointSet, guard: &Guard) -> usize {
    set.endpoints().iter().position(|one| one.is_same(guard.endpoint())).unwrap()
}

/// A guard of this very endpoint.
fn guard_of(set: &EndpointSet, place: usize, now: Instant) -> Guard {
    Guard::new(&set.endpoints()[place], false, now)
}

fn fail(set: &EndpointSet, outlier: &Outlier, place: usize, times: u32, now: Instant) -> Option<Duration> {
    let record = || outlier.record(&POLICY, set, &guard_of(set, place, now), Outcome::Failure, now);
    (0..times).fold(None, |_, _| record())
}

/// How often each is picked in 10,000 requests, one at a time.
fn picked(set: &EndpointSet, algorithm: Algorithm, now: Instant) -> Vec<u32> {
    let mut rng = Rng::with_seed(5);
    let mut counts = vec![0; set.endpoints().len()];
    for _ in 0..10_000 {
        let guard = pick(set, algorithm, &[], now, &mut rng).unwrap();
        counts[place(set, &guard)] += 1;
    }
    counts
}

#[test]
fn of_nothing_nothing_is_picked() {
    for algorithm in ALL {
        assert!(pick(&EndpointSet::default(), algorithm, &[], Instant::now(), &mut Rng::with_seed(1)).is_none());
    }
}

#[test]
fn shares_follow_weights() {
    let now = Instant::now();
    for algorithm in ALL {
        let counts = picked(&set(&[1, 3, 0], now), algorithm, now);
        assert_eq!(counts[2], 0, "{algorithm:?}: weight 0 gets nothing");
        assert!((2_000..3_000).contains(&counts[0]), "{algorithm:?}: {counts:?}");
    }
    assert_eq!(picked(&set(&[1, 3], now), Algorithm::RoundRobin, now), [2_500, 7_500]);
    assert_eq!(picked(&set(&[7, 7, 7, 7], now), Algorithm::RoundRobin, now), [2_500; 4]);
}

#[test]
fn a_slow_endpoint_gets_little_and_recovers_with_time() {
    let start = Instant::now();
    let set = set(&[1; 4], start);
    for (place, millis) in [(0, 500), (1, 5), (2, 5), (3, 5)] {
        guard_of(&set, place, start).answered(start + Duration::from_millis(millis));
    }
    let counts = picked(&set, Algorithm::PeakEwma, start);
    assert_eq!(counts[0], 0, "two samples of which one is always faster: {counts:?}");
    let later = start + Duration::from_secs(60);
    guard_of(&set, 0, later).answered(later + Duration::from_millis(5));
    assert!(set.endpoints()[0].latency(later) < 10_000.0, "the peak is forgotten");
}

#[test]
fn a_hung_endpoint_never_looks_good() {
    let start = Instant::now();
    let set = set(&[1, 1], start);
    guard_of(&set, 0, start).answered(start + Duration::from_millis(5));
    guard_of(&set, 1, start).abandoned(start + Duration::from_secs(15));
    let now = start + Duration::from_secs(15);
    assert!(set.endpoints()[1].latency(now) > 14_000_000.0);
    let mut quick = guard_of(&set, 1, now);
    quick.abandoned(now + Duration::from_millis(1));
    assert!(set.endpoints()[1].latency(now) > 14_000_000.0, "max(ewma, elapsed)");
    drop(guard_of(&set, 0, now));
    assert!(set.endpoints()[0].latency(now) < 5_000.0, "a cancellation by the client changes nothing");
}

#[test]
fn while_the_only_endpoint_is_probed_others_ask_it_too() {
    let (now, outlier) = (Instant::now(), Outlier::default());
    let set = set(&[1, 1], now);
    fail(&set, &outlier, 0, 5, now);
    let set = set.update(std::iter::once(info(0, 1)), now);
    let later = now + Duration::from_secs(31);
    let mut rng = Rng::with_seed(1);
    for algorithm in ALL {
        let probe = pick(&set, algorithm, &[], later, &mut rng).unwrap();
        assert!(probe.is_probe());
        let other = pick(&set, algorithm, &[], later, &mut rng).expect("the set is not empty");
        assert!(!other.is_probe());
    }
}

#[test]
fn fewer_requests_in_flight_is_better() {
    let now = Instant::now();
    let set = set(&[1, 1], now);
    let _busy: Vec<_> = (0..3).map(|_| guard_of(&set, 0, now)).collect();
    for algorithm in [Algorithm::LeastRequest, Algorithm::PeakEwma] {
        let counts = picked(&set, algorithm, now);
        assert_eq!(counts, [0, 10_000], "{algorithm:?}");
    }
}

#[test]
fn another_attempt_goes_elsewhere_while_there_is_an_elsewhere() {
    let now = Instant::now();
    let set = set(&[1, 1, 1], now);
    let mut rng = Rng::with_seed(3);
    for algorithm in ALL {
        for _ in 0..100 {
            let tried = &set.endpoints()[..2];
            assert_eq!(place(&set, &pick(&set, algorithm, tried, now, &mut rng).unwrap()), 2);
            assert!(pick(&set, algorithm, set.endpoints(), now, &mut rng).is_some(), "all were tried");
        }
    }
}

#[test]
fn what_is_measured_outlives_an_update_but_not_an_address() {
    let now = Instant::now();
    let first = set(&[1, 1, 1], now);
    let held: Vec<_> = (0..3).map(|i| guard_of(&first, i, now)).collect();
    let moved = EndpointInfo { address: SocketAddr::from(([127, 0, 0, 2], 1)), ..info(1, 1) };
    let second = first.update([info(0, 9), moved, info(2, 1), info(3, 1)], now);
    let in_flight: Vec<_> = second.endpoints().iter().map(|one| one.in_flight()).collect();
    assert_eq!(in_flight, [1, 0, 1, 0]);
    assert_eq!(second.endpoints()[0].info.weight, 9);
    assert!(Arc::ptr_eq(&first.endpoints()[2], &second.endpoints()[2]), "unchanged");
    drop(held);
    assert_eq!(second.endpoints()[0].in_flight(), 0);
}

#[test]
fn failures_in_a_row_eject_and_a_single_probe_brings_back() {
    let start = Instant::now();
    let (set, outlier, mut rng) = (set(&[1, 1], start), Outlier::default(), Rng::with_seed(9));
    assert_eq!(fail(&set, &outlier, 0, 4, start), None);
    outlier.record(&POLICY, &set, &guard_of(&set, 0, start), Outcome::Neutral, start);
    outlier.record(&POLICY, &set, &guard_of(&set, 0, start), Outcome::Success, start);
    assert_eq!(fail(&set, &outlier, 0, 4, start), None, "a success in between");
    assert_eq!(fail(&set, &outlier, 0, 1, start), Some(POLICY.base_ejection));
    assert_eq!(picked(&set, Algorithm::Random, start), [0, 10_000]);

    let later = start + POLICY.base_ejection;
    assert_eq!(set.endpoints()[0].state(later), State::HalfOpen);
    let probe = std::iter::repeat_with(|| pick(&set, Algorithm::PeakEwma, &[], later, &mut rng).unwrap())
        .find(Guard::is_probe)
        .unwrap();
    assert_eq!(picked(&set, Algorithm::Random, later), [0, 10_000], "one probe at a time");
    drop(probe);
    let probe = std::iter::repeat_with(|| pick(&set, Algorithm::Random, &[], later, &mut rng).unwrap())
        .find(Guard::is_probe)
        .unwrap();
    let late = guard_of(&set, 0, later);
    outlier.record(&POLICY, &set, &late, Outcome::Success, later);
    assert_eq!(set.endpoints()[0].state(later), State::HalfOpen, "only the probe decides");
    assert_eq!(outlier.record(&POLICY, &set, &probe, Outcome::Success, later), None);
    assert_eq!(set.endpoints()[0].state(later), State::Healthy);
}

#[test]
fn ejections_double_up_to_the_longest_and_start_again_after_a_healthy_time() {
    let (mut now, outlier) = (Instant::now(), Outlier::default());
    let set = set(&[1, 1], now);
    let mut times = vec![fail(&set, &outlier, 0, 5, now).unwrap().as_secs()];
    for _ in 0..5 {
        now += Duration::from_secs(*times.last().unwrap());
        let probe = Guard::new(&set.endpoints()[0], set.endpoints()[0].health().try_probe(), now);
        times.push(outlier.record(&POLICY, &set, &probe, Outcome::Failure, now).unwrap().as_secs());
    }
    assert_eq!(times, [30, 60, 120, 240, 300, 300]);
    now += Duration::from_secs(300);
    let probe = Guard::new(&set.endpoints()[0], set.endpoints()[0].health().try_probe(), now);
    outlier.record(&POLICY, &set, &probe, Outcome::Success, now);
    drop(probe);
    now += Duration::from_secs(1);
    assert_eq!(fail(&set, &outlier, 0, 5, now), Some(Duration::from_secs(300)), "it failed again at once");
    now += Duration::from_secs(300);
    let probe = Guard::new(&set.endpoints()[0], set.endpoints()[0].health().try_probe(), now);
    outlier.record(&POLICY, &set, &probe, Outcome::Success, now);
    now += Duration::from_secs(301);
    assert_eq!(fail(&set, &outlier, 0, 5, now), Some(Duration::from_secs(30)));
}

#[test]
fn where_all_are_ejected_all_are_used() {
    let now = Instant::now();
    let (set, outlier) = (set(&[1, 1], now), Outlier::default());
    let policy = OutlierPolicy { max_ejected_percent: 100, consecutive_failures: 1, ..POLICY };
    for place in 0..2 {
        assert!(outlier.record(&policy, &set, &guard_of(&set, place, now), Outcome::Failure, now).is_some());
    }
    for algorithm in ALL {
        let counts = picked(&set, algorithm, now);
        assert!(counts.iter().all(|count| *count > 4_000), "{counts:?}");
    }
}

#[test]
fn off_means_off() {
    let now = Instant::now();
    let (set, outlier) = (set(&[1, 1], now), Outlier::default());
    let policy = OutlierPolicy { consecutive_failures: 0, ..POLICY };
    for _ in 0..100 {
        assert_eq!(outlier.record(&policy, &set, &guard_of(&set, 0, now), Outcome::Failure, now), None);
    }
}

proptest! {
    #[test]
    fn the_ejected_share_stays_below_its_maximum(
        count in 1usize..20,
        percent in 0u32..=100,
        steps in proptest::collection::vec((0usize..20, 0u8..3, 0u64..40), 0..300),
    ) {
        let mut now = Instant::now();
        let (set, outlier, mut rng) = (set(&vec![1; count], now), Outlier::default(), Rng::with_seed(1));
        let policy = OutlierPolicy { consecutive_failures: 2, max_ejected_percent: percent, ..POLICY };
        for (place, outcome, seconds) in steps {
            now += Duration::from_secs(seconds);
            let outcome = [Outcome::Success, Outcome::Failure, Outcome::Failure][usize::from(outcome)];
            let guard = if place < count { guard_of(&set, place, now) } else {
                pick(&set, Algorithm::PeakEwma, &[], now, &mut rng).unwrap()
            };
            outlier.record(&policy, &set, &guard, outcome, now);
            let out = set.endpoints().iter().filter(|one| one.state(now) != State::Healthy).count();
            prop_assert!(out as u64 * 100 <= count as u64 * u64::from(percent));
        }
    }

    #[test]
    fn in_flight_returns_to_zero(
        steps in proptest::collection::vec((0usize..4, 0usize..8, 0u64..50), 0..200),
        count in 1usize..6,
    ) {
        let mut now = Instant::now();
        let (mut set, mut rng) = (set(&vec![1; count], now), Rng::with_seed(1));
        let mut held: Vec<Guard> = Vec::new();
        for (what, place, millis) in steps {
            now += Duration::from_millis(millis);
            match what {
                0 | 1 => held.extend(pick(&set, ALL[place % 4], &[], now, &mut rng)),
                2 if !held.is_empty() => {
                    let mut guard = held.swap_remove(place % held.len());
                    if millis % 2 == 0 { guard.answered(now) } else { guard.abandoned(now) }
                }
                _ => set = set.update((0..count).map(|id| info(id, u32::try_from(millis).unwrap())), now),
            }
            let total: u32 = set.endpoints().iter().map(|one| one.in_flight()).sum();
            prop_assert_eq!(total as usize, held.len());
        }
        held.clear();
        prop_assert!(set.endpoints().iter().all(|one| one.in_flight() == 0));
    }
}

#[test]
fn workers_share_what_they_measure() {
    let now = Instant::now();
    let set = set(&[1; 8], now);
    std::thread::scope(|scope| {
        for seed in 0..4 {
            let set = &set;
            scope.spawn(move || {
                let mut rng = Rng::with_seed(seed);
                for _ in 0..2_000 {
                    let mut guard = pick(set, Algorithm::PeakEwma, &[], now, &mut rng).unwrap();
                    guard.answered(now + Duration::from_millis(3));
                }
            });
        }
    });
    assert!(set.endpoints().iter().all(|one| one.in_flight() == 0));
    assert!(set.endpoints().iter().any(|one| one.latency(now) > 2_900.0));
}
