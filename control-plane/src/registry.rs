//! Registration over gRPC: a workload is registered by its own certificate only.

use std::sync::Arc;
use std::time::{Duration, Instant};

use outrigger_core::resource::Registration;
use outrigger_proto::control::registry_server::Registry;
use outrigger_proto::control::{RegisterRequest, RegisterResponse, WithdrawRequest, WithdrawResponse};
use tonic::{Request, Response, Status};

use crate::mesh::Mesh;
use crate::peer::{Leaf, Peer};
use crate::proxies::Proxies;
use crate::refusals::Refusals;
use crate::reports::Reports;

/// A withdrawal waits so long for those that use the endpoints.
const CONFIRM: Duration = Duration::from_secs(2);

/// What a certificate's holder was granted when it was signed.
pub trait Grants: Send + Sync + 'static {
    /// Whether the holder of this certificate may register so, from `peer`.
    ///
    /// # Errors
    /// A sentence that says what is not permitted, and the remedy.
    fn permits(&self, leaf: &Leaf, peer: &Peer, registration: &Registration) -> Result<(), String>;

    /// Whether the holder may withdraw this workload of its namespace.
    ///
    /// # Errors
    /// As [`Grants::permits`].
    fn permits_withdrawal(&self, leaf: &Leaf, workload: &str) -> Result<(), String>;
}

/// The registration service.
pub struct Service {
    /// Leases and what is compiled from them
    pub mesh: Arc<Mesh>,
    /// Who must acknowledge
    pub proxies: Arc<Proxies>,
    /// What was refused
    pub refusals: Arc<Refusals>,
    /// Who may register what
    pub grants: Arc<dyn Grants>,
    /// How its filters do
    pub reports: Arc<Reports>,
}

impl std::fmt::Debug for Service {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Service").finish_non_exhaustive()
    }
}

impl Service {
    fn leaf<T>(&self, call: &'static str, request: &Request<T>) -> Result<(Peer, Leaf), Status> {
        let peer = Peer::of(request)?;
        match peer.leaf(self.mesh.trust_domain()) {
            Ok(leaf) => Ok((peer, leaf)),
            Err(status) => {
                self.refusals.record(call, &peer.address.to_string(), status.message());
                Err(status)
            }
        }
    }

    fn deny(&self, call: &'static str, leaf: &Leaf, reason: String) -> Status {
        self.refusals.record(call, &leaf.identity.to_string(), &reason);
        Status::permission_denied(reason)
    }
}

/// Whether a certificate is that of the namespace and account.
fn same_identity(leaf: &Leaf, namespace: &str, service_account: &str) -> Result<(), String> {
    let identity = &leaf.identity;
    if identity.namespace() == namespace && identity.service_account() == service_account {
        return Ok(());
    }
    Err(format!("the certificate is {identity}; it cannot act for account {service_account} of namespace {namespace}"))
}

#[tonic::async_trait]
impl Registry for Service {
    async fn register(&self, request: Request<RegisterRequest>) -> Result<Response<RegisterResponse>, Status> {
        let (peer, leaf) = self.leaf("register", &request)?;
        let registration = Registration::try_from(request.get_ref()).map_err(|error| {
            self.refusals.record("register", &leaf.identity.to_string(), &error.to_string());
            Status::invalid_argument(error.to_string())
        })?;
        let name = (registration.namespace.clone(), registration.name.clone());
        same_identity(&leaf, &registration.namespace, &registration.service_account)
            .and_then(|()| self.grants.permits(&leaf, &peer, &registration))
            .map_err(|reason| self.deny("register", &leaf, reason))?;
        let (changed, lease) = {
            let mut leases = self.mesh.leases();
            let other = leases.get(&name).map(|held| held.service_account.clone());
            if let Some(other) = other.filter(|account| *account != registration.service_account) {
                let reason = format!("workload {} of {} is registered by account {other}", name.1, name.0);
                return Err(self.deny("register", &leaf, reason));
            }
            (leases.register(registration, Instant::now()), leases.lease())
        };
        self.reports.take(name.clone(), request.into_inner().filters, Instant::now());
        if changed {
            tracing::info!(namespace = %name.0, workload = %name.1, peer = %peer.address, "registered");
            self.mesh.registrations_changed();
        }
        let lease_ms = u64::try_from(lease.as_millis()).unwrap_or(u64::MAX);
        Ok(Response::new(RegisterResponse { lease_ms }))
    }

    async fn withdraw(&self, request: Request<WithdrawRequest>) -> Result<Response<WithdrawResponse>, Status> {
        let (_, leaf) = self.leaf("withdraw", &request)?;
        let WithdrawRequest { namespace, workload } = request.into_inner();
        let name = (namespace, workload);
        let account = self.mesh.leases().get(&name).map(|held| held.service_account.clone());
        // Of what is not registered only the namespace can be compared.
        let account = account.unwrap_or_else(|| leaf.identity.service_account().to_owned());
        same_identity(&leaf, &name.0, &account)
            .and_then(|()| self.grants.permits_withdrawal(&leaf, &name.1))
            .map_err(|reason| self.deny("withdraw", &leaf, reason))?;
        let before = self.mesh.now();
        if !self.mesh.leases().withdraw(&name) {
            return Ok(Response::new(WithdrawResponse { confirmed: true }));
        }
        tracing::info!(namespace = %name.0, workload = %name.1, "withdrawn");
        let changed = self.mesh.withdrawn(before, name).await;
        let confirmed = self.proxies.confirmed(&changed, CONFIRM).await;
        Ok(Response::new(WithdrawResponse { confirmed }))
    }
}
