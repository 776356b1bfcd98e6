//! What the commands that run a filter here have in common: its bytes, its configuration, where it is compiled, what it logs.

use std::fmt::{Debug, Write as _};
use std::io::IsTerminal as _;
use std::path::Path;

use anyhow::Context as _;
use outrigger_proxy::admin::LogHandle;
use outrigger_proxy::filter::Compiler;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, reload};

use crate::output;

/// Guests run on its threads: their stack, and room for the host's frames.
pub(super) const STACK: usize = 4 << 20;

/// A module's bytes.
pub(super) fn read_module(file: &Path) -> anyhow::Result<Vec<u8>> {
    std::fs::read(file)
        .with_context(|| format!("{}: cannot be read; `outrigger filter build` makes it", file.display()))
}

/// `TEXT` or `@FILE`; nothing is no configuration.
pub(super) fn configuration(text: Option<&str>) -> anyhow::Result<Vec<u8>> {
    match text.map(|text| (text, text.strip_prefix('@'))) {
        None => Ok(Vec::new()),
        Some((text, None)) => Ok(text.as_bytes().to_vec()),
        Some((_, Some(file))) => std::fs::read(file).with_context(|| format!("--configuration @{file}")),
    }
}

/// Modules are compiled as in a proxy: by a child, with limits.
pub(super) fn compiler() -> anyhow::Result<Compiler> {
    Ok(Compiler::Child(std::env::current_exe().context("the path of this executable")?))
}

/// What instances are started and tried on.
pub(super) fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_stack_size(STACK)
        .enable_all()
        .build()
        .context("the runtime cannot be made")
}

/// A size for people.
pub(super) fn bytes(size: u64) -> String {
    amount(size as f64)
}

/// The same, of bytes that were computed with.
pub(super) fn amount(bytes: f64) -> String {
    let kib = bytes / 1024.0;
    if kib < 1.0 {
        format!("{bytes:.0} B")
    } else if kib < 1024.0 {
        format!("{kib:.1} KiB")
    } else {
        format!("{:.1} MiB", kib / 1024.0)
    }
}

/// Writes what filters log to standard error, a line each; of the host only what goes wrong. `level`: the filters' lowest. `trace`: each
/// host call too.
pub(super) fn log(level: &str, trace: bool) -> anyhow::Result<LogHandle> {
    let trace = if trace { "trace" } else { "off" };
    let filter = EnvFilter::try_new(format!("warn,filter={level},filter_call={trace}"))
        .with_context(|| format!("--log {level}: give trace, debug, info, warn or error"))?;
    let (filter, handle) = reload::Layer::new(filter);
    let lines = Lines { colours: std::io::stderr().is_terminal() };
    tracing_subscriber::registry().with(filter).with(lines).try_init().context("the log is set up already")?;
    Ok(handle)
}

struct Lines {
    colours: bool,
}

impl<S: Subscriber> Layer<S> for Lines {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let level = *event.metadata().level();
        let (who, level) = match event.metadata().target() {
            "filter_call" => ("call", ""),
            "filter" => ("filter", name(level)),
            _ => ("proxy", name(level)),
        };
        let mut line = Line { message: String::new(), fields: String::new(), all: who == "proxy" };
        event.record(&mut line);
        let Line { message, fields, .. } = line;
        let (begin, end) = match (self.colours, who) {
            (true, "call") => ("\x1b[2m", "\x1b[0m"),
            (true, _) if level == "error" => ("\x1b[31m", "\x1b[0m"),
            (true, _) if level == "warn" => ("\x1b[33m", "\x1b[0m"),
            _ => ("", ""),
        };
        let level = if level.is_empty() { String::new() } else { format!("{level:<5} ") };
        output::error(&format!("{begin}{who:<6} {level}{message}{fields}{end}"));
    }
}

fn name(level: Level) -> &'static str {
    match level {
        Level::TRACE => "trace",
        Level::DEBUG => "debug",
        Level::INFO => "info",
        Level::WARN => "warn",
        Level::ERROR => "error",
    }
}

/// The text of an event, and of the proxy's own events also their fields.
struct Line {
    message: String,
    fields: String,
    all: bool,
}

impl Visit for Line {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        // Writing to a String cannot fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name if self.all => write!(self.fields, ", {name}: {value:?}"),
            _ => Ok(()),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_is_a_text_or_a_file() {
        assert_eq!(configuration(None).unwrap(), b"");
        assert_eq!(configuration(Some("{}")).unwrap(), b"{}");
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "from a file").unwrap();
        assert_eq!(configuration(Some(&format!("@{}", file.path().display()))).unwrap(), b"from a file");
        assert!(configuration(Some("@/nowhere")).unwrap_err().to_string().contains("/nowhere"));
    }

    #[test]
    fn sizes() {
        assert_eq!([bytes(7), bytes(1536), bytes(3 << 20)], ["7 B", "1.5 KiB", "3.0 MiB"]);
    }
}
