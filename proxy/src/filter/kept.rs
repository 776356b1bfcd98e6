//! Copies of heads that have left a chain, for filters that may read them later: most never do, so the copy is a plain list,
//! and a head again only when one does.

use std::cell::OnceCell;

use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, Version, request, response};

/// A head in its parts.
pub(crate) trait Head: Sized {
    /// All but the fields
    type Line;
    /// A copy of it.
    fn line(&self) -> Self::Line;
    fn fields(&self) -> &HeaderMap;
    /// A head of copied parts; extensions are not copied.
    fn of(line: &Self::Line, fields: HeaderMap) -> Self;
}

impl Head for request::Parts {
    type Line = (Method, Uri, Version);

    fn line(&self) -> Self::Line {
        (self.method.clone(), self.uri.clone(), self.version)
    }

    fn fields(&self) -> &HeaderMap {
        &self.headers
    }

    fn of((method, uri, version): &Self::Line, fields: HeaderMap) -> Self {
        let (mut head, ()) = http::Request::new(()).into_parts();
        (head.method, head.uri, head.version, head.headers) = (method.clone(), uri.clone(), *version, fields);
        head
    }
}

impl Head for response::Parts {
    type Line = (StatusCode, Version);

    fn line(&self) -> Self::Line {
        (self.status, self.version)
    }

    fn fields(&self) -> &HeaderMap {
        &self.headers
    }

    fn of((status, version): &Self::Line, fields: HeaderMap) -> Self {
        let (mut head, ()) = http::Response::new(()).into_parts();
        (head.status, head.version, head.headers) = (*status, *version, fields);
        head
    }
}

type Fields = Vec<(HeaderName, HeaderValue)>;

/// A head as it left the chain.
pub(crate) struct Kept<H: Head> {
    copy: Option<(H::Line, Fields)>,
    head: OnceCell<Box<H>>,
}

impl<H: Head> Kept<H> {
    /// A copy.
    pub(crate) fn copy(head: &H) -> Self {
        let fields = head.fields().iter().map(|(name, value)| (name.clone(), value.clone()));
        let mut list = Vec::with_capacity(head.fields().len());
        list.extend(fields);
        Self { copy: Some((head.line(), list)), head: OnceCell::new() }
    }

    /// The head itself, which never left.
    pub(crate) fn whole(head: H) -> Self {
        Self { copy: None, head: OnceCell::from(Box::new(head)) }
    }

    /// The head.
    pub(crate) fn head(&self) -> Option<&H> {
        if let Some((line, list)) = self.copy.as_ref().filter(|_| self.head.get().is_none()) {
            let mut fields = HeaderMap::with_capacity(list.len());
            for (name, value) in list {
                // There are no more of them than there were.
                let _ = fields.try_append(name.clone(), value.clone());
            }
            let _ = self.head.set(Box::new(H::of(line, fields)));
        }
        self.head.get().map(Box::as_ref)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_the_head_without_its_extensions() {
        let request =
            http::Request::put("https://reviews/a?b").header("x-a", "1").header("x-b", "2").header("x-a", "3");
        let (mut head, ()) = request.extension(7_u8).body(()).unwrap().into_parts();
        let kept = Kept::copy(&head);
        head.headers.clear();
        let copy = kept.head().unwrap();
        assert_eq!((&copy.method, &copy.uri), (&Method::PUT, &Uri::from_static("https://reviews/a?b")));
        let pairs: Vec<_> =
            copy.headers.iter().map(|(name, value)| format!("{name}={}", value.to_str().unwrap())).collect();
        assert_eq!(pairs, ["x-a=1", "x-a=3", "x-b=2"]);
        assert!(copy.extensions.is_empty());
        let (mut response, ()) =
            http::Response::builder().status(404).header("x-a", "1").body(()).unwrap().into_parts();
        let kept = Kept::copy(&response);
        response.status = StatusCode::OK;
        assert_eq!(kept.head().unwrap().status, 404);
        assert_eq!(Kept::whole(response).head().unwrap().headers.len(), 1);
    }
}
