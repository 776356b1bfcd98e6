//! The Gateway API's own mesh conformance tests, as data (`tests/data/gateway-api-mesh.yaml`), in explicit mode: those over
//! HTTP whose destination is what their Host says. Named as the suite names them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests
#![allow(clippy::print_stderr)] // why a case is not passing yet

use std::collections::BTreeMap;
use std::net::TcpListener;

use outrigger_e2e::{Address, Backend, Mesh, Proxy, Reply, Response, until};
use saphyr::{LoadableYamlNode, Scalar, Yaml};
use serde_json::{Value, json};

const MANIFESTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../proxy/core/tests/data/gateway-api/");
const CASES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/data/gateway-api-mesh.yaml");
const NAMESPACE: &str = "gateway-conformance-mesh";
const CONSUMER: &str = "gateway-conformance-mesh-consumer";

/// The workloads of the base manifests, each with its application and its proxy.
struct Suite {
    proxies: BTreeMap<(String, String), Proxy>,
    applications: Vec<(String, String, Backend)>,
    mesh: Mesh,
    _addresses: Vec<Address>,
}

impl Suite {
    fn start() -> Self {
        let mesh = Mesh::start(&read(&format!("{MANIFESTS}base-manifests.yaml")));
        let mut suite = Self { proxies: BTreeMap::new(), applications: Vec::new(), mesh, _addresses: Vec::new() };
        for (namespace, version) in [(NAMESPACE, "v1"), (NAMESPACE, "v2"), (CONSUMER, "v1")] {
            let (name, address) = (format!("echo-{version}"), Address::claim());
            let listener = TcpListener::bind(address.port(8080)).unwrap();
            let application =
                Backend::on(listener, &name, |_| Reply::Answer { status: 200, headers: Vec::new(), body: Vec::new() });
            // Names of workloads are those of pods.
            let proxy =
                suite.mesh.proxy(&format!("{name}-{}-0", namespace.len())).namespace(namespace).account("default");
            let proxy = proxy.labels(&format!("app=echo,version={version}")).app(&application.address()).start();
            suite.proxies.insert((namespace.to_owned(), name.clone()), proxy);
            suite.applications.push((namespace.to_owned(), name, application));
            suite._addresses.push(address);
        }
        suite
    }

    /// Sends one request; why its outcome is not the expected one.
    fn attempt(&self, request: &Value) -> Result<(), String> {
        let from = (text(&request["from"]["namespace"]), text(&request["from"]["workload"]));
        let asked = &request["request"];
        let path = asked["path"].as_str().unwrap_or("/");
        let mut curl = self.proxies[&from].call(&text(&asked["host"]), path);
        curl = curl.args(["--request", asked["method"].as_str().unwrap_or("GET")]);
        for (name, value) in asked["headers"].as_object().into_iter().flatten() {
            curl = curl.header(name, &text(value));
        }
        let (response, expect) = (curl.send(), &request["expect"]);
        let answered = |what: &str| Err(format!("{what}: {response:?}"));
        if Some(u64::from(response.status)) != expect["status"].as_u64() {
            return answered("status");
        }
        let of = |name: &str| joined(&response.headers, name);
        if !fits(&expect["response"], of) {
            return answered("response headers");
        }
        if !expect["redirect"].is_null() && !redirects(request, &response) {
            return answered("Location");
        }
        let Some(workload) = expect["backend"]["workload"].as_str() else { return Ok(()) };
        if response.header("x-backend") != Some(workload) {
            return answered("backend");
        }
        let seen = self.seen(workload).ok_or("no request arrived")?;
        match fits(&expect["seen"], |name| joined(&seen, name)) {
            true => Ok(()),
            false => Err(format!("seen: {seen:?}")),
        }
    }

    /// The headers of the last request that the application got.
    fn seen(&self, workload: &str) -> Option<Vec<(String, String)>> {
        let (.., application) = self.applications.iter().find(|(ns, name, _)| ns == NAMESPACE && name == workload)?;
        Some(application.requests().pop()?.headers)
    }

    /// Shares of the workloads among so many answers.
    fn distribution(&self, request: &Value) -> Result<(), String> {
        let weight = &request["expect"]["weight"];
        let from = (text(&request["from"]["namespace"]), text(&request["from"]["workload"]));
        let samples = weight["samples"].as_u64().unwrap();
        let counts = || -> BTreeMap<String, usize> {
            self.applications
                .iter()
                .filter(|(ns, ..)| ns == NAMESPACE)
                .map(|(_, name, app)| (name.clone(), app.count()))
                .collect()
        };
        let before = counts();
        // One curl for all of them; its range makes the URLs.
        let proxy = &self.proxies[&from];
        let sent = std::process::Command::new("curl")
            .args(["--silent", "--fail", "--noproxy", "*", "--output", "/dev/null", "--header"])
            .args([format!("host: {}", text(&request["request"]["host"])), proxy.url(&format!("/?[1-{samples}]"))])
            .status();
        if !sent.unwrap().success() {
            return Err("a sample failed".to_owned());
        }
        let (after, tolerance) = (counts(), weight["tolerance"].as_f64().unwrap());
        let share = |name: &str| (after[name] - before[name]) as f64 / samples as f64;
        let shares = weight["shares"].as_object().unwrap();
        match shares.iter().all(|(name, wanted)| (share(name) - wanted.as_f64().unwrap()).abs() <= tolerance) {
            true => Ok(()),
            false => Err(format!("from {before:?} to {after:?}")),
        }
    }
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn json(yaml: &Yaml<'_>) -> Value {
    match yaml {
        Yaml::Value(Scalar::Null) => Value::Null,
        Yaml::Value(Scalar::Boolean(value)) => json!(value),
        Yaml::Value(Scalar::Integer(value)) => json!(value),
        Yaml::Value(Scalar::FloatingPoint(value)) => json!(**value),
        Yaml::Value(Scalar::String(value)) => json!(value),
        Yaml::Sequence(all) => all.iter().map(json).collect(),
        Yaml::Mapping(all) => all.iter().map(|(key, value)| (text(&json(key)), json(value))).collect(),
        other => panic!("not in this file: {other:?}"),
    }
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// Every value of a header, joined by commas.
fn joined(headers: &[(String, String)], name: &str) -> Option<String> {
    let values: Vec<&str> =
        headers.iter().filter(|(of, _)| of.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str()).collect();
    (!values.is_empty()).then(|| values.join(","))
}

/// Whether the headers are those of `headers`, and none is of `absent_headers`.
fn fits(expect: &Value, of: impl Fn(&str) -> Option<String>) -> bool {
    let present = expect["headers"].as_object().into_iter().flatten();
    let absent = expect["absent_headers"].as_array().into_iter().flatten();
    present.into_iter().all(|(name, value)| of(name).is_some_and(|is| is == text(value)))
        && absent.into_iter().all(|name| of(&text(name)).is_none())
}

/// Whether Location has the parts named; those that are not are as in the request.
fn redirects(request: &Value, response: &Response) -> bool {
    let Some(location) = response.header("location") else { return false };
    let Some((scheme, rest)) = location.split_once("://") else { return false };
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let (host, port) = authority.rsplit_once(':').map_or((authority, None), |(host, port)| (host, Some(port)));
    let parts = &request["expect"]["redirect"];
    let same = |part: &str, is: &str, of_request: &str| parts[part].as_str().unwrap_or(of_request) == is;
    let standard = if scheme == "https" { "443" } else { "80" };
    let wanted = if parts["port"].is_null() { standard.to_owned() } else { text(&parts["port"]) };
    same("scheme", scheme, "http")
        && parts["host"].as_str().is_none_or(|wanted| wanted == host)
        && same("path", path, request["request"]["path"].as_str().unwrap_or("/"))
        && port.unwrap_or(standard) == wanted
}

/// Those that explicit mode can ask: not gRPC, not a pod's address, and no Host that is not the destination's.
fn askable(request: &Value) -> bool {
    request["protocol"] == "http"
        && request["to"]["kind"] == "service"
        && request["to"]["host"] == request["request"]["host"]
}

#[test]
fn the_mesh_conformance_tests_over_http_pass() {
    let (cases, suite) = (read(CASES), Suite::start());
    let cases = json(&Yaml::load_from_str(&cases).unwrap()[0]);
    let (mut ran, mut left) = (0, Vec::new());
    for case in cases.as_array().unwrap() {
        let test = text(&case["test"]);
        for manifest in case["manifests"].as_array().unwrap() {
            suite.mesh.write("case.yaml", &read(&format!("{MANIFESTS}{}", text(manifest))));
        }
        for request in case["requests"].as_array().unwrap() {
            if !askable(request) {
                left.push(test.clone());
                continue;
            }
            ran += 1;
            let name = format!("{test}: {} {}", text(&request["name"]), request["request"]);
            if request["expect"]["weight"].is_object() {
                until(&name, || suite.distribution(request).inspect_err(|why| eprintln!("{name}: {why}")).ok());
            } else {
                // As the suite does: three in a row.
                until(&name, || {
                    (0..3).try_for_each(|_| suite.attempt(request)).inspect_err(|why| eprintln!("{name}: {why}")).ok()
                });
            }
        }
        if case["manifests"].as_array().is_some_and(|all| !all.is_empty()) {
            suite.mesh.remove("case.yaml");
        }
    }
    left.dedup();
    // A case that is new, or can no longer be asked, is seen here.
    assert_eq!(
        left,
        ["MeshGRPCRouteRequestHeaderModifier", "MeshGRPCRouteWeight", "MeshFrontendHostname", "MeshFrontend"]
    );
    assert!(ran >= 75, "{ran} requests were asked");
}
