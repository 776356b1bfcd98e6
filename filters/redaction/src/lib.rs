//! Blanks the values of named keys in JSON bodies, as they stream: nothing is held back.
//!
//! Works on responses whose `content-type` is JSON; for it the request's `accept-encoding` is reduced to `identity`, and
//! `range` is taken away: in a part of a body nobody sees which key a value belongs to.
//!
//! ```json
//! {"keys": ["password", "ssn"], "with": "[redacted]"}
//! ```

mod redactor;

use std::rc::Rc;

use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::{Action, ContextType};
use serde::Deserialize;

use redactor::{Redactor, Secrets};

proxy_wasm::main! {{
    proxy_wasm::set_root_context(|_| Box::new(Root::default()));
}}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    keys: Vec<String>,
    #[serde(default = "redacted")]
    with: String,
}

fn redacted() -> String {
    "[redacted]".into()
}

#[derive(Default)]
struct Root {
    secrets: Rc<Secrets>,
}

impl Context for Root {}

impl RootContext for Root {
    fn on_configure(&mut self, _size: usize) -> bool {
        let Some(written) = filter_config::read::<Written>(self) else { return false };
        self.secrets = Rc::new(Secrets::new(written.keys, &written.with));
        true
    }

    fn create_http_context(&self, _id: u32) -> Option<Box<dyn HttpContext>> {
        Some(Box::new(Exchange { secrets: Rc::clone(&self.secrets), redactor: None }))
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(ContextType::HttpContext)
    }
}

struct Exchange {
    secrets: Rc<Secrets>,
    /// There is a body to look at.
    redactor: Option<Redactor>,
}

impl Context for Exchange {}

impl HttpContext for Exchange {
    fn on_http_request_headers(&mut self, _count: usize, _end_of_stream: bool) -> Action {
        self.set_http_request_header("accept-encoding", Some("identity"));
        for name in ["range", "if-range"] {
            self.set_http_request_header(name, None);
        }
        Action::Continue
    }

    fn on_http_response_headers(&mut self, _count: usize, end_of_stream: bool) -> Action {
        let kind = self.get_http_response_header("content-type").unwrap_or_default().to_ascii_lowercase();
        let kind = kind.split(';').next().unwrap_or_default().trim();
        let json = kind == "application/json" || kind.ends_with("+json");
        let part = self.get_http_response_header(":status").is_some_and(|status| status == "206");
        // Parts of several ranges have types of their own.
        if !end_of_stream && part && (json || kind == "multipart/byteranges") {
            self.send_http_response(502, vec![], Some(b"the response is a part, and cannot be redacted\n"));
            return Action::Pause;
        }
        if !end_of_stream && json {
            if self.get_http_response_header("content-encoding").is_some_and(|encoding| encoding != "identity") {
                // What cannot be read cannot be blanked.
                self.send_http_response(502, vec![], Some(b"the response is encoded, and cannot be redacted\n"));
                return Action::Pause;
            }
            self.redactor = Some(Redactor::new(Rc::clone(&self.secrets)));
            // They describe the body as it was.
            for name in ["etag", "digest", "content-digest", "repr-digest"] {
                self.set_http_response_header(name, None);
            }
        }
        Action::Continue
    }

    fn on_http_response_body(&mut self, size: usize, _end_of_stream: bool) -> Action {
        let Some(body) = self.get_http_response_body(0, size).filter(|body| !body.is_empty()) else {
            return Action::Continue;
        };
        if let Some(redactor) = &mut self.redactor {
            let redacted = redactor.feed(&body);
            self.set_http_response_body(0, size, &redacted);
        }
        Action::Continue
    }
}
