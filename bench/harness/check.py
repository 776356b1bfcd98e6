"""Correctness: what a peer must do before it is measured, and what Outrigger's counters must say after."""
import http.client
import os
import re
import socket
import ssl
import time

from . import Invalid
from .process import alive, out_of

HOST = "svc-0.mesh"  # what the load asks for: a service of every peer's configuration
TRACEPARENT = re.compile(r"^00-[0-9a-f]{32}-[0-9a-f]{16}-0[01]$")


def http1(port, method="GET", body=b"", tls=None, sock=None, close=True, path="/svc-0/", headers="", host=HOST):
    """-> (status, headers dict, body); raises OSError when refused."""
    s = sock or socket.create_connection(("127.0.0.1", port), 5)
    if tls:
        s = tls.wrap_socket(s, server_hostname="inbound.mesh.test")
    s.settimeout(5)
    h = "%s %s HTTP/1.1\r\nHost: %s\r\n%s" % (method, path, host, headers)
    if body:
        h += "Content-Length: %d\r\n" % len(body)
    s.sendall((h + ("Connection: close\r\n" if close else "") + "\r\n").encode() + body)
    response = http.client.HTTPResponse(s, method=method)
    try:
        response.begin()
        rest = response.read()
    except http.client.HTTPException as e:
        raise OSError(repr(e))
    hd = {k.lower(): v for k, v in response.getheaders()}
    if close:
        s.close()
    return response.status, hd, rest


def http2(port, path="/svc-0/"):
    """One h2c request -> (status, headers dict, body)."""
    rc, out = out_of(["curl", "-s", "--http2-prior-knowledge", "-m", "5", "-H", "Host: " + HOST, "-H", "x-ask: 1", "-D", "-",
                      "http://127.0.0.1:%d%s" % (port, path)])
    head, _, body = out.replace("\r\n", "\n").partition("\n\n")
    if rc or not head.startswith("HTTP/2 "):
        raise OSError("curl: exit code %d, %s" % (rc, head[:100]))
    lines = head.split("\n")
    return int(lines[0].split()[1]), {k.lower(): v.strip() for k, v in (x.split(":", 1) for x in lines[1:])}, body.encode()


def client_tls(certs, who, alpn):
    c = ssl.create_default_context(cafile=certs["ca"])
    if alpn:
        c.set_alpn_protocols([alpn])
    if who:
        c.load_cert_chain(certs[who + "_crt"], certs[who + "_key"])
    return c


def ask(topology, ports, path="/svc-0/"):
    if topology.startswith("h2"):
        return http2(ports["client"], path)
    return http1(ports["client"], path=path, headers="x-ask: 1\r\n")


def opaque(s, load="E" + "ping" * 32):
    """Whether what is sent comes back."""
    s.settimeout(5)
    s.sendall(load.encode())
    got = b""
    while len(got) < len(load) - 1:
        d = s.recv(4096)
        if not d:
            return False
        got += d
    return got == load[1:].encode()


def wait_ready(peer, topology, ports, procs, secs=25):
    end, last = time.time() + secs, None
    while time.time() < end:
        alive(procs)
        try:
            if topology.startswith("tcp"):
                # Interception is only there for the client of another user: the proxies say themselves that they are ready.
                if "intercepted" not in ports or peer.name != "outrigger":
                    with socket.create_connection(("127.0.0.1", ports["client"]), 5) as s:
                        if opaque(s):
                            return
                elif all(peer.ask(role, "/stats")["phase"] == "serving" and listens(ports) for role in peer.admin):
                    return
            elif ask(topology, ports)[0] == 200:
                return
            last = "not 200"
        except (OSError, ValueError) as e:
            last = repr(e)
        time.sleep(0.02)
    raise Invalid("%s not ready: %s" % (peer.name, last))


def listens(ports):
    for port in ("client", "mtls"):
        socket.create_connection(("127.0.0.1", ports[port]), 5).close()
    return True


def verify(peer, topology, ports, certs, tool=None):
    """Correctness, once per start. Raises Invalid."""
    def want(ok, what):
        if not ok:
            raise Invalid("%s %s: %s" % (peer.name, topology, what))
    ours = peer.name == "outrigger"
    if topology.startswith("tcp"):
        rc, out = tool("pingpong", "client", 0.05, None)
        want(rc == 0 and '"errors":0' in out, "ping-pong: " + out[-200:])
    else:
        st, hd, body = ask(topology, ports)
        want(st == 200 and body == b"x" * 1024, "GET gave %s, %d bytes" % (st, len(body)))
        if topology.startswith("h2"):
            want(hd.get("x-backend-version") == "HTTP/2.0", "the application did not see HTTP/2")
        else:
            data = os.urandom(16384)
            st, _, body = http1(ports["client"], "POST", data)
            want(st == 200 and body == data, "16 KiB POST echo differs (%s)" % st)
        if ours:
            want(TRACEPARENT.match(hd.get("x-backend-traceparent", "")), "the application saw no traceparent: %s" % hd)
            if any(direction == "inbound" for _, direction in peer.admin.values()):
                want(ask(topology, ports, "/forbidden")[0] == 403, "a forbidden request did not get 403")
        if topology == "h1-wasm":
            want(hd.get("x-reflect-filter") == "seen" and hd.get("x-filter-resp") == "yes", "filter's headers are missing: %s" % hd)
    if topology.endswith("-pair") and peer.name != "direct":
        may = lambda who: admitted(topology, ports, certs, who, peer.options.group and tool)
        for who in (None, "rogue"):
            want(not may(who), "the mTLS port served a client with %s certificate" % (who or "no"))
        want(may("outbound"), "the mTLS port refused the right client")


def admitted(topology, ports, certs, who, tool=None):
    """Whether the mTLS port serves the client with this certificate. `tool`: its handshake client asks, in the group of the
    scenario, which Python's OpenSSL may not have."""
    if tool:
        rc, out = tool("handshake", "mtls", 0.02, who)
        return rc == 0 and '"errors":0' in out
    alpn = {"h1": "http/1.1", "h2": "h2", "tc": None}[topology[:2]]
    tls = client_tls(certs, who, alpn)
    try:
        if topology.startswith("h1"):
            return http1(ports["mtls"], tls=tls)[0] == 200
        with tls.wrap_socket(socket.create_connection(("127.0.0.1", ports["mtls"]), 5), server_hostname="inbound.mesh.test") as s:
            s.settimeout(2)
            if topology.startswith("tcp"):
                return opaque(s)
            s.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
            return bool(s.recv(1)) and s.selected_alpn_protocol() == "h2"
    except OSError:
        return False


# What each direction of a proxy must have seen of every request, by the kind of load.
SEEN = {
    ("http", "outbound"): ("ended", "timed", "traced", "judged"), ("http", "inbound"): ("ended", "timed", "traced", "allowed"),
    # The life of an upgraded connection is no latency.
    ("websocket", "outbound"): ("ended", "traced", "judged"), ("websocket", "inbound"): ("ended", "traced", "allowed"),
    ("tcp", "outbound"): ("judged",), ("tcp", "inbound"): ("allowed",),
}


class Counters:
    """Outrigger's counters before and after a load: the round counts only if each part saw each request."""

    def __init__(self, peer, roles=None):
        self.peer = peer
        self.roles = [role for role in getattr(peer, "admin", {}) if roles is None or role in roles]
        self.before = self.read()

    def read(self):
        return {role: self.peer.ask(role, "/stats") for role in self.roles}

    def check(self, kind, n, secs=2.0):
        """{role: {part: how many it saw}}, and raises Invalid unless each is `n`."""
        end = time.time() + secs
        while True:
            now = self.read()
            seen = {role: self.difference(role, kind, now) for role in self.roles}
            if all(count == n for parts in seen.values() for count in parts.values()):
                return seen
            if time.time() > end:
                raise Invalid("%d requests were sent, and seen: %s" % (n, seen))
            time.sleep(0.02)

    def difference(self, role, kind, now):
        direction = self.peer.admin[role][1]
        parts = SEEN[kind, direction]
        return {part: now[role]["requests"][direction][part] - self.before[role]["requests"][direction][part] for part in parts}

    def workers(self, role):
        """Requests that each worker took since `before`."""
        now = self.read()[role]["workers"]
        return [a["requests"] - b["requests"] for a, b in zip(now, self.before[role]["workers"])]
