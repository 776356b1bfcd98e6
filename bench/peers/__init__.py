"""One module per proxy under test ("peer"). The harness knows nothing else about a proxy.

A peer has: name; supports(topology) -> None, or the reason why not; start(topology, ports, certs)
-> list of Popen (each made with self.spawn, which pins it and tags it with .role).

topology: "h1-single" | "h1-inbound" | "h1-mtls-pair" | "h2-mtls-pair" | "h1-wasm" | "tcp-single" | "tcp-mtls-pair"
ports:    client  = entry port, plaintext (h1, or h2c for h2-*), 127.0.0.1
          mtls    = inbound sidecar's TLS port (pairs only)
          backend = backend port (h1 and h2c on the same port; or opaque)
certs:    paths: ca, inbound_crt/_key/_pem, outbound_crt/_key/_pem; names: inbound_san, outbound_san
"""
from .base import Direct, Options, Peer
from .envoy import Envoy
from .haproxy import Haproxy
from .nginx import Nginx
from .outrigger import Outrigger

__all__ = ["ALL", "Direct", "Envoy", "Haproxy", "Nginx", "Options", "Outrigger", "Peer"]
ALL = {p.name: p for p in (Direct, Envoy, Nginx, Haproxy, Outrigger)}
