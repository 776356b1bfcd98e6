"""The comparison's own configuration of Outrigger, checked as bench/bench.py checks every peer before it measures.

bench_peer.py TOPOLOGY: verifies (200, body, echo, traceparent; what is forbidden gets 403; no client certificate and a foreign one
are refused), then that the counters see each of a number of requests, and that a round in which one is missing is invalid
bench_peer.py wrong-san: prints what came of a server with another identity
The proxy's binary is in OUTRIGGER_BIN, the filter of h1-wasm in WASM_FILTER.
"""

import os
import pathlib
import sys
import tempfile
import types

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "bench"))
from harness import Invalid, check, prepare, process, session  # noqa: E402

BACKEND = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *a): pass
    def answer(self, body):
        self.send_response(200)
        for name, back in (("x-filter", "x-reflect-filter"), ("traceparent", "x-backend-traceparent")):
            if self.headers.get(name):
                self.send_header(back, self.headers[name])
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


def counted(s):
    counters = check.Counters(s.peer)
    for _ in range(3):
        check.http1(s.ports["client"])
    counters.check("http", 3)
    try:
        counters.check("http", 4, secs=0)
    except Invalid:
        return
    raise Invalid("a round with a request too few counts")


def main(topology):
    with tempfile.TemporaryDirectory() as folder:
        run = types.SimpleNamespace(tmp=folder, wasm=os.environ.get("WASM_FILTER"), tool=Backend(folder).path, cli=None, effective={})
        run.certs = prepare.make_certs(folder)
        try:
            if topology == "wrong-san":
                print(session.wrong_san(run, "outrigger"))
                return
            with session.Session(run, "outrigger", topology) as s:
                counted(s)
                print("verified")
        except Invalid as invalid:
            sys.exit(str(invalid))
        finally:
            process.stop(list(process.STARTED))


main(sys.argv[1])
