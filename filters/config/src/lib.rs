//! Reading a filter's configuration: JSON, as the `configuration` of a `WasmFilter` is given.

use proxy_wasm::hostcalls;
use proxy_wasm::traits::RootContext;
use proxy_wasm::types::LogLevel;
use serde::de::DeserializeOwned;

/// The configuration; `{}` when there is none. `None`, with the reason in the log, when it cannot be read: `on_configure` then returns
/// false, and the filter that served before goes on serving.
pub fn read<T: DeserializeOwned>(root: &dyn RootContext) -> Option<T> {
    let bytes = root.get_plugin_configuration().filter(|bytes| !bytes.is_empty()).unwrap_or_else(|| b"{}".to_vec());
    serde_json::from_slice(&bytes).map_err(|error| refuse(&error.to_string())).ok()
}

/// Logs why a configuration is refused.
pub fn refuse(why: &str) {
    hostcalls::log(LogLevel::Error, &format!("configuration: {why}")).ok();
}
