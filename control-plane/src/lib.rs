//! Outrigger's control plane: reads what users write, compiles it for each proxy that asks, signs certificates, and
//! keeps the workloads that registered.
//!
//! The way of a change: [`source`] (files) → [`store`] (last good version of each resource) → [`mesh`] (one catalog,
//! published by one swap) → [`delta`] (per stream: what must be sent) → [`discovery`] (gRPC).

pub mod answers;
pub mod api;
pub mod ca;
pub mod certificates;
pub mod delta;
pub mod discovery;
pub mod durable;
mod filters;
pub mod flags;
pub mod grants;
pub mod lease;
pub mod mesh;
pub mod metrics;
pub mod modules;
pub mod peer;
pub mod proxies;
pub mod refusals;
pub mod registry;
pub mod reports;
pub mod run;
pub mod server;
pub mod source;
pub mod store;
pub mod subscribers;
pub mod tls;
pub mod token;
pub mod watch;
