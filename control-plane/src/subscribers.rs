//! Streams by what they subscribe to, so that a change is told to those that it concerns and to no other.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use outrigger_core::compile::Topic;
use tokio::sync::Notify;

use crate::answers::Touched;

/// A subscription: type and asked name.
pub type Asked = (&'static str, Arc<str>);

/// Every open stream, and who is to be told of what.
#[derive(Debug, Default)]
pub struct Subscribers {
    streams: Mutex<HashMap<u64, Arc<Inbox>>>,
    topics: Mutex<HashMap<Topic, BTreeSet<(u64, Asked)>>>,
}

/// What one stream has to look at again. It holds no more than the stream has subscriptions, however slow its reader is.
#[derive(Debug, Default)]
pub struct Inbox {
    pending: Mutex<Look>,
    told: Notify,
}

/// Subscriptions whose answers may be others than before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Look {
    /// All of the stream
    All,
    /// These
    At(BTreeSet<Asked>),
}

impl Default for Look {
    fn default() -> Self {
        Self::At(BTreeSet::new())
    }
}

impl Subscribers {
    /// A stream opened.
    pub fn open(&self, stream: u64) -> Arc<Inbox> {
        lock(&self.streams).entry(stream).or_default().clone()
    }

    /// A stream ended; its subscriptions are removed one by one.
    pub fn close(&self, stream: u64) {
        lock(&self.streams).remove(&stream);
    }

    /// From now on a change of the topic is one of this subscription.
    pub fn add(&self, stream: u64, topic: Topic, asked: Asked) {
        lock(&self.topics).entry(topic).or_default().insert((stream, asked));
    }

    /// And no longer.
    pub fn remove(&self, stream: u64, topic: &Topic, asked: &Asked) {
        let mut topics = lock(&self.topics);
        if let Some(of_topic) = topics.get_mut(topic) {
            of_topic.remove(&(stream, asked.clone()));
            if of_topic.is_empty() {
                topics.remove(topic);
            }
        }
    }

    /// The subscriptions that a change concerns, by stream. `None`: all of all.
    pub fn of(&self, touched: &Touched) -> Option<HashMap<u64, BTreeSet<Asked>>> {
        let Touched::Topics(touched) = touched else { return None };
        let topics = lock(&self.topics);
        let mut by_stream: HashMap<u64, BTreeSet<Asked>> = HashMap::new();
        for (stream, asked) in touched.iter().filter_map(|topic| topics.get(topic)).flatten() {
            by_stream.entry(*stream).or_default().insert(asked.clone());
        }
        Some(by_stream)
    }

    /// Tells whom a change concerns. To be called after the change can be seen.
    pub fn tell(&self, touched: &Touched) {
        let concerned = self.of(touched);
        let streams = lock(&self.streams);
        match concerned {
            None => streams.values().for_each(|inbox| inbox.put(Look::All)),
            Some(concerned) => {
                for (stream, asked) in concerned {
                    if let Some(inbox) = streams.get(&stream) {
                        inbox.put(Look::At(asked));
                    }
                }
            }
        }
    }
}

impl Inbox {
    /// Waits for something, and takes all there is. Nothing is lost when it is dropped before it returns.
    pub async fn next(&self) -> Look {
        loop {
            self.told.notified().await;
            let look = std::mem::take(&mut *lock(&self.pending));
            if look != Look::default() {
                return look;
            }
        }
    }

    fn put(&self, more: Look) {
        match (&mut *lock(&self.pending), more) {
            (Look::At(known), Look::At(more)) => known.extend(more),
            (pending, Look::All) => *pending = Look::All,
            (Look::All, Look::At(_)) => {}
        }
        self.told.notify_one();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use outrigger_proto::type_url;

    use super::*;

    fn asked(name: &str) -> Asked {
        (type_url::FILTER, name.into())
    }

    #[tokio::test]
    async fn a_change_is_told_to_its_subscribers_once_and_to_nobody_else() {
        let subscribers = Subscribers::default();
        let (one, other) = (subscribers.open(1), subscribers.open(2));
        let topic = |name: &str| Topic::Filter("demo".into(), name.into());
        subscribers.add(1, topic("a"), asked("a"));
        subscribers.add(1, topic("b"), asked("b"));
        subscribers.add(2, topic("b"), asked("b"));
        let touched = |names: &[&str]| Touched::Topics(names.iter().map(|name| topic(name)).collect());
        subscribers.tell(&touched(&["a", "none"]));
        subscribers.tell(&touched(&["b"]));
        assert_eq!(one.next().await, Look::At([asked("a"), asked("b")].into()));
        assert_eq!(other.next().await, Look::At([asked("b")].into()));
        subscribers.remove(1, &topic("b"), &asked("b"));
        assert_eq!(subscribers.of(&touched(&["b"])).unwrap().into_keys().collect::<Vec<_>>(), [2]);
        subscribers.tell(&Touched::All);
        assert_eq!(one.next().await, Look::All);
        for (stream, name) in [(1, "a"), (2, "b")] {
            subscribers.remove(stream, &topic(name), &asked(name));
            subscribers.close(stream);
        }
        assert!(lock(&subscribers.topics).is_empty() && lock(&subscribers.streams).is_empty());
    }
}
