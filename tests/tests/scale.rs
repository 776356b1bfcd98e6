//! The control plane's work by counts, as `make bench-scale` measures it by time: in a small mesh, and in one five times its size.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use std::process::Command;

use outrigger_e2e::{binary, succeed};
use serde_json::Value;

/// Proxies subscribe to 10 of the first 100 services each: every one of those has 5 subscribers.
fn measured(services: usize) -> Value {
    let mut tool = Command::new(binary("outrigger-scale"));
    tool.arg("--control").arg(binary("outrigger-control"));
    for (flag, value) in [
        ("--proxies", 50),
        ("--services", services),
        ("--subscribed", 100),
        ("--endpoints", 4),
        ("--subscriptions", 10),
        ("--changes", 10),
        ("--signatures", 8),
    ] {
        tool.arg(flag).arg(value.to_string());
    }
    serde_json::from_str(&succeed(&mut tool)).unwrap()
}

fn count(results: &Value, phase: &str, name: &str) -> u64 {
    results[phase][name].as_u64().unwrap_or_else(|| panic!("{phase}.{name}: {results}"))
}

#[test]
fn a_change_costs_its_subscribers_and_a_reconnection_sends_nothing_again() {
    let results = measured(100);
    // What is compiled once is shared by its five subscribers, but for what each asks for itself.
    let (compiled, received) =
        (count(&results, "connect", "compiled_answers"), count(&results, "connect", "resources"));
    assert_eq!(received, 50 * 23, "{results}");
    assert!(compiled <= 2 * 100 + 50 + 3, "{results}");
    for phase in ["endpointChange", "routeChange"] {
        assert_eq!(count(&results, phase, "received"), 10 * 5, "{results}");
        assert_eq!(count(&results, phase, "pushes"), 10 * 5, "{results}");
        assert_eq!(count(&results, phase, "full_builds"), 0, "{results}");
        // One file, read once; a scan of the whole directory may come between and reads what is young again.
        assert!(count(&results, phase, "files_read") <= 10 + 400, "{results}");
        assert!(count(&results, phase, "compiled_answers") <= 2 * 10, "{results}");
        assert!(count(&results, phase, "pushed_bytes") <= 10 * 5 * 1024, "{results}");
    }
    // Only the probe that ends each proxy's questions is answered.
    assert_eq!(count(&results, "reconnect", "resources"), 0, "{results}");
    assert_eq!(count(&results, "reconnect", "pushes"), 50, "{results}");
    assert!(count(&results, "reconnect", "pushed_bytes") < 50 * 128, "{results}");
}

#[test]
fn a_larger_mesh_makes_no_change_dearer() {
    let (small, large) = (measured(100), measured(500));
    for phase in ["endpointChange", "routeChange"] {
        for name in ["compiled_answers", "pushes", "full_builds"] {
            assert_eq!(count(&small, phase, name), count(&large, phase, name), "{phase} {name}");
        }
    }
}
