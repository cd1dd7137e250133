"""The sandbox itself: a few workers, retries on fresh ones, and a pause when they keep failing."""

import collections
import contextlib
import dataclasses
import functools
import logging
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Literal, Protocol

from elpo_jax.tools.base import InfrastructureError, Status, ToolResult
from elpo_jax.tools.sandbox import probes, remote
from elpo_jax.tools.sandbox.backends import LAYERS, LOCAL, SandboxUnavailable, fixes, package_paths
from elpo_jax.tools.sandbox.limits import Limits
from elpo_jax.tools.sandbox.worker import LocalWorker

PACKAGES = ("numpy", "sympy")
PATIENCE_SECONDS = 600.0  # a pause that lasts longer ends the run, which can be resumed
AGAIN_SECONDS = 60.0  # after such a pause, until it is tried again

Mode = Literal["script", "notebook"]

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Program:
    """What to run.

    Attributes:
      code: Python source.
      stdin: Its standard input; None is an empty one.
      mode: "script" runs it as a file; "notebook" also prints the value of a final expression, unless that is None or
        a call of print.
      limits: Instead of the sandbox's own.
    """

    code: str
    stdin: str | bytes | None = None
    mode: Mode = "script"
    limits: Limits | None = None


class Worker(Protocol):
    """Something that runs a program at a time."""

    def run(self, code: str, stdin: bytes, mode: str, limits: Limits) -> ToolResult:
        """Raises InfrastructureError if it broke; it is killed then."""

    def hang_up(self) -> None:
        """Begins to end it."""

    def kill(self) -> None:
        """Ends it, any number of times, from any thread."""


class Sandbox:
    """Runs model-written programs in isolation; see `docs/sandbox.md`. Thread-safe.

    The first worker is started at once, others when they are first needed. Workers are replaced when they fail and
    after `recycle` programs. A program whose worker fails is run again on a fresh one; what fails `1 + retries` times
    is answered with status `sandbox_error`. Where more than 5 % of the runs within a minute fail in this way, calls
    wait until programs run again, for at most ten minutes.

    Args:
      workers: Programs that run at once.
      limits: Of one program; default: `Limits()`.
      backend: "auto" for the strongest that works here, or "namespaces", "landlock", "remote", "unsafe".
      packages: Installed distributions that programs can import beside the standard library; they are loaded once.
      recycle: Programs per worker.
      retries: Further attempts at a program whose worker failed.
      url: Of a provider with the SandboxFusion request format; default: the environment variable ELPO_SANDBOX_URL.
      _without: For tests: layers of `backends.LAYERS` to leave out.

    Raises:
      SandboxUnavailable: If no backend works, the one asked for does not, or a package is not installed.
      ValueError: If an argument makes no sense.
    """

    def __init__(
        self,
        workers: int = 2,
        limits: Limits | None = None,
        *,
        backend: str = "auto",
        packages: Sequence[str] = PACKAGES,
        recycle: int = 1000,
        retries: int = 2,
        url: str = "",
        _without: Sequence[str] = (),
    ):
        for name, value, least in (("workers", workers, 1), ("recycle", recycle, 1), ("retries", retries, 0)):
            if value < least:
                raise ValueError(f"Sandbox({name}={value}): it must be at least {least}")
        url = url or os.environ.get("ELPO_SANDBOX_URL", "")
        self.backend = choose(backend, url)
        self.limits = limits or Limits()
        if self.backend != "remote":
            package_paths(tuple(packages))  # what is missing is said now, and not tried again and again
        self._make: Callable[[], Worker] = (
            functools.partial(remote.RemoteWorker, url)
            if self.backend == "remote"
            else functools.partial(LocalWorker, self.backend, tuple(packages), tuple(_without))
        )
        self._recycle = recycle
        self._retries = retries
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._counters = collections.Counter(
            dict.fromkeys(("calls", "sandbox_errors", "retries", "restarts", "paused_s"), 0.0)
        )
        self._breaker = _Breaker()
        self._health = threading.Lock()
        self._gave_up_at = 0.0
        self._live: set[Worker] = set()
        # One entry per allowed worker and the programs it has run: an idle one, or None for one still to be started.
        self._idle: queue.LifoQueue[tuple[Worker | None, int]] = queue.LifoQueue()
        for _ in range(workers):
            self._idle.put((None, 0))
        if self.backend != "remote":
            self._start_first()
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="sandbox")
        self._finalizer = weakref.finalize(self, _kill_all, self._live)

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all processes. Calls under way and later ones raise `InfrastructureError`."""
        self._closing.set()
        with self._lock:
            live = list(self._live)
        for worker in live:
            worker.hang_up()
        for worker in live:
            worker.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._finalizer()

    def run(
        self, code: str, stdin: str | bytes | None = None, *, mode: Mode = "script", limits: Limits | None = None
    ) -> ToolResult:
        """Runs one program; see `Program`.

        Returns:
          How it ended. Whatever the program does or is, this does not raise.

        Raises:
          InfrastructureError: If the sandbox is closed, or programs could not be run for ten minutes.
          ValueError: If `stdin` is longer than its limit or the mode is unknown.
        """
        return self._run(Program(code, stdin, mode, limits))

    def run_many(self, programs: Sequence[str | Program]) -> list[ToolResult]:
        """Runs programs, as many at once as there are workers; the results are in order."""
        ready = [Program(item) if isinstance(item, str) else item for item in programs]
        try:
            return list(self._threads.map(self._run, ready))
        except (RuntimeError, CancelledError):
            if self._closing.is_set():
                raise InfrastructureError("the sandbox is closed") from None
            raise

    def counters(self) -> dict[str, float]:
        """What happened so far: "calls", "sandbox_errors" (lost after all retries), "retries", "restarts" of workers
        after a failure, and "paused_s"."""
        with self._lock:
            return dict(self._counters)

    def _count(self, name: str, amount: float = 1) -> None:
        with self._lock:
            self._counters[name] += amount

    def _run(self, program: Program) -> ToolResult:
        limits = program.limits or self.limits
        if program.mode not in ("script", "notebook"):
            raise ValueError(f"mode must be 'script' or 'notebook', not {program.mode!r}")
        stdin = program.stdin or b""
        stdin = stdin.encode("utf-8", "surrogatepass") if isinstance(stdin, str) else bytes(stdin)
        if len(stdin) > limits.stdin_mb << 20:
            raise ValueError(f"stdin has {len(stdin)} bytes, more than Limits.stdin_mb={limits.stdin_mb}")
        self._count("calls")
        if len(program.code) > limits.code_kb << 10 or len(_bytes(program.code)) > limits.code_kb << 10:
            message = f"the program is longer than {limits.code_kb} KiB"
            return ToolResult(Status.ERROR, detail="too_large", stderr=message, backend=self.backend)
        cause = ""
        for attempt in range(1, self._retries + 2):
            self._wait_until_healthy()
            try:
                result = self._attempt(program, stdin, limits)
            except InfrastructureError as error:
                if self._closing.is_set():
                    raise InfrastructureError("the sandbox is closed") from None
                cause = str(error)
                _log.warning("attempt %d at a program failed through a fault of the sandbox: %s", attempt, cause)
                self._count("restarts")
                self._count("retries", attempt <= self._retries)
                self._breaker.record(False)
            else:
                self._breaker.record(True)
                return dataclasses.replace(result, attempt=attempt)
        self._count("sandbox_errors")
        return ToolResult(Status.SANDBOX_ERROR, detail=cause, backend=self.backend, attempt=self._retries + 1)

    def _attempt(self, program: Program, stdin: bytes, limits: Limits) -> ToolResult:
        worker, served = self._idle.get()
        try:
            if worker is not None and served >= self._recycle:
                self._drop(worker)
                worker, served = None, 0
            if worker is None:
                worker, served = self._start(), 0
            result = worker.run(program.code, stdin, program.mode, limits)
        except BaseException:
            if worker is not None:
                self._drop(worker)
                worker, served = None, 0
            raise
        finally:
            self._idle.put((worker, served + 1))
        return result

    def _start_first(self) -> None:
        """A worker that cannot start, as for a package that does not load, shows now and not in every call."""
        self._idle.get()
        try:
            self._idle.put((self._start(), 0))
        except InfrastructureError as error:
            raise SandboxUnavailable(str(error)) from None

    def _start(self) -> Worker:
        if self._closing.is_set():
            raise InfrastructureError("the sandbox is closed")
        worker = self._make()
        with self._lock:
            self._live.add(worker)
        if self._closing.is_set():  # close() may have gone through the others meanwhile
            self._drop(worker)
            raise InfrastructureError("the sandbox is closed")
        return worker

    def _drop(self, worker: Worker) -> None:
        worker.kill()
        with self._lock:
            self._live.discard(worker)

    def _wait_until_healthy(self) -> None:
        """Returns at once unless too many runs have failed lately; then it waits until programs run again."""
        if not self._breaker.tripped():
            return
        with self._health:  # one caller looks, the others wait for it
            if not self._breaker.tripped():
                return
            began = time.monotonic()
            if self._gave_up_at and began < self._gave_up_at + AGAIN_SECONDS:
                raise InfrastructureError(f"{self._breaker.said()}, and lately none has run")
            _log.warning(
                "%s; the rollout pauses until programs run again (nothing is trained on meanwhile). See that there is "
                "memory and that `python -m elpo_jax.tools.sandbox check` passes",
                self._breaker.said(),
            )
            delay = 0.0
            while not self._probe():
                if self._gave_up_at or time.monotonic() - began > PATIENCE_SECONDS:
                    self._gave_up_at = time.monotonic()  # whoever calls next does not wait as long again
                    raise InfrastructureError(
                        f"{self._breaker.said()}, and none has run for {PATIENCE_SECONDS:g} s: see "
                        "`python -m elpo_jax.tools.sandbox check`, then go on from the last checkpoint with --resume"
                    )
                delay = min(delay + 1.0, 10.0)
                if self._closing.wait(delay):
                    raise InfrastructureError("the sandbox is closed")
            self._gave_up_at = 0.0
            self._count("paused_s", time.monotonic() - began)
            _log.warning("programs run again after %.1f s; the rollout goes on", time.monotonic() - began)
            self._breaker.clear()

    def _probe(self) -> bool:
        """Whether a fresh worker runs a program three times."""
        try:
            worker = self._start()
        except InfrastructureError:
            return False
        try:
            limits = dataclasses.replace(self.limits, cpu_s=max(self.limits.cpu_s, 1.0))
            return all(worker.run("print(6 * 7)", b"", "script", limits).stdout == "42\n" for _ in range(3))
        except InfrastructureError:
            return False
        finally:
            self._drop(worker)


def choose(backend: str, url: str = "") -> str:
    """The backend to use.

    Raises:
      SandboxUnavailable: If none works, or not the one asked for.
      ValueError: If there is no such backend, or `url` is no address.
    """
    if backend not in ("auto", "remote", *LAYERS):
        raise ValueError(f"backend must be 'auto', 'remote', {', '.join(map(repr, LAYERS))}, not {backend!r}")
    reasons: dict[str, str] = {}
    for name in LOCAL if backend == "auto" else (backend,):
        if name in LOCAL:
            reasons[name] = probes.reason(name)
            if not reasons[name]:
                return name
    if backend in ("auto", "remote"):
        reasons["remote"] = remote.reason(url) if url else "no url=... and no environment variable ELPO_SANDBOX_URL"
        if not reasons["remote"]:
            return "remote"
    if backend == "unsafe" or (backend == "auto" and os.environ.get("ELPO_UNSAFE_TOOLS") == "1"):
        _log.warning(
            "UNSAFE: model-written programs run without isolation, with all the rights of this user. They can read, "
            "change and send away whatever you can."
        )
        return "unsafe"
    failed = "\n".join(f"  {name}: {reason}" for name, reason in reasons.items())
    if backend == "remote":
        raise SandboxUnavailable(f"the provider of the sandbox cannot be used:\n{failed}")
    remedy = f"Either of these commands would help:\n{fixes()}\n"
    if backend != "auto":
        raise SandboxUnavailable(
            f"the backend that was asked for does not work here:\n{failed}\n{remedy}or try 'auto'."
        )
    raise SandboxUnavailable(
        f"nothing on this machine isolates model-written programs, so none is run:\n{failed}\n{remedy}"
        "or set ELPO_SANDBOX_URL to a provider. ELPO_UNSAFE_TOOLS=1 runs them without isolation, as yourself."
    )


def _bytes(code: str) -> bytes:
    return code.encode("utf-8", "surrogatepass")


def _kill_all(workers: set[Worker]) -> None:
    for worker in list(workers):
        with contextlib.suppress(Exception):
            worker.kill()
    workers.clear()


class _Breaker:
    """Says when too many runs have failed within a minute."""

    WINDOW_SECONDS, SHARE, LEAST = 60.0, 0.05, 20

    def __init__(self):
        self._lock = threading.Lock()
        self._runs: collections.deque[tuple[float, bool]] = collections.deque()
        self._failed = 0

    def record(self, ok: bool) -> None:
        with self._lock:
            self._runs.append((time.monotonic(), ok))
            self._failed += not ok
            self._forget()

    def tripped(self) -> bool:
        if not self._failed:  # the common case takes no lock
            return False
        with self._lock:
            self._forget()
            return len(self._runs) >= self.LEAST and self._failed > self.SHARE * len(self._runs)

    def said(self) -> str:
        with self._lock:
            return f"{self._failed} of {len(self._runs)} runs failed within a minute through faults of the sandbox"

    def clear(self) -> None:
        with self._lock:
            self._runs.clear()
            self._failed = 0

    def _forget(self) -> None:
        horizon = time.monotonic() - self.WINDOW_SECONDS
        while self._runs and self._runs[0][0] < horizon:
            self._failed -= not self._runs.popleft()[1]
