//! What filters log, and what the host says of them.

use std::fmt::{Debug, Write as _};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer};

/// What was said so far.
#[derive(Debug, Default)]
pub(super) struct Said {
    /// By filters, as `level text`
    pub(super) lines: Vec<String>,
    /// By the host: warnings and errors
    pub(super) notes: Vec<String>,
}

/// Collects it.
#[derive(Debug, Clone, Default)]
pub(super) struct Capture(Arc<Mutex<Said>>);

impl Capture {
    pub(super) fn said(&self) -> MutexGuard<'_, Said> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The filters' lines since the last time.
    pub(super) fn take_lines(&self) -> Vec<String> {
        std::mem::take(&mut self.said().lines)
    }

    /// The host's since the last time.
    pub(super) fn take_notes(&self) -> Vec<String> {
        std::mem::take(&mut self.said().notes)
    }
}

impl<S: Subscriber> Layer<S> for Capture {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let level = *event.metadata().level();
        let mut words = Words::default();
        if event.metadata().target() == "filter" {
            event.record(&mut words);
            self.said().lines.push(format!("{} {}", level.as_str().to_ascii_lowercase(), words.message));
        } else if level <= Level::WARN {
            event.record(&mut words);
            self.said().notes.push(words.message + &words.fields);
        }
    }
}

#[derive(Default)]
struct Words {
    message: String,
    /// `, name: value` each
    fields: String,
}

impl Visit for Words {
    // Writing to a String cannot fail.
    fn record_str(&mut self, field: &Field, value: &str) {
        let _ = match field.name() {
            "message" => write!(self.message, "{value}"),
            name => write!(self.fields, ", {name}: {value}"),
        };
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, ", {name}: {value:?}"),
        };
    }
}
