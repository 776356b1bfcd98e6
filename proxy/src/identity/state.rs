//! `--state DIR`: key, certificate and trust bundle on disk, so that a restart needs no control plane.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use super::IdentityError;

const KEY: &str = "key.pem";
/// The key of a certificate that is being written: see [`StateDir::save`].
const NEXT_KEY: &str = "key.next.pem";
const CERT: &str = "cert.pem";
const ROOTS: &str = "roots.pem";

/// The directory; mode 0700.
#[derive(Debug, Clone)]
pub struct StateDir(PathBuf);

/// What was found there.
#[derive(Debug)]
pub struct Saved {
    /// Leaf first
    pub chain: Vec<CertificateDer<'static>>,
    /// The key of `chain`, or the candidates in order of likelihood after an interrupted write
    pub keys: Vec<PrivateKeyDer<'static>>,
    /// The trust bundle
    pub roots: Vec<CertificateDer<'static>>,
}

impl StateDir {
    /// Creates the directory where it is missing, and closes it to others (0700).
    ///
    /// # Errors
    /// Those of the file system.
    pub fn open(path: impl Into<PathBuf>) -> io::Result<Self> {
        let path = path.into();
        DirBuilder::new().recursive(true).mode(0o700).create(&path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700))?;
        Ok(Self(path))
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The saved identity; `None` when there is none.
    ///
    /// # Errors
    /// When a file is there but unreadable.
    pub fn load(&self) -> Result<Option<Saved>, IdentityError> {
        if !self.0.join(CERT).exists() {
            return Ok(None);
        }
        let chain = certificates(&self.0.join(CERT))?;
        let roots = certificates(&self.0.join(ROOTS))?;
        let keys: Vec<_> = [KEY, NEXT_KEY].iter().filter_map(|name| private_key(&self.0.join(name)).ok()).collect();
        if keys.is_empty() {
            private_key(&self.0.join(KEY))?;
        }
        Ok(Some(Saved { chain, keys, roots }))
    }

    /// Saves all three. A crash in between leaves either the old pair or the new one: the new key is on disk before its
    /// certificate, under a name that [`load`](Self::load) tries too.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn save(&self, key_pem: &str, chain: &[CertificateDer<'_>], roots: &[CertificateDer<'_>]) -> io::Result<()> {
        self.save_roots(roots)?;
        write_atomic(&self.0.join(NEXT_KEY), key_pem.as_bytes(), 0o600)?;
        write_atomic(&self.0.join(CERT), pem(chain).as_bytes(), 0o644)?;
        fs::rename(self.0.join(NEXT_KEY), self.0.join(KEY))
    }

    /// Saves the trust bundle.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn save_roots(&self, roots: &[CertificateDer<'_>]) -> io::Result<()> {
        write_atomic(&self.0.join(ROOTS), pem(roots).as_bytes(), 0o644)
    }
}

fn pem(certificates: &[CertificateDer<'_>]) -> String {
    certificates.iter().map(|der| pem::encode(&pem::Pem::new("CERTIFICATE", der.to_vec()))).collect()
}

/// Writes beside, syncs, renames: readers see the old file or the new one.
fn write_atomic(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let beside = path.with_extension(format!("tmp{}", std::process::id()));
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&beside)?;
        // `mode` counts at creation only, and a leftover may be there.
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&beside, path)
    })();
    if written.is_err() {
        // Best effort: the error that counts is the first.
        let _gone = fs::remove_file(&beside);
        return written;
    }
    path.parent().map_or(Ok(()), |parent| File::open(parent)?.sync_all())
}

/// Every certificate of a PEM file; at least one.
pub(super) fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let error = |error: String| IdentityError::File { path: path.display().to_string(), error };
    let found: Vec<_> =
        CertificateDer::pem_file_iter(path).and_then(Iterator::collect).map_err(|e| error(e.to_string()))?;
    if found.is_empty() { Err(error("it has no PEM block `CERTIFICATE`".into())) } else { Ok(found) }
}

/// The private key of a PEM file.
pub(super) fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, IdentityError> {
    PrivateKeyDer::from_pem_file(path)
        .map_err(|e| IdentityError::File { path: path.display().to_string(), error: e.to_string() })
}
