//! Foreign functions: those of Envoy's that filters use and that need nothing of Envoy's own.

use std::io::Read as _;

use flate2::read::ZlibEncoder;
use flate2::{Compression, Decompress, FlushDecompress};

use super::abi::Status;

/// Longest argument and longest result, bytes.
const LIMIT: usize = 1 << 20;

/// Calls a function of this name.
///
/// # Errors
/// `NotFound`: there is none. `BadArgument`: the argument is too long. `SerializationFailure`: the argument is not what the
/// function reads, or the result would be too long.
pub(super) fn call(name: &[u8], argument: &[u8]) -> Result<Vec<u8>, Status> {
    let function = match name {
        b"compress" => compress,
        b"uncompress" => uncompress,
        // Routes are chosen again whenever a filter changed what they depend on.
        b"clear_route_cache" => |_: &[u8]| Ok(Vec::new()),
        _ => return Err(Status::NotFound),
    };
    if argument.len() > LIMIT {
        return Err(Status::BadArgument);
    }
    function(argument)
}

/// zlib (RFC 1950).
fn compress(bytes: &[u8]) -> Result<Vec<u8>, Status> {
    let mut out = Vec::new();
    let mut reader = ZlibEncoder::new(bytes, Compression::default());
    reader.read_to_end(&mut out).map_err(|_| Status::SerializationFailure)?;
    if out.len() > LIMIT { Err(Status::SerializationFailure) } else { Ok(out) }
}

/// Whole streams only: flate2's reader takes one that is cut off for its end.
fn uncompress(bytes: &[u8]) -> Result<Vec<u8>, Status> {
    let (mut state, mut out) = (Decompress::new(true), Vec::new());
    loop {
        out.reserve(out.len().clamp(1024, LIMIT));
        let before = (state.total_in(), state.total_out());
        let rest = usize::try_from(before.0).ok().and_then(|read| bytes.get(read..)).unwrap_or_default();
        let status = state.decompress_vec(rest, &mut out, FlushDecompress::None);
        let moved = before != (state.total_in(), state.total_out());
        match status {
            Ok(flate2::Status::StreamEnd) if out.len() <= LIMIT => return Ok(out),
            Ok(flate2::Status::Ok | flate2::Status::BufError) if moved && out.len() <= LIMIT => {}
            _ => return Err(Status::SerializationFailure),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_compressed_reads_back_and_bombs_do_not() {
        let text = b"outrigger ".repeat(1000);
        let packed = call(b"compress", &text).unwrap();
        assert!(packed.len() < 200 && packed[0] == 0x78, "{packed:?}");
        assert_eq!(call(b"uncompress", &packed).unwrap(), text);
        for bad in [&b"no zlib"[..], b"x", b"", &packed[..packed.len() - 1]] {
            assert_eq!(call(b"uncompress", bad), Err(Status::SerializationFailure), "{bad:?}");
        }
        let mut bomb = Vec::new();
        ZlibEncoder::new(&vec![0; LIMIT + 1][..], Compression::default()).read_to_end(&mut bomb).unwrap();
        assert_eq!(call(b"uncompress", &bomb), Err(Status::SerializationFailure));
        assert_eq!(call(b"compress", &vec![0; LIMIT + 1]), Err(Status::BadArgument));
        assert_eq!(call(b"clear_route_cache", b"").unwrap(), b"");
        assert_eq!(call(b"compres", b""), Err(Status::NotFound));
    }
}
