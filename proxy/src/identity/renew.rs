//! Obtains a certificate from the control plane, and renews it for as long as the proxy runs.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use outrigger_core::chain::{self, Bundle, Usage};
use outrigger_proto::control::certificates_client::CertificatesClient;
use outrigger_proto::control::{SignRequest, SignResponse};
use rcgen::{CertificateParams, DistinguishedName, KeyPair};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, UnixTime};
use tonic::{Code, Request, Status};

use super::{ControlPlane, Identity, IdentityError, IdentityStore, StateDir};
use crate::tls;

/// How far the control plane sets `notBefore` into the past, for clocks that lag. Not part of a certificate's life.
const BACKDATED: Duration = Duration::from_secs(300);
const CALL: Duration = Duration::from_secs(10);
const BACKOFF: Duration = Duration::from_millis(250);
const MAX_BACKOFF: Duration = Duration::from_secs(30);

/// Who this proxy asks to be.
#[derive(Debug, Clone)]
pub struct Enrolment {
    /// Kubernetes namespace
    pub namespace: String,
    /// Service account
    pub service_account: String,
    /// Name of the workload
    pub workload: String,
    /// Labels that it will register with
    pub labels: BTreeMap<String, String>,
    /// Join token; read again for each use, so that it may be replaced
    pub token_file: Option<PathBuf>,
}

/// Why no certificate was obtained. The current one stays in use.
#[derive(Debug, thiserror::Error)]
pub(super) enum SignError {
    #[error("no certificate and no --token-file: make a join token with `outrigger token create`")]
    NoToken,
    #[error("{0}: {1}; make a join token with `outrigger token create`")]
    TokenFile(String, std::io::Error),
    #[error("the join token has characters that a token never has")]
    BadToken,
    #[error("the control plane refused: {0}")]
    Refused(String),
    #[error("the control plane does not answer: {0}")]
    Unavailable(String),
    #[error("the control plane's answer: {0}")]
    Answer(String),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error("making a key: {0}")]
    Key(#[from] rcgen::Error),
}

/// Installs what `--state` has, if it is still valid and of this workload. Says what it did.
pub(super) fn resume(store: &IdentityStore, state: &StateDir, enrolment: &Enrolment) -> Option<Arc<Identity>> {
    let saved = match state.load() {
        Ok(saved) => saved?,
        Err(error) => {
            tracing::warn!(%error, "the saved identity cannot be read; a new one is needed");
            return None;
        }
    };
    let usable = chain::describe(&saved.chain).and_then(|described| {
        let id = described.identity?;
        let ours = id.namespace() == enrolment.namespace && id.service_account() == enrolment.service_account;
        let now = i64::try_from(UnixTime::now().as_secs()).unwrap_or(i64::MAX);
        Ok((ours, described.not_after > now, id))
    });
    match usable {
        Ok((true, true, _)) => {}
        Ok((ours, _, id)) => {
            let why = if ours { "it has expired" } else { "it is of another service account" };
            tracing::warn!(identity = %id, "the saved identity is not used: {why}");
            return None;
        }
        Err(error) => {
            tracing::warn!(%error, "the saved identity is not used");
            return None;
        }
    }
    let bundle = Bundle::new(saved.roots).unwrap_or_default();
    let mut last = None;
    for key in &saved.keys {
        match store.install(saved.chain.clone(), key, bundle.clone()) {
            Ok(identity) => {
                tracing::info!(identity = %identity.spiffe(), state = %state.path().display(), "started with the saved identity");
                return Some(identity);
            }
            Err(error) => last = Some(error),
        }
    }
    if let Some(error) = last {
        tracing::warn!(%error, "the saved identity is not used");
    }
    None
}

/// Runs for ever: starts from `--state` where it can, obtains a certificate where there is none, renews at half life.
/// Whatever fails is logged and tried again; a certificate in use stays in use.
pub async fn run(store: Arc<IdentityStore>, control: Arc<ControlPlane>, state: Option<StateDir>, enrolment: Enrolment) {
    if let Some(state) = &state {
        resume(&store, state, &enrolment);
    }
    let mut backoff = BACKOFF;
    loop {
        if let Some(identity) = store.current() {
            tokio::time::sleep(until_renewal(&identity, SystemTime::now(), &mut fastrand::Rng::new())).await;
        }
        // A failure to renew waits for the next try with the certificate still valid: that is this inner loop.
        loop {
            match obtain(&store, &control, state.as_ref(), &enrolment).await {
                Ok(identity) => {
                    tracing::info!(identity = %identity.spiffe(), generation = identity.generation(), "certificate obtained");
                    backoff = BACKOFF;
                    break;
                }
                Err(error) => {
                    let valid = store.current().is_some();
                    tracing::warn!(%error, valid, "no new certificate; trying again");
                }
            }
            tokio::time::sleep(backoff.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
            backoff = (backoff * 2).min(MAX_BACKOFF);
        }
    }
}

/// Half of the certificate's life before its end, give or take a tenth of that.
fn until_renewal(identity: &Identity, now: SystemTime, rng: &mut fastrand::Rng) -> Duration {
    let whole = identity.not_after().duration_since(identity.not_before()).unwrap_or_default();
    let life = whole.checked_sub(BACKDATED).filter(|life| !life.is_zero()).unwrap_or(whole);
    let left = identity.not_after().duration_since(now).unwrap_or_default();
    left.saturating_sub(life.mul_f64(0.45 + rng.f64() / 10.0))
}

pub(super) async fn obtain(
    store: &IdentityStore,
    control: &ControlPlane,
    state: Option<&StateDir>,
    enrolment: &Enrolment,
) -> Result<Arc<Identity>, SignError> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    let csr = params.serialize_request(&key)?;
    let request = SignRequest {
        csr_der: csr.der().to_vec().into(),
        namespace: enrolment.namespace.clone(),
        service_account: enrolment.service_account.clone(),
        workload: enrolment.workload.clone(),
        labels: enrolment.labels.clone(),
    };
    let response = ask(store, control, enrolment, request).await?;
    install(store, state, enrolment, &key, response)
}

/// With the current certificate where there is one; where that is refused or there is none, with the token.
async fn ask(
    store: &IdentityStore,
    control: &ControlPlane,
    enrolment: &Enrolment,
    request: SignRequest,
) -> Result<SignResponse, SignError> {
    if store.current().is_some() {
        match call(control, Request::new(request.clone())).await {
            Err(SignError::Refused(why)) if enrolment.token_file.is_some() => {
                tracing::warn!(why, "the renewal was refused; trying the join token");
            }
            other => return other,
        }
    }
    let path = enrolment.token_file.as_ref().ok_or(SignError::NoToken)?;
    let token = tokio::fs::read_to_string(path)
        .await
        .map_err(|error| SignError::TokenFile(path.display().to_string(), error))?;
    let bearer = format!("Bearer {}", token.trim()).parse().map_err(|_| SignError::BadToken)?;
    let mut request = Request::new(request);
    request.metadata_mut().insert("authorization", bearer);
    call(control, request).await
}

async fn call(control: &ControlPlane, request: Request<SignRequest>) -> Result<SignResponse, SignError> {
    let mut client = CertificatesClient::new(control.channel());
    match tokio::time::timeout(CALL, client.sign(request)).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(refusal(&status)),
        Err(_) => Err(SignError::Unavailable(format!("no answer within {CALL:?}"))),
    }
}

fn refusal(status: &Status) -> SignError {
    match status.code() {
        Code::PermissionDenied | Code::Unauthenticated | Code::InvalidArgument => {
            SignError::Refused(status.message().to_owned())
        }
        _ => {
            // tonic's message is "transport error"; the reason is at the end of the chain of sources.
            let mut text = status.message().to_owned();
            let mut source = std::error::Error::source(status);
            while let Some(error) = source {
                text = error.to_string();
                source = error.source();
            }
            SignError::Unavailable(text)
        }
    }
}

fn install(
    store: &IdentityStore,
    state: Option<&StateDir>,
    enrolment: &Enrolment,
    key: &KeyPair,
    response: SignResponse,
) -> Result<Arc<Identity>, SignError> {
    let der = |bytes: Vec<bytes::Bytes>| bytes.into_iter().map(|der| CertificateDer::from(der.to_vec()));
    let answer = |error: chain::ChainError| SignError::Answer(error.to_string());
    let chain: Vec<_> = der(response.chain).collect();
    let bundle = Bundle::new(der(response.roots)).map_err(answer)?;
    let algorithms = tls::provider().signature_verification_algorithms.all;
    let id = chain::verify(&chain, &bundle, Usage::Server, algorithms, UnixTime::now()).map_err(answer)?.identity;
    if id.namespace() != enrolment.namespace || id.service_account() != enrolment.service_account {
        return Err(SignError::Answer(format!("a certificate of {id}, which was not asked for")));
    }
    let private = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    if let Some(state) = state
        && let Err(error) = state.save(&key.serialize_pem(), &chain, bundle.roots())
    {
        tracing::warn!(%error, state = %state.path().display(), "the certificate could not be saved; a restart will need the control plane");
    }
    Ok(store.install(chain, &private, bundle)?)
}
