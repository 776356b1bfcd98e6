"""One peer, started and verified, beside its backend; and how a load on it is measured."""
import json
import os
import re
import select
import shutil
import tempfile
import time
from subprocess import PIPE

from . import Invalid, process
from .check import HOST, Counters, http1, verify, wait_ready
from .process import LOAD_CPU, NOBODY, PROXY_CPU, core_busy, cpu, free_port, mem_mib, out_of, spawn_on, stop
from peers import ALL, Options


class Spawn:
    """How a peer starts its processes."""

    def __init__(self, cpus, folder, wrap=()):
        self.cpus, self.folder = cpus, folder
        self.wrap = [part.format(dir=folder) for part in wrap]

    def __call__(self, argv, role):
        return spawn_on(self.cpus, self.wrap + argv, role, os.path.join(self.folder, role + ".log"))

    free_port = staticmethod(free_port)


class Interception:
    """The rules that `outrigger intercept install` makes, in the harness's own network namespace. Proxies and backend run as root,
    which is exempt; clients as nobody."""

    def __init__(self, run, port):
        self.command = [run.cli, "intercept"]
        rc, out = out_of(self.command + ["install", "--outbound", str(port), "--inbound", "1", "--uid", "0"])
        if rc:
            raise Invalid("intercept install: " + out[-300:])

    def remove(self):
        out_of(self.command + ["remove"])


class Turns:
    """A load of short turns, and what each costs the proxies of a session. Who made it calls `check` at its end."""

    def __init__(self, session, command):
        self.session, self.total, self.counters = session, 0, Counters(session.peer)
        self.process = spawn_on(session.load_cpus, command, "load", os.path.join(session.dir, "load.log"), stdin=PIPE, stdout=PIPE, text=True)

    def turn(self, secs, rate=0):
        """Microseconds of CPU per request, at so many requests a second; 0: at saturation."""
        before = cpu(self.session.procs)[0]
        print(secs, rate, file=self.process.stdin, flush=True)
        said = select.select([self.process.stdout], [], [], secs + 30)[0] and self.process.stdout.readline()
        took = cpu(self.session.procs)[0] - before
        r = json.loads(said or '{"errors": 1}')
        if r["errors"] or not r["total"]:
            raise Invalid("closed, in turns: " + (said or open(self.process.log, errors="replace").read()[-400:]))
        self.total += r["total"]
        return took / r["total"] * 1e6

    def check(self):
        """Each part of the proxies has seen each request."""
        self.counters.check("http", self.total)


class Session:
    """Backend + one started peer. Proxies on one core, load and backend on another, unless `spread`. `wrap`: what each proxy is
    run under; `patience`: seconds until it has to be ready."""

    def __init__(self, run, name, topology, spread=False, wrap=(), patience=25, **options):
        self.run, self.topology = run, topology
        self.dir = tempfile.mkdtemp(dir=run.tmp)
        self.proxy_cpus, self.load_cpus = (set(process.CPUS),) * 2 if spread else (PROXY_CPU, LOAD_CPU)
        self.ports = {"client": free_port(), "mtls": free_port(), "backend": free_port()}
        self.peer = ALL[name](Spawn(self.proxy_cpus, self.dir, wrap), self.dir, Options(wasm=run.wasm, **options))
        self.back, self.procs, self.loads, self.rules, self.rate = [], [], [], None, 2000.0
        try:
            command = [run.tool, "tcp" if topology.startswith("tcp") else "backend", "--port", str(self.ports["backend"])]
            self.back = [spawn_on(self.load_cpus, command, "backend", os.path.join(self.dir, "backend.log"))]
            if topology == "tcp-mtls-pair" and run.cli:
                # For every peer alike: connection tracking costs something.
                self.rules, self.ports["intercepted"] = Interception(run, self.ports["client"]), 1
            self.procs = self.peer.start(topology, self.ports, run.certs)
            wait_ready(self.peer, topology, self.ports, self.procs + self.back, patience)
            verify(self.peer, topology, self.ports, run.certs, self._verifying)
            if name == "outrigger" and topology not in run.effective:
                run.effective[topology] = self.peer.effective()
        except BaseException:
            self.close()
            raise

    def close(self):
        stop(self.loads + self.procs + self.back)
        if self.rules:
            self.rules.remove()
        shutil.rmtree(self.dir, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *a):
        self.close()

    # ---------------------------------------------------------------- loads: -> {"total": requests, "secs": ..., ...}
    def _command(self, command, conns, port="client", **more):
        argv = [self.run.tool, command, "--port", str(self.ports[port]), "--conns", str(conns)]
        if self.topology.startswith("tcp"):
            argv += ["--to", self.peer.tcp_target(self.ports)]
        for k, v in more.items():
            argv += ["--" + k, str(v)]
        return argv

    def _tool(self, command, secs, conns, **more):
        return out_of(self._command(command, conns, secs=secs, **more), secs + 30, self.load_cpus, NOBODY if self.rules else None)

    def turns(self, conns):
        """A load that keeps its connections."""
        load = Turns(self, self._command("closed", conns, turns=1))
        self.loads.append(load.process)
        return load

    def _verifying(self, command, port, secs, who):
        more = self.identity(who) if port == "mtls" else {}
        return self._tool(command, secs, 1, port=port, **more)

    def identity(self, who="outbound"):
        """Options of a client that is an outbound sidecar, or says so."""
        certs = self.run.certs
        own = {"cert": certs[who + "_crt"], "key": certs[who + "_key"]} if who else {}
        return {"ca": certs["ca"], "sni": certs["inbound_san"], "group": self.peer.options.group or "x25519", **own}

    def tool(self, command, secs, conns, **more):
        rc, out = self._tool(command, secs, conns, **more)
        r = json.loads(out.strip().splitlines()[-1]) if rc == 0 else {"errors": 1, "total": 0}
        if r["errors"] or not r["total"]:
            raise Invalid("%s: %s" % (command, out[-400:]))
        return r

    def h2load(self, secs, conns, streams):
        """A number of requests that takes about `secs`, by the rate of the call before: h2load then ends with every one of them
        answered."""
        r = self._h2load(max(500, int(self.rate * secs)), conns, streams)
        self.rate = r["total"] / r["secs"]
        return r

    def _h2load(self, n, conns, streams):
        argv = ["h2load", "-t1", "-c%d" % conns, "-m%d" % streams, "-n%d" % n, "-H:authority: " + HOST, "http://127.0.0.1:%d/svc-0/" % self.ports["client"]]
        rc, out = out_of(argv, 60, self.load_cpus)
        m = re.search(r"requests: (\d+) total, \d+ started, (\d+) done, (\d+) succeeded, (\d+) failed, (\d+) errored, (\d+) timeout", out)
        if rc or not m or int(m.group(3)) != n:
            raise Invalid("h2load: " + out[-600:])
        took = re.search(r"finished in ([\d.]+)(us|ms|s)", out)
        return {"total": n, "secs": float(took.group(1)) * {"us": 1e-6, "ms": 1e-3, "s": 1}[took.group(2)]}

    def h1_requests(self, n):
        """Exactly `n` requests over HTTP/1."""
        argv = ["h2load", "--h1", "-c4", "-n%d" % n, "-H:authority: " + HOST, "http://127.0.0.1:%d/svc-0/" % self.ports["client"]]
        rc, out = out_of(argv, 240, self.load_cpus)
        if rc or "%d succeeded" % n not in out:
            raise Invalid("h2load --h1: " + out[-400:])

    # ---------------------------------------------------------------- measuring
    def measured(self, load, roles=None, kind="http", count=None):
        """Runs load() -> metrics. `count`: how many requests the proxies must have seen, if not the load's total."""
        ps = [p for p in self.procs if roles is None or p.role in roles]
        counters = Counters(self.peer, roles)
        c0, b0, k0, t0 = {p: cpu([p]) for p in ps}, cpu(self.back), core_busy(self.proxy_cpus), time.time()
        got = load()
        wall = time.time() - t0
        c1, b1, k1 = {p: cpu([p]) for p in ps}, cpu(self.back), core_busy(self.proxy_cpus)
        seen = counters.check(kind, got["total"] if count is None else count(got))
        d = [sum(c1[p][i] - c0[p][i] for p in ps) for i in range(3)]
        n = got["total"]
        r = {"requests": n, "rps": n / got["secs"], "secs": got["secs"], "backend_us_req": (b1[0] - b0[0]) / n * 1e6}
        if seen:
            r["seen"] = seen
        if ps:
            r["cpu_s"], r["cpu_us_req"] = d[0], d[0] / n * 1e6
            r["sys_share"] = d[2] / max(d[1] + d[2], 1e-9)
            r["proxy_core_util"] = d[0] / wall
            r["others_on_core"] = max(0.0, (k1 - k0 - d[0]) / wall)
            r["rss_mib"], r["pss_mib"], r["anon_mib"] = mem_mib(ps)
            if len(ps) > 1:
                for p in ps:
                    r["cpu_us_req_" + p.role] = (c1[p][0] - c0[p][0]) / n * 1e6
        r["load"] = got
        return r


def wrong_san(run, name):
    """The outbound sidecar must not talk to a server whose certificate has another SAN."""
    good = run.certs
    certs = dict(good, inbound_crt=good["wrongsan_crt"], inbound_key=good["wrongsan_key"], inbound_pem=good["wrongsan_pem"])
    d = tempfile.mkdtemp(dir=run.tmp)
    ports = {"client": free_port(), "mtls": free_port(), "backend": free_port()}
    procs = [spawn_on(LOAD_CPU, [run.tool, "backend", "--port", str(ports["backend"])], "backend", os.path.join(d, "b.log"))]
    try:
        peer = ALL[name](Spawn(PROXY_CPU, d), d, Options())
        procs += peer.start("h1-mtls-pair", ports, certs)
        end, st = time.time() + 10, None
        while time.time() < end and st is None:
            try:
                st = http1(ports["client"])[0]
            except OSError:
                time.sleep(0.1)
        time.sleep(1)  # both sides are up by now
        st = http1(ports["client"])[0]
        if st == 200:
            raise Invalid("%s outbound accepted a server with a wrong SAN" % name)
        return "refused (%s)" % st
    finally:
        stop(procs)
        shutil.rmtree(d, ignore_errors=True)
