//! Where requests of a rule go, remembered.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use outrigger_core::link::Weighted;

use super::attempt::Call;

/// One worker's calls: what a request needs of a rule's share is looked up once per worker and snapshot, and counted up and down by no
/// other worker.
#[derive(Debug, Default)]
pub struct Calls(RefCell<HashMap<Place, Rc<Call>, foldhash::fast::RandomState>>);

/// A rule's share, and the service asked for. What the addresses are of is held by the call.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Place {
    share: *const Weighted,
    service: *const str,
}

impl Calls {
    /// The call of a share, made if it is the first one.
    pub(super) fn get(&self, share: &Weighted, service: &Arc<str>, make: impl FnOnce() -> Call) -> Rc<Call> {
        let place = Place { share, service: Arc::as_ptr(service) };
        self.0.borrow_mut().entry(place).or_insert_with(|| Rc::new(make())).clone()
    }

    /// There is a newer snapshot.
    pub(crate) fn forget(&self) {
        self.0.borrow_mut().clear();
    }
}
