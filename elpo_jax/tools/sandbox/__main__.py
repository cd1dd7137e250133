"""Tries the sandbox on this machine:  python -m elpo_jax.tools.sandbox check"""

import argparse
import os
from collections.abc import Callable

from elpo_jax.tools.base import InfrastructureError
from elpo_jax.tools.sandbox import probes, remote
from elpo_jax.tools.sandbox.backends import LOCAL, fixes, package_paths, supported_platform
from elpo_jax.tools.sandbox.pool import PACKAGES


def check() -> int:
    """Prints every probe of every backend and its verdict. Returns 0 if a backend holds."""
    usable = [backend for backend in LOCAL if _holds(backend)]
    url = os.environ.get("ELPO_SANDBOX_URL", "")
    if url:
        problem = _problem(lambda: remote.reason(url))
        print(f"remote:\n  {f'FAILED   {problem}' if problem else 'runs programs; isolation is its own affair'}\n")
        usable += [] if problem else ["remote"]
    if problem := _problem(lambda: package_paths(PACKAGES) and ""):
        print(f"FAILED   {problem}\n")
        return 1
    if usable:
        print(f"Programs will run under: {usable[0]}")
        return 0
    print(f"No backend works here, so no program will be run. Either of these commands would help:\n{fixes()}")
    return 1


def _holds(backend: str) -> bool:
    print(f"{backend}:")
    verdicts: list[probes.Verdict] = []
    if problem := supported_platform() or _problem(lambda: verdicts.extend(probes.run(backend))):
        print(f"  FAILED   does not start: {problem}\n")
        return False
    for verdict in verdicts:
        print(f"  {'held' if verdict.held else 'FAILED':8} {verdict.probe}: {verdict.said}")
    held = sum(verdict.held for verdict in verdicts)
    print(f"  {held} of {len(verdicts)} held\n")
    return held == len(verdicts)


def _problem(attempt: Callable[[], str | None]) -> str:
    """What an attempt says is wrong, in words or by failing; "" if nothing is."""
    try:
        return attempt() or ""
    except (InfrastructureError, ValueError) as error:
        return str(error)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m elpo_jax.tools.sandbox", description=__doc__)
    parser.add_argument("command", choices=["check"], help="try to break out, and say what came of it")
    parser.parse_args(arguments)
    return check()


if __name__ == "__main__":
    raise SystemExit(main())
