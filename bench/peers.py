"""One class per proxy under test ("peer"). bench.py knows nothing else about a proxy.

A peer has: name; supports(topology) -> None, or the reason why not; start(topology, ports, certs)
-> list of Popen (each made with self.spawn, which pins it and tags it with .role).
Ready check: ready(topology, ports), by default a GET through the entry port that answers 200.

topology: "h1-single" | "h1-mtls-pair" | "h2-mtls-pair" | "wasm-headers"
ports:    client  = entry port, plaintext (h1, or h2c for h2-*), 127.0.0.1
          mtls    = inbound sidecar's TLS port (pairs only)
          backend = backend port (h1 and h2c on the same port)
certs:    paths: ca, inbound_crt/_key/_pem, outbound_crt/_key/_pem; names: inbound_san, outbound_san
self.n_services: virtual hosts svc-N.mesh, one cluster of 5 endpoints each if > 1
self.wasm: path of the Proxy-Wasm filter (wasm-headers)
"""
import json
import os
import shutil

BIG = 1000000000
SUITE = "TLS_AES_128_GCM_SHA256"  # what Envoy/BoringSSL picks on AES hardware; made equal for all


class Peer:
    name = "?"
    topologies = ()

    def __init__(self, spawn, workdir, n_services=1, wasm=None):
        self.spawn, self.dir, self.n_services, self.wasm = spawn, workdir, n_services, wasm

    def supports(self, topology):
        return None if topology in self.topologies else "n/a: not supported by this proxy"

    def version(self):
        return "?"

    def ready(self, topology, ports):
        return None  # None: bench.py polls with a GET until it sees 200

    def file(self, name, text):
        path = os.path.join(self.dir, name)
        with open(path, "w") as f:
            f.write(text)
        return path

    def endpoints(self, i, port):
        """5 endpoints for service i when many services are asked for (only svc-0's are real)."""
        if self.n_services == 1:
            return [("127.0.0.1", port)]
        if i == 0:
            return [("127.0.0.1", port)] * 5
        return [("127.%d.%d.%d" % (1 + i // 250, i % 250, k + 1), 8080) for k in range(5)]


class Direct(Peer):
    """No proxy: the client talks to the backend. Shows the ceiling of load generator + backend."""
    name = "direct"
    topologies = ("h1-single", "h2-mtls-pair", "h1-mtls-pair")

    def start(self, topology, ports, certs):
        ports["client"] = ports["backend"]
        return []


# --------------------------------------------------------------------------- Envoy
def _t(name):
    return "type.googleapis.com/envoy." + name


class Envoy(Peer):
    """Follows Envoy's own "best practices for benchmarking" page: release binary, --concurrency 1,
    generate_request_id off, router dynamic_stats off, circuit breakers out of the way, no access
    log. All other stats stay on (a mesh needs them)."""
    name = "envoy"
    topologies = ("h1-single", "h1-mtls-pair", "h2-mtls-pair", "wasm-headers")
    bin = os.environ.get("ENVOY_BIN") or shutil.which("envoy")

    def _addr(self, ip, port):
        return {"socket_address": {"address": ip, "port_value": port}}

    def _listener(self, port, h2, filters, tls=None):
        vhosts = []
        for i in range(self.n_services):
            dom = ["svc-%d.mesh" % i, "svc-%d.mesh:*" % i]
            vhosts.append({"name": "v%d" % i, "domains": dom + (["*"] if i == 0 else []), "routes": [
                {"match": {"prefix": "/"}, "route": {"cluster": "c%d" % i, "timeout": "0s"}}]})
        hcm = {"@type": _t("extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"),
               "stat_prefix": "in", "codec_type": "HTTP2" if h2 else "HTTP1",
               "generate_request_id": False,
               "route_config": {"name": "r", "virtual_hosts": vhosts},
               "http_filters": filters + [{"name": "envoy.filters.http.router", "typed_config": {
                   "@type": _t("extensions.filters.http.router.v3.Router"), "dynamic_stats": False}}]}
        chain = {"filters": [{"name": "hcm", "typed_config": hcm}]}
        if tls:
            chain["transport_socket"] = tls
        return {"name": "l", "address": self._addr("127.0.0.1", port), "filter_chains": [chain]}

    def _cluster(self, i, port, h2, tls=None):
        opts = {"@type": _t("extensions.upstreams.http.v3.HttpProtocolOptions"), "explicit_http_config":
                {"http2_protocol_options": {}} if h2 else {"http_protocol_options": {}}}
        c = {"name": "c%d" % i, "type": "STATIC", "connect_timeout": "2s",
             "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": opts},
             "circuit_breakers": {"thresholds": [{"max_connections": BIG, "max_pending_requests": BIG,
                                                  "max_requests": BIG, "max_retries": BIG}]},
             "load_assignment": {"cluster_name": "c%d" % i, "endpoints": [{"lb_endpoints": [
                 {"endpoint": {"address": self._addr(ip, p)}} for ip, p in self.endpoints(i, port)]}]}}
        if tls:
            c["transport_socket"] = tls
        return c

    def _tls(self, certs, side, alpn):
        ctx = {"tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
               "alpn_protocols": [alpn],
               "tls_certificates": [{"certificate_chain": {"filename": certs[side + "_crt"]},
                                     "private_key": {"filename": certs[side + "_key"]}}],
               "validation_context": {"trusted_ca": {"filename": certs["ca"]}}}
        if side == "outbound":
            ctx["validation_context"]["match_typed_subject_alt_names"] = [
                {"san_type": "DNS", "matcher": {"exact": certs["inbound_san"]}}]
            conf = {"@type": _t("extensions.transport_sockets.tls.v3.UpstreamTlsContext"),
                    "common_tls_context": ctx, "sni": certs["inbound_san"]}
        else:
            conf = {"@type": _t("extensions.transport_sockets.tls.v3.DownstreamTlsContext"),
                    "common_tls_context": ctx, "require_client_certificate": True}
        return {"name": "envoy.transport_sockets.tls", "typed_config": conf}

    def _run(self, role, listener, clusters):
        cfg = {"static_resources": {"listeners": [listener], "clusters": clusters}}
        path = self.file("envoy-%s.json" % role, json.dumps(cfg))
        return self.spawn([self.bin, "-c", path, "--concurrency", "1", "--disable-hot-restart", "-l", "error"], role)

    def start(self, topology, ports, certs):
        if not topology.endswith("-pair"):
            filters = []
            if topology == "wasm-headers":
                filters = [{"name": "envoy.filters.http.wasm", "typed_config": {
                    "@type": _t("extensions.filters.http.wasm.v3.Wasm"), "config": {
                        "name": "f", "vm_config": {"vm_id": "f", "runtime": "envoy.wasm.runtime.v8",
                                                   "code": {"local": {"filename": self.wasm}}}}}}]
            return [self._run("proxy", self._listener(ports["client"], False, filters),
                              [self._cluster(i, ports["backend"], False) for i in range(self.n_services)])]
        h2 = topology.startswith("h2")
        alpn = "h2" if h2 else "http/1.1"
        return [self._run("inbound", self._listener(ports["mtls"], h2, [], self._tls(certs, "inbound", alpn)),
                          [self._cluster(0, ports["backend"], h2)]),
                self._run("outbound", self._listener(ports["client"], h2, []),
                          [self._cluster(0, ports["mtls"], h2, self._tls(certs, "outbound", alpn))])]


# --------------------------------------------------------------------------- nginx
class Nginx(Peer):
    """worker_processes 1 (master counted too); upstream keepalive pool; no HTTP/2 to upstreams."""
    name = "nginx"
    topologies = ("h1-single", "h1-mtls-pair")
    bin = os.environ.get("NGINX_BIN") or shutil.which("nginx") or shutil.which("/usr/sbin/nginx")

    def supports(self, topology):
        if topology == "h2-mtls-pair":
            return "n/a: no HTTP/2 to upstreams"
        return super().supports(topology)

    CONF = """daemon off; worker_processes 1; pid {d}/nginx-{role}.pid; error_log stderr crit; user root;
worker_rlimit_nofile 40000;
events {{ worker_connections 20000; }}
http {{
  access_log off; server_tokens off; keepalive_timeout 300s; keepalive_requests {big};
  client_body_buffer_size 64k; server_names_hash_max_size 8192; server_names_hash_bucket_size 128;
  client_body_temp_path {d}/{role}-b; proxy_temp_path {d}/{role}-p; fastcgi_temp_path {d}/{role}-f;
  uwsgi_temp_path {d}/{role}-u; scgi_temp_path {d}/{role}-s;
  proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host $http_host;
{tls}
{upstreams}
{servers}
}}
"""

    def _run(self, role, port, up_port, listen_tls=False, up_tls=None, certs=None):
        ups, srvs = [], []
        for i in range(self.n_services):
            # one "server" per distinct endpoint; equal ones are legal and counted apart
            eps = " ".join("server %s:%d max_fails=0;" % e for e in self.endpoints(i, up_port))
            ups.append("  upstream u%d { %s keepalive 256; keepalive_requests %d; keepalive_timeout 300s; }" % (i, eps, BIG))
            listen = "listen 127.0.0.1:%d%s%s;" % (port, " ssl" if listen_tls else "", " default_server backlog=8192" if i == 0 else "")
            srvs.append("  server { %s server_name svc-%d.mesh; location / { proxy_pass %s://u%d; } }" % (
                listen, i, "https" if up_tls else "http", i))
        tls = ""
        if listen_tls:
            tls = ("  ssl_certificate {inbound_crt}; ssl_certificate_key {inbound_key}; ssl_client_certificate {ca};\n"
                   "  ssl_verify_client on; ssl_protocols TLSv1.3; ssl_conf_command Ciphersuites " + SUITE + ";").format(**certs)
        if up_tls:
            tls = ("  proxy_ssl_certificate {outbound_crt}; proxy_ssl_certificate_key {outbound_key};\n"
                   "  proxy_ssl_trusted_certificate {ca}; proxy_ssl_verify on; proxy_ssl_verify_depth 2;\n"
                   "  proxy_ssl_name {inbound_san}; proxy_ssl_server_name on; proxy_ssl_protocols TLSv1.3;\n"
                   "  proxy_ssl_conf_command Ciphersuites " + SUITE + ";").format(**certs)
        conf = self.CONF.format(d=self.dir, role=role, big=BIG, tls=tls, upstreams="\n".join(ups), servers="\n".join(srvs))
        return self.spawn([self.bin, "-p", self.dir, "-c", self.file("nginx-%s.conf" % role, conf)], role)

    def start(self, topology, ports, certs):
        if topology == "h1-single":
            return [self._run("proxy", ports["client"], ports["backend"])]
        return [self._run("inbound", ports["mtls"], ports["backend"], listen_tls=True, certs=certs),
                self._run("outbound", ports["client"], ports["mtls"], up_tls=True, certs=certs)]


# --------------------------------------------------------------------------- HAProxy
class Haproxy(Peer):
    """nbthread 1, http-reuse always (shared upstream pool, as the others do)."""
    name = "haproxy"
    topologies = ("h1-single", "h1-mtls-pair", "h2-mtls-pair")
    bin = os.environ.get("HAPROXY_BIN") or shutil.which("haproxy") or shutil.which("/usr/sbin/haproxy")

    CONF = """global
  nbthread 1
  maxconn 9000
  ssl-default-bind-ciphersuites {suite}
  ssl-default-server-ciphersuites {suite}
defaults
  mode http
  timeout connect 2s
  timeout client 300s
  timeout server 300s
  timeout http-keep-alive 300s
  http-reuse always
frontend f
  bind 127.0.0.1:{port} backlog 8192 {bind}
  {use}
  default_backend b0
{backends}
"""

    def _run(self, role, port, up_port, bind="", server=""):
        backs, use = [], ""
        for i in range(self.n_services):
            eps = "\n".join("  server s%d %s:%d %s" % (k, ip, p, server) for k, (ip, p) in enumerate(self.endpoints(i, up_port)))
            backs.append("backend b%d\n  balance roundrobin\n%s" % (i, eps))
        if self.n_services > 1:
            m = self.file("haproxy-%s.map" % role, "".join("svc-%d.mesh b%d\n" % (i, i) for i in range(self.n_services)))
            use = "use_backend %%[req.hdr(host),field(1,:),lower,map_str(%s,b0)]" % m
        conf = self.CONF.format(suite=SUITE, port=port, bind=bind, use=use, backends="\n".join(backs))
        return self.spawn([self.bin, "-db", "-q", "-f", self.file("haproxy-%s.cfg" % role, conf)], role)

    def start(self, topology, ports, certs):
        if topology == "h1-single":
            return [self._run("proxy", ports["client"], ports["backend"])]
        h2 = topology.startswith("h2")
        alpn = "h2" if h2 else "http/1.1"
        bind = "ssl crt {inbound_pem} ca-file {ca} verify required ssl-min-ver TLSv1.3 alpn ".format(**certs) + alpn
        srv = ("ssl crt {outbound_pem} ca-file {ca} verify required verifyhost {inbound_san} sni str({inbound_san}) "
               "ssl-min-ver TLSv1.3 alpn ").format(**certs) + alpn
        return [self._run("inbound", ports["mtls"], ports["backend"], bind=bind, server="proto h2" if h2 else ""),
                self._run("outbound", ports["client"], ports["mtls"], bind="proto h2" if h2 else "", server=srv)]


# --------------------------------------------------------------------------- Outrigger
class Outrigger(Peer):
    """Explicit mode from a directory, with identities from files: documented flags and resources only. What a user
    gets by default stays on: routing, balancing, outlier detection, authorization, metrics, trace context; limits are
    put out of the way as for the others. One worker. The proxy keeps its default access log mode (Errors)."""
    name = "outrigger"
    topologies = ("h1-single", "h1-mtls-pair", "h2-mtls-pair", "wasm-headers")
    bin = os.environ.get("OUTRIGGER_BIN") or shutil.which("outrigger-proxy", path=os.environ.get("OUTRIGGER_BIN_DIR", ""))
    DOMAIN = "mesh.test"

    def spiffe(self, account):
        return "spiffe://%s/ns/default/sa/%s" % (self.DOMAIN, account)

    def _resources(self, role, docs):
        d = os.path.join(self.dir, role)
        os.makedirs(d, exist_ok=True)
        docs = [{"apiVersion": "outrigger.dev/v1alpha1", "kind": "MeshConfig", "metadata": {"name": "default"},
                 "spec": {"trustDomain": self.DOMAIN}}] + docs
        with open(os.path.join(d, "mesh.yaml"), "w") as f:
            f.write("\n---\n".join(json.dumps(x) for x in docs))  # JSON is YAML
        return d

    def _services(self, port, h2, identity=None, inbound=None):
        """svc-N of namespace mesh. Its endpoints are Workloads with the identity they must prove, reached at their
        proxy's inbound port, or else an EndpointSlice: addresses with no sidecar, plaintext."""
        proto, docs = ("h2" if h2 else "http1"), []
        for i in range(self.n_services):
            name, ends = "svc-%d" % i, self.endpoints(i, port)
            spec = {"ports": [{"name": "http", "port": 80, "targetPort": ends[0][1], "appProtocol": "kubernetes.io/h2c" if h2 else "http"}]}
            docs.append({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "mesh"}, "spec": spec})
            if identity:
                spec["selector"] = {"app": name}
                docs += [{"apiVersion": "outrigger.dev/v1alpha1", "kind": "Workload",
                          "metadata": {"name": "%s-%d" % (name, k), "namespace": "mesh", "labels": {"app": name}},
                          "spec": {"address": ip, "inboundPort": inbound, "ports": [{"name": "http", "port": p, "protocol": proto}], "identity": identity}}
                         for k, (ip, p) in enumerate(ends)]
            else:
                docs.append({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
                             "metadata": {"name": name, "namespace": "mesh", "labels": {"kubernetes.io/service-name": name}},
                             "ports": [{"name": "http", "port": ends[0][1]}], "endpoints": [{"addresses": [ip]} for ip, _ in ends]})
        docs.append({"apiVersion": "outrigger.dev/v1alpha1", "kind": "TrafficPolicy", "metadata": {"name": "limits", "namespace": "mesh"}, "spec": {
            "targetRefs": [{"group": "", "kind": "Namespace", "name": "mesh"}],
            "circuitBreaker": {"maxConnections": 1000000, "maxPendingRequests": 1000000, "maxRequests": 1000000}}})
        return docs

    def _run(self, role, docs, flags, certs=None):
        argv = [self.bin, "--config", self._resources(role, docs), "--namespace", "mesh", "--name", role, "--workers", "1",
                "--admin", "127.0.0.1:0", "--health", "127.0.0.1:0"] + flags
        if certs:
            argv += ["--cert-file", certs[role + "_crt"], "--key-file", certs[role + "_key"], "--ca-file", certs["ca"],
                     "--service-account", role]
        return self.spawn(argv, role)

    def start(self, topology, ports, certs):
        h2 = topology.startswith("h2")
        client, none = "127.0.0.1:%d" % ports["client"], "127.0.0.1:0"
        if not topology.endswith("-pair"):
            docs = self._services(ports["backend"], False)
            if topology == "wasm-headers":
                docs.append({"apiVersion": "outrigger.dev/v1alpha1", "kind": "WasmFilter", "metadata": {"name": "f", "namespace": "mesh"}, "spec": {
                    "targetRefs": [{"group": "", "kind": "Service", "name": "svc-0"}], "direction": "Outbound",
                    "module": {"file": self.wasm}}})
            return [self._run("proxy", docs, ["--outbound", client, "--inbound", none])]
        app = "http=127.0.0.1:%d/%s" % (ports["backend"], "h2" if h2 else "http1")
        strict = [{"apiVersion": "outrigger.dev/v1alpha1", "kind": "MtlsPolicy", "metadata": {"name": "strict", "namespace": "mesh"},
                   "spec": {"mode": "Strict"}}]
        return [self._run("inbound", strict, ["--app", app, "--inbound", "127.0.0.1:%d" % ports["mtls"], "--outbound", none], certs),
                self._run("outbound", self._services(ports["backend"], h2, self.spiffe("inbound"), ports["mtls"]),
                          ["--outbound", client, "--inbound", none], certs)]


ALL = {p.name: p for p in (Direct, Envoy, Nginx, Haproxy, Outrigger)}
