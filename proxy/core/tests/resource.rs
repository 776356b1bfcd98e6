//! YAML in, resources and rejections out.

// Helpers of tests count as tests.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use outrigger_core::resource::{Closed, Closes, Parsed, Rejection, Resource, parse, parse_at};

fn only_rejection(text: &str) -> Rejection {
    let Parsed { resources, mut rejections, skipped } = parse("shop.yaml", text);
    assert!(resources.is_empty() && skipped.is_empty(), "{text}\n{resources:?} {skipped:?}");
    assert_eq!(rejections.len(), 1, "{text}\n{rejections:?}");
    rejections.remove(0)
}

/// A document of ours with this spec.
fn ours(kind: &str, spec: &str) -> String {
    let meta = if kind == "MeshConfig" { "{name: x}" } else { "{name: x, namespace: demo}" };
    format!("apiVersion: outrigger.dev/v1alpha1\nkind: {kind}\nmetadata: {meta}\nspec:\n{spec}\n")
}

fn http_route(rule: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: x, namespace: demo}}\nspec:\n  parentRefs: [{{group: '', kind: Service, name: reviews}}]\n  rules:\n{rule}\n"
    )
}

#[test]
fn every_kind_of_the_reference_is_read() {
    let parsed = parse("kinds.yaml", include_str!("data/kinds.yaml"));
    assert_eq!(parsed.rejections, []);
    let kinds: Vec<_> = parsed.resources.iter().map(|loaded| loaded.id.to_string()).collect();
    assert_eq!(
        kinds,
        [
            "MeshConfig default",
            "Workload demo/ratings-0",
            "TrafficPolicy demo/reviews",
            "MtlsPolicy demo/strict",
            "AuthorizationPolicy demo/reviews",
            "WasmFilter demo/cohort"
        ]
    );
}

#[test]
fn the_mesh_conformance_manifests_are_read() {
    let mut routes = 0;
    for entry in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/gateway-api")).unwrap() {
        let path = entry.unwrap().path();
        let parsed = parse(&path.display().to_string(), &std::fs::read_to_string(&path).unwrap());
        assert_eq!(parsed.rejections, [], "{path:?}");
        assert!(parsed.skipped.iter().all(|skipped| skipped.kind == "Deployment"), "{:?}", parsed.skipped);
        assert!(!parsed.resources.is_empty(), "{path:?}");
        routes += parsed.resources.iter().filter(|loaded| matches!(loaded.resource, Resource::Route(_))).count();
    }
    assert!(routes >= 21, "{routes}");
}

#[test]
fn a_bad_document_does_not_take_its_neighbours_along() {
    let text = "# first\napiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n---\nkind: [broken\n---\n\napiVersion: v1\nkind: Namespace\nmetadata: {name: b}\n";
    let parsed = parse("shop.yaml", text);
    let found: Vec<_> = parsed.resources.iter().map(|loaded| (loaded.id.name.as_str(), loaded.line)).collect();
    assert_eq!(found, [("a", 2), ("b", 9)]);
    assert_eq!(parsed.rejections.len(), 1);
    assert!(parsed.rejections[0].reason.starts_with("not valid YAML: "), "{}", parsed.rejections[0]);
    assert!((6..=7).contains(&parsed.rejections[0].line), "{}", parsed.rejections[0]);
}

#[test]
fn a_kept_document_reads_as_it_did() {
    let text = format!("---\n{}", ours("MtlsPolicy", "  mode: Strict"));
    let loaded = parse("shop.yaml", &text).resources.remove(0);
    let again = parse_at(&loaded.file, loaded.line, &loaded.document).resources.remove(0);
    assert_eq!((again.id, again.line, again.document), (loaded.id, loaded.line, loaded.document));
}

/// Each document is rejected at this line and field, with this reason.
fn check<const N: usize>(cases: [(String, u32, &str, &str); N]) {
    for (text, line, field, reason) in cases {
        let rejection = only_rejection(&text);
        let found = (rejection.line, rejection.field.as_str(), rejection.reason.as_str());
        assert_eq!(found, (line, field, reason), "{text}");
    }
}

#[test]
fn traffic_policies_are_rejected_with_line_field_and_remedy() {
    check([
        (
            ours("TrafficPolicy", "  targetRefs: [{kind: Service, name: a}]\n  timeout: {request: 1s}"),
            6,
            "spec.timeout",
            "unknown field; did you mean `timeouts`?",
        ),
        (
            ours("TrafficPolicy", "  targetRefs: [{kind: Service, name: a}]\n  timeouts:\n    request: fast"),
            7,
            "spec.timeouts.request",
            "`fast` is not a duration; write one like 250ms, 1s, 5m or 1h30m",
        ),
        (
            ours("TrafficPolicy", "  targetRefs: [{kind: Service, name: a}]\n  healthCheck: {}"),
            6,
            "spec.healthCheck",
            "not supported yet; remove it",
        ),
        (
            ours("TrafficPolicy", "  targetRefs: [{kind: Service, name: a}]\n  loadBalancer: {algorithm: Maglev}"),
            6,
            "spec.loadBalancer.algorithm",
            "Maglev is not supported yet",
        ),
        (
            ours("TrafficPolicy", "  targetRefs: [{kind: Service, name: a}]\n  loadBalancer: {algorithm: PeakEWMA}"),
            6,
            "spec.loadBalancer.algorithm",
            "`PeakEWMA` is not one of PeakEwma, LeastRequest, RoundRobin, Random, Maglev; did you mean `PeakEwma`?",
        ),
        (ours("TrafficPolicy", "  retries: {attempts: 1}"), 4, "spec.targetRefs", "missing; it is required"),
        (
            ours("TrafficPolicy", "  targetRefs: [{kind: Service, name: a}]\n  retries:\n    on: [reset, 404]"),
            7,
            "spec.retries.on[1]",
            "`404` is no reason to retry; write connect-failure, reset, a status from 500 to 599 or 429, or grpc-<code> as grpc-unavailable",
        ),
        (
            ours(
                "TrafficPolicy",
                "  targetRefs: [{group: gateway.networking.k8s.io, kind: HTTPRoute, name: a}]\n  circuitBreaker: {maxRequests: 1}",
            ),
            6,
            "spec.circuitBreaker",
            "belongs to a Service or Namespace, not to a route; put it into a policy of its own",
        ),
    ]);
}

#[test]
fn other_policies_are_rejected_with_line_field_and_remedy() {
    check([
        (
            ours("MeshConfig", "  tracing: {otlp: http://127.0.0.1:4317}"),
            5,
            "spec.tracing.otlp",
            "not supported yet; remove it",
        ),
        (
            ours("MeshConfig", "  meshRanges: [10.0.0.0/33]"),
            5,
            "spec.meshRanges[0]",
            "`10.0.0.0/33` is not a CIDR block or an IP address",
        ),
        (
            ours("WasmFilter", "  targetRefs: [{kind: Service, name: a}]\n  module: {url: http://x}"),
            6,
            "spec.module.sha256",
            "missing; it is required with `url`",
        ),
        (
            ours(
                "WasmFilter",
                "  targetRefs: [{kind: Service, name: a}]\n  module: {file: a.wasm}\n  upstreams: {out: www.example.com:80}",
            ),
            7,
            "spec.upstreams.out",
            "`www.example.com:80` is not a service of the mesh; write one like ext-authz.demo:80",
        ),
        (
            ours(
                "WasmFilter",
                "  targetRefs: [{kind: Service, name: a}]\n  module: {file: a.wasm}\n  limits: {cpuShare: 0.5%}",
            ),
            7,
            "spec.limits.cpuShare",
            "less than 1%; leave it out for no limit",
        ),
        (
            ours(
                "WasmFilter",
                "  targetRefs: [{kind: Service, name: a}]\n  module: {file: a.wasm}\n  limits: {callouts: 0}",
            ),
            7,
            "spec.limits.callouts",
            "`0` is not a number from 1 to 10000; without `upstreams` there are none",
        ),
        (
            ours("Workload", "  address: 127.0.0.1\n  ports: [{port: 70000}]"),
            6,
            "spec.ports[0].port",
            "`70000` is not a port from 1 to 65535",
        ),
    ]);
}

#[test]
fn kinds_and_services_are_rejected_with_line_field_and_remedy() {
    check([
        (ours("Rollout", "  service: reviews"), 2, "kind", "Rollout is not supported yet; remove it"),
        (ours("TraficPolicy", "  a: 1"), 2, "kind", "unknown kind `TraficPolicy`; did you mean `TrafficPolicy`?"),
        (
            "apiVersion: gateway.networking.k8s.io/v1alpha2\nkind: HTTPRoute\nmetadata: {name: x}\n".into(),
            1,
            "apiVersion",
            "HTTPRoute has no version `v1alpha2`; write `gateway.networking.k8s.io/v1` or `v1beta1`",
        ),
        (
            "apiVersion: v1\nkind: Sevice\nmetadata: {name: x}\n".into(),
            2,
            "kind",
            "unknown kind `Sevice`; did you mean `Service`?",
        ),
        (
            "apiVersion: outriger.dev/v1alpha1\nkind: MeshConfig\nmetadata: {name: x}\n".into(),
            1,
            "apiVersion",
            "unknown group `outriger.dev`; did you mean `outrigger.dev`?",
        ),
        (
            "apiVersion: v1\nkind: Service\nmetadata: {name: x}\nspec:\n  ports:\n  - port: 80\n    targetport: 8080\n"
                .into(),
            7,
            "spec.ports[0].targetport",
            "unknown field; did you mean `targetPort`?",
        ),
        (
            "apiVersion: v1\nkind: Service\nmetadata: {name: x}\nspec:\n  ports:\n  - port: eighty\n".into(),
            6,
            "spec.ports[0].port",
            "invalid type: string \"eighty\", expected i32",
        ),
        ("kind: Service\nmetadata: {name: x}\n".into(), 1, "apiVersion", "missing; it is required"),
        (
            "apiVersion: v1\nkind: Service\nmetadata:\n  name: Reviews\n".into(),
            4,
            "metadata.name",
            "`Reviews` is not a DNS label (lower-case letters, digits and -, at most 63)",
        ),
    ]);
}

#[test]
fn routes_are_rejected_with_line_field_and_remedy() {
    check([
        (
            http_route("  - backendRefs: [{name: a, port: 80, weight: 1000001}]"),
            7,
            "spec.rules[0].backendRefs[0].weight",
            "1000001 is more than 1000000",
        ),
        (
            http_route("  - backendRefs: [{name: a}]"),
            7,
            "spec.rules[0].backendRefs[0].port",
            "missing; a Service as backend needs its port",
        ),
        (http_route("  - retry: {attempts: 1}"), 7, "spec.rules[0].retry", "not supported yet; remove it"),
        (
            http_route("  - filters:\n    - type: RequestMirror"),
            8,
            "spec.rules[0].filters[0].type",
            "RequestMirror is not supported yet; remove the filter",
        ),
        (
            http_route("  - matches:\n    - path: {type: RegularExpression, value: '/(a'}"),
            8,
            "spec.rules[0].matches[0].path.value",
            "unclosed group",
        ),
        (
            http_route("  - matches:\n    - path: {value: reviews}"),
            8,
            "spec.rules[0].matches[0].path.value",
            "`reviews` does not begin with /",
        ),
        (http_route("  - name: a\n  - name: a"), 8, "spec.rules[1].name", "rule 0 has this name already"),
        (
            http_route("  - {}").replace("group: '', ", ""),
            5,
            "spec.parentRefs[0].group",
            "a Service is of the core group; write `group: \"\"`",
        ),
        (
            http_route("  - matches:\n    - path: {value: /%7Ejoe//x}"),
            8,
            "spec.rules[0].matches[0].path.value",
            "`/%7Ejoe//x` is not in canonical spelling; write `/~joe/x`",
        ),
        (
            http_route("  - matches:\n    - method: get"),
            8,
            "spec.rules[0].matches[0].method",
            "`get` is not an HTTP method; methods are written in capitals",
        ),
        (
            http_route("  - filters:\n    - type: RequestRedirect\n      requestRedirect: {statusCode: 200}"),
            9,
            "spec.rules[0].filters[0].requestRedirect.statusCode",
            "200 is not one of 301, 302, 303, 307, 308",
        ),
        (
            http_route("  - timeouts: {request: 1s, backendRequest: 2s}"),
            7,
            "spec.rules[0].timeouts.backendRequest",
            "longer than timeouts.request",
        ),
    ]);
}

#[test]
fn filters_that_stand_nowhere_are_rejected() {
    let wasm = |spec: &str| ours("WasmFilter", &format!("  module: {{file: a.wasm}}\n{spec}"));
    let route = "{group: gateway.networking.k8s.io, kind: HTTPRoute, name: r}";
    let reference = |text: &str| http_route(&format!("  - filters:\n    - type: ExtensionRef\n      {text}"));
    check([
        (
            wasm(&format!("  direction: Inbound\n  targetRefs: [{route}]")),
            7,
            "spec.targetRefs[0].kind",
            "a route's filters run at the caller; write `direction: Outbound`, or name the Service",
        ),
        (
            wasm("  direction: Outbound\n  selector: {matchLabels: {a: b}}"),
            6,
            "spec.direction",
            "a selector is for the filters of what comes to a workload; leave it out, or name a Service or route in targetRefs",
        ),
        (
            wasm(&format!("  protocol: Tcp\n  targetRefs: [{route}]")),
            6,
            "spec.protocol",
            "routes are for HTTP; a Tcp filter has a Service, a Namespace or a selector",
        ),
        (
            wasm("  selector: {matchLabels: {a: b}}\n  targetRefs: [{kind: Service, name: a}]"),
            6,
            "spec.selector",
            "excludes targetRefs; remove one of them",
        ),
        (
            reference("extensionRef: {group: example.com, kind: WasmFilter, name: f}"),
            9,
            "spec.rules[0].filters[0].extensionRef.group",
            "`example.com` is not a group of filters; write outrigger.dev",
        ),
        (
            reference("extensionRef: {group: outrigger.dev, kind: HttpFilter, name: f}"),
            9,
            "spec.rules[0].filters[0].extensionRef.kind",
            "HttpFilter is not supported yet; WasmFilter is",
        ),
        (
            http_route(
                "  - backendRefs:\n    - name: a\n      port: 80\n      filters: [{type: ExtensionRef, extensionRef: {group: outrigger.dev, kind: WasmFilter, name: f}}]",
            ),
            10,
            "spec.rules[0].backendRefs[0].filters[0].type",
            "ExtensionRef on a backendRef is not supported yet; put it on the rule",
        ),
    ]);
}

#[test]
fn a_rejection_reads_as_one_line() {
    let rejection = only_rejection(&ours("MtlsPolicy", "  mode: Strickt"));
    assert_eq!(
        rejection.to_string(),
        "shop.yaml:5: MtlsPolicy demo/x: spec.mode: `Strickt` is not one of Strict, Permissive, Disabled; did you mean `Strict`?"
    );
}

#[test]
fn policies_that_cannot_be_read_say_what_they_close() {
    let closes = |what, selector: Option<&str>| {
        let selector = selector.map(|app| [("app".to_owned(), app.to_owned())].into());
        Some(Closes { what, namespace: "demo".into(), selector })
    };
    let jwt = "  selector: {matchLabels: {app: reviews}}\n  rules: [{when: [{jwt: {claim: a}}]}]";
    let syntax = "apiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {name: x, namespace: demo}\nspec: [\n";
    for (text, expected) in [
        (ours("AuthorizationPolicy", jwt), closes(Closed::Authorization, Some("reviews"))),
        (ours("AuthorizationPolicy", "  selector: {matchlabels: {app: a}}"), closes(Closed::Authorization, None)),
        (ours("MtlsPolicy", "  mode: Nope"), closes(Closed::Mtls, None)),
        (ours("AuthorisationPolicy", "  rules: [{}]"), closes(Closed::Authorization, None)),
        (syntax.to_owned(), closes(Closed::Authorization, None)),
        (ours("TrafficPolicy", "  nope: 1"), None),
    ] {
        assert_eq!(only_rejection(&text).closes, expected, "{text}");
    }
    let broken = only_rejection(syntax);
    assert_eq!(
        (broken.kind.as_str(), broken.namespace.as_str(), broken.name.as_str()),
        ("AuthorizationPolicy", "demo", "x")
    );
}

#[test]
fn what_is_not_for_the_mesh_is_skipped_with_a_line() {
    let gateway = "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: x}\nspec: {parentRefs: [{name: gw}]}\n";
    for text in [
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: x}\n",
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: x}\n",
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: x}\n",
        "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: x}\n",
        gateway,
    ] {
        let parsed = parse("shop.yaml", text);
        assert!(parsed.resources.is_empty() && parsed.rejections.is_empty(), "{text} {:?}", parsed.rejections);
        assert_eq!(parsed.skipped.len(), 1, "{text}");
    }
    assert_eq!(
        parse("shop.yaml", gateway).skipped[0].to_string(),
        "shop.yaml:1: HTTPRoute x: skipped: no parentRef is a Service; routes of gateways are not the mesh's"
    );
}

#[test]
fn deep_nesting_is_an_error_and_no_overflow() {
    for (open, close) in [("[", "]"), ("{a: ", "}"), ("- ", "")] {
        let text = format!("{}x{}", open.repeat(50_000), close.repeat(50_000));
        assert!(!parse("shop.yaml", &text).rejections.is_empty());
    }
}

#[test]
fn authorization_paths_are_those_that_requests_can_have() {
    let paths = |path: &str| {
        let spec = format!("  rules: [{{to: [{{paths: ['{path}']}}]}}]");
        parse("shop.yaml", &ours("AuthorizationPolicy", &spec)).rejections
    };
    for path in ["/", "/a", "/a/*", "/.well-known/*", "/a/.*", "*", "*.php", "*/admin", "/%C3%A4/*"] {
        assert_eq!(paths(path), [], "{path}");
    }
    for path in ["", "a", "/%61dmin", "/a//b", "/a/../b", "/a/%2f*", "/%c3%a4", "/a*b", "*a*", "/a?b", "/a/%4*"] {
        let rejections = paths(path);
        assert_eq!(rejections.len(), 1, "{path}");
        assert_eq!(rejections[0].field, "spec.rules[0].to[0].paths[0]", "{path}");
    }
}

proptest::proptest! {
    /// Whatever a file holds: an answer, no panic.
    #[test]
    fn no_text_is_too_strange(text in "(---\n|kind: |apiVersion: |spec:\n|  |- |\\[|\\]|\\{|\\}|, |: |&a|\\*a|!t|'|\"|\\||\n|v1|Service|MtlsPolicy|outrigger.dev/v1alpha1|[a-zä0-9%]){0,40}") {
        let parsed = parse("shop.yaml", &text);
        for rejection in parsed.rejections {
            // YAML ends lines with either.
            let lines = u32::try_from(text.split(['\n', '\r']).count()).unwrap();
            proptest::prop_assert!((1..=lines + 1).contains(&rejection.line), "{}", rejection);
        }
    }
}

#[test]
fn a_module_has_exactly_one_source_and_a_remote_one_is_pinned() {
    let module = |module: &str| {
        ours("WasmFilter", &format!("  targetRefs: [{{kind: Service, name: a}}]\n  module: {{{module}}}"))
    };
    let digest = "a".repeat(64);
    for good in [
        "file: a.wasm".to_owned(),
        format!("url: 'https://files.example/a.wasm', sha256: {digest}"),
        format!("oci: 'registry.example/filters/a@sha256:{digest}'"),
        format!("oci: 'localhost:5000/filters/a:v1', sha256: {digest}"),
        format!("sha256: {digest}"),
    ] {
        assert_eq!(parse("f.yaml", &module(&good)).rejections, [], "{good}");
    }
    for (bad, field) in [
        (String::new(), "spec.module"),
        (format!("file: a.wasm, url: 'http://x/a', sha256: {digest}"), "spec.module"),
        (format!("url: 'ftp://x/a', sha256: {digest}"), "spec.module.url"),
        (format!("url: 'http://me:secret@x/a', sha256: {digest}"), "spec.module.url"),
        ("oci: 'registry.example/a:latest'".to_owned(), "spec.module.sha256"),
        (format!("oci: 'filters/a:v1', sha256: {digest}"), "spec.module.oci"),
        (format!("oci: 'oci://registry.example/a:v1', sha256: {digest}"), "spec.module.oci"),
        ("oci: 'registry.example/a@sha256:12'".to_owned(), "spec.module.oci"),
        ("sha256: 12".to_owned(), "spec.module.sha256"),
    ] {
        assert_eq!(only_rejection(&module(&bad)).field, field, "{bad}");
    }
}
