//! Has the proxy's relocations packed (RELR) where the C library can unpack them: 42,000 of them otherwise fill a megabyte of the
//! binary, all of which is read, and stays in memory, at each start.

use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let is = |name: &str, value: &str| std::env::var(name).is_ok_and(|found| found == value);
    let native = std::env::var_os("HOST") == std::env::var_os("TARGET");
    // A binary for elsewhere may meet an older library.
    if native && is("CARGO_CFG_TARGET_OS", "linux") && is("CARGO_CFG_TARGET_ENV", "gnu") && unpacks().unwrap_or(false) {
        println!("cargo:rustc-link-arg-bin=outrigger-proxy=-Wl,-z,pack-relative-relocs");
    }
}

/// glibc 2.36 and later do.
fn unpacks() -> Option<bool> {
    let output = Command::new("getconf").arg("GNU_LIBC_VERSION").output().ok()?;
    let version = String::from_utf8(output.stdout).ok()?;
    let (major, minor) = version.trim().strip_prefix("glibc ")?.split_once('.')?;
    Some((major.parse::<u32>().ok()?, minor.parse::<u32>().ok()?) >= (2, 36))
}
