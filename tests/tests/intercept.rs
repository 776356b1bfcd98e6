//! `outrigger intercept` on a host of its own: what the kernel is told, read back with nft.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // helpers of tests

use std::process::Output;

use outrigger_e2e::{Host, Lan, binary};

fn intercept(host: &Host, args: &[&str]) -> Output {
    host.command(binary("outrigger")).arg("intercept").args(args).output().expect("run outrigger")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn install_is_idempotent_and_remove_leaves_nothing() {
    let lan = Lan::new(1);
    let host = lan.host(1);
    let before = host.run("nft list ruleset");

    assert!(intercept(host, &["install"]).status.success());
    let once = host.run("nft list ruleset");
    assert!(once.contains("table inet outrigger"), "{once}");
    assert!(intercept(host, &["install"]).status.success());
    assert_eq!(host.run("nft list ruleset"), once);
    assert!(intercept(host, &["check"]).status.success());

    assert!(intercept(host, &["remove"]).status.success());
    assert_eq!(host.run("nft list ruleset"), before);
    let again = intercept(host, &["remove"]);
    assert!(again.status.success() && text(&again.stdout).contains("nothing to remove"), "{again:?}");
}

#[test]
fn rules_of_others_are_left_alone() {
    let lan = Lan::new(1);
    let host = lan.host(1);
    host.run("nft add table inet firewall");

    assert!(intercept(host, &["install"]).status.success());
    assert!(intercept(host, &["remove"]).status.success());

    assert_eq!(host.run("nft list ruleset").trim(), "table inet firewall {\n}");
}

#[test]
fn check_names_what_is_missing_and_what_should_not_be_there() {
    let lan = Lan::new(1);
    let host = lan.host(1);

    let nothing = intercept(host, &["check"]);
    assert!(!nothing.status.success());
    assert!(text(&nothing.stderr).contains("missing in chain output: meta skuid 1337 return"), "{nothing:?}");

    assert!(intercept(host, &["install"]).status.success());
    host.run("nft add rule inet outrigger output tcp dport 443 accept");
    let extra = intercept(host, &["check"]);
    assert!(!extra.status.success());
    assert_eq!(text(&extra.stderr).lines().next(), Some("unexpected in chain output: tcp dport 443 accept"));

    let other = intercept(host, &["check", "--inbound", "16006", "-o", "json"]);
    let value: serde_json::Value = serde_json::from_slice(&other.stdout).expect("JSON");
    assert_eq!(value["ok"], false);
    assert!(value["differences"].as_array().is_some_and(|all| {
        all.iter().any(|one| one["chain"] == "prerouting" && one["rule"] == "meta l4proto tcp redirect to :16006")
    }));
}

#[test]
fn flags_are_installed_as_they_are_checked() {
    let lan = Lan::new(1);
    let host = lan.host(1);
    let flags = ["--uid=2000", "--outbound=[::]:16001", "--exclude-outbound=5432,3306", "--exclude-inbound="];
    let cidrs = ["--exclude-cidrs=192.0.2.0/24,fd00::/8,198.51.100.7/32,2001:db8::1/128"];

    assert!(intercept(host, &[&["install"], &flags[..], &cidrs].concat()).status.success());

    let check = intercept(host, &[&["check"], &flags[..], &cidrs].concat());
    assert!(check.status.success(), "{check:?}");
    assert!(!intercept(host, &["check"]).status.success());
}

#[test]
fn without_privileges_the_error_says_so() {
    let lan = Lan::new(1);
    let host = lan.host(1);
    // As another user; the copy is where that user may execute it.
    let directory = tempfile::Builder::new().prefix("outrigger-").tempdir().expect("directory");
    let program = directory.path().join("outrigger");
    std::fs::copy(binary("outrigger"), &program).expect("copy");
    std::fs::set_permissions(directory.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("mode");

    let mut command = host.command("setpriv");
    command.args(["--reuid=1337", "--clear-groups"]).arg(&program).args(["intercept", "install"]);
    let refused = command.output().expect("run outrigger");

    assert!(!refused.status.success());
    assert!(text(&refused.stderr).contains("CAP_NET_ADMIN"), "{refused:?}");
}
