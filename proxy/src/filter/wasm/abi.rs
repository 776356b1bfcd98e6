//! Numbers and encodings of the Proxy-Wasm ABI.

/// What a host function returns to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub(super) enum Status {
    Ok = 0,
    NotFound = 1,
    BadArgument = 2,
    SerializationFailure = 3,
    ParseFailure = 4,
    InvalidMemoryAccess = 6,
    Empty = 7,
    CasMismatch = 8,
    InternalFailure = 10,
    Unimplemented = 12,
}

/// The versions of the ABI that are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Abi {
    V0_1_0,
    V0_2_0,
    V0_2_1,
}

impl Abi {
    pub(super) const ALL: [Self; 3] = [Self::V0_1_0, Self::V0_2_0, Self::V0_2_1];

    /// The export that marks a module of this version.
    pub(super) fn marker(self) -> &'static str {
        match self {
            Self::V0_1_0 => "proxy_abi_version_0_1_0",
            Self::V0_2_0 => "proxy_abi_version_0_2_0",
            Self::V0_2_1 => "proxy_abi_version_0_2_1",
        }
    }

    /// `0.2.1`
    pub(super) fn number(self) -> String {
        self.marker().trim_start_matches("proxy_abi_version_").replace('_', ".")
    }
}

/// Largest serialized map and largest number of pairs that a guest may pass.
const PAIRS_BYTES: usize = 1024 * 1024;
const PAIRS_COUNT: usize = 1024;

/// Serializes pairs: count, then both lengths of each, then each key and value with a NUL after it. Little-endian.
pub(super) fn serialize_pairs(pairs: &[(&[u8], &[u8])]) -> Vec<u8> {
    let payload: usize = pairs.iter().map(|(key, value)| key.len() + value.len() + 2).sum();
    let mut out = Vec::with_capacity(4 + pairs.len() * 8 + payload);
    let word = |n: usize| u32::try_from(n).unwrap_or(u32::MAX).to_le_bytes();
    out.extend_from_slice(&word(pairs.len()));
    for (key, value) in pairs {
        out.extend_from_slice(&word(key.len()));
        out.extend_from_slice(&word(value.len()));
    }
    for (key, value) in pairs {
        out.extend_from_slice(key);
        out.push(0);
        out.extend_from_slice(value);
        out.push(0);
    }
    out
}

/// A key and its value, borrowed from the serialized form.
pub(super) type Pair<'a> = (&'a [u8], &'a [u8]);

/// Reads what [`serialize_pairs`] writes. `None`: malformed, with bytes left over, or too large. No bytes, or one zero byte or
/// word, are an empty map.
pub(super) fn deserialize_pairs(input: &[u8]) -> Option<Vec<Pair<'_>>> {
    if input.is_empty() || input == [0] {
        return Some(Vec::new());
    }
    if input.len() > PAIRS_BYTES {
        return None;
    }
    let word = |at: usize| -> Option<usize> {
        let bytes: [u8; 4] = input.get(at..at.checked_add(4)?)?.try_into().ok()?;
        usize::try_from(u32::from_le_bytes(bytes)).ok()
    };
    let count = word(0)?;
    if count > PAIRS_COUNT {
        return None;
    }
    let mut at = 4 + count * 8;
    let mut take = |len: usize| -> Option<&[u8]> {
        let end = at.checked_add(len)?;
        let part = input.get(at..end)?;
        if *input.get(end)? != 0 {
            return None;
        }
        at = end + 1;
        Some(part)
    };
    let mut pairs = Vec::with_capacity(count);
    for index in 0..count {
        pairs.push((take(word(4 + index * 8)?)?, take(word(8 + index * 8)?)?));
    }
    (at == input.len()).then_some(pairs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn pairs_read_back(pairs in prop::collection::vec((prop::collection::vec(any::<u8>(), 0..20), prop::collection::vec(any::<u8>(), 0..20)), 0..20)) {
            let borrowed: Vec<Pair<'_>> = pairs.iter().map(|(key, value)| (key.as_slice(), value.as_slice())).collect();
            let bytes = serialize_pairs(&borrowed);
            prop_assert_eq!(deserialize_pairs(&bytes), Some(borrowed));
            if !pairs.is_empty() {
                prop_assert_eq!(deserialize_pairs(&bytes[..bytes.len() - 1]), None);
            }
        }

        #[test]
        fn any_bytes_are_safe(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = deserialize_pairs(&bytes);
        }
    }

    #[test]
    fn empty_maps() {
        for empty in [&[][..], &[0], &[0, 0, 0, 0]] {
            assert_eq!(deserialize_pairs(empty), Some(vec![]));
        }
        assert_eq!(deserialize_pairs(&[255; 64]), None);
    }
}
