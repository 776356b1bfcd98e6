//! YAML text into validated resources, each with its file and line. One bad document is one [`Rejection`]; the others
//! of its file are accepted all the same. Unknown fields are errors, and what this version cannot do is refused.
//!
//! The model keeps leaves (matches, header modifiers, authorization rules) in the wire's types, since they have
//! nothing left to decide; everything that merging and resolving needs is in types of its own.

mod registration;
mod rejection;
pub(crate) mod value;

use std::fmt;

use serde::{Deserialize, Serialize};

pub use registration::{AppPort, BadRegistration, Dial, PortProtocol, Registration};
pub use rejection::{Closed, Closes, Rejection};

/// Everything that one file holds.
#[derive(Debug, Default)]
pub struct Parsed {
    /// Accepted, in the order of the file
    pub resources: Vec<Loaded>,
    /// Not accepted, each with the reason
    pub rejections: Vec<Rejection>,
    /// Of no use to the mesh: one line each in the log
    pub skipped: Vec<Skipped>,
}

/// A document that is not for the mesh.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Skipped {
    /// As given to [`parse`]
    pub file: String,
    /// First line of the document
    pub line: u32,
    /// Kind as written
    pub kind: String,
    /// Namespace, or empty
    pub namespace: String,
    /// Name, or empty
    pub name: String,
    /// Why
    pub reason: String,
}

/// One accepted resource and where it came from.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// As given to [`parse`]
    pub file: String,
    /// First line of the document, counted from 1
    pub line: u32,
    /// The document's text: `parse_at(file, line, document)` gives this resource again. To be kept as the last good version
    pub document: String,
    /// Kind, namespace, name
    pub id: ResourceId,
    /// `metadata.creationTimestamp` in seconds since the Unix epoch, where the document has one
    pub created: Option<i64>,
    /// What it says
    pub resource: Resource,
}

/// What makes a resource the same one over its versions.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ResourceId {
    /// Kind, as `HTTPRoute`
    pub kind: String,
    /// Namespace; empty for cluster-wide kinds
    pub namespace: String,
    /// Name
    pub name: String,
}

/// A validated resource.
#[derive(Debug, Clone)]
pub enum Resource {
    /// Accepted and not needed (Namespace, ServiceAccount, ReferenceGrant)
    Unused,
}

/// Reads every document of `text`. `file` is only a name: it appears in what is reported.
pub fn parse(file: &str, text: &str) -> Parsed {
    parse_at(file, 1, text)
}

/// As [`parse`], for text that begins at `line` of its file.
pub fn parse_at(_file: &str, _line: u32, _text: &str) -> Parsed {
    Parsed::default()
}

impl fmt::Display for ResourceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.namespace.as_str() {
            "" => write!(f, "{} {}", self.kind, self.name),
            namespace => write!(f, "{} {namespace}/{}", self.kind, self.name),
        }
    }
}

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, line, kind, namespace, name, reason } = self;
        let id = ResourceId { kind: kind.clone(), namespace: namespace.clone(), name: name.clone() };
        write!(f, "{file}:{line}: {id}: skipped: {reason}")
    }
}
