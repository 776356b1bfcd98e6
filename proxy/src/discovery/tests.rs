//! The engine as a story of responses, and the driver against a server of its own.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use outrigger_core::balance::EndpointInfo;
use outrigger_core::key::Key;
use outrigger_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource, ResourceError};
use outrigger_proto::{mesh as wire, type_url};
use prost::Message;

use super::engine::{Engine, Output};
use super::persist;
use crate::snapshot::{Snapshot, Target};

fn resource(type_url: &str, name: &str, version: &str, message: &impl Message) -> Resource {
    Resource {
        version: version.into(),
        name: name.into(),
        aliases: Vec::new(),
        resource: Some(outrigger_proto::Any { type_url: type_url.into(), value: message.encode_to_vec().into() }),
    }
}

fn response(type_url: &str, nonce: &str, resources: Vec<Resource>) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse { type_url: type_url.into(), nonce: nonce.into(), resources, ..Default::default() }
}

/// A service `demo/<name>` with one port and one backend of one shard.
fn service(name: &str, regex: &str) -> wire::Service {
    let key = format!("demo/{name}:80");
    let routes = (!regex.is_empty()).then(|| wire::HttpRoutes {
        matches: vec![wire::HttpMatch {
            path: Some(wire::http_match::Path::Regex(regex.into())),
            ..wire::HttpMatch::default()
        }],
        rules: vec![wire::HttpRule { name: "demo/r/0".into(), ..wire::HttpRule::default() }],
    });
    wire::Service {
        namespace: "demo".into(),
        name: name.into(),
        ports: vec![wire::ServicePort {
            port: 80,
            backend: key.clone(),
            routes,
            policy: Some(wire::RoutePolicy { retries: Some(wire::Retries::default()), ..Default::default() }),
            ..wire::ServicePort::default()
        }],
        backends: vec![wire::Backend {
            key,
            namespace: "demo".into(),
            service: name.into(),
            port: 80,
            shards: 1,
            policy: Some(wire::ClusterPolicy {
                breaker: Some(wire::Breaker::default()),
                outlier: Some(wire::Outlier::default()),
                budget: Some(wire::Budget::default()),
                ..wire::ClusterPolicy::default()
            }),
            ..wire::Backend::default()
        }],
        ..wire::Service::default()
    }
}

fn endpoints(nonce: &str, service: &str) -> DeltaDiscoveryResponse {
    let name = format!("endpoints/demo/{service}:80/0");
    response(type_url::ENDPOINTS, nonce, vec![resource(type_url::ENDPOINTS, &name, "e1", &wire::Endpoints::default())])
}

fn key(text: &str) -> Key {
    text.parse().unwrap()
}

fn answer_to<'a>(output: &'a Output, nonce: &str) -> Option<&'a DeltaDiscoveryRequest> {
    output.requests.iter().find(|request| request.response_nonce == nonce)
}

fn found(snapshot: Option<&Snapshot>, name: &str) -> bool {
    matches!(snapshot.and_then(|snapshot| snapshot.lookup(&key(name))), Some(Target::Service(_)))
}

#[test]
fn a_service_is_acknowledged_when_its_endpoints_are_there_and_it_serves() {
    let now = Instant::now();
    let mut engine = Engine::new("web-0");
    engine.want(key("svc/demo/a"));
    let first = engine.connected();
    assert!(first.iter().any(|request| request.resource_names_subscribe == ["svc/demo/a"]));

    let service = resource(type_url::SERVICE, "svc/demo/a", "v1", &service("a", ""));
    engine.response(response(type_url::SERVICE, "n1", vec![service]), now);
    let output = engine.take(now);
    assert!(answer_to(&output, "n1").is_none(), "nothing serves yet");
    assert!(!found(output.snapshot.as_ref(), "svc/demo/a"));
    let asks = output.requests.iter().any(|r| r.resource_names_subscribe == ["endpoints/demo/a:80/0"]);
    assert!(asks, "its endpoints are asked for");

    engine.response(endpoints("n2", "a"), now);
    let output = engine.take(now);
    assert!(found(output.snapshot.as_ref(), "svc/demo/a"));
    assert!(answer_to(&output, "n1").unwrap().error_detail.is_none());
    assert!(answer_to(&output, "n2").is_some());
}

#[test]
fn a_service_waits_two_seconds_for_endpoints_and_no_longer() {
    let now = Instant::now();
    let mut engine = Engine::new("web-0");
    engine.want(key("svc/demo/a"));
    engine.response(
        response(type_url::SERVICE, "n1", vec![resource(type_url::SERVICE, "svc/demo/a", "v1", &service("a", ""))]),
        now,
    );
    assert!(answer_to(&engine.take(now), "n1").is_none());
    let later = engine.deadline().unwrap();
    assert_eq!(later, now + Duration::from_secs(2));
    let output = engine.take(later);
    assert!(found(output.snapshot.as_ref(), "svc/demo/a") && answer_to(&output, "n1").is_some());
}

#[test]
fn one_bad_resource_of_three_is_refused_by_name_and_its_last_good_version_serves() {
    let now = Instant::now();
    let mut engine = Engine::new("web-0");
    for name in ["a", "b", "c"] {
        engine.want(key(&format!("svc/demo/{name}")));
        let good = resource(type_url::SERVICE, &format!("svc/demo/{name}"), "v1", &service(name, "/x"));
        engine.response(response(type_url::SERVICE, name, vec![good]), now);
        engine.take(now);
        engine.response(endpoints(name, name), now);
    }
    engine.take(now);
    let mut resources = Vec::new();
    for (name, regex) in [("a", "/y"), ("b", "("), ("c", "/y")] {
        resources.push(resource(type_url::SERVICE, &format!("svc/demo/{name}"), "v2", &service(name, regex)));
    }
    engine.response(response(type_url::SERVICE, "n2", resources), now);
    let output = engine.take(now);
    let status = answer_to(&output, "n2").unwrap().error_detail.clone().unwrap();
    assert_eq!(status.details.len(), 1, "{status:?}");
    let error = ResourceError::decode(status.details[0].value.clone()).unwrap();
    assert_eq!(error.resource_name.unwrap().name, "svc/demo/b");
    assert!(error.error_detail.unwrap().message.contains("ports[0]"));
    assert!(found(output.snapshot.as_ref(), "svc/demo/b"), "the last good version");
    let held = &engine.connected().into_iter().find(|r| r.type_url == type_url::SERVICE).unwrap();
    let version = |name: &str| held.initial_resource_versions[&format!("svc/demo/{name}")].clone();
    assert_eq!((version("a"), version("b"), version("c")), ("v2".into(), "v1".into(), "v2".into()));
}

#[test]
fn what_is_pending_is_asked_for_again_on_a_new_connection_so_that_a_rollback_meanwhile_is_seen() {
    let now = Instant::now();
    let mut engine = Engine::new("web-0");
    engine.want(key("svc/demo/a"));
    let version = |version: &str, regex: &str| {
        response(
            type_url::SERVICE,
            version,
            vec![resource(type_url::SERVICE, "svc/demo/a", version, &service("a", regex))],
        )
    };
    engine.response(version("v1", ""), now);
    engine.take(now);
    engine.response(endpoints("e", "a"), now);
    engine.take(now);
    let held = |engine: &mut Engine| {
        let first = engine.connected().into_iter().find(|request| request.type_url == type_url::SERVICE).unwrap();
        first.initial_resource_versions.get("svc/demo/a").cloned()
    };
    assert_eq!(held(&mut engine).as_deref(), Some("v1"));
    // Arrived and not installed when the stream breaks.
    engine.response(version("v2", "/x"), now);
    assert_eq!(held(&mut engine), None);
    engine.response(version("v1", ""), now);
    engine.take(now);
    assert_eq!(held(&mut engine).as_deref(), Some("v1"));
    assert_eq!(engine.accepted[&(super::subscriptions::Kind::Service, "svc/demo/a".to_owned())].version, "v1");

    // The same of the rules for what comes in.
    engine.subscriptions.accepted(super::subscriptions::Kind::SelfOf, "self/web-0", "s0");
    let own = |version: &str| resource(type_url::SELF, "self/web-0", version, &wire::Self_::default());
    engine.response(response(type_url::SELF, "s", vec![own("s1")]), now);
    let first = engine.connected();
    let own = first.iter().find(|request| request.type_url == type_url::SELF).unwrap();
    assert!(own.initial_resource_versions.is_empty(), "{own:?}");
}

#[test]
fn an_absence_is_an_answer_and_later_creation_is_seen() {
    let now = Instant::now();
    let mut engine = Engine::new("web-0");
    engine.want(key("ip/10.0.0.1:80"));
    let gone = |type_url: &str| DeltaDiscoveryResponse {
        type_url: type_url.into(),
        nonce: "n".into(),
        removed_resources: vec!["ip/10.0.0.1:80".into()],
        ..Default::default()
    };
    engine.response(gone(type_url::SERVICE), now);
    let snapshot = engine.take(now).snapshot.unwrap();
    assert!(snapshot.lookup(&key("ip/10.0.0.1:80")).is_none(), "it may still be an instance");
    engine.response(gone(type_url::WORKLOAD), now);
    let snapshot = engine.take(now).snapshot.unwrap();
    assert!(matches!(snapshot.lookup(&key("ip/10.0.0.1:80")), Some(Target::Absent)));

    let mut created = resource(type_url::SERVICE, "svc/demo/a", "v1", &service("a", ""));
    created.aliases = vec!["ip/10.0.0.1:80".into()];
    engine.response(response(type_url::SERVICE, "n3", vec![created]), now);
    engine.take(now);
    engine.response(endpoints("n4", "a"), now);
    assert!(found(engine.take(now).snapshot.as_ref(), "ip/10.0.0.1:80"));
}

#[test]
fn what_was_persisted_is_there_after_a_restart_for_the_same_workload_only() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("snapshot.pb");
    let now = Instant::now();
    let mut engine = Engine::new("web-0");
    engine.want(key("svc/demo/a"));
    engine.want(key("svc/demo/none"));
    let mut arrived =
        response(type_url::SERVICE, "n1", vec![resource(type_url::SERVICE, "svc/demo/a", "v1", &service("a", ""))]);
    arrived.removed_resources = vec!["svc/demo/none".into()];
    engine.response(arrived, now);
    engine.take(now);
    engine.response(endpoints("n2", "a"), now);
    engine.take(now);
    persist::save(&engine, &file, "demo/web-0");

    let mut restarted = Engine::new("web-0");
    persist::restore(&mut restarted, &file, "demo/web-0", now);
    let output = restarted.take(now);
    assert!(found(output.snapshot.as_ref(), "svc/demo/a"));
    assert!(matches!(output.snapshot.unwrap().lookup(&key("svc/demo/none")), Some(Target::Absent)));
    assert_eq!(output.endpoints.len(), 1);
    assert!(output.requests.iter().all(|request| request.response_nonce.is_empty()), "nobody waits for an answer");

    let mut other = Engine::new("other-0");
    persist::restore(&mut other, &file, "demo/other-0", now);
    assert!(!found(other.take(now).snapshot.as_ref(), "svc/demo/a"));
}

#[test]
fn an_unused_destination_is_given_up_with_its_endpoints() {
    let now = Instant::now();
    let mut engine = Engine::new("web-0");
    engine.want(key("svc/demo/a"));
    let arrived = resource(type_url::SERVICE, "svc/demo/a", "v1", &service("a", ""));
    engine.response(response(type_url::SERVICE, "n1", vec![arrived]), now);
    engine.take(now);
    for _ in 0..=10 {
        engine.sweep();
    }
    let output = engine.take(now);
    let gone: HashSet<_> = output.requests.iter().flat_map(|r| r.resource_names_unsubscribe.clone()).collect();
    assert_eq!(gone, HashSet::from(["svc/demo/a".to_owned(), "endpoints/demo/a:80/0".to_owned()]));
    assert!(output.snapshot.unwrap().targets.is_empty());
}

/// Remembers what it was told.
#[derive(Debug, Default)]
struct Recorded(Mutex<Vec<(String, u32, usize)>>);

impl super::Sink for Recorded {
    fn set(&self, backend: &Arc<str>, shard: u32, endpoints: Vec<EndpointInfo>) {
        self.0.lock().unwrap().push((backend.to_string(), shard, endpoints.len()));
    }

    fn retain(&self, _: &HashSet<Arc<str>>) {}
}

const YAML: &str = "\
apiVersion: v1
kind: Service
metadata: {name: echo, namespace: demo}
spec:
  selector: {app: echo}
  ports: [{name: http, port: 80, targetPort: http}]
";

#[tokio::test]
async fn local_mode_answers_from_files_and_sees_them_change() {
    use outrigger_core::compile::Client;
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("echo.yaml"), YAML).unwrap();
    let identity = crate::identity::IdentityStore::new(None);
    let client = Client { namespace: "demo".into(), workload: "web-0".into(), service_account: "web".into() };
    let local = super::Local::new(directory.path().to_owned(), None, client, identity.clone());
    let (config, wanted) = super::Directory::new();
    let running = super::Discovery {
        directory: config.clone(),
        wanted,
        sink: Arc::new(Recorded::default()),
        identity,
        plugins: None,
        origin: super::Origin::Local(local),
        workload: "web-0".into(),
        namespace: "demo".into(),
        state: None,
    };
    let running = tokio::spawn(running.run());
    let mut swaps = config.swaps();
    swaps.wait_for(|_| config.connected()).await.unwrap();
    let (_, echo) = config.resolve(&key("svc/demo/echo")).await.unwrap();
    assert!(matches!(echo, Target::Service(_)));
    let (_, absent) = config.resolve(&key("svc/demo/later")).await.unwrap();
    assert!(matches!(absent, Target::Absent));

    std::fs::write(directory.path().join("later.yaml"), YAML.replace("echo", "later")).unwrap();
    let created = || matches!(config.snapshot().lookup(&key("svc/demo/later")), Some(Target::Service(_)));
    tokio::time::timeout(Duration::from_secs(30), swaps.wait_for(|_| created())).await.unwrap().unwrap();
    running.abort();
}
