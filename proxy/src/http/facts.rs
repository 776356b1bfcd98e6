//! What filters may know of a client's connection.

use std::net::SocketAddr;

use outrigger_core::spiffe::SpiffeId;

use super::{Connection, Way};
use crate::filter::ConnectionFacts;

impl ConnectionFacts for Connection {
    fn inbound(&self) -> bool {
        self.way() == Way::Inbound
    }

    fn source(&self) -> Option<SocketAddr> {
        Some(self.client())
    }

    fn destination(&self) -> Option<SocketAddr> {
        Self::destination(self)
    }

    fn peer_identity(&self) -> Option<&str> {
        self.peer().map(SpiffeId::as_str)
    }

    fn local_identity(&self) -> Option<String> {
        self.peer()?;
        self.worker.proxy.identity.current().map(|identity| identity.spiffe().as_str().to_owned())
    }

    fn server_name(&self) -> Option<&str> {
        None
    }

    fn id(&self) -> u64 {
        self.id
    }

    #[allow(clippy::misnamed_getters, reason = "labels name the workload twice: alone, and with its namespace")]
    fn workload(&self) -> &str {
        &self.worker.labels.name
    }

    fn namespace(&self) -> &str {
        &self.worker.labels.namespace
    }
}
