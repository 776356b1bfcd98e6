//! Copies of heads that have left a chain, for filters that may read them later: most never do, so the copy is plain bytes, and a
//! head again only when one does.

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

/// Bytes that the fields of most heads take.
const USUAL: usize = 512;

/// Header fields behind one another: their names and values, with both lengths in front.
struct Fields(Vec<u8>);

impl Fields {
    fn copy(fields: &HeaderMap) -> Self {
        let mut bytes = Vec::with_capacity(USUAL);
        for (name, value) in fields {
            // A head is far smaller than 4 GiB.
            let lengths = ((name.as_str().len() as u64) << 32) | value.len() as u64;
            bytes.extend_from_slice(&lengths.to_ne_bytes());
            bytes.extend_from_slice(name.as_str().as_bytes());
            bytes.extend_from_slice(value.as_bytes());
        }
        Self(bytes)
    }

    fn map(&self) -> HeaderMap {
        let mut fields = HeaderMap::new();
        let mut rest = self.0.as_slice();
        while let Some((name, value)) = field(&mut rest) {
            if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name), HeaderValue::from_bytes(value)) {
                // There are no more of them than there were.
                let _ = fields.try_append(name, value);
            }
        }
        fields
    }
}

/// The next one's name and value.
fn field<'a>(rest: &mut &'a [u8]) -> Option<(&'a [u8], &'a [u8])> {
    let (lengths, behind) = rest.split_first_chunk()?;
    let lengths = u64::from_ne_bytes(*lengths);
    let (name, behind) = behind.split_at_checked(usize::try_from(lengths >> 32).ok()?)?;
    let (value, behind) = behind.split_at_checked(usize::try_from(lengths & u64::from(u32::MAX)).ok()?)?;
    *rest = behind;
    Some((name, value))
}

/// A head as it left the chain.
pub(crate) struct Kept<H: Head> {
    line: H::Line,
    fields: Fields,
    head: OnceCell<Box<H>>,
}

impl<H: Head> Kept<H> {
    /// A copy.
    pub(crate) fn copy(head: &H) -> Self {
        Self { line: head.line(), fields: Fields::copy(head.fields()), head: OnceCell::new() }
    }

    /// The head.
    pub(crate) fn head(&self) -> &H {
        self.head.get_or_init(|| Box::new(H::of(&self.line, self.fields.map())))
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
        let copy = kept.head();
        assert_eq!((&copy.method, &copy.uri), (&Method::PUT, &Uri::from_static("https://reviews/a?b")));
        let pairs: Vec<_> =
            copy.headers.iter().map(|(name, value)| format!("{name}={}", value.to_str().unwrap())).collect();
        assert_eq!(pairs, ["x-a=1", "x-a=3", "x-b=2"]);
        assert!(copy.extensions.is_empty());
        let (mut response, ()) =
            http::Response::builder().status(404).header("x-a", "1").body(()).unwrap().into_parts();
        let kept = Kept::copy(&response);
        response.status = StatusCode::OK;
        assert_eq!(kept.head().status, 404);
    }
}
