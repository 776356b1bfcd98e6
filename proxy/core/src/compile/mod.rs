//! All resources into answers to subscriptions. [`Catalog::build`] indexes and checks what concerns several
//! resources; [`Catalog::answer`] compiles one answer on demand, so that a mesh of 5,000 services costs a proxy (and the
//! control plane) only what is asked for. Equal inputs give equal bytes and so equal versions.

mod rows;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::key::Key;
pub use rows::{EndpointRow, RouteBackendRow, RouteRow, ServicePortRow, ServiceRow};

use crate::resource::{Closes, Loaded, Registration, Rejection};

/// What a catalog is built from.
#[derive(Debug, Clone, Default)]
pub struct Inputs {
    /// Every accepted resource (the last good version of what is now rejected included), oldest first: the order
    /// counts as the creation time where a document has no `creationTimestamp`
    pub resources: Vec<Arc<Loaded>>,
    /// Workloads that registered themselves
    pub registrations: Vec<Arc<Registration>>,
    /// The trust domain that certificates are signed for
    pub trust_domain: String,
    /// Policies that could not be read and of which no good version is held
    pub closed: Vec<ClosedPolicy>,
    /// Filter modules
    pub modules: Modules,
    /// DER of the roots, by trust domain
    pub roots: BTreeMap<String, Vec<Bytes>>,
}

/// A policy that fails closed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClosedPolicy {
    /// What
    pub closes: Closes,
    /// For people: which policy, and why it could not be read
    pub reason: String,
}

/// Filter modules as the caller found them: this crate reads no files.
#[derive(Debug, Clone, Default)]
pub struct Modules {
    /// By path, as [`wanted_modules`] names them
    pub files: BTreeMap<String, Module>,
    /// Sizes by hex digest of modules that are held whatever the files say now: a filter that pins a digest goes on
    /// with the module it pins after its file changed
    pub held: BTreeMap<String, u64>,
}

/// One module file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Module {
    /// Hex digest of the content
    pub sha256: String,
    /// Bytes
    pub size: u64,
}

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Client {
    /// Namespace of its identity: decides consumer routes and `self/…`
    pub namespace: String,
    /// Workload name
    pub workload: String,
    /// Service account of its identity
    pub service_account: String,
}

/// The answer to one subscription.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The resource
    Found(Found),
    /// Authoritatively nothing: `removed_resources`
    Absent,
}

/// A resource on the wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Canonical key
    pub name: String,
    /// Other keys under which this was asked for
    pub aliases: Vec<String>,
    /// One of [`outrigger_proto::type_url`]
    pub type_url: &'static str,
    /// The encoded message, without the `Any` around it
    pub bytes: Bytes,
    /// Hash of the bytes: equal content has equal versions across restarts and replicas
    pub version: String,
}

/// All resources, indexed.
#[derive(Debug, Default)]
pub struct Catalog {}

/// Paths of the module files that the filters among `resources` name: relative ones are joined to the directory of
/// their YAML file.
pub fn wanted_modules(_resources: &[Arc<Loaded>]) -> BTreeSet<String> {
    BTreeSet::new()
}

impl Catalog {
    /// Indexes the inputs. What contradicts another resource is left out and reported; a reference to nothing is no
    /// rejection, but an invalid backend of its route.
    pub fn build(_inputs: Inputs) -> (Self, Vec<Rejection>) {
        (Self {}, Vec::new())
    }

    /// Answers one subscription.
    pub fn answer(&self, _type_url: &str, _key: &Key, _client: &Client) -> Answer {
        Answer::Absent
    }

    /// Digests of the modules that filters use now, with their sizes.
    pub fn wasm_modules(&self) -> Vec<Module> {
        Vec::new()
    }

    /// Every Service, by name.
    pub fn services(&self) -> Vec<ServiceRow> {
        Vec::new()
    }

    /// Every endpoint of every Service port.
    pub fn endpoints(&self) -> Vec<EndpointRow> {
        Vec::new()
    }

    /// Every rule of every route, once per parent.
    pub fn routes(&self) -> Vec<RouteRow> {
        Vec::new()
    }
}
