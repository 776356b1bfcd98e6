//! `outrigger status`: what the control plane knows of its proxies and of what it could not accept.

use std::process::ExitCode;

use anyhow::Context as _;
use outrigger_core::resource::Rejection;
use serde::Deserialize;

use crate::Global;
use crate::output::{self, Format, table};

/// `GET /api/v1/status`, the part that is shown.
#[derive(Debug, Deserialize)]
struct Status {
    #[serde(default)]
    rejections: Vec<Rejected>,
    #[serde(default)]
    refusals: Vec<Refusal>,
}

/// A resource that was not accepted.
#[derive(Debug, Deserialize)]
struct Rejected {
    #[serde(flatten)]
    rejection: Rejection,
    /// What goes on in its place: `last good`, `nothing`, or `closed`
    #[serde(default)]
    serving: String,
}

/// A call that was refused.
#[derive(Debug, Deserialize)]
struct Refusal {
    call: String,
    caller: String,
    reason: String,
}

/// One of `GET /api/v1/proxies`.
#[derive(Debug, Deserialize)]
struct Proxy {
    namespace: String,
    workload: String,
    #[serde(default)]
    connected: bool,
    #[serde(default)]
    acknowledged: u64,
    #[serde(default)]
    pending: u64,
    #[serde(default)]
    nacks: Vec<Nack>,
}

/// A resource that a proxy refused.
#[derive(Debug, Deserialize)]
struct Nack {
    resource: String,
    reason: String,
}

/// Fails (exit code 1) when something is rejected or refused by a proxy, so that a pipeline can wait for it.
pub(crate) fn run(global: &Global) -> anyhow::Result<ExitCode> {
    let control = global.control()?;
    let status = control.get("/api/v1/status")?;
    let proxies = control.get("/api/v1/proxies")?;
    let parsed: Status =
        serde_json::from_value(status.clone()).context("/api/v1/status: not what this version reads")?;
    let rows: Vec<Proxy> =
        serde_json::from_value(proxies.clone()).context("/api/v1/proxies: not what this version reads")?;
    match global.output {
        Format::Json => output::json(&serde_json::json!({ "status": status, "proxies": proxies }))?,
        Format::Table => output::line(render(&parsed, &rows).trim_end())?,
    }
    // What a proxy that is away refused says nothing about now.
    let well = parsed.rejections.is_empty() && rows.iter().all(|proxy| !proxy.connected || proxy.nacks.is_empty());
    Ok(if well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn render(status: &Status, proxies: &[Proxy]) -> String {
    let mut text = String::new();
    if proxies.is_empty() {
        text.push_str("no proxies\n");
    } else {
        let rows: Vec<Vec<String>> = proxies.iter().map(row).collect();
        text.push_str(&table(&["NAMESPACE", "PROXY", "STATE", "ACK", "PENDING", "NACK"], &rows));
    }
    let nacks = proxies.iter().flat_map(|proxy| {
        let who = format!("{}/{}", proxy.namespace, proxy.workload);
        proxy.nacks.iter().map(move |nack| vec![who.clone(), nack.resource.clone(), nack.reason.clone()])
    });
    section(
        &mut text,
        "\nrefused by proxies (their last version goes on serving):\n",
        &["PROXY", "RESOURCE", "REASON"],
        nacks,
    );
    let rejected = status.rejections.iter().map(|Rejected { rejection, serving }| {
        let serving = if serving == "last good" { "earlier version" } else { serving };
        vec![rejection.to_string(), serving.to_owned()]
    });
    section(&mut text, "\nrejected resources:\n", &["RESOURCE AND REASON", "SERVING"], rejected);
    let refusals = status
        .refusals
        .iter()
        .map(|refusal| vec![refusal.call.clone(), refusal.caller.clone(), refusal.reason.clone()]);
    section(&mut text, "\nrefused calls:\n", &["CALL", "CALLER", "REASON"], refusals);
    text
}

fn row(proxy: &Proxy) -> Vec<String> {
    let state = if proxy.connected { "connected" } else { "away" };
    vec![
        proxy.namespace.clone(),
        proxy.workload.clone(),
        state.to_owned(),
        proxy.acknowledged.to_string(),
        proxy.pending.to_string(),
        proxy.nacks.len().to_string(),
    ]
}

/// A titled table, or nothing when there are no rows.
fn section(text: &mut String, title: &str, header: &[&str], rows: impl Iterator<Item = Vec<String>>) {
    let rows: Vec<Vec<String>> = rows.collect();
    if !rows.is_empty() {
        text.push_str(title);
        text.push_str(&table(header, &rows));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_serves_in_place_of_a_rejected_resource_is_named() {
        let rejection = |serving: &str| {
            json!({"file": "p.yaml", "line": 1, "kind": "MtlsPolicy", "namespace": "demo", "name": "p", "field": "spec",
                "reason": "bad", "serving": serving})
        };
        for (serving, shown) in [("last good", "earlier version"), ("closed", "closed"), ("nothing", "nothing")] {
            let status: Status = serde_json::from_value(json!({"rejections": [rejection(serving)]})).unwrap();
            let text = render(&status, &[]);
            assert!(text.trim_end().ends_with(shown), "{text}");
        }
    }
}
