"""Processes: started on chosen cores, measured, ended by pid. And the network namespace that all of them share."""
import ctypes
import os
import re
import resource
import signal
import socket
import subprocess

from . import Invalid

CPUS = sorted(os.sched_getaffinity(0))
PROXY_CPU, LOAD_CPU = ({CPUS[-1]}, {CPUS[0]}) if len(CPUS) > 1 else (set(CPUS), set(CPUS))
LIBC = ctypes.CDLL(None, use_errno=True)
STARTED = []  # every Popen of this run; ended by pid on exit
NICE = [0]  # --nice
NOBODY = 65534


def own_network():
    """A network namespace of our own: no port of the machine is in the way, and interception rules touch nobody else.
    False without root: then what needs interception is skipped."""
    if os.geteuid() or LIBC.unshare(0x40000000):  # CLONE_NEWNET
        return False
    commands = ("link set lo up", "link add mesh0 type veth peer name mesh1", "link set mesh0 up", "link set mesh1 up",
                "address add 10.95.0.1/16 dev mesh0", "route add 10.96.0.0/12 dev mesh0")
    for command in commands:
        subprocess.run(["ip"] + command.split(), check=True)
    return True


def raise_file_limit():
    try:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError):
        pass
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def child(cpus, uid=None):
    """What a child does before exec."""
    def f():
        if cpus:
            os.sched_setaffinity(0, cpus)
        if NICE[0]:
            os.setpriority(os.PRIO_PROCESS, 0, NICE[0])
        if uid is not None:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
        LIBC.prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG: never outlive the harness
        raise_file_limit()
    return f


def spawn_on(cpus, argv, role, log, **kw):
    kw.setdefault("stdin", subprocess.DEVNULL)
    with open(log, "ab") as f:
        kw.setdefault("stdout", f)
        p = subprocess.Popen(argv, stderr=f, preexec_fn=child(cpus), **kw)
    p.role, p.log, p.argv = role, log, argv
    STARTED.append(p)
    return p


def out_of(argv, timeout=60, cpus=None, uid=None, **kw):
    """(exit code, output) of a command."""
    r = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout, preexec_fn=child(cpus, uid), text=True, **kw)
    return r.returncode, r.stdout


def family(pid):
    """pid and its descendants (nginx master -> worker)."""
    out = [pid]
    for q in out:
        try:
            for t in os.listdir("/proc/%d/task" % q):
                with open("/proc/%d/task/%s/children" % (q, t)) as f:
                    out += [int(x) for x in f.read().split()]
        except OSError:
            pass
    return out


def stop(procs):
    fam = {p: family(p.pid) for p in procs}
    for p in procs:
        if p.poll() is None:
            p.terminate()
    for p in procs:
        try:
            p.wait(5)
        except subprocess.TimeoutExpired:
            for pid in reversed(fam[p]):
                try:
                    os.kill(pid, signal.SIGKILL)
                except OSError:
                    pass
            p.wait(5)
        if p in STARTED:
            STARTED.remove(p)


def alive(procs):
    for p in procs:
        if p.poll() is not None:
            raise Invalid("%s exited: %s" % (p.role, open(p.log, errors="replace").read()[-600:]))


def cpu(procs):
    """(seconds total, user, sys) of the processes. Total: ns-exact run time of every live thread
    (schedstat) where the kernel has it, else utime+stime."""
    tot = usr = sy = 0.0
    hz = os.sysconf("SC_CLK_TCK")
    for p in procs:
        for pid in family(p.pid):
            try:
                with open("/proc/%d/stat" % pid) as f:
                    v = f.read().rsplit(")", 1)[1].split()
                u, s = int(v[11]) / hz, int(v[12]) / hz
                usr, sy = usr + u, sy + s
                ns = 0
                for t in os.listdir("/proc/%d/task" % pid):
                    with open("/proc/%d/task/%s/schedstat" % (pid, t)) as f:
                        ns += int(f.read().split()[0])
                tot += ns / 1e9 if ns else u + s
            except OSError:
                pass
    return tot, usr, sy


def mem_mib(procs):
    """RSS, PSS and the anonymous part of PSS. PSS of the binary's pages shrinks when somebody else runs the
    same binary, so compare rss or anon; the sums over master + worker count shared pages once only in pss/anon."""
    rss = pss = anon = 0
    for p in procs:
        for pid in family(p.pid):
            with open("/proc/%d/status" % pid) as f:
                rss += int(re.search(r"VmRSS:\s+(\d+)", f.read()).group(1))
            with open("/proc/%d/smaps_rollup" % pid) as f:
                t = f.read()
                pss += int(re.search(r"\nPss:\s+(\d+)", t).group(1))
                anon += int(re.search(r"\nPss_Anon:\s+(\d+)", t).group(1))
    return rss / 1024, pss / 1024, anon / 1024


def core_busy(cpus):
    """busy seconds of the proxy core (to show how much others used it)."""
    hz, b = os.sysconf("SC_CLK_TCK"), 0
    for line in open("/proc/stat"):
        m = re.match(r"cpu(\d+) (.*)", line)
        if m and int(m.group(1)) in cpus:
            v = [int(x) for x in m.group(2).split()]
            b += (sum(v[:8]) - v[3] - v[4]) / hz
    return b


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
