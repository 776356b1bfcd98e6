//! What instances share: data with compare-and-swap, and queues. One [`Vm`] per namespace and `vm.id`, of all workers; it goes
//! with the last filter that names it.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use bytes::Bytes;
use tokio::sync::Notify;

use super::abi::Status;

/// Locks of a [`Vm`]'s data: what one worker does there seldom meets another's.
const SHARDS: usize = 16;
/// Entries of a VM's data, and its queues.
const ENTRIES: usize = 65_536;
const QUEUES: usize = 256;
/// Items that wait in one queue.
const QUEUE_ITEMS: usize = 4096;
/// Longest name of a key or a queue, bytes.
const NAME: usize = 4096;
/// What an entry costs beside its bytes.
const OVERHEAD: usize = 64;
/// Notices that wait for one instance.
const NOTICES: usize = 4096;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Every VM of the process.
#[derive(Debug, Default)]
pub(super) struct Vms {
    known: Mutex<HashMap<(String, String), Weak<Vm>>>,
}

impl Vms {
    /// The VM of this id in a namespace. Filters without an id share with nobody: `own` names theirs.
    pub(super) fn join(self: &Arc<Self>, namespace: &str, id: &str, own: &str) -> Arc<Vm> {
        // No name of a filter has a NUL in it, so that no written id can be another filter's own.
        let id = if id.is_empty() { format!("\0{own}") } else { id.to_owned() };
        let mut known = lock(&self.known);
        known.retain(|_, vm| vm.strong_count() > 0);
        let key = (namespace.to_owned(), id);
        if let Some(vm) = known.get(&key).and_then(Weak::upgrade) {
            return vm;
        }
        let vm = Arc::new(Vm::new(namespace.to_owned(), Arc::downgrade(self)));
        known.insert(key, Arc::downgrade(&vm));
        vm
    }

    fn find(&self, namespace: &str, id: &str) -> Option<Arc<Vm>> {
        lock(&self.known).get(&(namespace.to_owned(), id.to_owned())).and_then(Weak::upgrade)
    }
}

/// A value of shared data and its version, which is never 0.
pub(super) type Entry = (Bytes, u32);

/// The data and the queues of one id.
#[derive(Debug)]
pub(super) struct Vm {
    namespace: String,
    all: Weak<Vms>,
    hasher: RandomState,
    data: [Mutex<HashMap<Box<[u8]>, Entry>>; SHARDS],
    entries: AtomicUsize,
    /// Bytes of data and of items in queues
    bytes: AtomicUsize,
    queues: Mutex<HashMap<Box<[u8]>, Arc<Queue>>>,
}

impl Vm {
    fn new(namespace: String, all: Weak<Vms>) -> Self {
        Self {
            namespace,
            all,
            hasher: RandomState::new(),
            data: std::array::from_fn(|_| Mutex::default()),
            entries: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            queues: Mutex::default(),
        }
    }

    /// One that nobody else knows: for trying a filter out.
    pub(super) fn alone() -> Arc<Self> {
        Arc::new(Self::new(String::new(), Weak::new()))
    }

    fn shard(&self, key: &[u8]) -> MutexGuard<'_, HashMap<Box<[u8]>, Entry>> {
        let index = usize::try_from(self.hasher.hash_one(key) % SHARDS as u64).unwrap_or_default();
        lock(self.data.get(index).unwrap_or(&self.data[0]))
    }

    /// A value and its version.
    pub(super) fn get(&self, key: &[u8]) -> Result<Entry, Status> {
        self.shard(key).get(key).cloned().ok_or(Status::NotFound)
    }

    /// Sets a value, if `cas` is 0, or the version that is there, or there is nothing. `limit`: bytes that this VM may hold.
    pub(super) fn set(&self, key: &[u8], value: &[u8], cas: u32, limit: usize) -> Result<(), Status> {
        if key.len() > NAME {
            return Err(Status::BadArgument);
        }
        let mut shard = self.shard(key);
        if let Some((old, version)) = shard.get_mut(key) {
            if cas != 0 && cas != *version {
                return Err(Status::CasMismatch);
            }
            self.charge(value.len(), old.len(), limit)?;
            *old = Bytes::copy_from_slice(value);
            *version = version.wrapping_add(1).max(1);
            return Ok(());
        }
        if self.entries.load(Ordering::Relaxed) >= ENTRIES {
            return Err(Status::InternalFailure);
        }
        self.charge(key.len() + value.len() + OVERHEAD, 0, limit)?;
        self.entries.fetch_add(1, Ordering::Relaxed);
        shard.insert(key.into(), (Bytes::copy_from_slice(value), 1));
        Ok(())
    }

    fn charge(&self, more: usize, less: usize, limit: usize) -> Result<(), Status> {
        let change = |bytes: usize| {
            let sum = bytes.saturating_sub(less).saturating_add(more);
            (sum <= limit || more <= less).then_some(sum)
        };
        let charged = self.bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, change);
        charged.map(drop).map_err(|_| Status::InternalFailure)
    }

    /// Bytes of data and of items that wait in queues.
    #[cfg(test)]
    fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// The queue of a name, made if there is none. `inbox` is told of items from now on.
    pub(super) fn register(self: &Arc<Self>, name: &[u8], inbox: &Arc<Inbox>, root: u32) -> Result<u32, Status> {
        if name.len() > NAME {
            return Err(Status::BadArgument);
        }
        let mut queues = lock(&self.queues);
        if queues.len() >= QUEUES && !queues.contains_key(name) {
            return Err(Status::InternalFailure);
        }
        let queue = queues.entry(name.into()).or_insert_with(|| Queue::new(self));
        let mut state = lock(&queue.state);
        state
            .owners
            .retain(|(owner, of)| owner.strong_count() > 0 && !(owner.ptr_eq(&Arc::downgrade(inbox)) && *of == root));
        state.owners.push((Arc::downgrade(inbox), root));
        Ok(queue.id)
    }

    /// A root context is gone: it is told of nothing more.
    pub(super) fn unregister(&self, inbox: &Arc<Inbox>, root: u32) {
        let gone = Arc::downgrade(inbox);
        for queue in lock(&self.queues).values() {
            lock(&queue.state).owners.retain(|(owner, of)| !(owner.ptr_eq(&gone) && *of == root));
        }
    }

    /// The id of a queue of some VM of this one's namespace; no VM id: of this one.
    pub(super) fn resolve(&self, vm_id: &str, name: &[u8]) -> Result<u32, Status> {
        let id = |vm: &Self| lock(&vm.queues).get(name).map(|queue| queue.id).ok_or(Status::NotFound);
        if vm_id.is_empty() {
            return id(self);
        }
        let vm = self.all.upgrade().and_then(|all| all.find(&self.namespace, vm_id)).ok_or(Status::NotFound)?;
        id(&vm)
    }

    /// A queue of this VM, or of another one of its namespace, by its id.
    fn queue(&self, id: u32) -> Result<Arc<Queue>, Status> {
        let own = lock(&self.queues).values().find(|queue| queue.id == id).cloned();
        let found = own.or_else(|| {
            let all = self.all.upgrade()?;
            let vms: Vec<_> = lock(&all.known)
                .iter()
                .filter(|((namespace, _), _)| *namespace == self.namespace)
                .filter_map(|(_, vm)| vm.upgrade())
                .collect();
            vms.iter().find_map(|vm| lock(&vm.queues).values().find(|queue| queue.id == id).cloned())
        });
        found.ok_or(Status::NotFound)
    }

    /// Appends an item and tells who registered the queue last and still lives.
    pub(super) fn enqueue(&self, id: u32, item: &[u8], limit: usize) -> Result<(), Status> {
        let queue = self.queue(id)?;
        let vm = queue.vm.upgrade().ok_or(Status::NotFound)?;
        let mut state = lock(&queue.state);
        if state.items.len() >= QUEUE_ITEMS {
            return Err(Status::InternalFailure);
        }
        vm.charge(item.len() + OVERHEAD, 0, limit)?;
        state.items.push_back(Bytes::copy_from_slice(item));
        while let Some((owner, root)) = state.owners.last() {
            if let Some(inbox) = owner.upgrade().filter(|inbox| !inbox.closed.load(Ordering::Acquire)) {
                inbox.notify(*root, id);
                break;
            }
            state.owners.pop();
        }
        Ok(())
    }

    /// Takes the oldest item.
    pub(super) fn dequeue(&self, id: u32) -> Result<Bytes, Status> {
        let queue = self.queue(id)?;
        let item = lock(&queue.state).items.pop_front().ok_or(Status::Empty)?;
        if let Some(vm) = queue.vm.upgrade() {
            vm.charge(0, item.len() + OVERHEAD, usize::MAX)?;
        }
        Ok(item)
    }
}

/// First in, first out.
#[derive(Debug)]
struct Queue {
    id: u32,
    vm: Weak<Vm>,
    state: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    items: VecDeque<Bytes>,
    /// Who registered it, and as which root context; the last is told
    owners: Vec<(Weak<Inbox>, u32)>,
}

impl Queue {
    fn new(vm: &Arc<Vm>) -> Arc<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        Arc::new(Self { id, vm: Arc::downgrade(vm), state: Mutex::default() })
    }
}

/// Where other threads leave word for an instance.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    notices: Mutex<VecDeque<(u32, u32)>>,
    /// Rings after each notice, and at the end
    pub(super) bell: Notify,
    /// The instance has ended
    closed: AtomicBool,
}

impl Inbox {
    fn notify(&self, root: u32, queue: u32) {
        let mut notices = lock(&self.notices);
        if notices.len() < NOTICES {
            notices.push_back((root, queue));
        }
        drop(notices);
        self.bell.notify_one();
    }

    /// Nobody hears it any more.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.bell.notify_one();
    }

    /// The next queue that has something: the root context to tell, and the queue's id.
    pub(super) fn next(&self) -> Option<(u32, u32)> {
        lock(&self.notices).pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: usize = 1 << 20;

    fn two() -> (Arc<Vms>, Arc<Vm>, Arc<Vm>) {
        let vms = Arc::<Vms>::default();
        let (a, b) = (vms.join("demo", "a", "f"), vms.join("demo", "b", "g"));
        (vms, a, b)
    }

    #[test]
    fn c75_compare_and_swap_loses_no_increment() {
        let (_vms, vm, _) = two();
        let add = |vm: &Vm| loop {
            let (value, cas) = vm.get(b"n").unwrap_or((Bytes::from_static(&[0; 4]), 0));
            let n = u32::from_le_bytes(value[..].try_into().unwrap()) + 1;
            match vm.set(b"n", &n.to_le_bytes(), cas, LIMIT) {
                Ok(()) => break,
                Err(status) => assert_eq!(status, Status::CasMismatch),
            }
        };
        // Without this the first writers would not compare: nothing was there yet.
        vm.set(b"n", &[0; 4], 0, LIMIT).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..1000).for_each(|_| add(&vm)));
            }
        });
        assert_eq!(vm.get(b"n").unwrap().0[..], 4000u32.to_le_bytes());
    }

    #[test]
    fn c75_versions() {
        let (_vms, vm, _) = two();
        assert_eq!(vm.get(b"k"), Err(Status::NotFound));
        // Of a key that is not there the version does not count.
        vm.set(b"k", b"1", 77, LIMIT).unwrap();
        let (_, first) = vm.get(b"k").unwrap();
        assert_ne!(first, 0);
        assert_eq!(vm.set(b"k", b"2", first + 1, LIMIT), Err(Status::CasMismatch));
        vm.set(b"k", b"2", first, LIMIT).unwrap();
        let (_, second) = vm.get(b"k").unwrap();
        assert_ne!(first, second);
        vm.set(b"k", b"3", 0, LIMIT).unwrap();
        assert_eq!(vm.get(b"k").unwrap().0, "3");
    }

    #[test]
    fn c76_ids_and_namespaces_are_apart_and_end_with_their_last_user() {
        let (vms, a, b) = two();
        a.set(b"k", b"1", 0, LIMIT).unwrap();
        assert!(Arc::ptr_eq(&a, &vms.join("demo", "a", "other")));
        for other in [&b, &vms.join("else", "a", "f"), &vms.join("demo", "", "a"), &vms.join("demo", "", "f")] {
            assert_eq!(other.get(b"k"), Err(Status::NotFound));
        }
        drop(a);
        assert_eq!(vms.join("demo", "a", "f").get(b"k"), Err(Status::NotFound));
    }

    #[test]
    fn data_and_queues_are_bounded_together() {
        let (_vms, vm, _) = two();
        let id = vm.register(b"q", &Arc::default(), 1).unwrap();
        vm.set(b"k", &[0; 500], 0, 1000).unwrap();
        assert_eq!(vm.set(b"l", &[0; 500], 0, 1000), Err(Status::InternalFailure));
        assert_eq!(vm.enqueue(id, &[0; 500], 1000), Err(Status::InternalFailure));
        // What shrinks always fits.
        vm.set(b"k", b"", 0, 10).unwrap();
        vm.enqueue(id, &[0; 500], 1000).unwrap();
        vm.dequeue(id).unwrap();
        assert_eq!(vm.bytes(), 1 + OVERHEAD);
        assert_eq!(vm.set(&[0; NAME + 1], b"", 0, LIMIT), Err(Status::BadArgument));
        for _ in 0..QUEUE_ITEMS {
            vm.enqueue(id, b"", LIMIT).unwrap();
        }
        assert_eq!(vm.enqueue(id, b"", LIMIT), Err(Status::InternalFailure));
    }

    #[test]
    fn c77_queues_are_first_in_first_out_and_tell_who_registered_last() {
        let (_vms, a, b) = two();
        let (first, second) = (Arc::<Inbox>::default(), Arc::<Inbox>::default());
        let id = a.register(b"q", &first, 1).unwrap();
        assert_eq!(a.register(b"q", &second, 2), Ok(id));
        assert_eq!(a.resolve("", b"q"), Ok(id));
        assert_eq!(b.resolve("a", b"q"), Ok(id));
        for (vm_id, name) in [("a", &b"p"[..]), ("b", b"q"), ("c", b"q"), ("", b"q")] {
            assert_eq!(b.resolve(vm_id, name), Err(Status::NotFound), "{vm_id}");
        }
        b.enqueue(id, b"1", LIMIT).unwrap();
        b.enqueue(id, b"2", LIMIT).unwrap();
        assert_eq!(
            (first.next(), second.next(), second.next(), second.next()),
            (None, Some((2, id)), Some((2, id)), None)
        );
        second.close();
        // The instance that registered last is gone: the one before it is told.
        b.enqueue(id, b"3", LIMIT).unwrap();
        assert_eq!(first.next(), Some((1, id)));
        for item in ["1", "2", "3"] {
            assert_eq!(a.dequeue(id).unwrap(), item);
        }
        assert_eq!(a.dequeue(id), Err(Status::Empty));
        a.unregister(&first, 1);
        b.enqueue(id, b"4", LIMIT).unwrap();
        assert_eq!((first.next(), second.next()), (None, None), "nobody is left to be told");
        a.dequeue(id).unwrap();
        assert_eq!((a.dequeue(0), a.enqueue(0, b"", LIMIT)), (Err(Status::NotFound), Err(Status::NotFound)));
        assert_eq!(Vm::alone().dequeue(id), Err(Status::NotFound));
    }
}
