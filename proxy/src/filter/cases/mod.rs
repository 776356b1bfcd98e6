//! Cases for filters: what a filter is given and what must come of it. Run in process ([`run`]) against the host that serves
//! traffic; the conformance suite runs the same cases through a whole proxy, and through Envoy.

mod model;
mod observe;

pub use model::{
    Case, Chunk, Expect, ExpectRequest, ExpectResponse, ExpectUpstream, FilterSpec, Peer, Reply, Request, Service, Start,
    Step, Suite,
};
pub use observe::{Differences, Headers, Seen, SeenRequest, SeenResponse, compare, compare_refusal, compare_start, pair};
