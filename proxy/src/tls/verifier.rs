//! rustls's verifiers: the chain against the bundle of this moment. The identity itself is judged after the handshake.

use std::sync::Arc;

use arc_swap::ArcSwap;
use outrigger_core::chain::{Bundle, ChainError, Usage};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, PeerIncompatible, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use super::{known, provider};

/// Verifies servers. Says nothing about which workload it must be.
#[derive(Debug)]
pub(crate) struct ServerVerifier(pub(crate) Arc<ArcSwap<Bundle>>);

/// Verifies clients; one without a certificate is refused.
#[derive(Debug)]
pub(crate) struct ClientVerifier(pub(crate) Arc<ArcSwap<Bundle>>);

fn verify(
    bundle: &ArcSwap<Bundle>,
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    usage: Usage,
    now: UnixTime,
) -> Result<(), Error> {
    let chain: Vec<CertificateDer<'_>> =
        std::iter::once(leaf).chain(intermediates).map(|der| CertificateDer::from(der.as_ref())).collect();
    known::verify(&chain, &bundle.load(), usage, now).map(drop).map_err(alert)
}

/// As rustls's own errors where there is one, since that chooses the alert that the peer gets.
fn alert(error: ChainError) -> Error {
    Error::InvalidCertificate(match error {
        ChainError::Expired { .. } => CertificateError::Expired,
        ChainError::NotYetValid { .. } => CertificateError::NotValidYet,
        ChainError::UntrustedRoot => CertificateError::UnknownIssuer,
        other => CertificateError::Other(OtherError(Arc::new(other))),
    })
}

fn signature(
    message: &[u8],
    certificate: &CertificateDer<'_>,
    signed: &DigitallySignedStruct,
) -> Result<HandshakeSignatureValid, Error> {
    rustls::crypto::verify_tls13_signature(message, certificate, signed, &provider().signature_verification_algorithms)
}

fn tls12() -> Result<HandshakeSignatureValid, Error> {
    Err(Error::PeerIncompatible(PeerIncompatible::ServerDoesNotSupportTls12Or13))
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        verify(&self.0, leaf, intermediates, Usage::Server, now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for ClientVerifier {
    /// None: they would tell strangers about the mesh, and proxies have one certificate each.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        verify(&self.0, leaf, intermediates, Usage::Client, now)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}
