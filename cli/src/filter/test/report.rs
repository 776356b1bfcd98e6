//! What is told of a run: a line for each case, what differs below it, and a summary.

use std::time::{Duration, Instant};

use outrigger_proxy::filter::cases::{Difference, Outcome};
use serde::Serialize;
use serde_json::json;

use super::paint;
use super::read::File;
use crate::output::{self, Format};

const RED: u8 = 31;
const GREEN: u8 = 32;
const YELLOW: u8 = 33;
const BOLD: u8 = 1;
/// Differences of a case that are shown.
const MOST: usize = 20;

/// What became of a case.
#[derive(Debug)]
pub(super) enum Result {
    Passed,
    Failed,
    /// It failed, and its expectations are now what was observed
    Recorded,
    /// With the reason
    Skipped(String),
}

/// A case that was run, or not.
#[derive(Debug)]
pub(super) struct Ran {
    name: String,
    line: u32,
    pub(super) took: Duration,
    pub(super) result: Result,
    pub(super) outcome: Outcome,
}

impl Ran {
    pub(super) fn new(name: &str, line: u32) -> Self {
        Self { name: name.to_owned(), line, took: Duration::ZERO, result: Result::Passed, outcome: Outcome::default() }
    }
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    name: String,
    line: u32,
    result: &'static str,
    ms: f64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    differences: Vec<Difference>,
    /// What the host said: failures of the filter, with their reasons
    #[serde(skip_serializing_if = "Vec::is_empty")]
    notes: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

#[derive(Debug, Serialize)]
struct FileRows {
    file: String,
    cases: Vec<Row>,
}

/// A run so far.
#[derive(Debug, Default)]
pub(super) struct Report {
    files: Vec<FileRows>,
    passed: usize,
    pub(super) failed: usize,
    skipped: usize,
    /// Steps whose expectations were written
    pub(super) recorded: usize,
    /// What could not be read, each with file and line
    pub(super) unreadable: Vec<String>,
    started: Option<Instant>,
}

impl Report {
    /// How many cases were looked at.
    pub(super) fn ran(&self) -> usize {
        self.files.iter().map(|file| file.cases.len()).sum()
    }

    pub(super) fn begin(&mut self, file: &File, format: Format) -> anyhow::Result<()> {
        let file = file.path.display().to_string();
        if format == Format::Table {
            output::line(&paint(BOLD, &file))?;
        }
        self.started.get_or_insert_with(Instant::now);
        self.files.push(FileRows { file, cases: Vec::new() });
        Ok(())
    }

    /// Adds a case, and tells it.
    pub(super) fn add(&mut self, ran: Ran, format: Format) -> anyhow::Result<()> {
        let (word, reason) = match &ran.result {
            Result::Passed => ("passed", None),
            Result::Failed => ("failed", None),
            Result::Recorded => ("recorded", None),
            Result::Skipped(why) => ("skipped", Some(why.clone())),
        };
        match ran.result {
            Result::Passed | Result::Recorded => self.passed += 1,
            Result::Failed => self.failed += 1,
            Result::Skipped(_) => self.skipped += 1,
        }
        if format == Format::Table {
            output::line(&render(&ran, self.files.last().map_or("", |file| file.file.as_str())))?;
        }
        let failed = matches!(ran.result, Result::Failed);
        let row = Row {
            line: ran.line,
            result: word,
            ms: ran.took.as_secs_f64() * 1000.0,
            notes: if failed { notes(&ran.outcome) } else { Vec::new() },
            differences: ran.outcome.differences,
            reason,
            name: ran.name,
        };
        if let Some(file) = self.files.last_mut() {
            file.cases.push(row);
        }
        Ok(())
    }

    /// The expectations of the last file were not written.
    pub(super) fn not_recorded(&mut self, why: &str) {
        let file = self.files.last().map_or("", |file| file.file.as_str());
        self.unreadable.push(format!("{file}: not recorded: {why}"));
    }

    /// The summary.
    pub(super) fn end(&self, format: Format) -> anyhow::Result<()> {
        // Compiling the filters included.
        let seconds = self.started.map_or(0.0, |started| started.elapsed().as_secs_f64());
        if format == Format::Json {
            return output::json(&json!({
                "files": self.files, "passed": self.passed, "failed": self.failed, "skipped": self.skipped,
                "recorded": self.recorded, "unreadable": self.unreadable, "seconds": seconds,
            }));
        }
        for why in &self.unreadable {
            output::error(why);
        }
        if self.ran() > 0 {
            let Self { passed, failed, skipped, .. } = self;
            let mut line = format!("{passed} passed, {failed} failed");
            if *skipped > 0 {
                line += &format!(", {skipped} skipped");
            }
            if self.recorded > 0 {
                line += &format!(", {} steps recorded", self.recorded);
            }
            let colour = if *failed > 0 { RED } else { GREEN };
            output::line(&paint(colour, &format!("{line}, in {seconds:.2} s")))?;
        }
        Ok(())
    }
}

/// What the host said, once each.
fn notes(outcome: &Outcome) -> Vec<String> {
    let mut all: Vec<String> = Vec::new();
    for note in outcome.steps.iter().flat_map(|step| &step.notes) {
        if !all.contains(note) {
            all.push(note.clone());
        }
    }
    all
}

fn render(ran: &Ran, file: &str) -> String {
    let ms = format!("{:.0} ms", ran.took.as_secs_f64() * 1000.0);
    match &ran.result {
        Result::Passed => format!("  {}    {} ({ms})", paint(GREEN, "ok"), ran.name),
        Result::Skipped(why) => format!("  {}  {}: {why}", paint(YELLOW, "skip"), ran.name),
        Result::Recorded => format!("  {}   {} ({ms})", paint(YELLOW, "new"), ran.name),
        Result::Failed => {
            let place = format!("{file}:{}", ran.line);
            let mut text = format!("  {}  {} ({ms}) {place}", paint(RED, "FAIL"), ran.name);
            text += &differences(&ran.outcome.differences);
            for note in notes(&ran.outcome) {
                // A guest's backtrace has lines of its own.
                text += &format!("\n       note: {}", note.replace('\n', "\n       "));
            }
            text
        }
    }
}

/// By step: what was expected (`-`) and what was observed (`+`).
fn differences(all: &[Difference]) -> String {
    let mut text = String::new();
    let mut step = "";
    for Difference { step: of, what, expected, observed } in all.iter().take(MOST) {
        let name = if of.is_empty() { "start" } else { of };
        if name != step {
            text += &format!("\n       {name}");
            step = name;
        }
        text += &format!("\n         {what}");
        text += &format!("\n           {}", paint(RED, &format!("- {expected}")));
        text += &format!("\n           {}", paint(GREEN, &format!("+ {observed}")));
    }
    if all.len() > MOST {
        text += &format!("\n         … and {} differences more", all.len() - MOST);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_shows_what_was_expected_and_what_was_observed() {
        let mut ran = Ran::new("refuses", 7);
        ran.result = Result::Failed;
        ran.outcome.differences = vec![
            Difference::new("status", "403", "200").of("first"),
            Difference::new("log 1", "nothing", "\"info x\"").of("first"),
            Difference::new("status", "1", "2").of("second"),
        ];
        let text = render(&ran, "c.yaml");
        let expected = "  FAIL  refuses (0 ms) c.yaml:7\n       first\n         status\n           - 403\n           + 200\n         \
                        log 1\n           - nothing\n           + \"info x\"\n       second\n         status\n           - 1\n           + 2";
        assert_eq!(text, expected);
    }
}
