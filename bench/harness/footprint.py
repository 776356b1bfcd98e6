"""What a sidecar takes without any load: memory, time to start, size. Figures that do not depend on the machine's mood."""
import json
import os
import subprocess
import tempfile
import time
import urllib.request

from . import Invalid
from .check import http1
from .process import LOAD_CPU, PROXY_CPU, alive, child, free_port, mem_mib, spawn_on, stop
from .session import Session
from peers import ALL, Outrigger


def settled(procs, most=4.0):
    """Memory once a peer has given back what it gives back after a load: when it no longer changes."""
    end, last = time.time() + most, mem_mib(procs)
    while True:
        time.sleep(0.5)
        now = mem_mib(procs)
        if abs(now[2] - last[2]) < 0.05 or time.time() > end:
            return now
        last = now


def idle_connections(s, run, steps, tls):
    """Memory at each number of idle connections that had one request each."""
    port = s.ports["mtls"] if tls else s.ports["client"]
    argv = [run.tool, "idle", "--port", str(port), "--steps", ",".join(map(str, steps))]
    if tls:
        for k, v in s.identity().items():
            argv += ["--" + k, v]
    p = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=child(LOAD_CPU))
    procs = [q for q in s.procs if q.role in ("proxy", "inbound")]
    got = []
    try:
        for _ in steps:
            if not p.stdout.readline():
                raise Invalid("idle connections: the client gave up")
            # Outrigger parks them within half a second, and then gives back what that freed.
            time.sleep(1.5)
            got.append(settled(procs))
            p.stdin.write("\n")
            p.stdin.flush()
        if json.loads(p.stdout.readline() or "{}").get("alive") is not True:
            raise Invalid("an idle connection was dropped")
    finally:
        p.kill()
        p.wait()
    return got


def memory(run, name):
    r = {}
    many = 3000
    with Session(run, name, "h1-single") as s:
        r["rss_idle"], r["pss_idle"], r["anon_idle"] = settled(s.procs)
        first, second = idle_connections(s, run, (1000, many), False)
        r["rss_%dconn" % many], r["kib_per_conn"] = second[0], (second[2] - first[2]) * 1024 / (many - 1000)
    with Session(run, name, "h1-mtls-pair") as s:
        first, second = idle_connections(s, run, (300, 1300), True)
        r["kib_per_mtls_conn"] = (second[2] - first[2]) * 1024 / 1000
    if name != "outrigger":  # which has no configuration of what nobody calls: mesh-memory
        with Session(run, name, "h1-single", services=run.a.services) as s:
            r["rss_services"], _, anon = settled(s.procs)
            r["kib_per_service"] = (anon - r["anon_idle"]) * 1024 / max(1, run.a.services - 1)
    return r


class Mesh:
    """A control plane that knows svc-0 to svc-N of 5 endpoints each, all of them the backend on addresses of their own."""

    def __init__(self, run, services):
        self.dir, self.procs, self.run = tempfile.mkdtemp(dir=run.tmp), [], run
        self.backend_port, self.http, self.grpc = free_port(), free_port(), free_port()
        config, self.state = os.path.join(self.dir, "config"), os.path.join(self.dir, "state")
        os.mkdir(config)
        with open(os.path.join(config, "mesh.yaml"), "w") as f:
            f.write("\n---\n".join(json.dumps(doc) for i in range(services) for doc in self.service(i)))
        try:
            self.start(LOAD_CPU, [run.tool, "backend", "--ip", "0.0.0.0", "--port", str(self.backend_port)], "backend")
            self.start(LOAD_CPU, [run.control, "--config", config, "--state", self.state, "--grpc", "127.0.0.1:%d" % self.grpc, "--http", "127.0.0.1:%d" % self.http], "control")
            self.wait(self.running, "the control plane does not run")
        except BaseException:
            self.close()
            raise

    def service(self, i):
        meta = {"name": "svc-%d" % i, "namespace": "mesh"}
        yield {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": {"ports": [{"name": "http", "port": 80, "targetPort": self.backend_port, "appProtocol": "http"}]}}
        addresses = ["127.%d.%d.%d" % (1 + i // 250, i % 250, k + 1) for k in range(5)]
        yield {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
               "metadata": dict(meta, labels={"kubernetes.io/service-name": meta["name"]}),
               "ports": [{"name": "http", "port": self.backend_port}], "endpoints": [{"addresses": [a]} for a in addresses]}

    def start(self, cpus, argv, role):
        p = spawn_on(cpus, argv, role, os.path.join(self.dir, role + ".log"))
        self.procs.append(p)
        return p

    def wait(self, true, what, pause=0.02, secs=30):
        end = time.time() + secs
        while time.time() < end:
            alive(self.procs)
            try:
                if true():
                    return
            except OSError:
                pass
            time.sleep(pause)
        raise Invalid(what)

    def running(self):
        with urllib.request.urlopen("http://127.0.0.1:%d/api/v1/status" % self.http, timeout=5) as r:
            return r.status == 200 and os.path.exists(os.path.join(self.state, "join-token"))

    def proxy(self, name):
        """A sidecar with an application, told by the control plane: (process, outbound port, admin port)."""
        out, admin, inbound = free_port(), free_port(), free_port()
        argv = [ALL["outrigger"].bin, "--name", name, "--namespace", "mesh", "--service-account", "caller", "--app", "127.0.0.1:%d/http1" % self.backend_port,
                "--control-plane", "https://127.0.0.1:%d" % self.grpc, "--ca-file", self.state + "/root.pem", "--token-file", self.state + "/join-token",
                "--outbound", "127.0.0.1:%d" % out, "--inbound", "127.0.0.1:%d" % inbound, "--admin", "127.0.0.1:%d" % admin, "--health", "127.0.0.1:0", "--workers", "1"]
        return self.start(PROXY_CPU, argv, name), out, admin

    def close(self):
        stop(self.procs)

    def __enter__(self):
        return self

    def __exit__(self, *a):
        self.close()


def is_ready(admin):
    with urllib.request.urlopen("http://127.0.0.1:%d/ready" % admin, timeout=5) as r:
        return r.status == 200


def mesh_memory(run, name):
    """On-demand discovery: what a proxy's memory is with none, 10, and all of the mesh's services used."""
    with Mesh(run, run.a.services) as mesh:
        p, out, admin = mesh.proxy("caller-0")
        mesh.wait(lambda: is_ready(admin), "the proxy is not ready")

        def use(services):
            for i in services:
                status, _, body = http1(out, host="svc-%d.mesh" % i)
                if status != 200 or body != b"x" * 1024:
                    raise Invalid("svc-%d: %s" % (i, status))
        idle = settled([p])
        use(range(10))
        ten = settled([p])
        use(range(10, run.a.services))
        all_ = settled([p])
        with urllib.request.urlopen("http://127.0.0.1:%d/config" % admin, timeout=5) as page:
            known = sum(d["kind"] == "service" for d in json.load(page)["destinations"])
    if known != run.a.services:
        raise Invalid("the proxy knows %d services, not %d" % (known, run.a.services))
    return {"rss_idle": idle[0], "rss_10": ten[0], "rss_all": all_[0], "used_10_mib": ten[0] - idle[0],
            "kib_per_used": (all_[0] - idle[0]) * 1024 / run.a.services, "anon_kib_per_used": (all_[2] - idle[2]) * 1024 / run.a.services}


def start(run, name):
    """From exec to ready with a certificate, against a control plane that runs; and the binary's size."""
    with Mesh(run, 10) as mesh:
        took = []
        for n in range(5):
            t0 = time.time()
            p, _, admin = mesh.proxy("starter-%d" % n)
            mesh.wait(lambda: is_ready(admin), "the proxy is not ready", pause=0.001)
            took.append((time.time() - t0) * 1e3)
            with urllib.request.urlopen("http://127.0.0.1:%d/certs" % admin, timeout=5) as page:
                if json.load(page)["valid"] is not True:
                    raise Invalid("ready without a certificate")
            mesh.procs.remove(p)
            stop([p])
    return {"ready_ms": sorted(took)[len(took) // 2], "ready_ms_max": max(took), "binary_mb": os.path.getsize(Outrigger.bin) / 1e6}
