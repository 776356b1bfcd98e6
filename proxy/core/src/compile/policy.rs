//! Settings of traffic, merged: the more specific wins field by field, over the defaults of DESIGN section 8.

use outrigger_proto::mesh;
use outrigger_proto::mesh::cluster_policy::Algorithm;

use super::Catalog;
use super::index::Attachment;
use crate::key::ServiceKey;
use crate::resource::{RetryOn, Rule, Settings};

/// An ejection never lasts longer, however often it doubled.
const MAX_EJECTION_MS: u64 = 300_000;

impl Catalog {
    /// Of a Service: its own, over its namespace's, over the mesh's.
    pub(super) fn service_settings(&self, key: &ServiceKey) -> Settings {
        let namespace = self.policies.traffic.get(&Attachment::Namespace(key.namespace.clone()));
        let service = self.policies.traffic.get(&Attachment::Service(key.clone()));
        [namespace, service].into_iter().flatten().fold(self.policies.mesh.defaults.clone(), Settings::overlaid)
    }

    /// Of a rule: its own, over its route's, over those of the Service that was called.
    pub(super) fn rule_settings(
        &self,
        of_service: &Settings,
        grpc: bool,
        namespace: &str,
        name: &str,
        rule: &Rule,
    ) -> Settings {
        let at = |rule: Option<String>| {
            let (namespace, name) = (namespace.to_owned(), name.to_owned());
            self.policies.traffic.get(&Attachment::Route { grpc, namespace, name, rule })
        };
        let route = at(None);
        let own = rule.name.as_ref().and_then(|name| at(Some(name.clone())));
        let merged = [route, own].into_iter().flatten().fold(of_service.clone(), Settings::overlaid);
        // What the rule itself says stands nearest to it.
        merged.overlaid(&Settings {
            request_timeout: rule.request_timeout,
            per_try_timeout: rule.backend_timeout,
            ..Settings::default()
        })
    }
}

pub(super) fn route_policy(settings: &Settings) -> mesh::RoutePolicy {
    let on = settings.retry_on.clone().unwrap_or_else(|| RetryOn {
        connect_failure: true,
        reset: true,
        statuses: vec![502, 503, 504],
        grpc_statuses: vec![14],
    });
    let base = settings.backoff_base.unwrap_or(25);
    mesh::RoutePolicy {
        request_timeout_ms: settings.request_timeout.unwrap_or(0),
        per_try_timeout_ms: settings.per_try_timeout.unwrap_or(0),
        retries: Some(mesh::Retries {
            attempts: settings.attempts.unwrap_or(2),
            connect_failure: on.connect_failure,
            reset: on.reset,
            statuses: on.statuses,
            grpc_statuses: on.grpc_statuses,
            backoff_base_ms: base,
            // Fields merge one by one, so the two may come from different policies.
            backoff_max_ms: settings.backoff_max.unwrap_or(250).max(base),
        }),
    }
}

pub(super) fn cluster_policy(settings: &Settings) -> mesh::ClusterPolicy {
    let base_ejection = settings.base_ejection.unwrap_or(30_000);
    mesh::ClusterPolicy {
        algorithm: settings.algorithm.unwrap_or(Algorithm::PeakEwma).into(),
        connect_timeout_ms: settings.connect_timeout.unwrap_or(1_000),
        idle_timeout_ms: settings.idle_timeout.unwrap_or(300_000),
        breaker: Some(mesh::Breaker {
            max_connections: settings.max_connections.unwrap_or(1_024),
            max_pending_requests: settings.max_pending_requests.unwrap_or(1_024),
            max_requests: settings.max_requests.unwrap_or(4_096),
            max_retries: settings.max_retries.unwrap_or(64),
        }),
        outlier: Some(mesh::Outlier {
            consecutive_failures: settings.consecutive_failures.unwrap_or(5),
            base_ejection_ms: base_ejection,
            max_ejection_ms: MAX_EJECTION_MS.max(base_ejection),
            max_ejected_percent: settings.max_ejected_percent.unwrap_or(50),
        }),
        budget: Some(mesh::Budget {
            percent: settings.budget_percent.unwrap_or(20),
            min_per_second: settings.budget_min_per_second.unwrap_or(10),
        }),
    }
}
