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
