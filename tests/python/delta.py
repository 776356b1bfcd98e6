"""The delta stream, seen by grpcio with Envoy's message classes.

  delta.py first     ARGS CONFIG_DIR SAVE   subscribe, NACK one of three, absence, alias, change, removal
  delta.py hold      ARGS                   subscribe, NACK one, stay connected
  delta.py reconnect ARGS SAVE              a new stream that holds what SAVE says: nothing is sent again

ARGS: --address A --ca FILE --token T --namespace NS --account SA --workload W. CONFIG_DIR already holds Services a, b and
c of namespace demo (a with clusterIP 10.96.0.10) and no Service late. Ends with exit code 1 and what differed."""
import argparse
import json
import os

from google.protobuf import any_pb2
from google.rpc import status_pb2
from envoy.service.discovery.v3 import discovery_pb2

import mesh_client
from mesh_client import SERVICE, Control, Stream

LATE = """apiVersion: v1
kind: Service
metadata: {name: %s, namespace: demo}
spec: {selector: {app: %s}, ports: [{name: http, port: %d}]}
"""


def identified(a):
    """A Control with a certificate: saved beside SAVE for the next run."""
    if os.path.exists(a.save):
        saved = json.load(open(a.save))
        return Control(a.address, a.ca, saved["key"].encode(), saved["chain"].encode()), saved
    key, chain, answer = Control(a.address, a.ca).sign(a.token, a.namespace, a.account, a.workload)
    assert answer.identity == "spiffe://cluster.local/ns/%s/sa/%s" % (a.namespace, a.account), answer.identity
    return Control(a.address, a.ca, key, chain), {"key": key.decode(), "chain": chain.decode()}


def write(a, name, port):
    path = os.path.join(a.config, "late-%s.yaml" % name)
    with open(path + ".tmp", "w") as f:
        f.write(LATE % (name, name, port))
    os.rename(path + ".tmp", path)
    return path


def nack(name, why):
    detail = any_pb2.Any()
    detail.Pack(discovery_pb2.ResourceError(resource_name=discovery_pb2.ResourceName(name=name),
                                            error_detail=status_pb2.Status(code=3, message=why)))
    return status_pb2.Status(code=3, message="1 resource refused", details=[detail])


def first(a):
    control, saved = identified(a)
    s = Stream(control, a.workload)
    names = ["svc/demo/a", "svc/demo/b", "svc/demo/c"]
    s.send(subscribe=names)
    versions, nonces = {}, set()
    while set(versions) != set(names):
        m = s.next()
        assert m.type_url == SERVICE and m.nonce and m.nonce not in nonces and not m.removed_resources, m
        nonces.add(m.nonce)
        for r in m.resources:
            assert r.name in names and r.name not in versions and r.version and r.resource.type_url == SERVICE, r
            versions[r.name] = r.version
        b_here = any(r.name == "svc/demo/b" for r in m.resources)
        s.send(nonce=m.nonce, error=nack("svc/demo/b", "no thank you") if b_here else None)

    # Absence is said, and the subscription stays: creation is pushed, and so are change and removal.
    s.send(subscribe=["svc/demo/late"])
    got, removed = s.until(["svc/demo/late"])
    assert removed == ["svc/demo/late"] and not got, (got, removed)
    path = write(a, "late", 80)
    got, removed = s.until(["svc/demo/late"])
    assert set(got) == {"svc/demo/late"} and not removed, (got, removed)
    old = got["svc/demo/late"].version
    write(a, "late", 81)
    got, removed = s.until(["svc/demo/late"])
    assert set(got) == {"svc/demo/late"} and got["svc/demo/late"].version != old, got
    os.remove(path)
    got, removed = s.until(["svc/demo/late"])
    assert removed == ["svc/demo/late"] and not got, (got, removed)

    # An address is answered with the canonical resource and an alias.
    s.send(subscribe=["ip/10.96.0.10:80"])
    got, removed = s.until(["ip/10.96.0.10:80"])
    assert list(got) == ["svc/demo/a"] and list(got["svc/demo/a"].aliases) == ["ip/10.96.0.10:80"], got
    assert got["svc/demo/a"].version == versions["svc/demo/a"]

    # After unsubscribing, a change is not sent; the marker that is subscribed shows that its push went by.
    write(a, "late", 80)
    s.until(["svc/demo/late"])
    s.send(unsubscribe=["svc/demo/late"])
    s.send(subscribe=["svc/demo/marker"])
    s.until(["svc/demo/marker"])
    write(a, "late", 82)
    write(a, "marker", 80)
    got, removed = s.until(["svc/demo/marker"])
    assert set(got) == {"svc/demo/marker"} and not removed, (got, removed)

    # Somebody else's self is refused by absence.
    s.send(mesh_client.TYPE + "Self", subscribe=["self/somebody-else"])
    got, removed = s.until(["self/somebody-else"], mesh_client.TYPE + "Self")
    assert removed == ["self/somebody-else"] and not got
    s.close()
    json.dump(dict(saved, versions=versions), open(a.save, "w"))
    print(json.dumps({"bytes": s.bytes, "versions": versions}))


def hold(a):
    control, _ = identified(a)
    s = Stream(control, a.workload)
    s.send(subscribe=["svc/demo/b"])
    m = s.next()
    s.send(nonce=m.nonce, error=nack("svc/demo/b", "no thank you"))
    s.next(600)


def reconnect(a):
    control, saved = identified(a)
    s = Stream(control, a.workload)
    held = saved["versions"]
    s.send(subscribe=list(held), initial=held)
    # Something not held, asked for afterwards: its answer must be the first message, alone.
    s.send(subscribe=["svc/demo/absent-probe"])
    m = s.next()
    assert not m.resources and list(m.removed_resources) == ["svc/demo/absent-probe"], m
    s.send(nonce=m.nonce)
    # Held, but gone since: a removal and nothing else.
    t = Stream(control, a.workload)
    t.send(subscribe=["svc/demo/never-was"], initial={"svc/demo/never-was": "1"})
    m = t.next()
    assert not m.resources and list(m.removed_resources) == ["svc/demo/never-was"], m
    # Held in another version: that one alone is sent.
    u = Stream(control, a.workload)
    u.send(subscribe=list(held), initial=dict(held, **{"svc/demo/c": "old"}))
    m = u.next()
    assert [r.name for r in m.resources] == ["svc/demo/c"] and not m.removed_resources, m
    print(json.dumps({"bytes": s.bytes}))
    for x in (s, t, u):
        x.close()


if __name__ == "__main__":
    p = argparse.ArgumentParser()
    p.add_argument("what", choices=["first", "hold", "reconnect"])
    for flag in ("address", "ca", "token", "namespace", "account", "workload", "config", "save"):
        p.add_argument("--" + flag, default="")
    args = p.parse_args()
    {"first": first, "hold": hold, "reconnect": reconnect}[args.what](args)
