"""The self-test: programs that try to break out, and what became of them, seen from outside where that is possible."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import secrets
import socket
import tempfile
import threading

from elpo_jax.tools.base import InfrastructureError, Status
from elpo_jax.tools.sandbox.backends import LOCAL, supported_platform
from elpo_jax.tools.sandbox.limits import Limits
from elpo_jax.tools.sandbox.worker import LocalWorker

_LOCK = threading.Lock()
LIMITS = Limits(cpu_s=2.0, memory_mb=128)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of one attempt to break out.

    Attributes:
      probe: What was tried.
      held: Whether the sandbox held.
      said: What the program got instead.
    """

    probe: str
    held: bool
    said: str


# Each probe is the body of a function that returns what it got; raising is being refused.
_ATTEMPTS = {
    "read a file of the host": "return open(CANARY).read()",
    "write a file of the host": "open(CANARY, 'a').write('x'); return 'written'",
    "make a file beside it": "open(CANARY + '.new', 'w').close(); return 'made'",
    "write where Python lies": "open(os.__file__, 'ab').close(); return 'opened for writing'",
    "list a folder of the host": "return os.listdir(os.path.dirname(CANARY))",
    "read a process's memory": "return open('/proc/1/environ').read()",
    "connect to a port of the host": "socket.create_connection(('127.0.0.1', PORT), 2); return 'connected'",
    "connect to a socket in the file system": (
        "s = socket.socket(socket.AF_UNIX); s.connect('/run/dbus/system_bus_socket'); return 'connected'"
    ),
    "signal a process of the host": "os.kill(PID if PID != os.getpid() else -1, 0); return 'it can be signalled'",
    "signal its parent": "os.kill(os.getppid() or -1, 0); return 'it can be signalled'",
    "start a process": "pid = os.fork(); pid or os._exit(0); os.waitpid(pid, 0); return 'forked'",
    "start a program": "os.execv('/bin/true', ['true'])",
    "trace a process": "return call(libc.ptrace, 16, PID, 0, 0)",
    # On no folder that exists, so that it does no harm where it is not refused.
    "mount a file system": (
        "try:\n        return call(libc.mount, b'x', b'/nowhere', b'tmpfs', 0, b'')\n"
        "    except FileNotFoundError:\n        return 'looked for the folder'"
    ),
    "make a namespace": "return call(libc.unshare, 0x10000000)",
    "become root": "os.setuid(0); return 'root'",
    "be root": "assert os.getuid() != 0 and os.geteuid() != 0; raise PermissionError(f'user {os.getuid()}')",
    "raise its limits": "resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); return 'raised'",
    "find a secret in the environment": "assert SECRET not in str(dict(os.environ)); raise LookupError('none')",
    "find an open descriptor": (
        "found = [fd for fd in range(4, 256) if is_open(fd)]\n"
        "    assert not set(found) - paths_only(found), found\n"
        "    raise LookupError('none but its own')"
    ),
    "use more memory than it may": "return len(bytearray(256 << 20))",
    "drop its filter": "return call(libc.prctl, 22, 0, 0, 0, 0)",
}

_PROGRAM = """
import ctypes, json, os, resource, socket, stat
CANARY, PORT, PID, SECRET = json.loads(input())
libc = ctypes.CDLL(None, use_errno=True)

def call(function, *arguments):
    if function(*arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return 'done'

def is_open(fd):
    try:
        os.fstat(fd)
        return True
    except OSError:
        return False

def paths_only(fds):
    '''Those that only name a folder of the library and can be neither read nor written.'''
    import fcntl
    return {fd for fd in fds if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH and stat.S_ISDIR(os.fstat(fd).st_mode)}

"""

_BENIGN = {
    "keep a file in the scratch folder": (
        "import os\nassert os.listdir() == [], os.listdir()\nopen('a', 'w').write('x')\nprint(open('a').read())",
        "x\n",
    ),
    "find it gone in the next program": ("import os\nprint(os.listdir())", "[]\n"),
    "run threads": (
        "import threading\nt = threading.Thread(target=print, args=('hi',))\nt.start()\nt.join()",
        "hi\n",
    ),
    "see the same random numbers": ("import random\nprint(random.random())", "0.8444218515250481\n"),
}


def run(backend: str) -> list[Verdict]:
    """Tries to break out of a backend, and to work in it.

    Raises:
      InfrastructureError: If it does not even start.
    """
    verdicts = []
    secret = secrets.token_hex(16)
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="elpo-probe-")))
        folder.chmod(0o777)
        canary = folder / "canary"
        canary.write_text(secret)
        canary.chmod(0o666)
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        listener.setblocking(False)
        with _LOCK:  # of two at a time, one would take away the other's
            os.environ["ELPO_PROBE_SECRET"] = secret
            try:
                worker = LocalWorker(backend, ())
            finally:
                del os.environ["ELPO_PROBE_SECRET"]
        stack.callback(worker.kill)
        given = json.dumps([str(canary), listener.getsockname()[1], os.getpid(), secret]).encode() + b"\n"
        for probe, body in _ATTEMPTS.items():
            code = (
                f"{_PROGRAM}def attempt():\n    {body}\n"
                "try:\n    print('ESCAPED', attempt())\n"
                "except (OSError, LookupError, MemoryError, ValueError) as error:\n"
                "    print('refused', type(error).__name__, error)"
            )
            result = worker.run(code, given, "script", LIMITS)
            said = (result.stdout or result.stderr or result.status.value).strip().splitlines()[-1]
            verdicts.append(Verdict(probe, said.startswith("refused") and secret not in result.stdout, said))
        untouched = canary.read_text() == secret and os.listdir(folder) == ["canary"]
        verdicts.append(Verdict("leave a trace on the host", untouched, "none" if untouched else "files changed"))
        try:
            listener.accept()[0].close()
            verdicts.append(Verdict("reach the host's port", False, "a connection arrived"))
        except BlockingIOError:
            verdicts.append(Verdict("reach the host's port", True, "no connection arrived"))
        for task, (code, expected) in _BENIGN.items():
            result = worker.run(code, b"", "script", LIMITS)
            works = result.status is Status.OK and result.stdout == expected
            verdicts.append(Verdict(f"(allowed) {task}", works, "works" if works else (result.stderr or result.stdout)))
    return verdicts


@functools.cache
def reason(backend: str) -> str:
    """Why a local backend cannot be used on this machine, or "". Tried once per process."""
    if problem := supported_platform():
        return problem
    try:
        failed = [verdict for verdict in run(backend) if not verdict.held]
    except InfrastructureError as error:
        return str(error)
    return "; ".join(f"a program could {verdict.probe} ({verdict.said[:200]})" for verdict in failed)


def available() -> dict[str, str]:
    """By local backend, strongest first, why it cannot be used on this machine, or ""."""
    return {backend: reason(backend) for backend in LOCAL}
