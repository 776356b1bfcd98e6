//! `outrigger filter inspect`, `new`, `build`, `run`, `bench`: what an author of filters uses, with no mesh.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use nix::sys::signal::Signal;
use outrigger_e2e::{Address, Backend, Curl, Guest, Process, Response, binary, example_filter, until};
use serde_json::Value;
use tempfile::TempDir;

/// `outrigger filter …` in a directory.
fn filter(directory: &Path, args: &[&str]) -> Output {
    // Libraries of filters are built once, for the examples and for these.
    let cargo = example_filter("header-policy").with_file_name("cargo");
    let mut command = Command::new(binary("outrigger"));
    command.arg("filter").args(args).current_dir(directory).env("CARGO_TARGET_DIR", cargo).output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

#[test]
fn inspect_tells_what_a_module_is_made_of() {
    let directory = TempDir::new().unwrap();
    Guest::adds("0_2_1", "x-tag", "1").write(&directory.path().join("f.wasm"));
    let table = filter(directory.path(), &["inspect", "f.wasm"]);
    assert!(table.status.success(), "{table:?}");
    for part in ["Proxy-Wasm 0.2.1", "env.proxy_add_header_map_value", "proxy_on_request_headers", "loads         yes"]
    {
        assert!(text(&table.stdout).contains(part), "{part}: {}", text(&table.stdout));
    }
    let found = json(&filter(directory.path(), &["inspect", "f.wasm", "-o", "json"]));
    assert_eq!((&found["loads"], &found["abi"]), (&true.into(), &"0.2.1".into()), "{found}");
    assert_eq!(found["memory"]["initial"], 4 * 65536, "{found}");
    assert!(found["compileMs"].as_f64().unwrap() > 0.0, "{found}");
    assert!(found["imports"].as_array().unwrap().iter().all(|import| import["served"] == true), "{found}");
    assert!(found["sections"].as_array().unwrap().iter().any(|section| section["name"] == "code"), "{found}");
}

#[test]
fn inspect_refuses_what_a_proxy_refuses_and_says_why() {
    let directory = TempDir::new().unwrap();
    let trap = "(func (export \"_initialize\") unreachable)";
    let modules = [
        ("version.wasm", Guest::new("0_3_0"), "another version of the ABI"),
        ("import.wasm", Guest::new("0_2_1").import("teleport", 2), "proxy_teleport"),
        ("trap.wasm", Guest::new("0_2_1").field(trap), "unreachable"),
    ];
    for (name, guest, why) in modules {
        guest.write(&directory.path().join(name));
        let refused = filter(directory.path(), &["inspect", name]);
        assert_eq!(refused.status.code(), Some(1), "{refused:?}");
        let line = text(&refused.stdout).lines().find(|line| line.starts_with("refused")).unwrap_or_default();
        assert!(line.contains(why), "{name}: {}", text(&refused.stdout));
    }
    let found = json(&filter(directory.path(), &["inspect", "import.wasm", "-o", "json"]));
    let missing: Vec<&Value> =
        found["imports"].as_array().unwrap().iter().filter(|import| import["served"] == false).collect();
    assert!(matches!(missing[..], [import] if import["name"] == "proxy_teleport"), "{found}");
    assert_eq!(found["loads"], false);

    std::fs::write(directory.path().join("text.wasm"), "no module").unwrap();
    let refused = filter(directory.path(), &["inspect", "text.wasm"]);
    assert!(!refused.status.success() && text(&refused.stdout).contains("not a WebAssembly module"), "{refused:?}");
}

#[test]
fn inspect_tries_a_configuration() {
    let directory = TempDir::new().unwrap();
    // Refuses any configuration that is longer than 4 bytes.
    let picky =
        "(func (export \"proxy_on_configure\") (param i32 i32) (result i32) (i32.le_u (local.get 1) (i32.const 4)))";
    Guest::new("0_2_1").field(picky).write(&directory.path().join("f.wasm"));
    assert!(filter(directory.path(), &["inspect", "f.wasm"]).status.success());
    assert!(filter(directory.path(), &["inspect", "f.wasm", "--configuration", "abc"]).status.success());
    let refused = filter(directory.path(), &["inspect", "f.wasm", "--configuration", "too long"]);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert!(text(&refused.stdout).contains("on_configure"), "{refused:?}");
}

/// Makes a project, builds it, and looks at what came of it.
fn made(language: &str) -> TempDir {
    let directory = TempDir::new().unwrap();
    let new = filter(directory.path(), &["new", "my-filter", "--lang", language]);
    assert!(new.status.success(), "{new:?}");
    let project = directory.path().join("my-filter");
    let built = filter(&project, &["build", "-o", "json"]);
    assert!(built.status.success(), "{built:?}");
    assert_eq!(json(&built)[0]["size"], std::fs::metadata(project.join("build/my_filter.wasm")).unwrap().len());
    let greeting = ["--configuration", "{\"greeting\": \"hello\"}"];
    let loads = filter(&project, &[&["inspect", "build/my_filter.wasm"], &greeting[..]].concat());
    assert!(loads.status.success(), "{loads:?}");
    let tested = filter(&project, &["test"]);
    assert!(tested.status.success() && text(&tested.stdout).contains("4 passed"), "{tested:?}");
    let refused =
        filter(&project, &["inspect", "build/my_filter.wasm", "--configuration", "{\"greetings\": \"hello\"}"]);
    assert!(!refused.status.success() && text(&refused.stderr).contains("unknown field `greetings`"), "{refused:?}");
    directory
}

#[test]
fn a_new_filter_in_rust_builds_and_passes_its_cases() {
    let directory = made("rust");
    // What is there is not written over.
    let again = filter(directory.path(), &["new", "my-filter"]);
    assert!(!again.status.success() && text(&again.stderr).contains("nothing was written"), "{again:?}");
}

#[test]
fn a_new_filter_in_assemblyscript_builds_and_passes_its_cases() {
    made("assemblyscript");
}

#[test]
fn names_that_no_tool_takes_and_directories_without_a_filter_are_refused() {
    let directory = TempDir::new().unwrap();
    for name in ["My", "a/b", "../a", "self"] {
        let refused = filter(directory.path(), &["new", name]);
        assert!(!refused.status.success(), "{name}: {refused:?}");
    }
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    let nothing = filter(directory.path(), &["build"]);
    assert!(!nothing.status.success() && text(&nothing.stderr).contains("no Cargo.toml"), "{nothing:?}");
    // What does not compile is no module, and the compiler says why.
    std::fs::write(directory.path().join("broken.c"), "int main(void) { return nothing; }").unwrap();
    let broken = filter(directory.path(), &["build"]);
    assert!(!broken.status.success() && text(&broken.stderr).contains("nothing"), "{broken:?}");
    assert!(!text(&broken.stdout).contains("built"), "{broken:?}");
}

/// `outrigger filter run` in front of an application.
struct Running {
    process: Process,
    at: SocketAddr,
    application: Backend,
    directory: TempDir,
    _address: Address,
}

impl Running {
    fn start(module: &Guest, more: &[&str]) -> Self {
        Self::start_with(&module.wasm(), more)
    }

    fn start_with(module: &[u8], more: &[&str]) -> Self {
        let address = Address::claim();
        let application = Backend::http([127, 0, 0, 1].into(), "app");
        let directory = TempDir::new().unwrap();
        std::fs::write(directory.path().join("f.wasm"), module).unwrap();
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut command = Command::new(binary("outrigger"));
        let upstream = format!("http://{}", application.address());
        command.args(["filter", "run", "f.wasm", "--upstream", &upstream, "--port", &port.port().to_string()]);
        command.args(more).current_dir(directory.path());
        let process = Process::start("filter-run", command, directory.path());
        let mut this = Self { process, at: port, application, directory, _address: address };
        this.says("serving http://");
        this
    }

    fn says(&mut self, line: &str) {
        until(&format!("it says {line:?}"), || {
            assert!(self.process.is_running(), "it ended: {}", self.process.log());
            self.process.log().contains(line).then_some(())
        });
    }

    fn get(&self, path: &str) -> Response {
        Curl::get(&format!("http://{}{path}", self.at)).send()
    }
}

#[test]
fn run_serves_a_filter_and_loads_it_anew_when_it_changes() {
    let mut running = Running::start(&Guest::adds("0_2_1", "x-version", "one"), &[]);
    let response = running.get("/a?b=c");
    assert_eq!((response.status, response.header("x-version")), (200, Some("one")), "{response:?}");
    let requests = running.application.requests();
    assert_eq!((requests[0].path.as_str(), requests[0].header("x-version")), ("/a?b=c", Some("one")));

    let file = running.directory.path().join("f.wasm");
    Guest::adds("0_2_1", "x-version", "two").write(&file);
    running.says("): serves");
    assert_eq!(running.get("/").header("x-version"), Some("two"));

    std::fs::write(&file, "no module").unwrap();
    running.says("the one before serves on: not a WebAssembly module");
    assert_eq!(running.get("/").header("x-version"), Some("two"));
    // Nothing of calls where nobody asked.
    assert!(!running.process.log().contains("proxy_on_"), "{}", running.process.log());

    running.process.signal(Signal::SIGINT);
    assert!(running.process.ended().success());
}

#[test]
fn run_shows_the_log_and_with_trace_every_call() {
    let mut guest = Guest::new("0_2_1").import("remove_header_map_value", 3).import("send_local_response", 8);
    let (line, key, value) = (guest.text("from the guest"), guest.text("x-tag"), guest.text("one"));
    let (path, found) = (guest.text(":path"), "(i32.const 900) (i32.const 904)");
    let guest = guest.on_headers(
        "request",
        &format!(
            "(drop (call $log (i32.const 3) {line}))\n(drop (call $get_header_map_value (i32.const 0) {path} {found}))\n\
             (drop (call $add_header_map_value (i32.const 0) {key} {value}))\n\
             (drop (call $remove_header_map_value (i32.const 99) {key}))"
        ),
    );
    let mut running = Running::start(&guest, &["--trace"]);
    assert_eq!(running.get("/here").status, 200);
    assert_eq!(running.application.requests()[0].header("x-tag"), Some("one"), "traced calls do what they do");
    for line in [
        "filter warn  from the guest",
        "proxy_on_request_headers(headers: ",
        "proxy_log(warn, \"from the guest\") → Ok",
        "proxy_get_header_map_value(request headers, \":path\") → Ok \"/here\"",
        "proxy_add_header_map_value(request headers, \"x-tag\", value: \"one\") → Ok",
        "proxy_remove_header_map_value(99, \"x-tag\") → BadArgument",
    ] {
        running.says(line);
    }
}

#[test]
fn run_refuses_what_a_proxy_refuses_and_servers_that_it_cannot_reach_plainly() {
    let directory = TempDir::new().unwrap();
    Guest::new("0_3_0").write(&directory.path().join("f.wasm"));
    let refused = filter(directory.path(), &["run", "f.wasm", "--upstream", "http://127.0.0.1:1"]);
    assert!(!refused.status.success() && text(&refused.stderr).contains("0_3_0"), "{refused:?}");
    let refused = filter(directory.path(), &["run", "f.wasm", "--upstream", "https://127.0.0.1:1"]);
    assert!(!refused.status.success() && text(&refused.stderr).contains("TLS"), "{refused:?}");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let refused = filter(directory.path(), &["run", "f.wasm", "--upstream", "http://127.0.0.1:1", "--port", &port]);
    assert!(!refused.status.success() && text(&refused.stderr).contains(&format!("--port {port}")), "{refused:?}");
}

#[test]
fn a_traced_trap_is_told_and_goes_by_the_policy() {
    let mut running =
        Running::start(&Guest::new("0_2_1").on_headers("request", "unreachable"), &["--trace", "--fail-open"]);
    assert_eq!(running.get("/").status, 200, "--fail-open");
    running.says("proxy_on_request_headers → trap: ");
}

/// Runs an example's own cases.
fn passes_its_cases(name: &str) {
    let modules = example_filter(name).parent().unwrap().display().to_string();
    let cases = concat!(env!("CARGO_MANIFEST_DIR"), "/../filters/").to_owned() + name;
    let tested = filter(Path::new("."), &["test", &cases, "--modules", &modules]);
    assert!(tested.status.success(), "{}", text(&tested.stdout));
}

#[test]
fn the_examples_in_other_languages_pass_their_cases() {
    passes_its_cases("request-id");
    passes_its_cases("maintenance");
}

#[test]
fn the_example_in_assemblyscript_makes_ids_for_the_application_and_the_client() {
    let module = std::fs::read(example_filter("request-id")).unwrap();
    let mut running = Running::start_with(&module, &[]);
    let id = |response: &Response| response.header("x-request-id").unwrap_or_default().to_owned();
    let ids = [id(&running.get("/")), id(&running.get("/"))];
    assert!(ids[0].len() == 32 && ids[0].chars().all(|c| c.is_ascii_hexdigit()), "{ids:?}");
    assert_ne!(ids[0], ids[1]);
    let requests = running.application.requests();
    assert_eq!(
        requests.iter().map(|request| request.header("x-request-id")).collect::<Vec<_>>(),
        [Some(ids[0].as_str()), Some(ids[1].as_str())]
    );
    // What a guest may not send through: an id that could confuse a log.
    let forged = Curl::get(&format!("http://{}/", running.at)).header("x-request-id", "a b").send();
    assert_eq!(id(&forged).len(), 32, "{forged:?}");
    // It gives back what it takes: many requests, and no more memory.
    let memory = |running: &mut Running| {
        let line = running.process.log().lines().find(|line| line.contains("/filters")).unwrap().to_owned();
        let rows =
            Curl::get(line.split_whitespace().find(|word| word.contains("/filters")).unwrap().trim_end_matches(','));
        rows.send().json()[0]["memory_bytes"].as_u64().unwrap()
    };
    let before = memory(&mut running);
    let url = format!("http://{}/[1-2000]", running.at);
    let many = Command::new("curl").args(["--silent", "--output", "/dev/null", &url]).status().unwrap();
    assert!(many.success());
    assert!(memory(&mut running) <= before.max(1 << 17) * 2, "{before} → {}", memory(&mut running));
}

#[test]
fn the_example_in_c_closes_paths() {
    let module = std::fs::read(example_filter("maintenance")).unwrap();
    let running =
        Running::start_with(&module, &["--configuration", "path /checkout\nmessage Back soon.\nretry-after 60"]);
    let closed = running.get("/checkout/1");
    assert_eq!((closed.status, closed.body.as_str(), closed.header("retry-after")), (503, "Back soon.", Some("60")));
    assert_eq!(running.get("/").status, 200);
    assert_eq!(running.application.count(), 1);
}

#[test]
fn bench_measures_beside_an_empty_filter_and_a_baseline() {
    let directory = TempDir::new().unwrap();
    let file = directory.path().join("f.wasm");
    Guest::adds("0_2_1", "x-tag", "1").write(&file);
    let quick = ["--requests", "100", "--rounds", "2"];
    let first =
        filter(directory.path(), &[&["bench", "f.wasm", "--save", "first.json", "-o", "json"], &quick[..]].concat());
    assert!(first.status.success(), "{first:?}");
    let costs = &json(&first)["measured"];
    let allocations = |of: &str| costs[of]["allocations"].as_f64().unwrap();
    assert!(allocations("filter") > allocations("empty"), "it adds headers: {costs}");
    assert_eq!(costs["filter"]["memoryBytes"], 4 * 65536, "{costs}");
    assert!(costs["filter"]["p50Ns"].as_u64() > Some(0), "{costs}");

    // Another version, beside the first: it does twice as much, and has other memory.
    let twice = Guest::adds("0_2_1", "x-tag", "1").before("response", "(drop (memory.grow (i32.const 1)))");
    twice.write(&file);
    let second = filter(directory.path(), &[&["bench", "f.wasm", "--baseline", "first.json"], &quick[..]].concat());
    let table = text(&second.stdout);
    assert!(second.status.success() && table.contains("BASELINE") && table.contains("CHANGE"), "{second:?}");
    let memory = table.lines().find(|line| line.starts_with("memory")).unwrap();
    assert!(memory.contains("256.0 KiB") && memory.contains('+'), "{table}");

    // The requests of cases: one of ten headers costs more than one of none.
    let cases = |headers: &str| {
        let text = format!("cases:\n- name: a\n  steps:\n  - request: {{headers: {headers}}}\n");
        std::fs::write(directory.path().join("cases.yaml"), text).unwrap();
        let args = ["bench", "f.wasm", "--cases", "cases.yaml", "-o", "json"];
        let run = filter(directory.path(), &[&args, &quick[..]].concat());
        assert!(run.status.success(), "{run:?}");
        json(&run)["measured"]["empty"]["allocations"].as_f64().unwrap()
    };
    let many: Vec<String> = (0..40).map(|n| format!("\"x-{n}: 1\"")).collect();
    assert!(cases(&format!("[{}]", many.join(", "))) >= cases("[]"));

    // What cannot be measured is said.
    Guest::new("0_2_1").on_headers("request", "unreachable").write(&file);
    let trap = filter(directory.path(), &["bench", "f.wasm"]);
    assert!(!trap.status.success() && text(&trap.stderr).contains("the filter failed"), "{trap:?}");
    let no = filter(directory.path(), &["bench", "f.wasm", "--baseline", "f.wasm"]);
    assert!(!no.status.success() && text(&no.stderr).contains("not what --save writes"), "{no:?}");
}

#[test]
fn a_build_within_a_build_takes_nothing_of_it() {
    let directory = TempDir::new().unwrap();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let path = std::env::var("PATH").unwrap();
    let out = directory.path().join("filters");
    // Once the compiler has written its result, another build of the same runs from its beginning to its end.
    let compiler = format!("#!/bin/sh -e\nPATH='{path}'\nclang \"$@\"\nexec filters/build.sh filters/maintenance\n");
    let shim = directory.path().join("clang");
    std::fs::write(&shim, compiler).unwrap();
    std::fs::set_permissions(&shim, PermissionsExt::from_mode(0o755)).unwrap();
    let built = Command::new("filters/build.sh")
        .arg("filters/maintenance")
        .current_dir(root)
        .env("PATH", format!("{}:{path}", directory.path().display()))
        .env("OUTRIGGER_FILTERS_DIR", &out)
        .output()
        .unwrap();
    assert!(built.status.success(), "{built:?}");
    let names: Vec<_> = std::fs::read_dir(&out).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["maintenance.wasm"]);
}
