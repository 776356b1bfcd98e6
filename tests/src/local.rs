//! Proxies without a control plane.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::{Address, Authority, Curl, Metrics, Process, Response, binary, until};

/// A directory of YAML, and the proxies that read it.
#[derive(Debug)]
pub struct Local {
    directory: tempfile::TempDir,
}

impl Local {
    /// A directory with this as its one file.
    pub fn new(config: &str) -> Self {
        let directory = tempfile::Builder::new().prefix("outrigger-").tempdir().expect("temporary directory");
        fs::create_dir(directory.path().join("config")).expect("directory");
        let local = Self { directory };
        local.write("mesh.yaml", config);
        local
    }

    /// A path beside the configuration.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Writes a file of the configuration in one step.
    pub fn write(&self, name: &str, text: &str) {
        replace(&self.path("config").join(name), text);
    }

    /// Writes `NAME.pem`, `NAME.key` and `NAME.ca`, each in one step: a certificate for an account of namespace `demo`, and
    /// whom its owner trusts.
    pub fn issue(&self, name: &str, account: &str, signer: &Authority, trusted: &[&Authority]) {
        let staging = tempfile::tempdir_in(self.directory.path()).expect("temporary directory");
        let read = |path: &Path| fs::read_to_string(path).expect("read");
        let leaf = signer.leaf(staging.path(), "leaf", &format!("demo/{account}"), Some(Duration::from_secs(3600)));
        let bundle = trusted.iter().map(|root| read(&root.write(staging.path(), "root").cert)).collect();
        for (extension, text) in [("key", read(&leaf.key)), ("ca", bundle), ("pem", read(&leaf.cert))] {
            replace(&self.path(&format!("{name}.{extension}")), &text);
        }
    }

    /// A proxy of namespace `demo` over the directory, not started yet.
    pub fn proxy(&self, name: &str) -> LocalBuilder<'_> {
        LocalBuilder { local: self, name: name.to_owned(), flags: Vec::new() }
    }
}

/// A local proxy to be started.
#[derive(Debug)]
pub struct LocalBuilder<'a> {
    local: &'a Local,
    name: String,
    flags: Vec<String>,
}

impl LocalBuilder<'_> {
    /// A flag.
    pub fn flag(mut self, name: &str, value: &impl ToString) -> Self {
        self.flags.extend([name.to_owned(), value.to_string()]);
        self
    }

    /// Its identity, from the files that [`Local::issue`] wrote for `name`.
    pub fn identity(self, name: &str) -> Self {
        let path = |extension: &str| self.local.path(&format!("{name}.{extension}")).display().to_string();
        let (cert, key, ca) = (path("pem"), path("key"), path("ca"));
        self.flag("--cert-file", &cert).flag("--key-file", &key).flag("--ca-file", &ca)
    }

    /// Starts it, without waiting for anything.
    pub fn start(self) -> LocalProxy {
        let Self { local, name, flags } = self;
        let address = Address::claim();
        let mut command = Command::new(binary("outrigger-proxy"));
        command.args(["--name", &name, "--namespace", "demo"]).arg("--config").arg(local.path("config"));
        let ports = [("--admin", 15000), ("--outbound", 15001), ("--inbound", 15006), ("--health", 15020)];
        for (flag, port) in ports.iter().filter(|(flag, _)| !flags.iter().any(|given| given == flag)) {
            command.args([*flag, &address.port(*port).to_string()]);
        }
        command.args(flags);
        let process = Process::start(&name, command, local.directory.path());
        LocalProxy { process, admin: address.port(15000), outbound: address.port(15001), _address: address }
    }
}

/// A running local proxy.
#[derive(Debug)]
pub struct LocalProxy {
    /// Its process
    pub process: Process,
    admin: SocketAddr,
    outbound: SocketAddr,
    _address: Address,
}

impl LocalProxy {
    /// Waits until `/ready` says so.
    pub fn ready(mut self) -> Self {
        until("the proxy is ready", || {
            assert!(self.process.is_running(), "it ended:\n{}", self.process.log());
            (self.admin("/ready").status == 200).then_some(())
        });
        self
    }

    /// The outbound listener.
    pub fn outbound(&self) -> SocketAddr {
        self.outbound
    }

    /// `GET http://SERVICE/PATH` through the outbound listener.
    pub fn call(&self, service: &str, path: &str) -> Curl {
        Curl::get(&format!("http://{}{path}", self.outbound)).header("host", service)
    }

    /// `GET` of the admin listener.
    pub fn admin(&self, path: &str) -> Response {
        Curl::get(&format!("http://{}{path}", self.admin)).send()
    }

    /// What it counted.
    pub fn metrics(&self) -> Metrics {
        Metrics::parse(&self.admin("/metrics").body)
    }
}

/// Writes a file in one step, under a name that sources do not read before.
fn replace(path: &Path, text: &str) {
    let temporary = path.with_file_name(format!(".{}", path.file_name().expect("file").display()));
    fs::write(&temporary, text).expect("write");
    fs::rename(&temporary, path).expect("rename");
}
