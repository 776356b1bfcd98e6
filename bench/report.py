#!/usr/bin/env python3
"""From results files of bench.py: the tables and charts of docs/performance.md.

report.py FILE...           prints the tables
report.py --write FILE...   writes them between the markers in docs/performance.md, and the charts into docs/charts/

Of several files, the scenarios of later ones replace those of earlier ones.
"""
import json
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
from harness import svg, targets  # noqa: E402

PAGE = os.path.join(os.path.dirname(HERE), "docs", "performance.md")
CHARTS = os.path.join(os.path.dirname(HERE), "docs", "charts")
NAMES = {"envoy": "Envoy", "nginx": "nginx", "haproxy": "HAProxy", "outrigger": "Outrigger"}
# title, scenario, key, unit: what is compared with Envoy
COMPARED = [
    ("h1-single", "h1-single", "cpu_us_req", "µs"), ("h1-inbound", "h1-inbound", "cpu_us_req", "µs"),
    ("h1-mtls-pair", "h1-mtls-pair", "cpu_us_req", "µs"), ("h1-mtls-pair-post16k", "h1-mtls-pair-post16k", "cpu_us_req", "µs"),
    ("h2-mtls-pair", "h2-mtls-pair", "cpu_us_req", "µs"), ("WASM filter, added", "wasm-added", "added_us", "µs"), ("WASM filter, at 3,000 requests/s", "wasm-added", "steady_added_us", "µs"),
    ("WASM filter, added instructions", "wasm-instructions", "added_instructions", ""),
    ("mTLS connection, X25519", "conn-rate-x25519", "mtls_conn_ms", "ms"), ("mTLS connection, X25519MLKEM768", "conn-rate-x25519mlkem768", "mtls_conn_ms", "ms"),
    ("1,000 requests/s", "tail-latency", "cpu_us_req", "µs"), ("1,000 requests/s, added p50", "tail-latency", "added_p50_us", "µs"),
    ("TCP, 1 connection", "tcp-passthrough", "cpu_s_gb_1", "s/GB"), ("TCP, 8 connections", "tcp-passthrough", "cpu_s_gb_8", "s/GB"),
    ("TCP, 128-byte ping-pong", "tcp-passthrough", "pingpong_us", "µs"),
    ("TCP mTLS pair, 1 connection", "tcp-mtls-pair", "cpu_s_gb_1", "s/GB"), ("TCP mTLS pair, 8 connections", "tcp-mtls-pair", "cpu_s_gb_8", "s/GB"),
    ("WebSocket message", "websocket", "cpu_us_msg", "µs"), ("gRPC unary call", "grpc-unary", "cpu_us_req", "µs"), ("gRPC stream message", "grpc-stream", "cpu_us_msg", "µs"),
]
MEMORY = [("RSS idle, MiB", "rss_idle"), ("KiB per idle connection, plaintext", "kib_per_conn"), ("KiB per idle connection, mTLS", "kib_per_mtls_conn"),
          ("RSS with 1,000 services × 5 endpoints, MiB", "rss_services"), ("KiB per service", "kib_per_service")]
OURS = [("RSS idle, told by a control plane, MiB", "mesh-memory", "rss_idle"), ("RSS, 1,000 services known, 10 used, MiB", "mesh-memory", "rss_10"),
        ("RSS, all 1,000 used, MiB", "mesh-memory", "rss_all"), ("KiB per used service", "mesh-memory", "kib_per_used"),
        ("exec to ready, ms", "start", "ready_ms"), ("binary, MB", "start", "binary_mb"), ("access log of all over errors", "access-log", "all_vs_errors"),
        ("at twice saturation: goodput of the peak", "overload", "goodput"),
        ("two workers over one, CPU per request", "workers", "two_vs_one")] + [
        ("requests of the busier of two workers, %d %s connections" % (n, v), "workers", "%s_share_%d" % (k, n)) for k, v in (("h1", "HTTP/1"), ("h2", "HTTP/2")) for n in (4, 8, 64)]


def cell(results, scenario, peer, key):
    m = results.get(scenario, {}).get(peer)
    return m.get(key) if isinstance(m, dict) else None


def spread(c, f=targets.number):
    return "–" if not c else "%s (%s–%s)" % tuple(f(c[k]) for k in ("median", "min", "max"))


def compared(results):
    out = ["| | Envoy | nginx / Envoy | HAProxy / Envoy | Outrigger | Outrigger / Envoy |", "|---|---|---|---|---|---|"]
    for title, scenario, key, unit in COMPARED:
        if scenario in results:
            ratio = [spread(cell(results, scenario, peer, "vs_envoy:" + key), lambda x: "%.2f" % x) for peer in ("nginx", "haproxy", "outrigger")]
            own = [spread(cell(results, scenario, peer, key)) for peer in ("envoy", "outrigger")]
            out.append("| %s | %s | %s | %s | %s | %s |" % (title + (", " + unit if unit else ""), own[0], ratio[0], ratio[1], own[1], ratio[2]))
    return out


def tables(results, meta):
    a = meta["args"]
    versions = ", ".join(short(n, v) for n, v in meta["versions"].items() if n != "outrigger")
    out = ["%s rounds of %s s, %s CPUs (%s), Linux %s; %s; median (min–max). %s" % (
        a["reps"], targets.number(a["secs"]), meta["cpus"], meta["cpu"], meta["kernel"].split("-")[0], versions, meta["date"][:10]), "", "### Targets"]
    out += targets.text(targets.judge(results)).split("\n")
    out += ["", "### CPU", "", "![CPU relative to Envoy](charts/cpu.svg)", ""] + compared(results)
    if "memory" in results:
        out += ["", "### Memory", "", "![Memory](charts/memory.svg)", "", "| | " + " | ".join(NAMES.values()) + " |", "|---" * (len(NAMES) + 1) + "|"]
        out += ["| %s | %s |" % (title, " | ".join(spread(cell(results, "memory", p, key)) for p in NAMES)) for title, key in MEMORY]
    rows = [(title, cell(results, scenario, "outrigger", key)) for title, scenario, key in OURS]
    if any(c for _, c in rows):
        out += ["", "### Outrigger alone", "", "| | |", "|---|---|"] + ["| %s | %s |" % (title, spread(c)) for title, c in rows if c]
    return "\n".join(out) + "\n"


def short(name, text):
    digits = next((w for w in text.replace("/", " ").split() if w[0].isdigit() and "." in w), "")
    return "%s %s" % (NAMES.get(name, name), digits.split("-")[0])


def charts(results):
    limits = {(t.scenario, t.key): t.limit for t in targets.TARGETS}
    median = lambda c: c["median"] if c else None
    groups = []
    for title, scenario, key, _ in COMPARED:
        bars = {p: median(cell(results, scenario, p, "vs_envoy:" + key)) for p in ("nginx", "haproxy", "outrigger")}
        if any(v is not None for v in bars.values()):
            groups.append((title, dict(bars, target=limits.get((scenario, "vs_envoy:" + key)))))
    files = {}
    if groups:
        files["cpu.svg"] = svg.chart("CPU relative to Envoy, in the same round", groups, "Envoy = 1; less is better", NAMES, top=1.6, mark=1)
    rows = [(title, {p: median(cell(results, "memory", p, key)) for p in NAMES}, limits.get(("memory", key))) for title, key in MEMORY[:3]]
    if any(v for _, bars, _ in rows for v in bars.values()):
        files["memory.svg"] = svg.chart("Memory", [(t.split(",")[0].replace(" per idle connection", "/connection") + t.partition(",")[2], dict(b, target=limit)) for t, b, limit in rows],
                                        "RSS idle in MiB, per idle connection in KiB; less is better", NAMES)
    return files


def main(args):
    write = args[:1] == ["--write"]
    results, meta = {}, None
    for name in args[write:]:
        with open(name) as f:
            data = json.load(f)
        meta = data["meta"]
        results.update(data["results"])
    if not meta:
        sys.exit(__doc__)
    text = tables(results, meta)
    if not write:
        print(text)
        return
    page = open(PAGE).read()
    begin, end = "<!-- figures: written by bench/report.py -->\n", "<!-- figures end -->"
    head, rest = page.split(begin, 1)
    with open(PAGE, "w") as f:
        f.write(head + begin + "\n" + text + "\n" + end + rest.split(end, 1)[1])
    os.makedirs(CHARTS, exist_ok=True)
    for name, content in charts(results).items():
        with open(os.path.join(CHARTS, name), "w") as f:
            f.write(content)


main(sys.argv[1:])
