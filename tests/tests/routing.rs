//! HTTPRoute from outside: curl asks, and the applications say what reached them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use outrigger_e2e::{Shop, until};

/// A route on `reviews` with these rules; each rule's text begins at column 0.
fn route(rules: &str) -> String {
    let rules = rules.trim().replace('\n', "\n  ");
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: reviews, namespace: demo}}\n\
         spec:\n  parentRefs: [{{group: '', kind: Service, name: reviews}}]\n  rules:\n  {rules}\n"
    )
}

/// The version that answers this path (with these headers and method).
fn backend(shop: &Shop, path: &str, args: &[&str]) -> String {
    let response = shop.call(path).args(args).send();
    response.header("x-backend").unwrap_or_else(|| panic!("{path} {args:?}: {response:?}")).to_owned()
}

#[test]
fn matches_choose_by_path_header_query_and_method() {
    let v2 = "backendRefs: [{name: reviews-v2, port: 80}]";
    let shop = Shop::start(&route(&format!(
        "
- matches: [{{path: {{type: Exact, value: /exact}}}}]
  {v2}
- matches: [{{path: {{type: PathPrefix, value: /prefix}}}}]
  {v2}
- matches: [{{path: {{type: RegularExpression, value: '/re[0-9]+/x'}}}}]
  {v2}
- matches: [{{headers: [{{name: X-Canary, value: 'yes'}}]}}]
  {v2}
- matches: [{{queryParams: [{{name: side, value: b}}]}}]
  {v2}
- matches: [{{method: DELETE}}]
  {v2}
- backendRefs: [{{name: reviews-v1, port: 80}}]
"
    )));
    until("the route applies", || (backend(&shop, "/exact", &[]) == "v2").then_some(()));

    for path in ["/exact", "/exact?q=1", "/prefix", "/prefix/", "/prefix/deep", "/re7/x", "/any?side=b", "/%65xact"] {
        assert_eq!(backend(&shop, path, &[]), "v2", "{path}");
    }
    for path in ["/", "/exact/", "/prefixes", "/re/x", "/re7/x/y", "/any?side=c", "/any?Side=b", "/prefix/../other"] {
        assert_eq!(backend(&shop, path, &[]), "v1", "{path}");
    }
    assert_eq!(backend(&shop, "/", &["--header", "x-canary: yes"]), "v2");
    assert_eq!(backend(&shop, "/", &["--header", "x-canary: yes please"]), "v1");
    assert_eq!(backend(&shop, "/", &["--request", "DELETE"]), "v2");
    assert_eq!(backend(&shop, "/", &["--request", "PUT"]), "v1");
}

#[test]
fn the_more_specific_match_wins_whatever_the_order() {
    let rule = |matches: &str, version: &str| {
        format!("- matches: [{matches}]\n  backendRefs: [{{name: reviews-{version}, port: 80}}]\n")
    };
    let shop = Shop::start(&route(
        &[
            rule("{path: {type: PathPrefix, value: /}}", "v1"),
            rule("{path: {type: PathPrefix, value: /a}, headers: [{name: x-h, value: '1'}]}", "v1"),
            rule("{path: {type: PathPrefix, value: /a/b}}", "v2"),
            rule("{path: {type: Exact, value: /a/b/c}}", "v1"),
            rule("{path: {type: PathPrefix, value: /m}}", "v1"),
            rule("{path: {type: PathPrefix, value: /m}, method: GET}", "v2"),
        ]
        .concat(),
    ));
    until("the route applies", || (backend(&shop, "/a/b", &[]) == "v2").then_some(()));

    assert_eq!(backend(&shop, "/a/b/d", &["--header", "x-h: 1"]), "v2", "a longer prefix before headers");
    assert_eq!(backend(&shop, "/a/b/c", &[]), "v1", "exact before prefix");
    assert_eq!(backend(&shop, "/m", &[]), "v2", "a method before none");
    assert_eq!(backend(&shop, "/m", &["--request", "PUT"]), "v1");
}

#[test]
fn no_match_is_404_and_no_backend_500() {
    let shop = Shop::start(&route(
        "
- matches: [{path: {type: Exact, value: /only}}]
  backendRefs: [{name: reviews-v1, port: 80}]
- matches: [{path: {type: Exact, value: /nowhere}}]
  backendRefs: [{name: absent, port: 80}]
",
    ));
    until("the route applies", || (shop.get("/").status == 404).then_some(()));
    assert_eq!(shop.get("/").reason(), Some("no-route"));
    assert_eq!(shop.get("/only").status, 200);
    let response = shop.get("/nowhere");
    assert_eq!((response.status, response.reason()), (500, Some("no-backend")));
}

#[test]
fn headers_are_set_added_and_removed_both_ways() {
    let shop = Shop::start(&route(
        "
- filters:
  - type: RequestHeaderModifier
    requestHeaderModifier: {set: [{name: x-set, value: new}], add: [{name: x-add, value: more}], remove: [x-gone]}
  - type: ResponseHeaderModifier
    responseHeaderModifier: {set: [{name: x-answer, value: 'yes'}], remove: [x-backend]}
  backendRefs: [{name: reviews-v1, port: 80}]
",
    ));
    let response = until("the route applies", || {
        let call = shop.call("/").header("x-set", "old").header("x-add", "first").header("x-gone", "1");
        Some(call.send()).filter(|response| response.header("x-answer") == Some("yes"))
    });
    assert_eq!(response.header("x-backend"), None);
    let arrived = shop.v1.requests().pop().unwrap();
    assert_eq!(arrived.header("x-set"), Some("new"));
    assert_eq!(arrived.header("x-gone"), None);
    let added: Vec<&str> =
        arrived.headers.iter().filter(|(name, _)| name == "x-add").map(|(_, value)| value.as_str()).collect();
    assert_eq!(added.join(", ").replace(", ", ","), "first,more");
}

#[test]
fn redirects_answer_and_rewrites_change_the_request() {
    let shop = Shop::start(&route(
        "
- matches: [{path: {type: PathPrefix, value: /old}}]
  filters:
  - type: RequestRedirect
    requestRedirect: {hostname: new.example, path: {type: ReplacePrefixMatch, replacePrefixMatch: /new}, statusCode: 301}
- matches: [{path: {type: PathPrefix, value: /api}}]
  filters:
  - type: URLRewrite
    urlRewrite: {hostname: inner.example, path: {type: ReplacePrefixMatch, replacePrefixMatch: /v2}}
  backendRefs: [{name: reviews-v1, port: 80}]
",
    ));
    let redirected = until("the route applies", || Some(shop.get("/old/page?q=1")).filter(|one| one.status == 301));
    assert_eq!(redirected.header("location"), Some("http://new.example/new/page?q=1"));
    assert_eq!(redirected.reason(), Some("route-response"));

    assert_eq!(shop.get("/api/list?q=1").status, 200);
    let arrived = shop.v1.requests().pop().unwrap();
    assert_eq!((arrived.path.as_str(), arrived.header("host")), ("/v2/list?q=1", Some("inner.example")));
}

#[test]
fn weights_split_in_proportion() {
    let shop = Shop::start(&route(
        "
- backendRefs:
  - {name: reviews-v1, port: 80, weight: 80}
  - {name: reviews-v2, port: 80, weight: 20}
",
    ));
    until("the canary answers", || (backend(&shop, "/", &[]) == "v2").then_some(()));
    let (before1, before2) = (shop.v1.count(), shop.v2.count());
    let many = "/[1-500]";
    // curl itself makes 500 requests of one connection out of the pattern.
    let output = std::process::Command::new("curl")
        .args(["--silent", "--output", "/dev/null", "--header", "host: reviews", &shop.web.url(many)])
        .status();
    assert!(output.unwrap().success());
    let (one, two) = (shop.v1.count() - before1, shop.v2.count() - before2);
    assert_eq!(one + two, 500);
    // Six standard deviations of 500 draws at a fifth.
    assert!((46..=154).contains(&two), "{two} of 500");
}
