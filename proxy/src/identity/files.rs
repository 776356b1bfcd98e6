//! Identity from files (`--cert-file --key-file --ca-file`), reloaded when they change.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use outrigger_core::chain::Bundle;

use super::state::{certificates, private_key};
use super::{Identity, IdentityError, IdentityStore};

/// How often the files are looked at. Polling, since mounts of secrets are swapped in ways that file events miss.
const POLL: Duration = Duration::from_secs(1);

/// The three files, PEM.
#[derive(Debug, Clone)]
pub struct IdentityFiles {
    /// Chain, leaf first
    pub cert: PathBuf,
    /// Private key
    pub key: PathBuf,
    /// Trust bundle
    pub ca: PathBuf,
}

impl IdentityFiles {
    /// Reads them and installs what they say.
    ///
    /// # Errors
    /// When one is unreadable or they do not belong together; the current identity then stays.
    pub fn load(&self, store: &IdentityStore) -> Result<Arc<Identity>, IdentityError> {
        let chain = certificates(&self.cert)?;
        let key = private_key(&self.key)?;
        let bundle = Bundle::new(certificates(&self.ca)?)?;
        store.install(chain, &key, bundle)
    }

    /// The content of all three, to see a change; unreadable files count as empty.
    fn content(&self) -> [Vec<u8>; 3] {
        [&self.cert, &self.key, &self.ca].map(|path| std::fs::read(path).unwrap_or_default())
    }
}

/// Reloads the files whenever they change, for ever. Bad files are reported once and the old identity stays.
pub async fn watch_files(files: IdentityFiles, store: Arc<IdentityStore>) {
    watch_every(files, store, POLL).await;
}

pub(super) async fn watch_every(files: IdentityFiles, store: Arc<IdentityStore>, period: Duration) {
    // Loaded once more at the start: a change since the caller's own load is not lost.
    let mut seen = None;
    loop {
        let content = files.content();
        if seen.as_ref() != Some(&content) {
            match files.load(&store) {
                Ok(identity) => tracing::info!(identity = %identity.spiffe(), "certificate loaded from files"),
                Err(error) => {
                    tracing::warn!(%error, "the changed certificate files are not usable; the last good ones stay in use");
                }
            }
            seen = Some(content);
        }
        tokio::time::sleep(period).await;
    }
}
