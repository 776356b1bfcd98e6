"""The comparison's own configuration of Outrigger, checked as bench/bench.py checks every peer before it measures.

bench_peer.py TOPOLOGY: verifies (200, body, echo; no client certificate and a foreign one are refused)
bench_peer.py wrong-san: prints what came of a server with another identity
The proxy's binary is in OUTRIGGER_BIN, the filter of wasm-headers in WASM_FILTER.
"""

import os
import pathlib
import sys
import tempfile
import types

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "bench"))
import bench  # noqa: E402

BACKEND = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *a): pass
    def answer(self, body):
        self.send_response(200)
        if self.headers.get("x-filter"):
            self.send_header("x-reflect-filter", self.headers["x-filter"])
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self): self.answer(b"x" * 1024)
    def do_POST(self): self.answer(self.rfile.read(int(self.headers["content-length"])))
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


class Backend:
    """What the harness starts as its backend, in Python: enough for verification, and nothing has to be built."""

    def __init__(self, folder):
        self.path = os.path.join(folder, "backend")
        with open(self.path, "w") as f:
            f.write('#!/bin/sh\nexec "%s" -c "$BENCH_BACKEND" "$3"\n' % sys.executable)
        os.chmod(self.path, 0o755)
        os.environ["BENCH_BACKEND"] = BACKEND


def main(topology):
    with tempfile.TemporaryDirectory() as folder:
        run = types.SimpleNamespace(tmp=folder, wasm=os.environ.get("WASM_FILTER"), tool=Backend(folder).path)
        run.certs = bench.make_certs(folder)
        try:
            if topology == "wrong-san":
                print(bench.wrong_san(run, "outrigger"))
                return
            with bench.Session(run, "outrigger", topology):
                print("verified")
        except bench.Invalid as invalid:
            sys.exit(str(invalid))
        finally:
            bench.stop(list(bench.STARTED))


main(sys.argv[1])
