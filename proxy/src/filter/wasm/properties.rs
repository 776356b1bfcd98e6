//! Properties: what guests may ask about the exchange, by the names that Envoy's modules use, and by our own under `outrigger`.

use std::io::Write as _;
use std::net::SocketAddr;
use std::time::UNIX_EPOCH;

use http::{HeaderMap, Version, header, request};

use super::super::{ConnectionFacts, Facts, StreamInfo};
use super::abi::Status;
use super::headers::{self, Head};
use super::host::{Host, Phase};

type Done = Result<(), Status>;

/// Where the value goes. Numbers are 8 bytes little-endian, truth one byte, times nanoseconds.
type Out<'a> = &'a mut Vec<u8>;

/// Writes the value of a path of NUL-separated segments; a NUL at its end does not count.
///
/// # Errors
/// `NotFound`: there is none now. `SerializationFailure`: the path is empty, or of a node that has children.
pub(super) fn get(host: &Host, path: &[u8], out: Out<'_>) -> Done {
    let path = path.strip_suffix(&[0]).unwrap_or(path);
    if path.is_empty() {
        return Err(Status::SerializationFailure);
    }
    let text = std::str::from_utf8(path).map_err(|_| Status::NotFound)?;
    let (head, rest) = text.split_once('\0').map_or((text, None), |(head, rest)| (head, Some(rest)));
    let plugin = host.plugin();
    match (head, rest) {
        ("plugin_name", None) => return put(out, &plugin.name),
        ("plugin_root_id", None) => return put(out, &plugin.root_id),
        ("plugin_vm_id", None) => return put(out, &plugin.vm_id),
        _ => {}
    }
    let view = host.view().ok_or(Status::NotFound)?;
    view.facts(|facts| of_stream(facts, host.phase, path, (head, rest), out))
}

fn of_stream(facts: &Facts<'_>, phase: Phase, path: &[u8], name: (&str, Option<&str>), out: Out<'_>) -> Done {
    let (info, state) = (facts.info, facts.state);
    let set = |name: &[u8], out: Out<'_>| put(out, state.get(name).ok_or(Status::NotFound)?);
    match name {
        (
            "request" | "response" | "source" | "destination" | "connection" | "upstream" | "outrigger" | "xds"
            | "node" | "filter_state",
            None,
        ) => Err(Status::SerializationFailure),
        ("request", Some("duration")) if phase == Phase::Log => nanoseconds(out, info.start.elapsed().as_nanos()),
        ("request", Some(name)) => request(facts.request().ok_or(Status::NotFound)?, info, name, out),
        ("response", Some(name)) => response(facts, name, out),
        ("source", Some(name)) => address(info.connection.source(), name, out),
        ("destination", Some(name)) => address(info.connection.destination(), name, out),
        ("upstream", Some(name)) => address(info.upstream, name, out),
        ("connection", Some(name)) => connection(&*info.connection, name, out),
        ("connection_id", None) => number(out, info.connection.id()),
        ("xds", Some(name)) => named(info, name, out),
        ("node", Some("id")) => named(info, "node\0id", out),
        ("outrigger", Some(name)) => own(info, name, out),
        ("filter_state", Some(name)) => {
            let name = name.strip_prefix("wasm.").or_else(|| name.strip_prefix("wasm\0")).unwrap_or(name);
            set(name.as_bytes(), out)
        }
        (head, rest) => match set(path, out) {
            Err(_) if rest.is_none() => named(info, head, out),
            found => found,
        },
    }
}

fn put(out: Out<'_>, value: impl AsRef<[u8]>) -> Done {
    out.extend_from_slice(value.as_ref());
    Ok(())
}

fn number(out: Out<'_>, n: u64) -> Done {
    put(out, n.to_le_bytes())
}

fn nanoseconds(out: Out<'_>, n: u128) -> Done {
    number(out, u64::try_from(n).unwrap_or(u64::MAX))
}

fn optional(out: Out<'_>, value: Option<impl AsRef<[u8]>>) -> Done {
    put(out, value.ok_or(Status::NotFound)?)
}

fn field(out: Out<'_>, fields: &HeaderMap, name: &str) -> Done {
    optional(out, fields.get(name))
}

fn request(head: &request::Parts, info: &StreamInfo, name: &str, out: Out<'_>) -> Done {
    let length = || {
        let value = head.headers.get(header::CONTENT_LENGTH);
        value.and_then(|value| value.to_str().ok()?.parse::<u64>().ok()).unwrap_or(0)
    };
    match name {
        "path" => optional(out, head.pseudo(":path")),
        "url_path" => put(out, head.uri.path()),
        "query" => put(out, head.uri.query().unwrap_or_default()),
        "host" => optional(out, head.pseudo(":authority")),
        "method" => put(out, head.method.as_str()),
        "scheme" => put(out, info.scheme()),
        "referer" => field(out, &head.headers, "referer"),
        "useragent" => field(out, &head.headers, "user-agent"),
        "id" => field(out, &head.headers, "x-request-id"),
        "protocol" => put(
            out,
            match head.version {
                Version::HTTP_10 => "HTTP/1.0",
                Version::HTTP_2 => "HTTP/2",
                _ => "HTTP/1.1",
            },
        ),
        "time" => nanoseconds(out, info.started().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos()),
        "size" => number(out, length()),
        "total_size" => number(out, length().saturating_add(headers::size(head) as u64)),
        "headers" => Err(Status::SerializationFailure),
        _ => match name.strip_prefix("headers\0").ok_or(Status::NotFound)? {
            key if key.starts_with(':') => optional(out, head.pseudo(key)),
            key => field(out, &head.headers, key),
        },
    }
}

fn response(facts: &Facts<'_>, name: &str, out: Out<'_>) -> Done {
    if name == "flags" || name == "size" {
        return number(out, 0);
    }
    let head = facts.response().ok_or(Status::NotFound)?;
    match name {
        "code" => number(out, u64::from(head.status.as_u16())),
        "grpc_status" => {
            let status = head.headers.get("grpc-status").and_then(|status| status.to_str().ok()?.parse().ok());
            number(out, status.ok_or(Status::NotFound)?)
        }
        "headers" => Err(Status::SerializationFailure),
        _ => match name.strip_prefix("headers\0").ok_or(Status::NotFound)? {
            ":status" => put(out, head.status.as_str()),
            key => field(out, &head.headers, key),
        },
    }
}

fn address(address: Option<SocketAddr>, name: &str, out: Out<'_>) -> Done {
    let address = address.ok_or(Status::NotFound)?;
    match name {
        "address" => write!(out, "{address}").map_err(|_| Status::InternalFailure),
        "port" => number(out, u64::from(address.port())),
        _ => Err(Status::NotFound),
    }
}

fn connection(connection: &dyn ConnectionFacts, name: &str, out: Out<'_>) -> Done {
    let mtls = connection.peer_identity().is_some();
    match name {
        "mtls" => put(out, [u8::from(mtls)]),
        "id" => number(out, connection.id()),
        "requested_server_name" => put(out, connection.server_name().unwrap_or_default()),
        "tls_version" if mtls => put(out, "TLSv1.3"),
        "uri_san_peer_certificate" => optional(out, connection.peer_identity()),
        "uri_san_local_certificate" => optional(out, connection.local_identity()),
        // Certificates of the mesh have a SPIFFE ID and nothing else.
        "subject_peer_certificate"
        | "subject_local_certificate"
        | "dns_san_peer_certificate"
        | "dns_san_local_certificate"
            if mtls =>
        {
            Ok(())
        }
        _ => Err(Status::NotFound),
    }
}

/// Names of configuration, bare or under `xds.`.
fn named(info: &StreamInfo, name: &str, out: Out<'_>) -> Done {
    match name {
        "route_name" => optional(out, info.route.as_deref()),
        "cluster_name" | "upstream_cluster" | "virtual_host_name" => optional(out, info.service.as_deref()),
        "listener_direction" => number(out, if info.connection.inbound() { 1 } else { 2 }),
        "node\0id" => own(info, "workload", out),
        _ => Err(Status::NotFound),
    }
}

/// What the mesh knows, under names of its own.
fn own(info: &StreamInfo, name: &str, out: Out<'_>) -> Done {
    let connection = &info.connection;
    match name {
        "direction" => put(out, if connection.inbound() { "inbound" } else { "outbound" }),
        "service" => optional(out, info.service.as_deref()),
        "route" => optional(out, info.route.as_deref()),
        "peer" => optional(out, connection.peer_identity()),
        "identity" => optional(out, connection.local_identity()),
        "namespace" => put(out, connection.namespace()),
        "workload" => {
            let (namespace, workload) = (connection.namespace(), connection.workload());
            write!(out, "{namespace}/{workload}").map_err(|_| Status::InternalFailure)
        }
        _ => Err(Status::NotFound),
    }
}
