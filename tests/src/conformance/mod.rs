//! The Proxy-Wasm conformance suite: `tests/proxy-wasm/cases.toml` through the host in process, through a whole proxy, and
//! through Envoy.

mod assemble;
mod envoy;
mod guests;
mod proxy;
mod suite;
mod wire;
mod world;

pub use assemble::host_functions;
pub use envoy::Envoy;
pub use guests::module;
pub use proxy::Through;
pub use suite::{case, cases, check_peer, table};
pub use world::{Target, World};
