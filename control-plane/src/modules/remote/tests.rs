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
    /// How many of its layers are modules
    layers: usize,
    /// The image's manifest is reached by an index
    indexed: bool,
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
        json!({"schemaVersion": 2, "mediaType": kind, "config": config, "layers": vec![layer; self.layers]})
            .to_string()
            .into_bytes()
    }

    /// One for WebAssembly among others.
    fn index(&self) -> Vec<u8> {
        let image = |os: &str, architecture: &str, digest: String| {
            json!({"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest, "size": 1,
                   "platform": {"os": os, "architecture": architecture}})
        };
        let images = [image("linux", "amd64", digest(b"no")), image("wasi", "wasm", digest(&self.manifest()))];
        let kind = "application/vnd.oci.image.index.v1+json";
        json!({"schemaVersion": 2, "mediaType": kind, "manifests": images}).to_string().into_bytes()
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
        "/moved" | "/round" => {
            let mut response = answer(StatusCode::FOUND, "text/plain", "");
            let to = if path == "/moved" { "/f.wasm" } else { "/round" };
            response.headers_mut().insert(header::LOCATION, to.parse().unwrap());
            response
        }
        "/v2/filters/f/manifests/v1" if registry.indexed => {
            answer(StatusCode::OK, "application/vnd.oci.image.index.v1+json", registry.index())
        }
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
    Registry { auth, layer_type: LAYERS[0], layers: 1, indexed: false, layer: WASM.to_vec() }
}

fn with_login(directory: &Path, host: &str) -> Fetcher {
    let path = directory.join("config.json");
    std::fs::write(&path, json!({"auths": {host: {"auth": "bWU6c2VjcmV0"}}}).to_string()).unwrap();
    Fetcher::new(Hosts { credentials: Some(path), ..Hosts::default() }).unwrap()
}

#[tokio::test]
async fn a_module_comes_from_a_registry_with_each_kind_of_login() {
    let directory = tempfile::tempdir().unwrap();
    for auth in [Auth::None, Auth::Basic, Auth::Bearer] {
        let host = start(registry(auth)).await;
        let source = ModuleSource::Oci(format!("{host}/filters/f:v1"));
        let fetcher = with_login(directory.path(), &host);
        assert_eq!(fetcher.fetch(&source).await.unwrap(), WASM, "{auth:?}");
        let stranger = Fetcher::new(Hosts::default()).unwrap().fetch(&source).await;
        assert_eq!(stranger.is_ok(), auth == Auth::None, "{auth:?}");
    }
}

#[tokio::test]
async fn a_digest_that_does_not_hold_is_refused() {
    let host =
        start(Registry { layer: b"another module of the same size, or not".to_vec(), ..registry(Auth::None) }).await;
    let fetcher = Fetcher::new(Hosts::default()).unwrap();
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
    let refused =
        Fetcher::new(Hosts::default()).unwrap().fetch(&ModuleSource::Oci(format!("{host}/filters/f:v1"))).await;
    assert!(matches!(refused, Err(FetchError::NoModule(kinds)) if kinds == kind));
}

#[tokio::test]
async fn each_name_of_the_layer_and_an_index_are_understood_and_two_modules_are_not() {
    let fetcher = Fetcher::new(Hosts::default()).unwrap();
    let source = |host: &str| ModuleSource::Oci(format!("{host}/filters/f:v1"));
    for layer_type in LAYERS {
        let host = start(Registry { layer_type, ..registry(Auth::None) }).await;
        assert_eq!(fetcher.fetch(&source(&host)).await.unwrap(), WASM, "{layer_type}");
    }
    let host = start(Registry { indexed: true, ..registry(Auth::None) }).await;
    assert_eq!(fetcher.fetch(&source(&host)).await.unwrap(), WASM);
    let host = start(Registry { layers: 2, ..registry(Auth::None) }).await;
    assert!(matches!(fetcher.fetch(&source(&host)).await, Err(FetchError::Several(2))));
}

#[tokio::test]
async fn more_than_a_module_may_have_is_not_taken_in() {
    let layer = vec![0; usize::try_from(MAX_MODULE).unwrap() + 1];
    let host = start(Registry { layer, ..registry(Auth::None) }).await;
    let fetcher = Fetcher::new(Hosts::default()).unwrap();
    let refused = fetcher.fetch(&ModuleSource::Url(format!("http://{host}/f.wasm"))).await;
    assert!(matches!(refused, Err(FetchError::TooLarge)), "{refused:?}");
    let refused = fetcher.fetch(&ModuleSource::Oci(format!("{host}/filters/f:v1"))).await;
    assert!(refused.is_err_and(|error| error.to_string().contains("bytes")));
}

#[tokio::test]
async fn a_web_server_redirects_a_few_times() {
    let host = start(registry(Auth::None)).await;
    let fetcher = Fetcher::new(Hosts::default()).unwrap();
    assert_eq!(fetcher.fetch(&ModuleSource::Url(format!("http://{host}/moved"))).await.unwrap(), WASM);
    let refused = fetcher.fetch(&ModuleSource::Url(format!("http://{host}/round"))).await.unwrap_err();
    assert!(refused.to_string().contains("redirects"), "{refused}");
}

#[tokio::test]
async fn a_login_is_not_sent_in_plaintext() {
    let directory = tempfile::tempdir().unwrap();
    let fetcher = with_login(directory.path(), "files.example");
    let refused = fetcher.fetch(&ModuleSource::Url("http://files.example/f.wasm".into())).await;
    assert!(matches!(refused, Err(FetchError::Plaintext(host)) if host == "files.example"));
}

#[test]
fn files_that_cannot_be_used_are_named_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("empty");
    std::fs::write(&path, "").unwrap();
    for hosts in [
        Hosts { credentials: Some(path.clone()), ..Hosts::default() },
        Hosts { roots: Some(path.clone()), ..Hosts::default() },
        Hosts { roots: Some(directory.path().join("nowhere")), ..Hosts::default() },
    ] {
        let error = Fetcher::new(hosts).unwrap_err().to_string();
        assert!(
            error.starts_with("--registry-c") && error.contains(&*directory.path().display().to_string()),
            "{error}"
        );
    }
}

#[tokio::test]
async fn a_module_comes_from_a_web_server() {
    let directory = tempfile::tempdir().unwrap();
    let host = start(registry(Auth::Basic)).await;
    let url = |path: &str| ModuleSource::Url(format!("http://{host}/{path}"));
    let fetcher = with_login(directory.path(), &host);
    assert_eq!(fetcher.fetch(&url("f.wasm")).await.unwrap(), WASM);
    let refused = fetcher.fetch(&url("nothing.wasm")).await.unwrap_err();
    assert!(refused.to_string().contains("404"), "{refused}");
    let stranger = Fetcher::new(Hosts::default()).unwrap().fetch(&url("f.wasm")).await.unwrap_err();
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
    let helper = read(r#"{"credHelpers": {"a": "pass"}}"#, "a").unwrap_err();
    assert!(helper.contains("credHelpers.a"), "{helper}");
    let store = read(r#"{"auths": {"a": {}}, "credsStore": "pass"}"#, "a").unwrap_err();
    assert!(store.contains("credsStore"), "{store}");
    let token = read(r#"{"auths": {"a": {"identitytoken": "x", "auth": "dTo="}}}"#, "a").unwrap_err();
    assert!(token.contains("identitytoken"), "{token}");
    let hub = r#"{"auths": {"https://index.docker.io/v1/": {"auth": "bWU6c2VjcmV0"}}}"#;
    assert!(matches!(read(hub, "index.docker.io"), Ok(RegistryAuth::Basic(user, _)) if user == "me"));
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

#[test]
fn a_token_server_in_plaintext_is_seen_in_the_challenge() {
    let host = |challenge: &str| plain_realm(challenge);
    assert_eq!(host("Bearer realm=\"http://auth.example/token\",service=\"r\"").as_deref(), Some("auth.example"));
    assert_eq!(host("bearer service=\"r\", Realm=\"HTTP://auth.example:81\"").as_deref(), Some("auth.example:81"));
    assert_eq!(host("Bearer realm=\"https://auth.example/token\""), None);
    assert_eq!(host("Basic realm=\"registry\""), None);
}
