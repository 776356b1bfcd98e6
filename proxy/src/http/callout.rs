//! Requests that filters make: to services of the mesh, by the way that the application's own requests take.

use std::net::{Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use ::http::{Response, request};
use futures_util::future::LocalBoxFuture;
use outrigger_core::key::ServiceKey;
use outrigger_core::reason::Reason;

use super::body::{BodyError, ResponseBody};
use super::exchange::{Exchange, Running};
use super::made::Made;
use super::{Connection, ConnectionInfo, outbound, response};
use crate::filter::{Answer, AnswerBody, CallOut, Outside};
use crate::listen::{self, Version};
use crate::worker::Worker;

/// A service that call-outs may reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    /// The service
    pub(crate) service: ServiceKey,
    /// Its port; `None`: the first
    pub(crate) port: Option<u16>,
}

/// The call-outs of one worker.
#[derive(Debug)]
pub(crate) struct Callouts {
    /// As if one client made them all: the proxy itself
    connection: Rc<Connection>,
}

impl Callouts {
    /// Those of a worker.
    pub(crate) fn new(worker: &Rc<Worker>) -> Self {
        let client = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let info = ConnectionInfo::Outbound(listen::Outbound { client, destination: None });
        Self { connection: Rc::new(Connection::new(info, Version::Http1, worker.clone())) }
    }
}

impl Outside for Callouts {
    /// The response is what a client of this proxy would get, so that failures are responses too.
    fn send(&self, call: CallOut) -> LocalBoxFuture<'static, Answer> {
        let connection = self.connection.clone();
        Box::pin(async move {
            let CallOut { place, head, body, timeout, .. } = call;
            let response = send(connection, place, head, body, timeout).await?;
            Ok(response.map(|body| -> AnswerBody { Box::pin(body) }))
        })
    }
}

async fn send(
    connection: Rc<Connection>,
    place: Place,
    head: request::Parts,
    body: Made,
    timeout: Duration,
) -> Result<Response<ResponseBody>, BodyError> {
    let running = Running::new(&connection);
    let mut exchange = Box::new(Exchange::new(connection, &head));
    let hops = response::Hops::of(&head);
    let sending = outbound::call_out(&mut exchange, &place.service, place.port, head, body);
    let answer = match tokio::time::timeout(timeout, sending).await {
        Ok(answer) => answer,
        Err(_) => Err(Reason::RequestTimeout.into()),
    };
    exchange.conclude(answer, &hops, running)
}
