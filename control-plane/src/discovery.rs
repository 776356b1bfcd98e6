//! The delta stream over gRPC: drives one [`delta::Stream`](crate::delta::Stream) per proxy.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use outrigger_core::compile::{Client, Found};
use outrigger_core::key::Key;
use outrigger_proto::discovery::aggregated_discovery_service_server::AggregatedDiscoveryService;
use outrigger_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use prost::Message;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::delta::{Answers, Refused};
use crate::mesh::{Mesh, Published};
use crate::metrics::Metrics;
use crate::peer::{Leaf, Peer};
use crate::proxies::{Connected, Proxies};
use crate::refusals::Refusals;
use crate::run::told;

/// A stream says who it is within this time.
const FIRST_REQUEST: Duration = Duration::from_secs(10);
/// Responses that wait for the connection to take them.
const QUEUE: usize = 16;

/// The discovery service.
#[derive(Debug, Clone)]
pub struct Discovery {
    /// What the mesh says
    pub mesh: Arc<Mesh>,
    /// Who is connected
    pub proxies: Arc<Proxies>,
    /// What was refused
    pub refusals: Arc<Refusals>,
    /// What is counted
    pub metrics: Metrics,
    /// Turns true when every stream must end
    pub stopping: watch::Receiver<bool>,
}

type Sender = mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>;

#[tonic::async_trait]
impl AggregatedDiscoveryService for Discovery {
    type DeltaAggregatedResourcesStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let peer = Peer::of(&request)?;
        let leaf = peer.leaf(self.mesh.trust_domain()).inspect_err(|status| {
            self.refusals.record("subscribe", &peer.address.to_string(), status.message());
        })?;
        let (sender, responses) = mpsc::channel(QUEUE);
        let discovery = self.clone();
        let requests = request.into_inner();
        tokio::spawn(async move {
            if let Err(status) = discovery.serve(&peer, &leaf, requests, &sender).await {
                tracing::info!(peer = %peer.address, identity = %leaf.identity, %status, "discovery stream ended");
                let _ = sender.send(Err(status)).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(responses)))
    }
}

impl Discovery {
    async fn serve(
        &self,
        peer: &Peer,
        leaf: &Leaf,
        mut requests: Streaming<DeltaDiscoveryRequest>,
        sender: &Sender,
    ) -> Result<(), Status> {
        let first = tokio::time::timeout(FIRST_REQUEST, requests.message())
            .await
            .map_err(|_| Status::deadline_exceeded("no request on the stream"))??;
        let Some(first) = first else { return Ok(()) };
        let workload = first.node.as_ref().map(|node| node.id.clone()).unwrap_or_default();
        if workload.is_empty() || workload.len() > 253 {
            return Err(Status::invalid_argument("node.id of the first request must be the workload's name"));
        }
        let client = Client {
            namespace: leaf.identity.namespace().to_owned(),
            workload,
            service_account: leaf.identity.service_account().to_owned(),
        };
        let proxy = self.proxies.connect(client, leaf.identity.to_string(), peer.address.to_string());
        tracing::info!(
            namespace = %proxy.client.namespace, workload = %proxy.client.workload, identity = %proxy.identity,
            peer = %peer.address, "proxy connected"
        );
        let expiry = tokio::time::sleep(until(leaf.not_after));
        let stopping = told(self.stopping.clone());
        tokio::pin!(expiry, stopping);
        let told = Mutex::default();
        self.request(&proxy, &first, &told, sender).await?;
        loop {
            tokio::select! {
                request = requests.message() => match request? {
                    Some(request) => self.request(&proxy, &request, &told, sender).await?,
                    None => return Ok(()),
                },
                look = proxy.inbox().next() => {
                    let published = self.mesh.now();
                    let view = self.view(&proxy, &published, &told);
                    let responses = proxy.stream().changed(&look, &view);
                    self.send(responses, sender).await?;
                }
                () = &mut expiry => {
                    return Err(Status::unauthenticated("the certificate of this connection has expired: connect with the renewed one"));
                }
                () = &mut stopping => return Err(Status::unavailable("the control plane is stopping")),
                () = sender.closed() => return Ok(()),
            }
        }
    }

    async fn request(
        &self,
        proxy: &Connected,
        request: &DeltaDiscoveryRequest,
        told: &Mutex<BTreeSet<String>>,
        sender: &Sender,
    ) -> Result<(), Status> {
        // Before the state is looked at, so that no change falls between.
        proxy.follow(request);
        let published = self.mesh.now();
        let outcome = {
            let view = self.view(proxy, &published, told);
            proxy.stream().request(request, &view)
        };
        proxy.unfollow(request);
        let outcome = outcome.map_err(|refused| {
            self.refusals.record("subscribe", &proxy.identity, &refused.to_string());
            match refused {
                Refused::TooMany => Status::resource_exhausted(refused.to_string()),
                Refused::Wildcard(_) | Refused::Type(_) => Status::invalid_argument(refused.to_string()),
            }
        })?;
        for (resource, reason) in &outcome.rejected {
            self.metrics.nacks.inc();
            let (namespace, workload) = (&proxy.client.namespace, &proxy.client.workload);
            tracing::warn!(%namespace, %workload, %resource, %reason, "the proxy refused a resource");
        }
        if outcome.settled {
            self.proxies.settled();
        }
        self.send(outcome.responses, sender).await
    }

    async fn send(&self, responses: Vec<DeltaDiscoveryResponse>, sender: &Sender) -> Result<(), Status> {
        for response in responses {
            self.metrics.pushes.inc();
            self.metrics.pushed_bytes.inc_by(response.encoded_len() as u64);
            sender.send(Ok(response)).await.map_err(|_| Status::cancelled("the proxy is gone"))?;
        }
        Ok(())
    }

    fn view<'a>(
        &'a self,
        proxy: &'a Connected,
        published: &'a Published,
        told: &'a Mutex<BTreeSet<String>>,
    ) -> View<'a> {
        View { published, client: &proxy.client, identity: &proxy.identity, refusals: &self.refusals, told }
    }
}

/// What one client may see of a state.
struct View<'a> {
    published: &'a Published,
    client: &'a Client,
    identity: &'a str,
    refusals: &'a Refusals,
    /// Refusals that were recorded, so that each is once
    told: &'a Mutex<BTreeSet<String>>,
}

impl Answers for View<'_> {
    fn answer(&self, type_url: &str, name: &str) -> Option<Arc<Found>> {
        // What an application calls becomes a name: a strange one is absent, and no reason to end the stream.
        let key = name.parse::<Key>().ok()?;
        if let Key::SelfOf(workload) = &key
            && *workload != self.client.workload
        {
            let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
            if told.len() < 64 && told.insert(name.to_owned()) {
                let own = &self.client.workload;
                let reason = format!("asked for {name}; a proxy may subscribe to its own self/{own} only");
                self.refusals.record("subscribe", self.identity, &reason);
            }
            return None;
        }
        self.published.answer(type_url, &key, self.client)
    }
}

fn until(not_after: i64) -> Duration {
    let end = SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(not_after).unwrap_or_default());
    // Timers do not reach for ever.
    end.duration_since(SystemTime::now()).unwrap_or_default().min(Duration::from_secs(365 * 86400))
}
