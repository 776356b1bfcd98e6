//! Filter modules: where they come from, where they are kept, and how proxies get them (over gRPC, by digest, in chunks, from an
//! offset).

pub mod follow;
pub mod remote;
pub mod store;

use std::io::SeekFrom;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use outrigger_core::key::Key;
use outrigger_proto::control::modules_server::Modules;
use outrigger_proto::control::{Chunk, FetchRequest};
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::mesh::Mesh;
use crate::peer::Peer;
use crate::refusals::Refusals;

const CHUNK: usize = 64 * 1024;

/// The modules service.
#[derive(Debug)]
pub struct Service {
    /// Knows the digests
    pub mesh: Arc<Mesh>,
    /// What was refused
    pub refusals: Arc<Refusals>,
}

#[tonic::async_trait]
impl Modules for Service {
    type FetchStream = ReceiverStream<Result<Chunk, Status>>;

    async fn fetch(&self, request: Request<FetchRequest>) -> Result<Response<Self::FetchStream>, Status> {
        let peer = Peer::of(&request)?;
        peer.leaf(self.mesh.trust_domain()).inspect_err(|status| {
            self.refusals.record("fetch", &peer.address.to_string(), status.message());
        })?;
        let FetchRequest { name, offset } = request.into_inner();
        let Ok(Key::Wasm(digest)) = name.parse::<Key>() else {
            return Err(Status::invalid_argument(format!("`{name}` is not wasm/<sha256>")));
        };
        let total = self.mesh.now().modules.get(&digest).copied();
        let total = total.ok_or_else(|| Status::not_found(format!("no filter uses module {digest}")))?;
        if offset > total {
            return Err(Status::out_of_range(format!("the module has {total} bytes; the offset is {offset}")));
        }
        let path = self.mesh.state().join("modules").join(&digest);
        let (sender, chunks) = mpsc::channel(4);
        tokio::spawn(async move {
            if let Err(error) = send(path, offset, total, &sender).await {
                let _ = sender.send(Err(Status::internal(format!("the module cannot be read: {error}")))).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(chunks)))
    }
}

async fn send(
    path: PathBuf,
    offset: u64,
    total: u64,
    sender: &mpsc::Sender<Result<Chunk, Status>>,
) -> std::io::Result<()> {
    let mut file = tokio::fs::File::open(path).await?;
    file.seek(SeekFrom::Start(offset)).await?;
    let mut first = true;
    loop {
        let mut data = Vec::with_capacity(CHUNK);
        (&mut file).take(CHUNK as u64).read_to_end(&mut data).await?;
        // An empty module, or an offset at its end, is one empty chunk.
        if data.is_empty() && !first {
            return Ok(());
        }
        let chunk = Chunk { data: Bytes::from(data), total: if first { total } else { 0 } };
        if sender.send(Ok(chunk)).await.is_err() {
            return Ok(());
        }
        first = false;
    }
}
