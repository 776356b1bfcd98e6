//! The command line of `outrigger-proxy`. Every flag is also the environment variable `OUTRIGGER_…` of the same name.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Parser, ValueEnum};
use outrigger_proto::mesh::Protocol;

/// A sidecar proxy: mTLS, discovery, routing and policy for the application beside it.
///
/// With --control-plane it is told what to do; with --config it reads the same YAML itself.
#[derive(Debug, Clone, Parser)]
#[command(name = "outrigger-proxy", version)]
pub struct Flags {
    /// Name of this workload: one proxy is one workload. Default: the host name
    #[arg(long, env = "OUTRIGGER_NAME")]
    pub name: Option<String>,
    /// Namespace of this workload
    #[arg(long, env = "OUTRIGGER_NAMESPACE", default_value = "default")]
    pub namespace: String,
    /// Service account of this workload: with the namespace, its identity
    #[arg(long, env = "OUTRIGGER_SERVICE_ACCOUNT", default_value = "default")]
    pub service_account: String,
    /// A port of the application: [NAME=]ADDR:PORT[/http1|/h2|/tcp]; repeat it for more ports
    #[arg(long = "app", env = "OUTRIGGER_APP", value_name = "[NAME=]ADDR:PORT[/PROTOCOL]", value_delimiter = ',')]
    pub apps: Vec<App>,
    /// Labels of this workload, which Services and policies select: app=reviews,version=v1
    #[arg(long, env = "OUTRIGGER_LABELS", default_value = "", value_parser = labels)]
    pub labels: Labels,
    /// Region and zone of this workload: REGION[/ZONE]
    #[arg(long, env = "OUTRIGGER_LOCALITY", default_value = "")]
    pub locality: String,
    /// Where the configuration and the identity come from
    #[command(flatten)]
    pub source: SourceFlags,
    /// Directory for what survives a restart: key, certificate, last configuration, filter modules
    #[arg(long, env = "OUTRIGGER_STATE", value_name = "DIR")]
    pub state: Option<PathBuf>,
    /// Address that others reach this workload at. Default: the local address of the connection to the control plane
    #[arg(long, env = "OUTRIGGER_ADVERTISE", value_name = "IP")]
    pub advertise: Option<IpAddr>,
    /// Listener for what others send to the application [default: 127.0.0.1:15006, [::]:15006 with --intercept redirect]
    #[arg(long, env = "OUTRIGGER_INBOUND", value_name = "ADDR:PORT")]
    pub inbound: Option<SocketAddr>,
    /// Listener for what the application sends [default: 127.0.0.1:15001, [::]:15001 with --intercept redirect]
    #[arg(long, env = "OUTRIGGER_OUTBOUND", value_name = "ADDR:PORT")]
    pub outbound: Option<SocketAddr>,
    /// Administration (HTTP)
    #[arg(long, env = "OUTRIGGER_ADMIN", value_name = "ADDR:PORT", default_value = "127.0.0.1:15000")]
    pub admin: SocketAddr,
    /// Health and metrics (HTTP) [default: 127.0.0.1:15020, [::]:15020 with --intercept redirect]
    #[arg(long, env = "OUTRIGGER_HEALTH", value_name = "ADDR:PORT")]
    pub health: Option<SocketAddr>,
    /// How connections get here: `none`, the application names the service in Host; `redirect`, by nftables rules
    /// (`outrigger intercept install`), and the original destination is read from the kernel
    #[arg(long, env = "OUTRIGGER_INTERCEPT", default_value = "none")]
    pub intercept: Intercept,
    /// Worker threads. Default: the CPU quota rounded up, at most 2
    #[arg(long, env = "OUTRIGGER_WORKERS", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub workers: Option<u16>,
    /// Requests in flight per worker, upgraded connections included; more are answered 503 `overloaded`
    #[arg(long, env = "OUTRIGGER_MAX_REQUESTS", default_value = "10000", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_requests: u32,
    /// How long a client may take to send the head of a request, from its first byte
    #[arg(long, env = "OUTRIGGER_HEADER_TIMEOUT", default_value = "10s", value_parser = duration, value_name = "DURATION")]
    pub header_timeout: Duration,
    /// While draining, requests are accepted for at least this long
    #[arg(long, env = "OUTRIGGER_DRAIN_MIN", default_value = "1s", value_parser = duration, value_name = "DURATION")]
    pub drain_min: Duration,
    /// After this long, what is still open is cut and the process ends
    #[arg(long, env = "OUTRIGGER_DRAIN_MAX", default_value = "25s", value_parser = duration, value_name = "DURATION")]
    pub drain_max: Duration,
    /// Log filter: error, warn, info, debug, trace, or per module as in `info,outrigger_proxy::http=debug`
    #[arg(long, env = "OUTRIGGER_LOG", default_value = "info")]
    pub log: String,
}

/// Two ways to be configured; exactly one is given.
#[derive(Debug, Clone, Args)]
pub struct SourceFlags {
    /// Control plane: https://HOST:PORT
    #[arg(long, env = "OUTRIGGER_CONTROL_PLANE", value_name = "URL")]
    pub control_plane: Option<String>,
    /// Directory of YAML: no control plane
    #[arg(long, env = "OUTRIGGER_CONFIG", value_name = "DIR")]
    pub config: Option<PathBuf>,
    /// Roots to trust (PEM): the control plane's STATE/root.pem, or with --config the peers' roots
    #[arg(long, env = "OUTRIGGER_CA_FILE", value_name = "FILE")]
    pub ca_file: Option<PathBuf>,
    /// Join token: the control plane's STATE/join-token, or one of `outrigger token create`
    #[arg(long, env = "OUTRIGGER_TOKEN_FILE", value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Certificate chain of this workload (PEM), with --config
    #[arg(long, env = "OUTRIGGER_CERT_FILE", value_name = "FILE")]
    pub cert_file: Option<PathBuf>,
    /// Private key of this workload (PEM), with --config
    #[arg(long, env = "OUTRIGGER_KEY_FILE", value_name = "FILE")]
    pub key_file: Option<PathBuf>,
}

/// How connections reach the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Intercept {
    /// Explicit: the application sends to the outbound port
    None,
    /// nftables redirects; `SO_ORIGINAL_DST` tells where to
    Redirect,
}

/// One port of the application.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct App {
    /// Name of the port; `http` when not given
    pub name: String,
    /// Where the application listens
    pub address: SocketAddr,
    /// Declared protocol; `Detect` when not given
    pub protocol: Protocol,
}

/// Labels of the workload.
pub type Labels = BTreeMap<String, String>;

/// Where configuration comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A control plane
    ControlPlane {
        /// https://host:port
        url: String,
        /// Roots of the control plane's certificate (PEM)
        ca_file: Option<PathBuf>,
        /// Join token
        token_file: Option<PathBuf>,
    },
    /// A directory of YAML
    Directory {
        /// The directory
        path: PathBuf,
        /// Certificate, key and roots (PEM)
        identity: Option<IdentityFiles>,
    },
}

/// An identity from files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdentityFiles {
    /// Chain, leaf first
    pub cert: PathBuf,
    /// Private key
    pub key: PathBuf,
    /// Roots of the peers
    pub ca: PathBuf,
}

/// The flags with every default applied.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Name of the workload
    pub name: String,
    /// Its namespace
    pub namespace: String,
    /// Its service account
    pub service_account: String,
    /// Its ports
    pub apps: Vec<App>,
    /// Its labels
    pub labels: Labels,
    /// Its region, or ""
    pub region: String,
    /// Its zone, or ""
    pub zone: String,
    /// Where configuration comes from
    pub source: Source,
    /// What survives a restart
    pub state: Option<PathBuf>,
    /// Address for others
    pub advertise: Option<IpAddr>,
    /// Inbound listener
    pub inbound: SocketAddr,
    /// Outbound listener
    pub outbound: SocketAddr,
    /// Administration
    pub admin: SocketAddr,
    /// Health and metrics
    pub health: SocketAddr,
    /// How connections get here
    pub intercept: Intercept,
    /// Worker threads
    pub workers: u16,
    /// Most requests in flight per worker
    pub max_requests: u32,
    /// Most time from the first byte of a request's head to its last
    pub header_timeout: Duration,
    /// Least time to accept while draining
    pub drain_min: Duration,
    /// Most time for draining
    pub drain_max: Duration,
    /// Log filter
    pub log: String,
}

/// A combination of flags that cannot work; says what to change.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0}")]
pub struct BadFlags(String);

impl Flags {
    /// Checks the flags against each other and applies defaults.
    ///
    /// # Errors
    /// Flags that contradict each other or lack a partner.
    pub fn settings(self) -> Result<Settings, BadFlags> {
        let source = self.source.resolve()?;
        let redirect = self.intercept == Intercept::Redirect;
        let default = |port| default_bind(redirect, port);
        let (region, zone) = self.locality.split_once('/').unwrap_or((&self.locality, ""));
        let settings = Settings {
            region: region.to_owned(),
            zone: zone.to_owned(),
            name: self.name.unwrap_or_else(host_name),
            inbound: self.inbound.unwrap_or_else(|| default(15006)),
            outbound: self.outbound.unwrap_or_else(|| default(15001)),
            health: self.health.unwrap_or_else(|| default(15020)),
            workers: self.workers.unwrap_or_else(default_workers),
            namespace: self.namespace,
            service_account: self.service_account,
            apps: self.apps,
            labels: self.labels,
            source,
            state: self.state,
            advertise: self.advertise,
            admin: self.admin,
            intercept: self.intercept,
            max_requests: self.max_requests,
            header_timeout: self.header_timeout,
            drain_min: self.drain_min,
            drain_max: self.drain_max,
            log: self.log,
        };
        settings.check()?;
        Ok(settings)
    }
}

impl SourceFlags {
    fn resolve(self) -> Result<Source, BadFlags> {
        let bad = |text: &str| Err(BadFlags(text.to_owned()));
        match (self.control_plane, self.config) {
            (None, None) => bad(
                "where is the configuration? Give --control-plane https://HOST:15012 (with --ca-file and --token-file), or \
                 --config DIR for a directory of YAML and no control plane",
            ),
            (Some(_), Some(_)) => {
                bad("--control-plane and --config exclude each other: the configuration comes from one of them")
            }
            (Some(_), None) if self.cert_file.is_some() || self.key_file.is_some() => bad(
                "--cert-file and --key-file are for --config: with --control-plane the certificate comes from there",
            ),
            (Some(url), None) => {
                let parsed = url.parse::<http::Uri>().ok();
                if !parsed.is_some_and(|uri| uri.scheme_str() == Some("https") && uri.authority().is_some()) {
                    return Err(BadFlags(format!("--control-plane `{url}` is not of the form https://HOST:PORT")));
                }
                Ok(Source::ControlPlane { url, ca_file: self.ca_file, token_file: self.token_file })
            }
            (None, Some(_)) if self.token_file.is_some() => bad(
                "--token-file is for --control-plane; with --config the identity comes from --cert-file and --key-file",
            ),
            (None, Some(path)) => {
                let identity = match (self.cert_file, self.key_file, self.ca_file) {
                    (None, None, None) => None,
                    (Some(cert), Some(key), Some(ca)) => Some(IdentityFiles { cert, key, ca }),
                    _ => return bad("--cert-file, --key-file and --ca-file belong together: give all three or none"),
                };
                Ok(Source::Directory { path, identity })
            }
        }
    }
}

impl Settings {
    /// The application's port with this number.
    pub fn app(&self, port: u16) -> Option<&App> {
        self.apps.iter().find(|app| app.address.port() == port)
    }

    /// The SPIFFE identity in a trust domain.
    pub fn identity(&self, trust_domain: &str) -> String {
        format!("spiffe://{trust_domain}/ns/{}/sa/{}", self.namespace, self.service_account)
    }

    /// The proxy's own ports, which are never forwarded to.
    pub fn own_ports(&self) -> [u16; 4] {
        [self.inbound.port(), self.outbound.port(), self.admin.port(), self.health.port()]
    }

    fn check(&self) -> Result<(), BadFlags> {
        for (flag, name) in
            [("--name", &self.name), ("--namespace", &self.namespace), ("--service-account", &self.service_account)]
        {
            let dns = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.');
            if name.is_empty() || name.len() > 253 || !name.chars().all(dns) {
                return Err(BadFlags(format!(
                    "{flag} `{name}`: names have 1 to 253 lower-case letters, digits, `-` and `.`"
                )));
            }
        }
        for (at, app) in self.apps.iter().enumerate() {
            for other in &self.apps[..at] {
                if other.name == app.name {
                    return Err(BadFlags(format!(
                        "two --app are named `{}`: name them apart, as in admin=127.0.0.1:9000",
                        app.name
                    )));
                }
                if other.address.port() == app.address.port() {
                    return Err(BadFlags(format!("two --app have port {}", app.address.port())));
                }
            }
            if self.own_ports().contains(&app.address.port()) && app.address.port() != 0 {
                return Err(BadFlags(format!(
                    "--app {}: this port is the proxy's own; move the application or the proxy's listener",
                    app.address
                )));
            }
        }
        if self.drain_min > self.drain_max {
            return Err(BadFlags("--drain-min is longer than --drain-max".to_owned()));
        }
        Ok(())
    }
}

impl FromStr for App {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, rest) = text.split_once('=').unwrap_or(("http", text));
        let (address, protocol) = rest.split_once('/').unwrap_or((rest, ""));
        let protocol = match protocol {
            "" => Protocol::Detect,
            "http1" => Protocol::Http1,
            "h2" => Protocol::Http2,
            "tcp" => Protocol::Tcp,
            other => return Err(format!("`{other}` is not a protocol; choose http1, h2 or tcp, or leave it out")),
        };
        if name.is_empty() {
            return Err("the name before `=` is empty".to_owned());
        }
        let address: SocketAddr =
            address.parse().map_err(|_| format!("`{address}` is not ADDR:PORT, as in 127.0.0.1:8080 or [::1]:8080"))?;
        if address.port() == 0 {
            return Err("port 0 is no port of an application".to_owned());
        }
        let address = if address.ip().is_unspecified() { loopback(address) } else { address };
        Ok(Self { name: name.to_owned(), address, protocol })
    }
}

/// An application on `0.0.0.0` is reached over loopback.
fn loopback(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V4(_) => (Ipv4Addr::LOCALHOST, address.port()).into(),
        SocketAddr::V6(_) => (Ipv6Addr::LOCALHOST, address.port()).into(),
    }
}

fn labels(text: &str) -> Result<Labels, String> {
    text.split(',')
        .filter(|label| !label.is_empty())
        .map(|label| {
            let (key, value) = label.split_once('=').ok_or_else(|| format!("`{label}` is not KEY=VALUE"))?;
            if key.is_empty() {
                return Err(format!("`{label}`: the key is empty"));
            }
            Ok((key.to_owned(), value.to_owned()))
        })
        .collect()
}

fn duration(text: &str) -> Result<Duration, String> {
    let bad = || format!("`{text}` is not a duration such as 250ms, 5s or 2m");
    let digits = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(bad)?;
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| bad())?;
    let scale = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(bad()),
    };
    number.checked_mul(scale).map(Duration::from_millis).ok_or_else(bad)
}

/// With redirection the kernel sends to the interface's own address, so loopback would not do; IPv4 only where IPv6 is off.
fn default_bind(redirect: bool, port: u16) -> SocketAddr {
    if !redirect {
        return (Ipv4Addr::LOCALHOST, port).into();
    }
    match std::net::UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)) {
        Ok(_) => (Ipv6Addr::UNSPECIFIED, port).into(),
        Err(_) => (Ipv4Addr::UNSPECIFIED, port).into(),
    }
}

fn host_name() -> String {
    // nix has gethostname behind a feature that nothing else needs.
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_ascii_lowercase();
    if name.is_empty() { "proxy".to_owned() } else { name }
}

/// min(2, ⌈CPU quota⌉): a sidecar serves one application, and each worker costs memory.
fn default_workers() -> u16 {
    let available = std::thread::available_parallelism().map_or(1, usize::from);
    // available_parallelism honours the cgroup's quota, but rounds it down.
    let quota = std::fs::read_to_string("/sys/fs/cgroup/cpu.max").ok().and_then(|text| quota(&text));
    u16::try_from(quota.unwrap_or(available).clamp(1, 2)).unwrap_or(1)
}

/// The quota of `cpu.max` ("150000 100000", or "max 100000"), rounded up.
fn quota(text: &str) -> Option<usize> {
    let (quota, period) = text.trim().split_once(' ')?;
    let (quota, period): (usize, usize) = (quota.parse().ok()?, period.parse().ok()?);
    (period > 0).then(|| quota.div_ceil(period))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(arguments: &[&str]) -> Result<Settings, String> {
        let flags = Flags::try_parse_from(std::iter::once(&"outrigger-proxy").chain(arguments));
        flags.map_err(|error| error.to_string())?.settings().map_err(|error| error.to_string())
    }

    #[test]
    fn an_application_is_read_with_name_and_protocol() {
        let app = |text: &str| text.parse::<App>();
        let expected = |name: &str, address: &str, protocol| App {
            name: name.into(),
            address: address.parse().unwrap(),
            protocol,
        };
        assert_eq!(app("127.0.0.1:8080"), Ok(expected("http", "127.0.0.1:8080", Protocol::Detect)));
        assert_eq!(app("grpc=[::1]:9000/h2"), Ok(expected("grpc", "[::1]:9000", Protocol::Http2)));
        assert_eq!(app("db=0.0.0.0:5432/tcp"), Ok(expected("db", "127.0.0.1:5432", Protocol::Tcp)));
        for bad in ["8080", "localhost:80", "127.0.0.1:8080/http", "=127.0.0.1:1", "127.0.0.1:0"] {
            assert!(app(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_source_is_exactly_one() {
        for (arguments, says) in [
            (&[][..], "where is the configuration?"),
            (&["--control-plane", "https://a:1", "--config", "d"], "exclude each other"),
            (&["--control-plane", "http://a:1"], "https://HOST:PORT"),
            (&["--config", "d", "--cert-file", "c"], "belong together"),
            (&["--config", "d", "--token-file", "c"], "--token-file is for --control-plane"),
            (&["--control-plane", "https://a:1", "--key-file", "k"], "are for --config"),
            (&["--config", "d", "--app", "127.0.0.1:15006"], "the proxy's own"),
            (&["--config", "d", "--app", "127.0.0.1:1", "--app", "127.0.0.1:2"], "named `http`"),
            (&["--config", "d", "--name", "A_b"], "lower-case"),
            (&["--config", "d", "--drain-min", "10s", "--drain-max", "5s"], "longer than"),
            (&["--config", "d", "--drain-min", "10"], "not a duration"),
        ] {
            let error = settings(arguments).unwrap_err();
            assert!(error.contains(says), "{arguments:?}: {error}");
        }
    }

    #[test]
    fn interception_changes_the_default_binds() {
        let explicit = settings(&["--config", "d"]).unwrap();
        assert_eq!(explicit.inbound, "127.0.0.1:15006".parse().unwrap());
        let redirect = settings(&["--config", "d", "--intercept", "redirect", "--health", "127.0.0.1:1"]).unwrap();
        assert!(redirect.outbound.ip().is_unspecified());
        assert_eq!(redirect.outbound.port(), 15001);
        assert_eq!(redirect.health, "127.0.0.1:1".parse().unwrap());
    }

    #[test]
    fn a_quota_is_rounded_up() {
        assert_eq!(quota("150000 100000\n"), Some(2));
        assert_eq!(quota("max 100000\n"), None);
    }

    #[test]
    fn labels_are_read() {
        let labels = settings(&["--config", "d", "--labels", "app=reviews,version=v1"]).unwrap().labels;
        assert_eq!(
            labels.into_iter().collect::<Vec<_>>(),
            [("app".to_owned(), "reviews".to_owned()), ("version".to_owned(), "v1".to_owned())]
        );
    }
}
