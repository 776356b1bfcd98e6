//! The HTTP API of filters: `/api/v1/filters`, and modules pushed to `/api/v1/modules`.
//!
//! A filter that is attached here is a WasmFilter in a file below `--state`, read like those of `--config`.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, put};
use axum::{Json, Router};
use outrigger_core::compile::Client;
use outrigger_core::key::Key;
use outrigger_core::resource::{self, Loaded, ModuleSource, Rejection, Resource, ResourceId};
use outrigger_proto::{mesh as wire, type_url};
use prost::Message;
use serde_json::{Value, json};

use crate::api::{Api, problem};
use crate::durable;
use crate::mesh::Published;
use crate::modules::store::MAX_MODULE;

const KIND: &str = "WasmFilter";

/// The routes.
pub(crate) fn routes() -> Router<Api> {
    let limit = usize::try_from(MAX_MODULE).unwrap_or(usize::MAX);
    Router::new()
        .route("/api/v1/filters", get(async |State(api): State<Api>| Json(rows(&api))))
        .route("/api/v1/filters/{namespace}/{name}", put(attach).delete(detach))
        .route("/api/v1/modules", put(push).layer(DefaultBodyLimit::max(limit)))
}

/// Every WasmFilter, as proxies get it, and how each that has it does; last those of which no version was accepted.
fn rows(api: &Api) -> Value {
    let now = api.mesh.now();
    let held: BTreeSet<&ResourceId> = filters(&now).map(|loaded| &loaded.id).collect();
    let refused = now.accepted.rejected.iter().map(|rejected| &rejected.rejection).filter(|rejection| {
        rejection.kind == KIND && !held.iter().any(|id| is(id, &rejection.namespace, &rejection.name))
    });
    filters(&now).map(|loaded| row(api, &now, loaded)).chain(refused.map(refused_row)).collect()
}

/// A WasmFilter of which there is nothing but why.
fn refused_row(rejection: &Rejection) -> Value {
    json!({
        "namespace": rejection.namespace,
        "name": rejection.name,
        "source": format!("{}:{}", rejection.file, rejection.line),
        "module": "",
        "usable": false,
        "problem": rejection.to_string(),
        "sha256": null,
        "size": null,
        "failOpen": null,
        "order": null,
        "proxies": [],
    })
}

fn filters(now: &Published) -> impl Iterator<Item = &Arc<Loaded>> {
    now.catalog.resources().filter(|loaded| loaded.id.kind == KIND)
}

fn row(api: &Api, now: &Published, loaded: &Loaded) -> Value {
    let id = &loaded.id;
    let client = Client { namespace: id.namespace.clone(), workload: String::new(), service_account: String::new() };
    let key = Key::Filter(id.namespace.clone(), id.name.clone());
    let found = now.answer(type_url::FILTER, &key, &client);
    let filter = found.and_then(|found| wire::Filter::decode(found.bytes.clone()).ok());
    let module = match &loaded.resource {
        Resource::WasmFilter(filter) => filter.module.to_string(),
        _ => String::new(),
    };
    let problem = now.accepted.rejected.iter().find(|rejected| {
        let rejection = &rejected.rejection;
        rejection.kind == KIND && rejection.namespace == id.namespace && rejection.name == id.name
    });
    let proxies = api.proxies.subscribers(type_url::FILTER, &key, now).into_iter().map(|subscriber| {
        let workload = (subscriber.namespace.clone(), subscriber.workload.clone());
        let report = api.reports.of(&workload, &id.namespace, &id.name);
        json!({ "proxy": subscriber, "report": report })
    });
    json!({
        "namespace": id.namespace,
        "name": id.name,
        "source": format!("{}:{}", loaded.file, loaded.line),
        "module": module,
        "usable": filter.is_some(),
        "problem": problem.map(|rejected| rejected.rejection.to_string()),
        "sha256": filter.as_ref().map(|filter| &filter.sha256),
        "size": filter.as_ref().map(|filter| filter.size),
        "failOpen": filter.as_ref().map(|filter| filter.fail_open),
        "order": filter.as_ref().map(|filter| filter.order),
        "proxies": proxies.collect::<Vec<_>>(),
    })
}

async fn push(State(api): State<Api>, headers: HeaderMap, body: Bytes) -> Response {
    if let Err(refused) = api.authorize("modules", &headers) {
        return *refused;
    }
    if !body.starts_with(b"\0asm") {
        return problem(StatusCode::BAD_REQUEST, "this is no WebAssembly module: it does not begin with \\0asm");
    }
    match api.mesh.push(body).await {
        Ok(module) => Json(json!({ "sha256": module.sha256, "size": module.size })).into_response(),
        Err(error) => {
            problem(StatusCode::INTERNAL_SERVER_ERROR, &format!("the module cannot be kept in --state: {error}"))
        }
    }
}

async fn attach(
    State(api): State<Api>,
    Path((namespace, name)): Path<(String, String)>,
    headers: HeaderMap,
    Json(spec): Json<Value>,
) -> Response {
    if let Err(refused) = api.authorize("filters", &headers) {
        return *refused;
    }
    let (status, reason) = match try_attach(&api, &namespace, &name, &spec).await {
        Ok(answer) => return Json(answer).into_response(),
        Err(refused) => refused,
    };
    problem(status, &reason)
}

type Refused = (StatusCode, String);

async fn try_attach(api: &Api, namespace: &str, name: &str, spec: &Value) -> Result<Value, Refused> {
    let bad = |reason: String| (StatusCode::BAD_REQUEST, reason);
    let path = file(api, namespace, name).map_err(bad)?;
    let metadata = json!({ "name": name, "namespace": namespace });
    let document = json!({ "apiVersion": "outrigger.dev/v1alpha1", "kind": KIND, "metadata": metadata, "spec": spec });
    // JSON is YAML.
    let text = document.to_string();
    let parsed = resource::parse(&path.display().to_string(), &text);
    if let Some(rejection) = parsed.rejections.first() {
        return Err(bad(format!("{}: {}", rejection.field, rejection.reason)));
    }
    let module = parsed.resources.first().and_then(|loaded| match &loaded.resource {
        Resource::WasmFilter(filter) => Some((filter.module.clone(), filter.sha256.clone())),
        _ => None,
    });
    let now = api.mesh.now();
    match module {
        Some((ModuleSource::File(_), _)) => {
            return Err(bad(
                "spec.module.file: only filters in --config name files; push the module and name its sha256".into(),
            ));
        }
        Some((ModuleSource::Pushed, Some(digest))) if !now.modules.contains_key(&digest) => {
            return Err(bad(format!("spec.module.sha256: module {digest} is not here; push it first")));
        }
        _ => {}
    }
    if let Some(other) = configured(api, &now, namespace, name) {
        let reason = format!("{KIND} {namespace}/{name} is in {other}: change it there, or take another name");
        return Err((StatusCode::CONFLICT, reason));
    }
    let kept = durable::write(&path, text.as_bytes(), 0o600);
    kept.map_err(|error| (StatusCode::INTERNAL_SERVER_ERROR, format!("{}: {error}", path.display())))?;
    api.mesh.reload().await;
    let now = api.mesh.now();
    let row = filters(&now).find(|loaded| is(&loaded.id, namespace, name)).map(|loaded| row(api, &now, loaded));
    Ok(json!({ "generation": now.generation, "filter": row }))
}

async fn detach(
    State(api): State<Api>,
    Path((namespace, name)): Path<(String, String)>,
    headers: HeaderMap,
) -> Response {
    if let Err(refused) = api.authorize("filters", &headers) {
        return *refused;
    }
    let path = match file(&api, &namespace, &name) {
        Ok(path) => path,
        Err(reason) => return problem(StatusCode::BAD_REQUEST, &reason),
    };
    match std::fs::remove_file(&path) {
        Ok(()) => {
            api.mesh.reload().await;
            Json(json!({ "generation": api.mesh.now().generation })).into_response()
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let reason = match configured(&api, &api.mesh.now(), &namespace, &name) {
                Some(other) => format!("{KIND} {namespace}/{name} is in {other}: remove it there"),
                None => format!("there is no {KIND} {namespace}/{name}"),
            };
            problem(StatusCode::NOT_FOUND, &reason)
        }
        Err(error) => problem(StatusCode::INTERNAL_SERVER_ERROR, &format!("{}: {error}", path.display())),
    }
}

fn is(id: &ResourceId, namespace: &str, name: &str) -> bool {
    id.kind == KIND && id.namespace == namespace && id.name == name
}

/// The file of `--config` that has this filter.
fn configured(api: &Api, now: &Published, namespace: &str, name: &str) -> Option<String> {
    let attached = api.mesh.attached().display().to_string();
    let found = filters(now).find(|loaded| is(&loaded.id, namespace, name))?;
    (!found.file.starts_with(&attached)).then(|| format!("{}:{}", found.file, found.line))
}

/// Where an attached filter is kept.
fn file(api: &Api, namespace: &str, name: &str) -> Result<PathBuf, String> {
    let label = |text: &str| {
        let plain = text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
        !text.is_empty() && text.len() <= 63 && plain
    };
    match [namespace, name].into_iter().find(|part| !label(part)) {
        Some(part) => Err(format!("`{part}` is no name: lower-case letters, digits and `-`, at most 63")),
        None => Ok(api.mesh.attached().join(format!("{namespace}.{name}.yaml"))),
    }
}
