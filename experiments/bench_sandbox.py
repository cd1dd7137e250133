"""The bench of the sandbox:  python -m experiments.bench sandbox

The comparison is with what a user would have by hand: for each program a new Python that imports numpy and sympy,
plainly (`subprocess`) and in bubblewrap (`bwrap`). The three take turns in the same run, with as many threads asking as
the sandbox has workers.
"""

import concurrent.futures
import contextlib
import dataclasses
import math
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from elpo_jax.tools.sandbox import Limits, Sandbox, Status
from elpo_jax.tools.sandbox.pool import PACKAGES

PROGRAMS = {
    "print": "print(1 + 1)",
    "sympy": "import sympy\nx = sympy.Symbol('x')\nprint(sympy.solve(x**2 - 5 * x + 6, x))",
    "numpy": "import numpy as np\nprint(np.linalg.eigvalsh(np.diag([3.0, 1.0, 2.0])))",
}
ANSWERS = {"print": "2\n", "sympy": "[2, 3]\n", "numpy": "[1. 2. 3.]\n"}
IMPORTS = "".join(f"import {name}\n" for name in PACKAGES)
BWRAP = [
    *("bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"),
    *("--ro-bind", "/", "/", "--dev", "/dev", "--tmpfs", "/dev/shm", "--chdir", "/dev/shm", "--"),
]

Run = Callable[[str], str]  # what a program prints


def bench_sandbox(quick: bool, runs: int) -> Iterator[dict]:
    """Time and rate of calls, cold start, memory of the workers, and memory after many calls; one dict per line.

    Raises:
      RuntimeError: If a program is not answered as it should be.
    """
    yield from _rates(quick, runs)
    yield from _memory(quick, runs)


def _rates(quick: bool, runs: int) -> Iterator[dict]:
    cold = {"subprocess": _subprocess([]), "bwrap": _subprocess(BWRAP)}
    if reason := _bwrap_fails():
        del cold["bwrap"]
        yield {"bench": "sandbox", "case": "bwrap", "skipped": reason}
    cases = [("print", 1), ("print", 2), ("print", 8), ("sympy", 1), ("numpy", 1)]
    for name, workers in cases[:2] if quick else cases:
        with Sandbox(workers=workers, packages=PACKAGES) as sandbox:
            sides = {"sandbox": _sandbox(sandbox), **cold}
            calls = {"sandbox": 40 if quick else 500} | dict.fromkeys(cold, workers if quick else max(4, 2 * workers))
            seconds, rates = _take_turns(sides, calls, name, workers, runs)
            protocol = _protocol(sandbox, workers) | {"program": PROGRAMS[name], "calls": calls, "runs": runs}
        p50, p99 = ({side: _percentile(seconds[side], q) for side in sides} for q in (50, 99))
        line = {
            "bench": "sandbox",
            "case": f"{name}, {workers} worker{'s' * (workers > 1)}",
            "p50_ms": {side: round(1e3 * value, 2) for side, value in p50.items()},
            "p99_ms": {side: round(1e3 * value, 2) for side, value in p99.items()},
        }
        targets = {}
        if name == "print":
            targets |= {"p50 <= 7 ms": p50["sandbox"] <= 7e-3} if workers == 1 else {}
            targets |= {"at least 200 calls/s": rates["sandbox"] >= 200} if workers == 2 else {}
        for other in cold:
            yield line | {
                "value": round(rates["sandbox"], 1),
                "unit": "calls/s",
                "against": round(rates[other], 4),
                "ratio": round(rates["sandbox"] / rates[other], 2),
                "sides": ["sandbox", other],
                "targets": targets,
                **protocol,
            }
        if (name, workers) == ("print", 1):
            ratio = p50["subprocess"] / p50["sandbox"]
            yield {
                "bench": "sandbox",
                "case": "a call against a cold start of Python with numpy and sympy",
                "value": round(1e3 * p50["sandbox"], 2),
                "unit": "ms",
                "against": round(1e3 * p50["subprocess"], 2),
                "ratio": round(ratio, 1),
                "sides": ["sandbox", "subprocess"],
                "targets": {"at least 50 times as fast": ratio >= 50},
                **protocol,
            }


def _memory(quick: bool, runs: int) -> Iterator[dict]:
    """Of the workers once started, and of everything over many calls, without starting workers again in between."""
    workers, calls = 2, 500 if quick else 20_000
    before = _children()
    with Sandbox(workers=workers, packages=PACKAGES, recycle=2 * calls) as sandbox:
        run = _sandbox(sandbox)
        _timed(run, "print", 100, workers)  # first pages are touched, and memory pools filled
        ours = _children() - before
        start = _pss(ours)
        protocol = _protocol(sandbox, workers) | {"program": PROGRAMS["print"]}
        yield {
            "bench": "sandbox",
            "case": "memory of a worker and its processes, shared pages divided among those who share them",
            "value": round(start / workers, 1),
            "unit": "MB",
            "targets": {"at most 80 MB": start / workers <= 80},
            **protocol,
        }
        host, tree = [_rss()], [start]
        for _ in range(5):
            for name in ("print", "sympy", "numpy", "print"):
                _timed(run, name, calls // 20, workers)
            tree.append(_pss(_children() - before))
            host.append(_rss())
        restarts = sandbox.counters()["restarts"]
    growth = (tree[-1] - tree[1]) / workers
    yield {
        "bench": "sandbox",
        "case": f"growth of a worker over the last four fifths of {calls} calls",
        "value": round(growth, 2),
        "unit": "MB",
        "workers_mb": [round(value / workers, 1) for value in tree],
        "host_mb": [round(value, 1) for value in host],
        "restarts": restarts,
        "targets": {"flat: at most 2 MB, the host's too": max(growth, host[-1] - host[1]) <= 2.0},
        **protocol,
        "program": PROGRAMS,
        "calls": calls,
    }


def _take_turns(
    sides: dict[str, Run], calls: dict[str, int], name: str, workers: int, runs: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of every call of each side, and the median of its calls per second; the first turn does not count."""
    seconds = {side: [] for side in sides}
    rates = {side: [] for side in sides}
    for turn in range(-1, runs):
        for side, run in sides.items():
            began = time.perf_counter()
            took = _timed(run, name, calls[side] if turn >= 0 else workers, workers)
            if turn >= 0:
                seconds[side] += took
                rates[side].append(calls[side] / (time.perf_counter() - began))
    return seconds, {side: statistics.median(values) for side, values in rates.items()}


def _timed(run: Run, name: str, calls: int, workers: int) -> list[float]:
    """Runs a program so often, asked for by as many threads as there are workers; seconds of each call."""

    def call(_: int) -> float:
        began = time.perf_counter()
        printed = run(PROGRAMS[name])
        took = time.perf_counter() - began
        if printed != ANSWERS[name]:
            raise RuntimeError(f"{PROGRAMS[name]!r} printed {printed!r}")
        return took

    with concurrent.futures.ThreadPoolExecutor(workers) as threads:
        return list(threads.map(call, range(calls)))


def _sandbox(sandbox: Sandbox) -> Run:
    def run(program: str) -> str:
        result = sandbox.run(program)
        if result.status is not Status.OK:
            raise RuntimeError(f"{program!r} ended with {result}")
        return result.stdout

    return run


def _subprocess(prefix: list[str]) -> Run:
    def run(program: str) -> str:
        command = [*prefix, sys.executable, "-c", IMPORTS + program]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    return run


def _bwrap_fails() -> str:
    """Why bubblewrap cannot take part, or ""."""
    if shutil.which("bwrap") is None:
        return "bwrap is not installed"
    done = subprocess.run([*BWRAP, sys.executable, "-c", "import sympy"], capture_output=True, text=True)
    return done.stderr.strip()[-200:] if done.returncode else ""


def _protocol(sandbox: Sandbox, workers: int) -> dict:
    limits = dataclasses.asdict(Limits())
    return {"isolation": sandbox.backend, "workers": workers, "packages": list(PACKAGES), "limits": limits}


def _percentile(values: list[float], q: int) -> float:
    """The smallest value that q percent do not exceed."""
    return sorted(values)[math.ceil(len(values) * q / 100) - 1]


def _children() -> set[int]:
    """Process ids of all descendants of this process."""
    parents = {}
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text(errors="replace").rpartition(")")[2].split()[1])
    found, more = set(), {os.getpid()}
    while more:
        found |= more
        more = {pid for pid, parent in parents.items() if parent in found} - found
    return found - {os.getpid()}


def _pss(pids: set[int]) -> float:
    """Megabytes of processes, a page that n of them share counted as a part of n in each."""
    memories = set()  # texts, as processes that share all their memory have the same and are to count once
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            memories.add(pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text())
    lines = [line.split() for text in memories for line in text.splitlines()]
    return sum(int(line[1]) for line in lines if line[0] == "Pss:") / 1024


def _rss() -> float:
    """Megabytes of this process."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024
