//! What is subscribed to, and what the other side said about it. Pure: no stream in sight.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use outrigger_proto::discovery::DeltaDiscoveryRequest;
use outrigger_proto::type_url;

/// Kinds of resources, in the order in which they are asked for and restored: what names others comes before them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Kind {
    Mesh,
    Bundle,
    SelfOf,
    Filter,
    Service,
    Workload,
    Endpoints,
}

impl Kind {
    pub(crate) const ALL: [Self; 7] =
        [Self::Mesh, Self::Bundle, Self::SelfOf, Self::Service, Self::Workload, Self::Endpoints, Self::Filter];

    pub(crate) fn type_url(self) -> &'static str {
        match self {
            Self::Mesh => type_url::MESH_CONFIG,
            Self::Bundle => type_url::BUNDLE,
            Self::SelfOf => type_url::SELF,
            Self::Filter => type_url::FILTER,
            Self::Service => type_url::SERVICE,
            Self::Workload => type_url::WORKLOAD,
            Self::Endpoints => type_url::ENDPOINTS,
        }
    }

    pub(crate) fn of(url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.type_url() == url)
    }
}

/// What is known about one subscribed name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    /// Nothing yet
    Unknown,
    /// It is this resource, by canonical name
    Is(String),
    /// There is no such thing
    Absent,
}

/// The subscriptions of one kind.
#[derive(Debug, Default)]
struct OfKind {
    answers: BTreeMap<String, Answer>,
    /// Versions of accepted resources by canonical name: for the next connection.
    versions: BTreeMap<String, String>,
    /// Not sent yet.
    subscribe: BTreeSet<String>,
    unsubscribe: BTreeSet<String>,
}

impl OfKind {
    /// What is held, by canonical names and by the names that were asked for: which resource an alias stood for is known
    /// only to us. The empty version stands for known absence.
    fn held(&self) -> BTreeMap<String, String> {
        let version = |(name, answer): (&String, &Answer)| match answer {
            Answer::Unknown => None,
            Answer::Is(canonical) => Some((name.clone(), self.versions.get(canonical)?.clone())),
            Answer::Absent => Some((name.clone(), String::new())),
        };
        let held = self.versions.iter().map(|(name, version)| (name.clone(), version.clone()));
        held.chain(self.answers.iter().filter_map(version)).collect()
    }
}

/// All subscriptions.
#[derive(Debug, Default)]
pub(crate) struct Subscriptions {
    kinds: HashMap<Kind, OfKind>,
}

impl Subscriptions {
    /// Subscribes; nothing happens when it is subscribed already.
    pub(crate) fn add(&mut self, kind: Kind, name: &str) {
        let of = self.kinds.entry(kind).or_default();
        if !of.answers.contains_key(name) {
            of.answers.insert(name.to_owned(), Answer::Unknown);
            of.unsubscribe.remove(name);
            of.subscribe.insert(name.to_owned());
        }
    }

    /// Unsubscribes.
    pub(crate) fn remove(&mut self, kind: Kind, name: &str) {
        let of = self.kinds.entry(kind).or_default();
        if let Some(Answer::Is(canonical)) = of.answers.remove(name)
            && !of.answers.values().any(|answer| *answer == Answer::Is(canonical.clone()))
        {
            of.versions.remove(&canonical);
        }
        if !of.subscribe.remove(name) {
            of.unsubscribe.insert(name.to_owned());
        }
    }

    /// Makes the subscriptions of a kind exactly these.
    pub(crate) fn set(&mut self, kind: Kind, names: &BTreeSet<String>) {
        let old: Vec<String> = self.names(kind).filter(|name| !names.contains(*name)).cloned().collect();
        for name in old {
            self.remove(kind, &name);
        }
        for name in names {
            self.add(kind, name);
        }
    }

    /// Subscribed names.
    pub(crate) fn names(&self, kind: Kind) -> impl Iterator<Item = &String> {
        self.kinds.get(&kind).into_iter().flat_map(|of| of.answers.keys())
    }

    /// What is known about a name; `None`: not subscribed.
    pub(crate) fn answer(&self, kind: Kind, name: &str) -> Option<&Answer> {
        self.kinds.get(&kind)?.answers.get(name)
    }

    /// Whether the other side has said anything about a name.
    pub(crate) fn answered(&self, kind: Kind, name: &str) -> bool {
        self.answer(kind, name).is_some_and(|answer| *answer != Answer::Unknown)
    }

    /// Notes that a resource has arrived, under its own name and its aliases. Tells whether any of them is subscribed.
    pub(crate) fn found(&mut self, kind: Kind, canonical: &str, aliases: &[String]) -> bool {
        let of = self.kinds.entry(kind).or_default();
        let mut wanted = false;
        for name in aliases.iter().map(String::as_str).chain([canonical]) {
            if let Some(answer) = of.answers.get_mut(name) {
                *answer = Answer::Is(canonical.to_owned());
                wanted = true;
            }
        }
        wanted || of.answers.values().any(|answer| matches!(answer, Answer::Is(is) if is == canonical))
    }

    /// Notes that a name (or the resource of that canonical name) is gone. Returns whether a held resource is.
    pub(crate) fn gone(&mut self, kind: Kind, name: &str) -> bool {
        let of = self.kinds.entry(kind).or_default();
        for (subscribed, answer) in &mut of.answers {
            if subscribed == name || matches!(answer, Answer::Is(is) if is == name) {
                *answer = Answer::Absent;
            }
        }
        of.versions.remove(name).is_some()
    }

    /// Notes the version of an accepted resource.
    pub(crate) fn accepted(&mut self, kind: Kind, canonical: &str, version: &str) {
        self.kinds.entry(kind).or_default().versions.insert(canonical.to_owned(), version.to_owned());
    }

    /// Forgets the version of a resource: the next connection gets it again, whatever it is there.
    pub(crate) fn forget(&mut self, kind: Kind, canonical: &str) {
        if let Some(of) = self.kinds.get_mut(&kind) {
            of.versions.remove(canonical);
        }
    }

    /// Subscribed names that are known to be absent.
    pub(crate) fn absent(&self, kind: Kind) -> impl Iterator<Item = &String> {
        let answers = self.kinds.get(&kind).into_iter().flat_map(|of| &of.answers);
        answers.filter(|(_, answer)| **answer == Answer::Absent).map(|(name, _)| name)
    }

    /// Subscribed names whose resource is this, without its own.
    pub(crate) fn aliases(&self, kind: Kind, canonical: &str) -> Vec<String> {
        let answers = self.kinds.get(&kind).into_iter().flat_map(|of| &of.answers);
        let mine = |(name, answer): &(&String, &Answer)| {
            matches!(answer, Answer::Is(is) if is == canonical) && *name != canonical
        };
        answers.filter(mine).map(|(name, _)| name.clone()).collect()
    }

    /// The first requests of a new connection: everything that is wanted, and the versions that are held. Kinds of which
    /// nothing is wanted are not mentioned, since an empty first request would mean "everything".
    pub(crate) fn first(&mut self) -> Vec<DeltaDiscoveryRequest> {
        let mut requests = Vec::new();
        for kind in Kind::ALL {
            let Some(of) = self.kinds.get_mut(&kind) else { continue };
            of.subscribe.clear();
            of.unsubscribe.clear();
            if of.answers.is_empty() {
                continue;
            }
            requests.push(DeltaDiscoveryRequest {
                type_url: kind.type_url().to_owned(),
                resource_names_subscribe: of.answers.keys().cloned().collect(),
                initial_resource_versions: of.held(),
                ..DeltaDiscoveryRequest::default()
            });
        }
        requests
    }

    /// What changed since the last call.
    pub(crate) fn changes(&mut self) -> Vec<DeltaDiscoveryRequest> {
        let mut requests = Vec::new();
        for kind in Kind::ALL {
            let Some(of) = self.kinds.get_mut(&kind) else { continue };
            if of.subscribe.is_empty() && of.unsubscribe.is_empty() {
                continue;
            }
            requests.push(DeltaDiscoveryRequest {
                type_url: kind.type_url().to_owned(),
                resource_names_subscribe: std::mem::take(&mut of.subscribe).into_iter().collect(),
                resource_names_unsubscribe: std::mem::take(&mut of.unsubscribe).into_iter().collect(),
                ..DeltaDiscoveryRequest::default()
            });
        }
        requests
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_connection_names_what_is_held_and_only_kinds_in_use() {
        let mut subscriptions = Subscriptions::default();
        subscriptions.add(Kind::Service, "ip/10.0.0.1:80");
        subscriptions.add(Kind::Mesh, "mesh");
        assert!(subscriptions.found(Kind::Service, "svc/demo/a", &["ip/10.0.0.1:80".into()]));
        subscriptions.accepted(Kind::Service, "svc/demo/a", "v1");
        let first = subscriptions.first();
        assert_eq!(first.len(), 2);
        assert_eq!(first[1].resource_names_subscribe, ["ip/10.0.0.1:80"]);
        assert_eq!(first[1].initial_resource_versions["svc/demo/a"], "v1");
        assert_eq!(first[1].initial_resource_versions["ip/10.0.0.1:80"], "v1");
        assert!(subscriptions.changes().is_empty());
    }

    #[test]
    fn a_removal_by_canonical_name_reaches_every_alias_and_creation_is_seen() {
        let mut subscriptions = Subscriptions::default();
        subscriptions.add(Kind::Service, "ip/10.0.0.1:80");
        subscriptions.found(Kind::Service, "svc/demo/a", &["ip/10.0.0.1:80".into()]);
        subscriptions.accepted(Kind::Service, "svc/demo/a", "v1");
        assert!(subscriptions.gone(Kind::Service, "svc/demo/a"));
        assert_eq!(subscriptions.answer(Kind::Service, "ip/10.0.0.1:80"), Some(&Answer::Absent));
        assert!(subscriptions.found(Kind::Service, "svc/demo/b", &["ip/10.0.0.1:80".into()]));
        assert_eq!(subscriptions.answer(Kind::Service, "ip/10.0.0.1:80"), Some(&Answer::Is("svc/demo/b".into())));
    }

    #[test]
    fn subscribing_and_unsubscribing_before_sending_says_nothing() {
        let mut subscriptions = Subscriptions::default();
        subscriptions.add(Kind::Service, "svc/demo/a");
        subscriptions.remove(Kind::Service, "svc/demo/a");
        assert!(subscriptions.changes().is_empty());
        assert!(!subscriptions.found(Kind::Service, "svc/demo/a", &[]));
    }
}
