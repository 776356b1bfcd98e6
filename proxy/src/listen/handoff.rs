//! The seam to the data path.

use std::rc::Rc;

use super::{Inbound, Outbound, Version};
use crate::io::Io;
use crate::worker::Worker;

pub(super) async fn http_outbound(io: Io, info: Outbound, version: Version, worker: Rc<Worker>) {
    drop((io, info, version, worker));
}

pub(super) async fn http_inbound(io: Io, info: Inbound, version: Version, worker: Rc<Worker>) {
    drop((io, info, version, worker));
}

pub(super) async fn tcp_outbound(io: Io, info: Outbound, worker: Rc<Worker>) {
    drop((io, info, worker));
}

pub(super) async fn tcp_inbound(io: Io, info: Inbound, worker: Rc<Worker>) {
    drop((io, info, worker));
}
