"""The host's end of one worker process on this machine."""

import contextlib
import json
import os
import pathlib
import re
import secrets
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence

from elpo_jax.tools.base import InfrastructureError, Status, ToolResult
from elpo_jax.tools.sandbox.backends import launch
from elpo_jax.tools.sandbox.inside import scratch
from elpo_jax.tools.sandbox.limits import Limits

START_SECONDS = 120.0  # importing and heating packages takes under two on an idle machine
REPLY_SECONDS = 10.0  # for scheduling, beyond the program's own hard limit
STOP_SECONDS = 5.0

_MEMORY = pathlib.Path("/dev/shm")
_IDENTIFIER = re.compile(r"[^\W\d]\w{0,63}")


_open: "weakref.WeakSet[LocalWorker]" = weakref.WeakSet()
os.register_at_fork(after_in_child=lambda: [worker.leave() for worker in list(_open)])


class LocalWorker:
    """One zygote and what surrounds it. Runs a program at a time.

    Args:
      backend: "namespaces", "landlock" or "unsafe".
      packages: Distributions to load.
      without: Layers to leave out.

    Raises:
      InfrastructureError: If it does not start; the message holds the end of what it said.
    """

    def __init__(self, backend: str, packages: Sequence[str], without: Sequence[str] = ()):
        self.backend = backend
        self._scratch = (
            ""
            if backend == "namespaces" or not _in_memory(_MEMORY)
            else str(_MEMORY / f"elpo-{os.getpid()}-{secrets.token_hex(6)}")
        )
        start = launch(backend, packages, without, self._scratch)
        self._lock = threading.Lock()
        self._killed = False
        with contextlib.ExitStack() as stack:
            try:
                self._log = stack.enter_context(tempfile.TemporaryFile())
                self._socket, theirs = map(stack.enter_context, socket.socketpair())
                self._process = subprocess.Popen(
                    [*start.command, json.dumps(start.settings)],
                    stdin=theirs,
                    stdout=subprocess.DEVNULL,
                    stderr=self._log,
                    env=start.environment,
                    cwd="/",
                    start_new_session=True,  # a Ctrl-C is ours alone to handle, and one signal reaches all of it
                )
            except OSError as error:  # no descriptors, processes or memory left
                raise InfrastructureError(f"a {backend} worker could not be started: {error}") from None
            stack.pop_all()
            theirs.close()
        self.pid = self._process.pid
        _open.add(self)
        with contextlib.suppress(OSError):  # should memory run out, let it not be the trainer's
            pathlib.Path(f"/proc/{self.pid}/oom_score_adj").write_text("1000")
        try:
            self._greeting()
        except BaseException as error:
            said = self._said()
            self.kill()
            if isinstance(error, OSError | EOFError | ValueError):
                raise InfrastructureError(f"a {backend} worker did not start: {said or error}") from None
            raise

    def run(self, code: str, stdin: bytes, mode: str, limits: Limits) -> ToolResult:
        """Runs one program; `mode` is "script" or "notebook".

        Raises:
          InfrastructureError: If the worker died, is stuck, or answers nonsense; it is of no use afterwards.
        """
        request = json.dumps({"mode": mode, "limits": _numbers(limits)}).encode()
        deadline = time.monotonic() + limits.hard_wall + REPLY_SECONDS
        program = code.encode("utf-8", "surrogatepass")
        try:
            self._send(
                struct.pack(">III", len(request), len(program), len(stdin)) + request + program + stdin, deadline
            )
            lengths = struct.unpack(">IIII", self._receive(16, deadline))
            if max(lengths[1:]) > limits.output_kb << 10 or lengths[0] > 1 << 16:
                raise ValueError(f"a reply of {lengths} bytes")
            head, stdout, stderr, report = (self._receive(length, deadline) for length in lengths)
            return self._result(json.loads(head), stdout, stderr, report, limits)
        except (OSError, EOFError, ValueError, LookupError) as error:
            raise InfrastructureError(
                f"a {self.backend} worker failed ({error or type(error).__name__}) {self._said()}"
            ) from None

    def hang_up(self) -> None:
        """Has it end, without waiting for that."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def leave(self) -> None:
        """Forgets it, in a process that is a copy of its own: only one may talk to it, and hold on to it."""
        self._socket.close()

    def kill(self) -> None:
        """Ends the process and all its descendants, and waits for it. Any number of times, from any thread."""
        with self._lock:
            if self._killed:
                return
            self._killed = True
            self.hang_up()  # at which it clears up and ends
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
                self._process.wait()
            self._socket.close()
            self._log.close()
            if self._scratch:  # as a rule it has done that itself
                scratch.remove(self._scratch)

    def _greeting(self) -> None:
        if self._receive(1, time.monotonic() + START_SECONDS) != b"\n":
            raise ValueError("it does not greet")

    def _send(self, data: bytes, deadline: float) -> None:
        self._socket.settimeout(max(0.001, deadline - time.monotonic()))
        self._socket.sendall(data)

    def _receive(self, size: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            chunk = self._socket.recv(min(size - len(data), 1 << 20))
            if not chunk:
                raise EOFError("it ended")
            data += chunk
        return bytes(data)

    def _said(self) -> str:
        """The end of its standard error, where that holds anything."""
        try:
            self._log.seek(0)
            return self._log.read().decode("utf-8", "replace").strip()[-500:]
        except (OSError, ValueError):
            return ""

    def _result(self, reply: dict, stdout: bytes, stderr: bytes, report: bytes, limits: Limits) -> ToolResult:
        """What a reply means. Our own failures come first, then limits, then what the program did."""
        if reply["said"] != "ready":
            raise InfrastructureError(f"a program's process could not be set up: {reply['said']!r} {reply['cause']}")
        kind, _, extra = report.decode("utf-8", "replace").partition("\n")
        kind = kind if _IDENTIFIER.fullmatch(kind) else "Exception" if kind else ""
        cause, number, exit_code = reply["cause"], reply["signal"], reply["exit_code"]
        # A machine that is short of memory ends processes without a word. Of a large one the program is to blame.
        large = reply["max_rss"] - reply["own_rss"] > 0.9 * (limits.memory_mb << 20)
        if cause == "outside" and not large:
            raise InfrastructureError("a program's process was killed from outside: is the machine short of memory?")
        status, detail = Status.OK, ""
        if cause in ("cpu", "wall"):
            status, detail = Status.TIMEOUT, cause
        elif cause == "output":
            status, detail = Status.OUTPUT_LIMIT, cause
        elif cause in ("files", "threads"):
            status, detail = Status.ERROR, cause
        elif cause == "outside" or (exit_code == 1 and extra == "memory\n"):
            status, detail = Status.MEMORY, kind
        elif number is not None:
            status, detail = Status.CRASH, signal_name(number)
        elif exit_code != 0:
            status, detail = Status.ERROR, kind or "exit"
        return ToolResult(
            status,
            detail=detail,
            null_output=status is Status.OK and not stdout.strip() and not stderr.strip(),
            truncated=cause == "output",
            exc_type=kind if exit_code and not cause else "",
            stdout=stdout.decode("utf-8", "replace"),
            stderr=stderr.decode("utf-8", "replace"),
            exit_code=None if cause else exit_code,  # a program may end just when a limit of ours ends it
            signal=None if cause else number,
            cpu_s=float(reply["cpu_s"]),
            wall_s=float(reply["wall_s"]),
            max_rss=int(reply["max_rss"]),
            out_bytes=len(stdout) + len(stderr),
            backend=self.backend,
        )


def _numbers(limits: Limits) -> dict[str, float]:
    """Limits as the worker takes them, in bytes and seconds."""
    return {
        "cpu": limits.cpu_s,
        "wall": limits.wall,
        "hard_wall": limits.hard_wall,
        "memory": limits.memory_mb << 20,
        "output": limits.output_kb << 10,
        "scratch": limits.scratch_mb << 20,
        "file": limits.file_mb << 20,
        "files": limits.files,
        "open_files": limits.open_files,
        "threads": limits.threads,
    }


def signal_name(number: int) -> str:
    """Such as SIGKILL."""
    try:
        return signal.Signals(number).name
    except ValueError:  # real-time signals have no names
        return f"SIG{number}"


def _in_memory(folder: pathlib.Path) -> bool:
    """Whether files in this folder lie in memory, which they can fill but not a disk, and can be written."""
    try:
        mounts = pathlib.Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return False
    kinds = [line.split()[2] for line in mounts if line.split()[1] == str(folder)]
    return kinds[-1:] == ["tmpfs"] and os.access(folder, os.W_OK)
