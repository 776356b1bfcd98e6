//! Filters' modules from web servers and from Debian's `docker-registry`, through the control plane.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use std::fs;
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use outrigger_e2e::{Authority, Backend, Guest, Mesh, Proxy, Registry, Reply, until};
use serde_json::json;
use sha2::{Digest, Sha256};

const SERVICES: &str = "
apiVersion: v1
kind: Service
metadata: {name: reviews, namespace: demo}
spec: {selector: {app: reviews}, ports: [{name: http, port: 80, targetPort: http}]}
";
/// `me:secret`
const BASIC: &str = "Basic bWU6c2VjcmV0";

struct Sourced {
    web: Proxy,
    _reviews: Proxy,
    _application: Backend,
    mesh: Mesh,
}

impl Sourced {
    fn start(flags: &[&str]) -> Self {
        let mesh = Mesh::start_with(SERVICES, flags);
        let application = Backend::http([127, 0, 0, 1].into(), "v1");
        let reviews = mesh.proxy("reviews-0").labels("app=reviews").app(&application.address()).start();
        let web = mesh.proxy("web-0").start();
        let this = Self { web, _reviews: reviews, _application: application, mesh };
        until("web reaches reviews", || (this.get().status == 200).then_some(()));
        this
    }

    fn get(&self) -> outrigger_e2e::Response {
        self.web.call("reviews", "/").send()
    }

    /// A filter on `reviews` with this module.
    fn filter(&self, module: &str) {
        let text = format!(
            "apiVersion: outrigger.dev/v1alpha1\nkind: WasmFilter\nmetadata: {{name: f, namespace: demo}}\n\
             spec:\n  targetRefs: [{{group: \"\", kind: Service, name: reviews}}]\n  module: {{{module}}}\n"
        );
        self.mesh.write("filter.yaml", &text);
    }

    #[track_caller]
    fn serves(&self, version: &str) {
        until(&format!("version {version} serves"), || (self.get().header("x-version") == Some(version)).then_some(()));
    }

    /// Waits until `outrigger status` says all of this.
    #[track_caller]
    fn status_says(&self, parts: &[&str]) {
        until(&format!("`outrigger status` says {parts:?}"), || {
            let table = String::from_utf8(self.mesh.outrigger(&["status"]).stdout).unwrap();
            parts.iter().all(|part| table.contains(part)).then_some(())
        });
    }
}

/// A module that adds `x-version`, and its digest.
fn version(number: &str) -> (Vec<u8>, String) {
    let file = tempfile::NamedTempFile::new().unwrap();
    let digest = Guest::adds("0_2_1", "x-version", number).write(file.path());
    (fs::read(file.path()).unwrap(), digest)
}

/// Writes the login of `host` as Docker does.
fn login(registry: &Registry, password: &str) -> String {
    let path = registry.path("config.json");
    let login = json!({"username": "me", "password": password});
    fs::write(&path, json!({"auths": {registry.host(): login}}).to_string()).unwrap();
    path.display().to_string()
}

#[test]
fn an_image_is_pulled_with_a_password_and_pinned_whatever_its_tag_says() {
    let mut registry = Registry::new();
    registry.start("", &registry.htpasswd("me", "secret"));
    let (one, _) = version("1");
    let manifest = registry.push("stable", &one);
    let config = login(&registry, "secret");
    let mut mesh = Sourced::start(&["--registry-config", &config]);
    let image = format!("{}/filters/f:stable", registry.host());

    // What is not pinned is refused before anything is fetched.
    mesh.filter(&format!("oci: \"{image}\""));
    mesh.status_says(&["spec.module.sha256", "@sha256:<digest>"]);

    mesh.filter(&format!("oci: \"{image}@{manifest}\""));
    mesh.serves("1");

    // The tag moves; the pin does not, also for a control plane that forgot everything it had fetched.
    let (two, two_digest) = version("2");
    let second = registry.push("stable", &two);
    fs::remove_dir_all(mesh.mesh.path("control/modules")).unwrap();
    mesh.mesh.control.restart();
    mesh.status_says(&["reviews-0"]);
    until("the module is there again", || {
        let filters = mesh.mesh.api("/api/v1/filters");
        (filters[0]["usable"] == true).then_some(())
    });
    mesh.serves("1");

    // A wrong password is named, and what served serves on; the right one is found without a restart.
    login(&registry, "wrong");
    mesh.filter(&format!("oci: \"{image}@{second}\""));
    mesh.status_says(&["spec.module.oci", "filters/f", "uthoriz"]);
    assert_eq!(mesh.get().header("x-version"), Some("1"));
    login(&registry, "secret");
    mesh.serves("2");

    // A manifest that the registry lacks, and a module that is another than the pinned one.
    let other = format!("sha256:{}", hex::encode(Sha256::digest(b"another")));
    mesh.filter(&format!("oci: \"{image}@{other}\""));
    mesh.status_says(&["spec.module.oci", &other]);
    let (three, three_digest) = version("3");
    mesh.filter(&format!("oci: \"{image}\", sha256: {three_digest}"));
    mesh.status_says(&["spec.module", &format!("has digest {two_digest}")]);
    assert_eq!(mesh.get().header("x-version"), Some("2"));
    registry.push("stable", &three);
    mesh.serves("3");
}

#[test]
fn a_registry_that_is_away_is_waited_for_and_what_it_gave_serves_on() {
    let mut registry = Registry::new();
    let (one, _) = version("1");
    let first = registry.push("v1", &one);
    let mut mesh = Sourced::start(&[]);
    let image = |manifest: &str| format!("oci: \"{}/filters/f@{manifest}\"", registry.host());
    mesh.filter(&image(&first));
    mesh.status_says(&["spec.module.oci", "filters/f", "onnect"]);
    let closed = mesh.get();
    assert_eq!((closed.status, closed.reason()), (503, Some("filter-failed")), "{closed:?}");
    let second = registry.push("v2", &version("2").0);
    let (first, second) = (image(&first), image(&second));
    registry.start("", "");
    mesh.serves("1");

    registry.stop();
    mesh.filter(&second);
    mesh.status_says(&["spec.module.oci", "onnect"]);
    assert_eq!(mesh.get().header("x-version"), Some("1"), "the last good one serves");
    // What was fetched once needs no registry any more.
    mesh.filter(&first);
    mesh.mesh.control.restart();
    until("the filter is usable", || {
        let filters = mesh.mesh.api("/api/v1/filters");
        (filters[0]["usable"] == true && filters[0]["problem"].is_null()).then_some(())
    });
    mesh.serves("1");
}

#[test]
fn a_registry_of_a_private_authority_is_known_by_its_root() {
    let mut registry = Registry::new();
    let authority = Authority::root("registries");
    let server = authority.server(&registry.path(""), "server", registry.ip());
    let tls = format!("tls: {{certificate: {}, key: {}}}", server.cert.display(), server.key.display());
    registry.start(&tls, "");
    let manifest = registry.push("v1", &version("1").0);
    // Loopback is spoken to in plaintext: this one is known by another name.
    let root = Authority::root("somebody else").write(&registry.path(""), "root").cert;
    let root = root.display().to_string();
    let mesh = Sourced::start(&["--registry-ca", &root]);
    let host = registry.host();
    let (_, one) = version("1");
    let blob = format!("https://{host}/v2/filters/f/blobs/sha256:{one}");
    mesh.filter(&format!("url: \"{blob}\", sha256: {one}"));
    mesh.status_says(&["spec.module.url", "certificate"]);
    // The file is read at each fetch.
    authority.write(&registry.path(""), "root");
    mesh.serves("1");
    assert!(manifest.starts_with("sha256:"));
}

/// Claims of a token, as the registry wants them.
fn token(authority: &outrigger_e2e::Leaf, access: &serde_json::Value) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let claims = json!({
        "iss": "test", "aud": "registry", "sub": "me", "jti": "1",
        "iat": now - 10, "nbf": now - 10, "exp": now + 300, "access": access,
    });
    let pem = fs::read_to_string(&authority.cert).unwrap();
    let der: String = pem.lines().filter(|line| !line.starts_with("-----")).collect();
    let mut header = jsonwebtoken::Header::new(jsonwebtoken::Algorithm::ES256);
    header.x5c = Some(vec![der]);
    let key = jsonwebtoken::EncodingKey::from_ec_pem(&fs::read(&authority.key).unwrap()).unwrap();
    jsonwebtoken::encode(&header, &claims, &key).unwrap()
}

#[test]
fn a_registry_that_wants_bearer_tokens_gets_one_from_its_token_server() {
    let mut registry = Registry::new();
    let authority = Authority::root("tokens");
    let root = authority.write(&registry.path(""), "token-root");
    let signer = authority.leaf(&registry.path(""), "token", "demo/token", Some(std::time::Duration::from_secs(3600)));
    let tokens = Backend::http_with(registry.ip(), "tokens", move |request| {
        let known = request.header("authorization") == Some(BASIC);
        let access = json!([{"type": "repository", "name": "filters/f", "actions": ["pull"]}]);
        let body = if known { json!({"token": token(&signer, &access), "expires_in": 300}) } else { json!({}) };
        let headers = vec![("content-type".to_owned(), "application/json".to_owned())];
        Reply::Answer { status: if known { 200 } else { 401 }, headers, body: body.to_string().into_bytes() }
    });
    let auth = format!(
        "token: {{realm: \"http://{}/token\", service: registry, issuer: test, rootcertbundle: {}}}",
        tokens.address(),
        root.cert.display()
    );
    registry.start("", &auth);
    let manifest = registry.push("v1", &version("1").0);
    let config = login(&registry, "wrong");
    let mesh = Sourced::start(&["--registry-config", &config]);
    mesh.filter(&format!("oci: \"{}/filters/f@{manifest}\"", registry.host()));
    mesh.status_says(&["spec.module.oci", "filters/f"]);
    until("the token server was asked", || (!tokens.requests().is_empty()).then_some(()));
    assert_eq!(mesh.get().header("x-version"), None);
    login(&registry, "secret");
    mesh.serves("1");
    let asked = tokens.requests().pop().unwrap();
    assert!(asked.path.contains("scope=repository") && asked.path.contains("pull"), "{asked:?}");
}

#[test]
fn a_module_on_a_web_server_is_pinned_by_its_digest() {
    let (one, one_digest) = version("1");
    let (two, two_digest) = version("2");
    let file = Arc::new(Mutex::new(one));
    let served = file.clone();
    let web = Backend::http_with([127, 0, 0, 1].into(), "files", move |_| Reply::Answer {
        status: 200,
        headers: Vec::new(),
        body: served.lock().unwrap().clone(),
    });
    let mesh = Sourced::start(&[]);
    let url = format!("http://{}/f.wasm", web.address());
    mesh.filter(&format!("url: \"{url}\""));
    mesh.status_says(&["spec.module.sha256", "required with `url`"]);
    mesh.filter(&format!("url: \"{url}\", sha256: {one_digest}"));
    mesh.serves("1");
    let before = web.requests().len();

    // Another digest before the file has it: named, and the old one serves.
    mesh.filter(&format!("url: \"{url}\", sha256: {two_digest}"));
    mesh.status_says(&["spec.module", &format!("has digest {one_digest}")]);
    assert_eq!(mesh.get().header("x-version"), Some("1"));
    two.clone_into(&mut file.lock().unwrap());
    mesh.serves("2");
    assert!(web.requests().len() > before, "it was asked again");
}
