//! A small web application firewall: rules of a pattern and what it is looked for in. Not a replacement for a maintained rule set.
//!
//! The path, the query, header values and (bounded) bodies are looked at percent-decoded, twice, with `+` read as a space in queries.
//! A rule that only logs counts, too: `waf_lite_matches_<id>` in the metrics.
//!
//! ```json
//! {
//!   "rules": [
//!     {"id": "traversal", "in": ["path", "query"], "pattern": "\\.\\./"},
//!     {"id": "sqli", "in": ["query", "body"], "pattern": "(?i)\\bunion\\s+select\\b"},
//!     {"id": "scanner", "in": ["header:user-agent"], "pattern": "(?i)sqlmap|nikto", "action": "log"}
//!   ],
//!   "body": 16384, "status": 403
//! }
//! ```

mod rules;

use std::rc::Rc;

use proxy_wasm::hostcalls;
use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::{Action, ContextType, LogLevel, MetricType};

use rules::{Firewall, Place, Verb};

proxy_wasm::main! {{
    proxy_wasm::set_log_level(LogLevel::Info);
    proxy_wasm::set_root_context(|_| Box::new(Root::default()));
}}

#[derive(Default)]
struct Root {
    firewall: Rc<Firewall>,
}

impl Context for Root {}

impl RootContext for Root {
    fn on_configure(&mut self, _size: usize) -> bool {
        let Some(written) = filter_config::read(self) else { return false };
        match Firewall::new(written, |name| hostcalls::define_metric(MetricType::Counter, name).ok()) {
            Ok(firewall) => {
                self.firewall = Rc::new(firewall);
                true
            }
            Err(why) => {
                filter_config::refuse(&why);
                false
            }
        }
    }

    fn create_http_context(&self, _id: u32) -> Option<Box<dyn HttpContext>> {
        Some(Box::new(Exchange { firewall: Rc::clone(&self.firewall), looked: false }))
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(ContextType::HttpContext)
    }
}

struct Exchange {
    firewall: Rc<Firewall>,
    /// The body has been looked at, as far as it is.
    looked: bool,
}

impl Context for Exchange {}

impl HttpContext for Exchange {
    fn on_http_request_headers(&mut self, _count: usize, _end_of_stream: bool) -> Action {
        let target = self.get_http_request_header(":path").unwrap_or_default();
        let (path, query) = target.split_once('?').unwrap_or((&target, ""));
        if self.judge(&Place::Path, path.as_bytes()) || self.judge(&Place::Query, query.as_bytes()) {
            return Action::Pause;
        }
        for (name, value) in self.get_http_request_headers_bytes() {
            if !name.starts_with(':') && self.judge(&Place::Header(name), &value) {
                return Action::Pause;
            }
        }
        Action::Continue
    }

    fn on_http_request_body(&mut self, size: usize, end_of_stream: bool) -> Action {
        let limit = self.firewall.body;
        if self.looked || !self.firewall.looks_at_bodies() {
            return Action::Continue;
        }
        if !end_of_stream && size < limit {
            return Action::Pause;
        }
        self.looked = true;
        let body = self.get_http_request_body(0, size.min(limit)).unwrap_or_default();
        if self.judge(&Place::Body, &body) { Action::Pause } else { Action::Continue }
    }

    fn on_http_request_trailers(&mut self, _count: usize) -> Action {
        if self.looked || !self.firewall.looks_at_bodies() {
            return Action::Continue;
        }
        self.looked = true;
        let body = self.get_http_request_body(0, self.firewall.body).unwrap_or_default();
        if self.judge(&Place::Body, &body) { Action::Pause } else { Action::Continue }
    }
}

impl Exchange {
    /// True: the request has been refused.
    fn judge(&self, place: &Place, text: &[u8]) -> bool {
        for rule in self.firewall.matches(place, text) {
            if let Some(metric) = rule.metric {
                hostcalls::increment_metric(metric, 1).ok();
            }
            let level = if rule.verb == Verb::Deny { LogLevel::Warn } else { LogLevel::Info };
            hostcalls::log(level, &format!("rule {} matched in {place}", rule.id)).ok();
            if rule.verb == Verb::Deny {
                let body = format!("refused by rule {}\n", rule.id);
                self.send_http_response(self.firewall.status, vec![], Some(body.as_bytes()));
                return true;
            }
        }
        false
    }
}
