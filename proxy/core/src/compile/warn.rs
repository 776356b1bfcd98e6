//! What is allowed and worth a line: references to nothing, since the other side may come later, and what has no effect.

use super::Catalog;
use super::index::{Attached, rejection};
use crate::key::ServiceKey;
use crate::resource::{Loaded, PortProtocol, Rejection, Resource, ResourceId, Target};

impl Catalog {
    /// References to nothing and the like. Looks at everything: for people who ask, not for every change.
    pub fn warnings(&self) -> Vec<Rejection> {
        let mut warnings = Vec::new();
        for (vip, claimants) in &self.vips {
            let mut claimants = claimants.iter();
            let Some(first) = claimants.next() else { continue };
            for other in claimants {
                let first =
                    ServiceKey { namespace: first.loaded.id.namespace.clone(), name: first.loaded.id.name.clone() };
                let reason = format!("{vip} is the address of Service {first} already; traffic to it goes there");
                warnings.push(rejection(&other.loaded, "spec.clusterIP", reason));
            }
        }
        // The map of addresses has no order of its own.
        warnings
            .sort_by(|one, other| (&one.file, one.line, &one.reason).cmp(&(&other.file, other.line, &other.reason)));
        for (key, attached) in &self.routes {
            for one in attached {
                if let Some(reason) = self.idle(key, one) {
                    // As the document has it: parents that are no Services are not counted here.
                    warnings.push(rejection(&one.loaded, "spec.parentRefs", reason));
                }
            }
        }
        for placed in self.resources.values() {
            let loaded = &placed.loaded;
            match &loaded.resource {
                Resource::Route(route) => {
                    for (index, rule) in route.rules.iter().enumerate() {
                        let namespace = &loaded.id.namespace;
                        for name in rule.extensions.iter().filter(|name| !self.has_http_filter(namespace, name)) {
                            let reason =
                                format!("there is no WasmFilter {namespace}/{name} for HTTP; the rule's requests fail");
                            warnings.push(rejection(loaded, &format!("spec.rules[{index}].filters"), reason));
                        }
                        for (backend, reference) in rule.backends.iter().enumerate() {
                            if let Some(reason) = self.invalid_backend(reference) {
                                let field = format!("spec.rules[{index}].backendRefs[{backend}]");
                                warnings.push(rejection(loaded, &field, reason));
                            }
                        }
                    }
                }
                Resource::TrafficPolicy(policy) => self.warn_targets(loaded, &policy.targets, &mut warnings),
                Resource::WasmFilter(filter) => self.warn_targets(loaded, &filter.targets, &mut warnings),
                _ => {}
            }
        }
        warnings
    }

    fn warn_targets(&self, loaded: &Loaded, targets: &[Target], warnings: &mut Vec<Rejection>) {
        let namespace = &loaded.id.namespace;
        for (index, target) in targets.iter().enumerate() {
            let missing = match target {
                Target::Namespace => None,
                Target::Service(name) => {
                    let key = ServiceKey { namespace: namespace.clone(), name: name.clone() };
                    (!self.services.contains_key(&key)).then(|| format!("Service {key} does not exist"))
                }
                Target::Route { grpc, name, rule } => {
                    let kind = if *grpc { "GRPCRoute" } else { "HTTPRoute" };
                    let id = ResourceId { kind: kind.to_owned(), namespace: namespace.clone(), name: name.clone() };
                    match (self.resources.get(&id).map(|placed| &placed.loaded.resource), rule) {
                        (Some(Resource::Route(route)), Some(wanted)) => {
                            let named = route.rules.iter().any(|rule| rule.name.as_ref() == Some(wanted));
                            (!named).then(|| format!("{kind} {namespace}/{name} has no rule named `{wanted}`"))
                        }
                        (Some(_), _) => None,
                        (None, _) => Some(format!("{kind} {namespace}/{name} does not exist")),
                    }
                }
            };
            if let Some(reason) = missing {
                warnings.push(rejection(loaded, &format!("spec.targetRefs[{index}]"), reason));
            }
        }
    }

    /// Why a route has no effect on one of its parents, or on a port of it.
    fn idle(&self, key: &ServiceKey, attached: &Attached) -> Option<String> {
        let Some(service) = self.find_service(key) else {
            return Some(format!("Service {key} does not exist"));
        };
        let mut http = attached.ports(service).filter(|port| port.protocol != PortProtocol::Tcp).peekable();
        if http.peek().is_none() {
            return Some(match attached.ports(service).next() {
                Some(port) => {
                    format!("port {} of Service {key} is declared as TCP, which no HTTP route is for", port.port)
                }
                None => format!("Service {key} has no such port"),
            });
        }
        if attached.route()?.grpc {
            return None;
        }
        // Consumers and producers do not meet: who loses, loses to one of its own namespace.
        let all = self.routes.get(key)?;
        let rivals = all.iter().filter(|other| other.loaded.id.namespace == attached.loaded.id.namespace);
        let rivals: Vec<_> = rivals.filter(|other| other.route().is_some_and(|route| route.grpc)).collect();
        http.find_map(|port| {
            let rival = rivals.iter().find(|rival| rival.ports(service).any(|other| other.port == port.port))?;
            Some(format!("{} takes its place on port {} of Service {key}", rival.loaded.id, port.port))
        })
    }
}
