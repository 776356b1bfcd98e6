//! Cases for filters: what a filter is given and what must come of it. Run in process ([`Runner`]) against the host that serves
//! traffic; the conformance suite runs the same cases through a whole proxy, and through Envoy.

mod bench;
mod called;
mod capture;
mod check;
mod decode;
mod drive;
mod model;
mod observe;
mod run;
mod tcp;

pub use bench::{Bench, Cost, Costs, bench};
pub use check::check;
pub use model::{
    Case, Chunk, Expect, ExpectRequest, ExpectResponse, ExpectTcp, ExpectUpstream, FilterSpec, Peer, Reply, Request,
    Service, Start, Step, Suite, Tcp, TcpState,
};
pub use observe::{
    Difference, Differences, Headers, Seen, SeenRequest, SeenResponse, SeenTcp, compare, compare_refusal,
    compare_start, pair,
};
pub use run::{Modules, Outcome, Runner, metric, moment};
