//! The proxies that are, or lately were, connected.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use outrigger_core::compile::{Client, Topic};
use outrigger_core::key::Key;
use outrigger_proto::discovery::DeltaDiscoveryRequest;
use outrigger_proto::type_url;
use serde::Serialize;
use tokio::sync::watch;

use crate::answers::Touched;
use crate::delta::{Held, Stream, Subscription, TYPES};
use crate::mesh::{Changed, Published};
use crate::subscribers::{Asked, Inbox, Subscribers};

/// A disconnected proxy is listed this long.
const REMEMBERED: Duration = Duration::from_secs(3600);
/// And at most so many of them are.
const MAX_REMEMBERED: usize = 1024;

/// All of them.
#[derive(Debug)]
pub struct Proxies {
    entries: Mutex<Entries>,
    subscribers: Subscribers,
    settled: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Entries {
    last: u64,
    by_id: BTreeMap<u64, Arc<Proxy>>,
}

/// One discovery stream.
#[derive(Debug)]
pub struct Proxy {
    id: u64,
    /// Namespace, workload and account
    pub client: Client,
    /// SPIFFE ID
    pub identity: String,
    address: String,
    since: u64,
    stream: Mutex<Stream>,
    inbox: Arc<Inbox>,
    ended: Mutex<Option<Instant>>,
}

/// For as long as the stream is open.
#[derive(Debug)]
pub struct Connected {
    proxy: Arc<Proxy>,
    proxies: Arc<Proxies>,
}

/// A proxy, for `/api/v1/proxies`.
#[derive(Debug, Serialize)]
pub struct ProxyRow {
    name: String,
    workload: String,
    namespace: String,
    identity: String,
    address: String,
    connected: bool,
    /// Seconds since the Unix epoch
    since: u64,
    /// Resources whose latest version is acknowledged
    acknowledged: usize,
    /// Resources whose latest version is neither acknowledged nor refused
    pending: usize,
    resources: Vec<ResourceRow>,
    nacks: Vec<NackRow>,
}

/// A proxy that subscribes to one resource.
#[derive(Debug, Serialize)]
pub struct Subscriber {
    /// Of its workload
    pub namespace: String,
    /// Its name
    pub workload: String,
    /// Whether its stream is open
    pub connected: bool,
    /// How far it is
    pub state: Applied,
    /// Why it refused the latest version
    pub reason: Option<String>,
}

/// Whether a proxy serves by the latest version of a resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Applied {
    /// It acknowledged it
    Applied,
    /// It has not said
    Pending,
    /// It refused it, and serves by the one before
    Refused,
}

/// A subscription. A version is null before the first, and empty for "told that there is nothing".
#[derive(Debug, Serialize)]
struct ResourceRow {
    #[serde(rename = "type")]
    kind: String,
    name: String,
    acked: Option<String>,
    latest: String,
}

/// A refused resource.
#[derive(Debug, Serialize)]
struct NackRow {
    name: String,
    resource: String,
    version: String,
    reason: String,
}

impl Default for Proxies {
    fn default() -> Self {
        Self { entries: Mutex::default(), subscribers: Subscribers::default(), settled: watch::Sender::new(0) }
    }
}

impl Proxies {
    /// A stream opened.
    pub fn connect(self: &Arc<Self>, client: Client, identity: String, address: String) -> Connected {
        let mut entries = lock(&self.entries);
        entries.last += 1;
        let id = entries.last;
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let gone = |proxy: &Proxy| lock(&proxy.ended).is_some();
        entries.by_id.retain(|_, other| other.client != client || !gone(other));
        let (inbox, stream) = (self.subscribers.open(id), Mutex::default());
        let proxy = Arc::new(Proxy { id, client, identity, address, since, stream, inbox, ended: Mutex::new(None) });
        entries.by_id.insert(id, proxy.clone());
        Connected { proxy, proxies: self.clone() }
    }

    /// A proxy acknowledged or refused something.
    pub fn settled(&self) {
        self.settled.send_modify(|count| *count += 1);
    }

    /// Tells the streams that a change concerns.
    pub fn tell(&self, touched: &Touched) {
        self.subscribers.tell(touched);
    }

    /// Waits until every connected proxy has acknowledged what a change made other among endpoints
    /// (refused counts: waiting longer would not help). `false` when that took longer than `limit`.
    pub async fn confirmed(&self, change: &Changed, limit: Duration) -> bool {
        let mut settled = self.settled.subscribe();
        let concerned = self.subscribers.of(&change.touched);
        let mut waiting = self.connected();
        if let Some(concerned) = &concerned {
            waiting.retain(|proxy| concerned.contains_key(&proxy.id));
        }
        let all = async {
            loop {
                waiting.retain(|proxy| {
                    let asked = concerned.as_ref().and_then(|concerned| concerned.get(&proxy.id));
                    lock(&proxy.ended).is_none() && !proxy.has_taken(change, asked)
                });
                if waiting.is_empty() || settled.changed().await.is_err() {
                    return;
                }
            }
        };
        tokio::time::timeout(limit, all).await.is_ok()
    }

    /// How many are connected.
    pub fn count(&self) -> usize {
        self.connected().len()
    }

    /// All that are listed, by namespace and name.
    pub fn rows(&self, now: &Published) -> Vec<ProxyRow> {
        let proxies: Vec<Arc<Proxy>> = lock(&self.entries).by_id.values().cloned().collect();
        let mut rows: Vec<ProxyRow> = proxies.iter().map(|proxy| proxy.row(now)).collect();
        rows.sort_by(|one, other| (&one.namespace, &one.name).cmp(&(&other.namespace, &other.name)));
        rows
    }

    /// Who subscribes to a resource, and how far each is.
    pub fn subscribers(&self, type_url: &str, key: &Key, now: &Published) -> Vec<Subscriber> {
        let name = key.to_string();
        let proxies: Vec<Arc<Proxy>> = lock(&self.entries).by_id.values().cloned().collect();
        let mut found: Vec<Subscriber> =
            proxies.iter().filter_map(|proxy| proxy.subscriber(type_url, key, &name, now)).collect();
        found.sort_by(|one, other| (&one.namespace, &one.workload).cmp(&(&other.namespace, &other.workload)));
        found
    }

    fn connected(&self) -> Vec<Arc<Proxy>> {
        let entries = lock(&self.entries);
        entries.by_id.values().filter(|proxy| lock(&proxy.ended).is_none()).cloned().collect()
    }

    fn disconnect(&self, id: u64) {
        let mut entries = lock(&self.entries);
        let Some(proxy) = entries.by_id.get(&id).cloned() else { return };
        let now = Instant::now();
        *lock(&proxy.ended) = Some(now);
        let replaced = entries.by_id.values().any(|other| other.id != id && other.client == proxy.client);
        if replaced {
            entries.by_id.remove(&id);
        }
        entries.by_id.retain(|_, other| lock(&other.ended).is_none_or(|at| now.duration_since(at) < REMEMBERED));
        let gone: Vec<u64> =
            entries.by_id.values().filter(|other| lock(&other.ended).is_some()).map(|other| other.id).collect();
        for id in gone.iter().take(gone.len().saturating_sub(MAX_REMEMBERED)) {
            entries.by_id.remove(id);
        }
        drop(entries);
        // Nobody waits for it any more.
        self.settled();
    }
}

impl Proxy {
    /// The state of its stream.
    pub fn stream(&self) -> MutexGuard<'_, Stream> {
        lock(&self.stream)
    }

    fn topic(&self, kind: &str, name: &str) -> Option<Topic> {
        Topic::of(kind, &name.parse().ok()?, &self.client)
    }

    /// What the stream has to look at again.
    pub fn inbox(&self) -> &Inbox {
        &self.inbox
    }

    /// Whether it has taken what a change made of these subscriptions, or of all.
    fn has_taken(&self, change: &Changed, asked: Option<&BTreeSet<Asked>>) -> bool {
        let stream = self.stream();
        let endpoints = [type_url::ENDPOINTS, type_url::WORKLOAD, type_url::SERVICE];
        let taken = |kind: &str, name: &str, subscription: &Subscription| {
            let Ok(key) = name.parse::<Key>() else { return true };
            let version = |state: &Published| state.answer(kind, &key, &self.client).map(|found| found.version.clone());
            let (was, is) = (version(&change.before), version(&change.after));
            if was == is {
                return true;
            }
            let held = |version: Option<String>| version.map_or(Held::Absent, Held::Version);
            let (was, is) = (held(was), held(is));
            let acked = subscription.acked.as_ref();
            let refused = subscription.rejected.as_ref().is_some_and(|rejected| rejected.held == is);
            // A later state may have been sent meanwhile: it includes this one.
            refused || acked == Some(&is) || (acked == subscription.sent.as_ref() && acked != Some(&was))
        };
        match asked {
            Some(asked) => asked.iter().filter(|(kind, _)| endpoints.contains(kind)).all(|(kind, name)| {
                stream.subscription(kind, name).is_none_or(|subscription| taken(kind, name, subscription))
            }),
            None => stream
                .subscriptions()
                .filter(|(kind, ..)| endpoints.contains(kind))
                .all(|(kind, name, subscription)| taken(kind, name, subscription)),
        }
    }

    fn subscriber(&self, type_url: &str, key: &Key, name: &str, now: &Published) -> Option<Subscriber> {
        let stream = self.stream();
        let (_, _, subscription) = stream.subscriptions().find(|(kind, of, _)| *kind == type_url && *of == name)?;
        let latest = now.answer(type_url, key, &self.client);
        let latest = latest.map_or(Held::Absent, |found| Held::Version(found.version.clone()));
        let reason = subscription.refusal(&latest).map(|rejected| rejected.reason.clone());
        let state = match &reason {
            Some(_) => Applied::Refused,
            None if subscription.acked.as_ref() == Some(&latest) => Applied::Applied,
            None => Applied::Pending,
        };
        Some(Subscriber {
            namespace: self.client.namespace.clone(),
            workload: self.client.workload.clone(),
            connected: lock(&self.ended).is_none(),
            state,
            reason,
        })
    }

    fn row(&self, now: &Published) -> ProxyRow {
        let stream = self.stream();
        let mut resources = Vec::new();
        let mut nacks = Vec::new();
        let (mut acknowledged, mut pending) = (0, 0);
        for (kind, name, subscription) in stream.subscriptions() {
            let latest = match name.parse::<Key>() {
                Ok(Key::SelfOf(workload)) if workload != self.client.workload => None,
                Ok(key) => now.answer(kind, &key, &self.client),
                Err(_) => None,
            };
            let latest = latest.map_or(Held::Absent, |found| Held::Version(found.version.clone()));
            match subscription.refusal(&latest) {
                Some(rejected) => nacks.push(NackRow {
                    name: name.to_owned(),
                    resource: name.to_owned(),
                    version: text(&rejected.held),
                    reason: rejected.reason.clone(),
                }),
                None if subscription.acked.as_ref() == Some(&latest) => acknowledged += 1,
                None => pending += 1,
            }
            resources.push(ResourceRow {
                kind: kind.rsplit('.').next().unwrap_or_default().to_owned(),
                name: name.to_owned(),
                acked: subscription.acked.as_ref().map(text),
                latest: text(&latest),
            });
        }
        ProxyRow {
            name: self.client.workload.clone(),
            workload: self.client.workload.clone(),
            namespace: self.client.namespace.clone(),
            identity: self.identity.clone(),
            address: self.address.clone(),
            connected: lock(&self.ended).is_none(),
            since: self.since,
            acknowledged,
            pending,
            resources,
            nacks,
        }
    }
}

impl Connected {
    /// Is told from now on of changes of what a request subscribes to.
    pub fn follow(&self, request: &DeltaDiscoveryRequest) {
        self.topics(request, &request.resource_names_subscribe, |topic, asked| {
            self.proxies.subscribers.add(self.proxy.id, topic, asked);
        });
    }

    /// After the request: is no longer told of what it does not subscribe to any more, or was refused.
    pub fn unfollow(&self, request: &DeltaDiscoveryRequest) {
        let stream = self.proxy.stream();
        let names = request.resource_names_unsubscribe.iter().chain(&request.resource_names_subscribe);
        self.topics(request, names.filter(|name| !stream.has(&request.type_url, name)), |topic, asked| {
            self.proxies.subscribers.remove(self.proxy.id, &topic, &asked);
        });
    }

    fn topics<'a>(
        &self,
        request: &DeltaDiscoveryRequest,
        names: impl IntoIterator<Item = &'a String>,
        mut each: impl FnMut(Topic, Asked),
    ) {
        let Some(kind) = TYPES.iter().find(|kind| **kind == request.type_url) else { return };
        for name in names {
            if let Some(topic) = self.proxy.topic(kind, name) {
                each(topic, (kind, name.as_str().into()));
            }
        }
    }
}

impl std::ops::Deref for Connected {
    type Target = Proxy;

    fn deref(&self) -> &Proxy {
        &self.proxy
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        let subscribers = &self.proxies.subscribers;
        subscribers.close(self.proxy.id);
        for (kind, name, _) in self.proxy.stream().subscriptions() {
            if let Some(topic) = self.proxy.topic(kind, name) {
                subscribers.remove(self.proxy.id, &topic, &(kind, name.into()));
            }
        }
        self.proxies.disconnect(self.proxy.id);
    }
}

fn text(held: &Held) -> String {
    match held {
        Held::Absent => String::new(),
        Held::Version(version) => version.clone(),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
