//! Filters: the example in `filters/`, and guests written in WAT.

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest, Sha256};

/// Where things are built that several checkouts share.
pub(crate) fn cache() -> PathBuf {
    let cache = env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    cache.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cache"))).expect("HOME").join("outrigger")
}

/// The compiled example filter `filters/NAME`, built if it is not there yet.
pub fn example_filter(name: &str) -> PathBuf {
    let file = cache().join("filters").join(format!("{}.wasm", name.replace('-', "_")));
    if !file.exists() {
        let build = concat!(env!("CARGO_MANIFEST_DIR"), "/../filters/build.sh");
        let built = Command::new(build).output().expect("run filters/build.sh");
        assert!(built.status.success(), "filters/build.sh: {}", String::from_utf8_lossy(&built.stderr));
    }
    file
}

/// A Proxy-Wasm module under construction, in WAT. It imports the functions for headers, properties and logging, as
/// `$name` for `proxy_name`.
#[derive(Debug, Clone)]
pub struct Guest {
    abi: &'static str,
    imports: String,
    data: String,
    next: usize,
    body: String,
}

impl Guest {
    /// A module of ABI `0_2_0` or `0_2_1`, with a bump allocator.
    pub fn new(abi: &'static str) -> Self {
        let guest = Self { abi, imports: String::new(), data: String::new(), next: 1024, body: String::new() };
        guest
            .import("log", 3)
            .import("add_header_map_value", 5)
            .import("replace_header_map_value", 5)
            .import("get_header_map_value", 5)
            .import("get_property", 4)
    }

    /// Imports `proxy_NAME`, of so many i32, as `$NAME`.
    pub fn import(mut self, name: &str, params: usize) -> Self {
        let params = "i32 ".repeat(params);
        let _ =
            writeln!(self.imports, "(import \"env\" \"proxy_{name}\" (func ${name} (param {params}) (result i32)))");
        self
    }

    /// Puts a text into memory; its address and length as two operands.
    pub fn text(&mut self, text: &str) -> String {
        let at = self.next;
        self.next += text.len() + 1;
        assert!(self.next < 65536, "the guest's texts are too long");
        let escaped: String = text.bytes().map(|byte| format!("\\{byte:02x}")).collect();
        let _ = writeln!(self.data, "(data (i32.const {at}) \"{escaped}\")");
        format!("(i32.const {at}) (i32.const {})", text.len())
    }

    /// Does this in `proxy_on_SIDE_headers` (`request` or `response`), and continues.
    pub fn on_headers(mut self, side: &str, body: &str) -> Self {
        let _ = writeln!(
            self.body,
            "(func (export \"proxy_on_{side}_headers\") (param i32 i32 i32) (result i32) \
             {body}\n(i32.const 0))"
        );
        self
    }

    /// Does this at the beginning of `proxy_on_SIDE_headers`, which is there already.
    pub fn before(mut self, side: &str, body: &str) -> Self {
        let head = format!("(func (export \"proxy_on_{side}_headers\") (param i32 i32 i32) (result i32) ");
        assert!(self.body.contains(&head), "there is no such callback yet");
        self.body = self.body.replace(&head, &format!("{head}{body}\n"));
        self
    }

    /// Adds a function or any other field.
    pub fn field(mut self, field: &str) -> Self {
        self.body.push_str(field);
        self
    }

    /// The module.
    pub fn wasm(&self) -> Vec<u8> {
        let Self { abi, imports, data, body, .. } = self;
        let text = format!(
            "(module {imports} (memory (export \"memory\") 4) (global $top (mut i32) (i32.const 65536))\n\
             (func (export \"proxy_abi_version_{abi}\"))\n\
             (func (export \"proxy_on_memory_allocate\") (param i32) (result i32)\n\
               (global.get $top) (global.set $top (i32.and (i32.const 0x3ffff) (i32.add (global.get $top) (local.get 0)))))\n\
             {data}\n{body})"
        );
        wat::parse_str(&text).unwrap_or_else(|error| panic!("{error}\n{text}"))
    }

    /// Writes the module in one step; its digest in hex.
    pub fn write(&self, path: &Path) -> String {
        let wasm = self.wasm();
        let temporary = path.with_extension("new");
        fs::write(&temporary, &wasm).expect("write");
        fs::rename(&temporary, path).expect("rename");
        hex::encode(Sha256::digest(&wasm))
    }

    /// One that appends `header: value` to every request and every response.
    pub fn adds(abi: &'static str, header: &str, value: &str) -> Self {
        let mut guest = Self::new(abi);
        let (header, value) = (guest.text(header), guest.text(value));
        let add = format!("(drop (call $add_header_map_value (i32.const MAP) {header} {value}))");
        guest.on_headers("request", &add.replace("MAP", "0")).on_headers("response", &add.replace("MAP", "2"))
    }
}
