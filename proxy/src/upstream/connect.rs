//! One connection to an endpoint: dial, prove and check identities, speak HTTP.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use outrigger_core::balance::Endpoint;
use outrigger_core::breaker::{Permit, Wanted};
use outrigger_core::link::{Backend, Limits, Protocol};
use outrigger_core::reason::Reason;
use outrigger_core::spiffe::SpiffeId;
use tokio::net::TcpStream;

use super::Cluster;
use crate::http::Way;
use crate::io::Io;
use crate::metrics::{Held, Local, Metric};
use crate::snapshot::Workload;
use crate::state::Proxy;
use crate::tls::{self, Peer, TlsError};

/// An instance hit by its address has no policy: the defaults hold.
const WORKLOAD_CONNECT: Duration = Duration::from_secs(1);
const WORKLOAD_IDLE: Duration = Duration::from_secs(300);

/// What a connection speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Wire {
    /// HTTP/1.1
    Http1,
    /// HTTP/2
    Http2,
    /// Bytes
    Tcp,
}

/// How a connection is protected.
#[derive(Debug, Clone)]
pub enum Security {
    /// Not at all
    Plain,
    /// Mesh mTLS
    Mtls {
        /// Identity that the peer must prove
        identity: SpiffeId,
        /// Application port, service and namespace: the SNI is `p<port>.<service>.<namespace>.outrigger.internal`
        port: u16,
        /// Service
        service: Arc<str>,
        /// Namespace
        namespace: Arc<str>,
    },
}

/// Where to connect, and as what.
#[derive(Debug, Clone)]
pub struct Target {
    /// Address that is dialled
    pub address: SocketAddr,
    /// Protocol
    pub wire: Wire,
    /// Mesh mTLS, or plaintext
    pub security: Security,
    /// Longest time until the connection is usable
    pub timeout: Duration,
    /// How long it is kept without a request
    pub idle: Duration,
    /// The endpoint, where there is one: its connections are its own even if another has the same address
    pub endpoint: Option<Arc<Endpoint>>,
    /// Whose limits count the connection
    pub limits: Option<(Arc<Cluster>, Limits)>,
    /// What the connection is counted under
    pub label: Label,
}

/// What a connection is counted under.
#[derive(Debug, Clone)]
pub struct Label {
    /// From the application, or to it
    pub way: Way,
    /// `<namespace>/<service>`
    pub service: Arc<str>,
}

impl Label {
    /// Of a connection to an endpoint, or to the outside.
    pub(crate) fn outbound(service: &Arc<str>) -> Self {
        Self { way: Way::Outbound, service: service.clone() }
    }

    /// Of a connection to the own application.
    pub(crate) fn inbound(service: &Arc<str>) -> Self {
        Self { way: Way::Inbound, service: service.clone() }
    }
}

/// An open connection, before anything is spoken on it.
#[derive(Debug)]
pub(crate) struct Opened {
    /// Its bytes
    pub(crate) io: Io,
    /// Who proved to be there, and what the connection holds
    pub(crate) link: Link,
}

/// What a connection holds for as long as it is open.
#[derive(Debug)]
pub(crate) struct Link {
    peer: Option<Peer>,
    _gauge: Held,
    _permit: Option<Permit>,
}

impl Link {
    /// Who proved to be there; `None`: plaintext.
    pub(crate) fn peer(&self) -> Option<&Peer> {
        self.peer.as_ref()
    }
}

/// No connection: the reason for a response, and what exactly went wrong.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{}: {detail}", reason.code())]
pub struct ConnectError {
    /// For the response
    pub reason: Reason,
    /// For people
    pub detail: Rc<str>,
}

impl ConnectError {
    pub(super) fn new(reason: Reason, detail: impl std::fmt::Display) -> Self {
        Self { reason, detail: detail.to_string().into() }
    }
}

impl Target {
    /// An address in plaintext, with no limits.
    pub(crate) fn plain(address: SocketAddr, wire: Wire, timeout: Duration, idle: Duration, label: Label) -> Self {
        Self { address, wire, security: Security::Plain, timeout, idle, endpoint: None, limits: None, label }
    }

    /// An endpoint of a backend.
    pub(crate) fn endpoint(endpoint: &Arc<Endpoint>, backend: &Backend, cluster: &Arc<Cluster>, wire: Wire) -> Self {
        let (info, policy) = (&endpoint.info, &backend.policy);
        let security = match &info.identity {
            None => Security::Plain,
            Some(identity) => Security::Mtls {
                identity: identity.clone(),
                port: info.app_port,
                service: backend.service.clone(),
                namespace: backend.namespace.clone(),
            },
        };
        Self {
            address: info.address,
            wire,
            security,
            timeout: policy.connect_timeout,
            idle: policy.idle_timeout,
            endpoint: Some(endpoint.clone()),
            limits: Some((cluster.clone(), policy.limits)),
            label: Label::outbound(&backend.label),
        }
    }

    /// One instance of the mesh, hit by its own address. `wire` chooses by the protocol that is declared.
    pub(crate) fn workload(workload: &Workload, wire: impl Fn(Protocol) -> Wire) -> Self {
        let info = &workload.endpoint;
        let (namespace, name) = info.id.split_once('/').unwrap_or(("default", &info.id));
        let security = match &info.identity {
            None => Security::Plain,
            Some(identity) => Security::Mtls {
                identity: identity.clone(),
                port: info.app_port,
                service: name.into(),
                namespace: namespace.into(),
            },
        };
        Self {
            address: info.address,
            wire: wire(if info.identity.is_some() { Protocol::Detect } else { workload.protocol }),
            security,
            timeout: WORKLOAD_CONNECT,
            idle: WORKLOAD_IDLE,
            endpoint: None,
            limits: None,
            label: Label::outbound(&info.id),
        }
    }

    /// Says that this worker waits for a connection which the limit denies it.
    pub(super) fn want(&self) -> Option<Wanted> {
        self.limits.as_ref().map(|(cluster, _)| cluster.breaker.want())
    }

    /// A permit for one more connection; `None`: the limit is reached. `own` is how many this worker has to the endpoint: the
    /// first is always permitted, so that no worker starves another.
    pub(crate) fn connection(&self, own: usize) -> Option<Option<Permit>> {
        let Some((cluster, limits)) = &self.limits else { return Some(None) };
        cluster.breaker.connection(limits, own).ok().map(Some)
    }

    /// A permit to wait for a connection.
    pub(super) fn pending(&self) -> Result<Option<Permit>, ConnectError> {
        let Some((cluster, limits)) = &self.limits else { return Ok(None) };
        cluster.breaker.pending(limits).map(Some).map_err(|reason| ConnectError::new(reason, ""))
    }
}

/// Dials and, with mTLS, shakes hands, within the target's time. `permit` is held while the connection is open.
pub(crate) async fn open(
    target: &Target,
    permit: Option<Permit>,
    proxy: &Proxy,
    metrics: &Local,
) -> Result<Opened, ConnectError> {
    let opening = async {
        let stream = TcpStream::connect(target.address)
            .await
            .map_err(|error| ConnectError::new(Reason::ConnectFailure, format_args!("{}: {error}", target.address)))?;
        // Small writes are whole messages here; waiting to merge them only adds latency.
        let _ = stream.set_nodelay(true);
        secure(stream, target, proxy).await
    };
    let opened = tokio::time::timeout(target.timeout, opening).await.unwrap_or_else(|_| {
        Err(ConnectError::new(
            Reason::ConnectTimeout,
            format_args!("{} did not answer within {:?}", target.address, target.timeout),
        ))
    });
    let Label { way, service } = &target.label;
    let outcome = opened.as_ref().map_or_else(|error| error.reason.code(), |_| "success");
    metrics.add(Metric::UpstreamConnects, &[service, outcome], 1);
    let (io, peer) = opened?;
    if let Some(peer) = &peer {
        metrics.add(Metric::TlsConnections, &[way.name(), peer.identity.as_str()], 1);
    }
    let gauge = metrics.hold(Metric::UpstreamConnections, &[way.name(), service]);
    Ok(Opened { io, link: Link { peer, _gauge: gauge, _permit: permit } })
}

async fn secure(stream: TcpStream, target: &Target, proxy: &Proxy) -> Result<(Io, Option<Peer>), ConnectError> {
    let Security::Mtls { identity, port, service, namespace } = &target.security else {
        return Ok((stream.into(), None));
    };
    let own = proxy.identity.required().map_err(refused)?;
    let to = tls::Target {
        address: target.address,
        sni: &format!("p{port}.{service}.{namespace}.outrigger.internal"),
        expected: identity,
        alpn: match target.wire {
            Wire::Http1 => &[tls::ALPN_HTTP1],
            Wire::Http2 => &[tls::ALPN_H2],
            Wire::Tcp => &[tls::ALPN_TCP],
        },
    };
    let (stream, peer) = tls::connect(stream, &own, &to, target.timeout).await.map_err(refused)?;
    Ok((stream.into(), Some(peer)))
}

fn refused(error: TlsError) -> ConnectError {
    ConnectError::new(error.reason(), error)
}

/// Until the connection ends. When `ended` is ready, what runs on it has only so long.
pub(super) async fn drive<E: std::fmt::Display>(
    connection: impl Future<Output = Result<(), E>>,
    ended: impl Future<Output = ()>,
) {
    let mut connection = std::pin::pin!(connection);
    let result = tokio::select! {
        biased;
        result = connection.as_mut() => result,
        () = ended => tokio::time::timeout(tls::GRACE, connection).await.unwrap_or(Ok(())),
    };
    if let Err(error) = result {
        tracing::debug!(%error, "a connection to an endpoint ended with an error");
    }
}

pub(super) fn protocol(error: impl std::fmt::Display) -> ConnectError {
    ConnectError::new(Reason::ConnectFailure, error)
}

/// Runs hyper's tasks on the worker that started them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LocalExecutor;

impl<F: Future + 'static> hyper::rt::Executor<F> for LocalExecutor {
    fn execute(&self, future: F) {
        tokio::task::spawn_local(future);
    }
}
