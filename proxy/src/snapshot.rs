//! What a request reads: an immutable view of everything that discovery has linked.

use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use outrigger_core::balance::EndpointInfo;
use outrigger_core::key::Key;
use outrigger_core::link::{Inbound, Mesh, Protocol, Service};

use crate::filter::{Filters, Plugin, Plugins, StatusRow};

/// All configuration at one moment.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// Counts swaps; bigger is newer
    pub number: u64,
    /// Mesh-wide settings; `None` before the first answer
    pub mesh: Option<Arc<Mesh>>,
    /// What this workload enforces; `None` before the first answer
    pub inbound: Option<Arc<Inbound>>,
    /// Filters by key (`filter/<namespace>/<name>`)
    pub(crate) filters: BTreeMap<String, FilterSlot>,
    /// Destinations by every key they were asked for under.
    pub(crate) targets: HashMap<Key, (Target, Use), foldhash::quality::RandomState>,
}

/// A snapshot as one worker holds it: requests count up and down what no other worker does.
pub type Pinned = Rc<Arc<Snapshot>>;

/// What a destination is.
#[derive(Debug, Clone)]
pub enum Target {
    /// A service: routes, policies, backends
    Service(Arc<Service>),
    /// One instance, hit by its own address: mTLS, no routes
    Workload(Arc<Workload>),
    /// Authoritatively neither
    Absent,
}

/// One instance.
#[derive(Debug, Clone)]
pub struct Workload {
    /// Where and as whom it is reached
    pub endpoint: EndpointInfo,
    /// Declared protocol of the port
    pub protocol: Protocol,
}

/// A filter that discovery has an answer for.
#[derive(Debug, Clone)]
pub(crate) struct FilterSlot {
    /// Prepared; `None`: it never could be
    pub(crate) plugin: Option<Arc<Plugin>>,
    pub(crate) fail_open: bool,
}

/// The mark that keeps a subscription alive.
#[derive(Debug, Clone)]
pub(crate) struct Use(Arc<AtomicBool>);

impl Default for Use {
    fn default() -> Self {
        Self(Arc::new(AtomicBool::new(true)))
    }
}

impl Use {
    fn mark(&self) {
        // The read first keeps the cache line shared between workers.
        if !self.0.load(Ordering::Relaxed) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    /// Whether a request asked for it since the last call.
    pub(crate) fn take(&self) -> bool {
        self.0.swap(false, Ordering::Relaxed)
    }
}

impl Snapshot {
    /// The destination, if discovery has an answer for it.
    pub fn lookup(&self, key: &Key) -> Option<&Target> {
        let (target, used) = self.targets.get(key)?;
        used.mark();
        Some(target)
    }

    /// One exchange's part of the filters of these keys, in order; FailOpen ones that could not be prepared are left out.
    ///
    /// # Errors
    /// The key of one that is not ready and FailClosed, or unknown.
    pub fn filters(&self, keys: &[String]) -> Result<Filters, String> {
        let mut filters = Filters::with_capacity(keys.len());
        for key in keys {
            match self.filters.get(key) {
                Some(FilterSlot { plugin: Some(plugin), .. }) => filters.push(Plugin::filter(plugin)),
                Some(FilterSlot { plugin: None, fail_open: true }) => {}
                _ => return Err(key.strip_prefix("filter/").unwrap_or(key).to_owned()),
            }
        }
        Ok(filters)
    }

    /// The prepared filter of a key (`filter/<namespace>/<name>`). `None`: it could not be prepared.
    pub fn filter(&self, key: &str) -> Option<&Arc<Plugin>> {
        self.filters.get(key)?.plugin.as_ref()
    }

    /// How the filters of this configuration do.
    pub fn filter_rows(&self, plugins: &Plugins) -> Vec<StatusRow> {
        let configured = |row: &StatusRow| self.filters.contains_key(&format!("filter/{}/{}", row.namespace, row.name));
        plugins.status().into_iter().filter(configured).collect()
    }

    /// Whether an address may be reached only through the mesh.
    pub fn in_mesh(&self, ip: std::net::IpAddr) -> bool {
        self.mesh.as_ref().is_some_and(|mesh| mesh.contains(ip))
    }
}
