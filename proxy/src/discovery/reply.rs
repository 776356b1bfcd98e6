//! The answer to one response: ACK when everything of it serves, NACK naming what was refused.

use std::collections::BTreeSet;

use outrigger_proto::discovery::{DeltaDiscoveryRequest, ResourceError, ResourceName, Status};
use prost::Message;

const RESOURCE_ERROR: &str = "type.googleapis.com/envoy.service.discovery.v3.ResourceError";
/// google.rpc.Code.INVALID_ARGUMENT
const INVALID_ARGUMENT: i32 = 3;

/// A response that is not answered yet.
#[derive(Debug)]
pub(crate) struct OpenResponse {
    pub(crate) type_url: String,
    nonce: String,
    waiting: BTreeSet<String>,
    errors: Vec<(String, String)>,
}

impl OpenResponse {
    pub(crate) fn new(type_url: String, nonce: String) -> Self {
        Self { type_url, nonce, waiting: BTreeSet::new(), errors: Vec::new() }
    }

    /// The resource is linked but not installed.
    pub(crate) fn wait(&mut self, name: String) {
        self.waiting.insert(name);
    }

    /// The resource is refused.
    pub(crate) fn fail(&mut self, name: &str, problem: &str) {
        tracing::warn!(resource = name, problem, "refused: the last good version goes on serving");
        self.errors.push((name.to_owned(), problem.to_owned()));
    }

    /// A newer version arrived in this response: older ones no longer wait for theirs.
    pub(crate) fn supersede(&self, older: &mut [Self], name: &str) {
        for open in older.iter_mut().filter(|open| open.type_url == self.type_url) {
            open.waiting.remove(name);
        }
    }

    /// The resource is installed, or refused after all.
    pub(crate) fn settle(&mut self, type_url: &str, name: &str, problem: Option<&str>) {
        if self.type_url == type_url
            && self.waiting.remove(name)
            && let Some(problem) = problem
        {
            self.fail(name, problem);
        }
    }

    pub(crate) fn is_done(&self) -> bool {
        self.waiting.is_empty()
    }

    /// The request that answers it; none for what no stream waits for (a restored snapshot).
    pub(crate) fn reply(self) -> Option<DeltaDiscoveryRequest> {
        if self.nonce.is_empty() {
            return None;
        }
        let error_detail = (!self.errors.is_empty()).then(|| status(&self.errors));
        Some(DeltaDiscoveryRequest {
            type_url: self.type_url,
            response_nonce: self.nonce,
            error_detail,
            ..DeltaDiscoveryRequest::default()
        })
    }
}

fn status(errors: &[(String, String)]) -> Status {
    let problem = |message: &str| Status { code: INVALID_ARGUMENT, message: message.to_owned(), details: Vec::new() };
    let named = errors.iter().filter(|(name, _)| !name.is_empty());
    let details = named
        .map(|(name, message)| outrigger_proto::Any {
            type_url: RESOURCE_ERROR.to_owned(),
            value: ResourceError {
                resource_name: Some(ResourceName { name: name.clone() }),
                error_detail: Some(problem(message)),
            }
            .encode_to_vec()
            .into(),
        })
        .collect();
    let message: Vec<String> = errors.iter().map(|(name, message)| format!("{name}: {message}")).collect();
    Status { details, ..problem(&message.join("; ")) }
}
