"""What a remote provider runs before the program: `remote.py` sends this text, that of `inside/program.py`, and a call.

It makes a plain `python file.py` somewhere else behave like a call at home as far as a process can do that to itself:
exact standard input, fixed seeds and hash seed, a limit on CPU time and address space. It is no isolation and holds
nothing secret; the provider isolates. Standard library only, and nothing newer than Python 3.8, as the provider's
Python is not ours.
"""

import base64
import contextlib
import importlib.util
import math
import os
import random
import signal
import sys
import tempfile
import time

PACKAGES_MB = 256  # address space for numpy and the like, which are not loaded when the limit is set
ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "PYTHONUTF8": "1",
    "TZ": "UTC",
    "OMP_NUM_THREADS": "1",  # each thread of a BLAS takes tens of megabytes of address space
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
}


def prepare(cpu_s, memory_mb):
    """Makes this process what the program expects. Standard input is its own, in base64."""
    _restart()
    _set_stdin(base64.b64decode(sys.stdin.buffer.read()))
    sys.stdout.reconfigure(encoding="utf-8")
    sys.stderr.reconfigure(encoding="utf-8", errors="backslashreplace")
    sys.argv = ["<code>"]
    random.seed(0)
    sys.meta_path.insert(0, _SeedNumpy)
    _limit(cpu_s, memory_mb)


def _restart():
    """Starts Python again where a variable that it reads only at its start is not as it should be."""
    wrong = any(os.environ.get(name) != value for name, value in ENVIRONMENT.items())
    os.environ.update(ENVIRONMENT)
    if wrong and sys.executable and "__file__" in globals():
        with contextlib.suppress(OSError):
            os.execv(sys.executable, [sys.executable, __file__])


def _set_stdin(data):
    """Makes `data` the standard input, which the provider could only have passed as text."""
    if data:
        with tempfile.TemporaryFile() as file:
            file.write(data)
            file.seek(0)
            os.dup2(file.fileno(), 0)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - it stays open


class _SeedNumpy:
    """An import hook that seeds numpy's global generator when a program first imports it, which many do not."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != "numpy.random":
            return None
        sys.meta_path.remove(cls)
        spec = importlib.util.find_spec(name)
        if spec is not None:
            load = spec.loader.exec_module

            def load_and_seed(module):
                load(module)
                module.seed(0)

            spec.loader.exec_module = load_and_seed
        return spec


def _limit(cpu_s, memory_mb):
    """As far as this system has such limits and its own are not lower."""
    try:
        import resource
    except ImportError:
        return
    cpu = math.ceil(time.process_time() + cpu_s) + 1
    # A program may disarm the exact timer, and then learns of the next limit by a signal of its own.
    wanted = {resource.RLIMIT_CORE: (0, 0), resource.RLIMIT_CPU: (cpu, cpu + 1)}
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
        wanted[resource.RLIMIT_AS] = (used + ((memory_mb + PACKAGES_MB) << 20),) * 2
    for kind, values in wanted.items():
        most = resource.getrlimit(kind)[1]
        values = tuple(value if most == resource.RLIM_INFINITY else min(value, most) for value in values)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, values)
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
