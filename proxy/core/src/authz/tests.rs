use super::*;

const WEB: &str = "spiffe://cluster.local/ns/demo/sa/web";

fn texts(list: &[&str]) -> Vec<String> {
    list.iter().map(|text| (*text).to_owned()).collect()
}

fn rule(name: &str, from: Vec<wire::Source>, to: Vec<wire::Operation>) -> wire::AuthorizationRule {
    wire::AuthorizationRule { name: name.into(), from, to, when: vec![] }
}

fn principals(list: &[&str]) -> Vec<wire::Source> {
    vec![wire::Source { principals: texts(list), ..Default::default() }]
}

fn paths(list: &[&str]) -> Vec<wire::Operation> {
    vec![wire::Operation { paths: texts(list), ..Default::default() }]
}

fn linked(wire: &wire::Authorization) -> Authorization {
    Authorization::link(wire).unwrap()
}

fn allowing(allow: Vec<wire::AuthorizationRule>) -> Authorization {
    linked(&wire::Authorization { default_deny: true, allow, ..Default::default() })
}

/// A request whose parts the tests change one at a time.
#[derive(Clone)]
struct Sent {
    peer: Option<SpiffeId>,
    ip: IpAddr,
    port: u16,
    method: Method,
    path: &'static str,
    headers: HeaderMap,
}

fn sent() -> Sent {
    let headers = HeaderMap::new();
    let ip = [192, 0, 2, 1].into();
    Sent { peer: Some(WEB.parse().unwrap()), ip, port: 8080, method: Method::GET, path: "/reviews/1", headers }
}

impl Sent {
    fn as_request(&self) -> Request<'_> {
        let Self { peer, ip, port, method, path, headers } = self;
        Request { peer: peer.as_ref(), ip: *ip, port: *port, method, path, headers }
    }

    fn may(&self, rules: &Authorization) -> bool {
        rules.decide(&self.as_request()).outcome.is_ok()
    }

    fn may_connect(&self, rules: &Authorization) -> bool {
        let connection = Connection { peer: self.peer.as_ref(), ip: self.ip, port: self.port };
        rules.decide_connection(&connection).outcome.is_ok()
    }
}

#[test]
fn without_policies_all_is_allowed_and_with_an_allow_the_rest_is_denied() {
    assert!(sent().may(&Authorization::default()));
    let rules = allowing(vec![rule("demo/p/0", principals(&[WEB]), vec![])]);
    let request = sent();
    let verdict = rules.decide(&request.as_request()).clone();
    assert_eq!((verdict.outcome, verdict.rule), (Ok(()), Some("demo/p/0")));
    let other = Sent { peer: Some("spiffe://cluster.local/ns/demo/sa/other".parse().unwrap()), ..sent() };
    let verdict = rules.decide(&other.as_request());
    assert_eq!((verdict.outcome, verdict.rule), (Err(Reason::Unauthorized), None));
    assert!(!Sent { peer: None, ..sent() }.may(&rules), "plaintext has no principal");
    assert!(!sent().may(&allowing(vec![])), "an Allow policy without rules allows nothing");
}

#[test]
fn deny_goes_before_allow_and_is_named() {
    let rules = linked(&wire::Authorization {
        default_deny: true,
        deny: vec![rule("demo/deny/0", vec![], paths(&["/reviews/1"]))],
        allow: vec![rule("demo/allow/0", vec![], vec![])],
        ..Default::default()
    });
    let request = sent();
    assert_eq!(rules.decide(&request.as_request()).rule, Some("demo/deny/0"));
    assert!(!request.may(&rules));
    assert!(Sent { path: "/reviews/2", ..sent() }.may(&rules));
}

#[test]
fn a_policy_that_could_not_be_read_closes() {
    let rules = linked(&wire::Authorization { closed: "demo/p: rules[0]".into(), ..Default::default() });
    let request = sent();
    let verdict = rules.decide(&request.as_request());
    assert_eq!((verdict.outcome, verdict.rule), (Err(Reason::AuthorizationUnavailable), Some("demo/p: rules[0]")));
    assert!(!request.may_connect(&rules));
}

#[test]
fn every_given_field_must_hold() {
    let source = wire::Source {
        principals: texts(&["spiffe://*/sa/web"]),
        namespaces: texts(&["ops", "demo"]),
        ip_blocks: texts(&["192.0.2.0/24"]),
    };
    let operation =
        wire::Operation { methods: texts(&["GET", "HEAD"]), paths: texts(&["/reviews/*"]), ports: vec![8080] };
    let when = vec![wire::Condition { header: "x-tenant".into(), values: texts(&["a", "b*"]) }];
    let rules = allowing(vec![wire::AuthorizationRule { when, ..rule("r", vec![source], vec![operation]) }]);
    let mut right = sent();
    right.headers.insert("x-tenant", "bee".parse().unwrap());
    assert!(right.may(&rules));
    let mut other_tenant = sent();
    other_tenant.headers.insert("x-tenant", "c".parse().unwrap());
    for wrong in [
        Sent { peer: Some("spiffe://cluster.local/ns/demo/sa/webx".parse().unwrap()), ..right.clone() },
        Sent { peer: Some("spiffe://cluster.local/ns/prod/sa/web".parse().unwrap()), ..right.clone() },
        Sent { ip: [192, 0, 3, 1].into(), ..right.clone() },
        Sent { method: Method::POST, ..right.clone() },
        Sent { path: "/reviews", ..right.clone() },
        Sent { port: 8081, ..right.clone() },
        sent(),
        other_tenant,
    ] {
        assert!(!wrong.may(&rules));
    }
    let mapped = Sent { ip: "::ffff:192.0.2.1".parse().unwrap(), ..right };
    assert!(mapped.may(&rules), "an IPv4 peer of a dual-stack listener");
}

#[test]
fn a_header_that_is_no_text_lets_nobody_in_and_gets_past_no_denial() {
    for values in [texts(&["admin*"]), texts(&["*"]), vec![]] {
        let when = vec![wire::Condition { header: "x-debug".into(), values }];
        let rule = wire::AuthorizationRule { when, ..rule("r", vec![], vec![]) };
        let denying = linked(&wire::Authorization { deny: vec![rule.clone()], ..Default::default() });
        let mut request = sent();
        assert!(request.may(&denying));
        request.headers.insert("x-debug", http::HeaderValue::from_bytes(b"admin\xff").unwrap());
        assert!(!request.may(&denying) && !request.may(&allowing(vec![rule])));
    }
}

#[test]
fn of_a_stream_allow_needs_no_http_and_deny_ignores_it() {
    let http_fields = [
        rule("paths", vec![], paths(&["/x"])),
        rule("methods", vec![], vec![wire::Operation { methods: texts(&["GET"]), ..Default::default() }]),
        wire::AuthorizationRule {
            when: vec![wire::Condition { header: "x-a".into(), values: texts(&["1"]) }],
            ..rule("when", vec![], vec![])
        },
    ];
    for one in http_fields {
        assert!(!sent().may_connect(&allowing(vec![one.clone()])), "{}", one.name);
        let denying = linked(&wire::Authorization { deny: vec![one.clone()], ..Default::default() });
        assert!(!sent().may_connect(&denying), "{}", one.name);
        let elsewhere = wire::AuthorizationRule { from: principals(&["spiffe://other/*"]), ..one };
        let denying = linked(&wire::Authorization { deny: vec![elsewhere], ..Default::default() });
        assert!(sent().may_connect(&denying), "its connection part still counts");
    }
    assert!(sent().may_connect(&allowing(vec![rule("r", principals(&[WEB]), vec![])])));
}

#[test]
fn audit_reports_and_decides_nothing() {
    let audit =
        vec![rule("a", vec![], vec![]), rule("b", vec![], paths(&["/x"])), rule("c", principals(&[WEB]), vec![])];
    let rules = linked(&wire::Authorization { audit, ..Default::default() });
    let request = sent();
    let verdict = rules.decide(&request.as_request());
    assert_eq!((verdict.outcome, verdict.audit), (Ok(()), vec!["a", "c"]));
}

#[test]
fn stars_stand_for_anything() {
    for (pattern, text, expected) in [
        ("/a", "/a", true),
        ("/a", "/a/", false),
        ("*", "", true),
        ("/a/*", "/a/", true),
        ("/a/*", "/a", false),
        ("*/x", "/a/b/x", true),
        ("*/x", "/a/b/x/", false),
        ("a*b*c", "abc", true),
        ("a*b*c", "a-b-b-c", true),
        ("a*b*c", "a-c", false),
        ("ab*ba", "aba", false),
        ("**", "x", true),
    ] {
        assert_eq!(Pattern::new(pattern).matches(text), expected, "{pattern} {text}");
    }
}

#[test]
fn what_cannot_be_read_is_named() {
    let source = wire::Source { ip_blocks: texts(&["10.0.0.0/33"]), ..Default::default() };
    let deny = vec![rule("r", vec![source], vec![])];
    let error = Authorization::link(&wire::Authorization { deny, ..Default::default() }).unwrap_err();
    assert_eq!(error.to_string(), "deny[0].from[0].ip_blocks: `10.0.0.0/33` is not a CIDR block");
}
