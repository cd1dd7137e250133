"""Calls a function in processes that can be stopped at any moment: a deadline by the host's clock, a memory limit.

Each worker is a fresh interpreter, not a fork, since the host holds JAX's threads; it talks over a pipe and serves many
calls. One that misses its deadline, runs out of memory or dies is replaced at once and the others are not disturbed.
This bounds what trusted code does with hostile text; programs are for the sandbox.
"""

import contextlib
import dataclasses
import importlib
import json
import math
import os
import queue
import resource
import socket
import subprocess
import sys
import threading
import time
import weakref
from multiprocessing.connection import Connection
from typing import Any, Literal

from elpo_jax.tools.base import InfrastructureError

_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from elpo_jax.tasks.math_worker import serve; serve(*sys.argv[2:])"
)
_START_S = 60.0  # for a worker to import what it needs, on a busy machine
_REPLY_KB = 1024


@dataclasses.dataclass(frozen=True)
class Reply:
    """How a call ended.

    Attributes:
      status: "ok"; "timeout"; "memory"; "error", the function raised; "crash", its process ended.
      value: What the function returned, if "ok".
      detail: For people.
    """

    status: Literal["ok", "timeout", "memory", "error", "crash"]
    value: Any = None
    detail: str = ""


class WorkerPool:
    """Calls one function in up to `workers` processes, from any number of threads. Workers start when first needed.

    Args:
      function: "module:name" of a function of JSON values with a JSON value, importable in a fresh interpreter.
      workers: Calls that run at once; others wait, and their deadline does not.
      memory_mb: Address space of a worker, the packages it loads included.
    """

    def __init__(self, function: str, workers: int = 2, memory_mb: int = 1024):
        if workers < 1 or memory_mb < 1:
            raise ValueError(f"WorkerPool(workers={workers}, memory_mb={memory_mb}): both must be at least 1")
        self._function = function
        self._memory_mb = memory_mb
        self._closed = False
        self._lock = threading.Lock()
        self._live: set[_Worker] = set()
        # One entry per allowed worker: an idle one, or None for one still to be started.
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(workers):
            self._idle.put(None)
        self._finalizer = weakref.finalize(self, _kill_all, self._live)

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all workers, also busy ones. Calls under way and later ones raise `InfrastructureError`."""
        with self._lock:
            self._closed = True
            _kill_all(self._live)

    def call(self, *arguments: Any, deadline_s: float) -> Reply:
        """Calls the function.

        Args:
          *arguments: JSON values.
          deadline_s: Seconds from the moment that a worker begins with it.

        Raises:
          InfrastructureError: If no worker can be started, or the pool is closed.
        """
        worker = self._idle.get()
        try:
            if worker is None or not worker.alive():  # one may have been killed while it was idle
                self._drop(worker)
                worker = self._start()
            worker.wait_until_ready()
            reply = worker.exchange(arguments, deadline_s)
            if self._closed:
                raise InfrastructureError("the worker pool is closed")
            if reply.status not in ("ok", "error"):
                self._drop(worker)
                worker = None
                with contextlib.suppress(InfrastructureError):  # the next call says so
                    worker = self._start()  # in the background: that call waits until it is ready
            return reply
        except BaseException:
            self._drop(worker)
            worker = None
            raise
        finally:
            self._idle.put(worker)

    def _start(self) -> "_Worker":
        with self._lock:
            if self._closed:
                raise InfrastructureError("the worker pool is closed")
            worker = _Worker(self._function, self._memory_mb)
            self._live.add(worker)
        return worker

    def _drop(self, worker: "_Worker | None") -> None:
        if worker is not None:
            with self._lock:
                self._live.discard(worker)
            worker.kill()


class _Worker:
    """The host's end of a worker. One call at a time."""

    def __init__(self, function: str, memory_mb: int):
        self._function = function
        self._ready = False
        ours, theirs = socket.socketpair()
        with ours, theirs:
            command = [
                sys.executable,
                "-c",
                _BOOT,
                json.dumps([str(entry) for entry in sys.path]),
                str(theirs.fileno()),
                function,
                str(memory_mb),
            ]
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # a Ctrl-C is for the host
                )
            except OSError as error:
                raise InfrastructureError(f"a worker for {function} cannot be started: {error}") from error
            self._link = Connection(ours.detach())
        self._started = time.monotonic()

    def alive(self) -> bool:
        return self._process.poll() is None

    def wait_until_ready(self) -> None:
        if self._ready:
            return
        try:
            left = max(0.0, self._started + _START_S - time.monotonic())
            said = self._receive() if self._link.poll(left) else f"it was not ready in {_START_S:g} s"
        except (EOFError, OSError):
            said = f"it ended with status {self._process.wait()}; the cause is on standard error"
        if said is not None:
            raise InfrastructureError(f"a worker for {self._function} cannot be started: {said}")
        self._ready = True

    def exchange(self, arguments: tuple[Any, ...], deadline_s: float) -> Reply:
        try:
            self._link.send_bytes(json.dumps([deadline_s, *arguments]).encode())
            if not self._link.poll(deadline_s):
                return Reply("timeout", detail=f"no answer in {deadline_s:g} s")
            return Reply(**self._receive())
        except (EOFError, OSError):
            return Reply("crash", detail="the worker's process ended")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._link.close()

    def _receive(self) -> Any:
        return json.loads(self._link.recv_bytes(_REPLY_KB << 10))


def _kill_all(workers: set[_Worker]) -> None:
    for worker in workers:
        worker._process.kill()
    for worker in workers:
        worker._process.wait()


def serve(descriptor: str, function: str, memory_mb: str) -> None:
    """A worker's life, until the host hangs up; run by `WorkerPool` in a process of its own."""
    link = Connection(int(descriptor))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        module, _, name = function.partition(":")
        call = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        link.send_bytes(json.dumps(f"{type(error).__name__}: {error}").encode())
        return
    if sys.platform == "linux":  # elsewhere it is not enforced, or refused
        _limit(resource.RLIMIT_AS, int(memory_mb) << 20)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # parsers write what they think of a text
    link.send_bytes(json.dumps(None).encode())
    with contextlib.suppress(EOFError, OSError):
        while True:
            deadline_s, *arguments = json.loads(link.recv_bytes())
            used = resource.getrusage(resource.RUSAGE_SELF)
            # The host's clock decides. This ends a worker whose host is gone.
            _limit(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime + deadline_s) + 5)
            try:
                reply = json.dumps({"status": "ok", "value": call(*arguments)})
            except MemoryError:
                reply = json.dumps({"status": "memory", "detail": f"more than {memory_mb} MiB"})
            except BaseException as error:  # a library's own time limits are not an Exception
                reply = json.dumps({"status": "error", "detail": f"{type(error).__name__}: {error}"[:200]})
            link.send_bytes(reply.encode())


def _limit(kind: int, most: int) -> None:
    """Lowers or raises a limit of this process, as far as its own highest one allows."""
    highest = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (most if highest == resource.RLIM_INFINITY else min(most, highest), highest))
