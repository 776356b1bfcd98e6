//! Filter modules from the control plane: by digest, in chunks, and on from where a broken transfer ended.

use std::time::Duration;

use bytes::Bytes;
use outrigger_proto::control::FetchRequest;
use outrigger_proto::control::modules_client::ModulesClient;
use sha2::{Digest, Sha256};
use tonic::transport::Channel;
use tonic::{Code, Status};

const BACKOFF: Duration = Duration::from_millis(100);
const MAX_BACKOFF: Duration = Duration::from_secs(5);
/// Silence in a transfer that is waited out.
const SILENCE: Duration = Duration::from_secs(30);
/// Largest module that is fetched. Bytes.
const MAX_MODULE: u64 = 64 << 20;
/// Complete transfers with another digest than the announced one, after which the module is refused.
const DAMAGED: u32 = 3;

/// Why a transfer ended before its end.
#[derive(Debug)]
enum Broken {
    /// It may go on
    Off(String),
    /// It would end so again
    Refused(String),
}

/// The bytes of a module. While the control plane is away it is waited for, and what has arrived is kept.
///
/// # Errors
/// When there is no such module, it is too large, or what arrives is again and again something else.
pub(super) async fn fetch(channel: impl Fn() -> Channel, sha256: &str) -> Result<Bytes, String> {
    let (mut module, mut damaged, mut backoff, mut said) = (Vec::new(), 0, BACKOFF, String::new());
    loop {
        let before = module.len();
        let why = match transfer(channel(), sha256, &mut module).await {
            Ok(()) => {
                let actual = hex::encode(Sha256::digest(&module));
                if actual == sha256 {
                    return Ok(module.into());
                }
                damaged += 1;
                let why = format!("what arrives as module wasm/{sha256} has the digest {actual}");
                if damaged == DAMAGED {
                    return Err(format!("{why}, {DAMAGED} times"));
                }
                module.clear();
                why
            }
            Err(Broken::Refused(why)) => return Err(format!("module wasm/{sha256} cannot be fetched: {why}")),
            Err(Broken::Off(why)) => why,
        };
        if module.len() > before {
            backoff = BACKOFF;
        }
        if said != why {
            tracing::warn!(sha256, why, held = module.len(), "a module's transfer broke off; it goes on from there");
            said = why;
        }
        tokio::time::sleep(backoff.mul_f64(0.5 + fastrand::f64())).await;
        backoff = (backoff * 2).min(MAX_BACKOFF);
    }
}

/// What is missing at the end of `module`.
async fn transfer(channel: Channel, sha256: &str, module: &mut Vec<u8>) -> Result<(), Broken> {
    let request = FetchRequest { name: format!("wasm/{sha256}"), offset: module.len() as u64 };
    let mut client = ModulesClient::new(channel);
    let mut chunks = heard(client.fetch(request)).await?.into_inner();
    let mut total = None;
    while let Some(chunk) = heard(chunks.message()).await? {
        let total = *total.get_or_insert(chunk.total);
        module.extend_from_slice(&chunk.data);
        if total.max(module.len() as u64) > MAX_MODULE {
            return Err(Broken::Refused(format!("it has more than {} MiB", MAX_MODULE >> 20)));
        }
    }
    match total {
        Some(total) if total > module.len() as u64 => Err(Broken::Off("the stream ended early".to_owned())),
        // What is too long has another digest.
        Some(_) => Ok(()),
        None => Err(Broken::Off("the stream ended without a chunk".to_owned())),
    }
}

async fn heard<T>(answer: impl Future<Output = Result<T, Status>>) -> Result<T, Broken> {
    match tokio::time::timeout(SILENCE, answer).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(status)) => Err(match status.code() {
            Code::NotFound | Code::InvalidArgument | Code::OutOfRange | Code::Unimplemented => {
                Broken::Refused(status.message().to_owned())
            }
            _ => Broken::Off(status.message().to_owned()),
        }),
        Err(_) => Err(Broken::Off(format!("nothing came for {SILENCE:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::{Arc, Mutex};

    use outrigger_proto::control::Chunk;
    use outrigger_proto::control::modules_server::{Modules, ModulesServer};
    use tokio_stream::wrappers::TcpListenerStream;
    use tonic::{Request, Response};

    use super::*;

    /// What becomes of one call.
    #[derive(Debug, Clone, Copy, PartialEq)]
    enum Call {
        /// Breaks off after so many bytes
        Breaks(usize),
        /// Ends as if that were all
        Ends(usize),
        /// One bit of a chunk is another
        Flips,
        Whole,
        Unknown,
    }

    /// A control plane whose calls go by a script; the last goes on for ever.
    #[derive(Debug, Clone)]
    struct Scripted {
        module: Arc<Vec<u8>>,
        script: Arc<Mutex<Vec<Call>>>,
        offsets: Arc<Mutex<Vec<u64>>>,
    }

    const CHUNK: usize = 1000;

    #[tonic::async_trait]
    impl Modules for Scripted {
        type FetchStream = tokio_stream::Iter<std::vec::IntoIter<Result<Chunk, Status>>>;

        async fn fetch(&self, request: Request<FetchRequest>) -> Result<Response<Self::FetchStream>, Status> {
            let offset = request.into_inner().offset;
            self.offsets.lock().unwrap().push(offset);
            let call = {
                let mut script = self.script.lock().unwrap();
                if script.len() > 1 { script.remove(0) } else { script[0] }
            };
            let offset = usize::try_from(offset).unwrap();
            let mut rest = self.module[offset..].to_vec();
            let total = self.module.len() as u64;
            match call {
                Call::Unknown => return Err(Status::not_found("no filter uses it")),
                Call::Breaks(bytes) | Call::Ends(bytes) => rest.truncate(bytes),
                Call::Flips => rest[CHUNK] ^= 1,
                Call::Whole => {}
            }
            let mut chunks: Vec<_> =
                rest.chunks(CHUNK).map(|data| Ok(Chunk { data: data.to_vec().into(), total: 0 })).collect();
            if let Some(Ok(first)) = chunks.first_mut() {
                first.total = total;
            }
            if matches!(call, Call::Breaks(_)) {
                chunks.push(Err(Status::unavailable("the connection broke")));
            }
            Ok(Response::new(tokio_stream::iter(chunks)))
        }
    }

    /// Fetches a module of 10,500 bytes over these calls: what came, and the offsets that were asked for.
    async fn fetched(script: &[Call]) -> (Result<Bytes, String>, Vec<u64>) {
        let module: Vec<u8> = (0..10_500_u32).map(|n| (n % 251) as u8).collect();
        let server = Scripted {
            module: Arc::new(module.clone()),
            script: Arc::new(Mutex::new(script.to_vec())),
            offsets: Arc::default(),
        };
        let offsets = server.offsets.clone();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address: SocketAddr = listener.local_addr().unwrap();
        let serving = tonic::transport::Server::builder().add_service(ModulesServer::new(server));
        let serving = tokio::spawn(serving.serve_with_incoming(TcpListenerStream::new(listener)));
        let channel = || tonic::transport::Endpoint::from_shared(format!("http://{address}")).unwrap().connect_lazy();
        let result = fetch(channel, &hex::encode(Sha256::digest(&module))).await;
        serving.abort();
        if let Ok(bytes) = &result {
            assert_eq!(*bytes, module);
        }
        let offsets = offsets.lock().unwrap().clone();
        (result, offsets)
    }

    #[tokio::test]
    async fn a_broken_transfer_goes_on_where_it_ended() {
        let script = [Call::Breaks(2500), Call::Breaks(0), Call::Ends(3000), Call::Whole];
        let (result, offsets) = fetched(&script).await;
        assert!(result.is_ok(), "{result:?}");
        assert_eq!(offsets, [0, 2500, 2500, 5500]);
    }

    #[tokio::test]
    async fn a_corrupted_chunk_is_noticed_and_the_module_fetched_anew() {
        let (result, offsets) = fetched(&[Call::Flips, Call::Whole]).await;
        assert!(result.is_ok(), "{result:?}");
        assert_eq!(offsets, [0, 0]);
        // Also one of the part before a break.
        let (result, offsets) = fetched(&[Call::Breaks(4000), Call::Flips, Call::Whole]).await;
        assert!(result.is_ok(), "{result:?}");
        assert_eq!(offsets, [0, 4000, 0]);
    }

    #[tokio::test]
    async fn a_module_that_is_always_another_is_refused() {
        let (result, offsets) = fetched(&[Call::Flips]).await;
        let why = result.unwrap_err();
        assert!(why.contains("has the digest") && why.contains("3 times"), "{why}");
        assert_eq!(offsets, [0, 0, 0]);
    }

    #[tokio::test]
    async fn a_module_that_is_not_there_is_refused_at_once() {
        let (result, offsets) = fetched(&[Call::Unknown]).await;
        assert!(result.unwrap_err().contains("no filter uses it"));
        assert_eq!(offsets, [0]);
    }
}
