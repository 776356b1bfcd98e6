//! The real binary as the compiler of filters.

use outrigger_proto::mesh;
use outrigger_proxy::filter::{Compiler, Plugins, Settings};
use sha2::{Digest, Sha256};

const GUEST: &str = r#"(module (memory (export "memory") 1) (func (export "proxy_abi_version_0_2_1"))
    (func (export "malloc") (param i32) (result i32) (i32.const 0)))"#;

fn filter(module: &[u8]) -> mesh::Filter {
    let sha256 = hex::encode(Sha256::digest(module));
    mesh::Filter { namespace: "demo".into(), name: "guest".into(), sha256, ..Default::default() }
}

#[tokio::test]
async fn a_child_compiles_and_the_cache_keeps_it() {
    let state = tempfile::tempdir().unwrap();
    let settings = Settings {
        compiler: Compiler::Child(env!("CARGO_BIN_EXE_outrigger-proxy").into()),
        cache: state.path().join("filters"),
    };
    let plugins = Plugins::new(settings.clone()).unwrap();
    let module = wat::parse_str(GUEST).unwrap();
    let spec = filter(&module);
    assert!(!plugins.has_module(&spec.sha256));
    plugins.prepare(&spec, Some(module.into())).await.unwrap();

    // Another process needs no bytes, and the cache holds nothing but the module.
    let again = Plugins::new(settings).unwrap();
    assert!(again.has_module(&spec.sha256));
    again.prepare(&spec, None).await.unwrap();

    let garbage = b"no module".to_vec();
    let error = plugins.prepare(&filter(&garbage), Some(garbage.into())).await.unwrap_err().to_string();
    assert!(error.contains("not a WebAssembly module"), "{error}");
    assert_eq!(std::fs::read_dir(state.path().join("filters")).unwrap().count(), 1);
}

/// The module is read from a pipe, so that the compiler can be looked at before it has one.
#[test]
fn the_compiler_limits_its_memory_and_time_before_it_reads_the_module() {
    let directory = tempfile::tempdir().unwrap();
    let (input, output) = (directory.path().join("in"), directory.path().join("out"));
    nix::unistd::mkfifo(&input, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_outrigger-proxy"));
    let mut child = command.arg("--compile-filter").args([&input, &output]).spawn().unwrap();
    // Opened for writing when the other side opens it for reading.
    let mut pipe = std::fs::File::options().write(true).open(&input).unwrap();
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", child.id())).unwrap();
    let soft = |name: &str| {
        let line = limits.lines().find(|line| line.starts_with(name)).unwrap();
        line[name.len()..].split_whitespace().next().unwrap().to_owned()
    };
    assert_eq!(soft("Max address space"), (4_u64 << 30).to_string());
    assert_eq!(soft("Max cpu time"), "60");
    assert_eq!(soft("Max core file size"), "0");
    std::io::Write::write_all(&mut pipe, &wat::parse_str(GUEST).unwrap()).unwrap();
    drop(pipe);
    assert!(child.wait().unwrap().success());
    assert!(output.exists());
}
