"""Outrigger."""
import json
import os
import shutil
import urllib.request

from .base import Peer

OURS = "outrigger.dev/v1alpha1"
VIP = "10.96.0.10"  # of svc-0, where the client dials an address


class Outrigger(Peer):
    """From a directory, with identities from files: documented flags and resources only. What a user gets by default stays
    on: routing, balancing, outlier detection, metrics, trace context; authorization has 10 rules, of which the last one matches;
    limits are put out of the way as for the others. The access log keeps its default mode (Errors)."""
    name = "outrigger"
    topologies = ("h1-single", "h1-inbound", "h1-mtls-pair", "h2-mtls-pair", "h1-wasm", "tcp-single", "tcp-mtls-pair")
    bin = os.environ.get("OUTRIGGER_BIN") or shutil.which("outrigger-proxy", path=os.environ.get("OUTRIGGER_BIN_DIR", ""))
    DOMAIN = "mesh.test"

    def __init__(self, *a):
        super().__init__(*a)
        self.admin = {}  # role -> (address, direction that the load takes through it)
        self.resources = {}

    @classmethod
    def beside(cls, name):
        """Another of the project's binaries: where the proxy is, or in OUTRIGGER_BIN_DIR."""
        places = [os.path.dirname(cls.bin or ""), os.environ.get("OUTRIGGER_BIN_DIR", "")]
        return next((path for place in places if os.access(path := os.path.join(place, name), os.X_OK)), None)

    def ask(self, role, page):
        """A page of the admin endpoint."""
        with urllib.request.urlopen("http://%s%s" % (self.admin[role][0], page), timeout=5) as r:
            return json.load(r)

    def effective(self):
        """Flags, resources and what the proxies say they serve, for the results file."""
        return {role: {"flags": argv, "resources": docs, "config": self.ask(role, "/config")} for role, (argv, docs) in self.resources.items()}

    def spiffe(self, account):
        return "spiffe://%s/ns/default/sa/%s" % (self.DOMAIN, account)

    def _doc(self, kind, name, spec):
        return {"apiVersion": OURS, "kind": kind, "metadata": {"name": name, "namespace": "mesh"}, "spec": spec}

    def _authorization(self, last):
        """Ten rules; nine of them are for others."""
        others = [{"from": [{"principals": [self.spiffe("caller-%d" % i)]}], "to": [{"methods": ["GET", "POST"], "paths": ["/area-%d/*" % i]}]} for i in range(9)]
        return self._doc("AuthorizationPolicy", "callers", {"action": "Allow", "rules": others + [last]})

    def _services(self, port, protocol, identity=None, inbound=None):
        """svc-N of namespace mesh. Its endpoints are Workloads with the identity they must prove, reached at their
        proxy's inbound port, or else an EndpointSlice: addresses with no sidecar, plaintext."""
        app = {"http1": "http", "h2": "kubernetes.io/h2c", "tcp": "tcp"}[protocol]
        docs = []
        for i in range(self.options.services):
            name, ends = "svc-%d" % i, self.endpoints(i, port)
            spec = {"ports": [{"name": "main", "port": 80, "targetPort": ends[0][1], "appProtocol": app}]}
            if protocol == "tcp":
                spec["clusterIP"] = VIP
            docs.append({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "mesh"}, "spec": spec})
            if identity:
                spec["selector"] = {"app": name}
                docs += [{"apiVersion": OURS, "kind": "Workload",
                          "metadata": {"name": "%s-%d" % (name, k), "namespace": "mesh", "labels": {"app": name}},
                          "spec": {"address": ip, "inboundPort": inbound, "ports": [{"name": "main", "port": p, "protocol": protocol}], "identity": identity}}
                         for k, (ip, p) in enumerate(ends)]
            else:
                docs.append({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
                             "metadata": {"name": name, "namespace": "mesh", "labels": {"kubernetes.io/service-name": name}},
                             "ports": [{"name": "main", "port": ends[0][1]}], "endpoints": [{"addresses": [ip]} for ip, _ in ends]})
        docs.append(self._doc("TrafficPolicy", "limits", {
            "targetRefs": [{"group": "", "kind": "Namespace", "name": "mesh"}],
            "circuitBreaker": {"maxConnections": 1000000, "maxPendingRequests": 1000000, "maxRequests": 1000000}}))
        return docs

    def _run(self, role, direction, docs, flags, certs=None):
        mesh = {"trustDomain": self.DOMAIN}
        if self.options.access_log:
            mesh["accessLog"] = {"mode": "All"}
        docs = [{"apiVersion": OURS, "kind": "MeshConfig", "metadata": {"name": "default"}, "spec": mesh}] + docs
        d = os.path.join(self.dir, role)
        os.makedirs(d, exist_ok=True)
        with open(os.path.join(d, "mesh.yaml"), "w") as f:
            f.write("\n---\n".join(json.dumps(x) for x in docs))  # JSON is YAML
        self.admin[role] = ("127.0.0.1:%d" % self.spawn.free_port(), direction)
        argv = [self.bin, "--config", d, "--namespace", "mesh", "--name", role, "--workers", str(self.options.workers),
                "--admin", self.admin[role][0], "--health", "127.0.0.1:0"] + flags
        if certs:
            argv += ["--cert-file", certs[role + "_crt"], "--key-file", certs[role + "_key"], "--ca-file", certs["ca"],
                     "--service-account", role]
        self.resources[role] = (argv, docs if self.options.services == 1 else "%d resources" % len(docs))
        return self.spawn(argv, role)

    def start(self, topology, ports, certs):
        client, mtls, none = "127.0.0.1:%d" % ports["client"], "127.0.0.1:%d" % ports["mtls"], "127.0.0.1:0"
        protocol = {"h1": "http1", "h2": "h2", "tc": "tcp"}[topology[:2]]
        app = "main=127.0.0.1:%d/%s" % (ports["backend"], protocol)
        paths = {} if protocol == "tcp" else {"to": [{"paths": ["/svc-0/*"]}]}
        if topology in ("h1-inbound", "tcp-single"):
            docs = [self._authorization({"from": [{"ipBlocks": ["127.0.0.0/8"]}], **paths})]
            return [self._run("proxy", "inbound", docs, ["--app", app, "--inbound", client, "--outbound", none])]
        if not topology.endswith("-pair"):
            docs = self._services(ports["backend"], protocol)
            if topology == "h1-wasm":
                docs.append(self._doc("WasmFilter", "f", {
                    "targetRefs": [{"group": "", "kind": "Service", "name": "svc-0"}], "direction": "Outbound", "module": {"file": self.options.wasm}}))
            return [self._run("proxy", "outbound", docs, ["--outbound", client, "--inbound", none])]
        docs = [self._doc("MtlsPolicy", "strict", {"mode": "Strict"}),
                self._authorization({"from": [{"principals": [self.spiffe("outbound")]}], **paths})]
        intercept = ["--intercept", "redirect"] if protocol == "tcp" else []
        return [self._run("inbound", "inbound", docs, ["--app", app, "--inbound", mtls, "--outbound", none], certs),
                self._run("outbound", "outbound", self._services(ports["backend"], protocol, self.spiffe("inbound"), ports["mtls"]),
                          ["--outbound", client, "--inbound", none] + intercept, certs)]

    def tcp_target(self, ports):
        return VIP + ":80" if "intercepted" in ports else super().tcp_target(ports)
