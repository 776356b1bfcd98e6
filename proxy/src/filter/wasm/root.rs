//! Callbacks of root contexts: time, queues, answers to calls.

use std::rc::Rc;
use std::sync::Arc;

use super::super::Plugin;
use super::callbacks::Callbacks;
use super::callouts::Calls;
use super::headers;
use super::host::{Delivery, Host, Phase};
use super::instance::{Failure, Instance};
use super::shared::Inbox;

fn word(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

impl Instance {
    /// Names the plugin of a root context, to whom its failures are told, and begins to listen to other workers.
    pub(super) fn bind(self: &Rc<Self>, root: usize, plugin: &Arc<Plugin>) {
        let id = self.host(|host| {
            host.roots.get_mut(root).map(|root| {
                root.plugin = Arc::downgrade(plugin);
                root.id
            })
        });
        if id.flatten().is_some() {
            self.tasks.borrow_mut().listen(self);
        }
    }

    /// The plugin of a root context.
    pub(super) fn plugin(&self, id: u32) -> std::sync::Weak<Plugin> {
        let find = |host: &mut Host| host.roots.iter().find(|root| root.id == id).map(|root| root.plugin.clone());
        self.host(find).flatten().unwrap_or_default()
    }

    /// The calls that have not ended.
    pub(super) fn calls<R>(&self, f: impl FnOnce(&mut Calls) -> R) -> Option<R> {
        if self.dead() { None } else { self.host(|host| f(&mut host.calls)) }
    }

    /// Where other workers leave word.
    pub(super) fn inbox(&self) -> Option<Arc<Inbox>> {
        self.host(|host| Arc::clone(&host.inbox))
    }

    /// The plugins that wait for queues.
    pub(super) fn listeners(&self) -> Vec<std::sync::Weak<Plugin>> {
        let find = |host: &mut Host| {
            let listening = host.roots.iter().filter(|root| root.id != 0 && root.listens);
            listening.map(|root| root.plugin.clone()).collect()
        };
        self.host(find).unwrap_or_default()
    }

    /// A callback of a root context failed: the instance is dead.
    pub(super) fn report(&self, root: u32, failure: Failure) {
        if let Some(plugin) = self.plugin(root).upgrade() {
            plugin.failed(failure.message, failure.timeout);
        }
    }

    /// A callback of the root context `id`, with what it is told. Nothing if that is gone.
    fn root_call(
        &self,
        id: u32,
        delivery: Delivery,
        f: impl FnOnce(&mut wasmtime::Store<Host>, &Callbacks) -> wasmtime::Result<()>,
    ) -> Result<(), Failure> {
        let index = self.host(|host| host.roots.iter().position(|root| root.id == id)).flatten();
        let Some(index) = index else { return Ok(()) };
        Ok(self.call(id, index, Phase::Root, None, |store, callbacks| {
            store.data_mut().delivery = Some(delivery);
            f(store, callbacks)
        })?)
    }

    /// True: a plugin has used up its share of the worker's time.
    pub(super) fn over(&self, root: usize) -> bool {
        self.host(|host| host.meter(Some(root)).over()).unwrap_or(false)
    }

    /// `on_tick`, unless the plugin has no time left. False: the instance is dead.
    pub(super) fn tick(&self, root: u32) -> bool {
        if self.dead() {
            return false;
        }
        let index = self.host(|host| host.roots.iter().position(|known| known.id == root)).flatten();
        if index.is_none_or(|index| self.over(index)) {
            return true;
        }
        let result = self.root_call(root, Delivery::default(), |store, callbacks| {
            callbacks.root.tick.as_ref().map_or(Ok(()), |tick| tick.call(store, root))
        });
        match result {
            Ok(()) => true,
            Err(failure) => {
                self.report(root, failure);
                false
            }
        }
    }

    /// `on_queue_ready`.
    pub(super) fn queue_ready(&self, root: u32, queue: u32) {
        if self.dead() {
            return;
        }
        let result = self.root_call(root, Delivery::default(), |store, callbacks| {
            callbacks.root.queue_ready.as_ref().map_or(Ok(()), |ready| ready.call(store, (root, queue)))
        });
        if let Err(failure) = result {
            self.report(root, failure);
        }
    }

    /// `on_http_call_response`.
    pub(super) fn http_answer(&self, root: u32, call: u32, delivery: Delivery) -> Result<(), Failure> {
        let count = delivery.head.as_ref().map_or(0, |head| word(headers::Head::count(head)));
        let size = delivery.body.as_ref().map_or(0, |(_, body)| word(body.len()));
        let trailers = delivery.fields.as_ref().map_or(0, |(_, fields)| word(fields.len()));
        self.root_call(root, delivery, |store, callbacks| match &callbacks.root.http_answer {
            Some(answer) => answer.call(store, (root, call, count, size, trailers)),
            None => Ok(()),
        })
    }

    /// `on_grpc_receive_initial_metadata` (map 4) or `on_grpc_receive_trailing_metadata` (map 5).
    pub(super) fn grpc_metadata(&self, root: u32, call: u32, map: u32, delivery: Delivery) -> Result<(), Failure> {
        let count = delivery.fields.as_ref().map_or(0, |(_, fields)| word(fields.len()));
        self.root_call(root, delivery, |store, callbacks| {
            let callback = if map == 4 { &callbacks.root.grpc_initial } else { &callbacks.root.grpc_trailing };
            callback.as_ref().map_or(Ok(()), |callback| callback.call(store, (root, call, count)))
        })
    }

    /// `on_grpc_receive`.
    pub(super) fn grpc_message(&self, root: u32, call: u32, delivery: Delivery) -> Result<(), Failure> {
        let size = delivery.body.as_ref().map_or(0, |(_, body)| word(body.len()));
        self.root_call(root, delivery, |store, callbacks| {
            callbacks.root.grpc_message.as_ref().map_or(Ok(()), |callback| callback.call(store, (root, call, size)))
        })
    }

    /// `on_grpc_close`.
    pub(super) fn grpc_close(&self, root: u32, call: u32, code: u32, delivery: Delivery) -> Result<(), Failure> {
        self.root_call(root, delivery, |store, callbacks| {
            callbacks.root.grpc_close.as_ref().map_or(Ok(()), |callback| callback.call(store, (root, call, code)))
        })
    }
}
