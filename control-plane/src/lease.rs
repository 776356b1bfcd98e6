//! Registered workloads and their leases. No clock: `now` is an argument.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use outrigger_core::resource::Registration;

/// More than this share of all workloads late at once is a fault of ours or of the network, not of theirs.
const HOLD_PERCENT: usize = 30;
/// Fewer than this never are.
const HOLD_AT_LEAST: usize = 3;

/// Namespace and workload.
pub type Name = (String, String);

/// Every registered workload.
#[derive(Debug)]
pub struct Leases {
    lease: Duration,
    entries: BTreeMap<Name, Entry>,
    /// When leases ended lately
    ended: VecDeque<Instant>,
    held: usize,
    /// Registered, changed or ended since this was last taken
    changed: BTreeSet<Name>,
}

#[derive(Debug)]
struct Entry {
    registration: Arc<Registration>,
    renewed: Instant,
}

impl Leases {
    /// Begins with what an earlier run persisted, each with a full lease.
    pub fn new(lease: Duration, persisted: Vec<Registration>, now: Instant) -> Self {
        let entry = |registration: Registration| {
            let name = (registration.namespace.clone(), registration.name.clone());
            (name, Entry { registration: Arc::new(registration), renewed: now })
        };
        Self {
            lease,
            entries: persisted.into_iter().map(entry).collect(),
            ended: VecDeque::new(),
            held: 0,
            changed: BTreeSet::new(),
        }
    }

    /// How long a registration lasts without a renewal.
    pub fn lease(&self) -> Duration {
        self.lease
    }

    /// Registers or renews. Returns whether anything but the lease changed.
    pub fn register(&mut self, registration: Registration, now: Instant) -> bool {
        let name = (registration.namespace.clone(), registration.name.clone());
        if let Some(entry) = self.entries.get_mut(&name).filter(|entry| *entry.registration == registration) {
            entry.renewed = now;
            return false;
        }
        self.changed.insert(name.clone());
        self.entries.insert(name, Entry { registration: Arc::new(registration), renewed: now });
        true
    }

    /// Ends a registration. Returns whether there was one.
    pub fn withdraw(&mut self, name: &Name) -> bool {
        let known = self.entries.remove(name).is_some();
        if known {
            self.changed.insert(name.clone());
        }
        known
    }

    /// What changed since the last time, as it is now.
    pub fn take_changed(&mut self) -> Vec<(Name, Option<Arc<Registration>>)> {
        let changed = std::mem::take(&mut self.changed);
        changed.into_iter().map(|name| (name.clone(), self.get(&name).cloned())).collect()
    }

    /// The registration of a workload.
    pub fn get(&self, name: &Name) -> Option<&Arc<Registration>> {
        self.entries.get(name).map(|entry| &entry.registration)
    }

    /// Withdraws what was not renewed in time, and names it; or nothing, when that would be too many at once.
    ///
    /// Leases that ended within the last lease count, and so do those that are late and about to end: what stops at one
    /// moment does not end at one moment.
    pub fn sweep(&mut self, now: Instant) -> Vec<Name> {
        let age = |entry: &Entry| now.saturating_duration_since(entry.renewed);
        while self.ended.front().is_some_and(|at| now.saturating_duration_since(*at) >= self.lease) {
            self.ended.pop_front();
        }
        let due: Vec<Name> =
            self.entries.iter().filter(|(_, entry)| age(entry) >= self.lease).map(|(name, _)| name.clone()).collect();
        // Renewals come every third of a lease.
        let late = self.entries.values().filter(|entry| age(entry) >= self.lease * 2 / 3).count();
        let gone = late + self.ended.len();
        let all = self.entries.len() + self.ended.len();
        let hold = gone >= HOLD_AT_LEAST && gone * 100 > all * HOLD_PERCENT;
        self.held = if hold { due.len() } else { 0 };
        if hold {
            return Vec::new();
        }
        for name in &due {
            self.entries.remove(name);
            self.changed.insert(name.clone());
            self.ended.push_back(now);
        }
        due
    }

    /// Workloads whose lease ended and that are kept all the same.
    pub fn held(&self) -> usize {
        self.held
    }

    /// All of them, by name.
    pub fn registrations(&self) -> Vec<Arc<Registration>> {
        self.entries.values().map(|entry| entry.registration.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use outrigger_core::resource::{AppPort, Dial, PortProtocol};

    use super::*;

    const LEASE: Duration = Duration::from_secs(15);

    fn workload(n: usize) -> Registration {
        Registration {
            namespace: "demo".into(),
            name: format!("w{n}"),
            service_account: "w".into(),
            labels: BTreeMap::new(),
            ports: vec![AppPort { name: "http".into(), port: 80, protocol: PortProtocol::Http1 }],
            dial: Dial::Application([10, 0, 0, 1].into()),
            region: String::new(),
            zone: String::new(),
        }
    }

    fn leases(count: usize, now: Instant) -> Leases {
        Leases::new(LEASE, (0..count).map(workload).collect(), now)
    }

    fn renew(leases: &mut Leases, which: std::ops::Range<usize>, now: Instant) {
        for n in which {
            assert!(!leases.register(workload(n), now));
        }
    }

    #[test]
    fn what_is_not_renewed_ends_and_not_before() {
        let start = Instant::now();
        let mut leases = leases(10, start);
        for second in [5, 10, 14] {
            renew(&mut leases, 1..10, start + Duration::from_secs(second));
            assert!(leases.sweep(start + Duration::from_secs(second)).is_empty());
        }
        assert_eq!(leases.sweep(start + LEASE), [("demo".to_owned(), "w0".to_owned())]);
        assert_eq!(leases.registrations().len(), 9);
    }

    #[test]
    fn a_restart_gives_every_lease_a_full_grace() {
        let start = Instant::now();
        let mut leases = leases(1, start);
        assert!(leases.sweep(start + LEASE - Duration::from_millis(1)).is_empty());
        assert_eq!(leases.sweep(start + LEASE).len(), 1);
    }

    #[test]
    fn too_many_at_once_are_kept_and_reported() {
        let start = Instant::now();
        let mut leases = leases(10, start);
        renew(&mut leases, 4..10, start + Duration::from_secs(14));
        assert!(leases.sweep(start + LEASE).is_empty());
        assert_eq!((leases.held(), leases.registrations().len()), (4, 10));
        // One comes back: three of ten are no more than 30 %.
        renew(&mut leases, 3..4, start + LEASE);
        assert_eq!(leases.sweep(start + LEASE).len(), 3);
        assert_eq!(leases.held(), 0);
    }

    #[test]
    fn a_partition_counts_as_one_though_leases_end_one_by_one() {
        let start = Instant::now();
        let mut leases = leases(10, start);
        // Six stop; their last renewals were spread over a third of a lease.
        for n in 0..6 {
            renew(&mut leases, n..n + 1, start + Duration::from_millis(800 * n as u64));
        }
        for second in 1..60 {
            let now = start + Duration::from_secs(second);
            renew(&mut leases, 6..10, now);
            assert!(leases.sweep(now).is_empty(), "after {second} s");
        }
        assert_eq!(leases.held(), 6);
    }

    #[test]
    fn a_changed_registration_is_a_change_and_a_renewal_is_none() {
        let now = Instant::now();
        let mut leases = leases(1, now);
        assert!(!leases.register(workload(0), now));
        assert!(leases.register(Registration { zone: "b".into(), ..workload(0) }, now));
        assert!(leases.withdraw(&("demo".into(), "w0".into())));
        assert!(!leases.withdraw(&("demo".into(), "w0".into())));
    }
}
