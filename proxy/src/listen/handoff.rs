//! The seam to the data path.

use std::rc::Rc;

use super::{Inbound, Outbound, Version};
use crate::http::ConnectionInfo;
use crate::io::Io;
use crate::worker::Worker;

pub(super) async fn http_outbound(io: Io, info: Outbound, version: Version, worker: Rc<Worker>) {
    Box::pin(crate::http::serve(io, ConnectionInfo::Outbound(info), version, worker)).await;
}

pub(super) async fn http_inbound(io: Io, info: Inbound, version: Version, worker: Rc<Worker>) {
    Box::pin(crate::http::serve(io, ConnectionInfo::Inbound(info), version, worker)).await;
}

pub(super) async fn tcp_outbound(io: Io, info: Outbound, worker: Rc<Worker>) {
    Box::pin(crate::tcp::serve_outbound(io, info, worker)).await;
}

pub(super) async fn tcp_inbound(io: Io, info: Inbound, worker: Rc<Worker>) {
    Box::pin(crate::tcp::serve_inbound(io, info, worker)).await;
}
