// A filter in AssemblyScript, without an SDK, built by tests/proxy-wasm/build.sh. Texts are UTF-8 in static memory.
@external("env", "proxy_log")
declare function proxy_log(level: u32, text: usize, size: u32): u32;
@external("env", "proxy_get_header_map_value")
declare function proxy_get_header_map_value(map: u32, key: usize, n: u32, value: usize, size: usize): u32;
@external("env", "proxy_add_header_map_value")
declare function proxy_add_header_map_value(map: u32, key: usize, n: u32, value: usize, size: u32): u32;
@external("env", "proxy_remove_header_map_value")
declare function proxy_remove_header_map_value(map: u32, key: usize, n: u32): u32;
@external("env", "proxy_set_buffer_bytes")
declare function proxy_set_buffer_bytes(buffer: u32, start: u32, length: u32, bytes: usize, size: u32): u32;

// Made by the start section: without it the filter has no name to give.
const name = String.UTF8.encode("assemblyscript");
const key = String.UTF8.encode("x-guest");
const path = String.UTF8.encode(":path");
const length = String.UTF8.encode("content-length");
const mark = String.UTF8.encode("<assemblyscript>");
const result = new ArrayBuffer(8);

export function proxy_abi_version_0_2_1(): void {}

export function proxy_on_memory_allocate(size: u32): usize {
  return heap.alloc(size);
}

function at(text: ArrayBuffer): usize {
  return changetype<usize>(text);
}

function add(map: u32): void {
  proxy_add_header_map_value(map, at(key), key.byteLength, at(name), name.byteLength);
}

export function proxy_on_request_headers(context: u32, count: u32, end: u32): u32 {
  if (proxy_get_header_map_value(0, at(path), path.byteLength, at(result), at(result) + 4) == 0) {
    const value = load<usize>(at(result));
    const size = load<u32>(at(result) + 4);
    const line = String.UTF8.encode("assemblyscript: " + String.UTF8.decodeUnsafe(value, size));
    proxy_log(2, at(line), line.byteLength);
    heap.free(value);
  }
  proxy_remove_header_map_value(0, at(length), length.byteLength);
  add(0);
  return 0;
}

export function proxy_on_request_body(context: u32, size: u32, end: u32): u32 {
  if (end != 0) proxy_set_buffer_bytes(0, u32.MAX_VALUE, 0, at(mark), mark.byteLength);
  return 0;
}

export function proxy_on_response_headers(context: u32, count: u32, end: u32): u32 {
  add(2);
  return 0;
}
