#!/usr/bin/env python3
"""Instructions and allocations per request, against bench/budget.json: what a stopwatch cannot tell on a busy machine.

The proxy is the one that is released, but for link-time optimisation (profile `profiling`); it runs under callgrind, in
explicit mode from a directory, with one worker and everything a user gets by default. One client sends one request after
the other, so that what is counted hardly depends on the machine. Counted is what lies between two reads of /stats, with
a few hundred requests before the first: callgrind writes its counts down whenever the admin endpoint makes them up.

    bench/budget.py [--only NAME[,NAME…]] [--update] [--keep DIR]
"""
import argparse, glob, json, os, re, shutil, socket, struct, subprocess, sys, tempfile, threading, time, urllib.error, urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
BUDGET = os.path.join(HERE, "budget.json")
WARM, MEASURED = 200, 500
# More than this above the budget fails; as much below asks for an update.
TOLERANCE = {"instructions": 0.03, "allocations": 0.03}
BODY = b"x" * 1024
WASM_FILTER = os.environ.get("WASM_FILTER", os.path.expanduser("~/.cache/outrigger/filters/bench_filter.wasm"))
ALLOCATING = re.compile(r"^(_rjem_(malloc|calloc|mallocx|realloc|rallocx)|malloc|calloc|realloc|posix_memalign|aligned_alloc)$")


# ------------------------------------------------------------------------------------------------ what callgrind wrote
class Profile:
    """One file of callgrind: its total, the calls of each function, and the inclusive cost of each function's calls."""

    def __init__(self, path):
        self.total, self.calls, self.inclusive = 0, {}, {}
        names, callee = {}, None
        with open(path) as lines:
            for line in lines:
                if line.startswith("cfn="):
                    number, _, name = line[4:].rstrip("\n").partition(" ")
                    if name:
                        names[number] = name
                    callee = names[number]
                elif line.startswith("fn="):
                    number, _, name = line[3:].rstrip("\n").partition(" ")
                    if name:
                        names[number] = name
                elif line.startswith("calls="):
                    self.calls[callee] = self.calls.get(callee, 0) + int(line[6:].split()[0])
                    cost = int(next(lines).split()[1])
                    self.inclusive[callee] = self.inclusive.get(callee, 0) + cost
                elif line.startswith(("summary:", "totals:")):
                    self.total = max(self.total, int(line.split()[1]))

    def instructions(self):
        """Without the thread that limits filters' time: it counts milliseconds, not requests."""
        return self.total - self.inclusive.get("outrigger_proxy::filter::wasm::ticker::run", 0)

    def allocations(self):
        return sum(calls for name, calls in self.calls.items() if ALLOCATING.match(name))


def callgrind(directory, name, argv, *options):
    out = os.path.join(directory, name + ".callgrind")
    return out, ["valgrind", "--tool=callgrind", "--callgrind-out-file=" + out, *options, *argv]


# ------------------------------------------------------------------------------------------------ client and application
def read_message(sock):
    """Reads one HTTP/1 message with a content-length, in chunks (without trailers), or without a body; None at the end of the stream."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = sock.recv(65536)
        if not more:
            return None
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    while b"transfer-encoding: chunked" in head.lower() and not body.endswith(b"\r\n0\r\n\r\n"):
        more = sock.recv(65536)
        if not more:
            return None
        body += more
    length = re.search(rb"content-length: *(\d+)", head, re.I)
    missing = (int(length.group(1)) if length else 0) - len(body)
    while missing > 0:
        more = sock.recv(65536)
        if not more:
            return None
        body, missing = body + more, missing - len(more)
    return head, body


class Http1:
    """GET, or POST of 16 KiB."""

    def __init__(self, post=False):
        body = b"y" * 16384 if post else b""
        self.request = b"%s /reviews/1?a=b HTTP/1.1\r\nhost: svc\r\nuser-agent: budget\r\naccept: */*\r\n" % (b"POST" if post else b"GET")
        self.request += (b"content-length: %d\r\n\r\n" % len(body) if post else b"\r\n") + body

    def serve(self, sock):
        while (message := read_message(sock)) is not None:
            body = message[1] or BODY
            sock.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: %d\r\n\r\n" % len(body) + body)

    def connect(self, port):
        self.sock = connected(port)

    def call(self):
        self.sock.sendall(self.request)
        message = read_message(self.sock)
        if message is None or not message[0].startswith(b"HTTP/1.1 200 "):
            raise SystemExit("budget: the proxy answered %r" % (message,))


class Http2:
    """GET, one stream after the other, with as much of RFC 9113 as that takes."""
    PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    DATA, HEADERS, SETTINGS, PING, WINDOW = 0, 1, 4, 6, 8
    END_STREAM, END_HEADERS, ACK = 1, 4, 1

    @staticmethod
    def frame(kind, flags, stream, payload=b""):
        return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload

    def exactly(self, sock, n):
        data = b""
        while len(data) < n:
            more = sock.recv(n - len(data))
            if not more:
                return None
            data += more
        return data

    def frames(self, sock):
        """Frames as they come; settings and pings are acknowledged."""
        while (head := self.exactly(sock, 9)) is not None:
            length, kind, flags, stream = int.from_bytes(head[:3], "big"), head[3], head[4], int.from_bytes(head[5:], "big")
            payload = self.exactly(sock, length) if length else b""
            if kind in (self.SETTINGS, self.PING) and not flags & self.ACK:
                sock.sendall(self.frame(kind, self.ACK, 0, payload if kind == self.PING else b""))
            yield kind, flags, stream

    def hello(self):
        return self.frame(self.SETTINGS, 0, 0) + self.frame(self.WINDOW, 0, 0, struct.pack(">I", 1 << 30))

    def serve(self, sock):
        if self.exactly(sock, len(self.PREFACE)) is None:
            return
        sock.sendall(self.hello())
        # :status 200, and content-length as a literal that is not indexed.
        head = b"\x88\x0f\x0d\x04%d" % len(BODY)
        for kind, flags, stream in self.frames(sock):
            if kind in (self.HEADERS, self.DATA) and flags & self.END_STREAM:
                sock.sendall(self.frame(self.HEADERS, self.END_HEADERS, stream, head) + self.frame(self.DATA, self.END_STREAM, stream, BODY))

    def connect(self, port):
        self.sock, self.stream = connected(port), 1
        self.sock.sendall(self.PREFACE + self.hello())
        self.incoming = self.frames(self.sock)

    def call(self):
        # :method GET, :scheme http, then :path, :authority and user-agent as literals that are not indexed.
        literal = lambda index, text: index + bytes([len(text)]) + text
        head = b"\x82\x86" + literal(b"\x04", b"/reviews/1?a=b") + literal(b"\x01", b"svc") + literal(b"\x0f\x2b", b"budget")
        self.sock.sendall(self.frame(self.HEADERS, self.END_HEADERS | self.END_STREAM, self.stream, head))
        for kind, flags, stream in self.incoming:
            if stream == self.stream and flags & self.END_STREAM and kind in (self.HEADERS, self.DATA):
                if kind == self.HEADERS:
                    raise SystemExit("budget: a response without a body")
                self.stream += 2
                return
        raise SystemExit("budget: the proxy closed the connection")


def connected(port):
    sock = socket.create_connection(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def application(protocol):
    """Serves until the process ends; returns its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def accept():
        while True:
            sock = listener.accept()[0]
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=protocol.serve, args=(sock,), daemon=True).start()
    threading.Thread(target=accept, daemon=True).start()
    return listener.getsockname()[1]


# ------------------------------------------------------------------------------------------------ the proxies
def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def certificates(d):
    """A CA, and the identities `outbound` and `inbound`."""
    def openssl(*args):
        done = subprocess.run(["openssl", *args], cwd=d, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit("openssl: " + done.stderr)
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    openssl("req", "-x509", *key, "-days", "2", "-subj", "/CN=ca", "-keyout", "ca.key", "-out", "ca.crt",
            "-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign")
    for name in ("outbound", "inbound"):
        with open(os.path.join(d, name + ".ext"), "w") as f:
            f.write("basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\nextendedKeyUsage=serverAuth,clientAuth\n"
                    "subjectAltName=URI:spiffe://mesh.test/ns/default/sa/%s\n" % name)
        openssl("req", *key, "-subj", "/CN=" + name, "-keyout", name + ".key", "-out", name + ".csr")
        openssl("x509", "-req", "-in", name + ".csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2",
                "-extfile", name + ".ext", "-out", name + ".crt")


def resource(kind, name, spec, api="outrigger.dev/v1alpha1", **metadata):
    body = {"apiVersion": api, "kind": kind, "metadata": {"name": name, "namespace": "mesh", **metadata}}
    return body | (spec if kind == "EndpointSlice" else {"spec": spec})


def mesh():
    return {"apiVersion": "outrigger.dev/v1alpha1", "kind": "MeshConfig", "metadata": {"name": "default"}, "spec": {"trustDomain": "mesh.test"}}


def outbound_resources(h2, app, inbound):
    """The service `svc`: behind the proxy at port `inbound`, or plaintext at the application's."""
    port = {"name": "http", "port": 80, "targetPort": app, "appProtocol": "kubernetes.io/h2c" if h2 else "http"}
    docs = [mesh(), resource("Service", "svc", {"ports": [port]} | ({"selector": {"app": "svc"}} if inbound else {}), api="v1")]
    if inbound:
        docs.append(resource("Workload", "svc-0", {
            "address": "127.0.0.1", "inboundPort": inbound, "identity": "spiffe://mesh.test/ns/default/sa/inbound",
            "ports": [{"name": "http", "port": app, "protocol": "h2" if h2 else "http1"}]}, labels={"app": "svc"}))
    else:
        docs.append(resource("EndpointSlice", "svc", {
            "addressType": "IPv4", "ports": [{"name": "http", "port": app}], "endpoints": [{"addresses": ["127.0.0.1"]}]},
            api="discovery.k8s.io/v1", labels={"kubernetes.io/service-name": "svc"}))
    return docs


def filter_resource():
    """The filter of bench/wasm at the service `svc`: three header calls, and every callback that the Rust SDK exports."""
    return resource("WasmFilter", "three-calls", {"targetRefs": [{"group": "", "kind": "Service", "name": "svc"}], "direction": "Outbound",
                                                  "module": {"file": WASM_FILTER}})


def inbound_resources():
    """Strict mTLS, and ten rules of which the last one matches."""
    rule = lambda i: {"from": [{"principals": ["spiffe://mesh.test/ns/default/sa/" + ("outbound" if i == 9 else "other-%d" % i)]}],
                      "to": [{"paths": ["/reviews*" if i == 9 else "/other-%d*" % i]}]}
    return [mesh(), resource("MtlsPolicy", "strict", {"mode": "Strict"}),
            resource("AuthorizationPolicy", "ten", {"action": "Allow", "rules": [rule(i) for i in range(10)]})]


class Proxy:
    def __init__(self, binary, directory, role, docs, flags, certs, count=True):
        self.role, self.dir, self.admin = role, directory, free_port()
        config = os.path.join(directory, role)
        os.makedirs(config, exist_ok=True)
        with open(os.path.join(config, "mesh.yaml"), "w") as f:
            f.write("\n---\n".join(json.dumps(doc) for doc in docs))
        argv = [binary, "--config", config, "--namespace", "mesh", "--name", role, "--workers", "1",
                "--admin", "127.0.0.1:%d" % self.admin, "--health", "127.0.0.1:0", *flags]
        if certs:
            argv += ["--cert-file", certs + "/%s.crt" % role, "--key-file", certs + "/%s.key" % role,
                     "--ca-file", certs + "/ca.crt", "--service-account", role]
        if count:
            self.out, argv = callgrind(directory, role, argv, "--dump-before=*outrigger_proxy::admin::Admin::stats*")
        else:
            argv = ["valgrind", "--tool=none", "--trace-children=yes", *argv]
        self.log = os.path.join(directory, role + ".log")
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(argv, stdout=log, stderr=log)

    def get(self, path):
        with urllib.request.urlopen("http://127.0.0.1:%d%s" % (self.admin, path), timeout=60) as response:
            return json.loads(response.read()) if path == "/stats" else response.read()

    def wait_ready(self):
        end = time.monotonic() + 120
        while True:
            try:
                return self.get("/ready")
            except OSError:
                if self.process.poll() is not None or time.monotonic() > end:
                    raise SystemExit("budget: %s did not start:\n%s" % (self.role, open(self.log).read()))
                time.sleep(0.1)

    def dumped(self):
        """Has the counts since the last time written down, and reads them."""
        requests = sum(worker["requests"] for worker in self.get("/stats")["workers"])
        files = sorted(glob.glob(self.out + ".*"), key=lambda path: int(path.rsplit(".", 1)[1]))
        if not files:
            raise SystemExit("budget: callgrind wrote nothing: is the function that answers /stats called otherwise now?")
        for path in files[:-1]:
            os.remove(path)
        shutil.move(files[-1], self.out + "-read")
        return requests, Profile(self.out + "-read")

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()


def compiled(binary, directory, docs, flags, port):
    """A directory for --state with the filter compiled: for the processor that valgrind shows, but without counting, which takes longer than
    the compiler has."""
    ready, state = os.path.expanduser("~/.cache/outrigger/budget/filters"), os.path.join(directory, "state")
    os.mkdir(state, 0o700)
    if os.path.isdir(ready):
        shutil.copytree(ready, state + "/filters")
    proxy = Proxy(binary, directory, "outbound", docs, [*flags, "--state", state], None, count=False)
    try:
        proxy.wait_ready()
        wait_served(port)
    finally:
        proxy.stop()
    shutil.rmtree(ready, ignore_errors=True)
    shutil.copytree(state + "/filters", ready)
    return state


def wait_served(port):
    """Until requests pass through the filter."""
    end = time.monotonic() + 300
    while True:
        try:
            return urllib.request.urlopen(urllib.request.Request("http://127.0.0.1:%d/" % port, headers={"host": "svc"}), timeout=60).read()
        except urllib.error.HTTPError as error:
            if error.code != 503 or time.monotonic() > end:
                raise SystemExit("budget: with a filter the proxy answered %d %s" % (error.code, error.read()))
            time.sleep(0.5)


def measure(binary, directory, protocol, pair, filtered):
    """{role: {instructions, allocations}} per request."""
    h2 = isinstance(protocol, Http2)
    app, client = application(protocol), free_port()
    inbound = free_port() if pair else None
    proxies, certs = [], os.path.join(directory, "certs")
    if pair:
        os.mkdir(certs)
        certificates(certs)
        flags = ["--app", "http=127.0.0.1:%d/%s" % (app, "h2" if h2 else "http1"), "--inbound", "127.0.0.1:%d" % inbound, "--outbound", "127.0.0.1:0"]
        proxies.append(Proxy(binary, directory, "inbound", inbound_resources(), flags, certs))
    flags = ["--outbound", "127.0.0.1:%d" % client, "--inbound", "127.0.0.1:0"]
    docs = outbound_resources(h2, app, inbound)
    if filtered:
        docs.append(filter_resource())
        flags += ["--state", compiled(binary, directory, docs, flags, client)]
    proxies.append(Proxy(binary, directory, "outbound", docs, flags, pair and certs))
    try:
        for proxy in proxies:
            proxy.wait_ready()
        if filtered:
            wait_served(client)
        protocol.connect(client)
        for _ in range(WARM):
            protocol.call()
        before = {proxy.role: proxy.dumped()[0] for proxy in proxies}
        for _ in range(MEASURED):
            protocol.call()
        found = {}
        for proxy in proxies:
            requests, profile = proxy.dumped()
            if requests - before[proxy.role] != MEASURED:
                raise SystemExit("budget: %s counted %d requests of %d" % (proxy.role, requests - before[proxy.role], MEASURED))
            found[proxy.role] = {"instructions": round(profile.instructions() / MEASURED), "allocations": round(profile.allocations() / MEASURED, 1)}
        return found
    finally:
        for proxy in proxies:
            proxy.stop()


PROXY = {
    # Protocol, behind a second proxy, with a filter
    "h1-single": lambda: (Http1(), False, False),
    "h1-filter": lambda: (Http1(), False, True),
    "h1-mtls-pair": lambda: (Http1(), True, False),
    "h1-mtls-pair-post16k": lambda: (Http1(post=True), True, False),
    "h2-mtls-pair": lambda: (Http2(), True, False),
}


def measure_core(binary, directory):
    out, argv = callgrind(directory, "core", [binary])
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit("budget: core-budget failed:\n" + done.stderr)
    profile = Profile(out)
    counted = {name: re.fullmatch(r".*core_budget::counted::(\w+)(?:::h[0-9a-f]+)?", name) for name in profile.calls}
    return {"core/" + match[1]: {"instructions": round(profile.inclusive[name] / profile.calls[name])}
            for name, match in counted.items() if match}


# ------------------------------------------------------------------------------------------------ the verdict
def compare(found, budget):
    """Lines of those above and of those below."""
    above, below = [], []
    for name, values in sorted(found.items()):
        for what, value in values.items():
            limit = budget.get(name, {}).get(what)
            if limit is None:
                above.append("%s: %s: no budget yet (now %s)" % (name, what, value))
                continue
            # Half an allocation or a few instructions are no news.
            slack = max(limit * TOLERANCE[what], 0.5 if what == "allocations" else 20)
            change = "%s: %s: %s, budget %s (%+.1f %%)" % (name, what, value, limit, 100 * (value / limit - 1) if limit else 0)
            if value > limit + slack:
                above.append(change)
            elif value < limit - slack:
                below.append(change)
    return above, below


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="of: core, " + ", ".join(PROXY))
    parser.add_argument("--update", action="store_true", help="write what was found to bench/budget.json")
    parser.add_argument("--keep", metavar="DIR", help="keep callgrind's files here, for callgrind_annotate")
    args = parser.parse_args()
    target = os.environ.get("CARGO_TARGET_DIR", "target") + "/profiling/"
    wanted = args.only.split(",") if args.only else ["core", *PROXY]
    found = {}
    base = tempfile.mkdtemp(prefix="outrigger-budget-")
    try:
        for name in wanted:
            directory = os.path.join(args.keep or base, name)
            shutil.rmtree(directory, ignore_errors=True)
            os.makedirs(directory)
            if name == "core":
                found |= measure_core(target + "core-budget", directory)
            else:
                found |= {name + "/" + role: values for role, values in measure(target + "outrigger-proxy", directory, *PROXY[name]()).items()}
    finally:
        shutil.rmtree(base, ignore_errors=True)
    budget = json.load(open(BUDGET)) if os.path.exists(BUDGET) else {}
    print("%-34s %28s %22s" % ("", "instructions (budget)", "allocations (budget)"))
    for name, values in sorted(found.items()):
        cell = lambda what: "%s (%s)" % (values[what], budget.get(name, {}).get(what, "–")) if what in values else ""
        print("%-34s %28s %22s" % (name, cell("instructions"), cell("allocations")))
    if args.update:
        with open(BUDGET, "w") as f:
            json.dump(dict(sorted((budget | found).items())), f, indent=1)
            f.write("\n")
        print("==> %s updated: commit it with the change that moved it" % os.path.relpath(BUDGET))
        return
    above, below = compare(found, budget)
    missing = [] if args.only else sorted(set(budget) - set(found))
    for line in below:
        print("below its budget: " + line)
    for line in above:
        print("ABOVE ITS BUDGET: " + line)
    for name in missing:
        print("NOT MEASURED, but in the budget: " + name)
    if above or missing:
        sys.exit("budget: exceeded. If that is the price of something wanted, `make bench-budget ARGS=--update` writes the new figures;\n"
                 "`ARGS=\"--keep DIR --only NAME\"` keeps profiles for callgrind_annotate")
    if below:
        print("==> make bench-budget ARGS=--update keeps what was gained")


if __name__ == "__main__":
    main()
