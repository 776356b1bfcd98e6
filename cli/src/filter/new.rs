//! `outrigger filter new`: a project that builds and whose cases pass, from the files in `cli/templates`.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, bail, ensure};

use crate::Global;
use crate::output::{self, Format};

#[derive(Debug, clap::Args)]
pub(super) struct New {
    /// Name of the filter, and of the directory that is made for it: lower-case letters, digits and `-`
    name: String,
    /// What it is written in
    #[arg(long, value_enum, default_value = "rust")]
    lang: Language,
    /// Where the directory is made
    #[arg(long = "in", value_name = "DIR", default_value = ".")]
    parent: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Language {
    /// With the crate proxy-wasm
    Rust,
    /// With one small file in place of an SDK
    #[value(name = "assemblyscript")]
    AssemblyScript,
}

/// Path and content, with `{{name}}`, `{{module}}` and `{{language}}` in it.
type File = (&'static str, &'static str);

const BOTH: [File; 2] = [
    ("cases.yaml", include_str!("../../templates/cases.yaml")),
    ("README.md", include_str!("../../templates/README.md")),
];
const RUST: [File; 3] = [
    ("Cargo.toml", include_str!("../../templates/rust/Cargo.toml")),
    (".gitignore", include_str!("../../templates/rust/gitignore")),
    ("src/lib.rs", include_str!("../../templates/rust/src/lib.rs")),
];
const ASSEMBLYSCRIPT: [File; 5] = [
    ("package.json", include_str!("../../templates/assemblyscript/package.json")),
    (".gitignore", include_str!("../../templates/assemblyscript/gitignore")),
    ("asconfig.json", include_str!("../../../filters/request-id/asconfig.json")),
    ("assembly/index.ts", include_str!("../../templates/assemblyscript/assembly/index.ts")),
    // The example's: one source.
    ("assembly/proxy.ts", include_str!("../../../filters/request-id/assembly/proxy.ts")),
];

impl Language {
    fn name(self) -> &'static str {
        match self {
            Self::Rust => "Rust",
            Self::AssemblyScript => "AssemblyScript",
        }
    }

    fn files(self) -> impl Iterator<Item = File> {
        let own: &[File] = match self {
            Self::Rust => &RUST,
            Self::AssemblyScript => &ASSEMBLYSCRIPT,
        };
        own.iter().chain(&BOTH).copied()
    }
}

pub(super) fn run(args: &New, global: &Global) -> anyhow::Result<ExitCode> {
    check(&args.name)?;
    let directory = match args.parent.as_os_str().to_str() {
        Some(".") => PathBuf::from(&args.name),
        _ => args.parent.join(&args.name),
    };
    let made: Vec<&str> = args.lang.files().map(|(path, _)| path).collect();
    make(&directory, &args.name, args.lang)?;
    match global.output {
        Format::Json => output::json(&serde_json::json!({ "directory": directory, "files": made }))?,
        Format::Table => {
            let directory = directory.display();
            output::line(&format!("made {directory}: {}", made.join(", ")))?;
            output::line(&format!("next: cd {directory} && outrigger filter build && outrigger filter test"))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Crates that a filter in Rust is built with, and names that Rust keeps for itself.
const TAKEN: [&str; 12] = [
    "alloc",
    "build",
    "core",
    "deps",
    "examples",
    "proc-macro",
    "proxy-wasm",
    "serde",
    "serde-json",
    "std",
    "target",
    "test",
];
const KEYWORDS: [&str; 37] = [
    "abstract", "as", "async", "await", "become", "box", "break", "const", "continue", "crate", "do", "dyn", "else",
    "enum", "extern", "false", "final", "fn", "for", "if", "impl", "in", "let", "loop", "macro", "match", "mod",
    "move", "mut", "pub", "ref", "return", "self", "static", "struct", "type", "use",
];

fn check(name: &str) -> anyhow::Result<()> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let begins = name.starts_with(|c: char| c.is_ascii_lowercase());
    ensure!(
        begins && name.len() <= 63 && name.chars().all(plain) && !name.ends_with('-'),
        "`{name}` is no name for a filter: 1 to 63 lower-case letters, digits and `-`, beginning with a letter"
    );
    ensure!(
        !TAKEN.contains(&name) && !KEYWORDS.contains(&name),
        "`{name}` is a name that Rust or a library uses: choose another, such as {name}-filter"
    );
    Ok(())
}

fn make(directory: &Path, name: &str, lang: Language) -> anyhow::Result<()> {
    let there = directory.display();
    match fs::read_dir(directory) {
        Ok(mut entries) => {
            ensure!(entries.next().is_none(), "{there} is there already and not empty: nothing was written");
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => bail!("{there}: {error}"),
    }
    for (path, content) in lang.files() {
        let path = directory.join(path);
        let content = content
            .replace("{{name}}", name)
            .replace("{{module}}", &name.replace('-', "_"))
            .replace("{{language}}", lang.name());
        let written = path.parent().map_or(Ok(()), fs::create_dir_all).and_then(|()| {
            let mut file = fs::OpenOptions::new().write(true).create_new(true).open(&path)?;
            file.write_all(content.as_bytes())
        });
        written.with_context(|| format!("{} cannot be written", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_that_every_tool_takes() {
        for good in ["a", "my-filter", "v2"] {
            check(good).unwrap();
        }
        for bad in ["", "-a", "a-", "My", "a_b", "a/b", "../a", "2a", "self", "test", "serde", &"a".repeat(64)] {
            assert!(check(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn every_placeholder_is_filled() {
        let scratch = tempfile::tempdir().unwrap();
        for lang in [Language::Rust, Language::AssemblyScript] {
            let directory = scratch.path().join(lang.name());
            make(&directory, "my-filter", lang).unwrap();
            for (path, _) in lang.files() {
                let text = fs::read_to_string(directory.join(path)).unwrap();
                let left = ["{{name", "{{module", "{{language"].iter().any(|part| text.contains(part));
                assert!(!left, "{path}");
            }
            let error = make(&directory, "my-filter", lang).unwrap_err().to_string();
            assert!(error.contains("nothing was written"), "{error}");
        }
    }

    #[test]
    fn the_sdk_is_the_version_of_the_examples() {
        let of = |text: &str| text.lines().find(|line| line.starts_with("proxy-wasm")).unwrap().to_owned();
        assert_eq!(of(RUST[0].1), of(include_str!("../../../filters/Cargo.toml")));
    }
}
