//! Hosts in network namespaces, on one switch.

use std::ffi::OsStr;
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{self, Command};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use nix::sched::{CloneFlags, setns};

/// Hosts 1 to n, with the addresses 10.77.0.n and fd77::n, in network namespaces of their own that nothing else of this
/// machine sees. Removed when dropped.
#[derive(Debug)]
pub struct Lan {
    switch: String,
    hosts: Vec<Host>,
}

/// One host: a network namespace.
#[derive(Debug, Clone)]
pub struct Host {
    namespace: String,
    number: u8,
}

impl Lan {
    /// Makes one with this many hosts.
    ///
    /// # Panics
    /// Without root: tests that need it fail rather than pass for nothing.
    pub fn new(hosts: u8) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        assert!(
            nix::unistd::geteuid().is_root(),
            "this test makes network namespaces, which needs root: run `make test`, which uses sudo for it"
        );
        let prefix = format!("orig{}-{}", process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let lan = Self {
            switch: format!("{prefix}-switch"),
            hosts: (1..=hosts).map(|number| Host { namespace: format!("{prefix}-{number}"), number }).collect(),
        };
        let switch = &lan.switch;
        run(&format!("ip netns add {switch}"));
        run(&format!("ip -n {switch} link add switch type bridge"));
        run(&format!("ip -n {switch} link set switch up"));
        for Host { namespace, number } in &lan.hosts {
            run(&format!("ip netns add {namespace}"));
            run(&format!("ip -n {namespace} link set lo up"));
            run(&format!("ip -n {namespace} link add eth0 type veth peer name port{number} netns {switch}"));
            run(&format!("ip -n {switch} link set port{number} master switch up"));
            run(&format!("ip -n {namespace} link set eth0 up"));
            run(&format!("ip -n {namespace} addr add 10.77.0.{number}/24 dev eth0"));
            // nodad: an address that is still being checked for duplicates cannot be listened on.
            run(&format!("ip -n {namespace} addr add fd77::{number}/64 dev eth0 nodad"));
            // Service addresses are nobody's: a route must exist for the connection to reach the rules.
            run(&format!("ip -n {namespace} route add default dev eth0"));
            run(&format!("ip -n {namespace} -6 route add default dev eth0"));
        }
        lan
    }

    /// Host 1, 2, …
    pub fn host(&self, number: usize) -> &Host {
        &self.hosts[number - 1]
    }
}

impl Drop for Lan {
    fn drop(&mut self) {
        for namespace in self.hosts.iter().map(|host| &host.namespace).chain([&self.switch]) {
            let _ = Command::new("ip").args(["netns", "del", namespace]).status();
        }
    }
}

impl Host {
    /// IPv4 address.
    pub fn ip(&self) -> IpAddr {
        Ipv4Addr::new(10, 77, 0, self.number).into()
    }

    /// IPv6 address.
    pub fn ip6(&self) -> IpAddr {
        Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, self.number.into()).into()
    }

    /// A command that runs on this host.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace]).arg(program);
        command
    }

    /// The same command, on this host.
    pub fn wrap(&self, command: &Command) -> Command {
        let mut wrapped = self.command(command.get_program());
        wrapped.args(command.get_args());
        wrapped.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        wrapped
    }

    /// Runs a command on this host to its end.
    ///
    /// # Panics
    /// When it fails.
    #[track_caller]
    pub fn run(&self, text: &str) -> String {
        run(&format!("ip netns exec {} {text}", self.namespace))
    }

    /// A listener on this host, for a server within the test.
    pub fn listen(&self, address: SocketAddr) -> TcpListener {
        self.inside(move || TcpListener::bind(address).unwrap_or_else(|error| panic!("listen on {address}: {error}")))
    }

    /// A connection from this host, for a client within the test.
    ///
    /// # Errors
    /// As [`TcpStream::connect`].
    pub fn connect(&self, address: SocketAddr) -> std::io::Result<TcpStream> {
        self.inside(move || TcpStream::connect(address))
    }

    /// Runs `act` on a thread in this namespace: a socket belongs to the namespace in which it was made, for ever.
    fn inside<T: Send + 'static>(&self, act: impl FnOnce() -> T + Send + 'static) -> T {
        let namespace = File::open(format!("/run/netns/{}", self.namespace)).expect("network namespace");
        let thread = thread::spawn(move || {
            setns(namespace, CloneFlags::CLONE_NEWNET).expect("enter the network namespace");
            act()
        });
        thread.join().expect("thread in a network namespace")
    }
}

#[track_caller]
fn run(text: &str) -> String {
    let mut words = text.split_whitespace();
    let output = Command::new(words.next().expect("a command")).args(words).output();
    let output = output.unwrap_or_else(|error| panic!("{text}: {error}"));
    assert!(output.status.success(), "{text}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}
