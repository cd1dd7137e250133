"""The tool `code_interpreter`: runs a Python program in a process of its own.

A few worker processes, started on first use and apart from this one (whose threads make it unsafe to fork), each fork
one child per program: a call costs a millisecond or two, and nothing a program does is seen by the next. This is not a
security boundary: a program that means harm can read the user's files and get around the limits, which only keep the
accidents of a learning policy from hurting the run.
"""

import collections
import contextlib
import json
import os
import pathlib
import queue
import re
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from elpo_jax.tools.base import InfrastructureError, State, Status, ToolResult

MAX_CODE_BYTES = 60_000  # fits into an empty pipe, so sending a program never blocks
ERROR_CHARS = 300
REPLY_SECONDS = 10.0  # for start-up and scheduling, beyond the program's own wall limit
WALL_FACTOR = 4  # wall seconds per CPU second: only a guard, since the verdict should not depend on the machine's load

_WORKER = pathlib.Path(__file__).with_name("_interpreter_worker.py")
_ADDRESS = re.compile(r"(?<= at )0x[0-9a-f]{8,16}(?=>)")  # in "<function f at 0x7f0c12345678>"
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")


class CodeInterpreter:
    """See `elpo_jax.tools.base.Tool`; the only argument is `code`. Thread-safe, and without state between calls.

    What a program prints is the answer, and the value of a final expression is printed as in a notebook. Programs see
    the standard library, no installed packages, no network, no files to write and no child processes.

    Hash seed and `random` are fixed and object addresses are not shown, so a program repeats its answer unless it asks
    for what no two processes share: a clock, a process id, `id()`, files such as those in /proc, or the system's
    randomness (`os.urandom`, `secrets`, `uuid`, `random.SystemRandom`, and `random.seed()` or `random.Random()` without
    a seed). An answer is remembered by the program's text (statuses ok, empty and error only, as the others could
    depend on the machine), so the many attempts at one prompt that write the same program run it once, and such a
    program too has one answer while it is remembered; but a repeated or resumed run may give it another.

    Statuses: `ok`; `empty` (nothing printed); `error` (`detail` names the exception type, the signal or "exit");
    `timeout` (CPU time; a wall-clock guard of four times that only catches programs that sleep); `memory`;
    `output_limit`. The text of an error ends with the last line of the traceback.

    Args:
      workers: Programs that run at once.
      cpu_seconds: CPU time per program.
      memory_mb: Address space per program, of which Python itself takes about 20.
      output_chars: Longest output; a longer one is cut there, which is what status `output_limit` says.
      remembered: Number of answers to remember; 0 runs every program.

    Raises:
      ValueError: If a limit makes no sense.
    """

    name = "code_interpreter"
    description = "Runs a Python program and returns what it prints, or the value of its last expression."
    parameters: Mapping[str, Any] = MappingProxyType(
        {
            "type": "object",
            "properties": {"code": {"type": "string"}},
            "required": ["code"],
            "additionalProperties": False,
        }
    )
    in_process = False

    def __init__(
        self,
        workers: int = 2,
        cpu_seconds: float = 2.0,
        memory_mb: int = 512,
        output_chars: int = 1000,
        remembered: int = 4096,
    ):
        for key, value, least in (
            ("workers", workers, 1),
            ("cpu_seconds", cpu_seconds, 0.01),
            ("memory_mb", memory_mb, 64),
            ("output_chars", output_chars, 1),
            ("remembered", remembered, 0),
        ):
            if value < least:
                raise ValueError(f"CodeInterpreter({key}={value}): it must be at least {least}")
        self._cpu_seconds = cpu_seconds
        self._wall_seconds = WALL_FACTOR * cpu_seconds
        self._memory_mb = memory_mb
        self._output_chars = output_chars
        self._remembered = remembered
        self._answers: collections.OrderedDict[str, ToolResult] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._closed = False
        self._live: set[_Worker] = set()
        # One entry per allowed worker: an idle one, or None for one that is still to be started.
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(workers):
            self._idle.put(None)
        self._finalizer = weakref.finalize(self, _kill_all, self._live)

    def __enter__(self) -> "CodeInterpreter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all worker processes. Calls under way and later ones raise `InfrastructureError`."""
        with self._lock:
            self._closed = True
        self._finalizer()

    def run(self, arguments: Mapping[str, Any], state: State | None) -> tuple[ToolResult, State | None]:
        """Runs a program.

        Raises:
          InfrastructureError: If the worker died; the next call starts another.
        """
        code = arguments["code"]
        result = self._recall(code)
        if result is None:
            result = self._run(code)
            self._remember(code, result)
        return result, state

    def _recall(self, code: str) -> ToolResult | None:
        with self._lock:
            if code in self._answers:
                self._answers.move_to_end(code)
            return self._answers.get(code)

    def _remember(self, code: str, result: ToolResult) -> None:
        if self._remembered and result.status in (Status.OK, Status.EMPTY, Status.ERROR):
            with self._lock:
                self._answers[code] = result
                if len(self._answers) > self._remembered:
                    self._answers.popitem(last=False)

    def _run(self, code: str) -> ToolResult:
        program = code.encode("utf-8", "replace")
        if len(program) > MAX_CODE_BYTES:
            text = f"Error: the program is longer than {MAX_CODE_BYTES} bytes"
            return ToolResult(Status.ERROR, text, "too_large")
        worker = self._idle.get()
        try:
            if worker is None:
                worker = self._start()
            reply = worker.ask(program, self._wall_seconds + REPLY_SECONDS)
        except BaseException as error:
            if worker is not None:
                worker.kill()
                self._live.discard(worker)
                worker = None
            if isinstance(error, OSError | EOFError | ValueError):
                raise InfrastructureError(f"the worker of the code interpreter died ({error})") from error
            raise
        finally:
            self._idle.put(worker)
        return self._result(reply)

    def _start(self) -> "_Worker":
        with self._lock:
            if self._closed:
                raise InfrastructureError("the code interpreter is closed")
            # Characters take at most four bytes, so no output within the limit is taken for a flood; the rest is for
            # the newlines at its end, which are cut off.
            output_bytes = 4 * self._output_chars + 64
            worker = _Worker(self._cpu_seconds, self._wall_seconds, self._memory_mb, output_bytes)
            self._live.add(worker)
            return worker

    def _result(self, reply: dict[str, str]) -> ToolResult:
        """What a worker's reply means. Limits come before anything the program could say about itself."""
        end, error = reply["end"], reply["error"]
        output = _ADDRESS.sub("0x0", reply["output"]).rstrip()
        kind, _, message = error.partition("\n")
        if end in ("cpu", "wall"):
            # What was printed by then depends on buffering and the machine's speed.
            return ToolResult(Status.TIMEOUT, f"Error: the program ran longer than {self._cpu_seconds:g} s", end)
        if kind == "MemoryError":
            return ToolResult(Status.MEMORY, f"Error: the program needs more than {self._memory_mb} MB", kind)
        if end == "flood" or len(output) > self._output_chars:
            return ToolResult(Status.OUTPUT_LIMIT, output[: self._output_chars] + "\n[output cut]", "output")
        if end not in ("done", "exit 0"):
            how, _, signal_name = end.partition(" ")
            line = f"Error: the program ended itself ({end})"
            return ToolResult(Status.ERROR, _joined(output, line), signal_name if how == "signal" else how)
        if kind:
            kind = kind if _IDENTIFIER.fullmatch(kind) else "Exception"
            line = f"{kind}: {_ADDRESS.sub('0x0', message)}" if message else kind
            return ToolResult(Status.ERROR, _joined(output, line[:ERROR_CHARS]), kind)
        return ToolResult(Status.OK, output) if output else ToolResult(Status.EMPTY, "(no output)")


def _joined(output: str, line: str) -> str:
    return f"{output}\n{line}" if output else line


def _kill_all(workers: set["_Worker"]) -> None:
    for worker in list(workers):
        worker.kill()
    workers.clear()


class _Worker:
    """The host's end of one worker process."""

    def __init__(self, cpu_seconds: float, wall_seconds: float, memory_mb: int, output_bytes: int):
        # Only what the dynamic loader may need is handed down, so no secret of this process reaches a program.
        environment = {key: os.environ[key] for key in ("LD_LIBRARY_PATH",) if key in os.environ}
        environment |= {"PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "1", "LC_ALL": "C.UTF-8"}
        # Not -I, which would ignore PYTHONHASHSEED; these are the rest of it, and no site-packages.
        command = [sys.executable, "-s", "-S", "-P", "-B", "-X", "utf8", "-W", "ignore", str(_WORKER)]
        self._process = subprocess.Popen(
            [*command, str(cpu_seconds), str(wall_seconds), str(memory_mb), str(output_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=environment,
            cwd="/",
            start_new_session=True,  # a Ctrl-C is ours alone to handle, and one signal reaches worker and child
        )
        self._killed = False
        self._lock = threading.Lock()

    def ask(self, program: bytes, seconds: float) -> dict[str, str]:
        """Runs one program.

        Raises:
          OSError, EOFError, ValueError: If the worker died, is stuck, or answers nonsense.
        """
        self._process.stdin.write(len(program).to_bytes(4, "big") + program)
        deadline = time.monotonic() + seconds
        size = int.from_bytes(self._read(4, deadline), "big")
        return json.loads(self._read(size, deadline))

    def kill(self) -> None:
        """Ends the process and its child, and waits for it. Any number of times, from any thread."""
        with self._lock:
            if self._killed:
                return
            self._killed = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()

    def _read(self, size: int, deadline: float) -> bytes:
        poller = select.poll()
        poller.register(self._process.stdout, select.POLLIN)
        data = b""
        while len(data) < size:
            if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError("no answer in time")
            chunk = self._process.stdout.read(size - len(data))
            if not chunk:
                raise EOFError("end of its output")
            data += chunk
        return data
