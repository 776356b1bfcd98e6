//! What a file of cases may say only so: what cannot be sent is refused here rather than left out.

use http::{HeaderName, HeaderValue, Method, Uri};

use super::model::{Case, Reply, Request, Service, Step, Suite};
use super::observe::pair;
use super::run::moment;

/// The first thing that is wrong, by the path of its field as `cases[0].steps[1].request.method`.
///
/// # Errors
/// The path, and what is wrong.
pub fn check(suite: &Suite) -> Result<(), (String, String)> {
    for (index, case) in suite.cases.iter().enumerate() {
        check_case(case).map_err(|(path, why)| (format!("cases[{index}].{path}"), why))?;
    }
    Ok(())
}

fn check_case(case: &Case) -> Result<(), (String, String)> {
    if case.filters.is_empty() {
        return Err(("filters".into(), "missing; name the filter's module here, or once for the whole file".into()));
    }
    if let Some(clock) = &case.clock {
        moment(clock).map_err(|why| ("clock".to_owned(), why))?;
    }
    for (index, step) in case.steps.iter().enumerate() {
        check_step(step).map_err(|(path, why)| (format!("steps[{index}].{path}"), why))?;
    }
    check_protocol(&case.steps)
}

/// A case has requests or TCP connections, and expects nothing of the others.
fn check_protocol(steps: &[Step]) -> Result<(), (String, String)> {
    let first = |is: fn(&Step) -> bool| steps.iter().position(is);
    let (request, tcp) = (first(|step| step.request.is_some()), first(|step| step.tcp.is_some()));
    let other = |field: &str, index: usize, what: &str, own: &str| {
        Err((format!("steps[{index}].{field}"), format!("{what}; {own} go into a case of their own")))
    };
    match (request, tcp) {
        (Some(request), Some(tcp)) if request <= tcp => {
            other("tcp", tcp, &format!("this case is of requests (steps[{request}].request)"), "TCP connections")
        }
        (Some(request), Some(tcp)) => {
            other("request", request, &format!("this case is of a TCP connection (steps[{tcp}].tcp)"), "requests")
        }
        (None, Some(_)) => check_tcp(steps),
        (_, None) => match first(|step| step.expect.tcp.is_some()) {
            Some(index) => {
                let why = "there is no TCP connection in this case; a step makes one with tcp (`tcp: {connect: true}`)";
                Err((format!("steps[{index}].expect.tcp"), why.into()))
            }
            None => Ok(()),
        },
    }
}

/// What only requests have, and what a side sends after its end.
fn check_tcp(steps: &[Step]) -> Result<(), (String, String)> {
    let mut ended = [None, None];
    for (index, step) in steps.iter().enumerate() {
        let of_requests = [
            ("upstream", step.upstream != Reply::default(), "what the upstream sends is tcp.upstream"),
            ("update-during", step.update_during.is_some(), "`update` replaces the chain; a connection keeps its own"),
            ("expect.response", step.expect.response.is_some(), "what comes to the client is expect.tcp.client"),
            ("expect.upstream", step.expect.upstream.is_some(), "what comes to the upstream is expect.tcp.upstream"),
        ];
        for (field, is, remedy) in of_requests {
            if is {
                let why = format!("is of requests, and this case is of a TCP connection; {remedy}");
                return Err((format!("steps[{index}].{field}"), why));
            }
        }
        let Some(tcp) = &step.tcp else { continue };
        if tcp.connect {
            ended = [None, None];
        }
        let sides = [("client", &tcp.client, tcp.client_end), ("upstream", &tcp.upstream, tcp.upstream_end)];
        for ((side, sent, end), ended) in sides.into_iter().zip(&mut ended) {
            if let Some(before) = ended.filter(|_| !sent.is_empty()) {
                let why =
                    format!("it has ended in steps[{before}] ({side}-end); `connect: true` begins a new connection");
                return Err((format!("steps[{index}].tcp.{side}"), why));
            }
            if end {
                *ended = Some(index);
            }
        }
    }
    Ok(())
}

fn check_step(step: &Step) -> Result<(), (String, String)> {
    if let Some(request) = &step.request {
        check_request(request).map_err(|(path, why)| (format!("request.{path}"), why))?;
    }
    check_reply(&step.upstream).map_err(|(path, why)| (format!("upstream.{path}"), why))?;
    for (name, service) in &step.services {
        if let Service::Reply(reply) = service {
            check_reply(reply).map_err(|(path, why)| (format!("services.{name}.reply.{path}"), why))?;
        }
    }
    Ok(())
}

fn check_request(request: &Request) -> Result<(), (String, String)> {
    let bad = |field: &str, text: &str, what: &str| Err((field.to_owned(), format!("{text:?} is no {what}")));
    if Method::from_bytes(request.method.as_bytes()).is_err() {
        return bad("method", &request.method, "HTTP method");
    }
    if !request.path.starts_with('/') || request.path.parse::<Uri>().is_err() {
        return bad("path", &request.path, "path; it begins with /");
    }
    if HeaderValue::from_str(&request.authority).is_err() {
        return bad("authority", &request.authority, "host");
    }
    lines("headers", &request.headers)?;
    lines("trailers", &request.trailers)
}

fn check_reply(reply: &Reply) -> Result<(), (String, String)> {
    if !(200..=999).contains(&reply.status) {
        return Err(("status".into(), format!("{} is no status of a final response; 200 to 999", reply.status)));
    }
    lines("headers", &reply.headers)?;
    lines("trailers", &reply.trailers)
}

fn lines(field: &str, lines: &[String]) -> Result<(), (String, String)> {
    for (index, line) in lines.iter().enumerate() {
        let (name, value) = pair(line);
        let valid =
            HeaderName::try_from(name).is_ok() && value.is_some_and(|value| HeaderValue::from_str(value).is_ok());
        if !valid {
            return Err((format!("{field}[{index}]"), format!("{line:?} is not `name: value`")));
        }
    }
    Ok(())
}
