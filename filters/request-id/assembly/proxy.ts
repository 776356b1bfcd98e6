// What a filter in AssemblyScript needs of the Proxy-Wasm ABI 0.2.1, in one file: no SDK. Texts are UTF-8 on the other side.

@external("env", "proxy_log")
declare function host_log(level: u32, text: usize, size: u32): u32;
@external("env", "proxy_get_header_map_value")
declare function host_get_header(map: u32, key: usize, keySize: u32, value: usize, size: usize): u32;
@external("env", "proxy_replace_header_map_value")
declare function host_set_header(map: u32, key: usize, keySize: u32, value: usize, size: u32): u32;
@external("env", "proxy_add_header_map_value")
declare function host_add_header(map: u32, key: usize, keySize: u32, value: usize, size: u32): u32;
@external("env", "proxy_remove_header_map_value")
declare function host_remove_header(map: u32, key: usize, keySize: u32): u32;
@external("env", "proxy_get_buffer_bytes")
declare function host_get_buffer(buffer: u32, start: u32, length: u32, bytes: usize, size: usize): u32;
@external("env", "proxy_send_local_response")
declare function host_respond(
  status: u32, details: usize, detailsSize: u32, body: usize, bodySize: u32, headers: usize, headersSize: u32, grpc: i32
): u32;

export const CONTINUE: u32 = 0;
export const PAUSE: u32 = 1;

export const REQUEST_HEADERS: u32 = 0;
export const RESPONSE_HEADERS: u32 = 2;

const PLUGIN_CONFIGURATION: u32 = 7;

// Where the host leaves an address and a length.
const answer = new StaticArray<u32>(2);

// The host asks the module for its version, and for memory to give it values in.
export function proxy_abi_version_0_2_1(): void {}

export function proxy_on_memory_allocate(size: u32): usize {
  return heap.alloc(size);
}

// Called when the program cannot go on (`--use abort=`): says why, and traps.
export function fail(message: string | null, file: string | null, line: u32, column: u32): void {
  const text = message === null ? "abort" : message;
  const place = file === null ? "" : file;
  log(4, text + " at " + place + ":" + line.toString());
  unreachable();
}

function at(text: ArrayBuffer): usize {
  return changetype<usize>(text);
}

// The text that the host left; its memory is given back.
function take(): string {
  const begin = <usize>answer[0];
  const text = String.UTF8.decodeUnsafe(begin, answer[1]);
  if (begin != 0) heap.free(begin);
  return text;
}

// 0 trace, 1 debug, 2 info, 3 warn, 4 error
export function log(level: u32, text: string): void {
  const bytes = String.UTF8.encode(text);
  host_log(level, at(bytes), bytes.byteLength);
}

export function header(map: u32, name: string): string | null {
  const key = String.UTF8.encode(name);
  const found = changetype<usize>(answer);
  return host_get_header(map, at(key), key.byteLength, found, found + 4) == 0 ? take() : null;
}

export function setHeader(map: u32, name: string, value: string): void {
  const key = String.UTF8.encode(name);
  const bytes = String.UTF8.encode(value);
  host_set_header(map, at(key), key.byteLength, at(bytes), bytes.byteLength);
}

export function addHeader(map: u32, name: string, value: string): void {
  const key = String.UTF8.encode(name);
  const bytes = String.UTF8.encode(value);
  host_add_header(map, at(key), key.byteLength, at(bytes), bytes.byteLength);
}

export function removeHeader(map: u32, name: string): void {
  const key = String.UTF8.encode(name);
  host_remove_header(map, at(key), key.byteLength);
}

// Answers the request; return PAUSE after it.
export function respond(status: u32, body: string): void {
  const bytes = String.UTF8.encode(body);
  host_respond(status, 0, 0, at(bytes), bytes.byteLength, 0, 0, -1);
}

// The filter's configuration, in `proxy_on_configure`.
export function configuration(): string {
  const found = changetype<usize>(answer);
  return host_get_buffer(PLUGIN_CONFIGURATION, 0, u32.MAX_VALUE, found, found + 4) == 0 ? take() : "";
}

// Reads a flat JSON object, as in {"header": "x-request-id", "length": 16, "trust": true}; every value as a text. Null: it is none.
export function object(text: string): Map<string, string> | null {
  const all = new Map<string, string>();
  if (text.trim().length == 0) return all;
  const reader = new Reader(text);
  if (!reader.eat("{")) return null;
  if (!reader.eat("}")) {
    do {
      const key = reader.quoted();
      if (key === null || !reader.eat(":")) return null;
      const value = reader.peek() == "\"" ? reader.quoted() : reader.word();
      if (value === null) return null;
      all.set(key, value);
    } while (reader.eat(","));
    if (!reader.eat("}")) return null;
  }
  return reader.peek() == "" ? all : null;
}

class Reader {
  position: i32 = 0;

  constructor(private text: string) {}

  // The next character that is no space; "" at the end.
  peek(): string {
    while (this.position < this.text.length && this.text.charCodeAt(this.position) <= 32) this.position++;
    return this.text.charAt(this.position);
  }

  eat(wanted: string): bool {
    if (this.peek() != wanted) return false;
    this.position++;
    return true;
  }

  quoted(): string | null {
    if (!this.eat("\"")) return null;
    let out = "";
    while (this.position < this.text.length) {
      const next = this.text.charAt(this.position++);
      if (next == "\"") return out;
      if (next != "\\") {
        out += next;
        continue;
      }
      const escaped = this.text.charAt(this.position++);
      if (escaped == "n") out += "\n";
      else if (escaped == "\"" || escaped == "\\" || escaped == "/") out += escaped;
      else return null;
    }
    return null;
  }

  // A number, true, false or null.
  word(): string | null {
    this.peek();
    const begin = this.position;
    while (this.position < this.text.length && ",} \t\r\n".indexOf(this.text.charAt(this.position)) < 0) this.position++;
    return begin == this.position ? null : this.text.substring(begin, this.position);
  }
}
