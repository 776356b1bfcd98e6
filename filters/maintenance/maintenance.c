// An example filter in C, with no SDK and no library: answers requests for parts of a site that are being worked on.
//
// Its configuration is a text, a line each (`configuration: |` in a WasmFilter):
//
//   status 503                     the response's status; 503 when not said
//   retry-after 120                seconds; no such header when not said
//   message Back in two minutes.   the response's body
//   path /checkout                 a path that is closed, with what is below it; again for more
//   allow x-staff                  requests with this header pass
//
// Paths are compared byte by byte, as the client sent them: this tells people that they have to wait, and keeps nobody out.
//
// `filters/build.sh` (or `outrigger filter build`) compiles it freestanding with clang.
typedef unsigned int u32;

#define IMPORT(name) __attribute__((import_module("env"), import_name(#name))) extern u32 name
#define EXPORT(name) __attribute__((export_name(#name)))

IMPORT(proxy_log)(u32 level, const char *text, u32 size);
IMPORT(proxy_get_header_map_value)(u32 map, const char *key, u32 key_size, char **value, u32 *size);
IMPORT(proxy_get_buffer_bytes)(u32 buffer, u32 start, u32 length, char **bytes, u32 *size);
IMPORT(proxy_send_local_response)(u32 status, const char *details, u32 details_size, const char *body, u32 body_size,
                                  const char *headers, u32 headers_size, int grpc);

enum { OK = 0, ERROR = 4, REQUEST_HEADERS = 0, PLUGIN_CONFIGURATION = 7, CONTINUE = 0, PAUSE = 1 };

typedef struct {
    const char *at;
    u32 size;
} text;

enum { MOST_PATHS = 64 };

static struct {
    char bytes[16384];
    u32 status;
    text retry_after, message, allow, paths[MOST_PATHS];
    u32 count;
} site;

// What the host gives during one callback; each callback begins with all of it free.
static char heap[65536];
static u32 top;

EXPORT(proxy_abi_version_0_2_1) void version(void) {}

EXPORT(proxy_on_memory_allocate) void *allocate(u32 size) {
    if (size > sizeof heap - top) return 0;
    char *at = heap + top;
    top += (size + 15) & ~15u;
    if (top > sizeof heap) top = sizeof heap;
    return at;
}

static int equal(text a, const char *b, u32 size) {
    if (a.size != size) return 0;
    for (u32 i = 0; i < size; i++) {
        if (a.at[i] != b[i]) return 0;
    }
    return 1;
}

#define IS(value, word) equal(value, word, sizeof word - 1)

static u32 refuse(const char *why, u32 size) {
    proxy_log(ERROR, why, size);
    return 0;
}

#define REFUSE(why) refuse("configuration: " why, sizeof "configuration: " why - 1)

// A number of at most 9 digits; 0: it is none.
static u32 number(text value) {
    u32 n = 0;
    if (value.size > 9) return 0;
    for (u32 i = 0; i < value.size; i++) {
        if (value.at[i] < '0' || value.at[i] > '9') return 0;
        n = n * 10 + (u32)(value.at[i] - '0');
    }
    return n;
}

// One line. 0: refused, and said.
static u32 setting(text line) {
    u32 space = 0;
    while (space < line.size && line.at[space] != ' ') space++;
    text key = {line.at, space}, value = {line.at + space, line.size - space};
    while (value.size > 0 && *value.at == ' ') value.at++, value.size--;
    if (IS(key, "status")) {
        site.status = number(value);
        return site.status >= 200 && site.status <= 599 ? 1 : REFUSE("status: a number from 200 to 599");
    }
    if (IS(key, "retry-after")) {
        site.retry_after = value;
        return number(value) > 0 ? 1 : REFUSE("retry-after: seconds");
    }
    if (IS(key, "message")) {
        site.message = value;
        return 1;
    }
    if (IS(key, "allow")) {
        site.allow = value;
        return value.size > 0 ? 1 : REFUSE("allow: the name of a header");
    }
    if (IS(key, "path")) {
        if (value.size == 0 || *value.at != '/') return REFUSE("path: begins with /");
        if (site.count == MOST_PATHS) return REFUSE("path: at most 64");
        while (value.size > 1 && value.at[value.size - 1] == '/') value.size--;
        site.paths[site.count++] = value;
        return 1;
    }
    return REFUSE("known are status, retry-after, message, path, allow, one in each line");
}

EXPORT(proxy_on_configure) u32 configure(u32 root, u32 size) {
    char *given;
    top = 0;
    site.status = 503;
    if (size == 0 || proxy_get_buffer_bytes(PLUGIN_CONFIGURATION, 0, size, &given, &size) != OK || size == 0) {
        return REFUSE("there is none, so nothing would be closed");
    }
    if (size > sizeof site.bytes) return REFUSE("longer than 16384 bytes");
    for (u32 i = 0; i < size; i++) site.bytes[i] = given[i];
    for (u32 begin = 0, end; begin < size; begin = end + 1) {
        for (end = begin; end < size && site.bytes[end] != '\n'; end++) {}
        text line = {site.bytes + begin, end - begin};
        while (line.size > 0 && (*line.at == ' ')) line.at++, line.size--;
        while (line.size > 0 && (line.at[line.size - 1] == ' ' || line.at[line.size - 1] == '\r')) line.size--;
        if (line.size > 0 && !setting(line)) return 0;
    }
    return site.count > 0 ? 1 : REFUSE("no path: nothing would be closed");
}

// The path is the closed one, or below it.
static int below(text path, text closed) {
    if (path.size < closed.size || !equal((text){path.at, closed.size}, closed.at, closed.size)) return 0;
    if (path.size == closed.size || closed.size == 1) return 1;
    char next = path.at[closed.size];
    return next == '/' || next == '?';
}

static u32 header(const char *name, u32 size, text *value) {
    char *at = 0;
    value->size = 0;
    u32 status = proxy_get_header_map_value(REQUEST_HEADERS, name, size, &at, &value->size);
    value->at = at;
    return status == OK;
}

// Pairs as the ABI serializes them: count, both lengths of each, then each text with a NUL behind it.
static u32 retry_after(char *out) {
    static const char name[] = "retry-after";
    u32 words[3] = {1, sizeof name - 1, site.retry_after.size}, at = 0;
    for (; at < sizeof words; at++) out[at] = ((char *)words)[at];
    for (u32 i = 0; i < sizeof name; i++) out[at++] = name[i];
    for (u32 i = 0; i < site.retry_after.size; i++) out[at++] = site.retry_after.at[i];
    out[at++] = 0;
    return at;
}

EXPORT(proxy_on_request_headers) u32 request_headers(u32 context, u32 count, u32 end) {
    text path, staff;
    char headers[64];
    top = 0;
    if (!header(":path", 5, &path)) return CONTINUE;
    for (u32 i = 0; i < site.count; i++) {
        if (!below(path, site.paths[i])) continue;
        if (site.allow.size > 0 && header(site.allow.at, site.allow.size, &staff)) return CONTINUE;
        u32 size = site.retry_after.size > 0 ? retry_after(headers) : 0;
        proxy_send_local_response(site.status, 0, 0, site.message.at, site.message.size, headers, size, -1);
        return PAUSE;
    }
    return CONTINUE;
}
