//! The head of a request behind its filters.

use std::ops::{Deref, DerefMut};
use std::rc::Rc;

use http::{HeaderMap, Request, request};

/// A request's head. Filters that may read it as long as the exchange lasts share it with those who send it: a copy is made only where one of
/// these writes to it then, as a route that changes requests does.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "most requests have no filter: boxed, each of them would pay for it")]
pub enum RequestHead {
    /// Nobody else has it
    Own(request::Parts),
    /// Filters may
    Shared(Rc<request::Parts>),
}

impl RequestHead {
    /// Takes the head, and leaves an empty one.
    pub(super) fn take(&mut self) -> Rc<request::Parts> {
        thread_local! {
            // Made for each request it would cost as much as taking does.
            static EMPTY: Rc<request::Parts> = Rc::new(Request::new(()).into_parts().0);
        }
        match std::mem::replace(self, Self::Shared(EMPTY.with(Rc::clone))) {
            Self::Own(head) => Rc::new(head),
            Self::Shared(head) => head,
        }
    }

    /// The fields, for something else, where nobody else has them.
    pub fn spare_headers(&mut self) -> Option<HeaderMap> {
        let head = match self {
            Self::Own(head) => head,
            Self::Shared(head) => Rc::get_mut(head)?,
        };
        Some(std::mem::take(&mut head.headers))
    }

    /// The fields: a copy where others have them as well.
    pub fn take_headers(&mut self) -> HeaderMap {
        self.spare_headers().unwrap_or_else(|| self.headers.clone())
    }
}

impl From<request::Parts> for RequestHead {
    fn from(head: request::Parts) -> Self {
        Self::Own(head)
    }
}

impl From<RequestHead> for request::Parts {
    fn from(head: RequestHead) -> Self {
        match head {
            RequestHead::Own(head) => head,
            RequestHead::Shared(head) => Rc::unwrap_or_clone(head),
        }
    }
}

impl Deref for RequestHead {
    type Target = request::Parts;

    fn deref(&self) -> &request::Parts {
        match self {
            Self::Own(head) => head,
            Self::Shared(head) => head,
        }
    }
}

impl DerefMut for RequestHead {
    fn deref_mut(&mut self) -> &mut request::Parts {
        match self {
            Self::Own(head) => head,
            Self::Shared(head) => Rc::make_mut(head),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_head_is_copied_when_it_is_written_to() {
        let (head, ()) = Request::get("/a").header("x-a", "1").body(()).unwrap().into_parts();
        let mut sent = RequestHead::from(head);
        let seen = sent.take();
        assert!(sent.headers.is_empty());
        sent = RequestHead::Shared(Rc::clone(&seen));
        assert_eq!(sent.spare_headers(), None);
        assert_eq!(sent.take_headers()["x-a"], "1");
        sent.headers.clear();
        assert_eq!((seen.headers.len(), sent.headers.len()), (1, 0));
        drop(sent);
        let mut last = RequestHead::Shared(seen);
        assert_eq!(last.spare_headers().unwrap().len(), 1);
    }
}
