//! What filters a service, a rule and a port have, and where their modules are.

use super::*;

#[test]
fn a_pinned_module_goes_on_from_what_is_held() {
    let pinned = |digest: &str| {
        format!(
            "{}---\napiVersion: outrigger.dev/v1alpha1\nkind: WasmFilter\nmetadata: {{name: f, namespace: demo}}\nspec: {{targetRefs: [{{kind: Service, name: reviews}}], module: {{file: filters/cohort.wasm, sha256: {digest}}}}}\n",
            plain_service("demo", "reviews")
        )
    };
    let other = "cd".repeat(32);
    let mut with = inputs(&pinned(&other));
    assert_eq!(
        rejected(with.clone()),
        [format!(
            "config/shop.yaml:10: WasmFilter demo/f: spec.module.sha256: config/filters/cohort.wasm has digest {}, not this one",
            "ab".repeat(32)
        )]
    );
    with.modules.held.insert(other.clone(), 77);
    assert_eq!(build(with).wasm_modules(), [Module { sha256: other, size: 77 }]);
}

#[test]
fn a_filter_without_its_module_fails_closed_or_is_left_out() {
    for (policy, listed) in [("FailClosed", vec!["filter/demo/f".to_owned()]), ("FailOpen", Vec::new())] {
        let text = format!(
            "{}---\napiVersion: outrigger.dev/v1alpha1\nkind: WasmFilter\nmetadata: {{name: f, namespace: demo}}\nspec: {{targetRefs: [{{kind: Service, name: reviews}}], direction: Outbound, failurePolicy: {policy}, module: {{file: gone.wasm}}}}\n",
            plain_service("demo", "reviews")
        );
        let (catalog, rejections) = Catalog::build(inputs(&text));
        assert_eq!(rejections[0].reason, "config/gone.wasm cannot be read");
        assert_eq!(service(&catalog, "svc/demo/reviews", "demo").ports[0].filters, listed);
        assert_eq!(answer(&catalog, type_url::FILTER, "filter/demo/f", &client("demo", "a")), None);
    }
}

/// A WasmFilter of this namespace.
fn wasm(namespace: &str, name: &str, order: i32, spec: &str) -> String {
    format!(
        "---\napiVersion: outrigger.dev/v1alpha1\nkind: WasmFilter\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {{module: {{file: filters/cohort.wasm}}, order: {order}, {spec}}}\n"
    )
}

/// Filters of the rules of demo/reviews as this namespace sees them; of no rule, those of the port.
fn rule_filters(catalog: &Catalog, namespace: &str) -> Vec<Vec<String>> {
    let service = service(catalog, "svc/demo/reviews", namespace);
    service.ports[0].routes.as_ref().unwrap().rules.iter().map(|rule| rule.wasm.clone()).collect()
}

#[test]
fn filters_of_a_route_run_for_its_rules_among_those_of_the_service() {
    let gateway = "group: gateway.networking.k8s.io";
    let rules = "[{name: one}, {name: two, filters: [{type: ExtensionRef, extensionRef: {group: outrigger.dev, kind: WasmFilter, name: named}}]}]";
    let text = [
        plain_service("demo", "reviews"),
        route("HTTPRoute", "demo", "r", rules),
        wasm("demo", "all", 5, "direction: Outbound, targetRefs: [{kind: Service, name: reviews}]"),
        wasm("demo", "routed", 9, &format!("targetRefs: [{{{gateway}, kind: HTTPRoute, name: r}}]")),
        wasm("demo", "of-one", 1, &format!("targetRefs: [{{{gateway}, kind: HTTPRoute, name: r, sectionName: one}}]")),
        wasm("demo", "named", 7, "rootId: x"),
        // Of the same name, and another kind, namespace or route.
        wasm("demo", "grpc", 0, &format!("targetRefs: [{{{gateway}, kind: GRPCRoute, name: r}}]")),
        wasm("demo", "elsewhere", 0, &format!("targetRefs: [{{{gateway}, kind: HTTPRoute, name: other}}]")),
        wasm("other", "foreign", 0, &format!("targetRefs: [{{{gateway}, kind: HTTPRoute, name: r}}]")),
    ];
    let catalog = build(inputs(&text.concat()));
    let reviews = service(&catalog, "svc/demo/reviews", "demo");
    assert_eq!(reviews.ports[0].filters, ["filter/demo/all"]);
    assert_eq!(
        rule_filters(&catalog, "demo"),
        [
            ["filter/demo/of-one", "filter/demo/all", "filter/demo/routed"],
            ["filter/demo/all", "filter/demo/named", "filter/demo/routed"]
        ]
    );
    let linked = link::service(&reviews).unwrap();
    let rule = &linked.ports[0].routes.as_ref().unwrap().rules[0];
    assert_eq!(linked.ports[0].chain(Some(rule))[0], "filter/demo/of-one");
    assert_eq!(linked.ports[0].chain(None), ["filter/demo/all"]);
    assert!(linked.ports[0].every_filter().any(|key| key == "filter/demo/named"));
}

#[test]
fn a_consumers_route_has_the_filters_of_its_own_namespace() {
    let reference = "{type: ExtensionRef, extensionRef: {group: outrigger.dev, kind: WasmFilter, name: f}}";
    let text = [
        plain_service("demo", "reviews"),
        route("HTTPRoute", "web", "r", &format!("[{{filters: [{reference}]}}]")),
        wasm("web", "f", 0, "rootId: x"),
        wasm("demo", "all", 5, "direction: Outbound, targetRefs: [{kind: Service, name: reviews}]"),
    ];
    let catalog = build(inputs(&text.concat()));
    assert_eq!(rule_filters(&catalog, "web"), [["filter/web/f", "filter/demo/all"]]);
    let others = service(&catalog, "svc/demo/reviews", "demo");
    assert!(others.ports[0].routes.is_none());
}

#[test]
fn a_filter_that_a_rule_names_and_that_is_not_there_fails_its_requests_and_is_a_warning() {
    let reference = |name: &str| {
        format!("{{type: ExtensionRef, extensionRef: {{group: outrigger.dev, kind: WasmFilter, name: {name}}}}}")
    };
    let rules = format!("[{{filters: [{}]}}, {{filters: [{}]}}, {{}}]", reference("gone"), reference("for-tcp"));
    let text = [
        plain_service("demo", "reviews"),
        route("HTTPRoute", "demo", "r", &rules),
        wasm("demo", "for-tcp", 0, "protocol: Tcp, targetRefs: [{kind: Service, name: reviews}]"),
    ];
    let catalog = build(inputs(&text.concat()));
    assert_eq!(rule_filters(&catalog, "demo"), [vec!["filter/demo/gone"], vec!["filter/demo/for-tcp"], vec![]]);
    let warnings: Vec<_> = catalog.warnings().into_iter().map(|warning| warning.reason).collect();
    assert!(
        warnings.contains(&"there is no WasmFilter demo/gone for HTTP; the rule's requests fail".to_owned()),
        "{warnings:?}"
    );
}

#[test]
fn a_selector_and_the_protocol_say_which_ports_have_a_filter() {
    let text = [
        plain_service("demo", "reviews"),
        wasm("demo", "v1", 0, "selector: {matchLabels: {version: v1}}"),
        wasm("demo", "v1-tcp", 0, "protocol: Tcp, selector: {matchLabels: {version: v1}}"),
        wasm("demo", "out-tcp", 0, "protocol: Tcp, direction: Outbound, targetRefs: [{kind: Service, name: reviews}]"),
    ];
    let catalog = build(inputs(&text.concat()));
    let (one, two) = (own(&catalog, "reviews-v1-0"), own(&catalog, "reviews-v2-0"));
    for port in &one.ports {
        assert_eq!(port.filters, ["filter/demo/v1"], "of every port, in a Service or not");
        assert_eq!(port.stream_filters, ["filter/demo/v1-tcp"]);
    }
    assert!(two.ports.iter().all(|port| port.filters.is_empty() && port.stream_filters.is_empty()));
    let port = &service(&catalog, "svc/demo/reviews", "demo").ports[0];
    assert_eq!(
        (port.filters.len(), port.stream_filters.as_slice()),
        (0, ["filter/demo/out-tcp".to_owned()].as_slice())
    );
}
