// {{name}}: greets in a response header, and answers a path itself.
//
// Its configuration: {"greeting": "hello"}
//
// `proxy.ts` is what a filter needs of the ABI. `proxy_on_*` are the callbacks; what is not exported is not called.
import { CONTINUE, PAUSE, REQUEST_HEADERS, RESPONSE_HEADERS } from "./proxy";
import { configuration, header, log, object, respond, setHeader } from "./proxy";
export { proxy_abi_version_0_2_1, proxy_on_memory_allocate } from "./proxy";

let greeting = "";

// Once in each worker of a proxy. Returning false refuses the configuration: the one before goes on serving.
export function proxy_on_configure(root: u32, size: u32): bool {
  const given = object(configuration());
  if (given === null) {
    log(4, "configuration: not a flat JSON object");
    return false;
  }
  const keys = given.keys();
  for (let i = 0; i < keys.length; i++) {
    if (keys[i] != "greeting") {
      log(4, "configuration: unknown field `" + keys[i] + "`, expected `greeting`");
      return false;
    }
    greeting = given.get(keys[i]);
  }
  return true;
}

export function proxy_on_request_headers(context: u32, count: u32, end: bool): u32 {
  setHeader(REQUEST_HEADERS, "x-seen-by", "{{name}}");
  if (header(REQUEST_HEADERS, ":path") == "/forbidden") {
    log(2, "refused /forbidden");
    respond(403, "no entry\n");
    return PAUSE;
  }
  return CONTINUE;
}

export function proxy_on_response_headers(context: u32, count: u32, end: bool): u32 {
  if (greeting.length > 0) setHeader(RESPONSE_HEADERS, "x-greeting", greeting);
  return CONTINUE;
}
