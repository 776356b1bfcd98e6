//! Tells the control plane about the own application: registered once there is a certificate, renewed at a third of the
//! lease, withdrawn when draining.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use outrigger_core::resource::{AppPort, Dial, PortProtocol, Registration};
use outrigger_proto::control::registry_client::RegistryClient;
use outrigger_proto::control::{FilterReport, Port, RegisterRequest, WithdrawRequest};
use outrigger_proto::mesh::Protocol;

use crate::filter::{Plugins, StatusRow};
use crate::flags::{Intercept, Settings};
use crate::identity::{ControlPlane, IdentityStore};

const CALL: Duration = Duration::from_secs(5);
const BACKOFF: Duration = Duration::from_millis(200);
const MAX_BACKOFF: Duration = Duration::from_secs(5);
/// Filters that are told of.
const MAX_REPORTS: usize = 256;
/// Bytes of a failure that are told.
const MAX_ERROR: usize = 1024;
/// The control plane confirms within 2 s; this much more for the way.
const WITHDRAW: Duration = Duration::from_millis(2500);

/// The own application as others are told about it.
#[derive(Debug)]
pub struct Register {
    /// The command line
    pub settings: Arc<Settings>,
    /// Where to register
    pub control: Arc<ControlPlane>,
    /// Waited for
    pub identity: Arc<IdentityStore>,
    /// The bound inbound listener
    pub inbound: SocketAddr,
    /// Whose health is told with each renewal
    pub filters: Arc<Plugins>,
}

impl Register {
    /// Registers and renews for as long as it is polled.
    pub async fn run(&self) {
        let mut backoff = BACKOFF;
        let mut registered = false;
        loop {
            self.identity.ready().await;
            match self.once().await {
                Ok(lease) => {
                    if !registered {
                        tracing::info!(workload = self.settings.name, ?lease, "registered");
                    }
                    (registered, backoff) = (true, BACKOFF);
                    tokio::time::sleep(lease / 3).await;
                }
                Err(why) => {
                    tracing::warn!(why, "not registered; trying again");
                    registered = false;
                    tokio::time::sleep(backoff.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
                    backoff = (backoff * 2).min(MAX_BACKOFF);
                }
            }
        }
    }

    async fn once(&self) -> Result<Duration, String> {
        let channel = self.control.channel();
        let own = self.settings.advertise.or_else(|| self.control.local_address());
        let mut client = RegistryClient::new(channel);
        let filters = self.filters.status().iter().take(MAX_REPORTS).map(report).collect();
        let call = client.register(RegisterRequest { filters, ..request(&self.settings, self.inbound, own) });
        match tokio::time::timeout(CALL, call).await {
            Ok(Ok(response)) => Ok(Duration::from_millis(response.into_inner().lease_ms.max(300))),
            Ok(Err(status)) => Err(format!("{}: {}", status.code(), status.message())),
            Err(_) => Err(format!("no answer within {CALL:?}")),
        }
    }

    /// Withdraws, and waits until nobody is sent here any more, or for 2 s.
    pub async fn withdraw(&self) {
        let mut client = RegistryClient::new(self.control.channel());
        let request =
            WithdrawRequest { namespace: self.settings.namespace.clone(), workload: self.settings.name.clone() };
        match tokio::time::timeout(WITHDRAW, client.withdraw(request)).await {
            Ok(Ok(response)) if response.get_ref().confirmed => tracing::info!("withdrawn: every caller knows"),
            Ok(Ok(_)) => tracing::warn!("withdrawn, but not every caller has acknowledged it"),
            Ok(Err(status)) => tracing::warn!(why = status.message(), "not withdrawn: the lease will end"),
            Err(_) => tracing::warn!("not withdrawn in time: the lease will end"),
        }
    }
}

/// What is said to the control plane. `own`: the address that others reach this host at.
fn request(settings: &Settings, inbound: SocketAddr, own: Option<IpAddr>) -> RegisterRequest {
    let dial = dial(settings, inbound, own);
    let (address, inbound) = match dial {
        Dial::Application(address) => (address.to_string(), String::new()),
        Dial::Inbound(inbound) => (String::new(), inbound.to_string()),
    };
    RegisterRequest {
        namespace: settings.namespace.clone(),
        workload: settings.name.clone(),
        service_account: settings.service_account.clone(),
        labels: settings.labels.clone(),
        intercepted: matches!(dial, Dial::Application(_)),
        address,
        inbound,
        ports: settings
            .apps
            .iter()
            .map(|app| Port {
                name: app.name.clone(),
                port: app.address.port().into(),
                protocol: word(app.protocol).to_owned(),
            })
            .collect(),
        region: settings.region.clone(),
        zone: settings.zone.clone(),
        filters: Vec::new(),
    }
}

fn report(row: &StatusRow) -> FilterReport {
    let error = row.refused.as_ref().or(row.last_error.as_ref()).map_or("", String::as_str);
    FilterReport {
        namespace: row.namespace.clone(),
        name: row.name.clone(),
        sha256: row.sha256.clone(),
        health: row.health.name().to_owned(),
        instances: row.instances as u64,
        requests: row.requests,
        failures: row.failures,
        timeouts: row.timeouts,
        cpu_ms: row.cpu_ms,
        memory_bytes: row.memory_bytes,
        last_error: error[..error.floor_char_boundary(MAX_ERROR)].to_owned(),
    }
}

/// The same for local mode. `None` without --app.
pub fn registration(settings: &Settings, inbound: SocketAddr) -> Option<Registration> {
    if settings.apps.is_empty() {
        return None;
    }
    Some(Registration {
        namespace: settings.namespace.clone(),
        name: settings.name.clone(),
        service_account: settings.service_account.clone(),
        labels: settings.labels.clone(),
        ports: settings
            .apps
            .iter()
            .map(|app| AppPort {
                name: app.name.clone(),
                port: app.address.port(),
                protocol: PortProtocol::parse(word(app.protocol)).unwrap_or_default(),
            })
            .collect(),
        dial: dial(settings, inbound, settings.advertise),
        region: settings.region.clone(),
        zone: settings.zone.clone(),
    })
}

/// With interception peers dial the application and the kernel brings them here; without, they dial the inbound listener.
fn dial(settings: &Settings, inbound: SocketAddr, own: Option<IpAddr>) -> Dial {
    let first = settings.apps.first().map_or(inbound.ip(), |app| app.address.ip());
    match settings.intercept {
        Intercept::Redirect => Dial::Application(own.unwrap_or(first)),
        Intercept::None => {
            let ip = settings.advertise.or_else(|| (!inbound.ip().is_unspecified()).then(|| inbound.ip())).or(own);
            Dial::Inbound((ip.unwrap_or(first), inbound.port()).into())
        }
    }
}

fn word(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Detect => "",
        Protocol::Http1 => "http1",
        Protocol::Http2 => "h2",
        Protocol::Tcp => "tcp",
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::flags::Flags;

    fn settings(more: &[&str]) -> Settings {
        let base = ["p", "--config", "d", "--name", "reviews-0", "--app", "127.0.0.1:8080/h2"];
        Flags::try_parse_from(base.iter().chain(more)).unwrap().settings().unwrap()
    }

    #[test]
    fn without_interception_peers_dial_the_inbound_listener() {
        let inbound = "127.0.0.1:4000".parse().unwrap();
        let request = request(&settings(&[]), inbound, Some("10.0.0.9".parse().unwrap()));
        assert_eq!(request.inbound, "127.0.0.1:4000");
        assert!(!request.intercepted && request.address.is_empty());
        assert_eq!(request.ports[0].protocol, "h2");
        assert_eq!(Registration::try_from(&request).unwrap().dial, Dial::Inbound(inbound));
    }

    #[test]
    fn with_interception_peers_dial_the_application() {
        let settings = settings(&["--intercept", "redirect"]);
        let request = request(&settings, "[::]:15006".parse().unwrap(), Some("10.0.0.9".parse().unwrap()));
        assert!(request.intercepted);
        assert_eq!((request.address.as_str(), request.inbound.as_str()), ("10.0.0.9", ""));
    }
}
