//! A control plane and proxies, started as users start them.

use std::ffi::OsString;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::{Address, Curl, Host, Metrics, Process, Response, binary, until};

/// The UID that interception exempts.
const PROXY_UID: u32 = 1337;

/// One mesh in a directory of its own. Everything that it started ends with it.
#[derive(Debug)]
pub struct Mesh {
    /// The control plane
    pub control: Control,
    directory: tempfile::TempDir,
}

/// A running control plane.
#[derive(Debug)]
pub struct Control {
    /// Its process
    pub process: Process,
    launch: Launch,
    host: Option<Host>,
    grpc: SocketAddr,
    http: SocketAddr,
    _address: Address,
}

/// How a process is started, and started again.
#[derive(Debug, Clone)]
struct Launch {
    name: String,
    program: PathBuf,
    args: Vec<OsString>,
    host: Option<Host>,
    uid: Option<u32>,
    directory: PathBuf,
}

impl Launch {
    fn start(&self) -> Process {
        let mut argv: Vec<OsString> = Vec::new();
        if let Some(uid) = self.uid {
            argv.extend(["setpriv".into(), format!("--reuid={uid}").into(), format!("--regid={uid}").into()]);
            argv.push("--clear-groups".into());
        }
        argv.push(self.program.clone().into());
        argv.extend(self.args.iter().cloned());
        let program = argv.remove(0);
        let mut command = match &self.host {
            Some(host) => host.command(program),
            None => Command::new(program),
        };
        Process::start(
            &self.name,
            {
                command.args(argv);
                command
            },
            &self.directory,
        )
    }
}

impl Mesh {
    /// A control plane on loopback, with `config` as its one file.
    pub fn start(config: &str) -> Self {
        Self::launch(config, None, &[], &[])
    }

    /// As [`Mesh::start`], with more files (name, text) that are there before anything is read.
    pub fn start_with_files(config: &str, files: &[(&str, &str)]) -> Self {
        Self::launch(config, None, &[], files)
    }

    /// As [`Mesh::start`], with more flags for the control plane.
    pub fn start_with(config: &str, flags: &[&str]) -> Self {
        Self::launch(config, None, flags, &[])
    }

    /// A control plane on a host of its own.
    pub fn start_on(host: &Host, config: &str) -> Self {
        Self::launch(config, Some(host.clone()), &[], &[])
    }

    fn launch(config: &str, host: Option<Host>, flags: &[&str], files: &[(&str, &str)]) -> Self {
        let directory = tempfile::Builder::new().prefix("outrigger-").tempdir().expect("temporary directory");
        // Proxies that run as another user read the root and their token here.
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).expect("permissions");
        let path = |name: &str| directory.path().join(name);
        fs::create_dir(path("config")).expect("directory");
        write(&path("config/mesh.yaml"), config);
        for (name, text) in files {
            write(&path("config").join(name), text);
        }
        let address = Address::claim();
        let (grpc, http) = match &host {
            Some(host) => ((host.ip(), 15012).into(), ([127, 0, 0, 1], 15014).into()),
            None => (address.port(15012), address.port(15014)),
        };
        let mut args: Vec<OsString> = vec!["--config".into(), path("config").into()];
        args.extend(["--state".into(), path("control").into()]);
        args.extend(["--grpc".into(), grpc.to_string().into(), "--http".into(), http.to_string().into()]);
        args.extend(flags.iter().map(OsString::from));
        let launch = Launch {
            name: "control".to_owned(),
            program: binary("outrigger-control"),
            args,
            host: host.clone(),
            uid: None,
            directory: directory.path().to_owned(),
        };
        let control = Control { process: launch.start(), launch, host, grpc, http, _address: address };
        let mut mesh = Self { control, directory };
        mesh.control.ready();
        let root = fs::Permissions::from_mode(0o711);
        fs::set_permissions(mesh.path("control"), root).expect("permissions");
        mesh
    }

    /// A path in the mesh's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Writes a file of the configuration directory, in one step as an editor or `git` does.
    pub fn write(&self, name: &str, text: &str) {
        write(&self.path("config").join(name), text);
    }

    /// Removes a file of the configuration directory.
    pub fn remove(&self, name: &str) {
        fs::remove_file(self.path("config").join(name)).expect("remove");
    }

    /// `outrigger ARGS`, told where the control plane is.
    pub fn outrigger(&self, args: &[&str]) -> Output {
        let program = binary("outrigger");
        let mut command = match &self.control.host {
            Some(host) => host.command(program),
            None => Command::new(program),
        };
        command.args(["--control", &format!("http://{}", self.control.http)]).args(args);
        command.output().expect("run outrigger")
    }

    /// A single-use join token for exactly this, made by `outrigger token create`.
    pub fn token(&self, namespace: &str, service_account: &str, labels: &str) -> String {
        let state = self.path("control");
        let state = state.to_str().expect("path");
        let scope = ["--namespace", namespace, "--service-account", service_account, "--labels", labels];
        let made = self.outrigger(&[&["token", "create", "--single-use", "--state", state], &scope[..]].concat());
        assert!(made.status.success(), "token create: {}", String::from_utf8_lossy(&made.stderr));
        String::from_utf8(made.stdout).expect("text").trim().to_owned()
    }

    /// `GET` of the control plane's API.
    pub fn api(&self, path: &str) -> serde_json::Value {
        let response = self.control.get(path);
        assert_eq!(response.status, 200, "{path}: {response:?}");
        response.json()
    }

    /// A proxy of namespace `demo`, not started yet. Its service account is its name without a trailing `-N`.
    pub fn proxy(&self, name: &str) -> ProxyBuilder<'_> {
        let account = name.trim_end_matches(|c: char| c.is_ascii_digit()).trim_end_matches('-');
        ProxyBuilder {
            mesh: self,
            name: name.to_owned(),
            namespace: "demo".to_owned(),
            account: account.to_owned(),
            labels: String::new(),
            host: None,
            flags: Vec::new(),
            token: None,
        }
    }
}

impl Control {
    /// Waits until it answers.
    pub fn ready(&mut self) {
        until("the control plane is ready", || {
            assert!(self.process.is_running(), "the control plane ended:\n{}", self.process.log());
            (self.get("/api/v1/status").status == 200).then_some(())
        });
    }

    /// Starts it again after a kill or stop, with the same flags, and waits until it answers.
    pub fn restart(&mut self) {
        self.process.kill();
        self.process = self.launch.start();
        self.ready();
    }

    /// Address of the gRPC server.
    pub fn grpc(&self) -> SocketAddr {
        self.grpc
    }

    /// Address of the HTTP API.
    pub fn http(&self) -> SocketAddr {
        self.http
    }

    fn get(&self, path: &str) -> Response {
        get(self.host.as_ref(), self.http, path)
    }
}

/// A proxy to be started.
#[derive(Debug)]
pub struct ProxyBuilder<'a> {
    mesh: &'a Mesh,
    name: String,
    namespace: String,
    account: String,
    labels: String,
    host: Option<Host>,
    flags: Vec<OsString>,
    token: Option<String>,
}

impl ProxyBuilder<'_> {
    /// Service account.
    pub fn account(mut self, account: &str) -> Self {
        account.clone_into(&mut self.account);
        self
    }

    /// Namespace.
    pub fn namespace(mut self, namespace: &str) -> Self {
        namespace.clone_into(&mut self.namespace);
        self
    }

    /// Labels: `app=reviews,version=v1`.
    pub fn labels(mut self, labels: &str) -> Self {
        labels.clone_into(&mut self.labels);
        self
    }

    /// A port of the application, as `--app` takes it: `[NAME=]ADDRESS[/PROTOCOL]`.
    pub fn app(self, app: &impl ToString) -> Self {
        self.flag("--app", &app.to_string())
    }

    /// Another flag.
    pub fn flag(mut self, name: &str, value: &str) -> Self {
        self.flags.extend([name.into(), value.into()]);
        self
    }

    /// Runs on a host, as UID 1337 behind nftables rules (which it does not install: see [`Proxy::intercept`]).
    pub fn on(mut self, host: &Host) -> Self {
        self.host = Some(host.clone());
        self
    }

    /// Joins with this token instead of a new single-use one.
    pub fn token(mut self, token: &str) -> Self {
        self.token = Some(token.to_owned());
        self
    }

    /// Starts it and waits until it is ready.
    pub fn start(self) -> Proxy {
        let mut proxy = self.launch();
        proxy.ready();
        proxy
    }

    /// Starts it without waiting.
    pub fn launch(self) -> Proxy {
        let Self { mesh, name, namespace, account, labels, host, flags, token } = self;
        let directory = mesh.path(&name);
        let state = directory.join("state");
        fs::create_dir_all(&state).expect("directory");
        fs::set_permissions(&state, fs::Permissions::from_mode(0o700)).expect("permissions");
        let token_file = directory.join("token");
        write(&token_file, &token.unwrap_or_else(|| mesh.token(&namespace, &account, &labels)));
        let address = Address::claim();
        let ip = if host.is_some() { IpAddr::from([127, 0, 0, 1]) } else { address.ip() };
        let mut args: Vec<OsString> = Vec::new();
        let mut flag =
            |name: &str, value: &dyn AsRef<std::ffi::OsStr>| args.extend([name.into(), value.as_ref().into()]);
        flag("--name", &name);
        flag("--namespace", &namespace);
        flag("--service-account", &account);
        flag("--labels", &labels);
        flag("--control-plane", &format!("https://{}", mesh.control.grpc));
        flag("--ca-file", &mesh.path("control/root.pem"));
        flag("--token-file", &token_file);
        flag("--state", &state);
        flag("--admin", &format!("{ip}:15000"));
        if host.is_some() {
            flag("--intercept", &"redirect");
        } else {
            flag("--outbound", &format!("{ip}:15001"));
            flag("--inbound", &format!("{ip}:15006"));
            flag("--health", &format!("{ip}:15020"));
        }
        args.extend(flags);
        let mut program = binary("outrigger-proxy");
        let uid = host.as_ref().map(|_| PROXY_UID);
        if let Some(uid) = uid {
            for path in [&state, &token_file] {
                chown(path, Some(uid), Some(uid)).expect("chown");
            }
            program = reachable(&program, mesh.directory.path());
        }
        let launch = Launch { name: name.clone(), program, args, host: host.clone(), uid, directory };
        Proxy { process: launch.start(), name, launch, host, ip, _address: address }
    }
}

/// A running proxy.
#[derive(Debug)]
pub struct Proxy {
    /// Its process
    pub process: Process,
    /// Name of its workload
    pub name: String,
    launch: Launch,
    host: Option<Host>,
    ip: IpAddr,
    _address: Address,
}

impl Proxy {
    /// Waits until `/ready` says so.
    pub fn ready(&mut self) {
        until(&format!("{} is ready", self.name), || {
            assert!(self.process.is_running(), "{} ended:\n{}", self.name, self.process.log());
            (self.admin("/ready").status == 200).then_some(())
        });
    }

    /// Starts it again after a kill or stop, with the same flags and state, and waits until it is ready.
    pub fn restart(&mut self) {
        self.process.kill();
        self.process = self.launch.start();
        self.ready();
    }

    /// Installs the interception rules on its host.
    pub fn intercept(&self) {
        let host = self.host.as_ref().expect("a proxy on a host");
        host.run(&format!("{} intercept install", binary("outrigger").display()));
    }

    /// Its address, of all listeners in explicit mode.
    pub fn ip(&self) -> IpAddr {
        self.ip
    }

    /// URL of the outbound listener (explicit mode).
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.outbound())
    }

    /// The outbound listener.
    pub fn outbound(&self) -> SocketAddr {
        (self.ip, 15001).into()
    }

    /// The inbound listener.
    pub fn inbound(&self) -> SocketAddr {
        (self.ip, 15006).into()
    }

    /// `GET http://SERVICE/PATH` through the outbound listener.
    pub fn call(&self, service: &str, path: &str) -> Curl {
        Curl::get(&self.url(path)).header("host", service)
    }

    /// `GET` of the admin listener.
    pub fn admin(&self, path: &str) -> Response {
        get(self.host.as_ref(), (self.ip, 15000).into(), path)
    }

    /// What it counted.
    pub fn metrics(&self) -> Metrics {
        let response = self.admin("/metrics");
        assert_eq!(response.status, 200, "/metrics: {response:?}");
        Metrics::parse(&response.body)
    }
}

fn get(host: Option<&Host>, address: SocketAddr, path: &str) -> Response {
    let url = format!("http://{address}{path}");
    host.map_or_else(|| Curl::get(&url), |host| Curl::from(host, &url)).send()
}

/// Writes a file in one step.
fn write(path: &Path, text: &str) {
    // A dot file: sources do not read it before it has its name.
    let temporary = path.with_file_name(format!(".{}", path.file_name().expect("file").display()));
    fs::write(&temporary, text).expect("write");
    fs::rename(&temporary, path).expect("rename");
}

/// The program at a path that every user may execute: a home directory is often closed to others.
fn reachable(program: &Path, directory: &Path) -> PathBuf {
    let path = directory.join(program.file_name().expect("file"));
    if !path.exists() && fs::hard_link(program, &path).is_err() {
        fs::copy(program, &path).expect("copy of the program");
    }
    path
}
