//! Outrigger's decisions, and nothing else: no IO, no clock. Time and randomness are arguments.
//!
//! The way of a configuration: [`resource`] (YAML into validated types, one rejection per bad resource) →
//! [`compile`] (indexes and merged policies; answers a subscription with a wire resource) → [`link`] (a wire resource
//! into what the data path evaluates: sorted matchers, compiled expressions).
//!
//! The decisions on a request: [`detect`], [`normalize`], [`authz`], [`route`], [`balance`], [`breaker`],
//! [`outlier`], [`retry`], [`first`], [`quiet`], [`splice`]; [`reason`] is the one table of why the mesh itself answered.

pub mod authz;
pub mod balance;
pub mod breaker;
pub mod chain;
pub mod compile;
pub mod detect;
pub mod first;
pub mod key;
pub mod link;
pub mod normalize;
pub mod outlier;
pub mod quiet;
pub mod reason;
pub mod resource;
pub mod retry;
pub mod route;
pub mod shed;
pub mod spiffe;
pub mod splice;
