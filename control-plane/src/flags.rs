//! The command line. Every flag has an `OUTRIGGER_…` variable of the same name.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;

/// Outrigger's control plane: certificates, registration, discovery.
#[derive(Debug, Clone, Parser)]
#[command(name = "outrigger-control", version, about)]
pub struct Flags {
    /// Directory of YAML, read with its subdirectories and watched
    #[arg(long, env = "OUTRIGGER_CONFIG", value_name = "DIR")]
    pub config: PathBuf,
    /// Directory for what must survive a restart: root key, certificates, last good resources, registrations
    #[arg(long, env = "OUTRIGGER_STATE", value_name = "DIR")]
    pub state: PathBuf,
    /// Address of the gRPC service (TLS)
    #[arg(long, env = "OUTRIGGER_GRPC", value_name = "ADDR", default_value = "127.0.0.1:15012")]
    pub grpc: SocketAddr,
    /// Address of the HTTP API
    #[arg(long, env = "OUTRIGGER_HTTP", value_name = "ADDR", default_value = "127.0.0.1:15014")]
    pub http: SocketAddr,
    /// Trust domain of every identity
    #[arg(long, env = "OUTRIGGER_TRUST_DOMAIN", value_name = "NAME", default_value = "cluster.local")]
    pub trust_domain: String,
    /// Certificate of your own CA (PEM); without it a root is made at the first start
    #[arg(long, env = "OUTRIGGER_CA_CERT", value_name = "FILE", requires = "ca_key")]
    pub ca_cert: Option<PathBuf>,
    /// Key of your own CA (PEM)
    #[arg(long, env = "OUTRIGGER_CA_KEY", value_name = "FILE", requires = "ca_cert")]
    pub ca_key: Option<PathBuf>,
    /// How long a registration lasts without a renewal: 500ms, 15s, 1m
    #[arg(long, env = "OUTRIGGER_LEASE", value_name = "TIME", default_value = "15s", value_parser = lease)]
    pub lease: Duration,
    /// Logins for hosts that filters' modules come from: a Docker `config.json` (auths with auth, username and password, or
    /// registrytoken), read at each fetch
    #[arg(long, env = "OUTRIGGER_REGISTRY_CONFIG", value_name = "FILE")]
    pub registry_config: Option<PathBuf>,
    /// Authorities (PEM), beside the system's, of hosts that filters' modules come from
    #[arg(long, env = "OUTRIGGER_REGISTRY_CA", value_name = "FILE")]
    pub registry_ca: Option<PathBuf>,
    /// Registries (HOST[:PORT]) that are spoken to in plaintext, and hosts to whose http:// URLs logins are sent; those on loopback
    /// always are
    #[arg(long, env = "OUTRIGGER_REGISTRY_PLAIN_HTTP", value_name = "HOST", value_delimiter = ',')]
    pub registry_plain_http: Vec<String>,
    /// Write no join token that may join as anything (it is for trying things out)
    #[arg(long, env = "OUTRIGGER_NO_BOOTSTRAP_TOKEN")]
    pub no_bootstrap_token: bool,
    /// What is logged: error, warn, info, debug, trace, or as RUST_LOG says it
    #[arg(long, env = "OUTRIGGER_LOG", value_name = "LEVEL")]
    pub log: Option<String>,
}

fn lease(text: &str) -> Result<Duration, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| "a number with a unit is expected, as 15s".to_owned())?;
    let lease = match unit {
        "ms" => Duration::from_millis(number),
        "s" => Duration::from_secs(number),
        "m" => Duration::from_secs(number.saturating_mul(60)),
        _ => return Err(format!("the unit `{unit}` is none of ms, s, m")),
    };
    let allowed = Duration::from_millis(300)..=Duration::from_secs(3600);
    allowed.contains(&lease).then_some(lease).ok_or_else(|| "a lease is from 300ms to 60m".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_have_the_documented_defaults() {
        let flags = Flags::try_parse_from(["outrigger-control", "--config", "c", "--state", "s"]).unwrap();
        assert_eq!(flags.grpc.to_string(), "127.0.0.1:15012");
        assert_eq!(flags.http.to_string(), "127.0.0.1:15014");
        assert_eq!((flags.trust_domain.as_str(), flags.lease), ("cluster.local", Duration::from_secs(15)));
        assert!(
            Flags::try_parse_from(["outrigger-control", "--config", "c", "--state", "s", "--ca-cert", "f"]).is_err()
        );
    }

    #[test]
    fn leases_have_units_and_bounds() {
        assert_eq!(lease("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(lease("1m"), Ok(Duration::from_secs(60)));
        for bad in ["", "15", "15h", "0s", "2000m", "s"] {
            assert!(lease(bad).is_err(), "{bad}");
        }
    }
}
