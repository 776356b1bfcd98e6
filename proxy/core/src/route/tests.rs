use fastrand::Rng;
use http::uri::Authority;
use http::{Method, Request, Response, Uri};
use outrigger_proto::mesh as wire;
use proptest::{prop_assert, proptest};
use wire::http_match::Path;
use wire::route_filter::Filter;
use wire::value_match::Value;

use super::*;
use crate::link::{self, HeaderChange, PathChange, Redirect, Rewrite, RouteFilters};

fn backend(name: &str) -> wire::Backend {
    let (namespace, service) = ("demo".to_owned(), name.to_owned());
    wire::Backend { key: format!("demo/{name}:80"), namespace, service, port: 80, shards: 1, ..Default::default() }
}

fn exact(name: &str, value: &str) -> wire::ValueMatch {
    wire::ValueMatch { name: name.into(), value: Some(Value::Exact(value.into())) }
}

fn matching(name: &str, pattern: &str) -> wire::ValueMatch {
    wire::ValueMatch { name: name.into(), value: Some(Value::Regex(pattern.into())) }
}

fn on(path: Path) -> wire::HttpMatch {
    wire::HttpMatch { path: Some(path), ..Default::default() }
}

fn prefix(path: &str) -> wire::HttpMatch {
    on(Path::Prefix(path.into()))
}

/// A service whose rule `n` belongs to match `n`.
fn wire_service(matches: Vec<wire::HttpMatch>) -> wire::Service {
    let rules = (0..matches.len()).map(|i| wire::HttpRule { name: i.to_string(), ..Default::default() });
    let rules = rules.collect();
    let matches = matches.into_iter().zip(0..).map(|(one, rule)| wire::HttpMatch { rule, ..one }).collect();
    let port = wire::ServicePort {
        port: 80,
        backend: "demo/reviews:80".into(),
        routes: Some(wire::HttpRoutes { matches, rules }),
        ..Default::default()
    };
    wire::Service { ports: vec![port], backends: vec![backend("reviews")], ..Default::default() }
}

fn port(matches: Vec<wire::HttpMatch>) -> Port {
    link::service(&wire_service(matches)).unwrap().ports.remove(0)
}

/// Name of the rule that a request gets.
fn selected(port: &Port, method: &str, uri: &str, headers: &[(&str, &str)]) -> Option<String> {
    let request = headers.iter().fold(Request::builder().method(method).uri(uri), |r, (k, v)| r.header(*k, *v));
    let (head, ()) = request.body(()).unwrap().into_parts();
    let head = Head { method: &head.method, path: head.uri.path(), query: head.uri.query(), headers: &head.headers };
    select(port, &head).map(|selected| selected.rule.name.to_string())
}

fn gets(port: &Port, uri: &str) -> Option<String> {
    selected(port, "GET", uri, &[])
}

#[test]
fn without_routes_the_backend_is_implicit() {
    let mut wire = wire_service(vec![]);
    wire.ports[0].routes = None;
    let service = link::service(&wire).unwrap();
    let head = Head { method: &Method::GET, path: "/", query: None, headers: &HeaderMap::new() };
    let rule = select(&service.ports[0], &head).unwrap().rule;
    assert!(rule.simple);
    assert!(
        matches!(split(rule, &mut Rng::with_seed(1), |_| false), Split::Backend(_, one) if &*one.key == "demo/reviews:80")
    );
}

#[test]
fn routes_without_a_match_leave_nothing() {
    assert_eq!(gets(&port(vec![]), "/"), None);
    assert_eq!(gets(&port(vec![on(Path::Exact("/a".into()))]), "/a/"), None);
}

#[test]
fn a_prefix_is_matched_by_element() {
    let port = port(vec![prefix("/v2/"), prefix("/v2example/x"), prefix("")]);
    for (path, rule) in [
        ("/v2", "0"),
        ("/v2/", "0"),
        ("/v2/a", "0"),
        ("/v2example", "2"),
        ("/v2example/x", "1"),
        ("/V2", "2"),
        ("/", "2"),
    ] {
        assert_eq!(gets(&port, path).as_deref(), Some(rule), "{path}");
    }
}

#[test]
fn the_first_match_that_holds_wins() {
    let port = port(vec![on(Path::Exact("/a".into())), prefix("/a"), prefix("/")]);
    assert_eq!(gets(&port, "/a").as_deref(), Some("0"));
    assert_eq!(gets(&port, "/a/b").as_deref(), Some("1"));
    assert_eq!(gets(&port, "/b").as_deref(), Some("2"));
}

#[test]
fn expressions_match_the_whole() {
    let port = port(vec![
        on(Path::Regex("/a|/b".into())),
        wire::HttpMatch { headers: vec![matching("X-Side", "c.*y")], ..Default::default() },
    ]);
    assert_eq!(gets(&port, "/b").as_deref(), Some("0"));
    assert_eq!(gets(&port, "/ab"), None);
    assert_eq!(selected(&port, "GET", "/", &[("x-side", "canary")]).as_deref(), Some("1"));
    assert_eq!(selected(&port, "GET", "/", &[("x-side", "my canary")]), None);
}

#[test]
fn method_headers_and_query_must_all_hold() {
    let port = port(vec![wire::HttpMatch {
        method: "POST".into(),
        headers: vec![exact("x-a", "1"), exact("x-b", "2, 3,4")],
        query: vec![exact("animal", "blue whale"), exact("empty", "")],
        ..Default::default()
    }]);
    let headers = [("X-A", "1"), ("x-b", "2, 3"), ("X-B", "4")];
    for query in ["animal=blue+whale&empty", "empty=&animal=blue%20whale", "empty&%61nimal=blue%20whale&animal=other"] {
        assert_eq!(selected(&port, "POST", &format!("/?{query}"), &headers).as_deref(), Some("0"), "{query}");
    }
    let query = "/?animal=blue+whale&empty";
    assert_eq!(selected(&port, "GET", query, &headers), None);
    assert_eq!(selected(&port, "POST", query, &headers[1..]), None);
    assert_eq!(selected(&port, "POST", query, &headers[..2]), None);
    for query in
        ["", "animal=blue+whale", "animal=other&animal=blue+whale&empty", "Animal=blue+whale&empty", "animal=%ff&empty"]
    {
        assert_eq!(selected(&port, "POST", &format!("/?{query}"), &headers), None, "{query}");
    }
}

#[test]
fn what_cannot_be_linked_names_the_field() {
    let fails = |wire: &wire::Service| link::service(wire).unwrap_err().to_string();
    let regex = fails(&wire_service(vec![prefix("/"), on(Path::Regex("a)|(?:b".into()))]));
    assert!(regex.starts_with("ports[0].routes.matches[1].path: regular expression `a)|(?:b`"), "{regex}");
    let huge = fails(&wire_service(vec![on(Path::Regex("\\w{1000}{1000}".into()))]));
    assert!(huge.contains("size limit"), "{huge}");
    let header = wire::HttpMatch { headers: vec![exact("a b", "c")], ..Default::default() };
    assert_eq!(
        fails(&wire_service(vec![header])),
        "ports[0].routes.matches[0].headers[0].name: `a b` is not a header name"
    );
    let mut missing = wire_service(vec![]);
    missing.ports[0].backend = "demo/ratings:80".into();
    assert_eq!(fails(&missing), "ports[0].backend: `demo/ratings:80` is not among the service's backends");
    let mut framing = wire_service(vec![prefix("/")]);
    let set = vec![wire::Header { name: "Content-Length".into(), value: "1".into() }];
    let filter = Filter::RequestHeaders(wire::HeaderModifier { set, ..Default::default() });
    framing.ports[0].routes.as_mut().unwrap().rules[0].filters = vec![wire::RouteFilter { filter: Some(filter) }];
    assert_eq!(
        fails(&framing),
        "ports[0].routes.rules[0].filters[0].set[0].name: `content-length` cannot be changed by a header modifier"
    );
    framing.ports[0].routes.as_mut().unwrap().rules[0].filters = vec![wire::RouteFilter { filter: None }];
    assert!(fails(&framing).contains("filters[0]: is not known"));
}

/// A rule with these shares; a name of "" is an invalid one.
fn rule_of(shares: &[(&str, u32)]) -> Arc<Rule> {
    let mut wire = wire_service(vec![prefix("/")]);
    let share = |(name, weight): &(&str, u32)| match *name {
        "" => wire::WeightedBackend { weight: *weight, invalid: "no such Service".into(), ..Default::default() },
        name => wire::WeightedBackend { backend: backend(name).key, weight: *weight, ..Default::default() },
    };
    wire.ports[0].routes.as_mut().unwrap().rules[0].backends = shares.iter().map(share).collect();
    wire.backends.extend(shares.iter().filter(|(name, _)| !name.is_empty()).map(|(name, _)| backend(name)));
    Arc::clone(&link::service(&wire).unwrap().ports[0].routes.as_ref().unwrap().rules[0])
}

/// How often each share was drawn in 10,000 requests.
fn drawn(shares: &[(&str, u32)], ready: &[&str]) -> Vec<u32> {
    let rule = rule_of(shares);
    let mut rng = Rng::with_seed(7);
    let mut counts = vec![0; shares.len() + 1];
    for _ in 0..10_000 {
        let name = match split(&rule, &mut rng, |one| ready.contains(&&*one.service)) {
            Split::Backend(_, one) => one.service.to_string(),
            Split::Invalid(why) => {
                assert_eq!(why, "no such Service");
                String::new()
            }
            Split::None => "none".into(),
        };
        let place = shares.iter().position(|(share, _)| *share == name).unwrap_or(shares.len());
        counts[place] += 1;
    }
    counts
}

#[test]
fn a_backend_that_is_not_ready_gives_its_share_to_a_ready_sibling() {
    assert_eq!(drawn(&[("v1", 50), ("v2", 50)], &["v1"]), [10_000, 0, 0]);
    let nobody = drawn(&[("v1", 50), ("v2", 50)], &[]);
    assert!(nobody[0] > 4_500 && nobody[1] > 4_500, "each keeps its share of 503s: {nobody:?}");
    assert_eq!(drawn(&[("v1", 1), ("v2", 0)], &["v2"]), [10_000, 0, 0], "weight 0 gets nothing, even then");
}

#[test]
fn an_invalid_share_keeps_its_share() {
    let counts = drawn(&[("v1", 50), ("", 25), ("v2", 25)], &["v1"]);
    assert!((2_300..2_700).contains(&counts[1]), "{counts:?}");
    assert_eq!((counts[0] + counts[1], counts[2]), (10_000, 0));
}

#[test]
fn no_weight_is_no_backend() {
    assert_eq!(drawn(&[("v1", 0)], &["v1"]), [0, 10_000]);
    assert_eq!(drawn(&[("v1", 0), ("v2", 0)], &["v1"]), [0, 0, 10_000]);
    assert_eq!(drawn(&[], &[]), [10_000]);
}

proptest! {
    #[test]
    fn shares_converge(weights in proptest::collection::vec(0u32..=1000, 1..6)) {
        let names = ["a", "b", "c", "d", "e"];
        let shares: Vec<_> = names.into_iter().zip(weights.iter().copied()).collect();
        let sum: u32 = weights.iter().sum();
        let counts = drawn(&shares, &names);
        for (weight, count) in weights.iter().zip(&counts) {
            let share = f64::from(*weight) / f64::from(sum.max(1));
            // Six standard deviations.
            let bound = 6.0 * (10_000.0 * share * (1.0 - share)).sqrt() + 1.0;
            prop_assert!((f64::from(*count) - 10_000.0 * share).abs() <= bound, "{:?} {:?}", weights, counts);
        }
    }
}

#[test]
fn modifiers_set_add_and_remove() {
    let pair = |name: &'static str, value: &'static str| (HeaderName::from_static(name), value.parse().unwrap());
    let change = HeaderChange {
        set: vec![pair("x-set", "new"), pair("x-set-new", "new")],
        add: vec![pair("x-add", "b"), pair("x-add-new", "b"), pair("set-cookie", "c=d")],
        remove: vec![HeaderName::from_static("x-remove")],
    };
    let filters = RouteFilters { request: vec![change.clone()], response: vec![change], ..Default::default() };
    let given = [
        ("X-Set", "old"),
        ("X-Set", "older"),
        ("X-Add", "a"),
        ("X-Remove", "1"),
        ("X-Other", "1"),
        ("Set-Cookie", "a=b"),
    ];
    let (mut head, ()) =
        given.iter().fold(Request::get("/"), |r, (k, v)| r.header(*k, *v)).body(()).unwrap().into_parts();
    let (mut answer, ()) =
        given.iter().fold(Response::builder(), |r, (k, v)| r.header(*k, *v)).body(()).unwrap().into_parts();
    modify_request(&filters, &mut head);
    modify_response(&filters, &mut answer);
    for headers in [&head.headers, &answer.headers] {
        let all = |name| headers.get_all(name).iter().map(|v| v.to_str().unwrap()).collect::<Vec<_>>();
        assert_eq!((all("x-set"), all("x-set-new")), (vec!["new"], vec!["new"]));
        assert_eq!((all("x-add"), all("x-add-new")), (vec!["a,b"], vec!["b"]));
        assert_eq!((all("x-remove"), all("x-other")), (vec![], vec!["1"]));
        assert_eq!(all("set-cookie"), ["a=b", "c=d"], "cookies cannot be joined");
    }
}

fn rewritten(uri: &str, prefix: Option<&str>, path: PathChange) -> String {
    let (mut head, ()) = Request::get(uri).body(()).unwrap().into_parts();
    rewrite(&Rewrite { hostname: None, path: Some(path) }, &mut head, None, prefix);
    head.uri.to_string()
}

/// The specification's table (HTTPPathModifier): request path, prefix match, replacement, result.
#[test]
fn the_table_of_prefix_replacements() {
    for (path, prefix, new, result) in [
        ("/foo/bar", "/foo", "/xyz", "/xyz/bar"),
        ("/foo/bar", "/foo", "/xyz/", "/xyz/bar"),
        ("/foo/bar", "/foo/", "/xyz", "/xyz/bar"),
        ("/foo/bar", "/foo/", "/xyz/", "/xyz/bar"),
        ("/foo", "/foo", "/xyz", "/xyz"),
        ("/foo/", "/foo", "/xyz", "/xyz/"),
        ("/foo/bar", "/foo", "", "/bar"),
        ("/foo/", "/foo", "", "/"),
        ("/foo", "/foo", "", "/"),
        ("/foo/", "/foo", "/", "/"),
        ("/foo", "/foo", "/", "/"),
    ] {
        // The linker takes the trailing slash of a prefix away.
        let found = rewritten(path, Some(prefix.trim_end_matches('/')), PathChange::Prefix(new.into()));
        assert_eq!(found, result, "{path} {prefix} {new}");
    }
    assert_eq!(rewritten("/a/b", Some(""), PathChange::Prefix("/x".into())), "/x/a/b");
}

#[test]
fn what_is_rewritten_is_the_path_that_matched() {
    for (sent, canonical) in [("/%61/x?q", "/a/x"), ("//a/x?q", "/a/x"), ("/a/../../a/x?q", "/a/x")] {
        let (mut head, ()) = Request::get(sent).body(()).unwrap().into_parts();
        let change = Rewrite { hostname: None, path: Some(PathChange::Prefix("/tenants/a".into())) };
        rewrite(&change, &mut head, Some(canonical), Some("/a"));
        assert_eq!(head.uri, "/tenants/a/x?q", "{sent}");
    }
}

#[test]
fn a_rewrite_keeps_the_query_and_changes_the_host() {
    assert_eq!(rewritten("/foo/bar?a=b&c", Some("/foo"), PathChange::Prefix("/x".into())), "/x/bar?a=b&c");
    assert_eq!(rewritten("/foo?a=b", None, PathChange::Full("/one/two".into())), "/one/two?a=b");
    assert_eq!(rewritten("http://reviews/foo?a", Some("/foo"), PathChange::Prefix("".into())), "http://reviews/?a");
    let change = Rewrite { hostname: Some("one.example".parse().unwrap()), path: None };
    for (uri, result) in [("/a?b", "/a?b"), ("https://reviews/a?b", "https://one.example/a?b")] {
        let (mut head, ()) = Request::get(uri).header("host", "reviews").body(()).unwrap().into_parts();
        rewrite(&change, &mut head, None, None);
        assert_eq!((head.uri.to_string().as_str(), &head.headers["host"]), (result, &"one.example".parse().unwrap()));
    }
}

fn location(change: &Redirect, scheme: &str, port: u16, uri: &str, prefix: Option<&str>) -> String {
    let uri: Uri = uri.parse().unwrap();
    let authority = Authority::from_static("example.org:8080");
    let (status, location) = redirect(change, scheme, &authority, port, uri.path(), uri.query(), prefix);
    format!("{} {}", status.as_u16(), location.to_str().unwrap())
}

#[test]
fn redirects_follow_gateway_api() {
    let base = Redirect { scheme: None, hostname: None, path: None, port: None, status: http::StatusCode::FOUND };
    let host = Redirect { hostname: Some("new.example".into()), ..base.clone() };
    assert_eq!(location(&host, "http", 80, "/a?b", None), "302 http://new.example/a?b");
    assert_eq!(location(&host, "http", 8080, "/a", None), "302 http://new.example:8080/a");
    assert_eq!(location(&host, "https", 443, "/a", None), "302 https://new.example/a");
    let scheme = Redirect { scheme: Some("https".into()), ..base.clone() };
    assert_eq!(location(&scheme, "http", 8080, "/a", None), "302 https://example.org/a", "its well-known port");
    let both = Redirect { port: Some(8443), status: http::StatusCode::MOVED_PERMANENTLY, ..scheme };
    assert_eq!(location(&both, "http", 80, "/a", None), "301 https://example.org:8443/a");
    let port = Redirect { port: Some(80), ..base.clone() };
    assert_eq!(location(&port, "http", 8080, "/a", None), "302 http://example.org/a", "80 is left out");
    let full = Redirect { path: Some(PathChange::Full("/full".into())), ..base.clone() };
    assert_eq!(location(&full, "http", 80, "/a?b", None), "302 http://example.org/full?b");
    let replaced = Redirect { path: Some(PathChange::Prefix("/x".into())), ..base };
    assert_eq!(location(&replaced, "http", 80, "/a/b", Some("/a")), "302 http://example.org/x/b");
}
