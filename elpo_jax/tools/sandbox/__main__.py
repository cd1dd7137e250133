"""Tries the sandbox on this machine:  python -m elpo_jax.tools.sandbox check"""

import argparse
import os

from elpo_jax.tools.base import InfrastructureError
from elpo_jax.tools.sandbox import probes, remote
from elpo_jax.tools.sandbox.backends import LOCAL, fixes, supported_platform


def check() -> int:
    """Prints every probe of every backend and its verdict. Returns 0 if a backend holds."""
    usable = []
    for backend in LOCAL:
        print(f"{backend}:")
        try:
            if problem := supported_platform():
                raise InfrastructureError(problem)
            verdicts = probes.run(backend)
        except InfrastructureError as error:
            print(f"  FAILED   does not start: {error}\n")
            continue
        for verdict in verdicts:
            print(f"  {'held' if verdict.held else 'FAILED':8} {verdict.probe}: {verdict.said}")
        failed = sum(not verdict.held for verdict in verdicts)
        print(f"  {len(verdicts) - failed} of {len(verdicts)} held\n")
        if not failed:
            usable.append(backend)
    url = os.environ.get("ELPO_SANDBOX_URL", "")
    if url:
        problem = remote.reason(url)
        print(f"remote:\n  {f'FAILED   {problem}' if problem else 'runs programs; isolation is its own affair'}\n")
        usable += [] if problem else ["remote"]
    if usable:
        print(f"Programs will run under: {usable[0]}")
        return 0
    print(f"No backend works here, so no program will be run. Either of these commands would help:\n{fixes()}")
    return 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m elpo_jax.tools.sandbox", description=__doc__)
    parser.add_argument("command", choices=["check"], help="try to break out, and say what came of it")
    parser.parse_args(arguments)
    return check()


if __name__ == "__main__":
    raise SystemExit(main())
