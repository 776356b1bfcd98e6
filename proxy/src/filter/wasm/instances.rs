//! The instances of each worker.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::super::Plugin;
use super::instance::Instance;

/// How long a plugin that is no longer used may put off its end.
const DRAIN: Duration = Duration::from_secs(30);

/// A plugin in an instance of this worker.
#[derive(Clone)]
pub(in super::super) struct Entered {
    pub(super) instance: Rc<Instance>,
    /// Which of the instance's plugins
    pub(super) root: usize,
}

struct Known {
    id: u64,
    /// Who uses the plugin is what says whether its instance is still wanted
    plugin: Weak<Plugin>,
    entered: Entered,
}

/// A plugin that ends.
struct Ending {
    entered: Entered,
    until: Instant,
}

#[derive(Default)]
struct Worker {
    known: Vec<Known>,
    /// Instances that several plugins may share, by what has to be equal
    shared: Vec<(Arc<str>, std::rc::Weak<Instance>)>,
    ending: Vec<Ending>,
}

thread_local! {
    static WORKER: RefCell<Worker> = RefCell::default();
}

/// This worker's instance of a plugin, started if there is none; or why there is none.
pub(super) fn acquire(plugin: &Arc<Plugin>) -> Result<Entered, String> {
    let known = WORKER.with_borrow(|worker| {
        let known = worker.known.iter().find(|known| known.id == plugin.id())?;
        (!known.entered.instance.dead()).then(|| known.entered.clone())
    });
    match known {
        Some(entered) => Ok(entered),
        None => enter(plugin),
    }
}

fn enter(plugin: &Arc<Plugin>) -> Result<Entered, String> {
    plugin.may_start(Instant::now())?;
    let shared = plugin.shared().and_then(|key| {
        WORKER.with_borrow(|worker| {
            let (_, instance) = worker.shared.iter().find(|(of, _)| of == key)?;
            instance.upgrade().filter(|instance| !instance.dead())
        })
    });
    let entered = plugin.start(shared).map_err(|failure| {
        let message = failure.message.clone();
        plugin.failed(failure.message, failure.timeout);
        message
    })?;
    entered.instance.bind(entered.root, plugin);
    WORKER.with_borrow_mut(|worker| {
        worker.known.retain(|known| known.id != plugin.id());
        worker.known.push(Known { id: plugin.id(), plugin: Arc::downgrade(plugin), entered: entered.clone() });
        worker.shared.retain(|(_, instance)| instance.upgrade().is_some_and(|instance| !instance.dead()));
        if let Some(key) = plugin.shared()
            && !worker.shared.iter().any(|(of, _)| of == key)
        {
            worker.shared.push((Arc::clone(key), Rc::downgrade(&entered.instance)));
        }
    });
    // A new version most likely replaces an old one.
    release_unused();
    Ok(entered)
}

/// Starts the calling worker's instance of a plugin ahead of the first request. Failures are counted and reported as at a request.
pub fn warm(plugin: &Arc<Plugin>) {
    let _ = acquire(plugin);
}

/// Ends the calling worker's instances of filters that no snapshot and no exchange uses any more, and returns how many it still has.
/// Workers call it after a swap, and again while they have more than the snapshot names: what another worker or an exchange held a
/// moment ago is free soon, and a filter may put off its end.
pub fn release_unused() -> usize {
    let unused: Vec<Known> = WORKER
        .with_borrow_mut(|worker| worker.known.extract_if(.., |known| known.plugin.strong_count() == 0).collect());
    let now = Instant::now();
    // Guests run here: nothing is borrowed.
    for Known { entered, .. } in unused {
        if entered.instance.dead() {
            continue;
        }
        match entered.instance.finish_root(entered.root) {
            Ok(true) => drop(entered.instance.delete_root(entered.root)),
            Ok(false) => {
                WORKER.with_borrow_mut(|worker| worker.ending.push(Ending { entered, until: now + DRAIN }));
            }
            Err(_) => {}
        }
    }
    let over = |ending: &mut Ending| {
        let Entered { instance, root } = &ending.entered;
        instance.dead() || instance.root_done(*root) || ending.until <= now
    };
    let ended: Vec<Ending> = WORKER.with_borrow_mut(|worker| worker.ending.extract_if(.., over).collect());
    for Ending { entered, .. } in &ended {
        let _ = entered.instance.delete_root(entered.root);
    }
    WORKER.with_borrow(|worker| worker.known.len() + worker.ending.len())
}
