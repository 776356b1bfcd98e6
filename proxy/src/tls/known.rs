//! Chains that this worker has verified: whoever connects again shows the same certificate, and it is verified before the
//! handshake ends as well as after. Path building costs more than the rest of a handshake's signatures, and says the same
//! of the same bytes until the bundle changes. What depends on the moment is checked each time; that the peer holds the
//! key is no matter of its chain and shown anew in every handshake.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use aws_lc_rs::digest::{self, SHA256, SHA256_OUTPUT_LEN};
use outrigger_core::chain::{self, Bundle, ChainError, Usage, Verified};
use rustls_pki_types::{CertificateDer, UnixTime};

use super::provider;

/// Chains that one worker remembers.
const MOST: usize = 512;

type Digest = [u8; SHA256_OUTPUT_LEN];

#[derive(Debug, Default)]
struct Known {
    /// What they were verified against
    bundle: Arc<Bundle>,
    chains: HashMap<(Digest, Usage), Verified>,
}

thread_local! {
    static KNOWN: RefCell<Known> = RefCell::default();
}

/// Verifies a chain (leaf first) as [`chain::verify`] does.
///
/// # Errors
/// See [`ChainError`]; a refusal is not remembered.
pub(super) fn verify(
    chain: &[CertificateDer<'_>],
    bundle: &Arc<Bundle>,
    usage: Usage,
    now: UnixTime,
) -> Result<Verified, ChainError> {
    let key = (digest(chain), usage);
    let known = KNOWN.with_borrow(|known| {
        let same = Arc::ptr_eq(&known.bundle, bundle);
        same.then(|| known.chains.get(&key).cloned()).flatten()
    });
    if let Some(known) = known {
        return known.valid_at(now).map(|()| known);
    }
    let verified = chain::verify(chain, bundle, usage, provider().signature_verification_algorithms.all, now)?;
    KNOWN.with_borrow_mut(|known| {
        if !Arc::ptr_eq(&known.bundle, bundle) {
            known.chains.clear();
            known.bundle = bundle.clone();
        }
        // Full: all go. It costs each peer one verification.
        if known.chains.len() >= MOST {
            known.chains.clear();
        }
        known.chains.insert(key, verified.clone());
    });
    Ok(verified)
}

fn digest(chain: &[CertificateDer<'_>]) -> Digest {
    let mut context = digest::Context::new(&SHA256);
    for der in chain {
        context.update(&der.len().to_le_bytes());
        context.update(der);
    }
    let mut all = Digest::default();
    all.copy_from_slice(context.finish().as_ref());
    all
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;
    use crate::tls::testing::TestCa;

    #[test]
    fn a_known_chain_is_refused_once_it_expires_or_its_root_goes() {
        let ca = TestCa::new("root");
        let bundle = Arc::new(ca.bundle());
        let end = SystemTime::now() + Duration::from_secs(60);
        let (chain, _) = ca.issue(&["spiffe://mesh.test/ns/shop/sa/reviews"], end);
        let (now, later) =
            (UnixTime::now(), UnixTime::since_unix_epoch(Duration::from_secs(UnixTime::now().as_secs() + 120)));
        for _ in 0..2 {
            let verified = verify(&chain, &bundle, Usage::Client, now).unwrap();
            assert_eq!(verified.identity.as_str(), "spiffe://mesh.test/ns/shop/sa/reviews");
            assert!(matches!(verify(&chain, &bundle, Usage::Client, later), Err(ChainError::Expired { .. })));
        }
        let other = Arc::new(TestCa::new("root").bundle());
        assert_eq!(verify(&chain, &other, Usage::Client, now), Err(ChainError::UntrustedRoot));
        assert!(verify(&chain, &bundle, Usage::Client, now).is_ok());
    }

    #[test]
    fn a_chain_that_was_never_verified_is_not_known() {
        let (ca, foreign) = (TestCa::new("root"), TestCa::new("root"));
        let bundle = Arc::new(ca.bundle());
        let end = SystemTime::now() + Duration::from_secs(60);
        let (chain, _) = ca.issue(&["spiffe://mesh.test/ns/shop/sa/reviews"], end);
        let (forged, _) = foreign.issue(&["spiffe://mesh.test/ns/shop/sa/reviews"], end);
        verify(&chain, &bundle, Usage::Client, UnixTime::now()).unwrap();
        for _ in 0..2 {
            assert_eq!(verify(&forged, &bundle, Usage::Client, UnixTime::now()), Err(ChainError::UntrustedRoot));
        }
    }
}
