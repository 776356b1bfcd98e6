//! Debian's `docker-registry`: what filters' modules are pulled from.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;
use sha2::{Digest, Sha256};

use crate::{Address, Curl, Process, until};

/// What the layer of a module is called.
const LAYER: &str = "application/vnd.wasm.content.layer.v1+wasm";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// A registry on an address of its own, port 5000. Images are pushed past it, through a second one on the same storage without
/// any authorization.
#[derive(Debug)]
pub struct Registry {
    serving: Option<Process>,
    _pushed: Process,
    address: Address,
    directory: tempfile::TempDir,
}

fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

impl Registry {
    /// Not serving yet.
    pub fn new() -> Self {
        let directory = tempfile::Builder::new().prefix("registry-").tempdir().expect("temporary directory");
        let address = Address::claim();
        let pushed = serve(directory.path(), "pushed", address.port(5001), "", "");
        Self { serving: None, _pushed: pushed, address, directory }
    }

    /// Serves. `http` and `auth` are what its configuration has there besides, in YAML: `tls: {…}`, `htpasswd: {…}`.
    pub fn start(&mut self, http: &str, auth: &str) {
        self.stop();
        self.serving = Some(serve(self.directory.path(), "registry", self.address.port(5000), http, auth));
    }

    /// It is away.
    pub fn stop(&mut self) {
        if let Some(mut process) = self.serving.take() {
            process.kill();
        }
    }

    /// `ADDRESS:5000`
    pub fn host(&self) -> String {
        self.address.port(5000).to_string()
    }

    /// Its address.
    pub fn ip(&self) -> IpAddr {
        self.address.ip()
    }

    /// Where files of the test may be.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A `htpasswd` entry of its configuration: this user and password, and nobody else.
    pub fn htpasswd(&self, user: &str, password: &str) -> String {
        let made = Command::new("htpasswd").args(["-Bbn", user, password]).output();
        let made = made.expect("run htpasswd (make setup installs it)");
        assert!(made.status.success(), "{made:?}");
        let path = self.path("htpasswd");
        fs::write(&path, made.stdout).expect("write");
        format!("htpasswd: {{realm: test, path: {}}}", path.display())
    }

    /// Pushes an image of this one module to `filters/f`; the digest of its manifest, `sha256:…`.
    pub fn push(&self, tag: &str, module: &[u8]) -> String {
        let blob = |bytes: &[u8]| {
            let begun = Curl::get(&self.pushed("/v2/filters/f/blobs/uploads/")).args(["-X", "POST"]).send();
            let place = begun.header("location").unwrap_or_else(|| panic!("no upload: {begun:?}")).to_owned();
            let place = if place.starts_with('/') { self.pushed(&place) } else { place };
            let done = self.put(&format!("{place}&digest={}", digest(bytes)), "application/octet-stream", bytes);
            assert_eq!(done, 201, "the blob is pushed");
            json!({"digest": digest(bytes), "size": bytes.len()})
        };
        let described = |mut blob: serde_json::Value, kind: &str| {
            blob["mediaType"] = json!(kind);
            blob
        };
        let config = described(blob(b"{}"), "application/vnd.oci.image.config.v1+json");
        let layer = described(blob(module), LAYER);
        let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [layer]});
        let manifest = manifest.to_string().into_bytes();
        let done = self.put(&self.pushed(&format!("/v2/filters/f/manifests/{tag}")), MANIFEST, &manifest);
        assert_eq!(done, 201, "the manifest is pushed");
        digest(&manifest)
    }

    fn pushed(&self, path: &str) -> String {
        format!("http://{}{path}", self.address.port(5001))
    }

    fn put(&self, url: &str, kind: &str, bytes: &[u8]) -> u16 {
        let path = self.path("upload");
        fs::write(&path, bytes).expect("write");
        let from = format!("@{}", path.display());
        Curl::get(url).args(["-X", "PUT", "--data-binary", &from]).header("content-type", kind).send().status
    }
}

impl Default for Registry {
    fn default() -> Self {
        Self::new()
    }
}

fn serve(directory: &Path, name: &str, address: SocketAddr, http: &str, auth: &str) -> Process {
    let line = |text: &str| if text.is_empty() { String::new() } else { format!("  {text}\n") };
    let auth = if auth.is_empty() { String::new() } else { format!("auth:\n{}", line(auth)) };
    let storage = directory.join("storage");
    let text = format!(
        "version: 0.1\nlog: {{level: warn}}\nstorage:\n  filesystem: {{rootdirectory: {}}}\nhttp:\n  addr: \"{address}\"\n  secret: \
         test\n{}{auth}",
        storage.display(),
        line(http),
    );
    let config = directory.join(format!("{name}.yml"));
    fs::write(&config, text).expect("write");
    let mut command = Command::new("docker-registry");
    command.arg("serve").arg(&config);
    let mut process = Process::start(name, command, directory);
    let scheme = if http.contains("tls") { "https" } else { "http" };
    until(&format!("{name} answers"), || {
        assert!(process.is_running(), "{name} ended:\n{}", process.log());
        (Curl::get(&format!("{scheme}://{address}/v2/")).arg("--insecure").send().status != 0).then_some(())
    });
    process
}
