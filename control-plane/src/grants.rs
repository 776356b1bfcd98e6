//! What each certificate's holder may register: kept by public key, since a certificate says only who it is.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use ipnet::IpNet;
use outrigger_core::chain::Fingerprint;
use outrigger_core::resource::{Dial, Registration};
use serde::{Deserialize, Serialize};

use crate::certificates::unix_now;
use crate::durable::Log;
use crate::peer::{Leaf, Peer};
use crate::token::outside;

const FILE: &str = "grants.jsonl";

/// What was granted with a certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// SPIFFE ID
    pub identity: String,
    /// Kubernetes namespace
    pub namespace: String,
    /// Service account
    pub service_account: String,
    /// Name of the workload
    pub workload: String,
    /// Labels that it may register with (`*`: any value); `None`: any, from the unscoped token
    pub labels: Option<BTreeMap<String, String>>,
    /// Addresses that it may register; none: any
    pub addresses: Vec<IpNet>,
    /// End of the certificate, seconds since the Unix epoch
    pub not_after: i64,
}

/// Why a registration or renewal is not what was granted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// No grant
    #[error(
        "nothing was granted to this certificate's key (another control plane's, or its state was lost): join again with a token"
    )]
    Unknown,
    /// Expired
    #[error("the certificate of this grant has expired: join again with a token")]
    Expired,
    /// Another identity
    #[error(
        "the certificate is of {identity}, not of {namespace}/{service_account}: join as that with a token of its own"
    )]
    Identity {
        /// Who it is
        identity: String,
        /// What was asked
        namespace: String,
        /// What was asked
        service_account: String,
    },
    /// Another workload
    #[error(
        "the certificate was granted to workload {granted}, not {asked}: one proxy is one workload, join `{asked}` with a token of its own"
    )]
    Workload {
        /// Whose it is
        granted: String,
        /// What was asked
        asked: String,
    },
    /// A label
    #[error("label {name}={value} was not granted: make a join token with it (`outrigger token create --labels`)")]
    Label {
        /// Name
        name: String,
        /// Value
        value: String,
    },
    /// An address
    #[error("address {0} was not granted: make a join token that permits it")]
    Address(IpAddr),
}

impl Grant {
    /// Whether this permits that.
    ///
    /// # Errors
    /// What is outside.
    pub fn permits(
        &self,
        namespace: &str,
        service_account: &str,
        workload: &str,
        labels: &BTreeMap<String, String>,
    ) -> Result<(), Refused> {
        if (namespace, service_account) != (self.namespace.as_str(), self.service_account.as_str()) {
            return Err(Refused::Identity {
                identity: self.identity.clone(),
                namespace: namespace.to_owned(),
                service_account: service_account.to_owned(),
            });
        }
        if workload != self.workload {
            return Err(Refused::Workload { granted: self.workload.clone(), asked: workload.to_owned() });
        }
        match self.labels.as_ref().and_then(|permitted| outside(permitted, labels)) {
            Some((name, value)) => Err(Refused::Label { name: name.to_owned(), value: value.to_owned() }),
            None => Ok(()),
        }
    }
}

/// Every grant whose certificate is alive, in memory and in `STATE/grants.jsonl`.
#[derive(Debug)]
pub struct Grants {
    live: Mutex<Live>,
    /// Held while writing
    written: tokio::sync::Mutex<Written>,
}

/// What is on disk.
#[derive(Debug)]
struct Written {
    /// Number of the newest change that is there
    change: u64,
    /// `None` only while it is written, or after that failed in a way that lost it
    log: Option<Log>,
    path: PathBuf,
}

/// A line of the file: fingerprint in hexadecimal, and grant.
type Line = (String, Grant);

#[derive(Debug, Default)]
struct Live {
    /// By fingerprint in hexadecimal, as in the file.
    grants: HashMap<String, Grant>,
    changes: u64,
    unsaved: Vec<Line>,
}

impl Grants {
    /// Those of the state directory.
    ///
    /// # Errors
    /// When the file is there but cannot be read.
    pub fn open(state: &Path) -> std::io::Result<Self> {
        let path = state.join(FILE);
        let (log, lines) = Log::open::<Line>(path.clone())?;
        let live = Live { grants: lines.into_iter().collect(), ..Live::default() };
        let written = Written { change: 0, log: Some(log), path };
        Ok(Self { live: Mutex::new(live), written: tokio::sync::Mutex::new(written) })
    }

    /// The grant of a key.
    ///
    /// # Errors
    /// [`Refused::Unknown`], [`Refused::Expired`].
    pub fn get(&self, key: &Fingerprint, now: i64) -> Result<Grant, Refused> {
        match self.lock().grants.get(&key.to_string()) {
            None => Err(Refused::Unknown),
            Some(grant) if grant.not_after < now => Err(Refused::Expired),
            Some(grant) => Ok(grant.clone()),
        }
    }

    /// Whether the holder of a key may register this, at `now` (seconds since the Unix epoch).
    ///
    /// # Errors
    /// What is not granted.
    #[expect(clippy::too_many_arguments, reason = "a registration has this many parts")]
    pub fn check(
        &self,
        key: &Fingerprint,
        namespace: &str,
        service_account: &str,
        workload: &str,
        labels: &BTreeMap<String, String>,
        address: Option<IpAddr>,
        now: i64,
    ) -> Result<(), Refused> {
        let grant = self.get(key, now)?;
        grant.permits(namespace, service_account, workload, labels)?;
        match address {
            Some(address)
                if !grant.addresses.is_empty() && !grant.addresses.iter().any(|net| net.contains(&address)) =>
            {
                Err(Refused::Address(address))
            }
            _ => Ok(()),
        }
    }

    /// Every grant by its key's fingerprint, sorted by identity and workload.
    pub fn list(&self) -> Vec<(String, Grant)> {
        let mut list: Vec<_> = self.lock().grants.iter().map(|(key, grant)| (key.clone(), grant.clone())).collect();
        list.sort_by(|(a, x), (b, y)| (&x.identity, &x.workload, a).cmp(&(&y.identity, &y.workload, b)));
        list
    }

    /// Adds a grant; on disk when this returns. Others that arrive while one is written share the next write.
    ///
    /// # Errors
    /// Those of the file; the grant is then valid until the next start.
    pub async fn add(&self, key: &Fingerprint, grant: Grant, now: i64) -> std::io::Result<()> {
        let change = {
            let mut live = self.lock();
            live.grants.insert(key.to_string(), grant.clone());
            live.unsaved.push((key.to_string(), grant));
            live.changes += 1;
            live.changes
        };
        let mut written = self.written.lock().await;
        if written.change >= change {
            return Ok(());
        }
        let (lines, all, newest) = {
            let mut live = self.lock();
            let lines = std::mem::take(&mut live.unsaved);
            // Those that expired are forgotten when the file is written anew.
            let anew = written.log.as_ref().is_none_or(|log| log.grows(lines.len(), live.grants.len()));
            if anew {
                live.grants.retain(|_, grant| grant.not_after >= now);
            }
            let all: Vec<Line> = if anew { live.grants.clone().into_iter().collect() } else { Vec::new() };
            (lines, all, live.changes)
        };
        let (log, path) = (written.log.take(), written.path.clone());
        let work = move || -> std::io::Result<Log> {
            let mut log = log.unwrap_or_else(|| Log::anew(path));
            log.append(&lines, &all)?;
            Ok(log)
        };
        written.log = Some(tokio::task::spawn_blocking(work).await.map_err(std::io::Error::other)??);
        written.change = newest;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl crate::registry::Grants for Grants {
    fn permits(&self, leaf: &Leaf, _: &Peer, registration: &Registration) -> Result<(), String> {
        let address = Some(match registration.dial {
            Dial::Application(address) => address,
            Dial::Inbound(address) => address.ip(),
        });
        let (key, now) = (leaf.key, unix_now());
        let (namespace, account, name) = (&registration.namespace, &registration.service_account, &registration.name);
        self.check(&key, namespace, account, name, &registration.labels, address, now).map_err(|why| why.to_string())
    }

    fn permits_withdrawal(&self, leaf: &Leaf, workload: &str) -> Result<(), String> {
        let grant = self.get(&leaf.key, unix_now()).map_err(|why| why.to_string())?;
        grant
            .permits(leaf.identity.namespace(), leaf.identity.service_account(), workload, &BTreeMap::new())
            .map_err(|why| why.to_string())
    }
}
