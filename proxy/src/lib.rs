//! Outrigger's sidecar proxy. `docs/architecture.md` names each module and its owner.

pub mod filter;
pub mod http;
pub mod identity;
pub mod io;
pub mod log;
pub mod metrics;
pub mod tls;
pub mod upstream;
