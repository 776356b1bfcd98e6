// An example filter in AssemblyScript: gives each request an id, which the application and the client get too.
//
// An id that the client sends is kept when it is a plausible one, unless `trust` is false.
//
//   {"header": "x-request-id", "trust": true}
//
// `proxy.ts` is what a filter needs of the ABI. `proxy_on_*` are the callbacks; what is not exported is not called.
import { CONTINUE, REQUEST_HEADERS, RESPONSE_HEADERS, configuration, header, log, object, setHeader } from "./proxy";
export { proxy_abi_version_0_2_1, proxy_on_memory_allocate } from "./proxy";

@external("wasi_snapshot_preview1", "random_get")
declare function random_get(bytes: usize, size: u32): u32;

const LONGEST = 128;

let name = "x-request-id";
let trust = true;
// Ids of the exchanges in progress, by context.
const ids = new Map<u32, string>();
const random = new StaticArray<u8>(16);

export function proxy_on_configure(root: u32, size: u32): bool {
  const given = object(configuration());
  if (given === null) {
    log(4, "configuration: not a flat JSON object");
    return false;
  }
  const keys = given.keys();
  for (let i = 0; i < keys.length; i++) {
    const value = given.get(keys[i]);
    if (keys[i] == "header" && value.length > 0) name = value.toLowerCase();
    else if (keys[i] == "trust" && (value == "true" || value == "false")) trust = value == "true";
    else {
      log(4, "configuration: `" + keys[i] + "` cannot be `" + value + "`; known are header (a name) and trust (true, false)");
      return false;
    }
  }
  return true;
}

export function proxy_on_request_headers(context: u32, count: u32, end: bool): u32 {
  const sent = header(REQUEST_HEADERS, name);
  const id = trust && sent !== null && plausible(sent) ? sent : fresh();
  ids.set(context, id);
  setHeader(REQUEST_HEADERS, name, id);
  return CONTINUE;
}

export function proxy_on_response_headers(context: u32, count: u32, end: bool): u32 {
  if (ids.has(context)) setHeader(RESPONSE_HEADERS, name, ids.get(context));
  return CONTINUE;
}

export function proxy_on_delete(context: u32): void {
  ids.delete(context);
}

// Letters, digits and a few marks: nothing that could confuse a log.
function plausible(id: string): bool {
  if (id.length == 0 || id.length > LONGEST) return false;
  for (let i = 0; i < id.length; i++) {
    const code = id.charCodeAt(i);
    const letter = (code >= 0x61 && code <= 0x7a) || (code >= 0x41 && code <= 0x5a) || (code >= 0x30 && code <= 0x39);
    if (!letter && "-_.:/+=".indexOf(id.charAt(i)) < 0) return false;
  }
  return true;
}

// 128 random bits in hex.
function fresh(): string {
  random_get(changetype<usize>(random), random.length);
  let id = "";
  for (let i = 0; i < random.length; i++) id += (<u32>random[i] + 0x100).toString(16).substring(1);
  return id;
}
