//! Canonical paths.
pub fn canonical() {}
