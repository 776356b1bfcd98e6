use std::os::unix::fs::chown;

use super::*;

fn module(text: &str) -> (bytes::Bytes, String) {
    let module = wat::parse_str(text).unwrap();
    let digest = hex::encode(Sha256::digest(&module));
    (module.into(), digest)
}

/// A compiler that does this: `$2` is the module, `$3` where its code goes.
fn compiler(directory: &Path, script: &str) -> Compiler {
    let path = directory.join("compiler");
    std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
    Compiler::Child(path)
}

/// As a proxy does when the first filter comes.
fn open(directory: &Path, engine: &Engine) -> Result<Cache, FilterError> {
    Cache::prepare(directory)?;
    Ok(Cache::of(directory, engine))
}

fn files(cache: &Cache) -> Vec<String> {
    let names = std::fs::read_dir(&cache.directory).unwrap();
    names.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
}

#[tokio::test]
async fn filters_of_one_module_have_it_compiled_once() {
    let directory = tempfile::tempdir().unwrap();
    let engine = engine::engine().unwrap();
    let cache = open(&directory.path().join("cache"), &engine).unwrap();
    let count = directory.path().join("count");
    let script = format!("echo once >> {}\n: > \"$3\"", count.display());
    let compiler = compiler(directory.path(), &script);
    let (module, digest) = module("(module)");
    let fill = || cache.fill(&engine, &compiler, &digest, Some(module.clone()));
    let (a, b, c) = tokio::join!(fill(), fill(), fill());
    assert!(a.is_ok() && b.is_ok() && c.is_ok(), "{a:?} {b:?} {c:?}");
    assert_eq!(std::fs::read_to_string(&count).unwrap(), "once\n");
    // Nor by the next process.
    let cache = open(&directory.path().join("cache"), &engine).unwrap();
    assert!(cache.has(&digest));
}

#[tokio::test]
async fn a_compiler_that_is_ended_refuses_its_module_and_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let engine = engine::engine().unwrap();
    let cache = open(&directory.path().join("cache"), &engine).unwrap();
    let compiler = compiler(directory.path(), "kill -9 $$");
    let (module, digest) = module("(module)");
    let error = cache.fill(&engine, &compiler, &digest, Some(module)).await.unwrap_err().to_string();
    assert!(error.contains("signal: 9") && error.contains("60 s of CPU"), "{error}");
    assert_eq!(files(&cache), Vec::<String>::new());
}

#[tokio::test]
async fn a_damaged_file_is_missing_and_a_new_one_takes_its_place() {
    let directory = tempfile::tempdir().unwrap();
    let engine = engine::engine().unwrap();
    let cache = open(&directory.path().join("cache"), &engine).unwrap();
    let (module, digest) = module("(module)");
    std::fs::write(cache.file(&digest), "\u{7f}ELF and nothing of ours").unwrap();
    assert!(matches!(cache.map(&engine, &digest), Err(FilterError::Missing(_))));
    assert!(!cache.has(&digest));
    cache.fill(&engine, &Compiler::InProcess, &digest, Some(module)).await.unwrap();
    cache.map(&engine, &digest).unwrap();
}

#[tokio::test]
async fn machine_code_is_no_module() {
    let directory = tempfile::tempdir().unwrap();
    let engine = engine::engine().unwrap();
    let cache = open(&directory.path().join("cache"), &engine).unwrap();
    let (module, _) = module("(module)");
    let code: bytes::Bytes = engine.precompile_module(&module).unwrap().into();
    let digest = hex::encode(Sha256::digest(&code));
    let error = cache.fill(&engine, &Compiler::InProcess, &digest, Some(code)).await.unwrap_err().to_string();
    assert!(error.contains("not a WebAssembly module"), "{error}");
}

#[test]
fn the_directory_is_private_or_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("cache");
    let engine = engine::engine().unwrap();
    let mode = || std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
    open(&path, &engine).unwrap();
    assert_eq!(mode(), 0o700);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o777)).unwrap();
    open(&path, &engine).unwrap();
    assert_eq!(mode(), 0o700);
    if nix::unistd::geteuid().is_root() {
        chown(&path, Some(1), Some(1)).unwrap();
        let error = open(&path, &engine).unwrap_err();
        assert!(std::error::Error::source(&error).unwrap().to_string().contains("another user"), "{error:?}");
    }
}

#[test]
fn what_other_engines_left_is_removed_and_the_newest_stay() {
    let directory = tempfile::tempdir().unwrap();
    let engine = engine::engine().unwrap();
    let cache = open(directory.path(), &engine).unwrap();
    for number in 0..KEPT + 3 {
        std::fs::write(cache.file(&format!("{number:064x}")), "").unwrap();
    }
    let aged = |path: &Path| {
        let file = std::fs::File::options().create(true).append(true).open(path).unwrap();
        file.set_modified(SystemTime::now() - STALE * 2).unwrap();
    };
    aged(&cache.file(&format!("{:064x}", 5)));
    aged(&directory.path().join(format!("{:064x}-0123456789abcdef.cwasm", 1)));
    aged(&directory.path().join("left.wasm"));
    // Another process may be at it.
    std::fs::write(directory.path().join("running.tmp"), "").unwrap();
    let cache = open(directory.path(), &engine).unwrap();
    let left = files(&cache);
    assert_eq!(left.len(), KEPT + 1);
    assert!(!left.iter().any(|name| name.contains("0123456789abcdef") || name == "left.wasm"), "{left:?}");
    assert!(!cache.has(&format!("{:064x}", 5)), "the oldest is gone");
}
