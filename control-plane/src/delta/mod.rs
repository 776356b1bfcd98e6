//! One discovery stream as a state machine: a request or a change goes in, the responses to send come out. No IO.
//!
//! A subscription is to the name that was asked for. The answer to it may carry another, canonical name; the asked
//! name is then among the resource's aliases, and it is the asked name that is removed when there is no answer any more.

use std::collections::BTreeMap;
use std::sync::Arc;

use outrigger_core::compile::Found;
use outrigger_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource, ResourceError, Status};
use outrigger_proto::{Any, type_url};
use prost::Message;

use crate::subscribers::Look;

#[cfg(test)]
mod tests;

/// Subscriptions of one stream, over all types: a proxy's 4,096 destinations, most with a backend's endpoints, and
/// intercepted addresses asked for as service and as workload.
pub const MAX_SUBSCRIPTIONS: usize = 4 * 4096;
/// A longer name is no key: it is answered as absent and not kept.
const MAX_NAME: usize = 512;
/// Responses whose acknowledgement is awaited; of older ones it no longer counts.
const MAX_IN_FLIGHT: usize = 2 * MAX_SUBSCRIPTIONS;
/// A response is closed when it holds this many bytes of resources: receivers refuse messages above 4 MiB.
const RESPONSE_BYTES: usize = 512 * 1024;

/// The types that can be subscribed to, in the order in which a change is sent: what a resource refers to goes first.
pub const TYPES: [&str; 7] = [
    type_url::MESH_CONFIG,
    type_url::BUNDLE,
    type_url::FILTER,
    type_url::ENDPOINTS,
    type_url::WORKLOAD,
    type_url::SERVICE,
    type_url::SELF,
];

/// What the mesh says now, to the client of the stream.
pub trait Answers {
    /// The resource that `name` names; `None` is authoritative absence.
    fn answer(&self, type_url: &str, name: &str) -> Option<Arc<Found>>;
}

/// Why a stream is ended.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Refused {
    /// Everything of a type was asked for
    #[error(
        "wildcard subscriptions are not served: a proxy subscribes by name to what it uses (type {0}; name the resources in resource_names_subscribe)"
    )]
    Wildcard(String),
    /// Not one of [`TYPES`]
    #[error(
        "there are no resources of type `{0}`; the types are outrigger.mesh.v1.{{MeshConfig, Bundle, Filter, Endpoints, Workload, Service, Self}}"
    )]
    Type(String),
    /// More than [`MAX_SUBSCRIPTIONS`]
    #[error("more than {MAX_SUBSCRIPTIONS} subscriptions on one stream: unsubscribe from what is not used any more")]
    TooMany,
}

/// What the client was sent, or has: nothing there, or a version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Held {
    /// Told that there is nothing
    Absent,
    /// A version of the resource
    Version(String),
}

/// A version that the client refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejected {
    /// What it refused
    pub held: Held,
    /// In its words
    pub reason: String,
}

/// One subscription.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Subscription {
    /// What was sent last
    pub sent: Option<Held>,
    /// What was acknowledged last
    pub acked: Option<Held>,
    /// The refusal of what was sent last
    pub rejected: Option<Rejected>,
}

impl Subscription {
    /// The refusal of this version; what was refused before it says nothing about it.
    pub fn refusal(&self, latest: &Held) -> Option<&Rejected> {
        self.rejected.as_ref().filter(|rejected| rejected.held == *latest)
    }
}

/// What handling a request led to.
#[derive(Debug, Default)]
pub struct Outcome {
    /// To be sent, in this order
    pub responses: Vec<DeltaDiscoveryResponse>,
    /// Names newly refused by the client, with its reason
    pub rejected: Vec<(String, String)>,
    /// Whether the request acknowledged or refused anything
    pub settled: bool,
}

/// The asked names of one response, with what each was told.
#[derive(Debug)]
struct Sent {
    type_url: &'static str,
    /// Asked name, canonical name, what was sent
    items: Vec<(String, String, Held)>,
}

/// The state of one stream.
#[derive(Debug, Default)]
pub struct Stream {
    types: BTreeMap<&'static str, BTreeMap<String, Subscription>>,
    in_flight: BTreeMap<u64, Sent>,
    last_nonce: u64,
}

impl Stream {
    /// Handles one request: its acknowledgement, then its unsubscriptions, then its subscriptions.
    ///
    /// # Errors
    /// [`Refused`] ends the stream.
    pub fn request(&mut self, request: &DeltaDiscoveryRequest, answers: &dyn Answers) -> Result<Outcome, Refused> {
        let Some(&type_url) = TYPES.iter().find(|known| **known == request.type_url) else {
            return Err(Refused::Type(request.type_url.clone()));
        };
        let mut outcome = Outcome::default();
        if !request.response_nonce.is_empty() {
            self.settle(type_url, request, &mut outcome);
        }
        let names = &request.resource_names_subscribe;
        let unsubscribed = &request.resource_names_unsubscribe;
        // The first request of a type that names nothing is the older form of a wildcard.
        let first = request.response_nonce.is_empty() && !self.types.contains_key(type_url);
        if (first && names.is_empty() && unsubscribed.is_empty()) || names.iter().any(|name| name == "*") {
            return Err(Refused::Wildcard(type_url.to_owned()));
        }
        let subscriptions = self.types.entry(type_url).or_default();
        for name in unsubscribed {
            subscriptions.remove(name);
        }
        let mut batch = Batch::default();
        for name in names {
            if name.len() > MAX_NAME {
                batch.told.push((name.clone(), None));
                continue;
            }
            let answer = answers.answer(type_url, name);
            let now = held(answer.as_deref());
            let subscription = subscriptions.entry(name.clone()).or_default();
            let theirs = request.initial_resource_versions.get(name);
            let same = |version: &String| match &now {
                Held::Version(now) => now == version,
                // The empty version: it was told that there is nothing.
                Held::Absent => version.is_empty(),
            };
            if theirs.is_some_and(same) {
                // It has this from an earlier stream.
                *subscription = Subscription { sent: Some(now.clone()), acked: Some(now), rejected: None };
            } else {
                subscription.sent = Some(now);
                batch.told.push((name.clone(), answer));
            }
        }
        for (name, version) in &request.initial_resource_versions {
            let subscribed = names.contains(name) || unsubscribed.contains(name);
            if !subscribed && !version.is_empty() && answers.answer(type_url, name).is_none() {
                batch.told.push((name.clone(), None));
            }
        }
        if self.types.values().map(BTreeMap::len).sum::<usize>() > MAX_SUBSCRIPTIONS {
            return Err(Refused::TooMany);
        }
        self.respond(type_url, batch, &mut outcome.responses);
        Ok(outcome)
    }

    /// What must be sent after what the mesh says has changed, for the subscriptions that this may concern. What the client
    /// refused is not sent again until its content changes.
    pub fn changed(&mut self, look: &Look, answers: &dyn Answers) -> Vec<DeltaDiscoveryResponse> {
        let mut responses = Vec::new();
        for type_url in TYPES {
            let Some(subscriptions) = self.types.get_mut(type_url) else { continue };
            let mut batch = Batch::default();
            let mut check = |name: &str, subscription: &mut Subscription| {
                let answer = answers.answer(type_url, name);
                let now = held(answer.as_deref());
                if subscription.sent.as_ref() != Some(&now) {
                    subscription.sent = Some(now);
                    batch.told.push((name.to_owned(), answer));
                }
            };
            match look {
                Look::All => subscriptions.iter_mut().for_each(|(name, subscription)| check(name, subscription)),
                Look::At(asked) => {
                    for (_, name) in asked.iter().filter(|(kind, _)| *kind == type_url) {
                        if let Some(subscription) = subscriptions.get_mut(&**name) {
                            check(name, subscription);
                        }
                    }
                }
            }
            self.respond(type_url, batch, &mut responses);
        }
        responses
    }

    /// Whether this is subscribed to.
    pub fn has(&self, type_url: &str, name: &str) -> bool {
        self.types.get(type_url).is_some_and(|subscriptions| subscriptions.contains_key(name))
    }

    /// One subscription.
    pub fn subscription(&self, type_url: &str, name: &str) -> Option<&Subscription> {
        self.types.get(type_url)?.get(name)
    }

    /// Every subscription: type, asked name, state.
    pub fn subscriptions(&self) -> impl Iterator<Item = (&'static str, &str, &Subscription)> {
        let of_type = |(type_url, subscriptions): (&&'static str, _)| {
            let type_url = *type_url;
            let subscriptions: &BTreeMap<String, Subscription> = subscriptions;
            subscriptions.iter().map(move |(name, subscription)| (type_url, name.as_str(), subscription))
        };
        self.types.iter().flat_map(of_type)
    }

    /// Takes in an ACK, or a NACK of some or all resources of a response.
    fn settle(&mut self, type_url: &str, request: &DeltaDiscoveryRequest, outcome: &mut Outcome) {
        let nonce = request.response_nonce.parse::<u64>().ok();
        let known = nonce.filter(|nonce| self.in_flight.get(nonce).is_some_and(|sent| sent.type_url == type_url));
        let Some(sent) = known.and_then(|nonce| self.in_flight.remove(&nonce)) else { return };
        let Some(subscriptions) = self.types.get_mut(sent.type_url) else { return };
        outcome.settled = true;
        let refusals = request.error_detail.as_ref().map(Refusals::read);
        for (name, canonical, held) in sent.items {
            let Some(subscription) = subscriptions.get_mut(&name) else { continue };
            match refusals.as_ref().and_then(|refusals| refusals.of(&name, &canonical)) {
                None => {
                    // A late ACK of what was sent before says nothing about what was refused since.
                    if subscription.sent.as_ref() == Some(&held) {
                        subscription.rejected = None;
                    }
                    subscription.acked = Some(held);
                }
                Some(reason) => {
                    outcome.rejected.push((name, reason.to_owned()));
                    subscription.rejected = Some(Rejected { held, reason: reason.to_owned() });
                }
            }
        }
    }

    /// Puts a batch into responses of bounded size, with a nonce each.
    fn respond(&mut self, type_url: &'static str, batch: Batch, responses: &mut Vec<DeltaDiscoveryResponse>) {
        let mut part = Part::default();
        for (name, answer) in batch.told {
            let size = answer.as_ref().map_or(0, |found| found.bytes.len());
            if part.size > 0 && part.size + size > RESPONSE_BYTES {
                responses.push(self.close(type_url, std::mem::take(&mut part)));
            }
            part.add(name, answer);
        }
        if !part.items.is_empty() {
            responses.push(self.close(type_url, part));
        }
    }

    fn close(&mut self, type_url: &'static str, part: Part) -> DeltaDiscoveryResponse {
        self.last_nonce += 1;
        self.in_flight.insert(self.last_nonce, Sent { type_url, items: part.items });
        if self.in_flight.len() > MAX_IN_FLIGHT {
            self.in_flight.pop_first();
        }
        DeltaDiscoveryResponse {
            system_version_info: String::new(),
            resources: part.resources,
            type_url: type_url.to_owned(),
            nonce: self.last_nonce.to_string(),
            removed_resources: part.removed,
        }
    }
}

/// Asked names with their answers, to be sent.
#[derive(Default)]
struct Batch {
    told: Vec<(String, Option<Arc<Found>>)>,
}

/// One response in the making.
#[derive(Default)]
struct Part {
    resources: Vec<Resource>,
    /// Where a canonical name is in `resources`
    by_name: BTreeMap<String, usize>,
    removed: Vec<String>,
    items: Vec<(String, String, Held)>,
    size: usize,
}

impl Part {
    fn add(&mut self, name: String, answer: Option<Arc<Found>>) {
        let Some(found) = answer else {
            self.removed.push(name.clone());
            self.items.push((name.clone(), name, Held::Absent));
            return;
        };
        let alias = (name != found.name).then(|| name.clone());
        // Several asked names may be one resource: it is sent once, with all of them.
        let at = *self.by_name.entry(found.name.clone()).or_insert_with(|| {
            self.size += found.bytes.len();
            self.resources.push(Resource {
                version: found.version.clone(),
                // The bytes are shared by all who get them.
                resource: Some(Any { type_url: found.type_url.to_owned(), value: found.bytes.clone() }),
                name: found.name.clone(),
                aliases: Vec::new(),
            });
            self.resources.len() - 1
        });
        if let (Some(alias), Some(resource)) = (alias, self.resources.get_mut(at)) {
            resource.aliases.push(alias);
        }
        self.items.push((name, found.name.clone(), Held::Version(found.version.clone())));
    }
}

/// What a NACK says.
struct Refusals {
    /// Reason by name; empty: all of the response
    named: BTreeMap<String, String>,
    whole: String,
}

impl Refusals {
    fn read(status: &Status) -> Self {
        let mut named = BTreeMap::new();
        for detail in &status.details {
            if !detail.type_url.ends_with("/envoy.service.discovery.v3.ResourceError") {
                continue;
            }
            let Ok(error) = ResourceError::decode(detail.value.clone()) else { continue };
            let Some(name) = error.resource_name else { continue };
            let reason = error.error_detail.map_or_else(|| status.message.clone(), |status| status.message);
            named.insert(name.name, bounded(&reason));
        }
        Self { named, whole: bounded(&status.message) }
    }

    fn of(&self, name: &str, canonical: &str) -> Option<&str> {
        if self.named.is_empty() {
            return Some(&self.whole);
        }
        self.named.get(name).or_else(|| self.named.get(canonical)).map(String::as_str)
    }
}

fn bounded(reason: &str) -> String {
    reason.chars().take(1024).collect()
}

fn held(answer: Option<&Found>) -> Held {
    answer.map_or(Held::Absent, |found| Held::Version(found.version.clone()))
}
