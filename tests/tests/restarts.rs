//! What goes on while parts end and start again.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use nix::sys::signal::Signal;
use outrigger_e2e::{Shop, until};

/// Calls reviews in a loop until the closure ends; returns what failed, and how many calls there were.
fn under_load(shop: &mut Shop, act: impl FnOnce(&mut Shop, &AtomicUsize)) -> (Vec<String>, usize) {
    let (stop, calls) = (AtomicBool::new(false), AtomicUsize::new(0));
    let url = shop.web.url("/load");
    thread::scope(|scope| {
        let load = scope.spawn(|| {
            let mut failed = Vec::new();
            while !stop.load(Ordering::SeqCst) {
                let response = outrigger_e2e::Curl::get(&url).header("host", "reviews").send();
                if response.status != 200 {
                    failed.push(format!("{} {:?} {}", response.status, response.reason(), response.error));
                }
                calls.fetch_add(1, Ordering::SeqCst);
            }
            failed
        });
        let acted = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| act(shop, &calls)));
        stop.store(true, Ordering::SeqCst);
        let failed = load.join().unwrap();
        if let Err(panic) = acted {
            std::panic::resume_unwind(panic);
        }
        (failed, calls.load(Ordering::SeqCst))
    })
}

/// Waits for so many calls more.
fn more(calls: &AtomicUsize, number: usize) {
    let target = calls.load(Ordering::SeqCst) + number;
    until("calls are made", || (calls.load(Ordering::SeqCst) >= target).then_some(()));
}

#[test]
fn a_control_plane_that_dies_and_comes_back_fails_no_request() {
    let mut shop = Shop::start("");
    let (failed, calls) = under_load(&mut shop, |shop, calls| {
        more(calls, 20);
        shop.mesh.control.process.kill();
        more(calls, 50);
        shop.mesh.control.restart();
        more(calls, 50);
        until("the proxies are back", || {
            let proxies = shop.mesh.api("/api/v1/proxies");
            let connected = proxies.as_array()?.iter().filter(|proxy| proxy["connected"] == true).count();
            (connected == 3).then_some(())
        });
        more(calls, 20);
    });
    assert!(failed.is_empty(), "{} of {calls} calls failed: {failed:?}", failed.len());
}

#[test]
fn a_proxy_restarted_without_the_control_plane_serves_and_calls_a_strict_peer() {
    let mut shop = Shop::start(
        "apiVersion: outrigger.dev/v1alpha1\nkind: MtlsPolicy\nmetadata: {name: strict, namespace: demo}\n\
         spec: {mode: Strict}\n",
    );
    until("web reaches reviews", || (shop.get("/").status == 200).then_some(()));

    shop.mesh.control.process.kill();
    shop.web.process.stop();
    shop.web.restart();
    shop.proxy1.process.stop();
    shop.proxy1.restart();

    let answers: Vec<u16> = (0..20).map(|_| shop.get("/").status).collect();
    assert!(answers.iter().all(|status| *status == 200), "{answers:?}");
}

#[test]
fn an_endpoint_killed_under_load_is_retried_around() {
    let mut shop = Shop::start("");
    let (failed, calls) = under_load(&mut shop, |shop, calls| {
        more(calls, 20);
        // Its machine is gone: no drain, no word to anybody.
        shop.proxy1.process.kill();
        more(calls, 100);
    });
    assert!(failed.is_empty(), "{} of {calls} calls failed: {failed:?}", failed.len());
}

#[test]
fn a_drained_proxy_ends_well_and_no_request_fails() {
    let mut shop = Shop::start("");
    let (failed, calls) = under_load(&mut shop, |shop, calls| {
        more(calls, 20);
        shop.proxy1.process.signal(Signal::SIGTERM);
        let status = shop.proxy1.process.ended();
        assert!(status.success(), "{status}");
        more(calls, 50);
    });
    assert!(failed.is_empty(), "{} of {calls} calls failed: {failed:?}", failed.len());
}
