//! The last configuration on disk, so that a proxy restarted without its control plane serves and calls: responses as they
//! were accepted, replayed at the start.

use std::io::Write;
use std::path::Path;
use std::time::Instant;

use outrigger_core::key::Key;
use outrigger_proto::discovery::{DeltaDiscoveryResponse, Resource};
use prost::Message;

use super::engine::Engine;
use super::subscriptions::Kind;

/// First of all: whose configuration this is, and which destinations were in use.
const HEAD: &str = "outrigger/snapshot/1";

/// Writes what the engine has accepted, whole or not at all.
pub(super) fn save(engine: &Engine, file: &Path, owner: &str) {
    if let Err(error) = write(engine, file, owner) {
        tracing::warn!(%error, file = %file.display(), "the configuration could not be persisted: a restart needs the control plane");
    }
}

fn write(engine: &Engine, file: &Path, owner: &str) -> std::io::Result<()> {
    let mut bytes = Vec::new();
    let mut put = |response: DeltaDiscoveryResponse| bytes.extend(response.encode_length_delimited_to_vec());
    put(DeltaDiscoveryResponse {
        type_url: HEAD.to_owned(),
        system_version_info: owner.to_owned(),
        removed_resources: engine.wanted().map(Key::to_string).collect(),
        ..DeltaDiscoveryResponse::default()
    });
    for kind in Kind::ALL {
        let accepted = engine.accepted.iter().filter(|((of, _), _)| *of == kind);
        put(DeltaDiscoveryResponse {
            type_url: kind.type_url().to_owned(),
            resources: accepted
                .map(|((_, name), resource)| Resource {
                    aliases: engine.subscriptions.aliases(kind, name),
                    ..resource.clone()
                })
                .collect(),
            removed_resources: engine.subscriptions.absent(kind).cloned().collect(),
            ..DeltaDiscoveryResponse::default()
        });
    }
    let directory = file.parent().unwrap_or_else(|| Path::new("."));
    let temporary = directory.join(".snapshot.pb.new");
    let mut out = std::fs::File::create(&temporary)?;
    out.write_all(&bytes)?;
    out.sync_all()?;
    std::fs::rename(&temporary, file)
}

/// Replays what was persisted, if it is this workload's. Resources that cannot be linked any more are left out.
pub(super) fn restore(engine: &mut Engine, file: &Path, owner: &str, now: Instant) {
    let bytes = match std::fs::read(file) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return,
        Err(error) => {
            tracing::warn!(%error, file = %file.display(), "the persisted configuration cannot be read");
            return;
        }
    };
    match replay(engine, &bytes, owner, now) {
        Ok(resources) => tracing::info!(
            resources,
            file = %file.display(),
            "started from the persisted configuration; it serves until the control plane answers"
        ),
        Err(why) => tracing::warn!(why, file = %file.display(), "the persisted configuration is not used"),
    }
}

fn replay(engine: &mut Engine, mut bytes: &[u8], owner: &str, now: Instant) -> Result<usize, String> {
    let mut next = || {
        let more = !bytes.is_empty();
        more.then(|| DeltaDiscoveryResponse::decode_length_delimited(&mut bytes)).transpose().map_err(|e| e.to_string())
    };
    let head = next()?.ok_or("it is empty")?;
    if head.type_url != HEAD {
        return Err(format!("its format is `{}`, not {HEAD}", head.type_url));
    }
    if head.system_version_info != owner {
        return Err(format!("it is of workload {}", head.system_version_info));
    }
    for key in head.removed_resources.iter().filter_map(|key| key.parse().ok()) {
        engine.want(key);
    }
    let mut resources = 0;
    while let Some(response) = next()? {
        resources += response.resources.len();
        engine.response(response, now);
        // Services tell which endpoints are wanted, ports which filters.
        engine.restored();
    }
    Ok(resources)
}
