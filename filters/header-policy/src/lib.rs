//! An example filter: sets headers of requests and of responses, and refuses requests that carry a given header.
//!
//! Its configuration, all of it optional:
//!
//! ```json
//! {
//!   "request":  {"x-outrigger-demo-request": "1"},
//!   "response": {"x-outrigger-demo-filter": "header-policy"},
//!   "refuse":   {"header": "x-demo-refuse", "status": 403, "body": "refused by header-policy\n"}
//! }
//! ```

use std::collections::BTreeMap;
use std::rc::Rc;

use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::{Action, ContextType, LogLevel};
use serde::Deserialize;

proxy_wasm::main! {{
    proxy_wasm::set_log_level(LogLevel::Info);
    proxy_wasm::set_root_context(|_| Box::new(Root::default()));
}}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Policy {
    #[serde(default)]
    request: BTreeMap<String, String>,
    #[serde(default)]
    response: BTreeMap<String, String>,
    refuse: Option<Refuse>,
}

/// Requests with this header are answered here.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Refuse {
    header: String,
    #[serde(default = "forbidden")]
    status: u32,
    #[serde(default)]
    body: String,
}

fn forbidden() -> u32 {
    403
}

#[derive(Default)]
struct Root {
    policy: Rc<Policy>,
}

impl Context for Root {}

impl RootContext for Root {
    fn on_configure(&mut self, _size: usize) -> bool {
        let Some(policy) = filter_config::read(self) else { return false };
        self.policy = Rc::new(policy);
        true
    }

    fn create_http_context(&self, _id: u32) -> Option<Box<dyn HttpContext>> {
        Some(Box::new(Exchange { policy: Rc::clone(&self.policy) }))
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(ContextType::HttpContext)
    }
}

struct Exchange {
    policy: Rc<Policy>,
}

impl Context for Exchange {}

impl HttpContext for Exchange {
    fn on_http_request_headers(&mut self, _count: usize, _end_of_stream: bool) -> Action {
        if let Some(refuse) = &self.policy.refuse
            && self.get_http_request_header(&refuse.header).is_some()
        {
            self.send_http_response(refuse.status, Vec::new(), Some(refuse.body.as_bytes()));
            return Action::Pause;
        }
        for (name, value) in &self.policy.request {
            self.set_http_request_header(name, Some(value));
        }
        Action::Continue
    }

    fn on_http_response_headers(&mut self, _count: usize, _end_of_stream: bool) -> Action {
        for (name, value) in &self.policy.response {
            self.set_http_response_header(name, Some(value));
        }
        Action::Continue
    }
}
