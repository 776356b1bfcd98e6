"""What is aimed at, in one place. A figure is the median over the rounds, of Outrigger; with `vs`, of its ratio to Envoy in the
same round."""

ENVOY = "vs_envoy:"


class Target:
    def __init__(self, what, scenario, key, limit, unit=""):
        self.what, self.scenario, self.key, self.limit, self.unit = what, scenario, key, limit, unit


TARGETS = [
    Target("h1-single: CPU per request", "h1-single", ENVOY + "cpu_us_req", 0.36, "of Envoy"),
    Target("the same at the application's side, with authorization", "h1-inbound", ENVOY + "cpu_us_req", 0.36, "of Envoy"),
    Target("h1-mtls-pair: CPU per request", "h1-mtls-pair", ENVOY + "cpu_us_req", 0.38, "of Envoy"),
    Target("h1-mtls-pair-post16k: CPU per request", "h1-mtls-pair-post16k", ENVOY + "cpu_us_req", 0.60, "of Envoy"),
    Target("h2-mtls-pair: CPU per request", "h2-mtls-pair", ENVOY + "cpu_us_req", 0.33, "of Envoy"),
    Target("CPU that a WASM filter adds, at saturation", "wasm-added", ENVOY + "added_us", 0.15, "of Envoy"),
    Target("the same at 3,000 requests/s", "wasm-added", ENVOY + "steady_added_us", 0.15, "of Envoy"),
    Target("the same in instructions", "wasm-instructions", ENVOY + "added_instructions", 0.15, "of Envoy"),
    Target("CPU per new mTLS connection, X25519", "conn-rate-x25519", ENVOY + "mtls_conn_ms", 0.80, "of Envoy"),
    Target("CPU per new mTLS connection, X25519MLKEM768", "conn-rate-x25519mlkem768", ENVOY + "mtls_conn_ms", 0.85, "of Envoy"),
    Target("at 1,000 requests/s: CPU per request", "tail-latency", ENVOY + "cpu_us_req", 0.50, "of Envoy"),
    Target("at 1,000 requests/s: added p50", "tail-latency", ENVOY + "added_p50_us", 0.55, "of Envoy"),
    Target("TCP passthrough: CPU per GB, 1 connection", "tcp-passthrough", ENVOY + "cpu_s_gb_1", 0.5, "of Envoy"),
    Target("TCP passthrough: CPU per GB, 8 connections", "tcp-passthrough", ENVOY + "cpu_s_gb_8", 0.5, "of Envoy"),
    Target("TCP passthrough: CPU per 128-byte ping-pong", "tcp-passthrough", ENVOY + "pingpong_us", 0.6, "of Envoy"),
    Target("TCP over an mTLS pair: CPU per GB, 1 connection", "tcp-mtls-pair", ENVOY + "cpu_s_gb_1", 0.8, "of Envoy"),
    Target("TCP over an mTLS pair: CPU per GB, 8 connections", "tcp-mtls-pair", ENVOY + "cpu_s_gb_8", 0.8, "of Envoy"),
    Target("RSS idle, WASM engine linked", "memory", "rss_idle", 15, "MiB"),
    Target("1,000 services known, 10 used: RSS over idle", "mesh-memory", "used_10_mib", 2, "MiB"),
    Target("1,000 services known and used: RSS each", "mesh-memory", "kib_per_used", 20, "KiB"),
    Target("idle connection after one request, plaintext", "memory", "kib_per_conn", 3, "KiB"),
    Target("idle connection after one request, mTLS", "memory", "kib_per_mtls_conn", 10, "KiB"),
    Target("JSON access log of every request, over Errors only", "access-log", "all_vs_errors", 1.10, "×"),
    Target("from exec to ready, certificate included", "start", "ready_ms", 100, "ms"),
    Target("release binary of the proxy, stripped", "start", "binary_mb", 30, "MB"),
    Target("at twice saturation: goodput lost of the peak", "overload", "goodput_lost", 0.10, "of the peak"),
    Target("CPU per request, 2 workers over 1", "workers", "two_vs_one", 1.05, "×"),
    Target("of 4 HTTP/1 connections, most on one of 2 workers", "workers", "h1_most_of_4", 2, "connections"),
    Target("of 4 HTTP/2 connections, most on one of 2 workers", "workers", "h2_most_of_4", 2, "connections"),
] + [Target("requests of the busiest of 2 workers, %d %s connections" % (n, v), "workers", "%s_share_%d" % (k, n), 1.25, "of its share")
     for k, v in (("h1", "HTTP/1"), ("h2", "HTTP/2")) for n in (4, 8, 64)]


def judge(results):
    """Rows: what, target, figure (median, min, max) or None, "met" | "missed" | "not measured"."""
    rows = []
    for t in TARGETS:
        m = results.get(t.scenario, {}).get("outrigger")
        cell = m.get(t.key) if isinstance(m, dict) else None
        verdict = "not measured" if cell is None else "met" if cell["median"] <= t.limit else "missed"
        rows.append({"what": t.what, "scenario": t.scenario, "key": t.key, "target": t.limit, "unit": t.unit, "verdict": verdict,
                     "figure": cell and {k: cell[k] for k in ("median", "min", "max")}})
    return rows


def number(x):
    return "%.0f" % x if abs(x) >= 100 else "%.1f" % x if abs(x) >= 10 else "%.2f" % x


def text(rows):
    """The table, in Markdown."""
    out = ["", "| what | target | figure | |", "|---|---|---|---|"]
    for r in rows:
        f = r["figure"]
        figure = "–" if f is None else "%s (%s–%s)" % tuple(number(f[k]) for k in ("median", "min", "max"))
        out.append("| %s | ≤ %s %s | %s | %s |" % (r["what"], number(r["target"]), r["unit"], figure, r["verdict"]))
    return "\n".join(out)
