//! Properties: what guests may ask about the exchange, by the names that Envoy's modules use.

use std::net::SocketAddr;
use std::time::UNIX_EPOCH;

use http::{HeaderMap, Version, request};

use super::super::{ConnectionFacts, Facts, StreamInfo};
use super::abi::Status;
use super::headers::Head;
use super::host::Host;

type Value = Result<Vec<u8>, Status>;

/// The value of a path of NUL-separated segments. Numbers are 8 bytes little-endian, truth one byte, times nanoseconds.
pub(super) fn get(host: &Host, path: &[u8]) -> Value {
    let path = path.strip_suffix(&[0]).unwrap_or(path);
    if path.is_empty() {
        return Err(Status::SerializationFailure);
    }
    let text = std::str::from_utf8(path).map_err(|_| Status::NotFound)?;
    let mut segments = text.splitn(2, '\0');
    let (head, rest) = (segments.next().unwrap_or_default(), segments.next());
    let plugin = host.plugin();
    match (head, rest) {
        ("plugin_name", None) => return text_value(&plugin.name),
        ("plugin_root_id", None) => return text_value(&plugin.root_id),
        ("plugin_vm_id", None) => return text_value(&plugin.vm_id),
        _ => {}
    }
    let view = host.view.as_ref().ok_or(Status::NotFound)?;
    view.facts(|facts| of_stream(facts, path, head, rest))
}

fn of_stream(facts: &Facts<'_>, path: &[u8], head: &str, rest: Option<&str>) -> Value {
    let (info, state) = (facts.info, facts.state);
    match (head, rest) {
        ("request" | "response" | "source" | "destination" | "connection" | "upstream", None) => {
            Err(Status::SerializationFailure)
        }
        ("request", Some(name)) => facts.request.ok_or(Status::NotFound).and_then(|head| request(head, info, name)),
        ("response", Some(name)) => response_property(facts, name),
        ("source", Some(name)) => address(info.connection.source(), name),
        ("destination", Some(name)) => address(info.connection.destination(), name),
        ("upstream", Some(name)) => address(info.upstream, name),
        ("connection", Some(name)) => connection(&*info.connection, name),
        ("connection_id", None) => number(info.connection.id()),
        ("xds", Some(name)) => named(info, name),
        ("node", Some("id")) => named(info, "node\0id"),
        ("filter_state", Some(name)) => {
            let name = name.strip_prefix("wasm.").or_else(|| name.strip_prefix("wasm\0")).unwrap_or(name);
            state.get(name.as_bytes()).map(<[u8]>::to_vec).ok_or(Status::NotFound)
        }
        _ => match state.get(path) {
            Some(value) => Ok(value.to_vec()),
            None if rest.is_none() => named(info, head),
            None => Err(Status::NotFound),
        },
    }
}

fn text_value(text: &str) -> Value {
    Ok(text.as_bytes().to_vec())
}

fn number(n: u64) -> Value {
    Ok(n.to_le_bytes().to_vec())
}

fn optional(text: Option<&str>) -> Value {
    text.ok_or(Status::NotFound).and_then(text_value)
}

fn field(fields: &HeaderMap, name: &str) -> Value {
    fields.get(name).map(|value| value.as_bytes().to_vec()).ok_or(Status::NotFound)
}

fn request(head: &request::Parts, info: &StreamInfo, name: &str) -> Value {
    let pseudo = |name| head.pseudo(name).map(<[u8]>::to_vec).ok_or(Status::NotFound);
    match name {
        "path" => pseudo(":path"),
        "url_path" => text_value(head.uri.path()),
        "query" => text_value(head.uri.query().unwrap_or_default()),
        "host" => pseudo(":authority"),
        "method" => pseudo(":method"),
        "scheme" => text_value(info.scheme()),
        "referer" => field(&head.headers, "referer"),
        "useragent" => field(&head.headers, "user-agent"),
        "id" => field(&head.headers, "x-request-id"),
        "protocol" => text_value(match head.version {
            Version::HTTP_10 => "HTTP/1.0",
            Version::HTTP_2 => "HTTP/2",
            _ => "HTTP/1.1",
        }),
        "time" => {
            let since = info.started().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
            number(u64::try_from(since).unwrap_or(u64::MAX))
        }
        "duration" => {
            let took = info.start.elapsed().as_nanos();
            number(u64::try_from(took).unwrap_or(u64::MAX))
        }
        "size" | "total_size" => {
            let length = head.headers.get(http::header::CONTENT_LENGTH);
            number(length.and_then(|value| value.to_str().ok()?.parse().ok()).unwrap_or(0))
        }
        "headers" => Err(Status::SerializationFailure),
        _ => match name.strip_prefix("headers\0") {
            Some(key) if key.starts_with(':') => pseudo(key),
            Some(key) => field(&head.headers, key),
            None => Err(Status::NotFound),
        },
    }
}

fn response_property(facts: &Facts<'_>, name: &str) -> Value {
    if name == "flags" || name == "size" {
        return number(0);
    }
    let head = facts.response.ok_or(Status::NotFound)?;
    match name {
        "code" => number(u64::from(head.status.as_u16())),
        "headers" => Err(Status::SerializationFailure),
        _ => name.strip_prefix("headers\0").ok_or(Status::NotFound).and_then(|key| field(&head.headers, key)),
    }
}

fn address(address: Option<SocketAddr>, name: &str) -> Value {
    let address = address.ok_or(Status::NotFound)?;
    match name {
        "address" => text_value(&address.to_string()),
        "port" => number(u64::from(address.port())),
        _ => Err(Status::NotFound),
    }
}

fn connection(connection: &dyn ConnectionFacts, name: &str) -> Value {
    let mtls = connection.peer_identity().is_some();
    match name {
        "mtls" => Ok(vec![u8::from(mtls)]),
        "id" => number(connection.id()),
        "requested_server_name" => text_value(connection.server_name().unwrap_or_default()),
        "tls_version" if mtls => text_value("TLSv1.3"),
        "uri_san_peer_certificate" => optional(connection.peer_identity()),
        "uri_san_local_certificate" => optional(connection.local_identity().as_deref()),
        _ => Err(Status::NotFound),
    }
}

/// Names of configuration, bare or under `xds.`.
fn named(info: &StreamInfo, name: &str) -> Value {
    match name {
        "route_name" => optional(info.route.as_deref()),
        "cluster_name" | "upstream_cluster" => optional(info.service.as_deref()),
        "listener_direction" => number(if info.connection.inbound() { 1 } else { 2 }),
        "node\0id" => text_value(&format!("{}/{}", info.connection.namespace(), info.connection.workload())),
        _ => Err(Status::NotFound),
    }
}
