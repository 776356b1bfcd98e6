"""What all peers have in common."""
import os

BIG = 1000000000
SUITE = "TLS_AES_128_GCM_SHA256"  # what Envoy/BoringSSL picks on AES hardware; made equal for all


class Options:
    """What scenarios vary.

    services:   virtual hosts svc-N.mesh, one cluster of 5 endpoints each if > 1
    workers:    worker threads of each proxy
    group:      the one key exchange that the inbound sidecar accepts: "x25519" | "x25519mlkem768"; None: its default
    access_log: JSON, every request, to standard output (or a file where the peer wants one); else the peer's quiet way
    upgrades:   WebSocket has to get through
    wasm:       path of the Proxy-Wasm filter (h1-wasm)
    """

    def __init__(self, services=1, workers=1, group=None, access_log=False, upgrades=False, wasm=None):
        self.services, self.workers, self.group = services, workers, group
        self.access_log, self.upgrades, self.wasm = access_log, upgrades, wasm


class Peer:
    name = "?"
    topologies = ()
    bin = None

    def __init__(self, spawn, workdir, options=None):
        self.spawn, self.dir, self.options = spawn, workdir, options or Options()

    @classmethod
    def supports(cls, topology):
        return None if topology in cls.topologies else "n/a: not supported by this proxy"

    @classmethod
    def has_group(cls, group):
        """None, or why it cannot do this key exchange."""
        return None

    def file(self, name, text):
        path = os.path.join(self.dir, name)
        with open(path, "w") as f:
            f.write(text)
        return path

    def endpoints(self, i, port):
        """5 endpoints for service i when many services are asked for (only svc-0's are real)."""
        if self.options.services == 1:
            return [("127.0.0.1", port)]
        if i == 0:
            return [("127.0.0.1", port)] * 5
        return [("127.%d.%d.%d" % (1 + i // 250, i % 250, k + 1), 8080) for k in range(5)]

    def tcp_target(self, ports):
        """What an opaque client dials."""
        return "127.0.0.1:%d" % ports["client"]


class Direct(Peer):
    """No proxy: the client talks to the backend. Shows the ceiling of load generator + backend."""
    name = "direct"
    topologies = ("h1-single", "h2-mtls-pair", "h1-mtls-pair", "tcp-single", "tcp-mtls-pair")
    bin = "-"

    def start(self, topology, ports, certs):
        ports["client"] = ports["backend"]
        return []
