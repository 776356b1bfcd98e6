//! A token bucket per client, in shared data: all workers of a proxy draw from the same one.
//!
//! Clients are told apart by a header, or by their address. They share 4,096 buckets by default, so that a flood of names cannot fill the memory;
//! two clients whose names fall on the same bucket share it.
//!
//! ```json
//! {"rate": 10, "burst": 20, "header": "x-api-key", "buckets": 4096}
//! ```

mod bucket;

use std::hash::{DefaultHasher, Hash, Hasher};
use std::rc::Rc;
use std::time::UNIX_EPOCH;

use proxy_wasm::hostcalls;
use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::{Action, ContextType, LogLevel, MetricType, Status};
use serde::Deserialize;

use bucket::Bucket;

/// How often a write that another worker overtook is tried again.
const TRIES: u32 = 16;

proxy_wasm::main! {{
    proxy_wasm::set_log_level(LogLevel::Info);
    proxy_wasm::set_root_context(|_| Box::new(Root::default()));
}}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    /// Requests per second
    rate: f64,
    burst: f64,
    header: Option<String>,
    #[serde(default = "buckets")]
    buckets: u64,
}

fn buckets() -> u64 {
    4096
}

struct Limit {
    written: Written,
    limited: Option<u32>,
}

#[derive(Default)]
struct Root {
    limit: Option<Rc<Limit>>,
}

impl Context for Root {}

impl RootContext for Root {
    fn on_configure(&mut self, _size: usize) -> bool {
        let Some(written) = filter_config::read::<Written>(self) else { return false };
        if !(written.rate > 0.0 && written.burst >= 1.0 && written.buckets > 0) {
            filter_config::refuse("rate must be above 0, burst and buckets 1 or more");
            return false;
        }
        let limited = hostcalls::define_metric(MetricType::Counter, "rate_limited").ok();
        self.limit = Some(Rc::new(Limit { written, limited }));
        true
    }

    fn create_http_context(&self, _id: u32) -> Option<Box<dyn HttpContext>> {
        Some(Box::new(Exchange { limit: Rc::clone(self.limit.as_ref()?) }))
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(ContextType::HttpContext)
    }
}

struct Exchange {
    limit: Rc<Limit>,
}

impl Context for Exchange {}

impl HttpContext for Exchange {
    fn on_http_request_headers(&mut self, _count: usize, _end_of_stream: bool) -> Action {
        let Limit { written, limited } = &*self.limit;
        let Err(wait) = self.draw() else { return Action::Continue };
        if let Some(limited) = *limited {
            hostcalls::increment_metric(limited, 1).ok();
        }
        let limit = written.rate.to_string();
        let headers = vec![("retry-after", wait.as_str()), ("x-ratelimit-limit", limit.as_str())];
        self.send_http_response(429, headers, Some(b"too many requests\n"));
        Action::Pause
    }
}

impl Exchange {
    fn client(&self) -> Vec<u8> {
        if let Some(value) =
            self.limit.written.header.as_ref().and_then(|name| self.get_http_request_header_bytes(name))
        {
            return value;
        }
        let mut address = self.get_property(vec!["source", "address"]).unwrap_or_default();
        // Without the port: every connection of a client has another.
        if let Some(colon) = address.iter().rposition(|&byte| byte == b':') {
            address.truncate(colon);
        }
        address
    }

    /// Takes a token.
    ///
    /// # Errors
    /// There is none; seconds until there is, rounded up.
    fn draw(&self) -> Result<(), String> {
        let Written { rate, burst, buckets, .. } = self.limit.written;
        let mut hasher = DefaultHasher::new();
        self.client().hash(&mut hasher);
        let key = format!("bucket/{}", hasher.finish() % buckets);
        let now = self.get_current_time().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
        for _ in 0..TRIES {
            let (stored, cas) = self.get_shared_data(&key);
            let mut bucket = stored.and_then(|bytes| Bucket::read(&bytes)).unwrap_or(Bucket::full(burst, now));
            let drawn = bucket.draw(rate, burst, now);
            match self.set_shared_data(&key, Some(&bucket.write()), cas) {
                Err(Status::CasMismatch) => {}
                // A store that takes nothing more must not take the service down with it.
                _ => return drawn.map_err(|wait| wait.ceil().to_string()),
            }
        }
        Ok(())
    }
}
