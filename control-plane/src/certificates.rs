//! The gRPC service that signs workload certificates, for the identity that it derives from the caller.

use std::sync::Arc;
use std::time::SystemTime;

use outrigger_core::spiffe::SpiffeId;
use outrigger_proto::control::certificates_server::Certificates;
use outrigger_proto::control::{SignRequest, SignResponse};
use rustls_pki_types::CertificateDer;
use serde_json::json;
use tonic::{Request, Response, Status};

use crate::ca::{Authority, CaError, ProvenKey};
use crate::grants::{Grant, Grants};
use crate::metrics::Metrics;
use crate::peer::Peer;
use crate::refusals::Refusals;
use crate::token::{Accepted, CONTROL, NewToken, TokenError, Tokens};

/// Bytes of a CSR; one for P-256 has a few hundred.
const MAX_CSR: usize = 16 * 1024;

/// Seconds since the Unix epoch.
pub fn unix_now() -> i64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
}

/// `Certificates` of `control.proto`.
#[derive(Debug, Clone)]
pub struct Signer {
    /// Signs
    pub authority: Arc<Authority>,
    /// Judges join tokens
    pub tokens: Arc<Tokens>,
    /// Remembers what was granted with each certificate
    pub grants: Arc<Grants>,
    /// Shows what was refused
    pub refusals: Arc<Refusals>,
    /// Counts signatures
    pub metrics: Metrics,
}

/// By what a caller is known, and what that permits.
enum Credential {
    Token(Accepted),
    /// The grant of its current certificate.
    Certificate(Grant),
}

#[tonic::async_trait]
impl Certificates for Signer {
    async fn sign(&self, request: Request<SignRequest>) -> Result<Response<SignResponse>, Status> {
        let peer = Peer::of(&request)?;
        let caller = match peer.leaf(self.authority.trust_domain()) {
            Ok(leaf) => leaf.identity.to_string(),
            Err(_) => peer.address.to_string(),
        };
        let asked = {
            let asked = request.get_ref();
            format!("{caller} asking for {}/{} workload {}", asked.namespace, asked.service_account, asked.workload)
        };
        self.decide(&peer, request).await.map(Response::new).inspect_err(|status| {
            self.refusals.record("sign", &asked, status.message());
        })
    }
}

impl Signer {
    async fn decide(&self, peer: &Peer, request: Request<SignRequest>) -> Result<SignResponse, Status> {
        let now = unix_now();
        let credential = self.credential(peer, &request, now)?;
        let request = request.into_inner();
        let identity = self.permitted(&credential, &request)?;
        if request.csr_der.len() > MAX_CSR {
            return Err(Status::invalid_argument(format!("the CSR exceeds {MAX_CSR} bytes")));
        }
        let key = ProvenKey::of_csr(&request.csr_der).map_err(refuse_ca)?;
        let (labels, addresses) = match credential {
            Credential::Token(accepted) => {
                let scope = accepted.scope().cloned();
                let tokens = Arc::clone(&self.tokens);
                // Last of all checks, and before anything is signed: two calls with one token cannot both pass.
                tokio::task::spawn_blocking(move || tokens.spend(&accepted, now))
                    .await
                    .map_err(|_| Status::internal("the token could not be marked as used"))?
                    .map_err(|error| refuse_token(&error))?;
                scope.map_or((None, Vec::new()), |scope| (Some(scope.labels), scope.addresses))
            }
            Credential::Certificate(grant) => (grant.labels, grant.addresses),
        };
        let signed = self.authority.sign(&key, &identity, SystemTime::now()).map_err(refuse_ca)?;
        let grant = Grant {
            identity: identity.to_string(),
            namespace: request.namespace,
            service_account: request.service_account,
            workload: request.workload,
            labels,
            addresses,
            not_after: signed.not_after,
        };
        self.grants
            .add(&signed.key, grant, now)
            .await
            .map_err(|e| Status::internal(format!("the grant could not be persisted in the state directory: {e}")))?;
        self.metrics.signatures.inc();
        tracing::info!(identity = %identity, not_after = signed.not_after, "signed a certificate");
        Ok(SignResponse {
            chain: signed.chain.iter().map(|der| der.to_vec().into()).collect(),
            roots: self.authority.bundle().roots().iter().map(|der| der.to_vec().into()).collect(),
            identity: identity.to_string(),
            not_before: signed.not_before,
            not_after: signed.not_after,
        })
    }

    /// A join token where one is shown, else the client certificate.
    fn credential(&self, peer: &Peer, request: &Request<SignRequest>, now: i64) -> Result<Credential, Status> {
        if let Some(value) = request.metadata().get("authorization") {
            let token = value.to_str().ok().and_then(|text| text.split_once(' ')).and_then(|(scheme, token)| {
                scheme.eq_ignore_ascii_case("bearer").then(|| token.trim()).filter(|token| !token.is_empty())
            });
            let token = token
                .ok_or_else(|| Status::unauthenticated("the authorization metadata is not `Bearer <join token>`"))?;
            return self.tokens.accept(token, now).map(Credential::Token).map_err(|error| refuse_token(&error));
        }
        if peer.chain.is_none() && peer.rejected.is_none() {
            return Err(Status::unauthenticated(
                "neither a join token nor a client certificate was shown: make a token with `outrigger token create`",
            ));
        }
        let leaf = peer.leaf(self.authority.trust_domain())?;
        let grant = self.grants.get(&leaf.key, now).map_err(|why| Status::permission_denied(why.to_string()))?;
        if grant.identity != leaf.identity.as_str() {
            return Err(Status::permission_denied("the certificate is not the one that was granted to its key"));
        }
        Ok(Credential::Certificate(grant))
    }

    /// The identity to sign, when the credential permits what was asked.
    fn permitted(&self, credential: &Credential, asked: &SignRequest) -> Result<SpiffeId, Status> {
        let (namespace, account) = (asked.namespace.as_str(), asked.service_account.as_str());
        match credential {
            Credential::Certificate(grant) => grant
                .permits(namespace, account, &asked.workload, &asked.labels)
                .map_err(|why| Status::permission_denied(why.to_string()))?,
            Credential::Token(accepted) => {
                if let Some(scope) = accepted.scope() {
                    if (namespace, account) != (scope.namespace.as_str(), scope.service_account.as_str()) {
                        let (ns, sa) = (&scope.namespace, &scope.service_account);
                        return Err(Status::permission_denied(format!(
                            "the join token is for {ns}/{sa}, not {namespace}/{account}: make one for that with `outrigger token create`"
                        )));
                    }
                    if let Some((name, value)) = scope.label_outside(&asked.labels) {
                        return Err(Status::permission_denied(format!(
                            "the join token does not permit label {name}={value}: make one with `outrigger token create --labels`"
                        )));
                    }
                }
            }
        }
        if (namespace, account) == CONTROL {
            return Err(Status::permission_denied("this identity is the control plane's own: choose another"));
        }
        let workload_ok = asked.workload.len() <= 253 && !asked.workload.contains(|c: char| c == '/' || c.is_control());
        if asked.workload.is_empty() || !workload_ok {
            return Err(Status::invalid_argument("workload: a name of 1 to 253 characters without `/` is needed"));
        }
        SpiffeId::new(self.authority.trust_domain(), namespace, account)
            .map_err(|error| Status::invalid_argument(error.to_string()))
    }
}

impl crate::api::Authority for Signer {
    fn certificates(&self) -> serde_json::Value {
        let hex = |der: &CertificateDer<'_>| outrigger_core::chain::Fingerprint::of(der).to_string();
        let roots = self.authority.bundle().roots().iter().map(|root| {
            let not_after = outrigger_core::chain::describe(std::slice::from_ref(root)).map(|d| d.not_after).ok();
            json!({"sha256": hex(root), "notAfter": not_after})
        });
        let workloads = self.grants.list().into_iter().map(|(key, grant)| {
            json!({
                "identity": grant.identity,
                "workload": format!("{}/{}", grant.namespace, grant.workload),
                "keySha256": key,
                "notAfter": grant.not_after,
            })
        });
        json!({
            "trustDomain": self.authority.trust_domain(),
            "lifetimeSeconds": self.authority.lifetime().as_secs(),
            "roots": roots.collect::<Vec<_>>(),
            "certificates": workloads.collect::<Vec<_>>(),
        })
    }

    fn create_token(&self, request: serde_json::Value) -> Result<serde_json::Value, String> {
        let new: NewToken = serde_json::from_value(request).map_err(|e| format!("the body: {e}"))?;
        let token = self.tokens.create(&new, unix_now()).map_err(|e| e.to_string())?;
        tracing::info!(namespace = new.namespace, service_account = new.service_account, "made a join token");
        Ok(json!({"token": token}))
    }
}

fn refuse_token(error: &TokenError) -> Status {
    match error {
        TokenError::File { .. } | TokenError::Sign(_) => Status::internal(error.to_string()),
        _ => Status::unauthenticated(error.to_string()),
    }
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn refuse_ca(error: CaError) -> Status {
    match error {
        CaError::Csr(_) => Status::invalid_argument(error.to_string()),
        _ => Status::internal(error.to_string()),
    }
}

#[cfg(test)]
#[path = "certificates_tests.rs"]
mod tests;
