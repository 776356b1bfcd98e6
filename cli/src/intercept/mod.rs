//! `outrigger intercept`: nftables rules that bring an application's traffic to its proxy.

mod rules;

use std::io::Write as _;
use std::net::SocketAddr;
use std::process::{Command, ExitCode, Output, Stdio};

use anyhow::{Context as _, bail};
use clap::Subcommand;
use serde_json::json;

use crate::output::{self, Format};
use rules::{Difference, Rules};

/// Redirects the TCP traffic of this network namespace to the proxy beside the application.
///
/// What the application sends goes to --outbound, what others send to it goes to --inbound. Not redirected: the
/// proxy's own traffic (--uid), loopback, the health port, and what --exclude-… names.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: InterceptCommand,
}

#[derive(Debug, Subcommand)]
enum InterceptCommand {
    /// Install the rules; replaces earlier ones in one transaction
    Install(Flags),
    /// Remove the rules
    Remove,
    /// Fail unless exactly the rules that `install` would make with the same flags are there
    Check(Flags),
}

#[derive(Debug, Clone, clap::Args)]
struct Flags {
    /// Port of the proxy's outbound listener (of ADDR:PORT, the port counts)
    #[arg(long, env = "OUTRIGGER_OUTBOUND", default_value = "15001", value_parser = port)]
    outbound: u16,
    /// Port of the proxy's inbound listener
    #[arg(long, env = "OUTRIGGER_INBOUND", default_value = "15006", value_parser = port)]
    inbound: u16,
    /// Port of the proxy's health listener: reached as it is
    #[arg(long, env = "OUTRIGGER_HEALTH", default_value = "15020", value_parser = port)]
    health: u16,
    /// UID that the proxy runs as
    #[arg(long, env = "OUTRIGGER_UID", default_value_t = 1337)]
    uid: u32,
    /// Ports of others that the application reaches without the proxy: 3306,5432
    #[arg(long, env = "OUTRIGGER_EXCLUDE_OUTBOUND", value_delimiter = ',', value_name = "PORTS")]
    exclude_outbound: Vec<u16>,
    /// Addresses that the application reaches without the proxy: 169.254.169.254/32,fd00::/8
    #[arg(long, env = "OUTRIGGER_EXCLUDE_CIDRS", value_delimiter = ',', value_name = "CIDRS")]
    exclude_cidrs: Vec<ipnet::IpNet>,
    /// Ports of this host that others reach without the proxy. SSH, so that a virtual machine stays reachable;
    /// --exclude-inbound= (nothing) redirects it too
    #[arg(long, env = "OUTRIGGER_EXCLUDE_INBOUND", value_name = "PORTS", default_value = "22", value_parser = ports)]
    exclude_inbound: Ports,
}

type Ports = std::collections::BTreeSet<u16>;

pub(crate) fn run(args: &Args, format: Format) -> anyhow::Result<ExitCode> {
    match &args.command {
        InterceptCommand::Install(flags) => install(flags, format),
        InterceptCommand::Remove => remove(format),
        InterceptCommand::Check(flags) => check(flags, format),
    }
}

fn install(flags: &Flags, format: Format) -> anyhow::Result<ExitCode> {
    let rules = Rules::new(flags);
    let ran = nft(&["-f", "-"], &rules.script())?;
    if !ran.status.success() {
        bail!("{}", explain(&ran));
    }
    match format {
        Format::Json => output::json(&json!({ "installed": true, "rules": rules.lines() }))?,
        Format::Table => {
            output::line(&format!(
                "interception installed: outbound TCP to port {}, inbound TCP to port {}; the proxy must run as UID {}",
                flags.outbound, flags.inbound, flags.uid
            ))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn remove(format: Format) -> anyhow::Result<ExitCode> {
    let there = listing()?.is_some();
    if there {
        let ran = nft(&["-f", "-"], rules::REMOVE)?;
        if !ran.status.success() {
            bail!("{}", explain(&ran));
        }
    }
    match format {
        Format::Json => output::json(&json!({ "removed": there }))?,
        Format::Table => output::line(if there { "interception removed" } else { "nothing to remove" })?,
    }
    Ok(ExitCode::SUCCESS)
}

fn check(flags: &Flags, format: Format) -> anyhow::Result<ExitCode> {
    let differences = Rules::new(flags).compare(listing()?.as_deref().unwrap_or_default());
    match format {
        Format::Json => output::json(&json!({ "ok": differences.is_empty(), "differences": differences }))?,
        Format::Table if differences.is_empty() => output::line("interception is as it should be")?,
        Format::Table => {
            for Difference { chain, missing, rule } in &differences {
                let what = if *missing { "missing" } else { "unexpected" };
                output::error(&format!("{what} in chain {chain}: {rule}"));
            }
            output::error("interception is not as it should be: run `outrigger intercept install` with the same flags");
        }
    }
    Ok(if differences.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The table as nft prints it, or `None` when there is none.
fn listing() -> anyhow::Result<Option<String>> {
    let ran = nft(&["--numeric", "--stateless", "list", "tables", "inet"], "")?;
    if !ran.status.success() {
        bail!("{}", explain(&ran));
    }
    let tables = String::from_utf8_lossy(&ran.stdout);
    if !tables.lines().any(|line| line.trim() == format!("table inet {}", rules::TABLE)) {
        return Ok(None);
    }
    let ran = nft(&["--numeric", "--stateless", "list", "table", "inet", rules::TABLE], "")?;
    if !ran.status.success() {
        bail!("{}", explain(&ran));
    }
    Ok(Some(String::from_utf8_lossy(&ran.stdout).into_owned()))
}

fn nft(args: &[&str], script: &str) -> anyhow::Result<Output> {
    // Not every user's PATH has the directories of nft.
    let path = std::env::var("PATH").unwrap_or_default();
    let mut child = Command::new("nft")
        .args(args)
        .env("PATH", format!("{path}:/usr/sbin:/sbin"))
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => {
                anyhow::anyhow!("nft is missing: install nftables (apt install nftables)")
            }
            _ => anyhow::anyhow!("cannot run nft: {error}"),
        })?;
    if let Some(mut stdin) = child.stdin.take() {
        // nft that stops reading early says why on stderr, which is reported below.
        let _ = stdin.write_all(script.as_bytes());
    }
    child.wait_with_output().context("cannot run nft")
}

/// Why nft failed, with the remedy.
fn explain(ran: &Output) -> String {
    let said = String::from_utf8_lossy(&ran.stderr);
    let said = said.trim();
    if said.contains("Operation not permitted") || said.contains("must be root") {
        "nft may not change rules here: run as root, or with CAP_NET_ADMIN in this network namespace".to_owned()
    } else {
        format!("nft failed ({}): {said}", ran.status)
    }
}

/// A port, also of the `ADDR:PORT` that the proxy's flag (and variable) of the same name has.
fn port(text: &str) -> Result<u16, String> {
    let port = text.parse::<SocketAddr>().map(|address| address.port()).or_else(|_| text.parse::<u16>());
    port.ok().filter(|port| *port != 0).ok_or_else(|| format!("`{text}` is neither PORT nor ADDR:PORT"))
}

fn ports(text: &str) -> Result<Ports, String> {
    let items = text.split(',').filter(|item| !item.is_empty());
    items.map(|item| item.parse().map_err(|_| format!("`{item}` is no port"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read_from_both_forms() {
        assert_eq!(port("15001"), Ok(15001));
        assert_eq!(port("[::]:15006"), Ok(15006));
        assert_eq!(port("127.0.0.1:1"), Ok(1));
        for bad in ["", "0", "x", "70000", "127.0.0.1"] {
            assert!(port(bad).is_err(), "{bad}");
        }
        assert!(ports("").unwrap().is_empty());
        assert_eq!(ports("22,80").unwrap(), Ports::from([22, 80]));
        assert!(ports("22,x").is_err());
    }
}
