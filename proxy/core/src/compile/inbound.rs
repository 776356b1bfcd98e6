//! `self/…`: what the proxy of one workload enforces on what comes in. And filters, of both directions.

use std::collections::{BTreeMap, BTreeSet};

use outrigger_proto::mesh::{self, MtlsMode};

use super::index::Filter;
use super::instance::{Instance, identity, selects};
use super::{Catalog, Client};
use crate::key::ServiceKey;
use crate::resource::{Action, Closed, PortProtocol, ResourceId, Rule, Target};

impl Catalog {
    pub(super) fn own(&self, client: &Client) -> Option<mesh::Self_> {
        let (namespace, workload) = (client.namespace.as_str(), client.workload.as_str());
        let instance = self.instance(namespace, workload)?;
        // A name is only claimed; the identity is proven.
        let proven = identity(&self.trust_domain, namespace, &client.service_account);
        if !instance.identity.is_empty() && instance.identity != proven {
            return None;
        }
        let authorization = self.authorization(instance);
        let ports = instance.ports.iter().map(|port| {
            let (services, declared) = self.services_of(instance, port.port);
            let protocol = if port.protocol == PortProtocol::Detect { declared } else { port.protocol };
            mesh::SelfPort {
                name: port.name.clone(),
                port: u32::from(port.port),
                protocol: protocol.wire().into(),
                mtls: self.mtls_mode(instance, port.port).into(),
                authorization: Some(authorization.clone()),
                filters: keys(self.inbound_filters(instance, &services, false)),
                stream_filters: keys(self.inbound_filters(instance, &services, true)),
                services: services.iter().map(ToString::to_string).collect(),
            }
        });
        let ports = ports.collect();
        Some(mesh::Self_ { namespace: namespace.to_owned(), workload: workload.to_owned(), ports })
    }

    /// The Services that have this port of the instance for an endpoint, and what they declare that it speaks.
    fn services_of(&self, instance: &Instance, number: u16) -> (Vec<ServiceKey>, PortProtocol) {
        let mut declared = PortProtocol::Detect;
        let mut services = Vec::new();
        let having: BTreeSet<ServiceKey> = self.having(instance).collect();
        for key in having {
            let Some(service) = self.find_service(&key) else { continue };
            let mut targeting = service
                .ports
                .iter()
                .filter(|port| instance.target(port).is_some_and(|target| target.port == number))
                .peekable();
            if targeting.peek().is_none() {
                continue;
            }
            services.push(key);
            if declared == PortProtocol::Detect {
                declared = targeting.map(|port| port.protocol).find(|p| *p != PortProtocol::Detect).unwrap_or_default();
            }
        }
        (services, declared)
    }

    /// The mode of one application port: the mesh's, the namespace's, the workload's; the later wins. Of several
    /// policies that are equally specific the strictest does.
    pub(super) fn mtls_mode(&self, instance: &Instance, port: u16) -> MtlsMode {
        let closed = |closed: &&super::ClosedPolicy| closed.closes.what == Closed::Mtls;
        if self.policies.closed.iter().filter(closed).any(|closed| governs(closed, instance)) {
            return MtlsMode::Strict;
        }
        let (mut of_namespace, mut of_workload) = (None, None);
        for policy in self.policies.mtls.get(&instance.namespace).into_iter().flatten() {
            let level = match &policy.selector {
                None => &mut of_namespace,
                Some(selector) if selects(selector, &instance.labels) => &mut of_workload,
                Some(_) => continue,
            };
            *level = stricter(*level, policy.ports.get(&port).copied().or(policy.mode));
        }
        of_workload.or(of_namespace).or(self.policies.mesh.mtls).unwrap_or(MtlsMode::Permissive)
    }

    fn authorization(&self, instance: &Instance) -> mesh::Authorization {
        let mut merged = mesh::Authorization::default();
        let closed = |closed: &&super::ClosedPolicy| closed.closes.what == Closed::Authorization;
        let mut reasons: Vec<&str> = self
            .policies
            .closed
            .iter()
            .filter(closed)
            .filter(|closed| governs(closed, instance))
            .map(|closed| closed.reason.as_str())
            .collect();
        reasons.sort_unstable();
        merged.closed = reasons.join("; ");
        let policies = self.policies.authorization.get(&instance.namespace).into_iter().flatten();
        let mut policies: Vec<_> = policies
            .filter(|named| named.policy.selector.as_ref().is_none_or(|selector| selects(selector, &instance.labels)))
            .collect();
        // By name, so that equal policies are equal bytes whatever the order of the files.
        policies.sort_by(|a, b| a.name.cmp(&b.name));
        for named in policies {
            let rules = match named.policy.action {
                Action::Allow => {
                    merged.default_deny = true;
                    &mut merged.allow
                }
                Action::Deny => &mut merged.deny,
                Action::Audit => &mut merged.audit,
            };
            rules.extend(named.policy.rules.iter().cloned());
        }
        let mut rules = merged.allow.iter().chain(&merged.deny).chain(&merged.audit);
        merged.path_rules = rules.any(|rule| rule.to.iter().any(|operation| !operation.paths.is_empty()));
        merged
    }

    fn inbound_filters(&self, instance: &Instance, services: &[ServiceKey], tcp: bool) -> Ordered {
        self.filters_where(&instance.namespace, |_, filter| {
            let spec = &filter.spec;
            let target = |target: &Target| match target {
                Target::Namespace => true,
                Target::Service(name) => services.iter().any(|service| service.name == *name),
                Target::Route { .. } => false,
            };
            let selected = spec.selector.as_ref().is_some_and(|selector| selects(selector, &instance.labels));
            !spec.outbound && spec.tcp == tcp && (selected || spec.targets.iter().any(target))
        })
    }

    /// Those that every request (or opaque connection) to a Service meets at the caller.
    pub(super) fn outbound_filters(&self, key: &ServiceKey, tcp: bool) -> Ordered {
        self.filters_where(&key.namespace, |_, filter| {
            let target = |target: &Target| match target {
                Target::Namespace => true,
                Target::Service(name) => *name == key.name,
                Target::Route { .. } => false,
            };
            filter.spec.outbound && filter.spec.tcp == tcp && filter.spec.targets.iter().any(target)
        })
    }

    /// Those that the requests of a route's rule meet: of the Service, those that target the route, and those that the rule
    /// names. `None`: no others than those of the Service.
    pub(super) fn rule_filters(
        &self,
        of_service: &Ordered,
        (grpc, id): (bool, &ResourceId),
        rule: &Rule,
    ) -> Option<Ordered> {
        let target = |target: &Target| match target {
            Target::Route { grpc: of, name, rule: only } => {
                *of == grpc && *name == id.name && (only.is_none() || *only == rule.name)
            }
            Target::Namespace | Target::Service(_) => false,
        };
        let mut own = self.filters_where(&id.namespace, |name, filter| {
            let named = !filter.spec.tcp && rule.extensions.iter().any(|named| named == name);
            named || filter.spec.targets.iter().any(target)
        });
        // What is named and not there must not be passed over (Gateway API): its absence fails the request.
        let absent = rule.extensions.iter().filter(|name| !self.has_http_filter(&id.namespace, name));
        own.extend(absent.map(|name| (i32::MIN, format!("filter/{}/{name}", id.namespace))));
        if own.is_empty() {
            return None;
        }
        own.extend(of_service.iter().cloned());
        Some(own)
    }

    pub(super) fn has_http_filter(&self, namespace: &str, name: &str) -> bool {
        self.policies.filters.get(&(namespace.to_owned(), name.to_owned())).is_some_and(|filter| !filter.spec.tcp)
    }

    /// The filters of a namespace that are attached. A FailOpen filter without its module is left out; a FailClosed one is not,
    /// and what it guards fails.
    fn filters_where(&self, namespace: &str, attached: impl Fn(&str, &Filter) -> bool) -> Ordered {
        let first = (namespace.to_owned(), String::new());
        self.policies
            .filters
            .range(first..)
            .take_while(|((of, _), _)| of == namespace)
            .filter(|((_, name), filter)| attached(name, filter))
            .filter(|(_, filter)| filter.module.is_some() || !filter.spec.fail_open)
            .map(|((_, name), filter)| (filter.spec.order, format!("filter/{namespace}/{name}")))
            .collect()
    }

    pub(super) fn filter(&self, namespace: &str, name: &str) -> Option<mesh::Filter> {
        let filter = self.policies.filters.get(&(namespace.to_owned(), name.to_owned()))?;
        let (spec, module) = (&filter.spec, filter.module.as_ref()?);
        Some(mesh::Filter {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            sha256: module.sha256.clone(),
            size: module.size,
            root_id: spec.root_id.clone(),
            configuration: spec.configuration.clone().into(),
            fail_open: spec.fail_open,
            vm_id: spec.vm_id.clone(),
            vm_configuration: spec.vm_configuration.clone().into(),
            environment: BTreeMap::clone(&spec.environment),
            memory: spec.memory,
            call_time_ms: spec.call_time,
            body: spec.body,
            backoff_ms: spec.backoff,
            max_backoff_ms: spec.max_backoff,
            order: spec.order,
            cpu_share_ppm: spec.cpu_share,
            callouts: spec.callouts,
            upstreams: spec
                .upstreams
                .iter()
                .map(|(name, (service, port))| (name.clone(), upstream(service, *port)))
                .collect(),
        })
    }
}

/// Keys of filters with the `order` of each.
pub(super) type Ordered = Vec<(i32, String)>;

/// The keys in the order in which a request meets the filters, each once.
pub(super) fn keys(mut filters: Ordered) -> Vec<String> {
    filters.sort_unstable();
    filters.dedup();
    filters.into_iter().map(|(_, key)| key).collect()
}

fn upstream(service: &ServiceKey, port: Option<u16>) -> mesh::filter::Upstream {
    let ServiceKey { namespace, name } = service.clone();
    mesh::filter::Upstream { namespace, name, port: port.unwrap_or_default().into() }
}

fn governs(closed: &super::ClosedPolicy, instance: &Instance) -> bool {
    closed.closes.namespace == instance.namespace
        && closed.closes.selector.as_ref().is_none_or(|selector| selects(selector, &instance.labels))
}

fn stricter(a: Option<MtlsMode>, b: Option<MtlsMode>) -> Option<MtlsMode> {
    let rank = |mode: MtlsMode| match mode {
        MtlsMode::Strict => 2,
        MtlsMode::Permissive => 1,
        MtlsMode::Disabled => 0,
    };
    [a, b].into_iter().flatten().max_by_key(|mode| rank(*mode))
}
