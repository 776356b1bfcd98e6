//! Header modifiers, redirects and rewrites, as Gateway API has them.

use std::fmt::Write;

use http::uri::{Authority, PathAndQuery};
use http::{HeaderMap, HeaderValue, StatusCode, Uri, header, request, response};

use crate::link::{HeaderChange, PathChange, Redirect, Rewrite, RouteFilters};

/// Changes the headers of a request (of a copy, where the filters are a share's).
pub fn modify_request(filters: &RouteFilters, head: &mut request::Parts) {
    filters.request.iter().for_each(|one| apply(one, &mut head.headers));
}

/// Changes the headers of a response.
pub fn modify_response(filters: &RouteFilters, head: &mut response::Parts) {
    filters.response.iter().for_each(|one| apply(one, &mut head.headers));
}

fn apply(change: &HeaderChange, headers: &mut HeaderMap) {
    for (name, value) in &change.set {
        headers.insert(name, value.clone());
    }
    for (name, value) in &change.add {
        // Set-Cookie is the one header whose values cannot be joined (RFC 9110 5.3).
        if name == header::SET_COOKIE {
            headers.append(name, value.clone());
            continue;
        }
        match joined(headers.get_all(name).iter().chain([value])) {
            Some(joined) => headers.insert(name, joined),
            None => headers.insert(name, value.clone()),
        };
    }
    for name in &change.remove {
        headers.remove(name);
    }
}

fn joined<'a>(values: impl Iterator<Item = &'a HeaderValue>) -> Option<HeaderValue> {
    let parts: Vec<&[u8]> = values.map(HeaderValue::as_bytes).collect();
    HeaderValue::from_bytes(&parts.join(&b','.to_owned())).ok()
}

/// Status and `Location` of a redirect. `scheme` and `authority` are the request's own, `prefix` what its match matched.
///
/// Gateway API: an explicit scheme implies its well-known port; without one the listener's port counts, which in a mesh
/// is the one the request was sent to; 80 for http and 443 for https are left out.
pub fn redirect(
    redirect: &Redirect,
    scheme: &str,
    authority: &Authority,
    port: u16,
    path: &str,
    query: Option<&str>,
    prefix: Option<&str>,
) -> (StatusCode, HeaderValue) {
    let well_known = |scheme: &str| if scheme == "https" { 443 } else { 80 };
    let new_scheme = redirect.scheme.as_deref().unwrap_or(scheme);
    let host = redirect.hostname.as_deref().unwrap_or(authority.host());
    let port = match (redirect.port, &redirect.scheme) {
        (Some(port), _) => port,
        (None, Some(scheme)) => well_known(scheme),
        (None, None) => port,
    };
    let path = change_path(redirect.path.as_ref(), path, prefix);
    let mut location = format!("{new_scheme}://{host}");
    if port != well_known(new_scheme) {
        let _ = write!(location, ":{port}");
    }
    location.push_str(path.as_deref().unwrap_or("/"));
    if let Some(query) = query {
        location.push('?');
        location.push_str(query);
    }
    // A hostname that cannot stand in a header is refused when linking; the root is always right.
    let location = HeaderValue::from_str(&location).unwrap_or(HeaderValue::from_static("/"));
    (redirect.status, location)
}

/// Rewrites authority and path on the way to the backend; the query stays. `canonical` is the path where it is not as sent, and `prefix` what
/// the request's match matched of it: `/%61/../b` as sent would match and not be rewritten, or lead out of its replacement.
pub fn rewrite(rewrite: &Rewrite, head: &mut request::Parts, canonical: Option<&str>, prefix: Option<&str>) {
    if let Some(host) = &rewrite.hostname {
        head.headers.insert(header::HOST, host.clone());
    }
    let authority = rewrite.hostname.as_ref().and_then(|host| Authority::try_from(host.as_bytes()).ok());
    if authority.is_none() && rewrite.path.is_none() {
        return;
    }
    let mut parts = std::mem::take(&mut head.uri).into_parts();
    if let (Some(authority), Some(_)) = (authority, &parts.authority) {
        parts.authority = Some(authority);
    }
    if let Some(change) = &rewrite.path {
        let (path, query) = match &parts.path_and_query {
            Some(old) => (canonical.unwrap_or(old.path()), old.query()),
            None => (canonical.unwrap_or("/"), None),
        };
        let mut new = change_path(Some(change), path, prefix).unwrap_or_else(|| path.to_owned());
        if let Some(query) = query {
            new.push('?');
            new.push_str(query);
        }
        if let Ok(new) = PathAndQuery::try_from(new) {
            parts.path_and_query = Some(new);
        }
    }
    // Only parts that were parsed go in, and none is taken away: this cannot fail.
    head.uri = Uri::from_parts(parts).unwrap_or_default();
}

/// The path after a change. A replacement of a prefix without a prefix match changes nothing: the compiler refuses it.
fn change_path(change: Option<&PathChange>, path: &str, prefix: Option<&str>) -> Option<String> {
    match change {
        None => Some(path.to_owned()),
        Some(PathChange::Full(full)) if full.starts_with('/') => Some(full.to_string()),
        Some(PathChange::Full(full)) => Some(format!("/{full}")),
        Some(PathChange::Prefix(new)) => {
            let rest = path.strip_prefix(prefix?)?;
            Some(replaced(new, rest))
        }
    }
}

/// The specification's table: exactly one slash between the new prefix and the rest, and never an empty path.
fn replaced(new: &str, rest: &str) -> String {
    let slash = if new.starts_with('/') || new.is_empty() { "" } else { "/" };
    let path = match rest {
        "" => format!("{slash}{new}"),
        rest => format!("{slash}{}{rest}", new.trim_end_matches('/')),
    };
    if path.is_empty() { "/".to_owned() } else { path }
}
