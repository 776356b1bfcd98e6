"""Instructions per request, counted by callgrind: what the clock says of small differences, confirmed without one."""
import glob
import os
import re
import shutil
import time

from . import Invalid
from .process import out_of
from .session import Session

REQUESTS = 500


def wasm_instructions(run, name):
    """What the filter adds to one request: instructions of the whole process in user space, generated code included."""
    with_, without = (per_request(run, name, topology) for topology in ("h1-wasm", "h1-single"))
    return {"added_instructions": with_ - without, "with_instructions": with_, "without_instructions": without}


def per_request(run, name, topology):
    # Children too: the filter's compiler has to see the same processor as the proxy does, which is valgrind's.
    wrap = [shutil.which("valgrind"), "--tool=callgrind", "--trace-children=yes", "--callgrind-out-file={dir}/callgrind.%p"]
    with Session(run, name, topology, wrap=wrap, patience=240) as s:
        pid = str(s.procs[0].pid)
        s.h1_requests(200)  # fills the upstream pool, and makes V8 compile what it wants to compile
        control("--zero", pid)
        s.h1_requests(REQUESTS)
        control("--dump", pid)
        end = time.time() + 60
        while time.time() < end:
            for dump in glob.glob(os.path.join(s.dir, "callgrind.%s.*" % pid)):
                total = re.search(r"^totals: (\d+)", open(dump, errors="replace").read(), re.M)
                if total:
                    return int(total.group(1)) / REQUESTS
            time.sleep(0.1)
    raise Invalid("callgrind wrote no counts")


def control(command, pid):
    rc, out = out_of(["callgrind_control", command, pid], 120)
    if rc or "OK" not in out:
        raise Invalid("callgrind_control %s: %s" % (command, out[-300:]))
