"""nginx."""
import os
import shutil

from .base import BIG, SUITE, Peer

STREAM = "/usr/lib/nginx/modules/ngx_stream_module.so"  # Debian: libnginx-mod-stream


class Nginx(Peer):
    """worker_processes 1 (master counted too); upstream keepalive pool; no HTTP/2 to upstreams."""
    name = "nginx"
    topologies = ("h1-single", "h1-inbound", "h1-mtls-pair")
    bin = os.environ.get("NGINX_BIN") or shutil.which("nginx") or shutil.which("/usr/sbin/nginx")

    @classmethod
    def supports(cls, topology):
        if topology == "h2-mtls-pair":
            return "n/a: no HTTP/2 to upstreams"
        if topology.startswith("tcp"):
            return None if os.path.exists(STREAM) else "n/a: libnginx-mod-stream is not installed"
        return super().supports(topology)

    @classmethod
    def has_group(cls, group):
        return None if group == "x25519" else "n/a: OpenSSL 3.0 has no ML-KEM"

    CONF = """{modules}daemon off; worker_processes {workers}; pid {d}/nginx-{role}.pid; error_log stderr crit; user root;
worker_rlimit_nofile 40000;
events {{ worker_connections 20000; }}
{kind} {{
{common}
{tls}
{upstreams}
{servers}
}}
"""
    HTTP = """
  access_log off; server_tokens off; keepalive_timeout 300s; keepalive_requests {big};
  client_body_buffer_size 64k; server_names_hash_max_size 8192; server_names_hash_bucket_size 128;
  client_body_temp_path {d}/{role}-b; proxy_temp_path {d}/{role}-p; fastcgi_temp_path {d}/{role}-f;
  uwsgi_temp_path {d}/{role}-u; scgi_temp_path {d}/{role}-s;
  proxy_http_version 1.1; {connection} proxy_set_header Host $http_host;
"""

    def _run(self, role, port, up_port, opaque=False, listen_tls=False, up_tls=None, certs=None):
        ups, srvs = [], []
        for i in range(self.options.services):
            # one "server" per distinct endpoint; equal ones are legal and counted apart
            eps = " ".join("server %s:%d max_fails=0;" % e for e in self.endpoints(i, up_port))
            keep = "" if opaque else "keepalive 256; keepalive_requests %d; keepalive_timeout 300s;" % BIG
            ups.append("  upstream u%d { %s %s }" % (i, eps, keep))
            first = (" backlog=8192" if opaque else " default_server backlog=8192") if i == 0 else ""
            listen = "listen 127.0.0.1:%d%s%s;" % (port, " ssl" if listen_tls else "", first)
            if opaque:
                srvs.append("  server { %s proxy_pass u%d; proxy_ssl %s; proxy_half_close on; }" % (listen, i, "on" if up_tls else "off"))
            else:
                srvs.append("  server { %s server_name svc-%d.mesh; location / { proxy_pass %s://u%d; } }" % (
                    listen, i, "https" if up_tls else "http", i))
        tls = ""
        if listen_tls:
            tls = ("  ssl_certificate {inbound_crt}; ssl_certificate_key {inbound_key}; ssl_client_certificate {ca};\n"
                   "  ssl_verify_client on; ssl_protocols TLSv1.3; ssl_conf_command Ciphersuites " + SUITE + ";").format(**certs)
            if self.options.group:
                tls += " ssl_ecdh_curve X25519;"
        if up_tls:
            tls = ("  proxy_ssl_certificate {outbound_crt}; proxy_ssl_certificate_key {outbound_key};\n"
                   "  proxy_ssl_trusted_certificate {ca}; proxy_ssl_verify on; proxy_ssl_verify_depth 2;\n"
                   "  proxy_ssl_name {inbound_san}; proxy_ssl_server_name on; proxy_ssl_protocols TLSv1.3;\n"
                   "  proxy_ssl_conf_command Ciphersuites " + SUITE + ";").format(**certs)
        connection = 'proxy_set_header Connection "";'
        if self.options.upgrades:
            connection = 'proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection "upgrade";'
        common = "" if opaque else self.HTTP.format(d=self.dir, role=role, big=BIG, connection=connection)
        conf = self.CONF.format(d=self.dir, role=role, workers=self.options.workers, tls=tls, upstreams="\n".join(ups), servers="\n".join(srvs),
                                kind="stream" if opaque else "http", common=common, modules="load_module %s;\n" % STREAM if opaque else "")
        return self.spawn([self.bin, "-p", self.dir, "-c", self.file("nginx-%s.conf" % role, conf)], role)

    def start(self, topology, ports, certs):
        opaque = topology.startswith("tcp")
        if not topology.endswith("-pair"):
            return [self._run("proxy", ports["client"], ports["backend"], opaque)]
        return [self._run("inbound", ports["mtls"], ports["backend"], opaque, listen_tls=True, certs=certs),
                self._run("outbound", ports["client"], ports["mtls"], opaque, up_tls=True, certs=certs)]
