//! `outrigger token create`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use clap::Subcommand;

use crate::Global;
use crate::output::{self, Format};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: TokenCommand,
}

#[derive(Debug, Subcommand)]
enum TokenCommand {
    /// Make a join token for the proxies of one namespace and service account; it is printed alone, for a file
    Create(Create),
}

#[derive(Debug, clap::Args)]
struct Create {
    /// Namespace that a holder may join
    #[arg(long)]
    namespace: String,
    /// Service account that a holder may join
    #[arg(long)]
    service_account: String,
    /// Labels that a holder may register with, app=reviews,version=v1; none when left out
    #[arg(long, default_value = "", value_parser = labels)]
    labels: Labels,
    /// Addresses (or CIDR blocks) that a holder may register; any when left out
    #[arg(long, value_delimiter = ',', value_name = "ADDRESSES")]
    addresses: Vec<String>,
    /// How long the token is accepted: 90s, 15m, 1h, 7d
    #[arg(long, default_value = "1h", value_parser = seconds)]
    ttl: u64,
    /// Accepted once
    #[arg(long)]
    single_use: bool,
    #[command(flatten)]
    admin: Admin,
}

/// Where the administrator's token is, which everything that changes something needs.
#[derive(Debug, clap::Args)]
pub(crate) struct Admin {
    /// State directory of the control plane, which has the administrator's token
    #[arg(long, env = "OUTRIGGER_STATE", value_name = "DIR", conflicts_with = "admin_token_file")]
    state: Option<PathBuf>,
    /// File with the administrator's token
    #[arg(long, env = "OUTRIGGER_ADMIN_TOKEN_FILE", value_name = "FILE")]
    admin_token_file: Option<PathBuf>,
}

type Labels = BTreeMap<String, String>;

pub(crate) fn run(args: &Args, global: &Global) -> anyhow::Result<ExitCode> {
    let TokenCommand::Create(create) = &args.command;
    let admin = create.admin.token()?;
    let body = serde_json::json!({
        "namespace": create.namespace,
        "serviceAccount": create.service_account,
        "labels": create.labels,
        "addresses": create.addresses,
        "ttlSeconds": create.ttl,
        "singleUse": create.single_use,
    });
    let answer = global.control()?.post("/api/v1/tokens", &admin, &body)?;
    match global.output {
        Format::Json => output::json(&answer)?,
        Format::Table => {
            let token = answer["token"].as_str().context("the control plane's answer has no token")?;
            output::line(token)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

impl Admin {
    /// The token.
    pub(crate) fn token(&self) -> anyhow::Result<String> {
        let file = match (&self.admin_token_file, &self.state) {
            (Some(file), _) => file.clone(),
            (None, Some(state)) => state.join("admin-token"),
            (None, None) => bail!(
                "this needs the administrator's token: give --state (the control plane's state directory) or --admin-token-file"
            ),
        };
        let token = std::fs::read_to_string(&file).with_context(|| {
            format!(
                "{}: cannot read the administrator's token; the control plane writes it at its first start",
                file.display()
            )
        })?;
        Ok(token.trim().to_owned())
    }
}

fn labels(text: &str) -> Result<Labels, String> {
    let pairs = text.split(',').filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| match pair.split_once('=') {
            Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
            _ => Err(format!("`{pair}` is not NAME=VALUE")),
        })
        .collect()
}

/// Seconds of `90s`, `15m`, `1h`, `7d`.
fn seconds(text: &str) -> Result<u64, String> {
    let explain = || format!("`{text}` is no duration: write 90s, 15m, 1h or 7d");
    let split = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(explain)?;
    let number: u64 = text[..split].parse().map_err(|_| explain())?;
    let unit = match &text[split..] {
        "s" => 1,
        "m" => 60,
        "h" => 3_600,
        "d" => 86_400,
        _ => return Err(explain()),
    };
    number.checked_mul(unit).filter(|seconds| *seconds > 0).ok_or_else(explain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        assert_eq!(seconds("90s"), Ok(90));
        assert_eq!(seconds("1h"), Ok(3_600));
        for bad in ["", "h", "1", "0s", "-1s", "1w", "99999999999999999d"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn label_lists() {
        assert!(labels("").unwrap().is_empty());
        assert_eq!(labels("a=b,c=").unwrap().len(), 2);
        assert!(labels("a").is_err());
        assert!(labels("=b").is_err());
    }
}
