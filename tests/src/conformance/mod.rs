//! The Proxy-Wasm conformance suite: `tests/proxy-wasm/cases.toml` through the host in process, through a whole proxy, and
//! through Envoy.

mod assemble;
mod envoy;
mod guests;
mod suite;
mod wire;
mod world;

pub use assemble::FUNCTIONS;
pub use envoy::Envoy;
pub use guests::module;
pub use suite::{case, cases, check_peer};
pub use world::{Target, World};
