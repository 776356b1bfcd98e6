"""Envoy."""
import json
import os
import shutil

from .base import BIG, Peer

GROUPS = {"x25519": "X25519", "x25519mlkem768": "X25519MLKEM768"}


def _t(name):
    return "type.googleapis.com/envoy." + name


class Envoy(Peer):
    """Follows Envoy's own "best practices for benchmarking" page: release binary, --concurrency 1,
    generate_request_id off, router dynamic_stats off, circuit breakers out of the way, no access
    log. All other stats stay on (a mesh needs them)."""
    name = "envoy"
    topologies = ("h1-single", "h1-inbound", "h1-mtls-pair", "h2-mtls-pair", "h1-wasm", "tcp-single", "tcp-mtls-pair")
    bin = os.environ.get("ENVOY_BIN") or shutil.which("envoy")

    def _addr(self, ip, port):
        return {"socket_address": {"address": ip, "port_value": port}}

    def _listener(self, port, h2, filters, tls=None):
        vhosts = []
        for i in range(self.options.services):
            dom = ["svc-%d.mesh" % i, "svc-%d.mesh:*" % i]
            vhosts.append({"name": "v%d" % i, "domains": dom + (["*"] if i == 0 else []), "routes": [
                {"match": {"prefix": "/"}, "route": {"cluster": "c%d" % i, "timeout": "0s"}}]})
        hcm = {"@type": _t("extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"),
               "stat_prefix": "in", "codec_type": "HTTP2" if h2 else "HTTP1",
               "generate_request_id": False,
               "route_config": {"name": "r", "virtual_hosts": vhosts},
               "http_filters": filters + [{"name": "envoy.filters.http.router", "typed_config": {
                   "@type": _t("extensions.filters.http.router.v3.Router"), "dynamic_stats": False}}]}
        if self.options.upgrades:
            hcm["upgrade_configs"] = [{"upgrade_type": "websocket"}]
        return self._listen(port, {"name": "hcm", "typed_config": hcm}, tls)

    def _opaque(self, port, tls=None):
        return self._listen(port, {"name": "tcp", "typed_config": {
            "@type": _t("extensions.filters.network.tcp_proxy.v3.TcpProxy"), "stat_prefix": "in", "cluster": "c0"}}, tls)

    def _listen(self, port, network_filter, tls):
        chain = {"filters": [network_filter]}
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
        params = {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"}
        if self.options.group:
            params["ecdh_curves"] = [GROUPS[self.options.group]]
        ctx = {"tls_params": params,
               "tls_certificates": [{"certificate_chain": {"filename": certs[side + "_crt"]},
                                     "private_key": {"filename": certs[side + "_key"]}}],
               "validation_context": {"trusted_ca": {"filename": certs["ca"]}}}
        if alpn:
            ctx["alpn_protocols"] = [alpn]
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
        return self.spawn([self.bin, "-c", path, "--concurrency", str(self.options.workers), "--disable-hot-restart", "-l", "error"], role)

    def start(self, topology, ports, certs):
        h2 = topology.startswith("h2")
        if not topology.endswith("-pair"):
            if topology == "tcp-single":
                return [self._run("proxy", self._opaque(ports["client"]), [self._cluster(0, ports["backend"], False)])]
            filters = []
            if topology == "h1-wasm":
                filters = [{"name": "envoy.filters.http.wasm", "typed_config": {
                    "@type": _t("extensions.filters.http.wasm.v3.Wasm"), "config": {
                        "name": "f", "vm_config": {"vm_id": "f", "runtime": "envoy.wasm.runtime.v8",
                                                   "code": {"local": {"filename": self.options.wasm}}}}}}]
            return [self._run("proxy", self._listener(ports["client"], h2, filters),
                              [self._cluster(i, ports["backend"], h2) for i in range(self.options.services)])]
        alpn = {"h1": "http/1.1", "h2": "h2", "tc": None}[topology[:2]]
        sides = [("inbound", "mtls", "backend"), ("outbound", "client", "mtls")]
        procs = []
        for side, entry, to in sides:
            tls = self._tls(certs, side, alpn)
            down, up = (tls, None) if side == "inbound" else (None, tls)
            listener = self._listener(ports[entry], h2, [], down) if alpn else self._opaque(ports[entry], down)
            procs.append(self._run(side, listener, [self._cluster(0, ports[to], h2, up)]))
        return procs
