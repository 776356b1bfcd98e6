//! The smallest mesh: web calls app.

use crate::{Backend, Curl, Mesh, Proxy, Raw, until};

/// Service `app` on port 80, one application with its proxy, and the proxy of `web`. Explicit mode, one worker each.
#[derive(Debug)]
pub struct Pair {
    /// The caller's proxy
    pub web: Proxy,
    /// The application's proxy
    pub proxy: Proxy,
    /// The application
    pub app: Backend,
    /// Control plane and files
    pub mesh: Mesh,
}

impl Pair {
    /// With this application.
    pub fn start(app: Backend) -> Self {
        Self::start_with("", app, &[], &[])
    }

    /// With more resources, and more flags of web's proxy and of the application's.
    pub fn start_with(resources: &str, app: Backend, web: &[(&str, &str)], own: &[(&str, &str)]) -> Self {
        let mesh = Mesh::start(
            "apiVersion: v1\nkind: Service\nmetadata: {name: app, namespace: demo}\n\
             spec: {selector: {app: app}, ports: [{name: http, port: 80, targetPort: http}]}\n",
        );
        mesh.write("more.yaml", resources);
        let start = |builder: crate::ProxyBuilder<'_>, flags: &[(&str, &str)]| {
            let builder = builder.flag("--workers", "1");
            flags.iter().fold(builder, |builder, (name, value)| builder.flag(name, value)).start()
        };
        let proxy = start(mesh.proxy("app-0").labels("app=app,version=v1").app(&app.address()), own);
        let web = start(mesh.proxy("web-0"), web);
        until("the application is registered", || {
            mesh.api("/api/v1/endpoints").as_array().is_some_and(|all| !all.is_empty()).then_some(())
        });
        Self { web, proxy, app, mesh }
    }

    /// `GET http://app/PATH` from web, to be sent.
    pub fn call(&self, path: &str) -> Curl {
        self.web.call("app", path)
    }

    /// A connection to web's outbound listener.
    pub fn raw(&self) -> Raw {
        Raw::connect(self.web.outbound())
    }
}
