#!/usr/bin/env python3
"""The tables of docs/performance.md from results files of bench.py: report.py FILE..."""
import json
import sys

PEERS = ("envoy", "nginx", "haproxy", "outrigger")
MEMORY = (("RSS idle, MiB", "rss_idle"), ("RSS with 1,000 services, MiB", "rss_services"),
          ("KiB per service", "kib_per_service"), ("RSS, 5,000 idle connections, MiB", "rss_5000conn"), ("KiB per idle connection", "kib_per_conn"))
FIRST = {"conn-rate": "mtls_conn_ms", "tail-latency": "added_p50_us"}


def num(x):
    return "%.0f" % x if abs(x) >= 100 else "%.1f" % x if abs(x) >= 10 else "%.2f" % x


def spread(cell, f=num):
    return "%s (%s–%s)" % tuple(f(cell[k]) for k in ("median", "min", "max"))


def column(rows, peer, key, f=num):
    m = rows.get(peer)
    return spread(m[key], f) if isinstance(m, dict) and key in m else "–"


def main(files):
    merged, meta = {}, None
    for name in files:
        with open(name) as f:
            data = json.load(f)
        meta = meta or data["meta"]
        merged.update(data["results"])
    print("%s rounds of %s s, %s CPUs; median (min–max)\n" % (meta["args"]["reps"], meta["args"]["secs"], meta["cpus"]))
    print("| scenario | Envoy, µs (conn-rate: ms) | nginx / Envoy | HAProxy / Envoy | Outrigger, µs | Outrigger / Envoy |\n|---|---|---|---|---|---|")
    for name, rows in merged.items():
        if name != "memory":
            key = FIRST.get(name, "cpu_us_req")
            ratio = [column(rows, peer, "vs_envoy", lambda x: "%.2f" % x) for peer in ("nginx", "haproxy", "outrigger")]
            print("| %s | %s | %s | %s | %s | %s |" % (name, column(rows, "envoy", key), ratio[0], ratio[1], column(rows, "outrigger", key), ratio[2]))
    if "memory" in merged:
        print("\n| memory | Envoy | nginx | HAProxy | Outrigger |\n|---|---|---|---|---|")
        for title, key in MEMORY:
            print("| %s | %s |" % (title, " | ".join(column(merged["memory"], peer, key) for peer in PEERS)))


main(sys.argv[1:])
