//! Sessions to resume: the client's store, keyed by address and SNI, and the server's tickets.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use aws_lc_rs::aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey};
use rustls::NamedGroup;
use rustls::client::{ClientSessionStore, Tls12ClientSessionValue, Tls13ClientSessionValue};
use rustls::server::ProducesTickets;
use rustls::ticketer::TicketRotator;
use rustls_pki_types::ServerName;
use tokio::time::Instant;

/// Destinations remembered, and tickets for each (every connection brings some, and one use spends one).
const MAX_DESTINATIONS: usize = 1024;
const MAX_TICKETS: usize = 8;
/// Half of a ticket's life of one hour: a key issues for this long and is accepted for as long again.
const ROTATION_SECONDS: u32 = 30 * 60;

/// Tickets of one generation of the identity: they die with it, so that no session outlives the certificate or the
/// bundle under which it was made.
#[derive(Debug, Default)]
pub(crate) struct Sessions {
    tickets: Mutex<HashMap<(SocketAddr, ServerName<'static>), VecDeque<Kept>>>,
}

#[derive(Debug)]
struct Kept {
    until: Instant,
    ticket: Tls13ClientSessionValue,
}

impl Sessions {
    /// The view of one connection to this address.
    pub(crate) fn of(self: &Arc<Self>, address: SocketAddr) -> Arc<AddressSessions> {
        Arc::new(AddressSessions { all: Arc::clone(self), address, until: OnceLock::new() })
    }

    fn insert(&self, key: (SocketAddr, ServerName<'static>), kept: Kept) {
        let mut tickets = self.tickets.lock().unwrap_or_else(PoisonError::into_inner);
        if tickets.len() >= MAX_DESTINATIONS && !tickets.contains_key(&key) {
            let now = Instant::now();
            tickets.retain(|_, queue| {
                queue.retain(|kept| kept.until > now);
                !queue.is_empty()
            });
            // Still full: any one goes. It costs its owner one full handshake.
            if tickets.len() >= MAX_DESTINATIONS
                && let Some(victim) = tickets.keys().next().cloned()
            {
                tickets.remove(&victim);
            }
        }
        let queue = tickets.entry(key).or_default();
        if queue.len() >= MAX_TICKETS {
            queue.pop_front();
        }
        queue.push_back(kept);
    }

    fn take(&self, key: &(SocketAddr, ServerName<'static>)) -> Option<Tls13ClientSessionValue> {
        let mut tickets = self.tickets.lock().unwrap_or_else(PoisonError::into_inner);
        let queue = tickets.get_mut(key)?;
        let now = Instant::now();
        let found = std::iter::from_fn(|| queue.pop_back()).find(|kept| kept.until > now);
        if queue.is_empty() {
            tickets.remove(key);
        }
        found.map(|kept| kept.ticket)
    }

    #[cfg(test)]
    pub(crate) fn destinations(&self) -> Vec<SocketAddr> {
        self.tickets.lock().unwrap().keys().map(|(address, _)| *address).collect()
    }
}

/// [`Sessions`] as one connection sees them: rustls asks by name only, the address is ours to add.
#[derive(Debug)]
pub(crate) struct AddressSessions {
    all: Arc<Sessions>,
    address: SocketAddr,
    /// Set once the peer was accepted: min(our certificate's end, the peer's).
    until: OnceLock<Instant>,
}

impl AddressSessions {
    pub(crate) fn keep_until(&self, until: Instant) {
        let _already = self.until.set(until);
    }
}

impl ClientSessionStore for AddressSessions {
    fn set_kx_hint(&self, _: ServerName<'static>, _: NamedGroup) {}

    fn kx_hint(&self, _: &ServerName<'_>) -> Option<NamedGroup> {
        None
    }

    fn set_tls12_session(&self, _: ServerName<'static>, _: Tls12ClientSessionValue) {}

    fn tls12_session(&self, _: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        None
    }

    fn remove_tls12_session(&self, _: &ServerName<'static>) {}

    fn insert_tls13_ticket(&self, name: ServerName<'static>, ticket: Tls13ClientSessionValue) {
        let Some(&end) = self.until.get() else { return };
        // A server that is not ours may state up to a week.
        let until = end.min(Instant::now() + std::time::Duration::from_secs(u64::from(2 * ROTATION_SECONDS)));
        self.all.insert((self.address, name), Kept { until, ticket });
    }

    fn take_tls13_ticket(&self, name: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        self.all.take(&(self.address, name.clone()))
    }
}

/// Tickets of the server: encrypted state, keys in memory only and replaced every half hour.
pub(crate) fn ticketer() -> Result<Arc<dyn ProducesTickets>, rustls::Error> {
    Ok(Arc::new(TicketRotator::new(ROTATION_SECONDS, || match TicketKey::new() {
        Some(key) => Ok(Box::new(key)),
        None => Err(rustls::crypto::GetRandomFailed),
    })?))
}

struct TicketKey(RandomizedNonceKey);

impl std::fmt::Debug for TicketKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TicketKey")
    }
}

impl TicketKey {
    fn new() -> Option<Self> {
        let mut key = [0_u8; 32];
        aws_lc_rs::rand::fill(&mut key).ok()?;
        RandomizedNonceKey::new(&AES_256_GCM, &key).ok().map(Self)
    }
}

/// Nonce, then ciphertext with its tag.
impl ProducesTickets for TicketKey {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        2 * ROTATION_SECONDS
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        let mut body = plain.to_vec();
        let nonce = self.0.seal_in_place_append_tag(Aad::empty(), &mut body).ok()?;
        let mut ticket = nonce.as_ref().to_vec();
        ticket.append(&mut body);
        Some(ticket)
    }

    fn decrypt(&self, cipher: &[u8]) -> Option<Vec<u8>> {
        let (nonce, body) = cipher.split_first_chunk::<NONCE_LEN>()?;
        let mut body = body.to_vec();
        let length = self.0.open_in_place(Nonce::assume_unique_for_key(*nonce), Aad::empty(), &mut body).ok()?.len();
        body.truncate(length);
        Some(body)
    }
}
