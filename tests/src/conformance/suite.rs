//! The file of cases.

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::sync::LazyLock;

use outrigger_proxy::filter::cases::{Case, Differences, Suite};

use super::guests::directory;

static SUITE: LazyLock<Suite> = LazyLock::new(|| {
    let path = directory().join("cases.toml");
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut suite: Suite = toml::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    suite.settle();
    suite
});

/// Every case, in order of the file.
pub fn cases() -> &'static [Case] {
    &SUITE.cases
}

/// All cases of a number.
///
/// # Panics
/// When there is none.
#[track_caller]
pub fn case(number: u32) -> Vec<&'static Case> {
    let found: Vec<&Case> = cases().iter().filter(|case| case.number == number).collect();
    assert!(!found.is_empty(), "cases.toml has no case {number}");
    found
}

/// Compares what differs at a peer with what the case lists. With `OUTRIGGER_RECORD_PEER` it writes the differences to that file
/// instead.
///
/// # Panics
/// Where one is not listed, or one that is listed is not seen any more.
#[track_caller]
pub fn check_peer(case: &Case, seen: &Differences) {
    let seen: Vec<String> = seen.iter().map(ToString::to_string).collect();
    let listed = case.envoy.as_ref().map(|peer| peer.differs.clone()).unwrap_or_default();
    if let Some(file) = std::env::var_os("OUTRIGGER_RECORD_PEER") {
        let line = serde_json::json!({"number": case.number, "name": case.name, "differs": seen});
        let mut file = fs::File::options().append(true).create(true).open(file).expect("the file to record in");
        writeln!(file, "{line}").expect("write");
        return;
    }
    let unlisted: Vec<&String> = seen.iter().filter(|line| !listed.contains(line)).collect();
    let gone: Vec<&String> = listed.iter().filter(|line| !seen.contains(line)).collect();
    assert!(
        unlisted.is_empty() && gone.is_empty(),
        "case {} ({}):\nnot listed: {unlisted:#?}\nlisted, not seen: {gone:#?}",
        case.number,
        case.name
    );
}

/// The table of the guide: each number, what is shown, and what Envoy does otherwise.
pub fn table() -> String {
    let mut out = String::from("| case | what is shown | Outrigger | Envoy 1.40 |\n|---|---|---|---|\n");
    for case in cases() {
        let envoy = match &case.envoy {
            None => "the same".to_owned(),
            Some(peer) if peer.skip => format!("not run: {}", peer.reason),
            Some(peer) => format!("differs: {}", peer.reason),
        };
        let here = match (&case.proxy_only, case.is_traffic()) {
            (Some(_), _) => "through the proxy",
            (None, true) => "in process, through the proxy",
            (None, false) => "in process",
        };
        let _ = writeln!(out, "| {} | {} | {here} | {envoy} |", case.number, case.name);
    }
    out
}
