//! The client of most tests: curl.

use std::ffi::OsStr;
use std::process::{Command, Output};

use crate::netns::Host;

/// A curl command under construction.
#[derive(Debug)]
pub struct Curl(Command);

/// What curl received.
#[derive(Debug, Clone)]
pub struct Response {
    /// 0 when there was no response
    pub status: u16,
    /// curl's exit code; 0 is a complete exchange
    pub exit: i32,
    /// Version of HTTP: `1.1`, `2`
    pub version: String,
    /// Name in lower case and value, in order, of the last response
    pub headers: Vec<(String, String)>,
    /// The body, which curl has decoded from its framing
    pub body: String,
    /// What curl said itself
    pub error: String,
}

impl Curl {
    /// `GET url`.
    pub fn get(url: &str) -> Self {
        Self::new(Command::new("curl"), url)
    }

    /// `GET url` from within a host's network namespace.
    pub fn from(host: &Host, url: &str) -> Self {
        Self::new(host.command("curl"), url)
    }

    fn new(mut command: Command, url: &str) -> Self {
        // --globoff and --path-as-is: the URL goes out as it is written. 1M separates response and report.
        command.args(["--silent", "--show-error", "--globoff", "--path-as-is", "--noproxy", "*", "--max-time", "30"]);
        command.args(["--include", "--write-out", "\u{1}%{http_code} %{http_version}", url]);
        Self(command)
    }

    /// One more argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.0.arg(arg);
        self
    }

    /// More arguments.
    pub fn args<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(mut self, args: I) -> Self {
        self.0.args(args);
        self
    }

    /// A header.
    pub fn header(self, name: &str, value: &str) -> Self {
        // curl takes `Name;` for an empty value; `Name:` would remove the header.
        let text = if value.is_empty() { format!("{name};") } else { format!("{name}: {value}") };
        self.args(["--header", &text])
    }

    /// Sends it.
    ///
    /// # Panics
    /// When curl cannot be run. No response is no panic: see [`Response::exit`].
    pub fn send(mut self) -> Response {
        let output =
            self.0.output().unwrap_or_else(|error| panic!("cannot run curl: {error} (make setup installs it)"));
        Response::read(&output)
    }
}

impl Response {
    fn read(output: &Output) -> Self {
        let text = String::from_utf8_lossy(&output.stdout);
        let (received, report) = text.rsplit_once('\u{1}').unwrap_or((&text, ""));
        let (status, version) = report.split_once(' ').unwrap_or(("0", ""));
        // 100 Continue and the like come before the response itself.
        let mut rest = received;
        let mut head = "";
        while rest.starts_with("HTTP/") {
            let Some((before, after)) = rest.split_once("\r\n\r\n") else { break };
            (head, rest) = (before, after);
            let code = head.split(' ').nth(1).unwrap_or_default();
            if !code.starts_with('1') || code == "101" {
                break;
            }
        }
        let headers = head.lines().skip(1).filter_map(|line| {
            line.split_once(':').map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        });
        Self {
            status: status.parse().unwrap_or(0),
            exit: output.status.code().unwrap_or(-1),
            version: version.to_owned(),
            headers: headers.collect(),
            body: rest.to_owned(),
            error: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        }
    }

    /// The first value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(of, _)| of == name).map(|(_, value)| value.as_str())
    }

    /// Why the mesh itself answered, if it did.
    pub fn reason(&self) -> Option<&str> {
        self.header("x-outrigger-reason")
    }

    /// The body as JSON.
    ///
    /// # Panics
    /// When it is none.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("no JSON ({error}): {self:?}"))
    }
}
