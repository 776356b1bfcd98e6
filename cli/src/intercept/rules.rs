//! The rules: one list of lines per chain, from which the script is made and with which nft's listing is compared.
//!
//! Each line is written as nft prints it, and each exclusion is a line of its own, so that comparing needs no parser.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use serde::Serialize;

use super::Flags;

/// Name of the table, of family inet: IPv4 and IPv6 alike.
pub(super) const TABLE: &str = "outrigger";
/// Removes the table, and is no error when there is none: `add` first.
pub(super) const REMOVE: &str = "add table inet outrigger\ndelete table inet outrigger\n";

/// What the chains hold.
#[derive(Debug)]
pub(super) struct Rules {
    output: Vec<String>,
    prerouting: Vec<String>,
}

/// A rule that is not there, or one that should not be.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct Difference {
    pub(super) chain: String,
    /// False: it is there and should not be
    pub(super) missing: bool,
    pub(super) rule: String,
}

impl Rules {
    pub(super) fn new(flags: &Flags) -> Self {
        // The proxy's own connections first: they must never come back to it.
        let mut output = vec![
            "type nat hook output priority -100; policy accept;".to_owned(),
            format!("meta skuid {} return", flags.uid),
            // The application to itself, and to helpers beside it.
            "oifname \"lo\" return".to_owned(),
        ];
        let mut cidrs: Vec<IpNet> = flags.exclude_cidrs.iter().map(IpNet::trunc).collect();
        cidrs.sort();
        cidrs.dedup();
        output.extend(cidrs.iter().map(|cidr| match cidr {
            IpNet::V4(cidr) if cidr.prefix_len() == 32 => format!("ip daddr {} return", cidr.addr()),
            IpNet::V6(cidr) if cidr.prefix_len() == 128 => format!("ip6 daddr {} return", cidr.addr()),
            IpNet::V4(cidr) => format!("ip daddr {cidr} return"),
            IpNet::V6(cidr) => format!("ip6 daddr {cidr} return"),
        }));
        let outbound: BTreeSet<u16> = flags.exclude_outbound.iter().copied().collect();
        output.extend(outbound.iter().map(|port| format!("tcp dport {port} return")));
        output.push(format!("meta l4proto tcp redirect to :{}", flags.outbound));

        let mut prerouting = vec![
            "type nat hook prerouting priority -100; policy accept;".to_owned(),
            // What a process of this host sends to itself was decided in `output`.
            "iifname \"lo\" return".to_owned(),
            // Only the health port is reached as it is. The proxy's listeners are not exempt: who dials them from
            // outside is redirected to the inbound one, where the original destination gives them away.
            format!("tcp dport {} return", flags.health),
        ];
        let inbound = flags.exclude_inbound.iter().filter(|port| **port != flags.health);
        prerouting.extend(inbound.map(|port| format!("tcp dport {port} return")));
        prerouting.push(format!("meta l4proto tcp redirect to :{}", flags.inbound));
        Self { output, prerouting }
    }

    fn chains(&self) -> [(&'static str, &[String]); 2] {
        [("output", &self.output), ("prerouting", &self.prerouting)]
    }

    /// Input of `nft -f`: one transaction that replaces the table.
    pub(super) fn script(&self) -> String {
        let mut script = format!("{REMOVE}table inet {TABLE} {{\n");
        for (chain, lines) in self.chains() {
            script.push_str(&format!("\tchain {chain} {{\n"));
            for line in lines {
                script.push_str(&format!("\t\t{line}\n"));
            }
            script.push_str("\t}\n");
        }
        script.push_str("}\n");
        script
    }

    /// Chain by chain, for people and programs.
    pub(super) fn lines(&self) -> BTreeMap<&'static str, &[String]> {
        self.chains().into_iter().collect()
    }

    /// Compares with what `nft list table` printed; order counts, because the first match decides.
    pub(super) fn compare(&self, listing: &str) -> Vec<Difference> {
        let found = parse(listing);
        let mut differences = Vec::new();
        for (chain, wanted) in self.chains() {
            let there = found.get(chain).map(Vec::as_slice).unwrap_or_default();
            let before = differences.len();
            let difference =
                |missing, rule: &String| Difference { chain: chain.to_owned(), missing, rule: rule.clone() };
            differences.extend(wanted.iter().filter(|rule| !there.contains(rule)).map(|rule| difference(true, rule)));
            differences.extend(there.iter().filter(|rule| !wanted.contains(rule)).map(|rule| difference(false, rule)));
            if differences.len() == before && there != wanted {
                let order = "the same rules in another order, or one twice".to_owned();
                differences.push(difference(false, &order));
            }
        }
        for chain in found.keys().filter(|chain| !self.lines().contains_key(chain.as_str())) {
            differences.push(Difference { chain: chain.clone(), missing: false, rule: "the whole chain".to_owned() });
        }
        differences
    }
}

/// Lines of each chain of a listing.
fn parse(listing: &str) -> BTreeMap<String, Vec<String>> {
    let mut chains: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut current = None;
    for line in listing.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("chain ").and_then(|rest| rest.strip_suffix(" {")) {
            current = Some(name.to_owned());
            chains.entry(name.to_owned()).or_default();
        } else if line == "}" {
            current = None;
        } else if let Some(chain) = current.as_ref().and_then(|name| chains.get_mut(name))
            && !line.is_empty()
        {
            chain.push(normal(line));
        }
    }
    chains
}

/// nft prints names or numbers depending on its version and on what the system's tables know.
fn normal(line: &str) -> String {
    line.replace("priority dstnat;", "priority -100;").replace("meta l4proto 6 ", "meta l4proto tcp ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags() -> Flags {
        Flags {
            outbound: 15001,
            inbound: 15006,
            health: 15020,
            uid: 1337,
            exclude_outbound: vec![5432, 3306],
            exclude_cidrs: vec!["169.254.169.254/32".parse().unwrap(), "fd00::1/8".parse().unwrap()],
            exclude_inbound: [22].into(),
        }
    }

    #[test]
    fn own_listing_is_accepted() {
        let rules = Rules::new(&flags());
        assert_eq!(rules.compare(&rules.script()), []);
        let printed = rules.script().replace("l4proto tcp", "l4proto 6").replace("priority -100", "priority dstnat");
        assert_eq!(rules.compare(&printed), []);
    }

    #[test]
    fn every_change_is_found() {
        let rules = Rules::new(&flags());
        let script = rules.script();
        for (chain, lines) in rules.chains() {
            for line in lines {
                let less = script.replacen(&format!("\t\t{line}\n"), "", 1);
                if !line.starts_with("tcp dport") {
                    let found = rules.compare(&less);
                    assert!(
                        found.iter().any(|found| found.missing && found.rule == *line && found.chain == chain),
                        "{line}"
                    );
                }
                assert_ne!(rules.compare(&less), [], "{line}");
            }
        }
        assert_eq!(rules.compare("").len(), rules.output.len() + rules.prerouting.len());
        let extra = Difference { chain: "output".to_owned(), missing: false, rule: "accept".to_owned() };
        assert_eq!(rules.compare(&script.replacen("oifname", "accept\n\t\toifname", 1)), [extra]);
        let moved = script.replacen("\t\toifname \"lo\" return\n", "", 1).replacen(
            "\t\tmeta skuid",
            "\t\toifname \"lo\" return\n\t\tmeta skuid",
            1,
        );
        assert_eq!(rules.compare(&moved).len(), 1);
    }
}
