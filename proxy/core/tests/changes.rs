//! A catalog after a change is the catalog that would be built anew, and what it does not name as touched is as before.

// Helpers of tests count as tests.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Arc;

use outrigger_core::compile::{Answer, Catalog, Change, Client, Inputs, Topic};
use outrigger_core::key::Key;
use outrigger_core::resource::{AppPort, Dial, Loaded, PortProtocol, Registration, ResourceId, parse};
use outrigger_proto::type_url;
use proptest::prelude::*;

const SERVICES: [&str; 3] = ["a", "b", "c"];

/// One step: a document written (or one removed), or a workload registered (or withdrawn).
#[derive(Debug, Clone)]
enum Step {
    Write(String, String),
    Remove(String),
    Register(Registration),
    Withdraw(String),
}

fn service(name: &str, selector: &str, vip: u8, port: u16) -> String {
    let selector = if selector.is_empty() { String::new() } else { format!("  selector: {{{selector}}}\n") };
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: demo}}\nspec:\n  clusterIP: 10.9.0.{vip}\n{selector}  ports: [{{name: http, port: {port}, targetPort: 8080}}]\n"
    )
}

fn slice(name: &str, of: &str, addresses: &[u8]) -> String {
    let endpoints: Vec<String> = addresses.iter().map(|last| format!("{{addresses: [10.0.0.{last}]}}")).collect();
    format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: {name}, namespace: demo, labels: {{kubernetes.io/service-name: {of}}}}}\naddressType: IPv4\nports: [{{name: http, port: 8080}}]\nendpoints: [{}]\n",
        endpoints.join(", ")
    )
}

fn route(name: &str, parent: &str, backend: &str, weight: u8) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: {name}, namespace: demo}}\nspec:\n  parentRefs: [{{group: \"\", kind: Service, name: {parent}}}]\n  rules: [{{backendRefs: [{{name: {backend}, port: 80, weight: {weight}}}]}}]\n"
    )
}

fn workload(name: &str, label: &str, last: u8) -> String {
    format!(
        "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {{name: {name}, namespace: demo, labels: {{{label}}}}}\nspec:\n  address: 10.0.0.{last}\n  serviceAccount: s\n  ports: [{{name: http, port: 8080}}]\n"
    )
}

fn registration(name: &str, app: &str, last: u8, direct: bool) -> Registration {
    let address = [10, 0, 0, last];
    Registration {
        namespace: "demo".into(),
        name: name.into(),
        service_account: "s".into(),
        labels: [("app".to_owned(), app.to_owned())].into(),
        ports: vec![AppPort { name: "http".into(), port: 8080, protocol: PortProtocol::Http1 }],
        dial: if direct { Dial::Application(address.into()) } else { Dial::Inbound((address, 15006).into()) },
        region: String::new(),
        zone: String::new(),
    }
}

fn step() -> impl Strategy<Value = Step> {
    let name = || prop::sample::select(SERVICES.to_vec());
    let write = |kind: &'static str| move |(name, text): (&str, String)| Step::Write(format!("{kind}/{name}"), text);
    let selector = prop::sample::select(vec!["", "app: a", "app: b, tier: x"]);
    let label = prop::sample::select(vec!["app: a", "app: b, tier: x", "kubernetes.io/service-name: c", "tier: x"]);
    let services = (name(), selector, 1..3u8, prop::sample::select(vec![80u16, 81]))
        .prop_map(|(name, selector, vip, port)| (name, service(name, selector, vip, port)))
        .prop_map(write("Service"));
    let slices = (name(), name(), prop::collection::vec(1..5u8, 0..4))
        .prop_map(|(name, of, mut addresses)| {
            addresses.sort_unstable();
            addresses.dedup();
            (name, slice(name, of, &addresses))
        })
        .prop_map(write("EndpointSlice"));
    let routes = (name(), name(), name(), 1..3u8)
        .prop_map(|(name, parent, backend, weight)| (name, route(name, parent, backend, weight)))
        .prop_map(write("HTTPRoute"));
    let workloads = (name(), label, 1..5u8)
        .prop_map(|(name, label, last)| (name, workload(name, label, last)))
        .prop_map(write("Workload"));
    let kind = prop::sample::select(vec!["Service", "EndpointSlice", "HTTPRoute", "Workload"]);
    let removed = (kind, name()).prop_map(|(kind, name)| Step::Remove(format!("{kind}/{name}")));
    let registered = (name(), name(), 1..5u8, any::<bool>())
        .prop_map(|(name, app, last, direct)| Step::Register(registration(name, app, last, direct)));
    let withdrawn = name().prop_map(|name| Step::Withdraw(name.to_owned()));
    prop_oneof![3 => services, 3 => slices, 2 => routes, 2 => workloads, 1 => removed, 2 => registered, 1 => withdrawn]
}

fn load(text: &str) -> Arc<Loaded> {
    let mut parsed = parse("mesh.yaml", text);
    assert_eq!(parsed.rejections, [], "{text}");
    Arc::new(parsed.resources.remove(0))
}

fn id(name: &str) -> ResourceId {
    let (kind, name) = name.split_once('/').unwrap();
    ResourceId { kind: kind.into(), namespace: "demo".into(), name: name.into() }
}

/// Everything there is, in the order in which it first appeared.
#[derive(Default)]
struct World {
    resources: Vec<(ResourceId, Arc<Loaded>)>,
    registrations: Vec<(String, Arc<Registration>)>,
}

impl World {
    fn take(&mut self, step: &Step) -> Change {
        let mut change = Change::default();
        match step {
            Step::Write(name, text) => {
                let (id, loaded) = (id(name), load(text));
                match self.resources.iter_mut().find(|(known, _)| *known == id) {
                    Some((_, known)) => known.clone_from(&loaded),
                    None => self.resources.push((id.clone(), loaded.clone())),
                }
                change.resources.push((id, Some(loaded)));
            }
            Step::Remove(name) => {
                self.resources.retain(|(known, _)| *known != id(name));
                change.resources.push((id(name), None));
            }
            Step::Register(registration) => {
                let (name, registration) = (registration.name.clone(), Arc::new(registration.clone()));
                self.registrations.retain(|(known, _)| *known != name);
                self.registrations.push((name.clone(), registration.clone()));
                change.registrations.push((("demo".into(), name), Some(registration)));
            }
            Step::Withdraw(name) => {
                self.registrations.retain(|(known, _)| known != name);
                change.registrations.push((("demo".into(), name.clone()), None));
            }
        }
        change
    }

    fn build(&self) -> Catalog {
        let (catalog, rejections) = Catalog::build(Inputs {
            resources: self.resources.iter().map(|(_, loaded)| loaded.clone()).collect(),
            registrations: self.registrations.iter().map(|(_, registration)| registration.clone()).collect(),
            trust_domain: "cluster.local".into(),
            ..Inputs::default()
        });
        assert_eq!(rejections, []);
        catalog
    }
}

fn questions() -> Vec<(&'static str, Key, Client)> {
    let mut questions = Vec::new();
    for name in SERVICES {
        let client = Client { namespace: "demo".into(), workload: name.into(), service_account: "s".into() };
        let mut ask = |kind, key: String| questions.push((kind, key.parse().unwrap(), client.clone()));
        ask(type_url::SERVICE, format!("svc/demo/{name}"));
        ask(type_url::SERVICE, format!("host/{name}.demo:80"));
        ask(type_url::ENDPOINTS, format!("endpoints/demo/{name}:80/0"));
        ask(type_url::ENDPOINTS, format!("endpoints/demo/{name}:81/0"));
        ask(type_url::SELF, format!("self/{name}"));
        for last in 1..5 {
            ask(type_url::SERVICE, format!("ip/10.9.0.{last}:80"));
            ask(type_url::WORKLOAD, format!("ip/10.0.0.{last}:8080"));
        }
    }
    questions
}

fn answer(catalog: &Catalog, (kind, key, client): &(&'static str, Key, Client)) -> Answer {
    catalog.answer(kind, key, client)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn changes_add_up_to_what_would_be_built_anew(steps in prop::collection::vec(step(), 1..24)) {
        let mut world = World::default();
        let mut catalog = world.build();
        for step in &steps {
            let change = world.take(step);
            let (next, touched) = catalog.changed(&change).unwrap();
            let anew = world.build();
            for question in &questions() {
                let (before, now) = (answer(&catalog, question), answer(&next, question));
                prop_assert_eq!(&now, &answer(&anew, question), "{:?} after {:?}", question, step);
                let topic = Topic::of(question.0, &question.1, &question.2).unwrap();
                prop_assert!(before == now || touched.contains(&topic), "{:?} is not touched by {:?}", topic, step);
            }
            prop_assert_eq!(next.warnings().len(), anew.warnings().len());
            catalog = next;
        }
    }
}

/// What a change touches is bounded by what it is about, however many others there are.
#[test]
fn a_change_touches_what_it_is_about() {
    let mut world = World::default();
    for name in SERVICES {
        world.take(&Step::Write(format!("Service/{name}"), service(name, &format!("app: {name}"), 1, 80)));
        world.take(&Step::Write(format!("EndpointSlice/{name}"), slice(name, name, &[1, 2])));
    }
    let catalog = world.build();
    let key = |name: &str| outrigger_core::key::ServiceKey { namespace: "demo".into(), name: name.into() };
    let (_, touched) =
        catalog.changed(&world.take(&Step::Write("EndpointSlice/a".into(), slice("a", "a", &[1, 3])))).unwrap();
    assert_eq!(touched.into_iter().collect::<Vec<_>>(), [Topic::Endpoints(key("a"))]);
    let (_, touched) =
        catalog.changed(&world.take(&Step::Write("HTTPRoute/r".into(), route("r", "b", "a", 1)))).unwrap();
    assert!(touched.contains(&Topic::Service(key("b"))) && !touched.contains(&Topic::Service(key("a"))), "{touched:?}");
    // A policy may govern anything.
    let policy = "apiVersion: outrigger.dev/v1alpha1\nkind: MtlsPolicy\nmetadata: {name: p, namespace: demo}\nspec: {mode: Strict}\n";
    assert!(catalog.changed(&world.take(&Step::Write("MtlsPolicy/p".into(), policy.into()))).is_none());
}
