//! The mesh of most tests: web calls reviews, of which there are two versions.

use std::net::IpAddr;

use crate::{Backend, Curl, Mesh, Proxy, Response, until};

/// Services `reviews` (both versions), `reviews-v1` and `reviews-v2`, on port 80, each version an application with its
/// proxy, and the proxy of `web` to call them through. Explicit mode.
#[derive(Debug)]
pub struct Shop {
    /// The caller's proxy
    pub web: Proxy,
    /// Proxy of version 1
    pub proxy1: Proxy,
    /// Proxy of version 2
    pub proxy2: Proxy,
    /// Application of version 1, which says `x-backend: v1`
    pub v1: Backend,
    /// Application of version 2, which says `x-backend: v2`
    pub v2: Backend,
    /// Control plane and files
    pub mesh: Mesh,
}

impl Shop {
    /// The shop with these resources beside its Services.
    pub fn start(resources: &str) -> Self {
        Self::start_with(resources, Backend::http(loopback(), "v1"), Backend::http(loopback(), "v2"))
    }

    /// The shop with applications of one's own.
    pub fn start_with(resources: &str, v1: Backend, v2: Backend) -> Self {
        // There before the first proxy joins: a certificate has the lifetime that was known when it was signed.
        let mesh = Mesh::start_with_files(&services(), &[("more.yaml", resources)]);
        let app = |name: &str, version: &str, backend: &Backend| {
            let labels = format!("app=reviews,version={version}");
            mesh.proxy(name).account("reviews").labels(&labels).app(&backend.address()).start()
        };
        let (proxy1, proxy2) = (app("reviews-v1-0", "v1", &v1), app("reviews-v2-0", "v2", &v2));
        let web = mesh.proxy("web-0").start();
        let shop = Self { web, proxy1, proxy2, v1, v2, mesh };
        for service in ["reviews-v1", "reviews-v2"] {
            until(&format!("{service} has its endpoint"), || shop.has_endpoint(service).then_some(()));
        }
        shop
    }

    /// `GET http://reviews/PATH` from web, to be sent.
    pub fn call(&self, path: &str) -> Curl {
        self.web.call("reviews", path)
    }

    /// `GET http://reviews/PATH` from web.
    pub fn get(&self, path: &str) -> Response {
        self.call(path).send()
    }

    /// Replaces the resources beside the Services.
    pub fn write(&self, resources: &str) {
        self.mesh.write("more.yaml", resources);
    }

    fn has_endpoint(&self, service: &str) -> bool {
        let endpoints = self.mesh.api("/api/v1/endpoints");
        let backend = format!("demo/{service}:80");
        endpoints.as_array().is_some_and(|all| all.iter().any(|one| one["backend"] == backend.as_str()))
    }
}

fn services() -> String {
    let service = |name: &str, selector: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: demo}}\n\
             spec: {{selector: {{{selector}}}, ports: [{{name: http, port: 80, targetPort: http}}]}}\n---\n"
        )
    };
    ["reviews", "reviews-v1", "reviews-v2"]
        .map(|name| match name.strip_prefix("reviews-") {
            Some(version) => service(name, &format!("app: reviews, version: {version}")),
            None => service(name, "app: reviews"),
        })
        .concat()
}

fn loopback() -> IpAddr {
    [127, 0, 0, 1].into()
}
