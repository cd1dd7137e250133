"""The worker process of the code interpreter: forks one child per program and reports how it ended.

`interpreter.py` starts this file with a clean environment and the limits as arguments; it imports nothing of the
package. A message in either direction is a 4-byte big-endian length and that many bytes: a program in UTF-8 to the
worker, a JSON object {"end", "error", "output"} from it. `end` is "done", "cpu", "wall", "flood", "signal NAME" or
"exit CODE"; `error` is the exception's type and message on separate lines, or "".
"""

import ast
import contextlib
import ctypes
import gc
import importlib
import json
import math
import os
import random
import resource
import select
import signal
import sys
import time
import types
from typing import NoReturn

REQUESTS, REPLIES = 0, 1  # this process's standard input and output
REPORT_BYTES = 4096

# What programs import, loaded once here instead of in every child.
PRELOAD = (
    "bisect collections copy dataclasses datetime decimal enum fractions functools heapq itertools operator re "
    "statistics string typing"
)

# What would outlive a program, reach beyond its process, or let one call see another. `_guard` refuses it, so that it
# fails alike for every user and on every machine; it stops accidents, not attacks.
FORBIDDEN = frozenset(
    f"{module}.{name}"
    for module, names in {
        "os": "fork forkpty posix_spawn exec system killpg remove rename rmdir mkdir link symlink truncate chmod chown "
        "utime setxattr removexattr",
        "subprocess": "Popen",
        "pty": "spawn",
        "socket": "connect bind sendto sendmsg getaddrinfo gethostbyname",
    }.items()
    for name in names.split()
)
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

MAX_USER_PROCESSES = 4096  # of the user's altogether, so it only stops a flood; the kernel exempts root

PR_SET_PDEATHSIG = 1
_prctl = getattr(ctypes.CDLL(None), "prctl", None)  # Linux only


def main(cpu_seconds: float, wall_seconds: float, memory_mb: int, output_bytes: int) -> None:
    """Answers programs until the input ends."""
    for module in PRELOAD.split():
        importlib.import_module(module)
    _limit(resource.RLIMIT_AS, memory_mb << 20)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_NOFILE, 64)
    _limit(resource.RLIMIT_CORE, 0)
    nothing = os.open(os.devnull, os.O_RDWR)
    gc.collect()
    gc.freeze()  # keeps the children's collector from touching, and so copying, these pages
    while (code := _receive()) is not None:
        _run(code, nothing, cpu_seconds, wall_seconds, output_bytes)


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def _receive() -> bytes | None:
    """The next program, or None at the end of the input."""
    header = _read(4)
    return None if header is None else _read(int.from_bytes(header, "big"))


def _read(size: int) -> bytes | None:
    data = b""
    while len(data) < size:
        chunk = os.read(REQUESTS, size - len(data))
        if not chunk:
            return None
        data += chunk
    return data


def _run(code: bytes, nothing: int, cpu_seconds: float, wall_seconds: float, output_bytes: int) -> None:
    """Runs one program in a child and sends how it ended."""
    parent = os.getpid()
    output, output_end = os.pipe()
    report, report_end = os.pipe()
    child = os.fork()
    if child == 0:
        _child(code, parent, (nothing, output_end, nothing), report_end, cpu_seconds)
    os.close(output_end)
    os.close(report_end)
    limits = {output: output_bytes, report: REPORT_BYTES}
    texts, end = _collect(child, limits, report, deadline=time.monotonic() + wall_seconds)
    os.close(output)
    os.close(report)
    if end:
        _answer(end, texts[report], texts[output])  # before the child is buried, which the host need not wait for
    # Without this, a child that closed its pipes and goes on would keep us waiting.
    os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    if not end:
        used = usage.ru_utime + usage.ru_stime
        _answer(_exit_cause(status, out_of_time=used >= cpu_seconds), b"", texts[output])


def _answer(end: str, report: bytes, output: bytes) -> None:
    error = report.decode("utf-8", "replace").strip("\n")
    reply = json.dumps({"end": end, "error": error, "output": output.decode("utf-8", "replace")}).encode()
    data = len(reply).to_bytes(4, "big") + reply
    while data:
        data = data[os.write(REPLIES, data) :]


def _collect(child: int, limits: dict[int, int], report: int, deadline: float) -> tuple[dict[int, bytes], str]:
    """Reads the child's pipes until it has reported, has closed them, or passes a limit.

    Args:
      child: Its process id.
      limits: Descriptor of each pipe to the bytes it may bring.
      report: The pipe among them through which the child reports, once, after its last output.
      deadline: On the monotonic clock.

    Returns:
      What each pipe brought, and "done", "wall", "flood" or, if the child ended without a report, "".
    """
    texts = dict.fromkeys(limits, b"")
    open_pipes = set(limits)
    poller = select.poll()
    for pipe in (REQUESTS, *limits):
        poller.register(pipe, select.POLLIN)
    while open_pipes:
        reported = bool(texts[report])
        ready = poller.poll(0 if reported else max(0.0, deadline - time.monotonic()) * 1000)
        if not ready:
            return texts, "done" if reported else "wall"
        for pipe, _ in ready:
            if pipe == REQUESTS:  # no program comes before the answer to the last: our host is gone
                os.kill(child, signal.SIGKILL)
                sys.exit()
            data = os.read(pipe, 1 << 16)
            texts[pipe] += data
            if len(texts[pipe]) > limits[pipe]:
                return texts, "flood"
            if not data:
                poller.unregister(pipe)
                open_pipes.remove(pipe)
    return texts, "done" if texts[report] else ""


def _exit_cause(status: int, out_of_time: bool) -> str:
    """Why a child ended that did not report."""
    if not os.WIFSIGNALED(status):
        return f"exit {os.WEXITSTATUS(status)}"
    number = os.WTERMSIG(status)
    if number in (signal.SIGPROF, signal.SIGXCPU) or (number == signal.SIGKILL and out_of_time):
        return "cpu"
    names = {known.value: known.name for known in signal.Signals}
    return f"signal {names.get(number, number)}"  # real-time signals have no names


def _child(code: bytes, parent: int, standard: tuple[int, int, int], report_end: int, cpu_seconds: float) -> NoReturn:
    """Becomes the program's process, with `standard` as its standard input, output and error."""
    try:
        if _prctl is not None:
            _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the worker died before the line above
            os._exit(1)
        for target, source in enumerate(standard):
            os.dup2(source, target)
        _limit(resource.RLIMIT_NPROC, MAX_USER_PROCESSES)
        _limit(resource.RLIMIT_CPU, math.ceil(cpu_seconds) + 1)  # should the program disarm the exact timer
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        random.seed(0)
        os.write(report_end, _execute(code).encode("utf-8", "replace")[: REPORT_BYTES - 1] + b"\n")
    except MemoryError:
        os.write(report_end, b"MemoryError\n")
    finally:
        os._exit(1)  # runs nothing that the program left behind; the report tells success


def _execute(code: bytes) -> str:
    """Runs a program. Returns its exception's type and message on separate lines, or "" if none escaped."""
    stdout = sys.stderr = sys.stdout
    sys.addaudithook(_guard)
    error = ""
    try:
        _exec_and_print(code.decode())
    except MemoryError:
        raise
    except SystemExit as stop:
        if stop.code not in (None, 0):
            error = f"SystemExit\n{stop.code}"
    except BaseException as exception:
        try:
            error = f"{type(exception).__name__}\n{exception}"
        except BaseException:  # the program's own __str__
            error = f"{type(exception).__name__}\n"
    with contextlib.suppress(ValueError):  # the program closed it
        stdout.flush()
    return error


def _exec_and_print(code: str) -> None:
    """Executes a module and prints the value of its last statement where that is an expression, as a notebook does."""
    tree = ast.parse(code, "<code>")
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    main_module = sys.modules["__main__"] = types.ModuleType("__main__")
    main_module.exit = main_module.quit = sys.exit
    exec(compile(tree, "<code>", "exec"), main_module.__dict__)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), "<code>", "eval"), main_module.__dict__)
        if value is not None:
            print(repr(value))


def _guard(event: str, arguments: tuple) -> None:
    if event == "open":
        refused = isinstance(arguments[2], int) and arguments[2] & WRITE_FLAGS
    elif event == "os.kill":
        refused = arguments[0] != os.getpid()
    else:
        refused = event in FORBIDDEN
    if refused:
        raise PermissionError(f"{event} is not allowed here")


if __name__ == "__main__":
    main(float(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
