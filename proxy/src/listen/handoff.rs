//! The seam to the data path.

use std::rc::Rc;

use super::{Inbound, Outbound, Version};
use crate::http::{self, ConnectionInfo};
use crate::io::Io;
use crate::tcp;
use crate::worker::Worker;

/// A connection of which everything is known that is to be known before its first request. A value rather than a call, so that
/// what it took to find out is freed before it is served.
#[derive(Debug)]
pub(super) enum Known {
    /// Requests
    Http(Io, ConnectionInfo, Version),
    /// Bytes, from the application
    TcpOutbound(Io, Outbound),
    /// Bytes, to the application
    TcpInbound(Io, Inbound),
    /// Nothing is left to serve
    Over,
}

impl Known {
    pub(super) fn outbound(io: impl Into<Io>, info: Outbound, version: Option<Version>) -> Self {
        match version {
            Some(version) => Self::Http(io.into(), ConnectionInfo::Outbound(info), version),
            None => Self::TcpOutbound(io.into(), info),
        }
    }

    pub(super) fn inbound(io: impl Into<Io>, info: Inbound, version: Option<Version>) -> Self {
        match version {
            Some(version) => Self::Http(io.into(), ConnectionInfo::Inbound(info), version),
            None => Self::TcpInbound(io.into(), info),
        }
    }

    /// What serves it, with a place of its own in memory.
    pub(super) fn serve(self, worker: Rc<Worker>) -> std::pin::Pin<Box<dyn Future<Output = ()>>> {
        match self {
            Self::Http(io, info, version) => Box::pin(http::serve(io, info, version, worker)),
            Self::TcpOutbound(io, info) => Box::pin(tcp::serve_outbound(io, info, worker)),
            Self::TcpInbound(io, info) => Box::pin(tcp::serve_inbound(io, info, worker)),
            Self::Over => Box::pin(std::future::ready(())),
        }
    }
}
