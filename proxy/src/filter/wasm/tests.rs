//! The host against small guests written by hand. Numbers in names are the conformance cases of the contract.

mod callouts;
mod guest;
mod headers;
mod limits;
mod loading;
mod sharing;
mod swap;
