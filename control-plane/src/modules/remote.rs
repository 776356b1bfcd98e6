//! Modules from other hosts: HTTP(S), and registries that speak the OCI distribution protocol.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use oci_client::Reference;
use oci_client::client::{Client, ClientConfig, ClientProtocol};
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
    /// `--registry-config`
    #[error("--registry-config {}: {why}", path.display())]
    Credentials {
        /// The file
        path: PathBuf,
        /// What is wrong
        why: String,
    },
    /// It took too long
    #[error("not complete after {WHOLE:?}")]
    Timeout,
}

/// Fetches modules.
#[derive(Debug, Clone)]
pub struct Fetcher {
    http: reqwest::Client,
    /// Docker's `config.json`; read at each fetch, so that rotated credentials count
    credentials: Option<PathBuf>,
}

impl Fetcher {
    /// # Errors
    /// When the system's root certificates cannot be used.
    pub fn new(credentials: Option<PathBuf>) -> Result<Self, reqwest::Error> {
        let http = reqwest::Client::builder().connect_timeout(CONNECT).read_timeout(READ).build()?;
        Ok(Self { http, credentials })
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
        let mut request = self.http.get(url);
        let host = url.split_once("://").and_then(|(_, rest)| rest.split('/').next()).unwrap_or_default();
        match self.credentials(host)? {
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
        // As other clients of registries do: on this host there is nobody between.
        let plain = if is_loopback(registry) { vec![registry.to_owned()] } else { Vec::new() };
        let config = ClientConfig {
            protocol: ClientProtocol::HttpsExcept(plain),
            connect_timeout: Some(CONNECT),
            read_timeout: Some(READ),
            ..ClientConfig::default()
        };
        let client = Client::new(config);
        let auth = self.credentials(registry)?;
        let (manifest, _) = client.pull_image_manifest(&image, &auth).await.map_err(remote)?;
        let layer = manifest.layers.iter().find(|layer| LAYERS.contains(&layer.media_type.as_str()));
        let Some(layer) = layer else {
            let kinds: Vec<&str> = manifest.layers.iter().map(|layer| layer.media_type.as_str()).collect();
            return Err(FetchError::NoModule(kinds.join(", ")));
        };
        if u64::try_from(layer.size).is_ok_and(|size| size > MAX_MODULE) {
            return Err(FetchError::TooLarge);
        }
        let mut module = Bounded::default();
        // Verifies the layer's digest, which the manifest names, whose digest the reference may name.
        client.pull_blob(&image, layer, &mut module).await.map_err(remote)?;
        Ok(module.bytes)
    }

    fn credentials(&self, host: &str) -> Result<RegistryAuth, FetchError> {
        let Some(path) = &self.credentials else { return Ok(RegistryAuth::Anonymous) };
        read_credentials(path, host).map_err(|why| FetchError::Credentials { path: path.clone(), why })
    }
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
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Login {
    /// Base64 of `user:password`
    auth: String,
    username: String,
    password: String,
    registrytoken: String,
}

fn read_credentials(path: &Path, host: &str) -> Result<RegistryAuth, String> {
    let text = std::fs::read(path).map_err(|error| error.to_string())?;
    let docker: Docker = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
    let Some(login) = docker.auths.get(host).or_else(|| docker.auths.get(&format!("https://{host}"))) else {
        return Ok(RegistryAuth::Anonymous);
    };
    if !login.registrytoken.is_empty() {
        return Ok(RegistryAuth::Bearer(login.registrytoken.clone()));
    }
    if !login.username.is_empty() {
        return Ok(RegistryAuth::Basic(login.username.clone(), login.password.clone()));
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
