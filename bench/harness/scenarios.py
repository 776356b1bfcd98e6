"""What is measured: each scenario is f(run, peer's name) -> metrics of one round; or, where peers are measured in turn within a round,
f(run, names) -> metrics of each."""
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

from . import Invalid, Skip
from .check import Counters
from .footprint import memory, mesh_memory, settled, start
from .instructions import wasm_instructions
from .process import cpu, mem_mib
from .session import Session


class Scenario:
    """How a scenario is run and shown.

    columns: of the printed table, the first one is what ratios are made of; ratios: further keys to make ratios of;
    direct: "direct" takes part; only: the peers that can; topology and group: what a peer has to support; rounds: at most so many,
    where one is as good as five; together: all peers are run at once.
    """

    def __init__(self, what, run, topology, columns, ratios=(), direct=False, only=None, group=None, needs=(), rounds=None, together=False):
        self.what, self.run, self.topology, self.columns = what, run, topology, columns
        self.ratios, self.direct, self.only, self.group, self.needs = [columns[0]] + list(ratios), direct, only, group, needs
        self.rounds, self.together = rounds, together

    def lacks(self, peer, run):
        """Why this peer cannot take part."""
        if peer.name == "direct":
            return None
        if self.only and peer.name not in self.only:
            return "n/a"
        for need in self.needs:
            if not getattr(run, need):
                return "skipped: " + {"wasm": "WASM_FILTER is not set", "cli": "no `outrigger` beside the proxy, or not root", "control": "no outrigger-control beside the proxy", "valgrind": "valgrind is not installed"}[need]
        return peer.supports(self.topology) or (self.group and peer.has_group(self.group))


WARM = 0.7
# Seconds of a turn with or without a filter, and of all of them, for each second of a measurement.
TURN, STEADY_TURN, PAIRS = 0.04, 0.1, 4


def closed(topology, **options):
    post = options.pop("post", 0)

    def f(run, name):
        with Session(run, name, topology, **options) as s:
            s.tool("closed", WARM, run.a.conns, post=post)  # fills the upstream pool
            return s.measured(lambda: s.tool("closed", run.a.secs, run.a.conns, post=post))
    return f


def h2(run, name):
    with Session(run, name, "h2-mtls-pair") as s:
        s.h2load(WARM, run.a.h2_conns, run.a.h2_streams)
        return s.measured(lambda: s.h2load(run.a.secs, run.a.h2_conns, run.a.h2_streams))


def grpc(kind):
    def f(run, name):
        with Session(run, name, "h2-mtls-pair") as s:
            load = lambda secs: s.tool("grpc", secs, run.a.h2_conns, streams=run.a.h2_streams, kind=kind)
            load(WARM)
            r = s.measured(lambda: load(run.a.secs))
        r["cpu_us_msg"] = r["cpu_s"] / r["load"]["messages"] * 1e6 if "cpu_s" in r else None
        r["messages_per_s"] = r["load"]["messages"] / r["secs"]
        return {k: v for k, v in r.items() if v is not None}
    return f


def websocket(run, name):
    with Session(run, name, "h1-mtls-pair", upgrades=True) as s:
        load = lambda secs: s.tool("websocket", secs, run.a.conns)
        load(WARM)
        r = s.measured(lambda: load(run.a.secs), kind="websocket", count=lambda got: got["conns"])
    r["cpu_us_msg"] = r.pop("cpu_us_req", 0)
    r["messages_per_s"] = r.pop("rps")
    return r


def in_turn(times, sides):
    """Each side of each subject so many times, {subject: {side: action}} -> {subject: {side: results}}. One subject after the other, and a subject's
    sides this way and that: each of them follows itself, or another subject, as often as the others do."""
    got = {subject: {side: [] for side in actions} for subject, actions in sides.items()}
    for turn in range(times):
        for subject, actions in sides.items():
            for side in list(actions)[::1 if turn % 2 else -1]:
                got[subject][side].append(actions[side]())
    return got


def middle(values):
    """The mean of the middle half: as little moved by the machine's bad moments as the median, and by what is left half as much."""
    values = sorted(values)
    quarter = len(values) // 4
    return statistics.fmean(values[quarter:len(values) - quarter])


def wasm_added(run, names):
    """All proxies run side by side, with and without the filter, and are measured in turn: what the machine does meanwhile hits them all. Most
    of that lasts longer than a turn, so many short turns say more than a few long ones; what a filter adds is the middle of their differences.
    At saturation, and at a rate that all keep up with: at saturation the slower of two proxies also has to wake its peers more often, which
    have less to do."""
    topologies = {"without": "h1-single", "with": "h1-wasm"}
    with ExitStack() as stack:
        loads = {n: {side: stack.enter_context(Session(run, n, topology)).turns(run.a.conns) for side, topology in topologies.items()} for n in names}
        every = [load for sides in loads.values() for load in sides.values()]
        for load in every:
            load.turn(WARM)
        results = {n: {} for n in names}
        for kind, secs, rate in (("", TURN, 0), ("steady_", STEADY_TURN, STEADY)):
            turns = {n: {side: partial(load.turn, secs, rate) for side, load in sides.items()} for n, sides in loads.items()}
            for n, got in in_turn(round(run.a.secs * PAIRS / secs), turns).items():
                results[n] |= {kind + "added_us": middle(a - b for a, b in zip(got["with"], got["without"])),
                               kind + "with_us": middle(got["with"]), kind + "without_us": middle(got["without"])}
        for load in every:
            load.check()
    return results


def conn_rate(group):
    def f(run, name):
        def load(s, port, **more):
            go = lambda secs: s.tool("handshake", secs, 1, port=port, threads=8, **more)
            go(WARM / 2)
            return s.measured(lambda: go(run.a.secs), ("inbound", "proxy"))
        with Session(run, name, "h1-mtls-pair", group=group) as s:
            t = load(s, "mtls", **s.identity())
        r = {"mtls_conn_ms": t["cpu_us_req"] / 1e3, "mtls_conn_per_s": t["rps"], "proxy_core_util": t["proxy_core_util"], "others_on_core": t["others_on_core"]}
        if group == "x25519":
            with Session(run, name, "h1-inbound") as s:
                q = load(s, "client")
            r.update({"plain_conn_ms": q["cpu_us_req"] / 1e3, "handshake_net_ms": r["mtls_conn_ms"] - q["cpu_us_req"] / 1e3})
        return r
    return f


def tail(run, name):
    with Session(run, name, "h1-mtls-pair") as s:
        secs = run.a.secs * 1.5
        r = s.measured(lambda: s.tool("openloop", secs, run.a.conns, rate=run.a.rate, warmup=0.5) | {"secs": secs + 0.5})
    r.update({k: r["load"][k] for k in ("p50_us", "p90_us", "p99_us", "p999_us")})
    d = r if name == "direct" else run.direct_round
    if name == "direct":
        run.direct_round = dict(r)
    if d:
        r.update({"added_" + k: r[k] - d[k] for k in ("p50_us", "p99_us")})
    return r


def tcp(topology):
    """Seconds of CPU per GB (10^9 bytes) with 1 and 8 connections, and microseconds per 128-byte ping-pong."""
    def f(run, name):
        r = {}
        with Session(run, name, topology) as s:
            s.tool("bulk", WARM / 2, 1)
            for conns in (1, 8):
                got = s.measured(lambda: s.tool("bulk", run.a.secs * 0.75, conns), kind="tcp", count=lambda _: conns)
                if "cpu_s" in got:
                    r["cpu_s_gb_%d" % conns] = got["cpu_s"] / got["load"]["total"] * 1e9
                r["gbit_per_s_%d" % conns] = got["rps"] * 8 / 1e9
            got = s.measured(lambda: s.tool("pingpong", run.a.secs * 0.75, 1), kind="tcp", count=lambda _: 1)
            r["pingpong_us"] = got.get("cpu_us_req", 0.0)
            r["pingpong_per_s"] = got["rps"]
        return r
    return f


def side_by_side(run, sides):
    """CPU per request at saturation of each of these sessions, in turn: {side: microseconds}."""
    for s in sides.values():
        s.tool("closed", WARM, run.a.conns)
    cost = lambda s: s.measured(lambda: s.tool("closed", run.a.secs / 2, run.a.conns))["cpu_us_req"]
    got = in_turn(4, {"": {side: partial(cost, s) for side, s in sides.items()}})[""]
    return {side: statistics.mean(values) for side, values in got.items()}


def access_log(run, name):
    """Both modes side by side, in turn."""
    with Session(run, name, "h1-single", access_log=True) as every, Session(run, name, "h1-single") as errors:
        us = side_by_side(run, {"all": every, "errors": errors})
        lines = sum(1 for line in open(every.procs[0].log, "rb") if line.startswith(b"{") and b"/svc-0/" in line)
        dropped = every.peer.ask("proxy", "/stats")["droppedLogLines"]
    if lines + dropped == 0:
        raise Skip("no line was logged")
    return {"all_vs_errors": us["all"] / us["errors"], "all_us": us["all"], "errors_us": us["errors"], "lines": lines, "dropped": dropped}


def workers(run, name):
    """One and two workers, not pinned, in turn; then how evenly two share connections."""
    r = {}
    with Session(run, name, "h1-single", spread=True, workers=1) as one, Session(run, name, "h1-single", spread=True, workers=2) as two:
        us = side_by_side(run, {1: one, 2: two})
        for conns in (4, 8, 64):
            r["h1_share_%d" % conns], most = share(two, lambda: two.tool("closed", max(0.5, run.a.secs / 4), conns), conns)
            if conns == 4:
                r["h1_most_of_4"] = most
    with Session(run, name, "h2-mtls-pair", spread=True, workers=2) as two:
        for conns in (4, 8, 64):
            two.h2load(WARM / 2, conns, 10)
            r["h2_share_%d" % conns], most = share(two, lambda: two.h2load(max(1, run.a.secs / 4), conns, 10), conns)
            if conns == 4:
                r["h2_most_of_4"] = most
    return {"two_vs_one": us[2] / us[1], "one_us": us[1], "two_us": us[2], **r}


def share(s, load, conns):
    """The busiest worker's requests over its fair share, at the proxy that clients connect to; and how many of the connections
    one worker had, while the load ran."""
    role = next(role for role, (_, direction) in s.peer.admin.items() if direction == "outbound")
    counters, most = Counters(s.peer, [role]), None
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(load)
        while not running.done():
            held = [worker["outbound"] for worker in counters.read()[role]["workers"]]
            if sum(held) == conns:
                most = max(held)
            time.sleep(0.02)
        running.result()
    if most is None:
        raise Invalid("the %d connections were never seen together" % conns)
    took = counters.workers(role)
    return max(took) / (sum(took) / len(took)), most


def overload(run, name):
    """Saturation first, then twice that rate, on many connections: what still gets done, what is refused, and whether who looks
    after the proxy is answered meanwhile. A request for which no connection is free is not sent: its client is waiting. Their share is
    told. The load warms up for longer than it takes to connect everywhere and to find out how much is to be refused."""
    secs = max(3.0, run.a.secs * 2)
    with Session(run, name, "h1-mtls-pair") as s:
        role = next(role for role, (_, direction) in s.peer.admin.items() if direction == "outbound")
        s.tool("closed", WARM, run.a.conns)
        peak = s.measured(lambda: s.tool("closed", run.a.secs, run.a.conns))
        idle, waits, most = settled(s.procs)[2], [], 0.0
        c0, refused0 = cpu(s.procs)[0], refusals(s, role)
        load = lambda: s.tool("openloop", secs, OVERLOAD_CONNS, rate=2 * peak["rps"], warmup=3.0, shed=1)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(load)
            while not running.done():
                began = time.time()
                s.peer.ask(role, "/stats")
                waits.append(time.time() - began)
                most = max(most, mem_mib(s.procs)[2])
                time.sleep(0.1)
            got = running.result()
        used, refused = cpu(s.procs)[0] - c0, refusals(s, role) - refused0
        offered = got["counted"] + got["refused"] + got["unsent"]
    # All answers, those of the warm-up included, took `used`; one that was served takes what it took before.
    served = got["total"] - refused
    goodput = got["counted"] / secs / peak["rps"]
    return {"goodput_lost": 1 - goodput, "goodput": goodput, "peak_per_s": peak["rps"], "offered_of_peak": offered / secs / peak["rps"],
            "refused_share": got["refused"] / offered, "unsent_share": got["unsent"] / offered,
            "served_us": peak["cpu_us_req"], "refusal_us": max(0.0, used * 1e6 - served * peak["cpu_us_req"]) / max(1, refused),
            "p50_ms": got["p50_us"] / 1e3, "p99_ms": got["p99_us"] / 1e3, "grown_mib": most - idle,
            "admin_ms": statistics.median(waits) * 1e3, "admin_most_ms": max(waits) * 1e3}


def refusals(s, role):
    return sum(worker["refused"] for worker in s.peer.ask(role, "/stats")["workers"])


# Requests per second
STEADY = 3000
OVERLOAD_CONNS = 1000
PAIR = ["cpu_us_req", "cpu_us_req_outbound", "cpu_us_req_inbound", "rps", "sys_share", "proxy_core_util", "others_on_core"]
SINGLE = ["cpu_us_req", "rps", "sys_share", "proxy_core_util", "others_on_core", "rss_mib"]
TCP = ["cpu_s_gb_1", "cpu_s_gb_8", "pingpong_us", "gbit_per_s_1", "gbit_per_s_8", "pingpong_per_s"]
OURS = ("outrigger",)

SCENARIOS = {
    "h1-single": Scenario("1 KiB GET through one proxy, at the caller's side", closed("h1-single"), "h1-single", SINGLE, direct=True),
    "h1-inbound": Scenario("the same at the application's side (Outrigger: with authorization)", closed("h1-inbound"), "h1-inbound", SINGLE),
    "h1-mtls-pair": Scenario("1 KiB GET through both sidecars, mTLS between them", closed("h1-mtls-pair"), "h1-mtls-pair", PAIR),
    "h1-mtls-pair-post16k": Scenario("16 KiB POST, echoed", closed("h1-mtls-pair", post=16384), "h1-mtls-pair", PAIR),
    "h2-mtls-pair": Scenario("1 KiB GET over HTTP/2 all the way", h2, "h2-mtls-pair", PAIR, direct=True),
    "wasm-added": Scenario("CPU that a Proxy-Wasm filter adds (three header calls)", wasm_added, "h1-wasm", ["added_us", "steady_added_us", "with_us", "without_us", "steady_with_us", "steady_without_us"], ratios=["steady_added_us"], needs=("wasm",), only=("envoy", "outrigger"), together=True),
    "wasm-instructions": Scenario("the same in instructions", wasm_instructions, "h1-wasm", ["added_instructions", "with_instructions", "without_instructions"], needs=("wasm", "valgrind"), only=("envoy", "outrigger"), rounds=1),
    "conn-rate-x25519": Scenario("new mTLS connection, one GET", conn_rate("x25519"), "h1-mtls-pair", ["mtls_conn_ms", "plain_conn_ms", "handshake_net_ms", "mtls_conn_per_s", "proxy_core_util", "others_on_core"], group="x25519"),
    "conn-rate-x25519mlkem768": Scenario("new mTLS connection with hybrid key exchange, one GET", conn_rate("x25519mlkem768"), "h1-mtls-pair", ["mtls_conn_ms", "mtls_conn_per_s", "proxy_core_util", "others_on_core"], group="x25519mlkem768"),
    "tail-latency": Scenario("both sidecars at a constant rate", tail, "h1-mtls-pair", ["cpu_us_req", "added_p50_us", "added_p99_us", "p50_us", "p99_us", "others_on_core"], ratios=["added_p50_us"], direct=True),
    "tcp-passthrough": Scenario("opaque TCP through one proxy", tcp("tcp-single"), "tcp-single", TCP, ratios=["cpu_s_gb_8", "pingpong_us"], direct=True),
    "tcp-mtls-pair": Scenario("opaque TCP through both sidecars, mTLS between them", tcp("tcp-mtls-pair"), "tcp-mtls-pair", TCP, ratios=["cpu_s_gb_8", "pingpong_us"], needs=("cli",)),
    "websocket": Scenario("128-byte echo through both sidecars", websocket, "h1-mtls-pair", ["cpu_us_msg", "messages_per_s", "proxy_core_util"]),
    "grpc-unary": Scenario("128-byte calls through both sidecars", grpc("unary"), "h2-mtls-pair", PAIR),
    "grpc-stream": Scenario("128-byte messages on streams through both sidecars", grpc("stream"), "h2-mtls-pair", ["cpu_us_msg", "messages_per_s", "proxy_core_util", "others_on_core"]),
    "access-log": Scenario("JSON line for every request, over Errors only", access_log, "h1-single", ["all_vs_errors", "all_us", "errors_us", "lines", "dropped"], only=OURS),
    "memory": Scenario("idle; per idle connection after one request; per service", memory, "h1-mtls-pair", ["rss_idle", "anon_idle", "kib_per_conn", "kib_per_mtls_conn", "rss_3000conn", "rss_services", "kib_per_service"], rounds=3),
    "mesh-memory": Scenario("1,000 services known to the control plane: none, 10, all used", mesh_memory, "h1-single", ["kib_per_used", "used_10_mib", "rss_idle", "rss_10", "rss_all", "anon_kib_per_used"], only=OURS, needs=("control",), rounds=3),
    "start": Scenario("from exec to ready with a certificate; size of the binary", start, "h1-single", ["ready_ms", "ready_ms_max", "binary_mb"], only=OURS, needs=("control",)),
    "overload": Scenario("twice the rate of saturation, through both sidecars", overload, "h1-mtls-pair", ["goodput_lost", "goodput", "offered_of_peak", "refused_share", "unsent_share", "served_us", "refusal_us", "p50_ms", "p99_ms", "grown_mib", "admin_ms", "admin_most_ms"], only=OURS),
    "workers": Scenario("two workers against one, and how they share", workers, "h1-single", ["two_vs_one", "one_us", "two_us", "h1_most_of_4", "h2_most_of_4"] + ["%s_share_%d" % (v, n) for v in ("h1", "h2") for n in (4, 8, 64)], only=OURS),
}
