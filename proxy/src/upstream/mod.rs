//! Endpoints as they run: what is known of each cluster beyond its configuration, and the connections to it.

mod connect;
pub mod http1;
mod pool;
mod received;
mod streams;
mod sweep;

pub use connect::{ConnectError, Label, Security, Target, Wire};
pub(crate) use connect::{Link, LocalExecutor, Opened, open};
pub use pool::{Lease, Pools, SendError, WireError};
pub use received::Received;
pub(crate) use received::is_of_the_request;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use arc_swap::ArcSwap;
use outrigger_core::balance::{EndpointInfo, EndpointSet};
use outrigger_core::breaker::Breaker;
use outrigger_core::link::Budget;
use outrigger_core::outlier::Outlier;
use outrigger_core::retry::RetryBudget;

/// Runtime state of every cluster, by backend key: it survives every swap of configuration.
#[derive(Debug, Default)]
pub struct Clusters {
    by_key: ArcSwap<HashMap<Arc<str>, Arc<Cluster>, foldhash::quality::RandomState>>,
    /// Held by whoever changes the set.
    changing: Mutex<()>,
}

/// One cluster as it runs. Shared by all workers; nothing in it is locked on a request's way.
#[derive(Debug)]
pub struct Cluster {
    /// `<namespace>/<service>:<port>`
    pub key: Arc<str>,
    /// Requests, connections and waits in flight, against the backend's limits
    pub breaker: Arc<Breaker>,
    /// Who is ejected
    pub outlier: Outlier,
    /// Made at the first request: a budget starts full, and how much that is the policy says.
    budget: OnceLock<RetryBudget>,
    set: ArcSwap<EndpointSet>,
    shards: Mutex<BTreeMap<u32, Vec<EndpointInfo>>>,
}

impl Clusters {
    /// No clusters.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// The cluster of a backend key, made at first use.
    pub fn get(&self, key: &str) -> Arc<Cluster> {
        if let Some(cluster) = self.by_key.load().get(key) {
            return cluster.clone();
        }
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let known = self.by_key.load_full();
        if let Some(cluster) = known.get(key) {
            return cluster.clone();
        }
        let mut all = HashMap::clone(&known);
        let cluster = Arc::new(Cluster::new(key.into()));
        all.insert(cluster.key.clone(), cluster.clone());
        self.by_key.store(Arc::new(all));
        cluster
    }

    /// Replaces the endpoints of one shard. One that stays the same keeps its state and its connections.
    pub fn set_endpoints(&self, key: &str, shard: u32, endpoints: Vec<EndpointInfo>) {
        self.get(key).set_shard(shard, endpoints);
    }

    /// Forgets clusters that no configuration names any more.
    pub fn retain(&self, keep: impl Fn(&str) -> bool) {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let all = self.by_key.load_full();
        if all.keys().all(|key| keep(key)) {
            return;
        }
        let kept = all.iter().filter(|(key, _)| keep(key)).map(|(key, cluster)| (key.clone(), cluster.clone()));
        self.by_key.store(Arc::new(kept.collect()));
    }

    /// Every cluster, by key.
    pub fn all(&self) -> Vec<Arc<Cluster>> {
        let mut all: Vec<_> = self.by_key.load().values().cloned().collect();
        all.sort_by(|a, b| a.key.cmp(&b.key));
        all
    }
}

impl Cluster {
    /// A cluster without endpoints.
    pub fn new(key: Arc<str>) -> Self {
        Self {
            key,
            breaker: Arc::default(),
            outlier: Outlier::default(),
            budget: OnceLock::new(),
            set: ArcSwap::default(),
            shards: Mutex::default(),
        }
    }

    /// What retries are paid from.
    pub fn budget(&self, policy: &Budget) -> &RetryBudget {
        self.budget.get_or_init(|| RetryBudget::new(policy, Instant::now()))
    }

    /// All endpoints at this moment.
    pub fn endpoints(&self) -> arc_swap::Guard<Arc<EndpointSet>> {
        self.set.load()
    }

    /// Whether there is an endpoint at all.
    pub fn is_ready(&self) -> bool {
        !self.set.load().is_empty()
    }

    fn set_shard(&self, shard: u32, endpoints: Vec<EndpointInfo>) {
        let mut shards = self.shards.lock().unwrap_or_else(PoisonError::into_inner);
        if endpoints.is_empty() {
            shards.remove(&shard);
        } else {
            shards.insert(shard, endpoints);
        }
        let all = shards.values().flatten().cloned();
        self.set.store(Arc::new(self.set.load().update(all, Instant::now())));
    }
}
