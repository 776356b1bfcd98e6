//! Files of cases, in YAML or TOML, and the modules that they name.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use outrigger_core::resource::{Located, Rejection, explained};
use outrigger_proxy::filter::cases::{FilterSpec, Suite, check};

use super::find::is_yaml;

/// A file of cases.
pub(super) struct File {
    pub(super) path: PathBuf,
    pub(super) text: String,
    pub(super) suite: Suite,
    lines: Lines,
    /// Where its modules are
    modules: PathBuf,
}

enum Lines {
    Yaml(Box<Located<Suite>>),
    /// Those of the cases
    Toml(Vec<u32>),
}

/// Why a file cannot be used.
#[derive(Debug)]
pub(super) enum Unreadable {
    /// With its place
    Wrong(Box<Rejection>),
    Io(PathBuf, std::io::Error),
}

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Wrong(rejection) => rejection.fmt(f),
            Self::Io(path, error) => write!(f, "{}: {error}", path.display()),
        }
    }
}

impl From<Box<Rejection>> for Unreadable {
    fn from(rejection: Box<Rejection>) -> Self {
        Self::Wrong(rejection)
    }
}

impl File {
    /// Reads a file, and looks whether its modules are there: below `modules`, or beside it.
    pub(super) fn read(path: &Path, modules: Option<&Path>) -> Result<Self, Unreadable> {
        let text = fs::read_to_string(path).map_err(|error| Unreadable::Io(path.to_owned(), error))?;
        let name = path.display().to_string();
        let (mut suite, lines) = if is_yaml(path) {
            let located = Located::<Suite>::read(&name, &text)?;
            (located.value.clone(), Lines::Yaml(Box::new(located)))
        } else {
            (toml(&name, &text)?, Lines::Toml(case_lines(&text)))
        };
        suite.settle();
        let modules = modules.or_else(|| path.parent()).unwrap_or(Path::new("")).to_owned();
        let file = Self { path: path.to_owned(), text, suite, lines, modules };
        let reject = |field: &str, why: &str| Box::new(explained(&name, file.line(field), field, why));
        check(&file.suite).map_err(|(field, why)| reject(&field, &why))?;
        for (field, filter) in file.filters() {
            if let Err(why) = file.module(&filter.module) {
                return Err(reject(&field, &why).into());
            }
        }
        Ok(file)
    }

    /// The line of a field; in TOML, of its case.
    pub(super) fn line(&self, field: &str) -> u32 {
        match &self.lines {
            Lines::Yaml(located) => located.line(field),
            Lines::Toml(cases) => {
                let index = field.strip_prefix("cases[").and_then(|rest| rest.split(']').next()?.parse().ok());
                index.and_then(|index: usize| cases.get(index)).copied().unwrap_or(1)
            }
        }
    }

    /// Whether a field is written, and not only understood.
    pub(super) fn has(&self, field: &str) -> bool {
        match &self.lines {
            Lines::Yaml(located) => located.has(field),
            Lines::Toml(_) => false,
        }
    }

    /// The bytes of a module.
    pub(super) fn module(&self, name: &str) -> Result<Vec<u8>, String> {
        let path = self.modules.join(name);
        fs::read(&path).map_err(|error| {
            format!(
                "cannot read {}: {error}; build the filter first, or name the directory with --modules",
                path.display()
            )
        })
    }

    /// Every filter, with the path of its module's name.
    fn filters(&self) -> Vec<(String, &FilterSpec)> {
        let mut all = Vec::new();
        let add = |at: String, filters: &[FilterSpec]| -> Vec<String> {
            (0..filters.len()).map(|index| format!("{at}[{index}].module")).collect()
        };
        for (number, case) in self.suite.cases.iter().enumerate() {
            let at = format!("cases[{number}]");
            all.extend(add(format!("{at}.filters"), &case.filters).into_iter().zip(&case.filters));
            for (index, step) in case.steps.iter().enumerate() {
                for (what, filters) in [("update", &step.update), ("update-during", &step.update_during)] {
                    let filters = filters.as_deref().unwrap_or_default();
                    all.extend(add(format!("{at}.steps[{index}].{what}"), filters).into_iter().zip(filters));
                }
            }
        }
        all
    }
}

fn toml(name: &str, text: &str) -> Result<Suite, Unreadable> {
    toml::from_str(text).map_err(|error| {
        let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
        let line = u32::try_from(before.matches('\n').count() + 1).unwrap_or(u32::MAX);
        Unreadable::Wrong(Box::new(explained(name, line, "", error.message())))
    })
}

fn case_lines(text: &str) -> Vec<u32> {
    let begins = |line: &str| ["[[case]]", "[[cases]]"].contains(&line.trim());
    (1..).zip(text.lines()).filter(|(_, line)| begins(line)).map(|(number, _)| number).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrong(name: &str, text: &str) -> String {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join(name);
        fs::write(root.path().join("f.wasm"), "").unwrap();
        fs::write(&path, text).unwrap();
        let error = File::read(&path, None).map(drop).unwrap_err().to_string();
        error.strip_prefix(&format!("{}/", root.path().display())).unwrap().to_owned()
    }

    #[test]
    fn what_is_wrong_has_its_line() {
        let yaml = |rest: &str| wrong("c.yaml", &format!("filters: [{{module: f.wasm}}]\ncases:\n- name: one\n{rest}"));
        assert_eq!(yaml("  stepps: []\n"), "c.yaml:4: cases[0].stepps: unknown field; did you mean `steps`?");
        assert_eq!(
            yaml("  steps:\n  - expect: {upstream: {methot: GET}}\n"),
            "c.yaml:5: cases[0].steps[0].expect.upstream.methot: unknown field; did you mean `method`?"
        );
        let bad = yaml("  steps:\n  - request:\n      path: no\n");
        assert!(bad.starts_with("c.yaml:6: cases[0].steps[0].request.path: "), "{bad}");
        let bad = yaml("  filters: [{module: g.wasm}]\n");
        assert!(bad.starts_with("c.yaml:4: cases[0].filters[0].module: cannot read "), "{bad}");
        let bad = yaml("  clock: noon\n");
        assert!(bad.starts_with("c.yaml:4: cases[0].clock: ") && bad.contains("2026-01-01T00:00:00Z"), "{bad}");
        assert_eq!(
            wrong("c.toml", "[[case]]\nname = \"a\"\nfilters = [{ module = \"f.wasm\", nam = \"x\" }]\n"),
            "c.toml:3: nam: unknown field; did you mean `name`?"
        );
        let bad = wrong("c.toml", "\n\n[[case]]\nname = \"a\"\nfilters = [{ module = \"g.wasm\" }]\n");
        assert!(bad.starts_with("c.toml:3: cases[0].filters[0].module: cannot read "), "{bad}");
        assert!(wrong("c.yaml", "cases: [{name: a}]").contains("cases[0].filters: missing"));
    }

    #[test]
    fn a_case_is_of_requests_or_of_a_tcp_connection() {
        let yaml = |steps: &str| {
            wrong("c.yaml", &format!("filters: [{{module: f.wasm}}]\ncases:\n- name: one\n  steps:\n{steps}"))
        };
        for (steps, said) in [
            (
                "  - tcp: {client: hi}\n  - request: {}\n",
                "c.yaml:6: cases[0].steps[1].request: this case is of a TCP connection (steps[0].tcp); requests go into a case of their own",
            ),
            (
                "  - request: {}\n    tcp: {}\n",
                "c.yaml:6: cases[0].steps[0].tcp: this case is of requests (steps[0].request); TCP connections go into a case of their own",
            ),
            (
                "  - tcp: {}\n    upstream: {status: 404}\n",
                "c.yaml:6: cases[0].steps[0].upstream: is of requests, and this case is of a TCP connection; what the upstream sends is tcp.upstream",
            ),
            (
                "  - tcp: {}\n    expect:\n      response: {status: 200}\n",
                "c.yaml:7: cases[0].steps[0].expect.response: is of requests, and this case is of a TCP connection; what comes to the client is \
                 expect.tcp.client",
            ),
            (
                "  - expect: {tcp: {client: hi}}\n",
                "c.yaml:5: cases[0].steps[0].expect.tcp: there is no TCP connection in this case; a step makes one with tcp (`tcp: {connect: true}`)",
            ),
            (
                "  - tcp: {client-end: true}\n  - tcp: {client: more}\n",
                "c.yaml:6: cases[0].steps[1].tcp.client: it has ended in steps[0] (client-end); `connect: true` begins a new connection",
            ),
            (
                "  - tcp: {clinet: hi}\n",
                "c.yaml:5: cases[0].steps[0].tcp.clinet: unknown field; did you mean `client`?",
            ),
            (
                "  - tcp: {}\n    expect: {tcp: {state: closed}}\n",
                "c.yaml:6: cases[0].steps[0].expect.tcp.state: `closed` is not one of waiting, open, ended, filter-response, filter-failed, \
                 filter-request-too-large, filter-response-too-large",
            ),
            (
                "  - tcp: {client: {hex: 160301}}\n",
                "c.yaml:5: cases[0].steps[0].tcp.client.hex: expected hexadecimal digits; put them in quotes, as \"16 03 01\"",
            ),
            (
                "  - tcp: {client: {hex: 1x}}\n",
                "c.yaml:5: cases[0].steps[0].tcp.client: \"1x\" are no bytes in hexadecimal: Invalid character 'x' at position 1",
            ),
            (
                "  - tcp: {client: [{times: 3}]}\n",
                "c.yaml:5: cases[0].steps[0].tcp.client[0]: expected {repeat: TEXT, times: NUMBER} or {hex: BYTES}",
            ),
        ] {
            assert_eq!(yaml(steps), said);
        }
    }

    #[test]
    fn headers_and_bodies_are_written_in_several_ways() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("c.yaml");
        fs::write(root.path().join("f.wasm"), "").unwrap();
        let text = "filters: [{module: f.wasm, configuration: {a: [1]}}]\ncases:\n- name: one\n  steps:\n  - request:\n      \
                    headers: {x-b: [1, two], x-a: 3}\n      body: text\n    expect:\n      response:\n        headers:\n        \
                    - x-a: 1\n        - \"x-b: 2\"\n        - x-none\n        body: {repeat: ab, times: 2}\n";
        fs::write(&path, text).unwrap();
        let file = File::read(&path, None).unwrap_or_else(|error| panic!("{error}"));
        let step = &file.suite.cases[0].steps[0];
        assert_eq!(file.suite.cases[0].filters[0].configuration, r#"{"a":[1]}"#);
        let request = step.request.as_ref().unwrap();
        assert_eq!(request.headers, ["x-a: 3", "x-b: 1", "x-b: two"]);
        assert_eq!(request.body[0].bytes(), b"text");
        let response = step.expect.response.as_ref().unwrap();
        assert_eq!(response.headers, ["x-a: 1", "x-b: 2", "x-none"]);
        assert_eq!(response.body.as_ref().unwrap().bytes(), b"abab");
    }
}
