//! Prometheus text.

use std::collections::BTreeMap;

/// The samples of one scrape.
#[derive(Debug, Clone, Default)]
pub struct Metrics(Vec<(String, BTreeMap<String, String>, f64)>);

impl Metrics {
    /// Reads the text format.
    ///
    /// # Panics
    /// On a line that is none of it: the proxy's own fault, and worth a failed test.
    pub fn parse(text: &str) -> Self {
        let samples = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
        Self(samples.map(|line| sample(line).unwrap_or_else(|| panic!("not a sample: {line}"))).collect())
    }

    /// The sum of the samples of `name` that have these labels.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let fits = |has: &BTreeMap<String, String>| {
            labels.iter().all(|(label, value)| has.get(*label).is_some_and(|has| has == value))
        };
        self.0.iter().filter(|(of, has, _)| of == name && fits(has)).map(|(.., value)| value).sum()
    }

    /// The values that a label of `name` has, with the sum of each.
    pub fn by(&self, name: &str, label: &str) -> BTreeMap<String, f64> {
        let mut sums = BTreeMap::new();
        for (_, labels, value) in self.0.iter().filter(|(of, ..)| of == name) {
            *sums.entry(labels.get(label).cloned().unwrap_or_default()).or_default() += value;
        }
        sums
    }
}

/// `name{label="value",…} number`
fn sample(line: &str) -> Option<(String, BTreeMap<String, String>, f64)> {
    let (series, value) = line.rsplit_once(' ')?;
    let (name, mut rest) = series.split_once('{').unwrap_or((series, "}"));
    let mut labels = BTreeMap::new();
    while rest != "}" {
        let (label, after) = rest.split_once("=\"")?;
        let mut text = String::new();
        let mut chars = after.char_indices();
        let end = loop {
            match chars.next()? {
                (at, '"') => break at,
                (_, '\\') => text.push(match chars.next()?.1 {
                    'n' => '\n',
                    c => c,
                }),
                (_, c) => text.push(c),
            }
        };
        labels.insert(label.trim_start_matches(',').to_owned(), text);
        rest = &after[end + 1..];
    }
    Some((name.to_owned(), labels, value.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_by_label() {
        let metrics = Metrics::parse("# HELP x\nx{a=\"1\",b=\"q\\\"\"} 2\nx{a=\"1\",b=\"r\"} 3\ny 1.5\n");
        assert!((metrics.sum("x", &[("a", "1")]) - 5.0).abs() < f64::EPSILON);
        assert!((metrics.sum("x", &[("b", "q\"")]) - 2.0).abs() < f64::EPSILON);
        assert_eq!(metrics.by("x", "b").len(), 2);
        assert!((metrics.sum("y", &[]) - 1.5).abs() < f64::EPSILON);
    }
}
