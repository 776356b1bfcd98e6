//! {{name}}: greets in a response header, and answers a path itself.
//!
//! Its configuration: `{"greeting": "hello"}`.

use std::rc::Rc;

use proxy_wasm::hostcalls;
use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::{Action, ContextType, LogLevel};
use serde::Deserialize;

proxy_wasm::main! {{
    proxy_wasm::set_log_level(LogLevel::Info);
    proxy_wasm::set_root_context(|_| Box::new(Root::default()));
}}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Configuration {
    #[serde(default)]
    greeting: String,
}

/// One for each worker of a proxy: it has the configuration, and makes an [`Exchange`] for each request.
#[derive(Default)]
struct Root {
    configuration: Rc<Configuration>,
}

impl Context for Root {}

impl RootContext for Root {
    /// Returning false refuses the configuration: the one before goes on serving.
    fn on_configure(&mut self, _size: usize) -> bool {
        let bytes = self.get_plugin_configuration().unwrap_or_else(|| b"{}".to_vec());
        match serde_json::from_slice(&bytes) {
            Ok(configuration) => self.configuration = Rc::new(configuration),
            Err(error) => {
                hostcalls::log(LogLevel::Error, &format!("configuration: {error}")).ok();
                return false;
            }
        }
        true
    }

    fn create_http_context(&self, _id: u32) -> Option<Box<dyn HttpContext>> {
        Some(Box::new(Exchange { configuration: Rc::clone(&self.configuration) }))
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(ContextType::HttpContext)
    }
}

/// One request and its response.
struct Exchange {
    configuration: Rc<Configuration>,
}

impl Context for Exchange {}

impl HttpContext for Exchange {
    fn on_http_request_headers(&mut self, _count: usize, _end_of_stream: bool) -> Action {
        self.set_http_request_header("x-seen-by", Some("{{name}}"));
        if self.get_http_request_header(":path").as_deref() == Some("/forbidden") {
            hostcalls::log(LogLevel::Info, "refused /forbidden").ok();
            self.send_http_response(403, vec![], Some(b"no entry\n"));
            return Action::Pause;
        }
        Action::Continue
    }

    fn on_http_response_headers(&mut self, _count: usize, _end_of_stream: bool) -> Action {
        if !self.configuration.greeting.is_empty() {
            self.set_http_response_header("x-greeting", Some(&self.configuration.greeting));
        }
        Action::Continue
    }
}
