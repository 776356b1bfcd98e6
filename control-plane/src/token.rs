//! Join tokens: who may ask for a first certificate, and for which identity.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use ipnet::IpNet;
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use outrigger_core::spiffe::SpiffeId;
use serde::{Deserialize, Serialize};

use crate::durable;

/// The unscoped token, written at the first start.
pub const BOOTSTRAP: &str = "join-token";
const KEY: &str = "token-key";
const SPENT: &str = "spent-tokens.json";
/// Thirty days: longer-lived credentials belong in certificates, which renew.
const MAX_TTL_SECONDS: u64 = 30 * 86_400;
/// The control plane's own identity, which no token opens.
pub const CONTROL: (&str, &str) = ("outrigger-system", "outrigger-control");
const NEW: &str = "make another with `outrigger token create`";

/// What a join token says. Signed, not secret: its holder may read it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Claims {
    jti: String,
    /// Seconds since the Unix epoch; the unscoped token has none.
    exp: Option<i64>,
    /// None: the unscoped token.
    scope: Option<Scope>,
    #[serde(default)]
    single_use: bool,
}

/// What a token is good for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scope {
    /// Kubernetes namespace
    pub namespace: String,
    /// Service account
    pub service_account: String,
    /// Labels that a holder may register with; the value `*` permits any
    pub labels: BTreeMap<String, String>,
    /// Addresses that a holder may register; none: any
    pub addresses: Vec<IpNet>,
}

/// Body of `POST /api/v1/tokens`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NewToken {
    /// Kubernetes namespace
    pub namespace: String,
    /// Service account
    pub service_account: String,
    /// Labels that a holder may register with; the value `*` permits any
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// How long it is accepted
    pub ttl_seconds: u64,
    /// Accepted once
    #[serde(default)]
    pub single_use: bool,
    /// IP addresses or CIDR blocks that a holder may register; none: any
    #[serde(default)]
    pub addresses: Vec<String>,
}

/// Why a token is not made or not accepted. Every message has its remedy.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The body of a request for one
    #[error("{field}: {error}")]
    Invalid {
        /// The field
        field: &'static str,
        /// What is wrong with it
        error: String,
    },
    /// Not one of ours
    #[error("the join token is not one of this control plane, or was altered: {NEW}")]
    Forged,
    /// Too old
    #[error("the join token has expired: {NEW}")]
    Expired,
    /// A second use
    #[error("the join token is for a single use and was used: {NEW}")]
    Spent,
    /// `--no-bootstrap-token`
    #[error("the unscoped join token is switched off (--no-bootstrap-token): {NEW}")]
    BootstrapOff,
    /// The state directory
    #[error("{path}: {error}")]
    File {
        /// The file
        path: String,
        /// What is wrong with it
        error: String,
    },
    /// Signing
    #[error("signing the token: {0}")]
    Sign(#[from] jsonwebtoken::errors::Error),
}

/// A token that was accepted. To be [spent](Tokens::spend) before anything is signed for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accepted {
    claims: Claims,
}

impl Accepted {
    /// What it is good for; `None`: anything but the control plane's identity.
    pub fn scope(&self) -> Option<&Scope> {
        self.claims.scope.as_ref()
    }
}

impl Scope {
    /// The first label, if any, that it does not permit.
    pub fn label_outside<'a>(&self, labels: &'a BTreeMap<String, String>) -> Option<(&'a str, &'a str)> {
        outside(&self.labels, labels)
    }
}

/// The first of `labels` that `permitted` does not have with that value, or with `*`.
pub(crate) fn outside<'a>(
    permitted: &BTreeMap<String, String>,
    labels: &'a BTreeMap<String, String>,
) -> Option<(&'a str, &'a str)> {
    labels
        .iter()
        .find(|(name, value)| permitted.get(*name).is_none_or(|allowed| allowed != "*" && allowed != *value))
        .map(|(name, value)| (name.as_str(), value.as_str()))
}

/// Makes and judges join tokens.
pub struct Tokens {
    encoding: EncodingKey,
    decoding: DecodingKey,
    bootstrap: bool,
    state: PathBuf,
    /// jti of used single-use tokens → their `exp`.
    spent: Mutex<HashMap<String, i64>>,
}

impl std::fmt::Debug for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokens").field("bootstrap", &self.bootstrap).finish_non_exhaustive()
    }
}

impl Tokens {
    /// With the key of the state directory, made at the first start. With `bootstrap` the unscoped token is written
    /// there too; without it, it is refused and removed.
    ///
    /// # Errors
    /// Those of the files.
    pub fn open(state: &Path, bootstrap: bool) -> Result<Self, TokenError> {
        durable::directory(state).map_err(|e| file(state, e))?;
        let secret = secret(&state.join(KEY))?;
        let spent_path = state.join(SPENT);
        let spent = match std::fs::read(&spent_path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| file(&spent_path, e))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => HashMap::new(),
            Err(error) => return Err(file(&spent_path, error)),
        };
        let tokens = Self {
            encoding: EncodingKey::from_secret(&secret),
            decoding: DecodingKey::from_secret(&secret),
            bootstrap,
            state: state.to_owned(),
            spent: Mutex::new(spent),
        };
        let path = state.join(BOOTSTRAP);
        if bootstrap && !path.exists() {
            let claims = Claims { jti: random_id()?, exp: None, scope: None, single_use: false };
            durable::write(&path, tokens.encode(&claims)?.as_bytes(), 0o600).map_err(|e| file(&path, e))?;
        } else if !bootstrap
            && let Err(error) = std::fs::remove_file(&path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            return Err(file(&path, error));
        }
        Ok(tokens)
    }

    /// Makes a token. `now` in seconds since the Unix epoch.
    ///
    /// # Errors
    /// [`TokenError::Invalid`] names the field.
    pub fn create(&self, new: &NewToken, now: i64) -> Result<String, TokenError> {
        let invalid = |field, error: String| TokenError::Invalid { field, error };
        if SpiffeId::new("td", &new.namespace, "account").is_err() {
            return Err(invalid("namespace", format!("`{}` is not a namespace's name", new.namespace)));
        }
        if SpiffeId::new("td", "namespace", &new.service_account).is_err() {
            return Err(invalid(
                "serviceAccount",
                format!("`{}` is not a service account's name", new.service_account),
            ));
        }
        if (new.namespace.as_str(), new.service_account.as_str()) == CONTROL {
            return Err(invalid("serviceAccount", "this identity is the control plane's own".into()));
        }
        if new.ttl_seconds == 0 || new.ttl_seconds > MAX_TTL_SECONDS {
            return Err(invalid("ttlSeconds", format!("must be from 1 to {MAX_TTL_SECONDS} (30 days)")));
        }
        let addresses = new
            .addresses
            .iter()
            .map(|text| {
                let net = text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
                net.map_err(|_| invalid("addresses", format!("`{text}` is not an IP address or CIDR block")))
            })
            .collect::<Result<_, _>>()?;
        self.encode(&Claims {
            jti: random_id()?,
            exp: Some(now.saturating_add(i64::try_from(new.ttl_seconds).unwrap_or(i64::MAX))),
            scope: Some(Scope {
                namespace: new.namespace.clone(),
                service_account: new.service_account.clone(),
                labels: new.labels.clone(),
                addresses,
            }),
            single_use: new.single_use,
        })
    }

    /// Judges a token at `now` (seconds since the Unix epoch). Spends nothing.
    ///
    /// # Errors
    /// Why it is not accepted.
    pub fn accept(&self, token: &str, now: i64) -> Result<Accepted, TokenError> {
        let mut validation = Validation::new(Algorithm::HS256);
        // The unscoped one has no `exp`, and the clock is an argument here: judged below.
        validation.required_spec_claims.clear();
        validation.validate_exp = false;
        validation.validate_aud = false;
        let claims =
            jsonwebtoken::decode::<Claims>(token, &self.decoding, &validation).map_err(|_| TokenError::Forged)?.claims;
        match (&claims.scope, claims.exp) {
            (None, None) if !self.bootstrap => return Err(TokenError::BootstrapOff),
            (None, None) => {}
            (Some(_), Some(exp)) if exp <= now => return Err(TokenError::Expired),
            (Some(_), Some(_)) => {}
            (Some(_), None) | (None, Some(_)) => return Err(TokenError::Forged),
        }
        if claims.single_use && self.lock().contains_key(&claims.jti) {
            return Err(TokenError::Spent);
        }
        Ok(Accepted { claims })
    }

    /// Marks a single-use token as used, on disk before this returns. Blocks on the file system.
    ///
    /// # Errors
    /// [`TokenError::Spent`] when another call was first; those of the file, and then it is not spent.
    pub fn spend(&self, accepted: &Accepted, now: i64) -> Result<(), TokenError> {
        if !accepted.claims.single_use {
            return Ok(());
        }
        let mut spent = self.lock();
        if spent.contains_key(&accepted.claims.jti) {
            return Err(TokenError::Spent);
        }
        // Those that have expired are refused for that.
        spent.retain(|_, exp| *exp > now);
        spent.insert(accepted.claims.jti.clone(), accepted.claims.exp.unwrap_or(i64::MAX));
        let path = self.state.join(SPENT);
        let written = serde_json::to_vec(&*spent)
            .map_err(std::io::Error::from)
            .and_then(|bytes| durable::write(&path, &bytes, 0o600));
        written.map_err(|error| {
            spent.remove(&accepted.claims.jti);
            file(&path, error)
        })
    }

    fn encode(&self, claims: &Claims) -> Result<String, TokenError> {
        Ok(jsonwebtoken::encode(&Header::new(Algorithm::HS256), claims, &self.encoding)?)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, i64>> {
        self.spent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn file(path: &Path, error: impl std::fmt::Display) -> TokenError {
    TokenError::File { path: path.display().to_string(), error: error.to_string() }
}

/// 256 bits in a file of mode 0600, made where there is none.
fn secret(path: &Path) -> Result<Vec<u8>, TokenError> {
    match std::fs::read_to_string(path) {
        Ok(text) => match hex::decode(text.trim()) {
            Ok(bytes) if bytes.len() == 32 => Ok(bytes),
            _ => Err(file(path, "not a key of 64 hexadecimal digits: remove it, and every join token ends")),
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let mut bytes = vec![0; 32];
            aws_lc_rs::rand::fill(&mut bytes).map_err(|_| file(path, "no randomness"))?;
            durable::write(path, hex::encode(&bytes).as_bytes(), 0o600).map_err(|e| file(path, e))?;
            Ok(bytes)
        }
        Err(error) => Err(file(path, error)),
    }
}

fn random_id() -> Result<String, TokenError> {
    let mut bytes = [0_u8; 16];
    aws_lc_rs::rand::fill(&mut bytes)
        .map_err(|_| TokenError::Invalid { field: "jti", error: "no randomness".into() })?;
    Ok(hex::encode(bytes))
}
