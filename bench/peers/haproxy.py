"""HAProxy."""
import os
import shutil

from .base import SUITE, Peer


class Haproxy(Peer):
    """nbthread 1, http-reuse always (shared upstream pool, as the others do); opaque: splice-auto."""
    name = "haproxy"
    topologies = ("h1-single", "h1-inbound", "h1-mtls-pair", "h2-mtls-pair", "tcp-single", "tcp-mtls-pair")
    bin = os.environ.get("HAPROXY_BIN") or shutil.which("haproxy") or shutil.which("/usr/sbin/haproxy")

    @classmethod
    def has_group(cls, group):
        return None if group == "x25519" else "n/a: OpenSSL 3.0 has no ML-KEM"

    CONF = """global
  nbthread {workers}
  maxconn {maxconn}
  ssl-default-bind-ciphersuites {suite}
  ssl-default-server-ciphersuites {suite}
defaults
  mode {mode}
  timeout connect 2s
  timeout client 300s
  timeout server 300s
  timeout tunnel 300s
  timeout http-keep-alive 300s
  {more}
frontend f
  bind 127.0.0.1:{port} backlog 8192 {bind}
  {use}
  default_backend b0
{backends}
"""

    def _run(self, role, port, up_port, opaque, bind="", server=""):
        backs, use = [], ""
        for i in range(self.options.services):
            eps = "\n".join("  server s%d %s:%d %s" % (k, ip, p, server) for k, (ip, p) in enumerate(self.endpoints(i, up_port)))
            backs.append("backend b%d\n  balance roundrobin\n%s" % (i, eps))
        if self.options.services > 1:
            m = self.file("haproxy-%s.map" % role, "".join("svc-%d.mesh b%d\n" % (i, i) for i in range(self.options.services)))
            use = "use_backend %%[req.hdr(host),field(1,:),lower,map_str(%s,b0)]" % m
        mode, more = ("tcp", "option splice-auto") if opaque else ("http", "http-reuse always")
        # Splicing takes descriptors for pipes as well.
        conf = self.CONF.format(maxconn=1000 if opaque else 9000, suite=SUITE, workers=self.options.workers, mode=mode, more=more, port=port, bind=bind, use=use, backends="\n".join(backs))
        return self.spawn([self.bin, "-db", "-q", "-f", self.file("haproxy-%s.cfg" % role, conf)], role)

    def start(self, topology, ports, certs):
        opaque, h2 = topology.startswith("tcp"), topology.startswith("h2")
        if not topology.endswith("-pair"):
            return [self._run("proxy", ports["client"], ports["backend"], opaque)]
        alpn = "" if opaque else " alpn h2" if h2 else " alpn http/1.1"
        bind = "ssl crt {inbound_pem} ca-file {ca} verify required ssl-min-ver TLSv1.3".format(**certs) + alpn
        if self.options.group:
            bind += " curves X25519"
        srv = ("ssl crt {outbound_pem} ca-file {ca} verify required verifyhost {inbound_san} sni str({inbound_san}) "
               "ssl-min-ver TLSv1.3").format(**certs) + alpn
        return [self._run("inbound", ports["mtls"], ports["backend"], opaque, bind=bind, server="proto h2" if h2 else ""),
                self._run("outbound", ports["client"], ports["mtls"], opaque, bind="proto h2" if h2 else "", server=srv)]
