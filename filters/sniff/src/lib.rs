//! Tells the protocol of a TCP connection by its first bytes, counts it, and closes connections of protocols that are not allowed.
//!
//! ```json
//! {"allow": ["tls", "redis"]}
//! ```
//!
//! Without `allow` it only counts: `sniffed_<protocol>` in the metrics, and the property `sniff.protocol`.

mod protocol;

use std::rc::Rc;

use proxy_wasm::hostcalls;
use proxy_wasm::traits::{Context, RootContext, StreamContext};
use proxy_wasm::types::{Action, ContextType, LogLevel, MetricType};
use serde::Deserialize;

use protocol::{Protocol, Sniffed};

proxy_wasm::main! {{
    proxy_wasm::set_log_level(LogLevel::Info);
    proxy_wasm::set_root_context(|_| Box::new(Root::default()));
}}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    allow: Option<Vec<Protocol>>,
}

#[derive(Default)]
struct Root {
    written: Rc<Written>,
}

impl Context for Root {}

impl RootContext for Root {
    fn on_configure(&mut self, _size: usize) -> bool {
        let Some(written) = filter_config::read(self) else { return false };
        self.written = Rc::new(written);
        true
    }

    fn create_stream_context(&self, _id: u32) -> Option<Box<dyn StreamContext>> {
        Some(Box::new(Connection { written: Rc::clone(&self.written), told: false }))
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(ContextType::StreamContext)
    }
}

struct Connection {
    written: Rc<Written>,
    told: bool,
}

impl Context for Connection {}

impl StreamContext for Connection {
    fn on_downstream_data(&mut self, size: usize, end_of_stream: bool) -> Action {
        if self.told {
            return Action::Continue;
        }
        let bytes = self.get_downstream_data(0, size.min(protocol::ENOUGH)).unwrap_or_default();
        let protocol = match protocol::sniff(&bytes) {
            Sniffed::More if !end_of_stream => return Action::Pause,
            Sniffed::More => Protocol::Unknown,
            Sniffed::Is(protocol) => protocol,
        };
        self.told = true;
        let name = protocol.name();
        if let Ok(metric) = hostcalls::define_metric(MetricType::Counter, &format!("sniffed_{name}")) {
            hostcalls::increment_metric(metric, 1).ok();
        }
        self.set_property(vec!["sniff.protocol"], Some(name.as_bytes()));
        if self.written.allow.as_ref().is_some_and(|allowed| !allowed.contains(&protocol)) {
            hostcalls::log(LogLevel::Warn, &format!("closed: {name} is not allowed here")).ok();
            self.close_downstream();
            return Action::Pause;
        }
        Action::Continue
    }
}
