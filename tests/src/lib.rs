//! What end-to-end tests are written with: the real binaries as guarded processes, recording backends, network
//! namespaces, and clients that nobody here wrote.
//!
//! A test waits for causes with [`until`] and never sleeps. Each process gets a loopback address of its own
//! ([`Address`]), so that tests run side by side with the ports users know.
// This crate is test code: what cannot go on panics and says why.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod address;
mod backend;
mod binaries;
mod certificates;
pub mod conformance;
mod curl;
mod guest;
pub mod h2;
mod local;
mod mesh;
mod metrics;
mod netns;
mod pair;
mod process;
mod python;
mod raw;
mod registry;
mod shop;
mod wait;

pub use address::Address;
pub use backend::{Backend, Recorded, Reply};
pub use binaries::binary;
pub use certificates::{Authority, Leaf};
pub use curl::{Curl, Response};
pub use guest::{Guest, example_filter};
pub use h2::H2;
pub use local::{Local, LocalBuilder, LocalProxy};
pub use mesh::{Control, Mesh, Proxy, ProxyBuilder};
pub use metrics::Metrics;
pub use netns::{Host, Lan};
pub use pair::Pair;
pub use process::Process;
pub use python::{python, succeed};
pub use raw::{Raw, header};
pub use registry::Registry;
pub use shop::Shop;
pub use wait::{HANG, until};
