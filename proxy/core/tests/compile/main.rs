//! Resources in, answers to subscriptions out.

// Helpers of tests count as tests.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod filters;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use outrigger_core::compile::{Answer, Catalog, Client, ClosedPolicy, Found, Inputs, Module, Modules, wanted_modules};
use outrigger_core::link;
use outrigger_core::resource::{AppPort, Dial, Loaded, ModuleSource, PortProtocol, Registration, Rejection, parse};
use outrigger_proto::{mesh, type_url};
use proptest::prelude::*;
use prost::Message;

const SHOP: &str = include_str!("../data/shop.yaml");

fn resources(text: &str) -> Vec<Arc<Loaded>> {
    let parsed = parse("config/shop.yaml", text);
    assert_eq!(parsed.rejections, []);
    parsed.resources.into_iter().map(Arc::new).collect()
}

fn registration(name: &str, labels: &[(&str, &str)], dial: &str) -> Arc<Registration> {
    let port = |name: &str, port| AppPort { name: name.into(), port, protocol: PortProtocol::Detect };
    Arc::new(Registration {
        namespace: "demo".into(),
        name: name.into(),
        service_account: "reviews".into(),
        labels: labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
        ports: vec![port("http", 8080), port("tcp-raw", 9000)],
        dial: dial.parse().map_or_else(|_| Dial::Application(dial.parse().unwrap()), Dial::Inbound),
        region: String::new(),
        zone: String::new(),
    })
}

fn inputs(text: &str) -> Inputs {
    let module = Module { sha256: "ab".repeat(32), size: 1234 };
    Inputs {
        resources: resources(text),
        registrations: vec![
            registration("reviews-v1-0", &[("app", "reviews"), ("version", "v1")], "127.0.0.1:16006"),
            registration("reviews-v2-0", &[("app", "reviews"), ("version", "v2")], "10.0.0.2"),
        ],
        trust_domain: "cluster.local".into(),
        modules: Modules { found: [(cohort(), module)].into(), ..Modules::default() },
        roots: [("cluster.local".to_owned(), vec!["root".into()])].into(),
        ..Inputs::default()
    }
}

fn cohort() -> ModuleSource {
    ModuleSource::File("config/filters/cohort.wasm".to_owned())
}

fn build(inputs: Inputs) -> Catalog {
    let (catalog, rejections) = Catalog::build(inputs);
    assert_eq!(rejections, []);
    catalog
}

fn client(namespace: &str, workload: &str) -> Client {
    Client { namespace: namespace.into(), workload: workload.into(), service_account: "reviews".into() }
}

fn answer(catalog: &Catalog, type_url: &str, key: &str, client: &Client) -> Option<Found> {
    match catalog.answer(type_url, &key.parse().unwrap(), client) {
        Answer::Found(found) => Some(found),
        Answer::Absent => None,
    }
}

fn service(catalog: &Catalog, key: &str, namespace: &str) -> mesh::Service {
    let found = answer(catalog, type_url::SERVICE, key, &client(namespace, "web-0")).unwrap();
    mesh::Service::decode(found.bytes).unwrap()
}

fn own(catalog: &Catalog, workload: &str) -> mesh::Self_ {
    let found = answer(catalog, type_url::SELF, &format!("self/{workload}"), &client("demo", workload)).unwrap();
    mesh::Self_::decode(found.bytes).unwrap()
}

fn endpoints(catalog: &Catalog, key: &str) -> Vec<mesh::Endpoint> {
    let found = answer(catalog, type_url::ENDPOINTS, key, &client("demo", "web-0")).unwrap();
    mesh::Endpoints::decode(found.bytes).unwrap().endpoints
}

/// A Service that selects nothing in particular, with one HTTP port.
fn plain_service(namespace: &str, name: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {{selector: {{app: {name}}}, ports: [{{name: http, port: 80}}]}}\n"
    )
}

/// A route of this namespace on demo/reviews.
fn route(kind: &str, namespace: &str, name: &str, rules: &str) -> String {
    format!(
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: {kind}\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec:\n  parentRefs: [{{group: '', kind: Service, name: reviews, namespace: demo}}]\n  rules: {rules}\n"
    )
}

fn rule_names(service: &mesh::Service) -> Vec<String> {
    let routes = service.ports[0].routes.as_ref();
    routes.into_iter().flat_map(|routes| &routes.rules).map(|rule| rule.name.clone()).collect()
}

#[test]
fn the_shop_compiles_as_recorded() {
    let catalog = build(inputs(SHOP));
    insta::assert_debug_snapshot!("service", service(&catalog, "svc/demo/reviews", "demo"));
    insta::assert_debug_snapshot!("self", own(&catalog, "reviews-v1-0"));
    insta::assert_debug_snapshot!("endpoints", endpoints(&catalog, "endpoints/demo/reviews:80/0"));
    let web = client("demo", "web-0");
    let filter = answer(&catalog, type_url::FILTER, "filter/demo/cohort", &web).unwrap();
    insta::assert_debug_snapshot!("filter", mesh::Filter::decode(filter.bytes).unwrap());
    let config = answer(&catalog, type_url::MESH_CONFIG, "mesh", &web).unwrap();
    insta::assert_debug_snapshot!("mesh", mesh::MeshConfig::decode(config.bytes).unwrap());
    insta::assert_debug_snapshot!("rows", (catalog.services(), catalog.endpoints(), catalog.routes()));
}

#[test]
fn a_missing_backend_is_a_warning_with_its_place() {
    let catalog = build(inputs(SHOP));
    let lines: Vec<_> = catalog.warnings().iter().map(ToString::to_string).collect();
    assert_eq!(
        lines,
        [
            "config/shop.yaml:61: HTTPRoute demo/reviews: spec.rules[1].backendRefs[2]: Service demo/reviews-v3 does not exist"
        ]
    );
}

#[test]
fn versions_follow_content_and_nothing_else() {
    let version = |inputs: Inputs| {
        answer(&build(inputs), type_url::SERVICE, "svc/demo/reviews", &client("demo", "a")).unwrap().version
    };
    let first = version(inputs(SHOP));
    assert_eq!(first.len(), 16);
    let mut shuffled = inputs(SHOP);
    shuffled.resources.reverse();
    shuffled.registrations.reverse();
    assert_eq!(version(shuffled), first);
    assert_ne!(version(inputs(&SHOP.replace("weight: 90", "weight: 80"))), first);
    // Another endpoint is another Endpoints, and the same Service.
    let mut more = inputs(SHOP);
    more.registrations.push(registration("reviews-v1-1", &[("app", "reviews"), ("version", "v1")], "10.0.0.3"));
    assert_eq!(version(more), first);
}

#[test]
fn addresses_and_names_lead_to_the_canonical_service() {
    let catalog = build(inputs(SHOP));
    let web = client("demo", "web-0");
    let canonical = answer(&catalog, type_url::SERVICE, "svc/demo/reviews", &web).unwrap();
    assert!(canonical.aliases.is_empty());
    for key in ["ip/10.96.0.10:80", "host/reviews.demo.svc.cluster.local:80"] {
        let found = answer(&catalog, type_url::SERVICE, key, &web).unwrap();
        assert_eq!((found.name.as_str(), found.aliases.as_slice()), ("svc/demo/reviews", &[key.to_owned()][..]));
        assert_eq!(found.version, canonical.version);
    }
    for key in ["svc/demo/nothing", "ip/10.96.0.11:80", "host/www.example.com:443", "ip/10.0.0.2:8080"] {
        assert_eq!(answer(&catalog, type_url::SERVICE, key, &web), None, "{key}");
    }
}

#[test]
fn an_instance_address_is_the_workload_and_only_where_it_is_dialled() {
    let catalog = build(inputs(SHOP));
    let web = client("demo", "web-0");
    let found = answer(&catalog, type_url::WORKLOAD, "ip/10.0.0.2:8080", &web).unwrap();
    let workload = mesh::Workload::decode(found.bytes).unwrap();
    assert_eq!(
        (workload.name.as_str(), workload.endpoint.unwrap().identity.as_str()),
        ("reviews-v2-0", "spiffe://cluster.local/ns/demo/sa/reviews")
    );
    for key in ["ip/10.0.0.2:9999", "ip/127.0.0.1:8080", "ip/10.96.0.10:80"] {
        assert_eq!(answer(&catalog, type_url::WORKLOAD, key, &web), None, "{key}");
    }
}

#[test]
fn self_is_answered_to_its_own_workload_only() {
    let catalog = build(inputs(SHOP));
    let other = client("demo", "web-0");
    assert_eq!(answer(&catalog, type_url::SELF, "self/reviews-v1-0", &other), None);
    let elsewhere = client("other", "reviews-v1-0");
    assert_eq!(answer(&catalog, type_url::SELF, "self/reviews-v1-0", &elsewhere), None);
}

#[test]
fn bundles_and_modules_are_those_given() {
    let catalog = build(inputs(SHOP));
    let web = client("demo", "web-0");
    let found = answer(&catalog, type_url::BUNDLE, "bundle/cluster.local", &web).unwrap();
    assert_eq!(mesh::Bundle::decode(found.bytes).unwrap().roots, ["root"]);
    assert_eq!(answer(&catalog, type_url::BUNDLE, "bundle/other", &web), None);
    assert_eq!(catalog.wasm_modules(), [Module { sha256: "ab".repeat(32), size: 1234 }]);
    assert_eq!(wanted_modules(&resources(SHOP)), BTreeMap::from([(cohort(), BTreeSet::new())]));
}

#[test]
fn matches_are_sorted_by_the_gateway_apis_precedence() {
    let rules = "[
      {name: prefix-short, matches: [{path: {value: /a}}]},
      {name: queries, matches: [{path: {value: /a/b}, queryParams: [{name: q, value: '1'}]}]},
      {name: method, matches: [{path: {value: /a/b}, method: GET}]},
      {name: headers, matches: [{path: {value: /a/b}, headers: [{name: x, value: '1'}, {name: y, value: '1'}]}]},
      {name: header, matches: [{path: {value: /a/b}, headers: [{name: x, value: '1'}]}]},
      {name: exact, matches: [{path: {type: Exact, value: /a}}]},
      {name: again, matches: [{path: {value: /a/}}]}]";
    let text = plain_service("demo", "reviews")
        + &route("HTTPRoute", "demo", "b", rules)
        + &route("HTTPRoute", "demo", "a", "[{name: younger, matches: [{path: {value: /a/b}, method: GET}]}]");
    let reviews = service(&build(inputs(&text)), "svc/demo/reviews", "demo");
    let routes = reviews.ports[0].routes.as_ref().unwrap();
    let order: Vec<_> = routes.matches.iter().map(|one| routes.rules[one.rule as usize].name.as_str()).collect();
    assert_eq!(
        order,
        [
            "demo/b/exact",
            "demo/b/method",
            "demo/a/younger",
            "demo/b/headers",
            "demo/b/header",
            "demo/b/queries",
            "demo/b/prefix-short",
            "demo/b/again"
        ]
    );
}

#[test]
fn a_timestamp_makes_a_route_older_and_equal_ones_go_by_name() {
    let stamped = |name: &str, second: u32| {
        let stamp = format!("name: {name}, creationTimestamp: '2026-01-01T00:00:0{second}Z'");
        route("HTTPRoute", "demo", name, "[{}]").replace(&format!("name: {name}"), &stamp)
    };
    let text = plain_service("demo", "reviews")
        + &route("HTTPRoute", "demo", "unstamped", "[{}]")
        + &stamped("late", 2)
        + &stamped("b", 1)
        + &stamped("a", 1);
    let reviews = service(&build(inputs(&text)), "svc/demo/reviews", "demo");
    let routes = reviews.ports[0].routes.as_ref().unwrap();
    let order: Vec<_> = routes.matches.iter().map(|one| routes.rules[one.rule as usize].name.as_str()).collect();
    assert_eq!(order, ["demo/a/0", "demo/b/0", "demo/late/0", "demo/unstamped/0"]);
}

#[test]
fn a_consumers_route_replaces_the_producers_for_its_namespace_only() {
    let text = plain_service("demo", "reviews")
        + &route("HTTPRoute", "demo", "producer", "[{}]")
        + &route("HTTPRoute", "client", "consumer", "[{}]");
    let catalog = build(inputs(&text));
    for (namespace, rule) in
        [("client", "client/consumer/0"), ("demo", "demo/producer/0"), ("third", "demo/producer/0")]
    {
        assert_eq!(rule_names(&service(&catalog, "svc/demo/reviews", namespace)), [rule], "{namespace}");
    }
}

#[test]
fn grpc_routes_replace_http_routes_of_the_same_port() {
    let text = plain_service("demo", "reviews")
        + &route("HTTPRoute", "demo", "http", "[{}]")
        + &route(
            "GRPCRoute",
            "demo",
            "grpc",
            "[{matches: [{method: {service: shop.Reviews, method: Get}}]}, {matches: [{method: {service: shop.Reviews}}]}]",
        );
    let reviews = service(&build(inputs(&text)), "svc/demo/reviews", "demo");
    assert_eq!(rule_names(&reviews), ["demo/grpc/0", "demo/grpc/1"]);
    let routes = reviews.ports[0].routes.as_ref().unwrap();
    assert!(routes.rules.iter().all(|rule| rule.grpc));
    assert_eq!(routes.matches[0].path, Some(mesh::http_match::Path::Exact("/shop.Reviews/Get".into())));
    assert_eq!(routes.matches[1].path, Some(mesh::http_match::Path::Prefix("/shop.Reviews".into())));
}

#[test]
fn a_route_is_limited_to_its_parents_port_or_section() {
    let manifests = include_str!("../data/gateway-api/mesh-ports.yaml");
    let base = include_str!("../data/gateway-api/base-manifests.yaml");
    let catalog = build(inputs(&format!("{base}\n---\n{manifests}")));
    let namespace = "gateway-conformance-mesh";
    let routed = |name: &str| -> Vec<u32> {
        let service = service(&catalog, &format!("svc/{namespace}/{name}"), namespace);
        service.ports.iter().filter(|port| port.routes.is_some()).map(|port| port.port).collect()
    };
    assert_eq!(routed("echo-v1"), [80]);
    // Without a port: all of them, but for those that are named for TCP and TLS.
    assert_eq!(routed("echo-v2"), [80, 8080, 7070]);
}

#[test]
fn policies_that_cannot_be_read_close_what_they_governed() {
    let closed = |text: &str| {
        let rejection = parse("x.yaml", text).rejections.remove(0);
        ClosedPolicy { closes: rejection.closes.clone().unwrap(), reason: rejection.to_string() }
    };
    let authorization = "apiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {name: bad, namespace: demo}\nspec: {selector: {matchLabels: {version: v1}}, action: Perhaps}\n";
    let mtls = "apiVersion: outrigger.dev/v1alpha1\nkind: MtlsPolicy\nmetadata: {name: bad, namespace: demo}\nspec: {mode: Perhaps}\n";
    let mut broken = inputs(SHOP);
    broken.closed = vec![closed(authorization), closed(mtls)];
    let catalog = build(broken);
    let of = |workload: &str| {
        let own = own(&catalog, workload);
        let modes: Vec<_> = own.ports.iter().map(mesh::SelfPort::mtls).collect();
        (own.ports[0].authorization.clone().unwrap().closed, modes)
    };
    let strict = vec![mesh::MtlsMode::Strict; 2];
    let (v1, modes) = of("reviews-v1-0");
    assert!(v1.starts_with("x.yaml:4: AuthorizationPolicy demo/bad: spec.action: `Perhaps` is not one of"), "{v1}");
    assert_eq!(modes, strict);
    assert_eq!(of("reviews-v2-0"), (String::new(), strict));
}

#[test]
fn the_more_specific_mtls_policy_wins_and_the_stricter_of_equals() {
    let policy = |name: &str, spec: &str| {
        format!(
            "---\napiVersion: outrigger.dev/v1alpha1\nkind: MtlsPolicy\nmetadata: {{name: {name}, namespace: demo}}\nspec: {{{spec}}}\n"
        )
    };
    let modes = |text: &str| -> Vec<_> {
        own(&build(inputs(text)), "reviews-v1-0").ports.iter().map(mesh::SelfPort::mtls).collect()
    };
    use mesh::MtlsMode::{Disabled, Permissive, Strict};
    let workload = "selector: {matchLabels: {app: reviews}}";
    let mesh_wide =
        "apiVersion: outrigger.dev/v1alpha1\nkind: MeshConfig\nmetadata: {name: m}\nspec: {mtls: {mode: Disabled}}\n";
    assert_eq!(modes("# nothing"), [Permissive, Permissive]);
    assert_eq!(modes(mesh_wide), [Disabled, Disabled]);
    assert_eq!(modes(&(mesh_wide.to_owned() + &policy("a", "mode: Strict"))), [Strict, Strict]);
    let both = policy("a", "mode: Strict") + &policy("b", &format!("{workload}, ports: {{'9000': Permissive}}"));
    assert_eq!(modes(&both), [Strict, Permissive]);
    let equals =
        policy("a", &format!("{workload}, mode: Permissive")) + &policy("b", &format!("{workload}, mode: Strict"));
    assert_eq!(modes(&equals), [Strict, Strict]);
}

#[test]
fn endpoints_of_a_disabled_workload_are_plaintext() {
    let disabled = "---\napiVersion: outrigger.dev/v1alpha1\nkind: MtlsPolicy\nmetadata: {name: off, namespace: demo}\nspec: {selector: {matchLabels: {app: ratings}}, mode: Disabled}\n";
    let before = endpoints(&build(inputs(SHOP)), "endpoints/demo/ratings:9080/0");
    assert_eq!(before[0].identity, "spiffe://cluster.local/ns/demo/sa/ratings");
    let after = endpoints(&build(inputs(&format!("{SHOP}{disabled}"))), "endpoints/demo/ratings:9080/0");
    assert_eq!(after[0].identity, "");
}

#[test]
fn slices_and_labelled_workloads_serve_a_service_without_selector() {
    let text = "
apiVersion: v1
kind: Service
metadata: {name: db, namespace: demo}
spec: {ports: [{name: sql, port: 5432}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: db-1, namespace: demo, labels: {kubernetes.io/service-name: db}}
addressType: IPv4
ports: [{name: sql, port: 15432}]
endpoints:
- {addresses: [10.9.0.1], targetRef: {kind: Pod, name: db-0}}
- {addresses: [10.9.0.2], conditions: {ready: false}}
- {addresses: [10.9.0.3]}
---
apiVersion: outrigger.dev/v1alpha1
kind: Workload
metadata: {name: db-2, namespace: demo, labels: {kubernetes.io/service-name: db}}
spec: {address: 10.9.0.4, ports: [{name: sql, port: 5432}], serviceAccount: db}
---
apiVersion: outrigger.dev/v1alpha1
kind: Workload
metadata: {name: db-3, namespace: demo, labels: {kubernetes.io/service-name: db}}
spec: {address: 10.9.0.5, ports: [{name: sql, port: 5432}], weight: 0}
";
    let found: Vec<_> = endpoints(&build(inputs(text)), "endpoints/demo/db:5432/0")
        .into_iter()
        .map(|endpoint| (endpoint.id, endpoint.address, endpoint.port, endpoint.identity))
        .collect();
    let expected = [
        ("demo/10.9.0.3", "10.9.0.3", 15432, ""),
        ("demo/db-0", "10.9.0.1", 15432, ""),
        ("demo/db-2", "10.9.0.4", 5432, "spiffe://cluster.local/ns/demo/sa/db"),
    ];
    assert_eq!(found, expected.map(|(id, address, port, identity)| (id.into(), address.into(), port, identity.into())));
}

#[test]
fn a_workload_without_interception_is_dialled_at_its_proxys_inbound_port() {
    let text = "
apiVersion: v1
kind: Service
metadata: {name: db, namespace: demo}
spec: {selector: {app: db}, ports: [{name: sql, port: 5432}]}
---
apiVersion: outrigger.dev/v1alpha1
kind: Workload
metadata: {name: db-0, namespace: demo, labels: {app: db}}
spec: {address: 10.9.0.4, inboundPort: 15006, ports: [{name: sql, port: 5432}], serviceAccount: db}
";
    let found = endpoints(&build(inputs(text)), "endpoints/demo/db:5432/0");
    let found: Vec<_> = found.iter().map(|one| (one.address.as_str(), one.port, one.app_port)).collect();
    assert_eq!(found, [("10.9.0.4", 15006, 5432)]);
}

#[test]
fn a_route_without_effect_is_a_warning() {
    let at = |port: u32| {
        route("HTTPRoute", "demo", "http", "[{}]")
            .replace("namespace: demo}]", &format!("namespace: demo, port: {port}}}]"))
    };
    let service = plain_service("demo", "reviews").replace("]}", ", {name: tcp-raw, port: 9000}]}");
    for (text, warning) in [
        (at(80), None),
        (at(81), Some("Service demo/reviews has no such port")),
        (at(9000), Some("port 9000 of Service demo/reviews is declared as TCP, which no HTTP route is for")),
        (
            at(80) + &route("GRPCRoute", "demo", "grpc", "[{}]"),
            Some("GRPCRoute demo/grpc takes its place on port 80 of Service demo/reviews"),
        ),
        (at(80) + &route("GRPCRoute", "client", "grpc", "[{}]"), None),
    ] {
        let catalog = build(inputs(&(service.clone() + &text)));
        let warnings = catalog.warnings();
        let reasons: Vec<_> = warnings.iter().map(|warning| warning.reason.as_str()).collect();
        assert_eq!(reasons, warning.into_iter().collect::<Vec<_>>(), "{text}");
    }
}

fn rejected(inputs: Inputs) -> Vec<String> {
    Catalog::build(inputs).1.iter().map(Rejection::to_string).collect()
}

#[test]
fn contradictions_reject_the_younger() {
    let policy = |name: &str| {
        format!(
            "---\napiVersion: outrigger.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: {name}}}\nspec: {{targetRefs: [{{kind: Service, name: a}}]}}\n"
        )
    };
    assert_eq!(
        rejected(inputs(&(policy("one") + &policy("two")))),
        [
            "config/shop.yaml:10: TrafficPolicy default/two: spec.targetRefs: TrafficPolicy one (config/shop.yaml:2) has one of these targets already, and is older; merge the two"
        ]
    );
    assert_eq!(
        rejected(inputs(&(plain_service("demo", "a") + &plain_service("demo", "a")))),
        [
            "config/shop.yaml:9: Service demo/a: metadata.name: already defined at config/shop.yaml:2; rename one of them or remove it"
        ]
    );
}

#[test]
fn another_trust_domain_is_reported_and_the_rest_of_the_config_holds() {
    let text = "apiVersion: outrigger.dev/v1alpha1\nkind: MeshConfig\nmetadata: {name: m}\nspec: {trustDomain: corp.example, outboundTraffic: RegistryOnly}\n";
    let (catalog, rejections) = Catalog::build(inputs(text));
    assert_eq!(rejections.len(), 1);
    assert_eq!(rejections[0].field, "spec.trustDomain");
    let found = answer(&catalog, type_url::MESH_CONFIG, "mesh", &client("demo", "a")).unwrap();
    let config = mesh::MeshConfig::decode(found.bytes).unwrap();
    assert_eq!((config.trust_domain.as_str(), config.outbound_traffic), ("cluster.local", 1));
}

/// What is accepted here must be accepted by proxies: a NACK would be found out by traffic.
#[test]
fn whatever_is_accepted_links() {
    let mut texts = vec![SHOP.to_owned(), include_str!("../data/kinds.yaml").to_owned()];
    let base = include_str!("../data/gateway-api/base-manifests.yaml");
    for entry in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/gateway-api")).unwrap() {
        let path = entry.unwrap().path();
        if !path.ends_with("base-manifests.yaml") {
            texts.push(format!("{base}\n---\n{}", std::fs::read_to_string(path).unwrap()));
        }
    }
    for text in texts {
        let (catalog, _) = Catalog::build(inputs(&text));
        for row in catalog.services() {
            for namespace in [row.namespace.as_str(), "gateway-conformance-mesh-consumer"] {
                let wire = service(&catalog, &format!("svc/{}/{}", row.namespace, row.name), namespace);
                link::service(&wire).unwrap_or_else(|error| panic!("{row:?}: {error}"));
            }
            for port in &row.ports {
                let key = format!("endpoints/{}/{}:{}/0", row.namespace, row.name, port.port);
                link::endpoints(&mesh::Endpoints { endpoints: endpoints(&catalog, &key) }).unwrap();
            }
        }
        link::inbound(&own(&catalog, "reviews-v1-0")).unwrap();
        let found = answer(&catalog, type_url::MESH_CONFIG, "mesh", &client("demo", "a")).unwrap();
        link::mesh(&mesh::MeshConfig::decode(found.bytes).unwrap()).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Every endpoint is in exactly one shard, no shard is too big, and the order of registering does not matter.
    #[test]
    fn shards_partition_the_endpoints(count in 0_usize..700, seed in any::<u64>()) {
        let mut given = inputs(SHOP);
        given.registrations = (0..count)
            .map(|index| registration(&format!("reviews-{seed:x}-{index}"), &[("app", "reviews")], "10.1.0.1:15006"))
            .collect();
        let names: BTreeSet<_> = given.registrations.iter().map(|one| format!("demo/{}", one.name)).collect();
        let mut reversed = given.clone();
        reversed.registrations.reverse();
        let (catalog, reversed) = (build(given), build(reversed));
        let backends: BTreeMap<_, _> =
            service(&catalog, "svc/demo/reviews", "demo").backends.into_iter().map(|one| (one.key.clone(), one)).collect();
        let shards = backends["demo/reviews:80"].shards;
        prop_assert!(shards.is_power_of_two());
        let mut seen = Vec::new();
        for shard in 0..shards {
            let key = format!("endpoints/demo/reviews:80/{shard}");
            let found = endpoints(&catalog, &key);
            prop_assert!(found.len() <= 64, "shard {} of {} has {}", shard, shards, found.len());
            prop_assert_eq!(&found, &endpoints(&reversed, &key));
            seen.extend(found.into_iter().map(|endpoint| endpoint.id));
        }
        prop_assert_eq!(seen.len(), count);
        prop_assert_eq!(seen.into_iter().collect::<BTreeSet<_>>(), names);
        let beyond = format!("endpoints/demo/reviews:80/{shards}");
        prop_assert_eq!(answer(&catalog, type_url::ENDPOINTS, &beyond, &client("demo", "a")), None);
    }
}

#[test]
fn self_is_for_the_proven_account_only() {
    let (catalog, _) = Catalog::build(Inputs {
        registrations: vec![Arc::new(Registration {
            namespace: "demo".into(),
            name: "reviews-0".into(),
            service_account: "reviews".into(),
            labels: BTreeMap::new(),
            ports: Vec::new(),
            dial: Dial::Application([10, 0, 0, 1].into()),
            region: String::new(),
            zone: String::new(),
        })],
        trust_domain: "cluster.local".into(),
        ..Inputs::default()
    });
    let own = client("demo", "reviews-0");
    assert!(answer(&catalog, type_url::SELF, "self/reviews-0", &own).is_some());
    let another_account = Client { service_account: "web".into(), ..own };
    assert!(answer(&catalog, type_url::SELF, "self/reviews-0", &another_account).is_none());
}
