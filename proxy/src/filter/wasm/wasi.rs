//! WASI preview 1 for guests: stubs by hand. No files, no sockets, no environment but the configured one.

use wasmtime::{Caller, Linker, Val};

use super::calls::signature;
use super::clock;
use super::host::{Call, Fault, Host, read, split, write, write_u32};

const BADF: i32 = 8;
const FAULT: i32 = 21;
const INVAL: i32 = 28;
const NOTSUP: i32 = 58;
const RANDOM_LIMIT: u32 = 64 * 1024;
/// Bytes that one `fd_write` may pass.
const WRITE_LIMIT: usize = 64 * 1024;
/// Pieces that it may have.
const VECTORS: u32 = 1024;

/// Functions with one answer: name, parameters, errno.
const STUBS: [(&str, &str, i32); 36] = [
    ("args_get", "ii", 0),
    ("fd_advise", "iIIi", 0),
    ("fd_allocate", "iII", BADF),
    ("fd_close", "i", 0),
    ("fd_datasync", "i", 0),
    ("fd_fdstat_set_flags", "ii", 52),
    ("fd_fdstat_set_rights", "iII", 52),
    ("fd_filestat_get", "ii", BADF),
    ("fd_filestat_set_size", "iI", BADF),
    ("fd_filestat_set_times", "iIIi", BADF),
    ("fd_pread", "iiiIi", 52),
    ("fd_prestat_dir_name", "iii", 52),
    ("fd_prestat_get", "ii", BADF),
    ("fd_pwrite", "iiiIi", 52),
    ("fd_read", "iiii", 52),
    ("fd_readdir", "iiiIi", 20),
    ("fd_renumber", "ii", BADF),
    ("fd_seek", "iIii", 0),
    ("fd_sync", "i", 0),
    ("fd_tell", "ii", 0),
    ("path_create_directory", "iii", NOTSUP),
    ("path_filestat_get", "iiiii", NOTSUP),
    ("path_filestat_set_times", "iiiiIIi", NOTSUP),
    ("path_link", "iiiiiii", NOTSUP),
    ("path_open", "iiiiiIIii", 44),
    ("path_readlink", "iiiiii", NOTSUP),
    ("path_remove_directory", "iii", NOTSUP),
    ("path_rename", "iiiiii", NOTSUP),
    ("path_symlink", "iiiii", NOTSUP),
    ("path_unlink_file", "iii", NOTSUP),
    ("proc_raise", "i", NOTSUP),
    ("sched_yield", "", 0),
    ("sock_accept", "iii", NOTSUP),
    ("sock_recv", "iiiiii", NOTSUP),
    ("sock_send", "iiiii", NOTSUP),
    ("sock_shutdown", "ii", NOTSUP),
];

fn errno(result: Call<i32>) -> wasmtime::Result<i32> {
    match result {
        Ok(errno) => Ok(errno),
        Err(Fault::Status(_)) => Ok(FAULT),
        Err(Fault::Trap(error)) => Err(error),
    }
}

/// Defines WASI under both of its names.
pub(super) fn link(linker: &mut Linker<Host>) -> wasmtime::Result<()> {
    for module in ["wasi_snapshot_preview1", "wasi_unstable"] {
        for (name, params, errno) in STUBS {
            let ty = signature(linker.engine(), params, true);
            linker.func_new(module, name, ty, move |_, _, results| {
                if let Some(result) = results.first_mut() {
                    *result = Val::I32(errno);
                }
                Ok(())
            })?;
        }
        type Guest<'a> = Caller<'a, Host>;
        linker.func_wrap(module, "fd_write", |mut guest: Guest<'_>, fd: u32, vectors: u32, count: u32, out: u32| {
            errno(fd_write(&mut guest, fd, vectors, count, out))
        })?;
        linker.func_wrap(module, "fd_fdstat_get", |mut guest: Guest<'_>, fd: u32, out: u32| {
            errno(fd_fdstat_get(&mut guest, fd, out))
        })?;
        linker.func_wrap(module, "clock_time_get", |mut guest: Guest<'_>, id: u32, _: u64, out: u32| {
            errno(clock_time_get(&mut guest, id, out))
        })?;
        linker.func_wrap(module, "clock_res_get", |mut guest: Guest<'_>, id: u32, out: u32| {
            errno(if id > 1 { Ok(NOTSUP) } else { write(&mut guest, out, &1u64.to_le_bytes()).map(|()| 0) })
        })?;
        linker.func_wrap(module, "random_get", |mut guest: Guest<'_>, ptr: u32, len: u32| {
            errno(random_get(&mut guest, ptr, len))
        })?;
        linker.func_wrap(module, "environ_sizes_get", |mut guest: Guest<'_>, count: u32, size: u32| {
            errno(environ_sizes_get(&mut guest, count, size))
        })?;
        linker.func_wrap(module, "environ_get", |mut guest: Guest<'_>, pointers: u32, bytes: u32| {
            errno(environ_get(&mut guest, pointers, bytes))
        })?;
        linker.func_wrap(module, "args_sizes_get", |mut guest: Guest<'_>, count: u32, size: u32| {
            errno(write_u32(&mut guest, count, 0).and_then(|()| write_u32(&mut guest, size, 0)).map(|()| 0))
        })?;
        // Never sleeps; the Go runtime needs it to succeed.
        linker.func_wrap(module, "poll_oneoff", |mut guest: Guest<'_>, _: u32, _: u32, _: u32, out: u32| {
            errno(write_u32(&mut guest, out, 0).map(|()| 0))
        })?;
        linker.func_wrap(module, "proc_exit", |code: u32| -> wasmtime::Result<()> {
            Err(wasmtime::Error::msg(format!("the filter called proc_exit({code})")))
        })?;
    }
    Ok(())
}

fn fd_write(guest: &mut Caller<'_, Host>, fd: u32, vectors: u32, count: u32, out: u32) -> Call<i32> {
    let level = match fd {
        1 => 2,
        2 => 4,
        _ => return Ok(BADF),
    };
    if count > VECTORS {
        return Ok(INVAL);
    }
    let mut line = Vec::new();
    for index in 0..count {
        let at = vectors.checked_add(index.checked_mul(8).ok_or(super::abi::Status::BadArgument)?);
        let pair = read(guest, at.ok_or(super::abi::Status::BadArgument)?, 8)?;
        let word = |range| pair.get(range).and_then(|word: &[u8]| word.try_into().ok()).map_or(0, u32::from_le_bytes);
        line.extend_from_slice(&read(guest, word(0..4), word(4..8))?);
        if line.len() > WRITE_LIMIT {
            return Ok(INVAL);
        }
    }
    write_u32(guest, out, u32::try_from(line.len()).unwrap_or(u32::MAX))?;
    guest.data_mut().log(level, line.strip_suffix(b"\n").unwrap_or(&line));
    Ok(0)
}

fn fd_fdstat_get(guest: &mut Caller<'_, Host>, fd: u32, out: u32) -> Call<i32> {
    if fd != 1 && fd != 2 {
        return Ok(BADF);
    }
    let mut stat = [0; 24];
    // fs_rights_base: FD_WRITE
    stat[8] = 64;
    write(guest, out, &stat)?;
    Ok(0)
}

fn clock_time_get(guest: &mut Caller<'_, Host>, id: u32, out: u32) -> Call<i32> {
    let now = match id {
        0 => clock::wall(),
        1 => clock::monotonic(),
        _ => return Ok(NOTSUP),
    };
    write(guest, out, &u64::try_from(now.as_nanos()).unwrap_or(u64::MAX).to_le_bytes())?;
    Ok(0)
}

fn random_get(guest: &mut Caller<'_, Host>, ptr: u32, len: u32) -> Call<i32> {
    if len > RANDOM_LIMIT {
        return Ok(INVAL);
    }
    let (memory, _) = split(guest)?;
    let start = usize::try_from(ptr).unwrap_or(usize::MAX);
    let end = start.saturating_add(usize::try_from(len).unwrap_or(usize::MAX));
    let Some(bytes) = memory.get_mut(start..end) else { return Ok(FAULT) };
    aws_lc_rs::rand::fill(bytes).map_err(|_| Fault::Trap(wasmtime::Error::msg("the system has no randomness")))?;
    Ok(0)
}

fn environ_sizes_get(guest: &mut Caller<'_, Host>, count: u32, size: u32) -> Call<i32> {
    let environment = &guest.data().spec.environment;
    let bytes: usize = environment.iter().map(|(key, value)| key.len() + value.len() + 2).sum();
    let number = environment.len();
    write_u32(guest, count, u32::try_from(number).unwrap_or(0))?;
    write_u32(guest, size, u32::try_from(bytes).unwrap_or(0))?;
    Ok(0)
}

fn environ_get(guest: &mut Caller<'_, Host>, pointers: u32, bytes: u32) -> Call<i32> {
    let spec = std::sync::Arc::clone(&guest.data().spec);
    let (mut slot, mut at) = (pointers, bytes);
    for (key, value) in &spec.environment {
        let entry = format!("{key}={value}\0");
        write_u32(guest, slot, at)?;
        write(guest, at, entry.as_bytes())?;
        slot = slot.wrapping_add(4);
        at = at.wrapping_add(u32::try_from(entry.len()).unwrap_or(0));
    }
    Ok(0)
}
