//! AuthorizationPolicy and MtlsPolicy, as callers with and without an identity see them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use outrigger_e2e::{Curl, Shop, until};

fn policy(name: &str, action: &str, rules: &str) -> String {
    format!(
        "apiVersion: outrigger.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: demo}}\n\
         spec: {{selector: {{matchLabels: {{app: reviews}}}}, action: {action}, rules: [{rules}]}}\n---\n"
    )
}

const DENIED: (u16, Option<&str>) = (403, Some("authorization-denied"));

#[test]
fn an_allow_names_who_may_do_what_and_nobody_else_may() {
    let shop = Shop::start("");
    let other = shop.mesh.proxy("other-0").start();
    assert_eq!(other.call("reviews", "/").send().status, 200, "without a policy everyone may");

    shop.write(&policy(
        "allow",
        "Allow",
        "{from: [{principals: ['spiffe://cluster.local/ns/demo/sa/web']}], to: [{methods: [GET], paths: ['/public/*']}]}",
    ));
    let denied =
        until("the policy applies", || Some(other.call("reviews", "/public/a").send()).filter(|it| it.status == 403));
    assert_eq!((denied.status, denied.reason()), DENIED);

    until("web may", || (shop.get("/public/a").status == 200).then_some(()));
    for (path, args) in [("/private", &[][..]), ("/public/a", &["--request", "DELETE"]), ("/public/../private", &[])] {
        let response = shop.call(path).args(args).send();
        assert_eq!((response.status, response.reason()), DENIED, "{path} {args:?}");
    }
    // What decides is the canonical path, in whatever disguise it comes.
    assert_eq!(shop.get("/%70ublic//a").status, 200);
    assert_eq!(shop.get("/public/%2e%2e/private").status, 403);
    assert!(shop.v1.requests().iter().chain(&shop.v2.requests()).all(|request| !request.path.contains("private")));
}

#[test]
fn a_deny_wins_over_an_allow() {
    let allow = policy("allow", "Allow", "{from: [{namespaces: [demo]}]}");
    let shop = Shop::start(&allow);
    until("web may", || (shop.get("/").status == 200).then_some(()));

    shop.write(&(allow + &policy("deny", "Deny", "{to: [{paths: ['/admin', '/admin/*']}]}")));
    until("the denial applies", || (shop.get("/admin").status == 403).then_some(()));
    assert_eq!(shop.get("/admin/x").reason(), Some("authorization-denied"));
    assert_eq!(shop.get("/").status, 200);
}

#[test]
fn plaintext_to_a_strict_workload_is_refused_and_to_a_permissive_one_served() {
    let shop = Shop::start("");
    // What an application without a proxy would send: straight to the inbound port.
    let plain = || Curl::get(&format!("http://{}/", shop.proxy1.inbound())).header("host", "reviews").send();
    until("plaintext is served by default", || (plain().status == 200).then_some(()));

    shop.write(
        "apiVersion: outrigger.dev/v1alpha1\nkind: MtlsPolicy\nmetadata: {name: strict, namespace: demo}\n\
         spec: {selector: {matchLabels: {app: reviews}}, mode: Strict}\n",
    );
    let refused = until("the policy applies", || Some(plain()).filter(|response| response.status != 200));
    assert_eq!((refused.status, refused.reason()), (403, Some("mtls-required")));
    assert_eq!(shop.get("/").status, 200, "with a sidecar it goes on");
}
