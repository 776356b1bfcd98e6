"""A client of the control plane written with grpcio and Envoy's own message classes (PyPI: xds-protos): nothing of
Outrigger's code. Certificates are asked for with openssl's keys; `control.proto` is compiled when first used."""
import importlib
import os
import queue
import subprocess
import sys
import tempfile
import threading

import grpc
from envoy.config.core.v3 import base_pb2
from envoy.service.discovery.v3 import ads_pb2_grpc, discovery_pb2

PROTO = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "proto", "proto")
TYPE = "type.googleapis.com/outrigger.mesh.v1."
SERVICE = TYPE + "Service"
# gRPC C-core verifies DNS names only, so it is told the one that the control plane's certificate carries.
NAME = [("grpc.ssl_target_name_override", "outrigger-control.outrigger-system.svc")]


def compiled(name):
    """The module of proto/proto/<name>.proto, with its gRPC stubs."""
    from grpc_tools import protoc
    out = tempfile.mkdtemp(prefix="outrigger-proto-")
    std = os.path.join(os.path.dirname(protoc.__file__), "_proto")
    if protoc.main(["protoc", "-I" + PROTO, "-I" + std, "--python_out=" + out, "--grpc_python_out=" + out, name + ".proto"]):
        raise SystemExit("protoc failed on %s.proto" % name)
    sys.path.insert(0, out)
    return importlib.import_module(name + "_pb2"), importlib.import_module(name + "_pb2_grpc")


def openssl(*args, data=None):
    return subprocess.run(["openssl", *args], input=data, check=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE).stdout


def key_and_csr(subject="/CN=ignored", san=None):
    """A P-256 key (PEM) and a CSR (DER). A subject or SAN is there to be ignored by the CA."""
    key = openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256")
    with tempfile.NamedTemporaryFile() as f:
        f.write(key)
        f.flush()
        extra = ["-addext", "subjectAltName=" + san] if san else []
        csr = openssl("req", "-new", "-key", f.name, "-subj", subject, "-outform", "DER", *extra)
    return key, csr


def pem(chain):
    return b"".join(openssl("x509", "-inform", "DER", data=der) for der in chain)


class Control:
    """The control plane at an address, as one client sees it."""

    def __init__(self, address, ca_file, key=None, chain=None):
        self.address, self.ca = address, open(ca_file, "rb").read()
        self.key, self.chain = key, chain
        self.pb, self.stubs = CONTROL
        creds = grpc.ssl_channel_credentials(self.ca, key, chain)
        self.channel = grpc.secure_channel(address, creds, NAME)

    def sign(self, token, namespace, account, workload, labels=(), csr=None):
        """Asks for a certificate -> (key, PEM chain, response). Raises grpc.RpcError when refused."""
        key = None
        if csr is None:
            key, csr = key_and_csr()
        request = self.pb.SignRequest(csr_der=csr, namespace=namespace, service_account=account, workload=workload, labels=dict(labels))
        metadata = [("authorization", "Bearer " + token)] if token else []
        answer = self.stubs.CertificatesStub(self.channel).Sign(request, metadata=metadata, timeout=10)
        return key, pem(answer.chain), answer

    def register(self, namespace, account, workload, labels=(), port=8080, inbound="127.0.0.1:1"):
        request = self.pb.RegisterRequest(namespace=namespace, service_account=account, workload=workload, labels=dict(labels),
                                          ports=[self.pb.Port(name="http", port=port, protocol="http1")], inbound=inbound)
        return self.stubs.RegistryStub(self.channel).Register(request, timeout=10)

    def withdraw(self, namespace, workload):
        return self.stubs.RegistryStub(self.channel).Withdraw(self.pb.WithdrawRequest(namespace=namespace, workload=workload), timeout=10)


class Stream:
    """One delta stream. Every message that arrives is counted in bytes and handed out in order."""

    def __init__(self, control, node):
        self.node, self.bytes, self.error = node, 0, None
        self.requests, self.responses = queue.Queue(), queue.Queue()
        self.call = ads_pb2_grpc.AggregatedDiscoveryServiceStub(control.channel).DeltaAggregatedResources(iter(self.requests.get, None))
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        try:
            for message in self.call:
                self.bytes += message.ByteSize()
                self.responses.put(message)
        except grpc.RpcError as e:
            self.error = e
        self.responses.put(None)

    def send(self, type_url=SERVICE, subscribe=(), unsubscribe=(), nonce="", initial=None, error=None):
        self.requests.put(discovery_pb2.DeltaDiscoveryRequest(
            node=base_pb2.Node(id=self.node), type_url=type_url, resource_names_subscribe=subscribe,
            resource_names_unsubscribe=unsubscribe, response_nonce=nonce, initial_resource_versions=initial or {}, error_detail=error))

    def next(self, seconds=10):
        """The next response; AssertionError when none comes."""
        try:
            message = self.responses.get(timeout=seconds)
        except queue.Empty:
            raise AssertionError("no response within %s s" % seconds) from None
        assert message is not None, "the stream ended: %s" % self.error
        return message

    def until(self, names, type_url=SERVICE):
        """Responses, each acknowledged, until every name was sent or removed -> ({name: Resource}, [removed])."""
        missing, got, removed = set(names), {}, []
        while missing:
            message = self.next()
            assert message.type_url == type_url, message
            for r in message.resources:
                got[r.name] = r
                missing -= {r.name, *r.aliases}
            removed += message.removed_resources
            missing -= set(message.removed_resources)
            self.send(type_url, nonce=message.nonce)
        return got, removed

    def close(self):
        self.requests.put(None)
        self.call.cancel()


CONTROL = compiled("control")
