//! Answers to subscriptions, each compiled and encoded once, shared by all who ask, and kept until a change touches it.

use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use outrigger_core::compile::{Answer, Catalog, Client, Found, Topic};
use outrigger_core::key::Key;
use rpds::HashTrieMapSync;

const SHARDS: usize = 16;
/// Answers kept per shard; when there are more, all of the shard are forgotten, and compiled again when they are asked for.
const SHARD_ANSWERS: usize = 16 * 1024;
/// Topics of which it is known when they were touched last; beyond that, everything counts as touched.
const MAX_TOPICS: usize = 64 * 1024;

/// Which answers are other than before, from one state to the next.
#[derive(Debug, Clone)]
pub enum Touched {
    /// Any may be
    All,
    /// Those about these
    Topics(BTreeSet<Topic>),
}

/// When each topic was touched last, as a generation. Cloning costs next to nothing.
#[derive(Debug, Clone, Default)]
pub struct Epochs {
    all: u64,
    topics: HashTrieMapSync<Topic, u64>,
}

impl Epochs {
    /// The epochs after `generation`, which touched these.
    pub fn after(&self, generation: u64, touched: &Touched) -> Self {
        match touched {
            Touched::Topics(topics) if self.topics.size() + topics.len() <= MAX_TOPICS => {
                let mut next = self.clone();
                for topic in topics {
                    next.topics.insert_mut(topic.clone(), generation);
                }
                next
            }
            _ => Self { all: generation, topics: HashTrieMapSync::default() },
        }
    }

    fn of(&self, topic: &Topic) -> u64 {
        self.topics.get(topic).copied().unwrap_or(self.all)
    }
}

/// Type, key, namespace and, where it counts, workload and account.
type Question = (String, Key, Client);

/// One answer as of an epoch, once it is compiled.
#[derive(Debug, Clone, Default)]
struct Slot {
    epoch: u64,
    answer: Arc<OnceLock<Option<Arc<Found>>>>,
}

/// The answers of all states.
#[derive(Debug, Default)]
pub struct Answers {
    hasher: RandomState,
    shards: [Mutex<HashMap<Question, Slot>>; SHARDS],
    compiled: AtomicU64,
}

impl Answers {
    /// How many were compiled since the start.
    pub fn compiled(&self) -> u64 {
        self.compiled.load(Ordering::Relaxed)
    }

    /// The answer to one subscription, by the catalog of the state that `epochs` is of.
    pub fn get(
        &self,
        catalog: &Catalog,
        epochs: &Epochs,
        type_url: &str,
        key: &Key,
        client: &Client,
    ) -> Option<Arc<Found>> {
        let topic = Topic::of(type_url, key, client)?;
        let epoch = epochs.of(&topic);
        let asker = match key {
            Key::SelfOf(_) => client.clone(),
            _ => {
                Client { namespace: client.namespace.clone(), workload: String::new(), service_account: String::new() }
            }
        };
        let question = (type_url.to_owned(), key.clone(), asker);
        let compute = || {
            self.compiled.fetch_add(1, Ordering::Relaxed);
            match catalog.answer(type_url, key, client) {
                Answer::Found(found) => Some(Arc::new(found)),
                Answer::Absent => None,
            }
        };
        let shard = usize::try_from(self.hasher.hash_one(&question)).unwrap_or_default() % SHARDS;
        let slot = {
            let mut shard = self.shards[shard].lock().unwrap_or_else(PoisonError::into_inner);
            if shard.len() >= SHARD_ANSWERS {
                shard.clear();
            }
            let slot = shard.entry(question).or_insert_with(|| Slot { epoch, ..Slot::default() });
            if slot.epoch < epoch {
                *slot = Slot { epoch, ..Slot::default() };
            }
            slot.clone()
        };
        if slot.epoch > epoch {
            // Asked of a state that was replaced meanwhile.
            return compute();
        }
        slot.answer.get_or_init(compute).clone()
    }
}
