//! The stream to the control plane: opened, kept, opened again.

use std::sync::Arc;
use std::time::Duration;

use outrigger_proto::discovery::Node;
use outrigger_proto::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::Channel;

use super::{Event, Requests, modules};
use crate::identity::{ControlPlane, IdentityStore};

const BACKOFF: Duration = Duration::from_millis(100);
const MAX_BACKOFF: Duration = Duration::from_secs(5);
/// A resource larger than this is a mistake. Bytes.
const MAX_MESSAGE: usize = 64 << 20;

/// How a remote source is reached.
#[derive(Debug, Clone)]
pub struct Remote {
    /// Gives channels that verify the control plane and show our certificate
    pub control: Arc<ControlPlane>,
    /// Waited for: the stream is opened with a certificate only
    pub identity: Arc<IdentityStore>,
    /// Name of the workload
    pub workload: String,
}

impl Remote {
    /// Keeps a stream open for ever.
    pub(super) async fn run(self, events: mpsc::Sender<Event>) {
        let mut backoff = BACKOFF;
        loop {
            self.identity.ready().await;
            let mut certificates = self.identity.subscribe();
            let (why, well) = tokio::select! {
                ended = stream(self.control.channel(), &self.workload, &events) => ended,
                // The control plane would end the stream when the old certificate expires.
                () = renewed(&mut certificates, &self.identity) => ("reconnecting with the renewed certificate".to_owned(), true),
            };
            if well {
                backoff = BACKOFF;
            }
            if events.send(Event::Down(why)).await.is_err() {
                return;
            }
            tokio::time::sleep(backoff.mul_f64(0.5 + fastrand::f64())).await;
            backoff = (backoff * 2).min(MAX_BACKOFF);
        }
    }

    /// The bytes of a module, by digest.
    pub(super) async fn module(&self, sha256: &str) -> Result<bytes::Bytes, String> {
        modules::fetch(|| self.control.channel(), sha256).await
    }
}

/// Returns when there is another certificate; a change of the bundle alone does not count.
async fn renewed(changes: &mut watch::Receiver<u64>, identity: &IdentityStore) {
    let chain = |store: &IdentityStore| store.last().map(|own| own.chain().to_vec());
    let old = chain(identity);
    while changes.changed().await.is_ok() {
        if chain(identity) != old {
            return;
        }
    }
    std::future::pending::<()>().await;
}

/// One stream to its end: why it ended, and whether it was well until then, so that the next one need not wait.
pub(super) async fn stream(channel: Channel, workload: &str, events: &mpsc::Sender<Event>) -> (String, bool) {
    let (requests, queue) = mpsc::unbounded_channel();
    let node = Node { id: workload.to_owned(), cluster: String::new() };
    // First, since a server may answer the call only after it has read a request.
    if events.send(Event::Opening(Requests { queue: requests, node: Some(node) })).await.is_err() {
        return ("the proxy ends".to_owned(), false);
    }
    let mut client = AggregatedDiscoveryServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE);
    let mut responses = match client.delta_aggregated_resources(UnboundedReceiverStream::new(queue)).await {
        Ok(response) => response.into_inner(),
        Err(status) => return (reason(&status), false),
    };
    if events.send(Event::Up).await.is_err() {
        return ("the proxy ends".to_owned(), false);
    }
    let mut answered = false;
    loop {
        match responses.message().await {
            Ok(Some(response)) => {
                answered = true;
                if events.send(Event::Response(response)).await.is_err() {
                    return ("the proxy ends".to_owned(), answered);
                }
            }
            Ok(None) => return ("the control plane ended the stream".to_owned(), answered),
            // Another stream at once would ask for as much again.
            Err(status) => return (reason(&status), answered && status.code() != tonic::Code::ResourceExhausted),
        }
    }
}

/// tonic's message is "transport error"; what happened is at the end of the chain of sources.
fn reason(status: &tonic::Status) -> String {
    let mut text = status.message().to_owned();
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        text = error.to_string();
        source = error.source();
    }
    text
}
