//! Modules from other hosts: HTTP(S), and registries that speak the OCI distribution protocol.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use oci_client::Reference;
use oci_client::client::{Certificate, CertificateEncoding, Client, ClientConfig, ClientProtocol};
use oci_client::manifest::ImageIndexEntry;
use oci_client::secrets::RegistryAuth;
use outrigger_core::resource::ModuleSource;
use serde::Deserialize;
use tokio::io::AsyncWrite;

use super::store::MAX_MODULE;

const CONNECT: Duration = Duration::from_secs(10);
/// Silence of the other side that is waited out.
const READ: Duration = Duration::from_secs(30);
/// A whole fetch.
const WHOLE: Duration = Duration::from_secs(300);
/// Redirects of a web server that are followed.
const REDIRECTS: usize = 5;

/// What a layer that is a WebAssembly module may be called.
const LAYERS: [&str; 3] = [
    "application/vnd.module.wasm.content.layer.v1+wasm",
    "application/vnd.wasm.content.layer.v1+wasm",
    "application/wasm",
];

/// Why a module could not be fetched. The source is not named in it.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The other side, or the way to it
    #[error("{0}")]
    Remote(String),
    /// More than any filter has
    #[error("the module has more than {MAX_MODULE} bytes")]
    TooLarge,
    /// The image holds something else
    #[error(
        "no layer is a WebAssembly module; its layers are {0}; push it as application/vnd.module.wasm.content.layer.v1+wasm"
    )]
    NoModule(String),
    /// More than one may be meant
    #[error("{0} layers are WebAssembly modules; push an image with one of them")]
    Several(usize),
    /// `--registry-config`, `--registry-ca`
    #[error("{flag} {}: {why}", path.display())]
    File {
        /// The flag that names it
        flag: &'static str,
        /// The file
        path: PathBuf,
        /// What is wrong
        why: String,
    },
    /// A login that anybody on the way could read
    #[error(
        "there is a login for {0} in --registry-config, which is not sent in plaintext; use https, or allow it with --registry-plain-http {0}"
    )]
    Plaintext(String),
    /// The same, on the way to a registry's token server
    #[error(
        "the token server {realm} of {registry} is spoken to in plaintext, and the login in --registry-config is not sent to it; have the registry name an https realm, or allow it with --registry-plain-http {realm}"
    )]
    PlaintextRealm {
        /// The registry
        registry: String,
        /// Host of the token server
        realm: String,
    },
    /// It took too long
    #[error("not complete after {WHOLE:?}")]
    Timeout,
}

/// How other hosts are spoken to. Files are read at each fetch, so that what was rotated counts.
#[derive(Debug, Clone, Default)]
pub struct Hosts {
    /// Docker's `config.json` (`--registry-config`)
    pub credentials: Option<PathBuf>,
    /// PEM of authorities beside those of the system (`--registry-ca`)
    pub roots: Option<PathBuf>,
    /// Hosts, with their port if it is not the scheme's, that are spoken to in plaintext (`--registry-plain-http`). Those on
    /// loopback always are
    pub plain: Vec<String>,
}

/// Fetches modules.
#[derive(Debug, Clone)]
pub struct Fetcher {
    hosts: Hosts,
}

impl Fetcher {
    /// # Errors
    /// When a file that is named in `hosts` cannot be used, or the system's root certificates.
    pub fn new(hosts: Hosts) -> Result<Self, FetchError> {
        let this = Self { hosts };
        this.web()?;
        this.credentials("")?;
        Ok(this)
    }

    /// The module of a remote source.
    ///
    /// # Errors
    /// Why there is none.
    pub async fn fetch(&self, source: &ModuleSource) -> Result<Vec<u8>, FetchError> {
        let fetch = async {
            match source {
                ModuleSource::Url(url) => self.url(url).await,
                ModuleSource::Oci(reference) => self.oci(reference).await,
                ModuleSource::File(_) | ModuleSource::Pushed => {
                    Err(FetchError::Remote("is not on another host".into()))
                }
            }
        };
        tokio::time::timeout(WHOLE, fetch).await.unwrap_or(Err(FetchError::Timeout))
    }

    async fn url(&self, url: &str) -> Result<Vec<u8>, FetchError> {
        let remote = |error: reqwest::Error| FetchError::Remote(chain(&error));
        let mut request = self.web()?.get(url);
        let (scheme, rest) = url.split_once("://").unwrap_or_default();
        let host = rest.split(['/', '?', '#']).next().unwrap_or_default();
        let login = self.credentials(host)?;
        if login != RegistryAuth::Anonymous && scheme == "http" && !self.plain(host) {
            return Err(FetchError::Plaintext(host.to_owned()));
        }
        match login {
            RegistryAuth::Basic(user, password) => request = request.basic_auth(user, Some(password)),
            RegistryAuth::Bearer(token) => request = request.bearer_auth(token),
            RegistryAuth::Anonymous => {}
        }
        let mut response = request.send().await.map_err(remote)?;
        if response.status() != reqwest::StatusCode::OK {
            return Err(FetchError::Remote(format!("the answer is {}", response.status())));
        }
        let mut module = Bounded::default();
        while let Some(chunk) = response.chunk().await.map_err(remote)? {
            module.push(&chunk)?;
        }
        Ok(module.bytes)
    }

    async fn oci(&self, reference: &str) -> Result<Vec<u8>, FetchError> {
        let remote = |error: oci_client::errors::OciDistributionError| FetchError::Remote(chain(&error));
        let image: Reference = reference.parse().map_err(|error| FetchError::Remote(format!("{error}")))?;
        let registry = image.resolve_registry();
        let plain = if self.plain(registry) { vec![registry.to_owned()] } else { Vec::new() };
        let root = |data| Certificate { encoding: CertificateEncoding::Der, data };
        let config = ClientConfig {
            protocol: ClientProtocol::HttpsExcept(plain),
            connect_timeout: Some(CONNECT),
            read_timeout: Some(READ),
            extra_root_certificates: self.roots()?.into_iter().map(root).collect(),
            platform_resolver: Some(Box::new(of_index)),
            ..ClientConfig::default()
        };
        // Not `new`, which goes on without this configuration if it cannot be used.
        let client = Client::try_from(config).map_err(remote)?;
        let auth = self.credentials(registry)?;
        self.check_realm(registry, &auth).await?;
        let (manifest, _) = client.pull_image_manifest(&image, &auth).await.map_err(remote)?;
        let modules = manifest.layers.iter().filter(|layer| LAYERS.contains(&layer.media_type.as_str()));
        let modules: Vec<_> = modules.collect();
        let layer = match modules.as_slice() {
            [layer] => *layer,
            [] => {
                let kinds: Vec<&str> = manifest.layers.iter().map(|layer| layer.media_type.as_str()).collect();
                return Err(FetchError::NoModule(kinds.join(", ")));
            }
            several => return Err(FetchError::Several(several.len())),
        };
        if u64::try_from(layer.size).is_ok_and(|size| size > MAX_MODULE) {
            return Err(FetchError::TooLarge);
        }
        let mut module = Bounded::default();
        // Verifies the layer's digest, which the manifest names, whose digest the reference may name.
        client.pull_blob(&image, layer, &mut module).await.map_err(remote)?;
        Ok(module.bytes)
    }

    /// Whether the login for a registry stays secret on its way to the token server. The client of registries does not tell
    /// where it sends it, so the registry is asked before.
    async fn check_realm(&self, registry: &str, auth: &RegistryAuth) -> Result<(), FetchError> {
        if !matches!(auth, RegistryAuth::Basic(..)) || self.plain(registry) {
            return Ok(());
        }
        let asked = self.web()?.get(format!("https://{registry}/v2/")).send().await;
        let response = asked.map_err(|error| FetchError::Remote(chain(&error)))?;
        let challenges = response.headers().get_all(reqwest::header::WWW_AUTHENTICATE);
        let mut realms = challenges.iter().filter_map(|challenge| plain_realm(challenge.to_str().ok()?));
        match realms.find(|realm| !self.plain(realm)) {
            Some(realm) => Err(FetchError::PlaintextRealm { registry: registry.to_owned(), realm }),
            None => Ok(()),
        }
    }

    /// A client of web servers.
    fn web(&self) -> Result<reqwest::Client, FetchError> {
        // What comes is pinned by its digest; what is asked for stays as secret as it was.
        let redirects = reqwest::redirect::Policy::custom(|attempt| {
            let secure = attempt.previous().last().is_some_and(|from| from.scheme() == "https");
            if attempt.previous().len() > REDIRECTS {
                return attempt.error(format!("more than {REDIRECTS} redirects"));
            }
            if secure && attempt.url().scheme() != "https" {
                return attempt.error("a redirect from https to plaintext is not followed");
            }
            attempt.follow()
        });
        let mut builder = reqwest::Client::builder().connect_timeout(CONNECT).read_timeout(READ).redirect(redirects);
        let roots: Result<Vec<_>, _> = self.roots()?.iter().map(|der| reqwest::Certificate::from_der(der)).collect();
        let roots = roots.map_err(|error| self.wrong_roots(chain(&error)))?;
        builder = builder.tls_certs_merge(roots);
        builder.build().map_err(|error| FetchError::Remote(chain(&error)))
    }

    /// Certificates of `--registry-ca`, DER.
    fn roots(&self) -> Result<Vec<Vec<u8>>, FetchError> {
        let Some(path) = &self.hosts.roots else { return Ok(Vec::new()) };
        let text = std::fs::read(path).map_err(|error| self.wrong_roots(error.to_string()))?;
        let found = pem::parse_many(&text).map_err(|error| self.wrong_roots(error.to_string()))?;
        let found = found.into_iter().filter(|pem| pem.tag() == "CERTIFICATE");
        let found: Vec<_> = found.map(pem::Pem::into_contents).collect();
        if found.is_empty() {
            return Err(self.wrong_roots("no certificate is in it".to_owned()));
        }
        Ok(found)
    }

    fn wrong_roots(&self, why: String) -> FetchError {
        FetchError::File { flag: "--registry-ca", path: self.hosts.roots.clone().unwrap_or_default(), why }
    }

    /// Whether a host is spoken to in plaintext: as other clients of registries do, on this one, where there is nobody between.
    fn plain(&self, host: &str) -> bool {
        is_loopback(host) || self.hosts.plain.iter().any(|plain| plain == host)
    }

    fn credentials(&self, host: &str) -> Result<RegistryAuth, FetchError> {
        let Some(path) = &self.hosts.credentials else { return Ok(RegistryAuth::Anonymous) };
        let wrong = |why| FetchError::File { flag: "--registry-config", path: path.clone(), why };
        read_credentials(path, host).map_err(wrong)
    }
}

/// The image of an index: the one for WebAssembly, or the only one.
fn of_index(images: &[ImageIndexEntry]) -> Option<String> {
    let wasm = |image: &&ImageIndexEntry| {
        image.platform.as_ref().is_some_and(|platform| platform.architecture.to_string() == "wasm")
    };
    let only = || images.first().filter(|_| images.len() == 1);
    images.iter().find(wasm).or_else(only).map(|image| image.digest.clone())
}

/// The host of a challenge's token server, where it is spoken to in plaintext.
fn plain_realm(challenge: &str) -> Option<String> {
    let challenge = challenge.to_ascii_lowercase();
    let (_, realm) = challenge.split_once("realm=")?;
    let rest = realm.trim_start_matches('"').strip_prefix("http://")?;
    rest.split(['/', '?', '#', '"', ',']).next().map(str::to_owned)
}

fn is_loopback(registry: &str) -> bool {
    let host = registry.rsplit_once(':').map_or(registry, |(host, _)| host).trim_matches(['[', ']']);
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Docker's `config.json`, the part that needs no other program.
#[derive(Debug, Deserialize)]
struct Docker {
    #[serde(default)]
    auths: HashMap<String, Login>,
    #[serde(default, rename = "credHelpers")]
    helpers: HashMap<String, String>,
    #[serde(default, rename = "credsStore")]
    store: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Login {
    /// Base64 of `user:password`
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
    registrytoken: String,
}

fn read_credentials(path: &Path, host: &str) -> Result<RegistryAuth, String> {
    let text = std::fs::read(path).map_err(|error| error.to_string())?;
    let docker: Docker = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
    // As `docker login` writes them.
    let names =
        [host.to_owned(), format!("https://{host}"), format!("https://{host}/v1/"), format!("https://{host}/v2/")];
    if let Some(helper) = docker.helpers.get(host) {
        return Err(format!("credHelpers.{host}: `{helper}` is not run; write the login to auths.{host}.auth"));
    }
    let Some(login) = names.iter().find_map(|name| docker.auths.get(name)) else {
        return Ok(RegistryAuth::Anonymous);
    };
    if !login.identitytoken.is_empty() {
        return Err(format!(
            "auths.{host}: identitytoken is not supported; use a user and a password, or registrytoken"
        ));
    }
    if !login.registrytoken.is_empty() {
        return Ok(RegistryAuth::Bearer(login.registrytoken.clone()));
    }
    if !login.username.is_empty() {
        return Ok(RegistryAuth::Basic(login.username.clone(), login.password.clone()));
    }
    if login.auth.is_empty() && !docker.store.is_empty() {
        return Err(format!("credsStore: `{}` is not run; write the login to auths.{host}.auth", docker.store));
    }
    let decoded = base64::Engine::decode(&base64::prelude::BASE64_STANDARD, &login.auth).ok();
    let decoded = decoded.and_then(|bytes| String::from_utf8(bytes).ok());
    match decoded.as_deref().and_then(|text| text.split_once(':')) {
        Some((user, password)) => Ok(RegistryAuth::Basic(user.to_owned(), password.to_owned())),
        None => {
            Err(format!("auths.{host}: has neither auth, username nor registrytoken (credential helpers are not run)"))
        }
    }
}

/// A module while it comes in.
#[derive(Debug, Default)]
struct Bounded {
    bytes: Vec<u8>,
}

impl Bounded {
    fn push(&mut self, chunk: &[u8]) -> Result<(), FetchError> {
        if (self.bytes.len() + chunk.len()) as u64 > MAX_MODULE {
            return Err(FetchError::TooLarge);
        }
        self.bytes.extend_from_slice(chunk);
        Ok(())
    }
}

impl AsyncWrite for Bounded {
    fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, chunk: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(self.push(chunk).map(|()| chunk.len()).map_err(io::Error::other))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// An error with what caused it.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        // Some repeat their cause.
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests;
