"""A gRPC server and client on grpcio, with plain bytes as messages.

  grpc_peer.py serve PORT [--name NAME]
      /test.Echo/Unary echoes (NAME and the metadata x-tag in trailing metadata), /test.Echo/Stream answers `count` messages,
      /test.Echo/Slow sleeps, /test.Echo/Fail fails with FAILED_PRECONDITION and a message, /test.Echo/Bidi echoes a stream.
  grpc_peer.py call ADDRESS AUTHORITY CASE     one of the cases below; exit code 1 says what differed
      unary | stream | deadline | error | bidi | many | big | status | routes
      status prints {"code", "details", "reason"} of a unary call, whatever it is; routes prints who served
      `unary`, `canary` (metadata x-canary: yes) and `other` (another method): a NAME, or the code it failed with."""
import json
import sys
import threading
import time
from concurrent import futures

import grpc

PAYLOAD = 100_000


def serve(port, name):
    def unary(request, context):
        tag = dict(context.invocation_metadata()).get("x-tag", "")
        context.set_trailing_metadata((("x-served-by", name), ("x-tag", tag)))
        return request

    def stream(request, context):
        for i in range(int(request)):
            yield b"%d:" % i + b"x" * PAYLOAD

    def slow(request, context):
        gone = threading.Event()
        context.add_callback(gone.set)
        gone.wait(30)
        return request

    def fail(request, context):
        context.set_trailing_metadata((("x-why", "asked"),))
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not ready: caf\u00e9")

    def bidi(requests, context):
        for request in requests:
            yield request

    class Handler(grpc.GenericRpcHandler):
        table = {
            "/test.Echo/Unary": grpc.unary_unary_rpc_method_handler(unary),
            "/test.Echo/Stream": grpc.unary_stream_rpc_method_handler(stream),
            "/test.Echo/Slow": grpc.unary_unary_rpc_method_handler(slow),
            "/test.Echo/Fail": grpc.unary_unary_rpc_method_handler(fail),
            "/test.Echo/Bidi": grpc.stream_stream_rpc_method_handler(bidi),
        }

        def service(self, details):
            return self.table.get(details.method)

    server = grpc.server(futures.ThreadPoolExecutor(32))
    server.add_generic_rpc_handlers((Handler(),))
    if not server.add_insecure_port("127.0.0.1:%d" % port if ":" not in str(port) else port):
        sys.exit("cannot listen on %s" % port)
    server.start()
    print("ready", flush=True)
    server.wait_for_termination()


def call(address, authority, case):
    channel = grpc.insecure_channel(address, [("grpc.default_authority", authority), ("grpc.enable_retries", 0)])

    def unary(method, data=b"hello", timeout=15, metadata=()):
        return channel.unary_unary("/test.Echo/" + method).with_call(data, timeout=timeout, metadata=metadata)

    if case == "unary":
        answer, done = unary("Unary", metadata=(("x-tag", "t1"),))
        trailers = dict(done.trailing_metadata())
        assert answer == b"hello" and done.code() == grpc.StatusCode.OK, (answer, done.code())
        assert trailers.get("x-tag") == "t1" and trailers.get("x-served-by"), trailers
        print(json.dumps(trailers))
    elif case == "stream":
        got = list(channel.unary_stream("/test.Echo/Stream")(b"50", timeout=30))
        assert len(got) == 50 and all(m == b"%d:" % i + b"x" * PAYLOAD for i, m in enumerate(got)), [len(m) for m in got]
    elif case == "bidi":
        sent = [b"%d" % i * 1000 for i in range(100)]
        assert list(channel.stream_stream("/test.Echo/Bidi")(iter(sent), timeout=30)) == sent
    elif case == "big":
        answer, _ = unary("Unary", b"y" * 3_000_000)
        assert answer == b"y" * 3_000_000
    elif case == "deadline":
        begun = time.monotonic()
        try:
            unary("Slow", timeout=0.5)
            raise AssertionError("no deadline")
        except grpc.RpcError as e:
            assert e.code() == grpc.StatusCode.DEADLINE_EXCEEDED, e
            assert time.monotonic() - begun < 20
    elif case == "error":
        try:
            unary("Fail")
            raise AssertionError("no error")
        except grpc.RpcError as e:
            assert e.code() == grpc.StatusCode.FAILED_PRECONDITION and e.details() == "not ready: caf\u00e9", e
            assert dict(e.trailing_metadata()).get("x-why") == "asked", e.trailing_metadata()
    elif case == "many":
        # Fifty at once: hundreds are overload to an unoptimised proxy on a busy machine, and it would say so.
        for first in range(0, 500, 50):
            sent = [b"%d" % i for i in range(first, first + 50)]
            calls = [channel.unary_unary("/test.Echo/Unary").future(data, timeout=30) for data in sent]
            assert [c.result() for c in calls] == sent
    elif case == "status":
        try:
            _, done = unary("Unary")
            print(json.dumps({"code": "OK", "served_by": dict(done.trailing_metadata()).get("x-served-by")}))
        except grpc.RpcError as e:
            headers = dict(list(e.initial_metadata() or ()) + list(e.trailing_metadata() or ()))
            print(json.dumps({"code": e.code().name, "details": e.details(), "reason": headers.get("x-outrigger-reason")}))
    elif case == "routes":
        got = {}
        for key, method, metadata in (("unary", "Unary", ()), ("canary", "Unary", (("x-canary", "yes"),)), ("other", "Fail", ())):
            try:
                got[key] = dict(unary(method, metadata=metadata)[1].trailing_metadata()).get("x-served-by")
            except grpc.RpcError as e:
                got[key] = e.code().name
        print(json.dumps(got))
    else:
        sys.exit("unknown case " + case)


if sys.argv[1] == "serve":
    name = sys.argv[sys.argv.index("--name") + 1] if "--name" in sys.argv else "server"
    port = sys.argv[2]
    serve(port if ":" in port else int(port), name)
else:
    call(*sys.argv[2:5])
