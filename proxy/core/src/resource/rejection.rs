//! What could not be accepted, and why.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// One resource that was not accepted. Everything else in its file still is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rejection {
    /// As given to [`super::parse`]
    pub file: String,
    /// Line of the field, or of the document, counted from 1
    pub line: u32,
    /// Kind as written; empty when it could not be read
    pub kind: String,
    /// Namespace; empty for cluster-wide kinds, or when it could not be read
    pub namespace: String,
    /// Name; empty when it could not be read
    pub name: String,
    /// Path of the field, as `spec.ports[0].port`; empty for the whole document
    pub field: String,
    /// What is wrong, and the remedy
    pub reason: String,
    /// What to fail closed when no earlier version of this resource is held
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub closes: Option<Closes>,
}

/// What an unreadable AuthorizationPolicy or MtlsPolicy would have governed: closed until it can be read.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Closes {
    /// What is closed
    pub what: Closed,
    /// Namespace of the policy
    pub namespace: String,
    /// Labels of its selector; `None` when there is none or it could not be read: the whole namespace
    pub selector: Option<BTreeMap<String, String>>,
}

/// The ways of failing closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Closed {
    /// Everything is denied (AuthorizationPolicy)
    Authorization,
    /// Plaintext is refused (MtlsPolicy)
    Mtls,
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: ", self.file, self.line)?;
        if !self.kind.is_empty() {
            f.write_str(&self.kind)?;
            match (self.namespace.as_str(), self.name.as_str()) {
                ("", "") => {}
                ("", name) => write!(f, " {name}")?,
                (namespace, "") => write!(f, " in {namespace}")?,
                (namespace, name) => write!(f, " {namespace}/{name}")?,
            }
            f.write_str(": ")?;
        }
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        f.write_str(&self.reason)
    }
}
