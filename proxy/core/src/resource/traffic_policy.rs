//! `TrafficPolicy`: balancing, limits, retries and timeouts; every field by itself optional, so that policies merge field
//! by field.

use outrigger_proto::mesh::cluster_policy::Algorithm;
use serde::Deserialize;
use serde_json::Value;

use super::decode::{Bad, decode};
use super::meta::{Target, TargetRef, targets};
use super::value::{Millis, NotYet, scalar};

/// A TrafficPolicy.
#[derive(Debug, Clone)]
pub struct TrafficPolicy {
    /// What it is about
    pub targets: Vec<Target>,
    /// What it says
    pub settings: Settings,
}

/// Settings of traffic; `None`: not said here. Durations in milliseconds, 0 for none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[allow(missing_docs)] // The names are those of the YAML.
pub struct Settings {
    pub algorithm: Option<Algorithm>,
    pub max_connections: Option<u32>,
    pub max_pending_requests: Option<u32>,
    pub max_requests: Option<u32>,
    pub max_retries: Option<u32>,
    pub consecutive_failures: Option<u32>,
    pub base_ejection: Option<u64>,
    pub max_ejected_percent: Option<u32>,
    pub attempts: Option<u32>,
    pub retry_on: Option<RetryOn>,
    pub backoff_base: Option<u64>,
    pub backoff_max: Option<u64>,
    pub budget_percent: Option<u32>,
    pub budget_min_per_second: Option<u32>,
    pub per_try_timeout: Option<u64>,
    pub request_timeout: Option<u64>,
    pub connect_timeout: Option<u64>,
    pub idle_timeout: Option<u64>,
}

/// What is retried.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RetryOn {
    /// Connecting failed
    pub connect_failure: bool,
    /// Reset before a response
    pub reset: bool,
    /// HTTP statuses
    pub statuses: Vec<u32>,
    /// gRPC status codes
    pub grpc_statuses: Vec<u32>,
}

impl Settings {
    /// These settings, with what `specific` says in its place.
    #[must_use]
    pub fn overlaid(mut self, specific: &Self) -> Self {
        macro_rules! overlay {
            ($($field:ident),*) => {
                $(if specific.$field.is_some() { self.$field.clone_from(&specific.$field); })*
            };
        }
        overlay!(
            algorithm,
            max_connections,
            max_pending_requests,
            max_requests,
            max_retries,
            consecutive_failures,
            base_ejection,
            max_ejected_percent,
            attempts,
            retry_on,
            backoff_base,
            backoff_max,
            budget_percent,
            budget_min_per_second,
            per_try_timeout,
            request_timeout,
            connect_timeout,
            idle_timeout
        );
        self
    }
}

#[derive(Debug, Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(crate) struct Spec {
    target_refs: Option<Vec<TargetRef>>,
    load_balancer: LoadBalancer,
    circuit_breaker: CircuitBreaker,
    outlier_detection: OutlierDetection,
    retries: Retries,
    timeouts: Timeouts,
    #[serde(rename = "healthCheck")]
    _health_check: Option<NotYet>,
    #[serde(rename = "faults")]
    _faults: Option<NotYet>,
    #[serde(rename = "rateLimit")]
    _rate_limit: Option<NotYet>,
}

#[derive(Debug, Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct LoadBalancer {
    algorithm: Option<AlgorithmName>,
    #[serde(rename = "hashOn")]
    _hash_on: Option<NotYet>,
    #[serde(rename = "locality")]
    _locality: Option<NotYet>,
    #[serde(rename = "slowStart")]
    _slow_start: Option<NotYet>,
}

#[derive(Debug, Deserialize, Clone, Copy)]
enum AlgorithmName {
    PeakEwma,
    LeastRequest,
    RoundRobin,
    Random,
    Maglev,
}

#[derive(Debug, Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct CircuitBreaker {
    max_connections: Option<u32>,
    max_pending_requests: Option<u32>,
    max_requests: Option<u32>,
    max_retries: Option<u32>,
}

#[derive(Debug, Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct OutlierDetection {
    consecutive_failures: Option<u32>,
    base_ejection: Option<Millis>,
    max_ejected_percent: Option<u32>,
    #[serde(rename = "successRate")]
    _success_rate: Option<NotYet>,
}

#[derive(Debug, Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Retries {
    attempts: Option<u32>,
    on: Option<Vec<Condition>>,
    backoff: Backoff,
    budget: Budget,
    per_try_timeout: Option<Millis>,
}

#[derive(Debug, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct Backoff {
    base: Option<Millis>,
    max: Option<Millis>,
}

#[derive(Debug, Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Budget {
    percent: Option<u32>,
    min_per_second: Option<u32>,
}

#[derive(Debug, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct Timeouts {
    request: Option<Millis>,
    connect: Option<Millis>,
    idle: Option<Millis>,
}

/// One entry of `retries.on`.
#[derive(Debug, Clone, Copy)]
enum Condition {
    ConnectFailure,
    Reset,
    Status(u32),
    Grpc(u32),
}

scalar!(Condition);

/// gRPC's names of its codes, by code.
const GRPC: [&str; 17] = [
    "ok",
    "cancelled",
    "unknown",
    "invalid-argument",
    "deadline-exceeded",
    "not-found",
    "already-exists",
    "permission-denied",
    "resource-exhausted",
    "failed-precondition",
    "aborted",
    "out-of-range",
    "unimplemented",
    "internal",
    "unavailable",
    "data-loss",
    "unauthenticated",
];

impl std::str::FromStr for Condition {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "`{text}` is no reason to retry; write connect-failure, reset, a status from 500 to 599 or 429, or grpc-<code> as grpc-unavailable"
            )
        };
        if let Some(name) = text.strip_prefix("grpc-") {
            let code = GRPC.iter().skip(1).position(|code| *code == name).ok_or_else(wrong)?;
            return Ok(Self::Grpc(u32::try_from(code + 1).map_err(|_| wrong())?));
        }
        match text {
            "connect-failure" => Ok(Self::ConnectFailure),
            "reset" => Ok(Self::Reset),
            _ => match text.parse() {
                Ok(status @ (429 | 500..=599)) => Ok(Self::Status(status)),
                _ => Err(wrong()),
            },
        }
    }
}

pub(crate) fn read(spec: &Value, namespace: &str) -> Result<TrafficPolicy, Bad> {
    let mut spec: Spec = decode(spec, "spec", &[])?;
    let refs = spec.target_refs.take().ok_or_else(|| Bad::new("spec.targetRefs", "missing; it is required"))?;
    let targets = targets(refs, "spec.targetRefs", namespace)?;
    let settings = settings(spec, "spec")?;
    if targets.iter().any(|target| matches!(target, Target::Route { .. })) {
        per_service_only(&settings)?;
    }
    Ok(TrafficPolicy { targets, settings })
}

/// Breakers, balancing and connections belong to a service, whatever route a request took to it.
fn per_service_only(settings: &Settings) -> Result<(), Bad> {
    let s = settings;
    let wrong = [
        ("spec.loadBalancer", s.algorithm.is_some()),
        (
            "spec.circuitBreaker",
            [s.max_connections, s.max_pending_requests, s.max_requests, s.max_retries].iter().any(Option::is_some),
        ),
        (
            "spec.outlierDetection",
            s.consecutive_failures.is_some() || s.base_ejection.is_some() || s.max_ejected_percent.is_some(),
        ),
        ("spec.retries.budget", s.budget_percent.is_some() || s.budget_min_per_second.is_some()),
        ("spec.timeouts.connect", s.connect_timeout.is_some()),
        ("spec.timeouts.idle", s.idle_timeout.is_some()),
    ];
    match wrong.iter().find(|(_, given)| *given) {
        Some((field, _)) => {
            Err(Bad::new(*field, "belongs to a Service or Namespace, not to a route; put it into a policy of its own"))
        }
        None => Ok(()),
    }
}

/// `defaults` of MeshConfig.
pub(crate) fn defaults(spec: Spec, at: &str) -> Result<Settings, Bad> {
    match spec.target_refs {
        Some(_) => Err(Bad::new(format!("{at}.targetRefs"), "defaults are for the whole mesh; remove it")),
        None => settings(spec, at),
    }
}

fn settings(spec: Spec, at: &str) -> Result<Settings, Bad> {
    let Spec { load_balancer, circuit_breaker: breaker, outlier_detection: outlier, retries, timeouts, .. } = spec;
    let bad = |field: &str, reason: &str| Err(Bad::new(format!("{at}.{field}"), reason));
    for (field, limit) in [
        ("maxConnections", breaker.max_connections),
        ("maxPendingRequests", breaker.max_pending_requests),
        ("maxRequests", breaker.max_requests),
    ] {
        if limit == Some(0) {
            return bad(&format!("circuitBreaker.{field}"), "0 would refuse everything; write at least 1");
        }
    }
    if outlier.max_ejected_percent.is_some_and(|percent| percent > 100) {
        return bad("outlierDetection.maxEjectedPercent", "a percentage is at most 100");
    }
    if outlier.base_ejection == Some(Millis(0)) {
        return bad(
            "outlierDetection.baseEjection",
            "0s ejects nothing; set consecutiveFailures to 0 to switch it off",
        );
    }
    if retries.budget.percent.is_some_and(|percent| percent > 100) {
        return bad("retries.budget.percent", "a percentage is at most 100");
    }
    if retries.attempts.is_some_and(|attempts| attempts > 10) {
        return bad("retries.attempts", "more than 10 retries make an outage worse; write at most 10");
    }
    if let (Some(base), Some(max)) = (retries.backoff.base, retries.backoff.max)
        && base.0 > max.0
    {
        return bad("retries.backoff.base", "longer than backoff.max");
    }
    if timeouts.connect == Some(Millis(0)) {
        return bad("timeouts.connect", "connecting needs a limit; write a duration above 0s");
    }
    let algorithm = match load_balancer.algorithm {
        Some(AlgorithmName::Maglev) => return bad("loadBalancer.algorithm", "Maglev is not supported yet"),
        Some(AlgorithmName::PeakEwma) => Some(Algorithm::PeakEwma),
        Some(AlgorithmName::LeastRequest) => Some(Algorithm::LeastRequest),
        Some(AlgorithmName::RoundRobin) => Some(Algorithm::RoundRobin),
        Some(AlgorithmName::Random) => Some(Algorithm::Random),
        None => None,
    };
    let millis = |value: Option<Millis>| value.map(|millis| millis.0);
    Ok(Settings {
        algorithm,
        max_connections: breaker.max_connections,
        max_pending_requests: breaker.max_pending_requests,
        max_requests: breaker.max_requests,
        max_retries: breaker.max_retries,
        consecutive_failures: outlier.consecutive_failures,
        base_ejection: millis(outlier.base_ejection),
        max_ejected_percent: outlier.max_ejected_percent,
        attempts: retries.attempts,
        retry_on: retries.on.map(|on| retry_on(&on)),
        backoff_base: millis(retries.backoff.base),
        backoff_max: millis(retries.backoff.max),
        budget_percent: retries.budget.percent,
        budget_min_per_second: retries.budget.min_per_second,
        per_try_timeout: millis(retries.per_try_timeout),
        request_timeout: millis(timeouts.request),
        connect_timeout: millis(timeouts.connect),
        idle_timeout: millis(timeouts.idle),
    })
}

fn retry_on(conditions: &[Condition]) -> RetryOn {
    let mut on = RetryOn::default();
    for condition in conditions {
        match *condition {
            Condition::ConnectFailure => on.connect_failure = true,
            Condition::Reset => on.reset = true,
            Condition::Status(status) => on.statuses.push(status),
            Condition::Grpc(code) => on.grpc_statuses.push(code),
        }
    }
    for codes in [&mut on.statuses, &mut on.grpc_statuses] {
        codes.sort_unstable();
        codes.dedup();
    }
    on
}
