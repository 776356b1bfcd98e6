//! Verifies a JSON Web Token and puts claims of it into headers, which routes can match and applications can trust.
//!
//! The keys are a JSON Web Key Set (RFC 7517). A key's `alg` decides how a token is verified, never the token's. The headers named are
//! removed from every request first: a client cannot bring its own.
//!
//! ```json
//! {
//!   "jwks": {"keys": [{"kty": "oct", "kid": "k1", "alg": "HS256", "k": "<base64url>"}]},
//!   "issuer": "https://id.example.com", "audience": "shop",
//!   "headers": {"x-plan": "plan", "x-tenant": "org.id"},
//!   "required": true
//! }
//! ```

mod token;

use std::rc::Rc;

use proxy_wasm::hostcalls;
use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::{Action, ContextType, LogLevel};

use token::Verifier;

proxy_wasm::main! {{
    proxy_wasm::set_log_level(LogLevel::Info);
    proxy_wasm::set_root_context(|_| Box::new(Root { verifier: None }));
}}

struct Root {
    verifier: Option<Rc<Verifier>>,
}

impl Context for Root {}

impl RootContext for Root {
    fn on_configure(&mut self, _size: usize) -> bool {
        let Some(written) = filter_config::read(self) else { return false };
        match Verifier::new(written) {
            Ok(verifier) => {
                self.verifier = Some(Rc::new(verifier));
                true
            }
            Err(why) => {
                filter_config::refuse(&why);
                false
            }
        }
    }

    fn create_http_context(&self, _id: u32) -> Option<Box<dyn HttpContext>> {
        Some(Box::new(Exchange { verifier: Rc::clone(self.verifier.as_ref()?) }))
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(ContextType::HttpContext)
    }
}

struct Exchange {
    verifier: Rc<Verifier>,
}

impl Context for Exchange {}

impl HttpContext for Exchange {
    fn on_http_request_headers(&mut self, _count: usize, _end_of_stream: bool) -> Action {
        for (header, _) in &self.verifier.headers {
            self.set_http_request_header(header, None);
        }
        let authorization = self.get_http_request_header("authorization");
        let Some(token) = authorization.as_deref().and_then(token::bearer) else {
            return if self.verifier.required { self.refuse("a bearer token is required") } else { Action::Continue };
        };
        match self.verifier.verify(token) {
            Ok(claims) => {
                for (header, claim) in &self.verifier.headers {
                    if let Some(value) = token::claim(&claims, claim) {
                        self.set_http_request_header(header, Some(&value));
                    }
                }
                Action::Continue
            }
            Err(why) => self.refuse(&why),
        }
    }
}

impl Exchange {
    /// RFC 6750 section 3.
    fn refuse(&self, why: &str) -> Action {
        hostcalls::log(LogLevel::Info, &format!("refused: {why}")).ok();
        let challenge = [("www-authenticate", "Bearer error=\"invalid_token\"")];
        self.send_http_response(401, challenge.to_vec(), Some(b"a valid bearer token is required\n"));
        Action::Pause
    }
}
