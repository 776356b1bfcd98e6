"""What the certificate authority and the registry must refuse, asked by grpcio. Prints one JSON object: for each case
the gRPC status name and message (or "accepted"). The caller asserts; this only asks.

Tokens come as --token NAME=TOKEN: a (demo/a, label app=a, single use), a2 (the same, reusable), expired, b (demo/b)."""
import argparse
import json
import time

import grpc

from mesh_client import Control, key_and_csr


def outcome(ask):
    try:
        ask()
        return {"status": "accepted", "message": ""}
    except grpc.RpcError as e:
        return {"status": e.code().name, "message": e.details()}


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--address")
    p.add_argument("--ca")
    p.add_argument("--token", action="append", default=[])
    a = p.parse_args()
    tokens = dict(t.split("=", 1) for t in a.token)
    anyone = Control(a.address, a.ca)
    labels = {"app": "a"}
    got = {}

    def case(name, ask):
        got[name] = outcome(ask)

    case("other-identity", lambda: anyone.sign(tokens["a2"], "demo", "b", "b-0", {}))
    case("other-namespace", lambda: anyone.sign(tokens["a2"], "ops", "a", "a-0", {}))
    case("labels-outside", lambda: anyone.sign(tokens["a2"], "demo", "a", "a-0", {"app": "b"}))
    case("no-credentials", lambda: anyone.sign("", "demo", "a", "a-0", labels))
    # Its life is a second; until then it is good.
    for _ in range(100):
        case("expired", lambda: anyone.sign(tokens["expired"], "demo", "a", "a-0", labels))
        if got["expired"]["status"] != "accepted":
            break
        time.sleep(0.1)
    head, body, signature = tokens["a2"].split(".")
    flipped = signature[:10] + ("A" if signature[10] != "A" else "B") + signature[11:]
    case("tampered", lambda: anyone.sign(".".join([head, body, flipped]), "demo", "a", "a-0", labels))
    held = {}

    def first_use():
        # A CSR that asks for another identity: nothing but its key may count.
        key, csr = key_and_csr("/CN=root/O=evil", "URI:spiffe://cluster.local/ns/ops/sa/admin,DNS:evil.test")
        _, chain, answer = anyone.sign(tokens["a"], "demo", "a", "a-0", labels, csr)
        held.update(key=key, chain=chain, identity=answer.identity)
    case("first-use", first_use)
    case("reused", lambda: anyone.sign(tokens["a"], "demo", "a", "a-0", labels))

    me = Control(a.address, a.ca, held["key"], held["chain"])
    case("renewal", lambda: me.sign("", "demo", "a", "a-0", labels))
    case("renewal-other-identity", lambda: me.sign("", "demo", "b", "a-0", labels))
    case("renewal-other-workload", lambda: me.sign("", "demo", "a", "a-1", labels))
    case("register", lambda: me.register("demo", "a", "a-0", labels))
    case("register-other-workload", lambda: me.register("demo", "a", "a-1", labels))
    case("register-other-account", lambda: me.register("demo", "b", "a-0", labels))
    case("register-other-labels", lambda: me.register("demo", "a", "a-0", {"app": "b"}))
    key, chain, _ = anyone.sign(tokens["b"], "demo", "b", "b-0", {})
    other = Control(a.address, a.ca, key, chain)
    case("withdraw-other", lambda: other.withdraw("demo", "a-0"))
    case("register-as-other", lambda: other.register("demo", "a", "a-0", labels))
    case("withdraw", lambda: me.withdraw("demo", "a-0"))
    case("register-without-certificate", lambda: anyone.register("demo", "a", "a-0", labels))
    got["identity"] = held["identity"]
    got["chain"] = held["chain"].decode()
    print(json.dumps(got))


main()
