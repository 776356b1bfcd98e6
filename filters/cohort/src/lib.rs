//! Keeps a client on one side of a canary by a cookie.
//!
//! A client without the cookie is drawn once, `share` percent into the canary, and told by `Set-Cookie`. The request gets the header
//! `x-cohort: canary` or `stable`, which an `HTTPRoute` matches; a client's own `x-cohort` is overwritten.
//!
//! ```json
//! {"cookie": "side", "share": 10, "header": "x-cohort", "maxAge": 3600}
//! ```

use std::rc::Rc;

use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::{Action, ContextType};
use serde::Deserialize;

proxy_wasm::main! {{
    proxy_wasm::set_root_context(|_| Box::new(Root::default()));
}}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "camelCase")]
struct Cohorts {
    cookie: String,
    /// Percent of new clients that go to the canary
    share: f64,
    header: String,
    /// Seconds
    max_age: u32,
}

impl Default for Cohorts {
    fn default() -> Self {
        Self { cookie: "outrigger-side".into(), share: 0.0, header: "x-cohort".into(), max_age: 3600 }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Canary,
    Stable,
}

impl Side {
    fn name(self) -> &'static str {
        match self {
            Self::Canary => "canary",
            Self::Stable => "stable",
        }
    }

    fn named(name: &str) -> Option<Self> {
        [Self::Canary, Self::Stable].into_iter().find(|side| side.name() == name)
    }
}

#[derive(Default)]
struct Root {
    cohorts: Rc<Cohorts>,
}

impl Context for Root {}

impl RootContext for Root {
    fn on_configure(&mut self, _size: usize) -> bool {
        let Some(cohorts) = filter_config::read::<Cohorts>(self) else { return false };
        if !(0.0..=100.0).contains(&cohorts.share) {
            filter_config::refuse("share: must be from 0 to 100");
            return false;
        }
        self.cohorts = Rc::new(cohorts);
        true
    }

    fn create_http_context(&self, _id: u32) -> Option<Box<dyn HttpContext>> {
        Some(Box::new(Exchange { cohorts: Rc::clone(&self.cohorts), drawn: None }))
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(ContextType::HttpContext)
    }
}

struct Exchange {
    cohorts: Rc<Cohorts>,
    /// This client had no cookie.
    drawn: Option<Side>,
}

impl Context for Exchange {}

impl HttpContext for Exchange {
    fn on_http_request_headers(&mut self, _count: usize, _end_of_stream: bool) -> Action {
        let cookies = self.get_http_request_headers().into_iter().filter(|(name, _)| name == "cookie");
        let known =
            cookies.into_iter().find_map(|(_, cookies)| cookie(&cookies, &self.cohorts.cookie).and_then(Side::named));
        let side = known.unwrap_or_else(|| {
            let side = if fastrand::f64() * 100.0 < self.cohorts.share { Side::Canary } else { Side::Stable };
            self.drawn = Some(side);
            side
        });
        self.set_http_request_header(&self.cohorts.header, Some(side.name()));
        Action::Continue
    }

    fn on_http_response_headers(&mut self, _count: usize, _end_of_stream: bool) -> Action {
        if let Some(side) = self.drawn {
            let (name, age) = (&self.cohorts.cookie, self.cohorts.max_age);
            let cookie = format!("{name}={}; Max-Age={age}; Path=/; HttpOnly; SameSite=Lax", side.name());
            self.add_http_response_header("set-cookie", &cookie);
        }
        Action::Continue
    }
}

/// The value of a cookie in a `Cookie` header (RFC 6265 section 4.2.1).
fn cookie<'a>(cookies: &'a str, name: &str) -> Option<&'a str> {
    cookies
        .split(';')
        .filter_map(|pair| pair.trim().split_once('='))
        .find(|(key, _)| *key == name)
        .map(|(_, value)| value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cookie_is_found_among_others() {
        assert_eq!(cookie("a=1; side=canary;b=2", "side"), Some("canary"));
        assert_eq!(cookie("inside=canary", "side"), None);
        assert_eq!(Side::named("elsewhere"), None);
    }
}
