use http::Request;
use proptest::prelude::*;

use super::*;

const OWN: &str = "spiffe://cluster.local/ns/demo/sa/reviews";
const PEER: &str = "spiffe://cluster.local/ns/demo/sa/web";

fn outbound() -> Rules<'static> {
    Rules { direction: Direction::Outbound, path_rules: false, peer: None, xfcc: None, forwarders: &[] }
}

fn inbound_rules() -> Rules<'static> {
    Rules { direction: Direction::Inbound, ..outbound() }
}

/// An HTTP/1.1 GET of `uri`, with `Host: reviews` before the other headers.
fn head(uri: &str, headers: &[(&str, &str)]) -> request::Parts {
    bare(uri, &[&[("host", "reviews")], headers].concat())
}

fn bare(uri: &str, headers: &[(&str, &str)]) -> request::Parts {
    let request = headers.iter().fold(Request::get(uri), |request, (name, value)| request.header(*name, *value));
    request.body(()).unwrap().into_parts().0
}

fn names(head: &request::Parts) -> Vec<&str> {
    let mut names: Vec<_> = head.headers.keys().map(HeaderName::as_str).collect();
    names.sort_unstable();
    names
}

/// Headers that are left of these, beside Host.
fn left(headers: &[(&str, &str)], rules: &Rules<'_>) -> Vec<String> {
    let mut head = head("/", headers);
    request(&mut head, rules).unwrap();
    names(&head).into_iter().filter(|name| *name != "host").map(str::to_owned).collect()
}

#[test]
fn there_is_exactly_one_host() {
    for hosts in [vec![], vec![("host", "a"), ("host", "a")], vec![("host", "a"), ("host", "b")]] {
        assert_eq!(request(&mut bare("/", &hosts), &outbound()), Err(Reason::BadRequest), "{hosts:?}");
    }
    for bad in ["", "user@reviews", "a, b", "a b", "a/b", "a?b", "a#b", "a\\b", "rev\u{ef}ews"] {
        let mut head = bare("/", &[]);
        head.headers.insert(header::HOST, HeaderValue::from_bytes(bad.as_bytes()).unwrap());
        assert_eq!(request(&mut head, &outbound()), Err(Reason::BadRequest), "{bad}");
    }
    for good in ["reviews", "reviews.demo:80", "[::1]:80", "Reviews."] {
        assert!(request(&mut bare("/", &[("host", good)]), &outbound()).is_ok(), "{good}");
    }
}

#[test]
fn an_absolute_form_agrees_with_host_and_becomes_origin_form() {
    let mut agreed = bare("http://Reviews:80/a?b=c", &[("host", "reviews:80")]);
    request(&mut agreed, &outbound()).unwrap();
    assert_eq!(agreed.uri, "/a?b=c");
    assert_eq!(agreed.headers[header::HOST], "reviews:80");
    for host in ["ratings:80", "reviews", "reviews:81"] {
        let mut other = bare("http://reviews:80/a", &[("host", host)]);
        assert_eq!(request(&mut other, &outbound()), Err(Reason::BadRequest), "{host}");
    }
    let mut tunnel = bare("reviews:80", &[("host", "reviews:80")]);
    assert_eq!(request(&mut tunnel, &outbound()), Err(Reason::BadRequest), "the form of CONNECT");
    let mut alone = bare("http://reviews/a", &[]);
    assert_eq!(request(&mut alone, &outbound()), Err(Reason::BadRequest), "HTTP/1 must say Host");
}

#[test]
fn an_http2_authority_is_the_host() {
    let mut one = bare("https://reviews.demo/a", &[]);
    one.version = Version::HTTP_2;
    request(&mut one, &outbound()).unwrap();
    assert_eq!(one.headers[header::HOST], "reviews.demo");
    assert_eq!(one.uri, "https://reviews.demo/a");
    let mut two = bare("https://reviews.demo/a", &[("host", "ratings.demo")]);
    two.version = Version::HTTP_2;
    assert_eq!(request(&mut two, &outbound()), Err(Reason::BadRequest));
}

#[test]
fn transfer_encoding_is_exactly_chunked() {
    for good in ["chunked", "Chunked"] {
        let headers = [("transfer-encoding", good), ("content-length", "5")];
        assert_eq!(left(&headers, &outbound()), [""; 0], "re-framed, and the length with it does not count");
    }
    for bad in ["gzip", "gzip, chunked", "chunked, chunked", "identity", "", "xchunked", "chunked;q=1"] {
        let mut head = head("/", &[("transfer-encoding", bad)]);
        assert_eq!(request(&mut head, &outbound()), Err(Reason::BadRequest), "{bad}");
    }
    let mut twice = head("/", &[("transfer-encoding", "chunked"), ("transfer-encoding", "chunked")]);
    assert_eq!(request(&mut twice, &outbound()), Err(Reason::BadRequest));
    for version in [Version::HTTP_10, Version::HTTP_2] {
        let mut old = head("/", &[("transfer-encoding", "chunked")]);
        old.version = version;
        assert_eq!(request(&mut old, &outbound()), Err(Reason::BadRequest), "{version:?}");
    }
}

#[test]
fn content_length_is_one_number() {
    for bad in [&["5", "6"][..], &["5, 5"], &["+5"], &[""], &["0x5"]] {
        let headers: Vec<_> = bad.iter().map(|value| ("content-length", *value)).collect();
        assert_eq!(request(&mut head("/", &headers), &outbound()), Err(Reason::BadRequest), "{bad:?}");
    }
    let mut same = head("/", &[("content-length", "5"), ("content-length", "5")]);
    request(&mut same, &outbound()).unwrap();
    assert_eq!(same.headers.get_all(header::CONTENT_LENGTH).iter().count(), 1);
}

#[test]
fn hop_by_hop_headers_go_and_those_that_connection_names() {
    let headers = [
        ("connection", "close, X-Hop"),
        ("connection", "x-other"),
        ("x-hop", "1"),
        ("x-other", "1"),
        ("x-end", "1"),
        ("keep-alive", "5"),
        ("proxy-connection", "keep-alive"),
        ("http2-settings", "AAMAAABkAAQAAP__"),
        ("trailer", "x-sum"),
    ];
    assert_eq!(left(&headers, &outbound()), ["trailer", "x-end"]);
}

#[test]
fn connection_cannot_name_what_frames_or_addresses_the_message() {
    let headers = [
        (
            "connection",
            "host, content-length, authorization, cookie, content-type, traceparent, @, x-forwarded-client-cert",
        ),
        ("content-length", "1"),
        ("authorization", "x"),
        ("cookie", "x"),
        ("content-type", "x"),
        ("traceparent", "x"),
    ];
    let left = left(&headers, &outbound());
    assert_eq!(left, ["authorization", "content-length", "content-type", "cookie", "traceparent"]);
}

#[test]
fn te_is_trailers_or_nothing() {
    for (te, kept) in [("trailers", true), ("gzip;q=0.5, Trailers", true), ("gzip", false), ("", false)] {
        let mut head = head("/", &[("te", te), ("connection", "te")]);
        let canonical = request(&mut head, &outbound()).unwrap();
        assert_eq!(canonical.trailers, kept, "{te}");
        assert_eq!(head.headers.get(header::TE).map(HeaderValue::as_bytes), kept.then_some(&b"trailers"[..]), "{te}");
    }
}

#[test]
fn of_upgrades_only_websocket_passes() {
    let asks = |offer| [("connection", "keep-alive, Upgrade"), ("upgrade", offer), ("sec-websocket-key", "x")];
    let mut socket = head("/", &asks("WebSocket"));
    assert!(request(&mut socket, &outbound()).unwrap().upgrade);
    assert_eq!(socket.headers[header::CONNECTION], "upgrade");
    assert_eq!(socket.headers[header::UPGRADE], "websocket");

    for passed_over in ["h2c", "TLS/1.2, HTTP/2.0"] {
        let mut head = head("/", &asks(passed_over));
        assert!(!request(&mut head, &outbound()).unwrap().upgrade);
        assert_eq!(names(&head), ["host", "sec-websocket-key"], "{passed_over}");
    }
    assert_eq!(request(&mut head("/", &asks("SPDY/3.1")), &outbound()), Err(Reason::UpgradeRefused));

    let mut unasked = head("/", &[("upgrade", "websocket")]);
    assert!(!request(&mut unasked, &outbound()).unwrap().upgrade, "Connection must name Upgrade");
    assert_eq!(names(&unasked), ["host"]);

    let mut posted = head("/", &asks("websocket"));
    posted.method = Method::POST;
    assert_eq!(request(&mut posted, &outbound()), Err(Reason::BadRequest));
}

#[test]
fn connect_is_refused() {
    let mut head = head("/", &[]);
    head.method = Method::CONNECT;
    assert_eq!(request(&mut head, &outbound()), Err(Reason::ConnectRefused));
}

#[test]
fn inbound_believes_only_the_mesh() {
    let forged = [
        ("x-outrigger-reason", "no-route"),
        ("X-Outrigger-Anything", "1"),
        ("x-forwarded-client-cert", "URI=spiffe://cluster.local/ns/demo/sa/admin"),
        ("l5d-client-id", "admin"),
        ("x-forwarded-for", "1.2.3.4"),
        ("x-forwarded-proto", "https"),
        ("forwarded", "for=1.2.3.4"),
        ("x-request-id", "7"),
    ];
    assert_eq!(left(&forged, &inbound_rules()), ["x-request-id"]);
    assert_eq!(left(&forged, &outbound()).len(), forged.len(), "the next proxy does that");
}

#[test]
fn the_application_learns_the_verified_peer() {
    let (own, peer): (SpiffeId, SpiffeId) = (OWN.parse().unwrap(), PEER.parse().unwrap());
    let made = xfcc(&own, &peer);
    let rules = Rules { peer: Some(&peer), xfcc: Some(&made), ..inbound_rules() };
    let mut head = head("/", &[("x-forwarded-client-cert", "forged"), ("x-forwarded-client-cert", "twice")]);
    request(&mut head, &rules).unwrap();
    let values: Vec<_> = head.headers.get_all(XFCC).iter().collect();
    assert_eq!(values, [&format!("By={OWN};URI={PEER}")]);
}

#[test]
fn forwarding_headers_are_kept_from_trusted_forwarders() {
    let (peer, other): (SpiffeId, SpiffeId) = (PEER.parse().unwrap(), OWN.parse().unwrap());
    let headers = [("x-forwarded-for", "1.2.3.4"), ("forwarded", "for=1.2.3.4")];
    let trusted = [peer.clone()];
    let rules = Rules { forwarders: &trusted, ..inbound_rules() };
    assert_eq!(left(&headers, &Rules { peer: Some(&peer), ..rules }), ["forwarded", "x-forwarded-for"]);
    assert_eq!(left(&headers, &Rules { peer: Some(&other), ..rules }), [""; 0]);
    assert_eq!(left(&headers, &rules), [""; 0], "plaintext is no forwarder");
}

#[test]
fn grpc_is_told_by_method_and_type() {
    let is = |method: &str, kind: &str| {
        let mut head = head("/", &[("content-type", kind)]);
        head.method = method.parse().unwrap();
        request(&mut head, &outbound()).unwrap().is_grpc
    };
    assert!(is("POST", "application/grpc") && is("POST", "application/grpc+proto") && is("POST", "application/grpc;x"));
    assert!(!is("POST", "application/grpc-web") && !is("GET", "application/grpc") && !is("POST", "application/json"));
}

#[test]
fn the_application_gets_the_path_as_sent_unless_path_rules_select_it() {
    let mut sent = head("/a//b%2fc/%41?q=%2f", &[]);
    let canonical = request(&mut sent, &outbound()).unwrap();
    assert_eq!(canonical.path.as_deref(), Some("/a/b%2Fc/A"));
    assert_eq!(canonical.path(&sent.uri), "/a/b%2Fc/A");
    assert_eq!(sent.uri, "/a//b%2fc/%41?q=%2f");

    let rules = Rules { path_rules: true, ..inbound_rules() };
    let mut judged = head("/a//./%41?q=%2f", &[]);
    let canonical = request(&mut judged, &rules).unwrap();
    assert_eq!((canonical.path.as_deref(), judged.uri.to_string()), (None, "/a/A?q=%2f".into()));
    assert_eq!(canonical.path(&judged.uri), "/a/A");
    for refused in ["/a%2fb", "/a%2Fb", "/a%5cb", "/a\\b", "/a%00"] {
        let Ok(uri) = refused.parse::<Uri>() else { continue };
        let mut head = head("/", &[]);
        head.uri = uri;
        assert_eq!(request(&mut head, &rules), Err(Reason::BadRequest), "{refused}");
    }
}

#[test]
fn paths_have_one_spelling() {
    for (sent, canonical) in [
        ("/", "/"),
        ("/a/b", "/a/b"),
        ("/a/", "/a/"),
        ("//a///b", "/a/b"),
        ("/a/./b", "/a/b"),
        ("/a/../b", "/b"),
        ("/../../b", "/b"),
        ("/a/..", "/"),
        ("/a/b/..", "/a/"),
        ("/a/b/.", "/a/b/"),
        ("/a/%2e%2E/b", "/b"),
        ("/a/%2e/b", "/a/b"),
        ("/.a/..b/c.", "/.a/..b/c."),
        ("/%61%2D%7e", "/a-~"),
        ("/%c3%bc", "/%C3%BC"),
        ("/a%2fb", "/a%2Fb"),
        ("/a%3Bb;c", "/a%3Bb;c"),
        ("/100%", "/100%25"),
        ("/%zz", "/%25zz"),
        ("/%%34%31", "/%2541"),
        ("/a\"<>{}b", "/a%22%3C%3E%7B%7Db"),
        ("/a\\b", "/a%5Cb"),
        ("*", "*"),
    ] {
        let found = canonical_or_same(sent);
        assert_eq!(found, canonical, "{sent}");
    }
    assert_eq!(path::canonical("/a%00b", false), Err(Reason::BadRequest));
}

fn canonical_or_same(sent: &str) -> String {
    path::canonical(sent, false).unwrap().unwrap_or_else(|| sent.to_owned())
}

#[test]
fn responses_lose_what_is_the_hops_own() {
    let made = |headers: &[(&str, &str)]| {
        let response = headers.iter().fold(http::Response::builder(), |made, (name, value)| made.header(*name, *value));
        response.body(()).unwrap().into_parts().0
    };
    let all = [
        ("connection", "close, x-hop"),
        ("x-hop", "1"),
        ("keep-alive", "5"),
        ("upgrade", "h2c"),
        ("transfer-encoding", "chunked"),
        ("trailer", "x-sum"),
        ("x-outrigger-reason", "no-route"),
    ];
    for (direction, from_mesh_peer, kept) in [
        (Direction::Inbound, false, false),
        (Direction::Inbound, true, false),
        (Direction::Outbound, false, false),
        (Direction::Outbound, true, true),
    ] {
        let mut head = made(&all);
        response(&mut head, direction, from_mesh_peer).unwrap();
        let mut names: Vec<_> = head.headers.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, if kept { vec!["trailer", "x-outrigger-reason"] } else { vec!["trailer"] });
    }
    let mut coded = made(&[("transfer-encoding", "gzip, chunked")]);
    assert_eq!(response(&mut coded, Direction::Outbound, true), Err(Reason::UpstreamProtocol));
    let mut switched = made(&[("connection", "Upgrade"), ("upgrade", "WebSocket")]);
    switched.status = StatusCode::SWITCHING_PROTOCOLS;
    response(&mut switched, Direction::Outbound, true).unwrap();
    assert_eq!(
        (&switched.headers["connection"], &switched.headers["upgrade"]),
        (&"upgrade".parse().unwrap(), &"websocket".parse().unwrap())
    );
}

proptest! {
    #[test]
    fn a_canonical_path_is_canonical(path in "/([a-c/.%\\\\25eEfF0zü;]|%2[eEfF]|%61|\\.\\./){0,24}") {
        if let Ok(first) = path::canonical(&path, false) {
            let first = first.unwrap_or(path);
            prop_assert_eq!(path::canonical(&first, false), Ok(None), "{}", first);
            let relative = first.split('/').any(|segment| matches!(segment, "." | ".."));
            prop_assert!(first.starts_with('/') && !first.contains("//") && !relative, "{}", first);
        }
    }

    /// The second pass of a request through [`request`] changes nothing.
    #[test]
    fn a_normal_request_is_normal(
        uri in "/[a-c/.]{0,8}(%2e){0,2}",
        named in prop::sample::select(vec!["x-hop", "close", "upgrade", "te", "host", "keep-alive"]),
        offer in prop::sample::select(vec!["websocket", "h2c"]),
        te in prop::sample::select(vec!["trailers", "gzip"]),
        path_rules: bool,
    ) {
        let uri = uri.parse::<Uri>().unwrap().to_string();
        let headers = [("connection", named), ("upgrade", offer), ("te", te), ("x-hop", "1"), ("x-outrigger-a", "1")];
        let rules = Rules { path_rules, ..inbound_rules() };
        let mut head = head(&uri, &headers);
        if let Ok(first) = request(&mut head, &rules) {
            let (uri, headers) = (head.uri.clone(), head.headers.clone());
            prop_assert_eq!(request(&mut head, &rules), Ok(first));
            prop_assert_eq!((head.uri, head.headers), (uri, headers));
        }
    }
}
