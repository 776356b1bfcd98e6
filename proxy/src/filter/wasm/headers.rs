//! Header maps as guests see them: pseudo headers in front, names in lower case, nothing that could break the message.

use std::cell::RefCell;

use http::uri::{Authority, PathAndQuery, Scheme, Uri};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version, header, request, response};

use super::super::stream::{REQUEST_PSEUDO, RESPONSE_PSEUDO};
use super::super::{Edits, HeadRef};
use super::abi::{Pair, Status};

type Reply<T = ()> = Result<T, Status>;

/// Bytes of a header block that a guest may build, names and values together. What it wrote is counted; all of the block, with what it
/// came with, once that is half as much: as a rule a guest writes little, and counting the block is dear.
pub(super) const BLOCK: usize = 64 * 1024;

/// Framing and hop-by-hop headers: the proxy's own. Guests read them, and may remove `content-length`.
const FRAMING: [HeaderName; 5] =
    [header::CONTENT_LENGTH, header::TRANSFER_ENCODING, header::CONNECTION, header::UPGRADE, header::TE];

fn is_framing(name: &HeaderName) -> bool {
    // Most names are told apart by their lengths.
    matches!(name.as_str().len(), 2 | 7 | 10 | 14 | 17) && FRAMING.contains(name)
}

/// A message head with its pseudo headers.
pub(super) trait Head {
    /// Names, in the order in which guests see them
    const PSEUDO: &'static [&'static str];
    fn pseudo(&self, name: &str) -> Option<&[u8]>;
    fn set_pseudo(&mut self, name: &str, value: &[u8]) -> Reply;
    fn fields(&self) -> &HeaderMap;
    fn fields_mut(&mut self) -> &mut HeaderMap;
    /// How many pairs there are, without making them.
    fn count(&self) -> usize;
    /// A field that a pseudo header stands for.
    fn hidden(&self, _name: &HeaderName) -> bool {
        false
    }
}

impl Head for request::Parts {
    const PSEUDO: &'static [&'static str] = REQUEST_PSEUDO;

    fn pseudo(&self, name: &str) -> Option<&[u8]> {
        match name {
            ":method" => Some(self.method.as_str().as_bytes()),
            ":path" => Some(self.uri.path_and_query().map_or("/", PathAndQuery::as_str).as_bytes()),
            ":authority" => match self.uri.authority() {
                Some(authority) => Some(authority.as_str().as_bytes()),
                None => self.headers.get(header::HOST).map(HeaderValue::as_bytes),
            },
            ":scheme" => Some(self.uri.scheme_str().unwrap_or("http").as_bytes()),
            _ => None,
        }
    }

    fn set_pseudo(&mut self, name: &str, value: &[u8]) -> Reply {
        let bad = |_| Status::BadArgument;
        match name {
            ":method" => {
                let method = Method::from_bytes(value).map_err(|_| Status::BadArgument)?;
                if method == Method::CONNECT {
                    return Err(Status::BadArgument);
                }
                self.method = method;
            }
            ":path" => {
                if !(value.starts_with(b"/") || value == b"*") || value.contains(&b'#') {
                    return Err(Status::BadArgument);
                }
                let path = PathAndQuery::try_from(value).map_err(bad)?;
                let mut parts = self.uri.clone().into_parts();
                parts.path_and_query = Some(path);
                self.uri = Uri::from_parts(parts).map_err(|_| Status::BadArgument)?;
            }
            ":authority" => {
                let authority = Authority::try_from(value).map_err(bad)?;
                if authority.as_str().contains('@') {
                    return Err(Status::BadArgument);
                }
                let host = HeaderValue::from_bytes(value).map_err(|_| Status::BadArgument)?;
                if self.uri.authority().is_some() {
                    let mut parts = self.uri.clone().into_parts();
                    parts.authority = Some(authority);
                    self.uri = Uri::from_parts(parts).map_err(|_| Status::BadArgument)?;
                }
                // HTTP/2 may carry the authority in the URI alone; what is there stays consistent.
                if self.headers.contains_key(header::HOST) || self.version < Version::HTTP_2 {
                    self.headers.insert(header::HOST, host);
                }
            }
            ":scheme" => {
                let scheme = Scheme::try_from(value).map_err(bad)?;
                // The transport decides it.
                if Some(scheme.as_str().as_bytes()) != self.pseudo(":scheme") {
                    return Err(Status::BadArgument);
                }
            }
            _ => return Err(Status::BadArgument),
        }
        Ok(())
    }

    fn fields(&self) -> &HeaderMap {
        &self.headers
    }

    fn fields_mut(&mut self) -> &mut HeaderMap {
        &mut self.headers
    }

    fn count(&self) -> usize {
        let hosts = self.headers.get_all(header::HOST).iter().count();
        let authority = self.uri.authority().is_some() || hosts > 0;
        Self::PSEUDO.len() - usize::from(!authority) + self.headers.len() - hosts
    }

    fn hidden(&self, name: &HeaderName) -> bool {
        *name == header::HOST
    }
}

impl Head for response::Parts {
    const PSEUDO: &'static [&'static str] = RESPONSE_PSEUDO;

    fn pseudo(&self, name: &str) -> Option<&[u8]> {
        (name == ":status").then(|| self.status.as_str().as_bytes())
    }

    fn set_pseudo(&mut self, name: &str, value: &[u8]) -> Reply {
        let status = StatusCode::from_bytes(value).map_err(|_| Status::BadArgument)?;
        if name != ":status" || !(200..600).contains(&status.as_u16()) {
            return Err(Status::BadArgument);
        }
        self.status = status;
        Ok(())
    }

    fn fields(&self) -> &HeaderMap {
        &self.headers
    }

    fn fields_mut(&mut self) -> &mut HeaderMap {
        &mut self.headers
    }

    fn count(&self) -> usize {
        Self::PSEUDO.len() + self.headers.len()
    }
}

/// Trailers, and other maps without pseudo headers.
impl Head for HeaderMap {
    const PSEUDO: &'static [&'static str] = &[];

    fn pseudo(&self, _: &str) -> Option<&[u8]> {
        None
    }

    fn set_pseudo(&mut self, _: &str, _: &[u8]) -> Reply {
        Err(Status::BadArgument)
    }

    fn fields(&self) -> &HeaderMap {
        self
    }

    fn fields_mut(&mut self) -> &mut HeaderMap {
        self
    }

    fn count(&self) -> usize {
        self.len()
    }
}

/// Every pair, pseudo headers first.
pub(super) fn pairs<H: Head>(head: &H) -> impl Iterator<Item = Pair<'_>> {
    let pseudo = H::PSEUDO.iter().filter_map(|name| Some((name.as_bytes(), head.pseudo(name)?)));
    let fields = head.fields().iter().filter(|(name, _)| !head.hidden(name));
    pseudo.chain(fields.map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes())))
}

/// How many pairs a head has.
pub(super) fn count_of(head: HeadRef<'_>) -> usize {
    match head {
        HeadRef::Request(head) => head.count(),
        HeadRef::Response(head) => head.count(),
        HeadRef::Trailers(head) => Head::count(head),
    }
}

/// Bytes of names and values.
pub(super) fn size<H: Head>(head: &H) -> usize {
    let pseudo = H::PSEUDO.iter().filter_map(|name| Some(name.len() + head.pseudo(name)?.len()));
    let fields = head.fields().iter().filter(|(name, _)| !head.hidden(name));
    pseudo.chain(fields.map(|(name, value)| name.as_str().len() + value.len())).sum()
}

/// Whether so many bytes more are within the block's limit.
fn has_room<H: Head>(head: &H, edits: &Edits, more: usize) -> bool {
    edits.written + more <= BLOCK / 2 || size(head) + more <= BLOCK
}

/// Index of a pseudo header, with `host` as another name of `:authority`.
fn pseudo_index<H: Head>(key: &[u8]) -> Option<usize> {
    let key = match key {
        [b':', ..] => key,
        [_, _, _, _] if key.eq_ignore_ascii_case(b"host") => b":authority",
        _ => return None,
    };
    H::PSEUDO.iter().position(|name| key.eq_ignore_ascii_case(name.as_bytes()))
}

/// Names that guests wrote lately, one per place.
const NAMES: usize = 64;
/// Longest one that is kept, bytes.
const NAME: usize = 64;

thread_local! {
    // A filter writes the same few names on every request; a clone of a known one is neither parsed nor copied.
    static KNOWN: RefCell<[Option<HeaderName>; NAMES]> = const { RefCell::new([const { None }; NAMES]) };
}

fn name_of(key: &[u8]) -> Reply<HeaderName> {
    let parsed = || HeaderName::from_bytes(key).map_err(|_| Status::BadArgument);
    let [.., last] = key else { return parsed() };
    let place = (key.len() ^ usize::from(*last).rotate_left(2)) % NAMES;
    let known = KNOWN.try_with(|known| {
        let mut known = known.borrow_mut();
        let kept = known.get_mut(place).filter(|_| key.len() <= NAME)?;
        if let Some(name) = kept.as_ref().filter(|name| name.as_str().as_bytes() == key) {
            return Some(Ok(name.clone()));
        }
        Some(parsed().inspect(|name| *kept = Some(name.clone())))
    });
    known.ok().flatten().unwrap_or_else(parsed)
}

fn value_of(value: &[u8]) -> Reply<HeaderValue> {
    HeaderValue::from_bytes(value).map_err(|_| Status::BadArgument)
}

/// The first value of a key.
pub(super) fn get<'a, H: Head>(head: &'a H, key: &[u8]) -> Option<&'a [u8]> {
    if let Some(index) = pseudo_index::<H>(key) {
        return head.pseudo(H::PSEUDO.get(index)?);
    }
    head.fields().get(std::str::from_utf8(key).ok()?).map(HeaderValue::as_bytes)
}

/// Appends a value; a pseudo header is replaced.
pub(super) fn add<H: Head>(head: &mut H, edits: &mut Edits, key: &[u8], value: &[u8]) -> Reply {
    if let Some(index) = pseudo_index::<H>(key) {
        return replace_pseudo(head, edits, index, value);
    }
    let room = has_room(head, edits, key.len() + value.len());
    write(head.fields_mut(), edits, (key, value), room, false)
}

/// Replaces every value of a key, or adds it.
pub(super) fn replace<H: Head>(head: &mut H, edits: &mut Edits, key: &[u8], value: &[u8]) -> Reply {
    if let Some(index) = pseudo_index::<H>(key) {
        return replace_pseudo(head, edits, index, value);
    }
    let room = has_room(head, edits, key.len() + value.len());
    write(head.fields_mut(), edits, (key, value), room, true)
}

/// Writes a field. Compiled once, not for each kind of head: a filter that writes to both has it fetched once.
#[inline(never)]
fn write(fields: &mut HeaderMap, edits: &mut Edits, (key, value): Pair<'_>, room: bool, replaces: bool) -> Reply {
    let (name, field) = (name_of(key)?, value_of(value)?);
    let full = |_| Status::BadArgument;
    if is_framing(&name) {
        let same = replaces && fields.get(&name) == Some(&field);
        return if same { Ok(()) } else { Err(Status::BadArgument) };
    }
    if !room {
        return Err(Status::BadArgument);
    }
    if replaces {
        fields.try_insert(name, field).map_err(full)?;
    } else {
        fields.try_append(name, field).map_err(full)?;
    }
    edits.written += key.len() + value.len();
    Ok(())
}

fn replace_pseudo<H: Head>(head: &mut H, edits: &mut Edits, index: usize, value: &[u8]) -> Reply {
    let name = H::PSEUDO.get(index).ok_or(Status::BadArgument)?;
    if value.len() > BLOCK {
        return Err(Status::BadArgument);
    }
    let same = head.pseudo(name) == Some(value);
    head.set_pseudo(name, value)?;
    edits.writes(index, !same);
    Ok(())
}

/// Removes every value of a key.
pub(super) fn remove<H: Head>(head: &mut H, edits: &mut Edits, key: &[u8]) -> Reply {
    if let Some(index) = pseudo_index::<H>(key) {
        edits.removes(index);
        return Ok(());
    }
    let name = name_of(key)?;
    if !is_framing(&name) || name == header::CONTENT_LENGTH {
        head.fields_mut().remove(name);
    }
    Ok(())
}

/// Replaces everything but framing headers, which stay as they are (`content-length` only if it is among the pairs). On an
/// error nothing is changed.
pub(super) fn replace_all<H: Head>(head: &mut H, edits: &mut Edits, pairs: &[Pair<'_>]) -> Reply {
    if pairs.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>() > BLOCK {
        return Err(Status::BadArgument);
    }
    let mut fields = HeaderMap::with_capacity(pairs.len());
    let mut pseudo = Vec::new();
    let mut length = false;
    for (key, value) in pairs {
        if let Some(index) = pseudo_index::<H>(key) {
            pseudo.push((index, *value));
            continue;
        }
        let name = name_of(key)?;
        length |= name == header::CONTENT_LENGTH;
        if !is_framing(&name) {
            fields.try_append(name, value_of(value)?).map_err(|_| Status::BadArgument)?;
        }
    }
    for name in FRAMING.iter().filter(|name| length || **name != header::CONTENT_LENGTH) {
        for value in head.fields().get_all(name) {
            fields.try_append(name.clone(), value.clone()).map_err(|_| Status::BadArgument)?;
        }
    }
    for name in [header::HOST] {
        if let Some(value) = head.fields().get(&name).filter(|_| head.hidden(&name)) {
            fields.insert(name, value.clone());
        }
    }
    let before: Vec<Option<Vec<u8>>> = H::PSEUDO.iter().map(|name| head.pseudo(name).map(<[u8]>::to_vec)).collect();
    let old = std::mem::replace(head.fields_mut(), fields);
    for (index, value) in &pseudo {
        let name = H::PSEUDO.get(*index).ok_or(Status::BadArgument)?;
        if let Err(status) = head.set_pseudo(name, value) {
            *head.fields_mut() = old;
            for (name, value) in H::PSEUDO.iter().zip(&before) {
                value.as_ref().map_or(Ok(()), |value| head.set_pseudo(name, value))?;
            }
            return Err(status);
        }
    }
    for (index, (name, before)) in H::PSEUDO.iter().zip(&before).enumerate() {
        // A scheme is not the guest's to give.
        if pseudo.iter().any(|(at, _)| *at == index) || *name == ":scheme" {
            edits.writes(index, head.pseudo(name) != before.as_deref());
        } else {
            edits.removes(index);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> request::Parts {
        let request = http::Request::builder()
            .uri("/a?b=c")
            .header("host", "reviews")
            .header("x-dup", "1")
            .header("x-dup", "2")
            .header("content-length", "3");
        request.body(()).unwrap().into_parts().0
    }

    #[test]
    fn values_are_read_replaced_and_removed() {
        let (mut head, mut edits) = (request(), Edits::default());
        assert_eq!(get(&head, b"X-Dup"), Some(&b"1"[..]));
        assert_eq!(head.count(), pairs(&head).count());
        add(&mut head, &mut edits, b"X-DUP", b"3").unwrap();
        assert_eq!(head.headers.get_all("x-dup").iter().count(), 3);
        replace(&mut head, &mut edits, b"x-dup", b"4").unwrap();
        assert_eq!(head.headers.get_all("x-dup").iter().collect::<Vec<_>>(), ["4"]);
        remove(&mut head, &mut edits, b"x-dup").unwrap();
        remove(&mut head, &mut edits, b"x-dup").unwrap();
        assert_eq!(get(&head, b"x-dup"), None);
    }

    #[test]
    fn pseudo_headers_are_parts_of_the_message() {
        let (mut head, mut edits) = (request(), Edits::default());
        assert_eq!(get(&head, b"host"), Some(&b"reviews"[..]));
        replace(&mut head, &mut edits, b":path", b"/rewritten?a=b").unwrap();
        assert_eq!(head.uri, "/rewritten?a=b");
        replace(&mut head, &mut edits, b"host", b"ratings:80").unwrap();
        assert_eq!(head.headers["host"], "ratings:80");
        replace(&mut head, &mut edits, b":method", b"PUT").unwrap();
        assert_eq!(head.method, Method::PUT);
        for (key, value) in [
            (":path", "x"),
            (":path", "/a b"),
            (":method", "CONNECT"),
            (":authority", "a@b"),
            (":scheme", "ftp"),
            (":nope", "x"),
        ] {
            let result = replace(&mut head, &mut edits, key.as_bytes(), value.as_bytes());
            assert_eq!(result, Err(Status::BadArgument), "{key} {value}");
        }
        assert_eq!(head.uri, "/rewritten?a=b");
    }

    #[test]
    fn known_names_are_the_same_as_parsed_ones() {
        for key in ["x-a", "x-b", "x-a", "X-A", "x-a", "accept", "Accept", "accept"] {
            assert_eq!(name_of(key.as_bytes()).unwrap().as_str(), key.to_ascii_lowercase());
        }
        let long = [b'n'; NAME + 1];
        assert_eq!(name_of(&long).unwrap().as_str().as_bytes(), long);
        for _ in 0..2 {
            assert_eq!(name_of(b"x a"), Err(Status::BadArgument));
            assert_eq!(name_of(b""), Err(Status::BadArgument));
        }
    }

    #[test]
    fn nothing_breaks_the_message() {
        let (mut head, mut edits) = (request(), Edits::default());
        for (key, value) in [
            (&b"x"[..], &b"a\r\nb: c"[..]),
            (b"x y", b"z"),
            (b"", b"z"),
            (b"transfer-encoding", b"chunked"),
            (b"content-length", b"9"),
            (b"x", &[b'a'; 70_000]),
        ] {
            assert_eq!(add(&mut head, &mut edits, key, value), Err(Status::BadArgument));
            assert_eq!(replace(&mut head, &mut edits, key, value), Err(Status::BadArgument));
            assert_eq!(
                replace_all(&mut head, &mut edits, &[(key, value)]).is_err(),
                !key.starts_with(b"t") && !key.starts_with(b"c")
            );
        }
    }

    #[test]
    fn a_block_is_bounded_however_it_is_built() {
        for write in [add, replace] {
            let (mut head, mut edits) = (request(), Edits::default());
            let value = [b'v'; 1000];
            let written =
                (0..100).take_while(|i| write(&mut head, &mut edits, format!("x-{i:02}").as_bytes(), &value).is_ok());
            assert_eq!(written.count(), 65);
            assert!(size(&head) <= BLOCK);
            replace(&mut head, &mut edits, b"x-00", b"").unwrap();
        }
        // Also where most of it came with the message.
        let (mut head, mut edits) = (request(), Edits::default());
        head.headers.insert("x-large", HeaderValue::from_bytes(&[b'v'; BLOCK]).unwrap());
        assert_eq!(add(&mut head, &mut edits, b"x-more", &[b'v'; BLOCK / 2]), Err(Status::BadArgument));
        add(&mut head, &mut edits, b"x-few", b"bytes").unwrap();
    }

    #[test]
    fn what_is_judged_again_is_what_has_another_value() {
        let pairs = |head: &request::Parts| -> Vec<(Vec<u8>, Vec<u8>)> {
            pairs(head).map(|(name, value)| (name.to_vec(), value.to_vec())).collect()
        };
        let all = |changed: Option<(&str, &str)>| {
            let (mut head, mut edits) = (request(), Edits::default());
            let mut pairs = pairs(&head);
            for (name, value) in &mut pairs {
                if let Some((_, new)) = changed.filter(|(of, _)| of.as_bytes() == name) {
                    *value = new.as_bytes().to_vec();
                }
            }
            let pairs: Vec<Pair<'_>> = pairs.iter().map(|(name, value)| (&name[..], &value[..])).collect();
            replace_all(&mut head, &mut edits, &pairs).unwrap();
            edits.rewritten
        };
        assert_eq!(all(None), 0);
        for (index, (name, value)) in
            [(":method", "PATCH"), (":path", "/other"), (":authority", "other")].into_iter().enumerate()
        {
            assert_eq!(all(Some((name, value))), 1 << index, "{name}");
            let (mut head, mut edits) = (request(), Edits::default());
            let same = head.pseudo(name).unwrap().to_vec();
            replace(&mut head, &mut edits, name.as_bytes(), &same).unwrap();
            assert_eq!(edits.rewritten, 0, "{name}");
            replace(&mut head, &mut edits, name.as_bytes(), value.as_bytes()).unwrap();
            assert_eq!(edits.rewritten, 1 << index, "{name}");
        }
        let (mut head, mut edits) = (request(), Edits::default());
        add(&mut head, &mut edits, b"Host", b"other").unwrap();
        assert_eq!(edits.rewritten, 1 << 2);
    }

    #[test]
    fn all_pairs_are_replaced_at_once() {
        let (mut head, mut edits) = (request(), Edits::default());
        replace_all(
            &mut head,
            &mut edits,
            &[(b":method", b"PUT"), (b":path", b"/"), (b"host", b"h"), (b"A", b"1"), (b"a", b"2")],
        )
        .unwrap();
        assert_eq!(edits.lacking(request::Parts::PSEUDO), None);
        assert_eq!(head.headers.get_all("a").iter().collect::<Vec<_>>(), ["1", "2"]);
        assert!(!head.headers.contains_key("content-length"));
        let before = head.headers.clone();
        assert!(replace_all(&mut head, &mut edits, &[(b":method", b"GET"), (b":path", b"nope")]).is_err());
        assert_eq!((head.headers.clone(), head.method.clone()), (before, Method::PUT));
        replace_all(&mut head, &mut edits, &[]).unwrap();
        assert_eq!(edits.lacking(request::Parts::PSEUDO), Some(":method"));
    }
}
