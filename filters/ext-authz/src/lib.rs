//! Asks an HTTP service whether a request may pass.
//!
//! The service, one of the `WasmFilter`'s `upstreams`, gets `GET <path>` with `x-original-method`, `x-original-path`, `x-original-host` and the headers
//! configured. 2xx lets the request pass, with the answer's headers `copy`; 401, 403 and redirections go to the client as they are. Anything else, and no
//! answer in time, is `onFailure`.
//!
//! ```json
//! {"upstream": "authz", "path": "/check", "headers": ["authorization"], "copy": ["x-user"], "timeoutMs": 500, "onFailure": "deny"}
//! ```

use std::rc::Rc;
use std::time::Duration;

use proxy_wasm::hostcalls;
use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::{Action, ContextType, LogLevel};
use serde::Deserialize;

proxy_wasm::main! {{
    proxy_wasm::set_log_level(LogLevel::Info);
    proxy_wasm::set_root_context(|_| Box::new(Root::default()));
}}

/// What an answer's head says to a client whose request it refuses.
const FORWARDED: [&str; 4] = ["www-authenticate", "location", "set-cookie", "content-type"];

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Written {
    upstream: String,
    #[serde(default = "root")]
    path: String,
    #[serde(default)]
    headers: Vec<String>,
    #[serde(default)]
    copy: Vec<String>,
    #[serde(default = "timeout")]
    timeout_ms: u64,
    #[serde(default)]
    on_failure: Verdict,
}

fn root() -> String {
    "/".into()
}

fn timeout() -> u64 {
    500
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    #[default]
    Deny,
    Allow,
}

#[derive(Default)]
struct Root {
    asked: Option<Rc<Written>>,
}

impl Context for Root {}

impl RootContext for Root {
    fn on_configure(&mut self, _size: usize) -> bool {
        self.asked = filter_config::read(self).map(Rc::new);
        self.asked.is_some()
    }

    fn create_http_context(&self, _id: u32) -> Option<Box<dyn HttpContext>> {
        Some(Box::new(Exchange { asked: Rc::clone(self.asked.as_ref()?) }))
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(ContextType::HttpContext)
    }
}

struct Exchange {
    asked: Rc<Written>,
}

impl HttpContext for Exchange {
    fn on_http_request_headers(&mut self, _count: usize, _end_of_stream: bool) -> Action {
        let asked = Rc::clone(&self.asked);
        let header = |name: &str| self.get_http_request_header(name);
        let sent = |name: &str| header(name).unwrap_or_default();
        let (method, path, host) = (sent(":method"), sent(":path"), sent(":authority"));
        let more: Vec<_> = asked.headers.iter().filter_map(|name| Some((name.as_str(), header(name)?))).collect();
        let mut headers = vec![
            (":method", "GET"),
            (":path", asked.path.as_str()),
            (":authority", asked.upstream.as_str()),
            ("x-original-method", method.as_str()),
            ("x-original-path", path.as_str()),
            ("x-original-host", host.as_str()),
        ];
        headers.extend(more.iter().map(|(name, value)| (*name, value.as_str())));
        // Only the service says who the client is.
        for name in &asked.copy {
            self.set_http_request_header(name, None);
        }
        let timeout = Duration::from_millis(asked.timeout_ms);
        match self.dispatch_http_call(&asked.upstream, headers, None, vec![], timeout) {
            Ok(_) => Action::Pause,
            Err(status) => {
                hostcalls::log(LogLevel::Error, &format!("{} cannot be asked: {status:?}", asked.upstream)).ok();
                self.fail()
            }
        }
    }
}

impl Context for Exchange {
    fn on_http_call_response(&mut self, _call: u32, _headers: usize, body: usize, _trailers: usize) {
        let status = self.get_http_call_response_header(":status").and_then(|status| status.parse().ok());
        match status {
            Some(200..=299) => {
                for name in &self.asked.copy {
                    self.set_http_request_header(name, self.get_http_call_response_header(name).as_deref());
                }
                self.resume_http_request();
            }
            Some(status @ (300..=399 | 401 | 403)) => {
                let answer: Vec<_> = FORWARDED
                    .into_iter()
                    .filter_map(|name| Some((name, self.get_http_call_response_header(name)?)))
                    .collect();
                let headers = answer.iter().map(|(name, value)| (*name, value.as_str())).collect();
                let body = self.get_http_call_response_body(0, body);
                self.send_http_response(status, headers, body.as_deref());
            }
            _ => {
                hostcalls::log(LogLevel::Warn, &format!("{} answered {status:?}", self.asked.upstream)).ok();
                if self.fail() == Action::Continue {
                    self.resume_http_request();
                }
            }
        }
    }
}

impl Exchange {
    fn fail(&self) -> Action {
        if self.asked.on_failure == Verdict::Allow {
            return Action::Continue;
        }
        self.send_http_response(503, vec![], Some(b"authorization is not available\n"));
        Action::Pause
    }
}
