//! What proxies say of themselves: their Prometheus text, read as anybody's scraper would.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use anyhow::Context as _;
use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;

/// GET a small page.
///
/// # Errors
/// When it cannot be had, or is no success.
pub(super) async fn get(address: SocketAddr, path: &str) -> anyhow::Result<String> {
    let client: Client<_, Full<Bytes>> = Client::builder(TokioExecutor::new()).build_http();
    let request = Request::get(format!("http://{address}{path}")).body(Full::default())?;
    let answer = tokio::time::timeout(std::time::Duration::from_secs(2), client.request(request))
        .await
        .with_context(|| format!("{address}{path}: no answer"))?
        .with_context(|| format!("{address}{path}"))?;
    let status = answer.status();
    let body = answer.into_body().collect().await?.to_bytes();
    anyhow::ensure!(status.is_success(), "{address}{path}: {status}");
    Ok(String::from_utf8_lossy(&body).into_owned())
}

/// One sample of the Prometheus text.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Sample {
    pub(super) name: String,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) value: f64,
}

impl Sample {
    /// A label's value, "" when it has none.
    pub(super) fn label(&self, name: &str) -> &str {
        self.labels.get(name).map_or("", String::as_str)
    }
}

/// The samples of a scrape.
#[derive(Debug, Clone, Default)]
pub(super) struct Scrape(Vec<Sample>);

impl Scrape {
    /// Scrapes a proxy.
    ///
    /// # Errors
    /// When it does not answer.
    pub(super) async fn of(health: SocketAddr) -> anyhow::Result<Self> {
        Ok(Self::parse(&get(health, "/metrics").await?))
    }

    fn parse(text: &str) -> Self {
        Self(text.lines().filter(|line| !line.starts_with('#')).filter_map(sample).collect())
    }

    /// The samples of one name whose labels include these.
    pub(super) fn of_name<'a>(&'a self, name: &'a str, labels: &'a [(&str, &str)]) -> impl Iterator<Item = &'a Sample> {
        self.0
            .iter()
            .filter(move |sample| sample.name == name && labels.iter().all(|(key, value)| sample.label(key) == *value))
    }

    /// The sum of them.
    pub(super) fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        // An empty sum of floats is -0.
        self.of_name(name, labels).map(|sample| sample.value).sum::<f64>() + 0.0
    }

    /// Upper bound of the bucket that holds the quantile, in seconds, of what was recorded since `before`.
    pub(super) fn quantile(&self, before: &Self, name: &str, labels: &[(&str, &str)], quantile: f64) -> Option<f64> {
        let bucket = format!("{name}_bucket");
        let mut counts: Vec<(f64, f64)> = Vec::new();
        for sample in self.of_name(&bucket, labels) {
            let bound = match sample.label("le") {
                "+Inf" => f64::INFINITY,
                text => text.parse().ok()?,
            };
            let le = [("le", sample.label("le"))];
            let value = sample.value
                - before
                    .of_name(&bucket, labels)
                    .filter(|old| old.label("le") == le[0].1)
                    .map(|old| old.value)
                    .sum::<f64>();
            match counts.iter_mut().find(|(of, _)| *of == bound) {
                Some((_, count)) => *count += value,
                None => counts.push((bound, value)),
            }
        }
        counts.sort_by(|a, b| a.0.total_cmp(&b.0));
        let total = counts.last()?.1;
        (total > 0.0).then(|| counts.iter().find(|(_, count)| *count >= total * quantile).map(|(bound, _)| *bound))?
    }
}

/// `name{label="value",…} value`
fn sample(line: &str) -> Option<Sample> {
    let (head, value) = line.rsplit_once(' ')?;
    let value = value.parse().ok()?;
    let Some((name, rest)) = head.split_once('{') else {
        return Some(Sample { name: head.to_owned(), labels: BTreeMap::new(), value });
    };
    let mut labels = BTreeMap::new();
    let mut rest = rest.strip_suffix('}')?;
    while let Some((key, after)) = rest.split_once("=\"") {
        let end = closing_quote(after)?;
        labels.insert(key.trim_start_matches(',').to_owned(), after[..end].replace("\\\"", "\"").replace("\\\\", "\\"));
        rest = &after[end + 1..];
    }
    Some(Sample { name: name.to_owned(), labels, value })
}

fn closing_quote(text: &str) -> Option<usize> {
    let mut escaped = false;
    text.bytes().position(|byte| {
        let end = byte == b'"' && !escaped;
        escaped = byte == b'\\' && !escaped;
        end
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# HELP a b\na{x=\"1\",y=\"q\\\"},z\"} 3\na{x=\"2\"} 4\nplain 5\n\
        h_bucket{le=\"0.1\"} 5\nh_bucket{le=\"0.5\"} 9\nh_bucket{le=\"+Inf\"} 10\n";

    #[test]
    fn samples_are_read_with_their_labels() {
        let scrape = Scrape::parse(TEXT);
        assert_eq!(scrape.sum("a", &[]), 7.0);
        assert_eq!(scrape.sum("a", &[("x", "2")]), 4.0);
        assert_eq!(scrape.of_name("a", &[("x", "1")]).next().unwrap().label("y"), "q\"},z");
        assert_eq!(scrape.sum("plain", &[]), 5.0);
    }

    #[test]
    fn quantiles_count_what_came_since() {
        let scrape = Scrape::parse(TEXT);
        assert_eq!(scrape.quantile(&Scrape::default(), "h", &[], 0.5), Some(0.1));
        assert_eq!(scrape.quantile(&Scrape::default(), "h", &[], 0.9), Some(0.5));
        assert_eq!(scrape.quantile(&scrape, "h", &[], 0.9), None);
    }
}
