//! Outrigger's sidecar proxy. `docs/architecture.md` names each module and its owner.

pub mod admin;
mod allocator;
mod coalesce;
pub mod copy;
pub mod discovery;
pub mod drain;
pub mod filter;
pub mod flags;
pub mod http;
pub mod identity;
pub mod io;
pub mod listen;
pub mod log;
pub mod metrics;
pub mod register;
pub mod run;
pub mod shed;
pub mod snapshot;
mod splice;
pub mod state;
pub mod tcp;
#[cfg(test)]
mod tcp_tests;
#[cfg(test)]
mod testing;
pub mod tls;
pub mod upstream;
pub mod worker;
