use std::net::SocketAddr;

use outrigger_proto::mesh as wire;

use super::*;

fn endpoint() -> wire::Endpoint {
    wire::Endpoint {
        id: "demo/reviews-0".into(),
        address: "10.0.0.1".into(),
        port: 15006,
        app_port: 9080,
        identity: "spiffe://cluster.local/ns/demo/sa/reviews".into(),
        version: "v1".into(),
        weight: 100,
        ..Default::default()
    }
}

#[test]
fn an_endpoint_is_where_to_dial_and_whom_to_expect() {
    let plain = wire::Endpoint { id: "demo/x".into(), address: "::1".into(), port: 80, ..Default::default() };
    let linked = endpoints(&wire::Endpoints { endpoints: vec![endpoint(), plain] }).unwrap();
    assert_eq!(linked[0].address, SocketAddr::from(([10, 0, 0, 1], 15006)));
    assert_eq!(linked[0].app_port, 9080);
    assert_eq!(linked[0].identity.as_ref().unwrap().service_account(), "reviews");
    assert_eq!((linked[1].identity.as_ref(), linked[1].app_port), (None, 80));
}

#[test]
fn an_endpoint_that_cannot_be_read_is_named() {
    let fails =
        |one: wire::Endpoint| endpoints(&wire::Endpoints { endpoints: vec![endpoint(), one] }).unwrap_err().field;
    assert_eq!(fails(wire::Endpoint { id: String::new(), ..endpoint() }), "endpoints[1].id");
    assert_eq!(fails(wire::Endpoint { address: "reviews".into(), ..endpoint() }), "endpoints[1].address");
    assert_eq!(fails(wire::Endpoint { port: 70_000, ..endpoint() }), "endpoints[1].port");
    // An identity that cannot be read must never become "none, plaintext".
    assert_eq!(fails(wire::Endpoint { identity: "reviews".into(), ..endpoint() }), "endpoints[1].identity");
    let pod = wire::Workload { endpoint: Some(endpoint()), protocol: 1, ..Default::default() };
    assert_eq!(workload(&pod).unwrap().1, Protocol::Http1);
    assert_eq!(workload(&wire::Workload::default()).unwrap_err().field, "endpoint");
}

#[test]
fn a_policy_has_no_limit_where_none_is_said() {
    let policy = wire::ClusterPolicy {
        breaker: Some(wire::Breaker { max_requests: 7, ..Default::default() }),
        outlier: Some(wire::Outlier { base_ejection_ms: 500, max_ejected_percent: 200, ..Default::default() }),
        ..Default::default()
    };
    let backend = wire::Backend { key: "demo/reviews:80".into(), port: 80, policy: Some(policy), ..Default::default() };
    let wire = wire::Service { backends: vec![backend.clone()], vips: vec!["10.96.0.1".into()], ..Default::default() };
    let linked = service(&wire).unwrap();
    let policy = linked.backends[0].policy;
    assert_eq!((policy.limits.requests, policy.limits.connections), (7, u32::MAX));
    assert_eq!(policy.outlier.max_ejection, policy.outlier.base_ejection, "never shorter than the first");
    assert_eq!(policy.outlier.max_ejected_percent, 100);
    let strange = wire::Backend { protocol: 99, ..backend };
    let error = service(&wire::Service { backends: vec![strange], ..Default::default() }).unwrap_err();
    assert_eq!(error.to_string(), "backends[0].protocol: 99 is not known to this version of the proxy");
}

#[test]
fn inbound_ports_are_those_declared() {
    let port = |number| wire::SelfPort {
        name: "http".into(),
        port: number,
        mtls: wire::MtlsMode::Strict.into(),
        authorization: Some(wire::Authorization { path_rules: true, ..Default::default() }),
        ..Default::default()
    };
    let wire = wire::Self_ { namespace: "demo".into(), workload: "reviews-0".into(), ports: vec![port(9080)] };
    let linked = inbound(&wire).unwrap();
    let found = linked.port(9080).unwrap();
    assert!(found.mtls == MtlsMode::Strict && found.authorization.path_rules);
    assert!(linked.port(9081).is_none());
    let zero = wire::Self_ { ports: vec![port(9080), port(0)], ..wire };
    assert_eq!(inbound(&zero).unwrap_err().to_string(), "ports[1].port: 0 is not a port (1 to 65535)");
}

#[test]
fn the_mesh_has_ranges_and_forwarders() {
    let wire = wire::MeshConfig {
        trust_domain: "example.org".into(),
        mesh_ranges: vec!["10.96.0.0/12".into(), "fd00::/8".into()],
        trusted_forwarders: vec!["spiffe://example.org/ns/edge/sa/gateway".into()],
        sampling_ppm: 2_000_000,
        ..Default::default()
    };
    let linked = mesh(&wire).unwrap();
    for (address, inside) in
        [("10.96.0.1", true), ("::ffff:10.96.0.1", true), ("fd00::1", true), ("10.95.0.1", false), ("::1", false)]
    {
        assert_eq!(linked.contains(address.parse().unwrap()), inside, "{address}");
    }
    assert_eq!(linked.sampling_ppm, 1_000_000);
    assert_eq!(linked.forwarders[0].namespace(), "edge");
    let bad = wire::MeshConfig { mesh_ranges: vec!["10.0.0.0".into()], ..wire.clone() };
    assert_eq!(mesh(&bad).unwrap_err().to_string(), "mesh_ranges[0]: `10.0.0.0` is not a CIDR block");
    let bad = wire::MeshConfig { trusted_forwarders: vec!["gateway".into()], ..wire };
    assert_eq!(mesh(&bad).unwrap_err().field, "trusted_forwarders[0]");
}
