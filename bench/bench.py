#!/usr/bin/env python3
"""Measures sidecar proxies side by side; see README.md."""
import argparse
import datetime
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
import peers  # noqa: E402
from harness import Invalid, Skip, prepare, process, targets  # noqa: E402
from harness.scenarios import SCENARIOS  # noqa: E402
from harness.session import wrong_san  # noqa: E402


def summary(vals):
    return {"median": statistics.median(vals), "min": min(vals), "max": max(vals), "values": vals}


def pair_ratios(got, names, keys):
    """Adds "vs_<first peer>" for the first key and "vs_<first peer>:<key>" for all: this peer's figure divided by the first
    peer's in the same round. On a shared machine the ratio moves far less than the two values."""
    base = next((n for n in names if got.get(n)), None)
    for n in names:
        for m in got.get(n, []):
            b = next((x for x in got[base] if x["round"] == m["round"]), {})
            for key in keys:
                if b.get(key) and key in m:
                    m["vs_%s:%s" % (base, key)] = m[key] / b[key]
                    if key == keys[0]:
                        m["vs_" + base] = m[key] / b[key]


def fmt(x):
    return "%.0f" % x if abs(x) >= 1000 else "%.1f" % x if abs(x) >= 10 else "%.2f" % x if abs(x) >= 1 else "%.3f" % x


def table(title, cols, rows):
    out = ["", "## " + title, "| peer | " + " | ".join(cols) + " |", "|---" * (len(cols) + 1) + "|"]
    for name, m in rows.items():
        if isinstance(m, str):
            out.append("| %s | %s |%s" % (name, m, " |" * (len(cols) - 1)))
        else:
            out.append("| %s | %s |" % (name, " | ".join("%s (%s–%s)" % (fmt(m[c]["median"]), fmt(m[c]["min"]), fmt(m[c]["max"])) if c in m else "-" for c in cols)))
    return "\n".join(out)


class Run:
    """One call of this script."""

    def __init__(self, a):
        self.a, self.start, self.direct_round = a, time.time(), None
        self.notes, self.sans, self.results, self.effective = [], {}, {}, {}
        self.names = [n for n in a.peers.split(",") if n]
        self.wasm = os.environ.get("WASM_FILTER") and os.path.abspath(os.environ["WASM_FILTER"])
        if "envoy" in self.names:
            peers.Envoy.bin = prepare.get_envoy(peers.Envoy.bin)
        for n in list(self.names):
            if not peers.ALL[n].bin:
                self.note("%s skipped: %s" % (n, "OUTRIGGER_BIN is not set" if n == "outrigger" else "binary not found"))
                self.names.remove(n)
        flags = {"envoy": "--version", "nginx": "-v", "haproxy": "-v", "outrigger": "--version"}
        self.versions = {n: prepare.version([peers.ALL[n].bin, flags[n]]) for n in self.names if n in flags}
        self.tool = prepare.get_tool()
        # Clients behind interception run as another user, who may not see the cache.
        self.tmp = tempfile.mkdtemp(prefix="meshbench-")
        os.chmod(self.tmp, 0o755)
        self.tool = shutil.copy(self.tool, os.path.join(self.tmp, "meshbench-tool"))
        self.certs = prepare.make_certs(self.tmp)
        own = process.own_network()
        self.cli = peers.Outrigger.beside("outrigger") if own else None
        self.valgrind = shutil.which("valgrind")
        self.control = peers.Outrigger.beside("outrigger-control")

    def note(self, text):
        self.notes.append(text)
        print("note: " + text, file=sys.stderr, flush=True)

    def check_sans(self, scenarios):
        if not any("mtls" in s.topology for s in scenarios):
            return
        for n in self.names:
            try:
                self.sans[n] = wrong_san(self, n)
            except (Invalid, OSError) as e:
                self.sans[n] = "FAILED: %s" % e
        print("wrong server SAN: %s" % self.sans, flush=True)

    def scenario(self, name):
        s = SCENARIOS[name]
        got = {n: [] for n in (["direct"] if s.direct else []) + self.names}
        why = {n: no for n in got if (no := s.lacks(peers.ALL[n], self))}
        for rep in range(min(self.a.reps, s.rounds or self.a.reps)):
            names = [n for n in got if n not in why]
            for group in [names] if s.together and names else [[n] for n in names]:
                if time.time() - self.start > self.a.max_seconds:
                    self.note("out of time before %s %s rep %d" % (name, "+".join(group), rep))
                    continue
                try:
                    results = s.run(self, group) if s.together else {group[0]: s.run(self, group[0])}
                except Skip as e:
                    why |= dict.fromkeys(group, str(e))
                    continue
                except (Invalid, OSError, subprocess.TimeoutExpired, ValueError, KeyError) as e:
                    self.note("%s %s rep %d INVALID: %s" % (name, "+".join(group), rep, ("%s: " % type(e).__name__ if isinstance(e, KeyError) else "") + str(e)[:500]))
                    continue
                for n, r in results.items():
                    got[n].append(dict(r, round=rep))
                    k = next(c for c in s.columns + ["rps"] if c in r)
                    print("%6.0fs %s rep %d %s: %s=%s" % (time.time() - self.start, name, rep, n, k, fmt(r[k])), file=sys.stderr, flush=True)
        pair_ratios(got, self.names, s.ratios)
        numbers = lambda ms: {k: summary([m[k] for m in ms if k in m]) for k in sorted({k for m in ms for k, v in m.items() if isinstance(v, (int, float))})}
        self.results[name] = {n: (dict(numbers(ms), seen=[m["seen"] for m in ms if "seen" in m]) if ms else why.get(n, "no valid result")) for n, ms in got.items()}
        rows = {n: m for n, m in self.results[name].items() if m != "n/a"}
        ratio = ["vs_" + n for n in self.names[:1] if len(rows) > 1]
        print(table("%s: %s — median (min–max) of %d" % (name, s.what, self.a.reps), s.columns[:1] + ratio + s.columns[1:], rows), flush=True)

    def save(self):
        cpuinfo = re.search(r"model name\s*:\s*(.*)", open("/proc/cpuinfo").read())
        meta = {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "kernel": platform.release(),
                "cpu": cpuinfo.group(1) if cpuinfo else platform.machine(), "cpus": len(process.CPUS), "versions": self.versions,
                "args": {k: v for k, v in vars(self.a).items() if k != "json"}, "seconds": round(time.time() - self.start)}
        rows = targets.judge(self.results)
        with open(self.a.json + ".tmp", "w") as f:
            json.dump({"meta": meta, "wrong_server_san": self.sans, "notes": self.notes, "targets": rows, "results": self.results, "effective": self.effective}, f, indent=1)
        os.replace(self.a.json + ".tmp", self.a.json)


def arguments():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--scenarios", default=",".join(SCENARIOS), help="comma list, or part of a name; default: all")
    ap.add_argument("--peers", default="envoy,nginx,haproxy,outrigger", help="comma list; ratios are against the first")
    ap.add_argument("--reps", type=int, default=3, help="rounds, interleaved")
    ap.add_argument("--secs", "--seconds", type=float, default=2, help="length of each measured load")
    ap.add_argument("--conns", type=int, default=32, help="client connections (h1)")
    ap.add_argument("--h2-conns", type=int, default=8)
    ap.add_argument("--h2-streams", type=int, default=10)
    ap.add_argument("--rate", type=int, default=1000, help="requests/s of tail-latency")
    ap.add_argument("--services", type=int, default=1000, help="of the memory scenario")
    ap.add_argument("--nice", type=int, default=0, help="priority of proxies, load and backend (negative needs the right); for a shared machine")
    ap.add_argument("--max-seconds", type=int, default=3600, help="starts no further measurement after this")
    ap.add_argument("--json", help="write all values to this file")
    a = ap.parse_args()
    a.chosen = []
    for part in filter(None, a.scenarios.split(",")):
        named = [part] if part in SCENARIOS else [s for s in SCENARIOS if part in s]
        if not named:
            ap.error("no scenario `%s`; there are %s" % (part, ", ".join(SCENARIOS)))
        a.chosen += named
    return a


def main():
    a = arguments()
    process.NICE[0] = a.nice
    for t, pkg in (("h2load", "nghttp2-client"), ("openssl", "openssl"), ("curl", "curl")):
        prepare.need(t, pkg)
    os.makedirs(prepare.CACHE, exist_ok=True)
    if process.raise_file_limit() < 20000:
        print("note: the open-file limit is low; the memory scenario needs about 20000", file=sys.stderr)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run = Run(a)
    try:
        run.check_sans([SCENARIOS[s] for s in a.chosen])
        for name in a.chosen:
            run.scenario(name)
            if a.json:
                run.save()
    finally:
        process.stop(list(process.STARTED))
        shutil.rmtree(run.tmp, ignore_errors=True)
    print(targets.text(targets.judge(run.results)))
    for n in run.notes:
        print("note: " + n)
    print("took %.0f s" % (time.time() - run.start))


if __name__ == "__main__":
    main()
