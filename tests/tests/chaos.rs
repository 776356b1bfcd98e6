//! Filters that trap, loop and leak, all at once in one proxy under load: who has none of them is served as if they were not there.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)] // helpers of tests

use std::process::{Command, Output};
use std::thread;

use outrigger_e2e::{Backend, Guest, Mesh, Proxy, until};
use serde_json::Value;

/// One service each; each has a port of the application and a filter.
const SERVICES: [&str; 5] = ["calm", "traps", "traps-open", "loops", "leaks"];
/// Requests to each of those that misbehave, over this many connections.
const REQUESTS: u32 = 1000;
const CONNECTIONS: u32 = 4;
/// What may fail, of a filter that is FailClosed: one request of each hundred and those that are in its instance at that time, and
/// what comes while the next one waits for a millisecond.
const MAY_FAIL: u32 = REQUESTS / 10;
const MEMORY_LIMIT: u64 = 4 << 20;

/// A service, and how many of its requests succeeded and failed.
type Load = (&'static str, (u32, u32));

struct Chaos {
    web: Proxy,
    app: Proxy,
    mesh: Mesh,
    _applications: Vec<Backend>,
}

/// Does this to each `nth` request of an instance, and adds `x-filter` to the others.
fn each(nth: u32, fault: &str) -> Guest {
    let check = format!(
        "(global $n (mut i32) (i32.const 0))
         (func $fault (global.set $n (i32.add (global.get $n) (i32.const 1)))
           (if (i32.eqz (i32.rem_u (global.get $n) (i32.const {nth}))) (then {fault})))"
    );
    Guest::adds("0_2_1", "x-filter", "was here").field(&check).before("request", "(call $fault)")
}

impl Chaos {
    fn start() -> Self {
        let service = |name: &str| {
            format!(
                "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: demo}}\n\
                 spec: {{selector: {{app: all}}, ports: [{{name: http, port: 80, targetPort: {name}}}]}}\n---\n"
            )
        };
        let mesh = Mesh::start_with(&SERVICES.map(service).concat(), &["--lease", "2s"]);
        let applications = SERVICES.map(|name| Backend::http([127, 0, 0, 1].into(), name));
        let mut app = mesh.proxy("app-0").labels("app=all").flag("--workers", "2");
        for (name, application) in SERVICES.iter().zip(&applications) {
            app = app.app(&format!("{name}={}/http1", application.address()));
        }
        let (app, web) = (app.start(), mesh.proxy("web-0").start());
        let quick = "restart: {backoff: 1ms, max: 1ms}";
        let rest = ["", quick, "failurePolicy: FailOpen", "failurePolicy: FailOpen", quick];
        let mut filters = String::new();
        for (name, rest) in SERVICES.iter().zip(rest) {
            each(1, "").write(&mesh.path("config").join(format!("{name}.wasm")));
            filters += &format!(
                "apiVersion: outrigger.dev/v1alpha1\nkind: WasmFilter\nmetadata: {{name: {name}, namespace: demo}}\n\
                 spec:\n  targetRefs: [{{group: \"\", kind: Service, name: {name}}}]\n  module: {{file: {name}.wasm}}\n  \
                 limits: {{memory: 4Mi}}\n  {rest}\n---\n"
            );
        }
        mesh.write("filters.yaml", &filters);
        let this = Self { web, app, mesh, _applications: applications.into() };
        for name in SERVICES {
            until(&format!("{name} is reached through its filter"), || {
                (this.web.call(name, "/").send().header("x-filter") == Some("was here")).then_some(())
            });
        }
        this
    }

    /// From now on the filters misbehave, each in its way.
    fn break_out(&self) {
        let guests = [
            each(100, "unreachable"),
            each(100, "unreachable"),
            each(50, "(loop $l (br $l))"),
            // A page of memory each, until there is no more.
            each(1, "(if (i32.eq (memory.grow (i32.const 1)) (i32.const -1)) (then unreachable))"),
        ];
        for (name, guest) in SERVICES[1..].iter().zip(&guests) {
            let digest = guest.write(&self.mesh.path("config").join(format!("{name}.wasm")));
            until("the new version serves", || {
                let row = self.row(name);
                (row["sha256"] == digest.as_str() && row["instances"] == 2).then_some(())
            });
        }
    }

    fn wrk(&self, name: &str, seconds: u32) -> String {
        let duration = format!("-d{seconds}");
        let host = format!("Host: {name}");
        let args = ["-t1", "-c4", &duration, "--latency", "--timeout", "30", "-H", &host, &self.web.url("/calm")];
        succeeded(&Command::new("wrk").args(args).output().expect("run wrk"))
    }

    /// Requests to `name`: how many were answered by 2xx, and how many by 5xx. Every one is answered.
    fn load(&self, name: &str) -> (u32, u32) {
        let (requests, connections) = (REQUESTS.to_string(), CONNECTIONS.to_string());
        let (authority, url) = (format!(":authority: {name}"), self.web.url("/load"));
        let args = ["--h1", "-n", &requests, "-c", &connections, "-t", "1", "-H", &authority, &url];
        let said = succeeded(&Command::new("h2load").args(args).output().expect("run h2load"));
        let line =
            said.lines().find_map(|line| line.strip_prefix("status codes: ")).unwrap_or_else(|| panic!("{said}"));
        let counts: Vec<u32> = line.split(", ").filter_map(|part| part.split(' ').next()?.parse().ok()).collect();
        assert_eq!(counts.iter().sum::<u32>(), REQUESTS, "{name}: each is answered: {said}");
        assert_eq!((counts[1], counts[2]), (0, 0), "{name}: {said}");
        (counts[0], counts[3])
    }

    /// The misbehaving ones at once, while `calm` is measured; what wrk said of it, and the counts.
    fn storm(&self, seconds: u32) -> (String, Vec<Load>) {
        thread::scope(|scope| {
            let loads = SERVICES[1..].iter().map(|name| (*name, scope.spawn(|| self.load(name))));
            let loads: Vec<_> = loads.collect();
            let calm = self.wrk("calm", seconds);
            (calm, loads.into_iter().map(|(name, load)| (name, load.join().unwrap())).collect())
        })
    }

    fn row(&self, name: &str) -> Value {
        let rows = self.app.admin("/filters").json();
        rows.as_array().unwrap().iter().find(|row| row["name"] == name).unwrap_or_else(|| panic!("{rows}")).clone()
    }

    /// Resident memory of the proxy, bytes.
    fn resident(&self) -> u64 {
        let rollup = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", self.app.process.id())).unwrap();
        let line = rollup.lines().find_map(|line| line.strip_prefix("Pss_Anon:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
    }
}

fn succeeded(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn p99(said: &str) -> &str {
    said.lines().find_map(|line| line.trim().strip_prefix("99%")).map_or_else(|| panic!("{said}"), str::trim)
}

#[test]
fn filters_that_trap_loop_and_leak_harm_nobody_else_under_load() {
    let mut chaos = Chaos::start();
    let seconds = std::env::var("CHAOS_SECS").ok().and_then(|text| text.parse().ok()).unwrap_or(3);
    // The same load, while every filter behaves.
    let (before, loads) = chaos.storm(seconds);
    assert!(loads.iter().all(|(_, counts)| *counts == (REQUESTS, 0)), "{loads:?}");
    chaos.break_out();
    let (calm, loads) = chaos.storm(seconds);
    // For people: a test says nothing about how fast a machine is.
    println!("p99 of calm: {} while the others behave, {} while they do not", p99(&before), p99(&calm));

    for said in [&before, &calm] {
        assert!(!said.contains("Non-2xx") && !said.contains("Socket errors"), "{said}");
    }
    for (name, (succeeded, failed)) in &loads {
        println!("{name}: {succeeded} succeeded, {failed} failed");
        match *name {
            "traps-open" | "loops" => assert_eq!(*failed, 0, "{name} goes on without its filter"),
            _ => assert!(
                (1..=MAY_FAIL).contains(failed),
                "{name}: {failed} of {REQUESTS} failed, at most {MAY_FAIL} may"
            ),
        }
    }
    assert!(chaos.app.process.is_running(), "{}", chaos.app.process.log());

    // What happened is told: by /filters, metrics, log and the control plane, with the place in the guest.
    let metrics = chaos.app.metrics();
    for name in &SERVICES[1..] {
        let row = chaos.row(name);
        assert!(row["failures"].as_u64() >= Some(1), "{row}");
        assert!(row["last_error"].as_str().unwrap().contains("; in fault+0x"), "{row}");
        let filter = format!("demo/{name}");
        assert!(metrics.sum("outrigger_filter_failures_total", &[("filter", &filter)]) >= 1.0);
    }
    assert_eq!(chaos.row("calm")["failures"], 0);
    assert!(chaos.row("loops")["timeouts"].as_u64() >= Some(1));
    assert!(chaos.row("leaks")["last_error"].as_str().unwrap().contains("limits.memory"));
    assert!(chaos.app.process.log().contains("; in fault+0x"), "the log has the backtrace");
    until("`outrigger filter status` has it", || {
        let said = chaos.mesh.outrigger(&["filter", "status"]);
        let table = String::from_utf8(said.stdout).unwrap();
        (table.contains("demo/leaks") && table.contains("; in fault+0x")).then_some(())
    });

    // Nothing piles up: what a second storm adds is no more than the leaking filter's two instances may have.
    let before = chaos.resident();
    let (calm, _) = chaos.storm(seconds);
    assert!(!calm.contains("Non-2xx") && !calm.contains("Socket errors"), "{calm}");
    let added = chaos.resident().saturating_sub(before);
    println!("memory of the proxy: {} MiB, {} KiB more after a second storm", before >> 20, added >> 10);
    assert!(added <= 2 * MEMORY_LIMIT + (8 << 20), "{added} bytes more");
    let held = chaos.app.metrics().sum("outrigger_filter_memory_bytes", &[("filter", "demo/leaks")]);
    assert!(held <= 2.0 * MEMORY_LIMIT as f64, "{held}");
}

/// Prints what a filter adds to the memory of each worker.
#[test]
fn a_filter_adds_a_bounded_amount_of_memory_per_worker() {
    const FILTERS: usize = 10;
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: app, namespace: demo}\n\
                   spec: {selector: {app: app}, ports: [{name: http, port: 80, targetPort: http}]}\n";
    for workers in [1_u64, 2] {
        let mesh = Mesh::start(service);
        let application = Backend::http([127, 0, 0, 1].into(), "app");
        let app = mesh.proxy("app-0").labels("app=app").app(&application.address());
        let app = app.flag("--workers", &workers.to_string()).start();
        let web = mesh.proxy("web-0").start();
        std::fs::copy(outrigger_e2e::example_filter("header-policy"), mesh.path("config/policy.wasm")).unwrap();
        let chaos = Chaos { web, app, mesh, _applications: vec![application] };
        let mut measured = Vec::new();
        for filters in [0, 1, FILTERS] {
            let yaml = |number: usize| {
                format!(
                    "apiVersion: outrigger.dev/v1alpha1\nkind: WasmFilter\nmetadata: {{name: f{number}, namespace: demo}}\n\
                     spec:\n  targetRefs: [{{group: \"\", kind: Service, name: app}}]\n  module: {{file: policy.wasm}}\n  \
                     configuration: {{response: {{x-f{number}: \"1\"}}}}\n---\n"
                )
            };
            chaos.mesh.write("filters.yaml", &(0..filters).map(yaml).collect::<String>());
            until("every filter serves on each worker", || {
                let rows = chaos.app.admin("/filters").json();
                let rows = rows.as_array()?;
                let serve = rows.iter().all(|row| row["instances"] == workers);
                (rows.len() == filters && serve).then_some(())
            });
            until("the service is reached", || (chaos.web.call("app", "/").send().status == 200).then_some(()));
            chaos.load("app");
            measured.push(chaos.resident());
        }
        let added = measured[2].saturating_sub(measured[1]) / (FILTERS as u64 - 1) / workers;
        let kib: Vec<u64> = measured.iter().map(|bytes| bytes >> 10).collect();
        println!(
            "{workers} workers: {kib:?} KiB with 0, 1 and {FILTERS} filters: {} KiB per filter and worker",
            added >> 10
        );
        assert!(added < 1 << 20, "{added} bytes per filter and worker; the example uses less than 1 MiB");
    }
}
