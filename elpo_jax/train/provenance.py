"""Where a result was made: commit, versions and machine. Every result and every checkpoint carries it."""

import contextlib
import importlib.metadata
import os
import pathlib
import platform
import subprocess

import jax

_PACKAGES = {"jax": "jax", "flax": "flax", "optax": "optax", "orbax": "orbax-checkpoint"}


def commit() -> str | None:
    """The commit of this code, with "-dirty" where tracked files differ from it; None outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]  # the commit's own name, and never a tag's
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=pathlib.Path(__file__).parent, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def versions() -> dict[str, str]:
    """Of what the last bits of a result depend on."""
    return {"python": platform.python_version(), **{k: importlib.metadata.version(v) for k, v in _PACKAGES.items()}}


def provenance() -> dict:
    """Commit, versions and machine kind, as JSON values."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    return {
        "commit": commit(),
        **versions(),
        "backend": jax.default_backend(),
        "devices": jax.device_count(),
        "device_kind": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "processor": processor,
    }
