use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::Response;
use outrigger_core::resource::ModuleSource;
use serde_json::json;
use sha2::{Digest, Sha256};

use super::*;

const WASM: &[u8] = b"\0asm\x01\0\0\0 a module, as far as a registry knows";

/// What the registry asks of its clients.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Auth {
    None,
    Basic,
    Bearer,
}

/// A registry of one image, and a web server of one file.
#[derive(Debug)]
struct Registry {
    auth: Auth,
    layer_type: &'static str,
    /// What it gives in place of the module
    layer: Vec<u8>,
}

fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

impl Registry {
    fn manifest(&self) -> Vec<u8> {
        let layer = json!({"mediaType": self.layer_type, "digest": digest(WASM), "size": WASM.len()});
        let config =
            json!({"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest(b"{}"), "size": 2});
        let kind = "application/vnd.oci.image.manifest.v1+json";
        json!({"schemaVersion": 2, "mediaType": kind, "config": config, "layers": [layer]}).to_string().into_bytes()
    }

    fn permits(&self, headers: &HeaderMap) -> bool {
        let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        match self.auth {
            Auth::None => true,
            Auth::Basic => given == Some("Basic bWU6c2VjcmV0"),
            Auth::Bearer => given == Some("Bearer granted"),
        }
    }
}

fn answer(status: StatusCode, kind: &str, body: impl Into<Body>) -> Response {
    Response::builder().status(status).header("content-type", kind).body(body.into()).unwrap()
}

async fn serve(State(registry): State<Arc<Registry>>, request: Request) -> Response {
    let path = request.uri().path().to_owned();
    let host = request.headers()["host"].to_str().unwrap().to_owned();
    if path == "/token" {
        // Only who has the login gets a token.
        let login = request.headers().get(header::AUTHORIZATION).is_some_and(|value| value == "Basic bWU6c2VjcmV0");
        let status = if login { StatusCode::OK } else { StatusCode::UNAUTHORIZED };
        return answer(status, "application/json", json!({"token": "granted", "expires_in": 60}).to_string());
    }
    if !registry.permits(request.headers()) {
        let mut response = answer(StatusCode::UNAUTHORIZED, "application/json", "{}");
        let challenge = match registry.auth {
            Auth::Bearer => {
                format!("Bearer realm=\"http://{host}/token\",service=\"test\",scope=\"repository:f:pull\"")
            }
            _ => "Basic realm=\"test\"".to_owned(),
        };
        response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge.parse().unwrap());
        return response;
    }
    let manifest = registry.manifest();
    match path.as_str() {
        "/v2/" => answer(StatusCode::OK, "application/json", "{}"),
        "/f.wasm" => answer(StatusCode::OK, "application/wasm", registry.layer.clone()),
        _ if path.starts_with("/v2/filters/f/manifests/") => {
            answer(StatusCode::OK, "application/vnd.oci.image.manifest.v1+json", manifest)
        }
        _ if path == format!("/v2/filters/f/blobs/{}", digest(WASM)) => {
            answer(StatusCode::OK, "application/octet-stream", registry.layer.clone())
        }
        _ => answer(StatusCode::NOT_FOUND, "application/json", "{}"),
    }
}

async fn start(registry: Registry) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = Router::new().fallback(serve).with_state(Arc::new(registry));
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    address.to_string()
}

fn registry(auth: Auth) -> Registry {
    Registry { auth, layer_type: LAYERS[0], layer: WASM.to_vec() }
}

fn login(directory: &Path, host: &str) -> PathBuf {
    let path = directory.join("config.json");
    std::fs::write(&path, json!({"auths": {host: {"auth": "bWU6c2VjcmV0"}}}).to_string()).unwrap();
    path
}

#[tokio::test]
async fn a_module_comes_from_a_registry_with_each_kind_of_login() {
    let directory = tempfile::tempdir().unwrap();
    for auth in [Auth::None, Auth::Basic, Auth::Bearer] {
        let host = start(registry(auth)).await;
        let source = ModuleSource::Oci(format!("{host}/filters/f:v1"));
        let fetcher = Fetcher::new(Some(login(directory.path(), &host))).unwrap();
        assert_eq!(fetcher.fetch(&source).await.unwrap(), WASM, "{auth:?}");
        let stranger = Fetcher::new(None).unwrap().fetch(&source).await;
        assert_eq!(stranger.is_ok(), auth == Auth::None, "{auth:?}");
    }
}

#[tokio::test]
async fn a_digest_that_does_not_hold_is_refused() {
    let host =
        start(Registry { layer: b"another module of the same size, or not".to_vec(), ..registry(Auth::None) }).await;
    let fetcher = Fetcher::new(None).unwrap();
    let refused = fetcher.fetch(&ModuleSource::Oci(format!("{host}/filters/f:v1"))).await.unwrap_err();
    assert!(refused.to_string().contains(&digest(WASM)), "{refused}");

    let host = start(registry(Auth::None)).await;
    let pinned = |digest: &str| ModuleSource::Oci(format!("{host}/filters/f@{digest}"));
    assert_eq!(fetcher.fetch(&pinned(&digest(&registry(Auth::None).manifest()))).await.unwrap(), WASM);
    let refused = fetcher.fetch(&pinned(&digest(b"another manifest"))).await.unwrap_err();
    assert!(refused.to_string().contains(&digest(b"another manifest")), "{refused}");
}

#[tokio::test]
async fn an_image_without_a_module_is_named_by_its_layers() {
    let kind = "application/vnd.oci.image.layer.v1.tar+gzip";
    let host = start(Registry { layer_type: kind, ..registry(Auth::None) }).await;
    let refused = Fetcher::new(None).unwrap().fetch(&ModuleSource::Oci(format!("{host}/filters/f:v1"))).await;
    assert!(matches!(refused, Err(FetchError::NoModule(kinds)) if kinds == kind));
}

#[tokio::test]
async fn a_module_comes_from_a_web_server() {
    let directory = tempfile::tempdir().unwrap();
    let host = start(registry(Auth::Basic)).await;
    let url = |path: &str| ModuleSource::Url(format!("http://{host}/{path}"));
    let fetcher = Fetcher::new(Some(login(directory.path(), &host))).unwrap();
    assert_eq!(fetcher.fetch(&url("f.wasm")).await.unwrap(), WASM);
    let refused = fetcher.fetch(&url("nothing.wasm")).await.unwrap_err();
    assert!(refused.to_string().contains("404"), "{refused}");
    let stranger = Fetcher::new(None).unwrap().fetch(&url("f.wasm")).await.unwrap_err();
    assert!(stranger.to_string().contains("401"), "{stranger}");
}

#[test]
fn logins_are_read_as_docker_writes_them() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.json");
    let read = |text: &str, host: &str| {
        std::fs::write(&path, text).unwrap();
        read_credentials(&path, host)
    };
    let text =
        r#"{"auths": {"a": {"username": "u", "password": "p"}, "https://b": {"registrytoken": "t"}, "c": {}}, "x": 1}"#;
    assert!(matches!(read(text, "a"), Ok(RegistryAuth::Basic(user, _)) if user == "u"));
    assert!(matches!(read(text, "b"), Ok(RegistryAuth::Bearer(token)) if token == "t"));
    assert!(matches!(read(text, "d"), Ok(RegistryAuth::Anonymous)));
    assert!(read(text, "c").unwrap_err().starts_with("auths.c: has neither"));
    assert!(read("nonsense", "a").is_err());
}

#[test]
fn only_this_host_is_spoken_to_in_plaintext() {
    for registry in ["localhost", "localhost:5000", "127.0.0.1:5000", "[::1]:5000"] {
        assert!(is_loopback(registry), "{registry}");
    }
    for registry in ["registry.example", "localhost.example:80", "10.0.0.1:5000"] {
        assert!(!is_loopback(registry), "{registry}");
    }
}
