use std::collections::HashMap;

use bytes::Bytes;

use super::*;

const SERVICE: &str = type_url::SERVICE;

/// What the mesh says: asked name → canonical name and content.
#[derive(Default)]
struct Mesh(HashMap<String, (String, String)>);

impl Mesh {
    fn set(&mut self, name: &str, content: &str) {
        self.alias(name, name, content);
    }

    fn alias(&mut self, asked: &str, canonical: &str, content: &str) {
        self.0.insert(asked.into(), (canonical.into(), content.into()));
    }
}

impl Answers for Mesh {
    fn answer(&self, type_url: &str, name: &str) -> Option<Arc<Found>> {
        let (canonical, content) = self.0.get(name).filter(|_| type_url == SERVICE)?;
        Some(Arc::new(Found {
            name: canonical.clone(),
            aliases: Vec::new(),
            type_url: SERVICE,
            bytes: Bytes::from(content.clone()),
            version: format!("v-{content}"),
        }))
    }
}

fn ask(names: &[&str]) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: SERVICE.into(),
        resource_names_subscribe: names.iter().map(ToString::to_string).collect(),
        ..Default::default()
    }
}

fn ack(response: &DeltaDiscoveryResponse) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: response.type_url.clone(),
        response_nonce: response.nonce.clone(),
        ..Default::default()
    }
}

fn nack(response: &DeltaDiscoveryResponse, names: &[&str]) -> DeltaDiscoveryRequest {
    let details = names
        .iter()
        .map(|name| outrigger_proto::Any {
            type_url: "type.googleapis.com/envoy.service.discovery.v3.ResourceError".into(),
            value: ResourceError {
                resource_name: Some(outrigger_proto::discovery::ResourceName { name: (*name).into() }),
                error_detail: Some(Status { code: 3, message: format!("{name} is bad"), details: Vec::new() }),
            }
            .encode_to_vec()
            .into(),
        })
        .collect();
    let status = Status { code: 3, message: "some are bad".into(), details };
    DeltaDiscoveryRequest { error_detail: Some(status), ..ack(response) }
}

/// The one response, as (name, aliases, version) of each resource, and what is removed.
type Seen = (Vec<(String, Vec<String>, String)>, Vec<String>);

fn seen(responses: &[DeltaDiscoveryResponse]) -> Seen {
    let [response] = responses else { panic!("{} responses", responses.len()) };
    let resources = response.resources.iter();
    (
        resources.map(|resource| (resource.name.clone(), resource.aliases.clone(), resource.version.clone())).collect(),
        response.removed_resources.clone(),
    )
}

fn sent(name: &str, version: &str) -> Seen {
    (vec![(name.into(), Vec::new(), version.into())], Vec::new())
}

fn state(stream: &Stream, name: &str) -> Subscription {
    stream.subscriptions().find(|(_, asked, _)| *asked == name).unwrap().2.clone()
}

fn version(text: &str) -> Option<Held> {
    Some(Held::Version(text.into()))
}

#[test]
fn what_is_subscribed_is_sent_once_and_again_when_it_changes() {
    let mut mesh = Mesh::default();
    mesh.set("svc/demo/a", "1");
    let mut stream = Stream::default();
    let first = stream.request(&ask(&["svc/demo/a"]), &mesh).unwrap().responses;
    assert_eq!(seen(&first), sent("svc/demo/a", "v-1"));
    assert_eq!(state(&stream, "svc/demo/a").acked, None);
    let after_ack = stream.request(&ack(&first[0]), &mesh).unwrap();
    assert!(after_ack.responses.is_empty() && after_ack.settled);
    assert_eq!(state(&stream, "svc/demo/a").acked, version("v-1"));
    assert!(stream.changed(&Look::All, &mesh).is_empty());
    mesh.set("svc/demo/a", "2");
    assert_eq!(seen(&stream.changed(&Look::All, &mesh)), sent("svc/demo/a", "v-2"));
}

#[test]
fn absence_is_an_answer_and_later_creation_is_pushed() {
    let mut mesh = Mesh::default();
    let mut stream = Stream::default();
    let first = stream.request(&ask(&["svc/demo/a"]), &mesh).unwrap().responses;
    assert_eq!(seen(&first), (Vec::new(), vec!["svc/demo/a".to_owned()]));
    stream.request(&ack(&first[0]), &mesh).unwrap();
    assert_eq!(state(&stream, "svc/demo/a").acked, Some(Held::Absent));
    mesh.set("svc/demo/a", "1");
    assert_eq!(seen(&stream.changed(&Look::All, &mesh)), sent("svc/demo/a", "v-1"));
    mesh.0.clear();
    assert_eq!(seen(&stream.changed(&Look::All, &mesh)).1, ["svc/demo/a"]);
    mesh.set("svc/demo/a", "1");
    assert_eq!(seen(&stream.changed(&Look::All, &mesh)), sent("svc/demo/a", "v-1"));
}

#[test]
fn a_nack_names_one_of_three_and_that_one_waits_for_new_content() {
    let mut mesh = Mesh::default();
    for name in ["svc/demo/a", "svc/demo/b", "svc/demo/c"] {
        mesh.set(name, "1");
    }
    let mut stream = Stream::default();
    let first = stream.request(&ask(&["svc/demo/a", "svc/demo/b", "svc/demo/c"]), &mesh).unwrap().responses;
    let outcome = stream.request(&nack(&first[0], &["svc/demo/b"]), &mesh).unwrap();
    assert_eq!(outcome.rejected, [("svc/demo/b".to_owned(), "svc/demo/b is bad".to_owned())]);
    assert!(outcome.responses.is_empty());
    assert_eq!(state(&stream, "svc/demo/a").acked, version("v-1"));
    assert_eq!(state(&stream, "svc/demo/c").acked, version("v-1"));
    let b = state(&stream, "svc/demo/b");
    assert_eq!((b.acked, b.rejected.unwrap().reason.as_str()), (None, "svc/demo/b is bad"));
    assert!(stream.changed(&Look::All, &mesh).is_empty());
    mesh.set("svc/demo/b", "2");
    let next = stream.changed(&Look::All, &mesh);
    assert_eq!(seen(&next), sent("svc/demo/b", "v-2"));
    stream.request(&ack(&next[0]), &mesh).unwrap();
    let b = state(&stream, "svc/demo/b");
    assert_eq!((b.acked, b.rejected), (version("v-2"), None));
}

#[test]
fn a_nack_without_details_rejects_the_whole_response() {
    let mut mesh = Mesh::default();
    mesh.set("svc/demo/a", "1");
    mesh.set("svc/demo/b", "1");
    let mut stream = Stream::default();
    let first = stream.request(&ask(&["svc/demo/a", "svc/demo/b"]), &mesh).unwrap().responses;
    let outcome = stream.request(&nack(&first[0], &[]), &mesh).unwrap();
    assert_eq!(outcome.rejected.len(), 2);
    assert_eq!(state(&stream, "svc/demo/a").acked, None);
}

#[test]
fn a_reconnect_resends_nothing_held_and_removes_only_what_is_gone() {
    let mut mesh = Mesh::default();
    mesh.set("svc/demo/same", "1");
    mesh.set("svc/demo/changed", "2");
    let mut stream = Stream::default();
    let held = ["svc/demo/same", "svc/demo/changed", "svc/demo/gone"];
    let mut request = ask(&held);
    request.initial_resource_versions = held.iter().map(|name| (name.to_string(), "v-1".to_owned())).collect();
    let outcome = stream.request(&request, &mesh).unwrap();
    let (resources, removed) = seen(&outcome.responses);
    assert_eq!(resources, [("svc/demo/changed".to_owned(), Vec::new(), "v-2".to_owned())]);
    assert_eq!(removed, ["svc/demo/gone"]);
    assert_eq!(state(&stream, "svc/demo/same").acked, version("v-1"));

    let mut stream = Stream::default();
    let mut request = ask(&["svc/demo/same"]);
    request.initial_resource_versions = [("svc/demo/same", "v-1"), ("svc/demo/gone", "v-1")]
        .map(|(name, version)| (name.into(), version.into()))
        .into();
    assert_eq!(seen(&stream.request(&request, &mesh).unwrap().responses).1, ["svc/demo/gone"]);
}

#[test]
fn an_alias_is_answered_with_the_canonical_resource() {
    let mut mesh = Mesh::default();
    mesh.set("svc/demo/a", "1");
    mesh.alias("ip/10.0.0.1:80", "svc/demo/a", "1");
    mesh.alias("host/a.test:80", "svc/demo/a", "1");
    let mut stream = Stream::default();
    let asked = ["ip/10.0.0.1:80", "svc/demo/a", "host/a.test:80"];
    let (resources, _) = seen(&stream.request(&ask(&asked), &mesh).unwrap().responses);
    let aliases = vec!["ip/10.0.0.1:80".to_owned(), "host/a.test:80".to_owned()];
    assert_eq!(resources, [("svc/demo/a".to_owned(), aliases, "v-1".to_owned())]);
    // The address now belongs to another service: the same alias, another canonical name.
    mesh.alias("ip/10.0.0.1:80", "svc/demo/b", "b");
    let (resources, removed) = seen(&stream.changed(&Look::All, &mesh));
    assert_eq!(resources, [("svc/demo/b".to_owned(), vec!["ip/10.0.0.1:80".to_owned()], "v-b".to_owned())]);
    assert!(removed.is_empty());
    // And now to none: only the alias is removed.
    mesh.0.remove("ip/10.0.0.1:80");
    assert_eq!(seen(&stream.changed(&Look::All, &mesh)), (Vec::new(), vec!["ip/10.0.0.1:80".to_owned()]));
}

#[test]
fn an_unsubscribed_resource_is_not_sent_and_one_asked_for_again_is() {
    let mut mesh = Mesh::default();
    mesh.set("svc/demo/a", "1");
    let mut stream = Stream::default();
    stream.request(&ask(&["svc/demo/a"]), &mesh).unwrap();
    let leave = DeltaDiscoveryRequest { resource_names_unsubscribe: vec!["svc/demo/a".into()], ..ask(&[]) };
    assert!(stream.request(&leave, &mesh).unwrap().responses.is_empty());
    mesh.set("svc/demo/a", "2");
    assert!(stream.changed(&Look::All, &mesh).is_empty());
    assert_eq!(seen(&stream.request(&ask(&["svc/demo/a"]), &mesh).unwrap().responses), sent("svc/demo/a", "v-2"));
    // The client may have forgotten it: asking again is answered, though nothing changed.
    assert_eq!(seen(&stream.request(&ask(&["svc/demo/a"]), &mesh).unwrap().responses), sent("svc/demo/a", "v-2"));
}

#[test]
fn a_late_ack_does_not_settle_what_was_sent_after() {
    let mut mesh = Mesh::default();
    mesh.set("svc/demo/a", "1");
    let mut stream = Stream::default();
    let first = stream.request(&ask(&["svc/demo/a"]), &mesh).unwrap().responses;
    mesh.set("svc/demo/a", "2");
    stream.changed(&Look::All, &mesh);
    stream.request(&ack(&first[0]), &mesh).unwrap();
    let a = state(&stream, "svc/demo/a");
    assert_eq!((a.acked, a.sent), (version("v-1"), version("v-2")));
    // A nonce is settled once.
    assert!(!stream.request(&ack(&first[0]), &mesh).unwrap().settled);
}

#[test]
fn wildcards_unknown_types_and_too_many_names_are_refused() {
    let mesh = Mesh::default();
    let wildcard = Refused::Wildcard(SERVICE.into());
    assert_eq!(Stream::default().request(&ask(&[]), &mesh).unwrap_err(), wildcard);
    assert_eq!(Stream::default().request(&ask(&["*"]), &mesh).unwrap_err(), wildcard);
    let other = DeltaDiscoveryRequest { type_url: "type.googleapis.com/other".into(), ..ask(&["a"]) };
    assert_eq!(
        Stream::default().request(&other, &mesh).unwrap_err(),
        Refused::Type("type.googleapis.com/other".into())
    );
    let names: Vec<String> = (0..=MAX_SUBSCRIPTIONS).map(|n| format!("svc/demo/s{n}")).collect();
    let mut names: Vec<&str> = names.iter().map(String::as_str).collect();
    assert_eq!(Stream::default().request(&ask(&names), &mesh).unwrap_err(), Refused::TooMany);
    names.pop();
    assert!(Stream::default().request(&ask(&names), &mesh).is_ok());
}

#[test]
fn responses_are_of_bounded_size() {
    let mut mesh = Mesh::default();
    let big = "x".repeat(RESPONSE_BYTES * 2 / 3);
    for name in ["svc/demo/a", "svc/demo/b", "svc/demo/c"] {
        mesh.set(name, &big);
    }
    let mut stream = Stream::default();
    let responses = stream.request(&ask(&["svc/demo/a", "svc/demo/b", "svc/demo/c"]), &mesh).unwrap().responses;
    assert_eq!(responses.len(), 3);
    assert!(responses.iter().all(|response| response.resources.len() == 1));
}

#[test]
fn a_refusal_is_of_the_version_that_was_refused() {
    let mut mesh = Mesh::default();
    let mut stream = Stream::default();
    mesh.set("svc/demo/a", "1");
    let first = stream.request(&ask(&["svc/demo/a"]), &mesh).unwrap().responses;
    stream.request(&nack(&first[0], &["svc/demo/a"]), &mesh).unwrap();
    mesh.set("svc/demo/a", "2");
    stream.changed(&Look::All, &mesh);
    let subscription = stream.subscription(SERVICE, "svc/demo/a").unwrap();
    assert!(subscription.refusal(&Held::Version("v-1".into())).is_some());
    // Not answered yet.
    assert!(subscription.refusal(&Held::Version("v-2".into())).is_none());
}
