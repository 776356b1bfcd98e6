// A filter in C, with no SDK: freestanding, built by tests/proxy-wasm/build.sh.
typedef unsigned int u32;

#define IMPORT(name) __attribute__((import_module("env"), import_name(#name))) extern u32 name
#define EXPORT(name) __attribute__((export_name(#name)))

IMPORT(proxy_log)(u32 level, const char *text, u32 size);
IMPORT(proxy_get_header_map_value)(u32 map, const char *key, u32 key_size, char **value, u32 *size);
IMPORT(proxy_add_header_map_value)(u32 map, const char *key, u32 key_size, const char *value, u32 size);
IMPORT(proxy_remove_header_map_value)(u32 map, const char *key, u32 key_size);
IMPORT(proxy_set_buffer_bytes)(u32 buffer, u32 start, u32 length, const char *bytes, u32 size);

static char heap[65536];
static u32 top;

EXPORT(proxy_abi_version_0_2_1) void version(void) {}

EXPORT(proxy_on_memory_allocate) void *allocate(u32 size) {
    if (top + size > sizeof heap) top = 0;
    char *at = heap + top;
    top += (size + 15) & ~15u;
    return at;
}

EXPORT(proxy_on_request_headers) u32 request_headers(u32 context, u32 count, u32 end) {
    char *path;
    static char line[256] = "c: ";
    u32 size;
    if (proxy_get_header_map_value(0, ":path", 5, &path, &size) == 0 && size < 250) {
        for (u32 i = 0; i < size; i++) line[3 + i] = path[i];
        proxy_log(2, line, 3 + size);
    }
    proxy_remove_header_map_value(0, "content-length", 14);
    proxy_add_header_map_value(0, "x-guest", 7, "c", 1);
    return 0;
}

EXPORT(proxy_on_request_body) u32 request_body(u32 context, u32 size, u32 end) {
    if (end) proxy_set_buffer_bytes(0, ~0u, 0, "<c>", 3);
    return 0;
}

EXPORT(proxy_on_response_headers) u32 response_headers(u32 context, u32 count, u32 end) {
    proxy_add_header_map_value(2, "x-guest", 7, "c", 1);
    return 0;
}
